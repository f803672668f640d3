"""The report's figures, drawn by matplotlib."""

import base64
import io
from pathlib import Path

import matplotlib
import pandas as pd
from PIL import Image

from pipeline.core.params import Published
from pipeline.evidence.results import COLUMNS, PAIRS, READ_OUTS, Scores

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "pretrained": "#9aa5b1", "diva": "#2f6f9f", "released": "#c98a2d", "shuffled": "#b0578d", "drift": "#5a9e6f"
}  # fmt: skip


def patterns(scores: dict[str, Scores], published: Published | None):
    """Pairs right per pattern and read-out, a bar for each set of weights; diamonds: the paper's before and after."""
    shown = {weights: found for weights, found in scores.items() if weights in ("pretrained", "diva", "released")}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for axis, read_out in zip(axes, READ_OUTS, strict=True):
        tables = {weights: found.mmvp[read_out]["statement_to_image"]["patterns"] for weights, found in shown.items()}
        pd.DataFrame(tables).plot.barh(ax=axis, width=0.75, color=COLOURS)
        values = published and (published.before_patterns if read_out == "plain" else published.after_patterns)
        if values:
            axis.scatter(values, range(len(values)), marker="D", color="#1f2933", zorder=3, label="the paper's")
            axis.legend()
        axis.set(title=f"{read_out} read-out", xlabel="pairs right, %", ylabel="", xlim=(0, 100))
    axes[0].invert_yaxis()  # shared by both: patterns in their order, pretrained above diva
    return figure


def gains(found: dict):
    """Change of every column with its interval: the run and its controls side by side."""
    weights, columns = found["weights"], list(COLUMNS)
    columns = [column for column in columns if all(column in result["gain"] for result in weights.values())]
    figure, axis = plt.subplots(figsize=(11, 0.9 + 0.5 * len(columns)), layout="constrained")
    for i, (name, result) in enumerate(weights.items()):
        value, low, high = zip(*(result["gain"][column] for column in columns), strict=True)
        places = [row + 0.18 * (i - (len(weights) - 1) / 2) for row in range(len(columns))]
        errors = [[v - b for v, b in zip(value, low, strict=True)], [b - v for v, b in zip(value, high, strict=True)]]
        axis.errorbar(value, places, xerr=errors, fmt="o", markersize=4, capsize=2, color=COLOURS[name], label=name)
    axis.axvline(0, color="#1f2933", linewidth=0.8)
    axis.set_yticks(range(len(columns)), [COLUMNS[column] for column in columns])
    axis.set(xlabel="points over pretrained, 95 % interval")
    axis.invert_yaxis()
    axis.legend()
    return figure


def seeds(table: pd.DataFrame):
    """Gains of one backbone by training seed; a column a panel."""
    columns = [column for column in COLUMNS if column in table and table[column].notna().all()]
    figure, axes = plt.subplots(1, len(columns), figsize=(11, 3), layout="constrained", squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        for i, (weights, group) in enumerate(table.groupby("weights", sort=False)):
            axis.scatter([i] * len(group), group[column], s=14, color=COLOURS[str(weights)])
            axis.plot([i - 0.25, i + 0.25], [group[column].mean()] * 2, color=COLOURS[str(weights)])
        names = list(table.weights.unique())
        axis.axhline(0, color="#1f2933", linewidth=0.8)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.tick_params(axis="y", labelsize=8)
        axis.set_title(COLUMNS[column].replace(", ", ",\n").replace(" to ", "\nto "), fontsize=8)
    return figure


def losses(curves: dict[str, Path]):
    """The denoising loss of both phases, of the run and of the control that was trained; None where there is none."""
    found = {
        (phase, weights): pd.read_csv(file, sep="\t")
        for phase in ("projection", "tower")
        for weights, folder in curves.items()
        if (file := folder / phase / "loss.tsv").exists()
    }
    if not found:
        return None
    phases = list(dict.fromkeys(phase for phase, _ in found))
    figure, axes = plt.subplots(1, len(phases), figsize=(11, 3.2), layout="constrained", squeeze=False)
    for (phase, weights), table in found.items():
        axis = axes[0][phases.index(phase)]
        axis.plot(table.step, table.loss, color=COLOURS[weights], linewidth=0.6, alpha=0.4)
        axis.plot(table.step, table.loss.rolling(20, min_periods=1).mean(), color=COLOURS[weights], label=weights)
        axis.set(title=f"{phase}: denoising loss", xlabel="step")
        axis.legend()
    return figure


def probe(scores: dict[str, Scores]):
    """Accuracy of the linear probe per attribute; None where no set of that kind was scored."""
    probes = {w: s for w, found in scores.items() for s in found.zeroshot.values() if s["kind"] == "probe"}
    if not probes:
        return None
    table = pd.DataFrame(probes).drop(["kind", "average"]).astype(float)
    figure, axis = plt.subplots(figsize=(11, 4.4), layout="constrained")
    table.plot.barh(ax=axis, width=0.8, color=COLOURS)
    axis.invert_yaxis()
    axis.set(title="what a linear probe reads off the embedding", xlabel="accuracy, %", xlim=(0, 100))
    return figure


def url(figure) -> str:
    """A figure as a data URL; the figure is closed."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def picture_url(path: Path) -> str:
    with Image.open(path) as image:
        mime = Image.MIME[image.format or "PNG"]
    return f"data:{mime};base64," + base64.b64encode(path.read_bytes()).decode()


def by_pattern(scores: dict[str, Scores]) -> pd.DataFrame:
    """Pairs right per pattern, plain read-out, for `dvc plots`."""
    tables = []
    for weights in (weights for weights in ("pretrained", "diva", "released") if weights in scores):
        read_out, direction = PAIRS["pairs_plain"]
        found = scores[weights].mmvp[read_out][direction]["patterns"]
        tables.append(pd.DataFrame({"pattern": [f"{weights}: {name}" for name in found], "right": found.values()}))
    return pd.concat(tables).round(2)
