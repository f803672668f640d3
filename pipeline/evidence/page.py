"""What report.html and report.md show, as text, rows and images; the two templates hold the wording."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from pipeline.evidence import downstream, figures, provenance, results, statistics
from pipeline.evidence.results import COLUMNS, CONTROLS, Claim, Scores, label, recipe_and_control, without_controls
from pipeline.evidence.statistics import Interval
from pipeline.sections.reported import Reported

FOUR_CELLS = [
    "weights", "pattern", "stock embedding, before", "after", "gain", "published pooling, before", "after", "gain",
]  # fmt: skip
TESTS = [
    "weights", "pooling rule", "won", "lost", "of", "exact McNemar p", "smallest gain detected (power 80 %)",
    "cosine to the original [95 %]",
]  # fmt: skip

COMPARISON = [
    "", "pairs, stock embedding", "zero-shot classification", "pairs won", "lost", "exact McNemar p",
    "p, corrected (Holm)",
]  # fmt: skip
NEAR = 0.1  # points of accuracy that rounding and other kernels explain


def section(
    p: Reported, backbone: str, scores: dict[str, Scores], claims: dict[str, Claim], found: dict, gain: dict[str, dict]
) -> dict:
    """What the page shows of one backbone; a table's first row has its headings, and a table without rows is empty.

    claims: what was published, by weights. found: the backbone's part of evidence.json. gain: its part of report.json.
    """
    profile, entry = p.run.profile, p.backbones[backbone].published
    table = results.seeds_table(profile).query("backbone == @backbone")
    runs = table.recipe.map({recipe: provenance.run(profile, backbone, recipe) for recipe in p.run.recipes})
    counting, others = table[table.run == runs], table[runs.notna() & (table.run != runs)]
    groups = {str(w): group for w, group in counting.groupby("weights", sort=False) if len(group) > 1}
    judged = {w: seeds_verdict(groups[w], found, claims.get(w)) for w in p.run.recipes if w in groups}
    curves = {w: Path("metrics", profile, "train", f"{backbone}-{w}", "plots", "metrics") for w in scores}
    drawn = [
        figures.patterns(scores, entry),
        figures.gains(found["weights"]),
        figures.probe(scores),
        figures.losses(curves),
    ]
    return {
        "backbone": backbone,
        "controlled": bool(found["effect"]),
        "overview": overview(scores, found),
        "baseline": baseline(found["baseline"], scores["pretrained"]),
        "verdicts": [f"{text} {judged.get(w, '')}".strip() for w, text in verdicts(found).items()],
        "headline": headline(scores, found),
        "sets": "; ".join(f"{COLUMNS[column]}: {', '.join(names)}" for column, names in found["sets"].items()),
        "comparison": comparison(found),
        "claims": [
            [name, checkpoint.published.pairs, checkpoint.published.pooling]
            for name, checkpoint in p.backbones[backbone].checkpoints.items()
            if checkpoint.published
        ],
        "downstream": downstream.table(found.get("downstream", {})),
        "published_downstream": headed(
            ["model", "test", "original encoder", "DIVA", "gain"],
            [
                [model, test, before, after, f"{after - before:+.1f}"]
                for model, tests in p.published_downstream.get(backbone, {}).items()
                for test, (before, after) in tests.items()
            ],
        ),
        "four_cells": four_cells(scores),
        "matching": matching(scores) if scores["pretrained"].mmvp else [],
        "published": entry,
        "figures": [figures.url(figure) for figure in drawn if figure],
        "tests": headed(
            TESTS,
            [
                [label(w), pooling, *test.values(), "{:.3f} [{:.3f}, {:.3f}]".format(*result["cosine"])]
                for w, result in found["weights"].items()
                for pooling, test in result.get("pairs", {}).items()
            ],
        ),
        "seeds": seeds(groups, gain, p.seed),
        "other_seeds": ", ".join(map(str, sorted(set(others.seed)))),
        "changed": pairs_changed(scores, Path("data", profile, "mmvp")) if scores["pretrained"].mmvp else [],
        "weights": {weights: s.mmvp["weights_sha256"] for weights, s in scores.items() if s.mmvp},
    }


def headed(headings: list[str], rows: list[list]) -> list[list]:
    """A table: its headings before its rows, or nothing where there are none."""
    return [headings, *rows] if rows else []


def cell(interval: list[float] | None) -> str:
    return Interval(*interval).text() if interval else ""


def cells(intervals: dict[str, list[float]], columns: Iterable[str] = COLUMNS) -> list[str]:
    """A cell for each column; empty if there is no such interval."""
    return [cell(intervals.get(column)) for column in columns]


def baseline(compared: dict[str, dict], before: Scores) -> str:
    """Do the pretrained weights have their published figures? Empty if none is known of what was scored."""
    told = []
    for name, figures_ in compared.items():
        away, unit = abs(figures_["away"]), "points"
        if name == "pairs":
            away, unit = int(away), f"pairs of {len(before.right('stock'))}" if away != 1 else "pair"
        near = away <= (0 if name == "pairs" else NEAR)
        said = "as published" if near else f"{away:g} {unit} away from what is published"
        told.append(f"{name} {said} ({figures_['found']:.1f} %, published {figures_['published']:g} %)")
    if not told:
        return ""
    hint = (
        " Check revision, tokenizer and preprocessing before trusting what follows." if "away" in "".join(told) else ""
    )
    return f"The pretrained weights: {'; '.join(told)}.{hint}"


def comparison(found: dict) -> list[list[str]]:
    """Every two sets of weights compared. Empty if there are only two sets."""
    rows = []
    for name, tests in found["comparison"].items():
        second, _, first = name.partition(" minus ")
        change = found["weights"][second]["gain"] if first == "pretrained" else found["difference"][name]
        counts = [str(tests[key]) for key in ("won", "lost")]
        rows.append(
            [name, *cells(change, ("pairs_stock", "zeroshot")), *counts, f"{tests['p']:g}", f"{tests['p_holm']:g}"]
        )
    return headed(COMPARISON, rows) if len(rows) > 1 else []


def overview(scores: dict[str, Scores], found: dict) -> list[list[str]]:
    """Recipes side by side, with their controls: what was gained and what it cost."""
    shown = without_controls(scores)
    claimed = any("published" in result for result in found["weights"].values())
    rows = [["", *("original" if weights == "pretrained" else weights for weights in shown)]]
    for name, column in (("pairs", "pairs_stock"), ("zeroshot", "zeroshot")):
        values = [scores[weights].headline().get(column) for weights in shown]
        what = COLUMNS[column].partition(",")[0]
        tuned = [found["weights"].get(weights, {}) for weights in shown]
        if None in values:
            rows.append([f"{what}: verdict", *(t["verdict"][name] if t else "" for t in tuned)])
            continue
        gained = [
            t["as_published"] if name == "pairs" and "published" in t else t.get("gain", {}).get(column) for t in tuned
        ]
        rows += [
            [f"{COLUMNS[column]}, %", *(f"{value:.1f}" for value in values)],
            [f"{what}: gain{' as judged' if claimed and name == 'pairs' else ''}, points", *map(cell, gained)],
            *([["pairs: published gain, points", *map(claim, tuned)]] if claimed and name == "pairs" else []),
            [f"{what}: verdict", *(t["verdict"][name] if t else "" for t in tuned)],
        ]
        for control, words in CONTROLS.items():
            effects = [found["effect"].get(f"{weights}-{control}", {}).get(column) for weights in shown]
            if any(effects):
                rows.append([f"{what}: effect over {words}", *map(cell, effects)])
    return rows


def headline(scores: dict[str, Scores], found: dict) -> list[list[str]]:
    """A row for each set of weights, each gain and each effect, with every column."""
    rows = [["weights", *COLUMNS.values()]]
    for weights, of_weights in scores.items():
        values = of_weights.headline()
        rows.append([label(weights), *(f"{values[c]:.1f}" if c in values else "" for c in COLUMNS)])
    rows += [[f"gain: {label(weights)}", *cells(result["gain"])] for weights, result in found["weights"].items()]
    for weights, effect in found["effect"].items():
        recipe, control = recipe_and_control(weights)
        rows.append([f"effect: {recipe} over {CONTROLS[control]}", *cells(effect)])
    return rows


def card_figures(scores: dict[str, Scores], found: dict, weights: str) -> dict:
    """What a model card says of these weights' scores, and of no others but the pretrained ones.

    rows: figure, original and, of tuned weights, theirs and the gain. sets: names of the zero-shot sets by figure.
    verdict, cosine: as in evidence.json; the pretrained weights have none.
    """
    of_weights, own, rows = scores[weights].headline(), found["weights"].get(weights, {}), []
    for column, before in scores["pretrained"].headline().items():
        row = [COLUMNS[column], f"{before:.1f}"]
        if column in own.get("gain", {}):
            row += [f"{of_weights[column]:.1f}", cell(own["gain"][column])]
        rows.append(row)
    sets = {COLUMNS[column]: names for column, names in found["sets"].items()}
    return {"rows": rows, "sets": sets, "verdict": own.get("verdict"), "cosine": own.get("cosine")}


def four_cells(scores: dict[str, Scores]) -> list[list[str]]:
    """Pretrained and tuned weights under both pooling rules: average and patterns. Every gain is of one rule."""
    before, rows = scores["pretrained"], []
    for weights in without_controls(scores)[1:] if before.mmvp else ():
        after = scores[weights]
        for pattern in [None, *before.strata("pairs_stock")]:
            row = [weights, pattern or "average"]
            for column in ("pairs_stock", "pairs_published"):
                pooling, direction = results.PAIRS[column]
                for of_weights in (before, after):
                    block = of_weights.mmvp[pooling][direction]
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
    return headed(FOUR_CELLS, rows)


def claim(result: dict) -> str:
    """The published gain and its pooling rule. result: these weights' part of evidence.json. Empty if none is
    published.
    """
    said = result.get("published")
    return f"{said['gain']:+.1f} ({said['pooling']} pooling)" if said else ""


def matching(scores: dict[str, Scores]) -> list[list[str]]:
    """Pairs right by MMVP's rule and by the better of the two matchings."""
    rows = [["weights", "pooling rule", "pairs right, %", "gain", "right by the better matching, %", "gain"]]
    before = scores["pretrained"]
    for weights in without_controls(scores):
        for pooling in results.POOLINGS:
            row = [weights, pooling]
            for column in ("statement_to_image", "matching"):
                was, now = (s.answers_of_pairs(pooling, column) for s in (before, scores[weights]))
                average = sum(answers.mean() for answers in now.values()) / len(now)
                row += [f"{average:.1f}", "" if weights == "pretrained" else results.change(was, now).text()]
            rows.append(row)
    return rows


def verdicts(found: dict) -> dict[str, str]:
    """The verdict on each set of weights in words, controls aside."""
    texts = {}
    for weights in without_controls(found["weights"]):
        result = found["weights"][weights]
        judged = result["verdict"]
        if "pairs" not in result:
            texts[weights] = f"{weights}. Pairs: {judged['pairs']}.{_cost(result)}"
            continue
        tests = result["pairs"]["stock"]
        published = result.get("published")
        gain = Interval(*(result["as_published"] if published else result["gain"]["pairs_stock"])).text()
        said = f"{weights}. Pairs: {judged['pairs']}, {gain} points (stock embedding"
        if published:
            if published["pooling"] == "published":
                said += " before, published pooling after, as in the paper's table"
            said += f"; published {published['gain']:+.1f}"
            if published["pooling"] == "published":
                said += f"; the published pooling alone gives {Interval(*found['pooling']).text()}"
        said += f").{_cost(result)}"
        shows, smallest = "No gain of so few pairs is detected reliably", tests["smallest_gain"]
        if smallest is not None:
            shows = f"A gain of {smallest:g} points is detected with 80 % power"
        texts[weights] = (
            f"{said} Of {tests['pairs']} pairs, {tests['won']} became right and {tests['lost']} became wrong (stock "
            f"embedding; exact McNemar p = {tests['p']:g}). {shows}."
        )
    return texts


def _cost(result: dict) -> str:
    """The sentences about zero-shot ability; result: these weights' part of evidence.json."""
    judged = result["verdict"]
    if judged["zeroshot"] == results.NOT_MEASURED:
        return f" Zero-shot classification: {results.NOT_MEASURED}."
    said = f" Zero-shot classification: {judged['zeroshot']}, {Interval(*result['gain']['zeroshot']).text()} points."
    if judged["pairs"] in ("reproduced", "gained"):
        said += {
            "lost": " The gain comes at the cost of zero-shot ability.",
            "not distinguishable": f" A loss of more than {statistics.ZERO_SHOT_MARGIN:g} point is not excluded.",
        }.get(judged["zeroshot"], "")
    return said


def seeds_verdict(group: pd.DataFrame, found: dict, claim: Claim | None) -> str:
    """The verdict by the interval over training seeds; claim: of these weights. found: the part of evidence.json."""
    zeroshot, said = group.zeroshot.dropna(), f"Over {len(group)} training seeds: pairs "
    if group.pairs_stock.isna().any() or "pooling" not in found:
        said += results.NOT_MEASURED
    else:
        judged, gain = group.pairs_stock, None
        if claim:
            judged, gain = group.pairs_published + found["pooling"][0], claim.gain
        over = statistics.over_seeds(judged.tolist())
        said += f"{statistics.gain_verdict(over, gain)}, {over.text()}"
    if len(zeroshot) == len(group):
        cost = statistics.over_seeds(zeroshot)
        said += f"; zero-shot classification {statistics.preserved_verdict(cost)}, {cost.text()}"
    return f"{said} (t interval of the mean)."


def seeds(groups: dict[str, pd.DataFrame], gain: dict[str, dict], seed: int) -> dict | None:
    """Mean, s.d. and interval over training seeds, and whether this run is among them. None if there are fewer than
    two, or no figure that all of them have.

    groups: the rows of this code and these parameters, by weights. gain: this run's gains, by weights.
    """
    table = pd.concat(groups.values()) if groups else pd.DataFrame(columns=[*COLUMNS])
    columns = [column for column in COLUMNS if len(table) and table[column].notna().all()]
    if not columns:
        return None
    rows = [["weights", "seeds", *(COLUMNS[column] for column in columns)]]
    rows += [
        [label(w), str(len(g)), *(f"{statistics.over_seeds(g[c]).text()} (s.d. {g[c].std():.1f})" for c in columns)]
        for w, g in groups.items()
    ]
    own = table[(table.seed == seed) & table.weights.isin(gain)]
    return {
        "rows": rows,
        "seeds": ", ".join(map(str, sorted(set(table.seed)))),
        "same": all(row[c] == gain[row.weights].get(c, row[c]) for _, row in own.iterrows() for c in columns),
        "figure": figures.url(figures.seeds(table)),
    }


def pairs_changed(scores: dict[str, Scores], folder: Path) -> list[dict]:
    """The pairs that were won and those that were lost by the stock embedding, with statements and images; none where
    the folder is not there."""
    if not folder.is_dir():
        return []
    text = {"Type": str, "Statement": str}  # every cell of it: a statement may be "None" or 007
    questions = pd.read_csv(folder / "Questions.csv", dtype=text, keep_default_na=False).set_index("Question ID")
    folders = {path.name.replace("_", " "): path for path in folder.glob("*/*") if path.is_dir()}
    lists = []
    for weights in without_controls(scores)[1:]:
        for how, numbers in results.changed_pairs(scores["pretrained"], scores[weights], "stock").items():
            pairs = []
            for number in numbers:
                two = questions.loc[[2 * number - 1, 2 * number]]
                kind = str(two.Type.iloc[0]).replace("_", " ")
                images = [(folders[kind] / f"{i}.jpg", statement) for i, statement in two.Statement.items()]
                pairs.append({"number": number, "pattern": kind, "images": images})
            lists.append({"weights": weights, "how": how, "pairs": pairs})
    return lists
