"""Stage report: did feedback help, how sure is that, and what did it cost.

    metrics/<profile>/report.json     a few headline figures per backbone, for `dvc metrics diff`
    metrics/<profile>/evidence.json   intervals, exact tests, controls, verdicts (evidence/results.py says what each is)
    metrics/<profile>/cards/<backbone>-<weights>.json    what the model card of an export says of its scores
    metrics/<profile>/patterns.csv    pairs right per pattern, for `dvc plots`
    metrics/<profile>/report.html     one self-contained page; report.md: the same tables for a terminal or a code host

Both pages name wall time and machine, which differ between equal runs: git keeps them, DVC does not hash
them. Loss curves, the denoiser's figures and the images of the pairs are read where recipes are trained and pairs are
scored, but are no dependencies, so that DVC can make the report without them; they change only with the scores.

    python -m pipeline.report --show                    the table of the last report
    python -m pipeline.report --compare [a [b]]         two commits (default: the last, and the workspace), pair by pair
    ... --check                                         exit status 1 unless the verdicts are good (metrics/README.md)
"""

import argparse
import json
import sys
from pathlib import Path

import dvc.api
import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline.core.config import PARAMS_FILE
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, stage
from pipeline.evidence import downstream, figures, results, statistics
from pipeline.evidence.page import card_figures, cells, section
from pipeline.evidence.provenance import provenance
from pipeline.evidence.results import COLUMNS, Claim, Scores, label, without_controls
from pipeline.evidence.templates import fill
from pipeline.sections import reported
from pipeline.sections.backbone import BackboneEntry, Published
from pipeline.sections.reported import Reported

PUBLISHED = "diva"  # the recipe of the paper, whose claim no other recipe and no control makes


def summary(scores: dict[str, Scores], found: dict, paper: Published | None) -> dict[str, dict]:
    """A backbone's part of report.json: figures in % by weights, controls aside; gains in points; the paper's."""
    return {
        "score": {weights: scores[weights].headline() for weights in without_controls(scores)},
        "gain": {w: {c: gain[0] for c, gain in result["gain"].items()} for w, result in found["weights"].items()},
        **({"published": {"pairs_stock": paper.before, "pairs_published": paper.after}} if paper else {}),
    }


def claims(p: Reported, entry: BackboneEntry) -> dict[str, Claim]:
    """What is published, by weights: of recipe PUBLISHED the paper's, of a checkpoint its own."""
    paper = entry.published
    if not paper:
        return {}
    found = {name: Claim(paper.before, paper.after, "published") for name in p.run.recipes if name == PUBLISHED}
    for name in p.run.checkpoints:
        if figure := entry.checkpoints[name].published:
            found[name] = Claim(paper.before, figure.pairs, figure.pooling)
    return found


def known(entry: BackboneEntry) -> dict[str, float]:
    """Published figures of the pretrained weights, in %."""
    paper = entry.published
    if not paper:
        return {}
    return {"pairs": paper.before, **({"imagenet1k": paper.imagenet1k} if paper.imagenet1k else {})}


def build(p: Reported) -> tuple[dict, dict, dict[str, dict], pd.DataFrame, dict]:
    """(report.json, evidence.json, cards by name, patterns.csv, what the page shows) of what the stages before left."""
    profile = p.run.profile
    metrics = Path("metrics", profile)
    report, evidence, cards, tables, sections = {}, {}, dict[str, dict](), [], []
    for backbone in p.run.backbones:
        entry = p.backbones[backbone]
        claimed = claims(p, entry)
        scores: dict[str, Scores] = {w: Scores.read(profile, backbone, w, p.run.benchmarks) for w in p.run.weights}
        found = evidence[backbone] = results.evidence(scores, claimed, known(entry))
        readings = {w: downstream.read(profile, backbone, w, p.run.benchmarks) for w in p.run.weights}
        if readings["pretrained"]:
            found["downstream"] = downstream.evidence(readings)
        report[backbone] = summary(scores, found, entry.published)
        cards |= {f"{backbone}-{weights}": card_figures(scores, found, weights) for weights in without_controls(scores)}
        tables.append(figures.by_pattern(scores).assign(backbone=backbone))
        sections.append(section(p, backbone, scores, claimed, found, report[backbone]["gain"]))
    reconstructions = Path("data", profile, "denoiser", "reconstructions.png")
    shown = {
        "profile": profile,
        "seed": p.seed,
        "recipes": p.run.recipes,
        "sections": sections,
        "denoiser": json.loads((metrics / "denoiser.json").read_text(encoding="utf-8")) if p.run.recipes else {},
        "reconstructions": reconstructions if reconstructions.exists() else None,
        "provenance": provenance(p),
        "params": PARAMS_FILE.read_text(encoding="utf-8"),
    }
    return report, evidence, cards, pd.concat(tables), shown


def print_table(report: dict[str, dict], evidence: dict[str, dict], page: Path) -> None:
    table = Table("backbone", "weights", *COLUMNS.values(), title="What feedback gained, and what it cost (%)")
    for backbone, found in report.items():
        for weights, values in found["score"].items():
            table.add_row(backbone, weights, *(f"{values[c]:.1f}" if c in values else "" for c in COLUMNS))
        for weights, result in evidence[backbone]["weights"].items():
            table.add_row(backbone, f"gain: {label(weights)}", *cells(result["gain"]))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"report with images: {page}")


def compare(p: Reported, first: str, second: str | None) -> list[str]:
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
    scored = [json.loads(read(Path("metrics", profile, "scores", "planned.json"))) for read in reads]
    table, worse = Table("backbone", "weights", "figure", first, second or "workspace", "change [95 %]", "verdict"), []
    for backbone in (backbone for backbone in reports[0] if backbone in reports[1]):
        for weights in (w for w in reports[0][backbone]["score"] if w in reports[1][backbone]["score"]):
            before, after = (
                Scores.read(profile, backbone, weights, benchmarks, read)
                for benchmarks, read in zip(scored, reads, strict=True)
            )
            for column, change in results.gains(before, after).items():
                preserved = column == "zeroshot"
                verdict = statistics.preserved_verdict(change) if preserved else statistics.gain_verdict(change, None)
                figures_ = [f"{report[backbone]['score'][weights][column]:.2f}" for report in reports]
                table.add_row(backbone, weights, COLUMNS[column], *figures_, change.text(), verdict)
                if verdict == "lost" or (preserved and verdict != "preserved"):
                    worse.append(f"{backbone}, {weights}: {COLUMNS[column]} {change.text()}")
    if not table.row_count:
        scored_weights = [", ".join(w for found in report.values() for w in found["score"]) for report in reports]
        raise UserError(
            f"{first} and {second or 'the workspace'} have no figure of the same backbone and weights: the one has "
            f"{scored_weights[0]}, the other {scored_weights[1]}. Name commits of the same run."
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return worse


@stage
def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--show", action="store_true", help="print the table of the last report")
    parser.add_argument("--compare", nargs="*", metavar="COMMIT", help="at most two; as in `dvc metrics diff`")
    parser.add_argument("--check", action="store_true", help="exit status 1 unless the verdicts are good")
    asked = parser.parse_args(arguments)
    if asked.compare is not None and len(asked.compare) > 2:
        parser.error(f"--compare takes two commits at most, found {len(asked.compare)}")
    p = reported.load()
    names = ("report.json", "evidence.json", "cards", "patterns.csv", "report.html", "report.md")
    outputs = [Path("metrics", p.run.profile, name) for name in names]
    if asked.compare is not None:
        first, second = [*asked.compare, None, None][:2]
        failed = compare(p, first or "HEAD", second)
    else:
        if not (asked.show or asked.check):
            with atomic(*outputs) as (report_file, evidence_file, folder, patterns_file, html_file, markdown_file):
                report, evidence, cards, patterns, shown = build(p)
                write_json(report_file, report)
                write_json(evidence_file, evidence)
                folder.mkdir()
                for name, content in cards.items():
                    write_json(folder / f"{name}.json", content)
                patterns.to_csv(patterns_file, index=False)
                html_file.write_text(fill("report.html.jinja", shown, url=figures.image_url), encoding="utf-8")
                markdown_file.write_text(fill("report.md.jinja", shown), encoding="utf-8")
        if not outputs[0].exists():
            raise UserError(f"{outputs[0]}: no report yet. Run `dvc repro`.")
        report, evidence = (json.loads(path.read_text(encoding="utf-8")) for path in outputs[:2])
        print_table(report, evidence, outputs[4])
        failed = results.failures(evidence)
    if asked.check and failed:
        raise UserError("the check fails:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    main()
