"""What the page and its Markdown twin show, as text, rows and pictures; their wording is in the two templates."""

from pathlib import Path

import pandas as pd

from pipeline.core.params import Published
from pipeline.evidence import figures, results, statistics
from pipeline.evidence.results import COLUMNS, CONTROLS, Scores
from pipeline.evidence.statistics import Interval

LABELS = {"shuffled": "control: shuffled", "drift": "control: drift", "published": "the paper's"}


def section(
    profile: str, backbone: str, scores: dict[str, Scores], found: dict, gain: dict[str, float], recipe: str,
    seed: int, run: str, entry: Published | None,
) -> dict:  # fmt: skip
    """All that is shown of one backbone.

    found: its part of evidence.json; gain: diva's, as report.json has it; run: what the seeds that count are of.
    """
    over_seeds = results.seeds_table(profile).query("backbone == @backbone and recipe == @recipe")
    others = over_seeds.query("run != @run")
    published = (entry.before, entry.after) if entry else None
    curves: dict[str, Path] = {
        weights: Path("metrics", profile, "train", f"{backbone}-{folder}", "plots", "metrics")
        for weights, folder in (("diva", recipe), ("shuffled", f"{recipe}-shuffled"))
        if weights in scores
    }
    drawn = [figures.patterns(scores, entry), *([figures.gains(found)] if found["weights"] else [])]
    drawn += [figures.probe(scores), figures.losses(curves)]
    return {
        "backbone": backbone,
        "headline": headline(scores, found),
        "four_cells": four_cells(scores),
        "verdicts": verdicts(found, published),
        "published": entry,
        "figures": [figures.url(figure) for figure in drawn if figure],
        "cosine": {weights: Interval(*result["cosine"]) for weights, result in found["weights"].items()},
        "tests": {weights: result["pairs"] for weights, result in found["weights"].items()},
        "seeds": seeds(over_seeds.query("run == @run"), gain, seed, found["read_out"][0], published),
        "other_seeds": ", ".join(map(str, sorted(set(others.seed)))),
        "changed": pairs_changed(scores, Path("data", profile, "mmvp_vlm")),
        "weights": {weights: of_weights.mmvp["weights_sha256"] for weights, of_weights in scores.items()},
    }


def headline(scores: dict[str, Scores], found: dict) -> list[list[str]]:
    """Rows for people: every set of weights, every gain with its interval."""
    rows = []
    for weights, of_weights in scores.items():
        values = of_weights.headline()
        rows.append([LABELS.get(weights, weights), *(f"{values[c]:.1f}" if c in values else "" for c in COLUMNS)])
    for weights, result in found["weights"].items():
        rows.append([f"gain, {LABELS.get(weights, weights)}", *cells(result["gain"])])
    for control, remains in found["remains"].items():
        rows.append([f"diva less {control}", *cells(remains)])
    return rows


def cells(intervals: dict[str, list[float]]) -> list[str]:
    return [Interval(*intervals[column]).text() if column in intervals else "" for column in COLUMNS]


def four_cells(scores: dict[str, Scores]) -> list[list[str]]:
    """Average and patterns of pretrained and tuned weights under both read-outs, each gain within one read-out."""
    before, rows = scores["pretrained"], []
    for weights, after in scores.items():
        if weights == "pretrained" or weights in CONTROLS:
            continue
        for pattern in [None, *before.strata("pairs_plain")]:
            row = [weights, pattern or "average"]
            for column, (read_out, direction) in list(results.PAIRS.items())[:2]:
                for of_weights in (before, after):
                    block = of_weights.mmvp[read_out][direction]
                    value, sd = (
                        (block["patterns"][pattern], block["patterns_sd_over_draws"][pattern])
                        if pattern
                        else (block["average"], block["sd_over_draws"])
                    )
                    row.append(f"{value:.1f}" + (f" ± {sd:.1f}" if block["draws"] > 1 else ""))
                chosen = (s.strata(column) for s in (before, after))
                was, now = ({pattern: strata[pattern]} if pattern else strata for strata in chosen)
                row.append(results.change(was, now).text())
            rows.append(row)
    return rows


def verdicts(found: dict, published: tuple[float, float] | None) -> list[str]:
    """What the figures say of each set of weights, and no more."""
    texts = []
    for weights, result in found["weights"].items():
        if weights in CONTROLS:
            continue
        judged = result["verdict"]
        said = (
            "plain read-out before, published read-out after, as in the paper's table"
            if published
            else "plain read-out"
        )
        gain = Interval(*(result["as_published"] if published else result["gain"]["pairs_plain"]))
        text = f"{weights}: pairs {judged['pairs']}, {gain.text()} points ({said}"
        text += f"; published {published[1] - published[0]:+.1f})" if published else ")"
        text += f". The read-out alone gives {Interval(*found['read_out']).text()}."
        if "zeroshot" in judged:
            cost = Interval(*result["gain"]["zeroshot"]).text()
            text += f" Zero-shot classification: {judged['zeroshot']}, {cost}."
            if judged["pairs"] in ("reproduced", "gained") and judged["zeroshot"] != "preserved":
                text += " The gain is bought with zero-shot ability."
        tests = result["pairs"]["plain"]
        shows, smallest = "so few pairs show no gain reliably", tests["smallest_gain"]
        if smallest is not None:
            shows = f"so many pairs show gains of {smallest:g} points and more in 80 of 100 experiments"
        text += (
            f" Of {tests['pairs']} pairs {tests['won']} were won and {tests['lost']} lost (plain read-out; exact "
            f"McNemar p = {tests['p']:g}); {shows}. Mean cosine to the original embedding: {result['cosine'][0]:.3f}."
        )
        texts.append(text)
    for control, remains in found["remains"].items():
        left = ", ".join(
            f"{COLUMNS[c]} {Interval(*remains[c]).text()}" for c in remains if c in ("pairs_plain", "zeroshot")
        )
        texts.append(f"What remains of diva's change after the control {control} is subtracted: {left}.")
    return texts


def seeds_verdict(group: pd.DataFrame, read_out: float, published: tuple[float, float] | None) -> str:
    """The rule, applied to the interval over seeds of diva's gains; read_out: what the read-out alone gives."""
    judged = (group.pairs_published + read_out, published[1] - published[0]) if published else (group.pairs_plain, None)
    gain, zeroshot = statistics.over_seeds(judged[0]), group.zeroshot.dropna()
    text = f"Over {len(group)} training seeds: pairs {statistics.gain_verdict(gain, judged[1])}, {gain.text()}"
    if len(zeroshot) == len(group):
        cost = statistics.over_seeds(zeroshot)
        text += f"; zero-shot classification {statistics.preserved_verdict(cost)}, {cost.text()}"
    return f"{text} (t interval of the mean)."


def seeds(
    table: pd.DataFrame, gain: dict[str, float], seed: int, read_out: float, published: tuple[float, float] | None
) -> dict | None:
    """Mean, s.d. and interval over training seeds, and whether this very run is among them; None without two.

    table: of one backbone, recipe and run.
    """
    groups = {str(weights): group for weights, group in table.groupby("weights", sort=False) if len(group) > 1}
    if not groups:
        return None
    columns = [column for column in COLUMNS if table[column].notna().all()]
    rows = [
        [
            LABELS.get(w, w),
            str(len(g)),
            *(f"{statistics.over_seeds(g[c]).text()} (s.d. {g[c].std():.1f})" for c in columns),
        ]
        for w, g in groups.items()
    ]
    own = table[(table.weights == "diva") & (table.seed == seed)]
    same = own.empty or not gain or any(all(row[c] == gain.get(c) for c in columns) for _, row in own.iterrows())
    return {
        "columns": [COLUMNS[column] for column in columns],
        "rows": rows,
        "seeds": ", ".join(map(str, sorted(set(table.seed)))),
        "same": same,
        "verdict": seeds_verdict(groups["diva"], read_out, published) if "diva" in groups else None,
        "figure": figures.url(figures.seeds(table)),
    }


def pairs_changed(scores: dict[str, Scores], folder: Path) -> list[dict]:
    """The pairs that were won and those that were lost under the plain read-out, with statements and pictures."""
    questions = pd.read_csv(folder / "Questions.csv").set_index("Question ID")
    folders = {path.name.replace("_", " "): path for path in folder.glob("*/*") if path.is_dir()}
    lists = []
    for weights in (weights for weights in scores if weights != "pretrained" and weights not in CONTROLS):
        for how, numbers in results.changed_pairs(scores["pretrained"], scores[weights], "plain").items():
            pairs = []
            for number in numbers:
                two = questions.loc[[2 * number - 1, 2 * number]]
                kind = str(two.Type.iloc[0]).replace("_", " ")
                pictures = [(folders[kind] / f"{i}.jpg", text) for i, text in two.Statement.items()]
                pairs.append({"number": number, "pattern": kind, "pictures": pictures})
            lists.append({"weights": weights, "how": how, "pairs": pairs})
    return lists
