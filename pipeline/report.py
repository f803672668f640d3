"""Stage report: did feedback help, how sure is that, and what did it cost.

    metrics/<profile>/report.json     a few headline figures per backbone, for `dvc metrics diff`
    metrics/<profile>/evidence.json   intervals, exact tests, controls, verdicts (evidence/results.py says what each is)
    metrics/<profile>/patterns.csv    pairs right per pattern, for `dvc plots`
    metrics/<profile>/report.html     one self-contained page, and report.md, its twin for a terminal or a code host

The page and its twin tell wall time and revision, which differ between equal runs: git keeps them, DVC does not hash
them. Loss curves and the denoiser's figures are read where training is among the weights, but are no dependencies, so
that DVC can make the report of other weights without training.

    python -m pipeline.report --show                    the table of the last report
    python -m pipeline.report --compare [a [b]]         two commits (default: the last, and the workspace), pair by pair
    ... --check                                         exit status 1 unless the verdicts are good (README)
"""

import argparse
import json
import sys
from pathlib import Path

import dvc.api
import jinja2
import pandas as pd
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from pipeline import params
from pipeline.evidence import figures, results, statistics
from pipeline.evidence.provenance import provenance
from pipeline.evidence.results import COLUMNS, CONTROLS, GAINS, Scores
from pipeline.evidence.statistics import Interval
from pipeline.runtime import UserError, stage, whole, write_json

LABELS = {"shuffled": "control: shuffled", "drift": "control: drift", "published": "the paper's"}


def summary(scores: dict[str, Scores], found: dict) -> dict[str, dict[str, float]]:
    """The rows of report.json: figures in %, gains in points; of the controls the gains alone."""
    rows = {weights: found_.headline() for weights, found_ in scores.items() if weights not in CONTROLS}
    for weights, result in found["weights"].items():
        rows[GAINS[weights]] = {column: gain[0] for column, gain in result["gain"].items()}
    return rows


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
    table: pd.DataFrame, backbone: str, now: dict[str, dict[str, float]], seed: int, read_out: float,
    published: tuple[float, float] | None,
) -> dict | None:  # fmt: skip
    """Mean, s.d. and interval over training seeds, and whether this very run is among them; None without two."""
    table = table[table.backbone == backbone]
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
    same = own.empty or any(all(row[c] == now["gain"][c] for c in columns) for _, row in own.iterrows())
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


def build(p: params.Params) -> tuple[dict, dict, pd.DataFrame, dict]:
    """(report.json, evidence.json, patterns.csv, what the page shows) of what the stages before left."""
    profile = p.run.profile
    metrics, data = Path("metrics", profile), Path("data", profile)
    if "pretrained" not in p.run.weights:
        raise UserError(
            f"run.weights is {p.run.weights}: without 'pretrained' there is nothing to compare with. Add it."
        )
    report, evidence, tables, sections = {}, {}, [], []
    for backbone in p.run.backbones:
        entry = p.backbones[backbone].published
        published = (entry.before, entry.after) if entry else None
        scores: dict[str, Scores] = {w: Scores.read(profile, backbone, w) for w in p.run.weights}
        embeddings = {w: load_file(data / "embeddings" / f"{backbone}-{w}.safetensors")["images"] for w in scores}
        found = evidence[backbone] = results.evidence(scores, embeddings, published)
        report[backbone] = summary(scores, found)
        if published:
            report[backbone]["published"] = dict(zip(("pairs_plain", "pairs_published"), published, strict=True))
        tables.append(figures.by_pattern(scores).assign(backbone=backbone))
        curves: dict[str, Path] = {
            w: metrics / "train" / f"{backbone}-{w}" / "plots" / "metrics" for w in ("diva", "shuffled") if w in scores
        }
        drawn = [figures.patterns(scores, entry), *([figures.gains(found)] if found["weights"] else [])]
        drawn += [figures.probe(scores), figures.losses(curves)]
        sections.append(
            {
                "backbone": backbone,
                "headline": headline(scores, found),
                "four_cells": four_cells(scores),
                "verdicts": verdicts(found, published),
                "published": entry,
                "figures": [figures.url(figure) for figure in drawn if figure],
                "cosine": {w: Interval(*result["cosine"]) for w, result in found["weights"].items()},
                "tests": {w: result["pairs"] for w, result in found["weights"].items()},
                "seeds": seeds(
                    results.seeds_table(profile), backbone, report[backbone], p.seed, found["read_out"][0], published
                ),
                "changed": pairs_changed(scores, data / "mmvp_vlm"),
                "weights": {w: of_weights.mmvp["weights_sha256"] for w, of_weights in scores.items()},
            }
        )
    reconstructions = Path("models", profile, "denoiser", "reconstructions.png")
    page = {
        "profile": profile,
        "columns": list(COLUMNS.values()),
        "sections": sections,
        "denoiser": json.loads((metrics / "denoiser.json").read_text()) if p.run.trained else {},
        "reconstructions": reconstructions if reconstructions.exists() else None,
        "provenance": provenance(p),
        "params": params.PARAMS_FILE.read_text(),
    }
    return report, evidence, pd.concat(tables), page


def render(template: str, page: dict) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "evidence"), trim_blocks=True, lstrip_blocks=True,
        autoescape=jinja2.select_autoescape(["html.jinja"]), undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["url"] = figures.picture_url
    return environment.get_template(template).render(page)


def print_table(report: dict[str, dict], evidence: dict[str, dict], page: Path) -> None:
    table = Table("backbone", "weights", *COLUMNS.values(), title="What feedback gained, and what it cost (%)")
    for backbone, rows in report.items():
        intervals = {GAINS[weights]: result["gain"] for weights, result in evidence[backbone]["weights"].items()}
        for row, values in rows.items():
            gain = cells(intervals[row]) if row in intervals else []
            table.add_row(
                backbone, LABELS.get(row, row), *(gain or (f"{values[c]:.1f}" if c in values else "" for c in COLUMNS))
            )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"report with pictures: {page}")


def compare(p: params.Params, first: str, second: str | None) -> list[str]:
    """Print what changed between two commits (None: the workspace). Returns what got worse, for --check."""

    def reader(revision: str | None) -> results.Read:
        def read(path: Path) -> bytes:
            try:
                return dvc.api.read(str(path), rev=revision, mode="rb") if revision else path.read_bytes()
            except (OSError, dvc.exceptions.DvcException) as error:
                where = revision or "the workspace"
                raise UserError(
                    f"{path} of {where} cannot be read: {error}. Run `dvc repro` there, and commit."
                ) from None

        return read

    profile, reads = p.run.profile, (reader(first), reader(second))
    reports = [json.loads(read(Path("metrics", profile, "report.json"))) for read in reads]
    table, worse = Table("backbone", "weights", "figure", first, second or "workspace", "change [95 %]", "verdict"), []
    for backbone in (backbone for backbone in reports[0] if backbone in reports[1]):
        for weights in (w for w in ("pretrained", "diva", "released") if all(w in r[backbone] for r in reports)):
            scores = [Scores.read(profile, backbone, weights, read) for read in reads]
            for column, change in results.gains(*scores).items():
                preserved = column == "zeroshot"
                verdict = statistics.preserved_verdict(change) if preserved else statistics.gain_verdict(change, None)
                figures_ = [f"{report[backbone][weights][column]:.2f}" for report in reports]
                table.add_row(backbone, weights, COLUMNS[column], *figures_, change.text(), verdict)
                if verdict == "lost" or (preserved and verdict != "preserved"):
                    worse.append(f"{backbone}, {weights}: {COLUMNS[column]} {change.text()}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return worse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--show", action="store_true", help="print the table of the last report")
    parser.add_argument("--compare", nargs="*", metavar="COMMIT", help="at most two; as in `dvc metrics diff`")
    parser.add_argument("--check", action="store_true", help="exit status 1 unless the verdicts are good")
    found = parser.parse_args()
    if found.compare is not None and len(found.compare) > 2:
        parser.error(f"--compare takes two commits at most, found {len(found.compare)}")
    return found


@stage
def main() -> None:
    asked, p = arguments(), params.load()
    names = ("report.json", "evidence.json", "patterns.csv", "report.html", "report.md")
    outputs = [Path("metrics", p.run.profile, name) for name in names]
    if asked.compare is not None:
        first, second = [*asked.compare, None, None][:2]
        failed = compare(p, first or "HEAD", second)
    else:
        if not (asked.show or asked.check):
            with whole(*outputs) as (report_file, evidence_file, patterns_file, html_file, markdown_file):
                report, evidence, patterns, page = build(p)
                write_json(report_file, report)
                write_json(evidence_file, evidence)
                patterns.to_csv(patterns_file, index=False)
                html_file.write_text(render("report.html.jinja", page))
                markdown_file.write_text(render("report.md.jinja", page))
        if not outputs[0].exists():
            raise UserError(f"{outputs[0]}: no report yet. Run `dvc repro`.")
        report, evidence = (json.loads(path.read_text()) for path in outputs[:2])
        print_table(report, evidence, outputs[3])
        failed = results.failures(evidence)
    if asked.check and failed:
        raise UserError("the check fails:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    main()
