"""Stage report: what diffusion feedback gained and what it cost, as metrics, a page with pictures, and Markdown.

    metrics/<profile>/report.json     a few headline figures per backbone: pretrained, diva, gain
    metrics/<profile>/report.html     one self-contained page
    metrics/<profile>/report.md       its twin for a terminal or a code host
    metrics/<profile>/patterns.csv    pairs right per pattern, for `dvc plots`

Loss curves and the denoiser's figures are read where `diva` is among the weights, but are no dependencies, so that DVC
can make the report of other weights without training. It is never out of date: scores carry the hash of their weights.

`python -m pipeline.report --show` prints the table of the last report.
"""

import base64
import io
import json
import sys
from pathlib import Path

import jinja2
import matplotlib
import pandas as pd
from PIL import Image
from rich.console import Console
from rich.table import Table

from pipeline import params
from pipeline.runtime import UserError, stage, whole, write_json

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "diva"
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of the backend)

COLUMNS = {
    "pairs_plain": "pairs, plain read-out",
    "pairs_published": "pairs, published read-out",
    "image_to_statement_plain": "image to statement, plain",
    "image_to_statement_published": "image to statement, published",
    "zeroshot": "zero-shot classification",
    "retrieval": "retrieval, recall@k",
    "probe": "detail probe",
}
READ_OUTS = ("plain", "published")
TUNED = {"diva": ("gain", "by feedback training"), "released": ("gain_released", "to the authors' released weights")}
COLOURS = {"pretrained": "#9aa5b1", "diva": "#2f6f9f", "released": "#c98a2d"}


def headline(mmvp: dict, zeroshot: dict) -> dict[str, float]:
    """The figures of COLUMNS, in %, of one backbone with one set of weights."""
    kinds = {"zeroshot": "classification", "retrieval": "retrieval", "probe": "probe"}
    values = {f"pairs_{r}": mmvp[r]["statement_to_image"]["average"] for r in READ_OUTS}
    values |= {f"image_to_statement_{r}": mmvp[r]["image_to_statement"]["average"] for r in READ_OUTS}
    for column, kind in kinds.items():
        averages = [scores["average"] for scores in zeroshot.values() if scores["kind"] == kind]
        if averages:
            values[column] = sum(averages) / len(averages)
    return {column: round(values[column], 2) for column in COLUMNS if column in values}


def with_gain(by_weights: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Add a row for each tuned set of weights: those minus pretrained, in points."""
    gains = {
        row: {column: round(by_weights[tuned][column] - value, 2) for column, value in by_weights["pretrained"].items()}
        for tuned, (row, _) in TUNED.items()
        if {"pretrained", tuned} <= by_weights.keys()
    }
    return by_weights | gains


def won_and_lost(before: pd.DataFrame, after: pd.DataFrame, read_out: str) -> tuple[int, int, int]:
    """(pairs won, pairs lost, pairs) by training, statement to image; a pair is right where most draws are."""
    right = [table[table.read_out == read_out].statement_to_image.to_numpy() > 0.5 for table in (before, after)]
    return int((~right[0] & right[1]).sum()), int((right[0] & ~right[1]).sum()), len(right[0])


def verdict(backbone: str, change: str, gain: dict[str, float], won: int, lost: int, pairs: int) -> str:
    """What the figures say, and no more."""
    moved = [f"{COLUMNS[column]} {value:+.1f}" for column, value in gain.items()]
    return (
        f"{backbone}: change {change}, in points: {'; '.join(moved)}. Of {pairs} pairs {won} were won and "
        f"{lost} lost (plain read-out). This is one seed without an interval."
    )


def cell(value: float | None, sign: str) -> str:
    return "" if value is None else f"{value:{sign}.1f}"


def rows(report: dict[str, dict]) -> list[list[str]]:
    return [
        [backbone, label(weights), *(cell(values.get(column), "+" if "gain" in weights else "") for column in COLUMNS)]
        for backbone, by_weights in report.items()
        for weights, values in by_weights.items()
    ]  # fmt: skip


def label(row: str) -> str:
    """A row's name for people."""
    return {"gain": "gain, points", "gain_released": "gain of released", "published": "as published"}.get(row, row)


def print_table(report: dict[str, dict], page: Path) -> None:
    table = Table("backbone", "weights", *COLUMNS.values(), title="What feedback gained, and what it cost (%)")
    for row in rows(report):
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    console.print(f"report with pictures: {page}")


def pattern_figure(tables: dict[str, pd.DataFrame]):
    """Pairs right per pattern and read-out, one bar for each set of weights."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, read_out in zip(axes, READ_OUTS, strict=True):
        shares = pd.DataFrame({w: 100 * by_pattern(table, read_out) for w, table in tables.items()})
        shares.plot.barh(ax=axis, width=0.75, color=COLOURS)
        axis.set(title=f"{read_out} read-out", xlabel="pairs right, %", ylabel="", xlim=(0, 100))
    axes[0].invert_yaxis()  # shared by both: patterns in their order, pretrained above diva
    return figure


def by_pattern(table: pd.DataFrame, read_out: str) -> pd.Series:
    return table[table.read_out == read_out].groupby("pattern", sort=False).statement_to_image.mean()


def loss_figure(curves: Path):
    phases = {phase: curves / phase / "loss.tsv" for phase in ("projection", "tower")}
    found = {phase: pd.read_csv(file, sep="\t") for phase, file in phases.items() if file.exists()}
    figure, axes = plt.subplots(1, len(found), figsize=(11, 3.2), layout="constrained", squeeze=False)
    for axis, (phase, table) in zip(axes[0], found.items(), strict=True):
        axis.plot(table.step, table.loss, color="#9aa5b1", linewidth=0.8)
        axis.plot(table.step, table.loss.rolling(20, min_periods=1).mean(), color="#2f6f9f")
        axis.set(title=f"{phase}: denoising loss", xlabel="step")
    return figure


def probe_figure(zeroshot: dict[str, dict]):
    """Accuracy of the linear probe per attribute; None where no set of that kind was scored."""
    probes = {w: s for w, sets in zeroshot.items() for s in sets.values() if s["kind"] == "probe"}
    if not probes:
        return None
    table = pd.DataFrame(probes).drop(["kind", "average"]).astype(float)
    figure, axis = plt.subplots(figsize=(11, 3.6), layout="constrained")
    table.plot.barh(ax=axis, width=0.75, color=COLOURS)
    axis.invert_yaxis()
    axis.set(title="what a linear probe reads off the embedding", xlabel="accuracy, %", xlim=(0, 100))
    return figure


def pair_samples(folder: Path) -> list[dict]:
    """The first pair of every pattern: statements and pictures."""
    questions = pd.read_csv(folder / "Questions.csv")
    folders = {path.name.replace("_", " "): path for path in folder.glob("*/*") if path.is_dir()}
    samples = []
    for kind, group in questions.groupby("Type", sort=False):
        pair = group.head(2)
        pictures = [data_url(folders[kind] / f"{number}.jpg") for number in pair["Question ID"]]
        samples.append({"pattern": kind, "pictures": list(zip(pictures, pair.Statement, strict=True))})
    return samples


def png_url(figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def data_url(path: Path) -> str:
    with Image.open(path) as image:
        mime = Image.MIME[image.format or "PNG"]
    return f"data:{mime};base64," + base64.b64encode(path.read_bytes()).decode()


def markdown(report: dict[str, dict], verdicts: list[str]) -> str:
    header = ["backbone", "weights", *COLUMNS.values()]
    lines = [header, ["---"] * len(header), *rows(report)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"# What feedback gained, and what it cost (%)\n\n{table}\n\n" + "\n\n".join(verdicts) + "\n"


def build(p: params.Params) -> tuple[dict, str, str, pd.DataFrame]:
    """(report.json, the page, the Markdown, patterns.csv) of what the stages before left."""
    metrics = Path("metrics", p.run.profile)
    report, verdicts, patterns, sections = {}, [], [], []
    for backbone in p.run.backbones:
        stems: dict[str, str] = {weights: f"{backbone}-{weights}" for weights in p.run.weights}
        mmvp = {w: json.loads((metrics / "mmvp" / f"{stem}.json").read_text()) for w, stem in stems.items()}
        tables = {w: pd.read_csv(metrics / "mmvp" / f"{stem}.csv") for w, stem in stems.items()}
        zeroshot = {w: json.loads((metrics / "zeroshot" / f"{stem}.json").read_text()) for w, stem in stems.items()}
        report[backbone] = with_gain({w: headline(mmvp[w], zeroshot[w]) for w in stems})
        for tuned, (row, change) in TUNED.items():
            if row in report[backbone]:
                won_lost = won_and_lost(tables["pretrained"], tables[tuned], "plain")
                verdicts.append(verdict(backbone, change, report[backbone][row], *won_lost))
        if published := p.backbones[backbone].published:
            report[backbone]["published"] = {"pairs_plain": published.before, "pairs_published": published.after}
        for weights, table in tables.items():
            share = (100 * by_pattern(table, "plain")).round(2)
            patterns.append(pd.DataFrame({"pattern": f"{weights}: " + share.index, "right": share.to_numpy()}))
        figures = [pattern_figure(tables), probe_figure(zeroshot)]
        if "diva" in stems:
            figures.append(loss_figure(metrics / "train" / backbone / "plots" / "metrics"))
        sections.append({"backbone": backbone, "figures": [png_url(f) for f in figures if f]})
    picture = Path("models", p.run.profile, "denoiser", "reconstructions.png")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        profile=p.run.profile,
        columns=COLUMNS.values(),
        rows=rows(report),
        verdicts=verdicts,
        sections=sections,
        pairs=pair_samples(Path("data", p.run.profile, "mmvp_vlm")),
        denoiser=json.loads((metrics / "denoiser.json").read_text()) if "diva" in p.run.weights else {},
        reconstructions=data_url(picture) if picture.exists() else None,
    )
    return report, page, markdown(report, verdicts), pd.concat(patterns)


@stage
def main() -> None:
    p = params.load()
    outputs = [Path("metrics", p.run.profile, n) for n in ("report.json", "report.html", "report.md", "patterns.csv")]
    if sys.argv[1:] != ["--show"]:
        with whole(*outputs) as (json_file, html_file, markdown_file, patterns_file):
            report, page, text, patterns = build(p)
            write_json(json_file, report)
            html_file.write_text(page)
            markdown_file.write_text(text)
            patterns.to_csv(patterns_file, index=False)
    if not outputs[0].exists():
        raise UserError(f"{outputs[0]}: no report yet. Run `dvc repro`.")
    print_table(json.loads(outputs[0].read_text()), outputs[1])


if __name__ == "__main__":
    main()
