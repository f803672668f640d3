"""The report's figures, drawn by matplotlib."""

import base64
import io
import itertools
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import pandas as pd
from PIL import Image

from pipeline.evidence.results import COLUMNS, CONTROLS, POOLINGS, Scores, label, recipe_and_control, without_controls
from pipeline.sections.backbone import Published

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PALETTE = ("#2f6f9f", "#c98a2d", "#5a9e6f", "#b0578d", "#7a68ad", "#a65d3f")


def colours(scores: Iterable[str]) -> dict[str, str | tuple[str, float]]:
    """Grey for pretrained, a colour for each recipe and checkpoint; a control has its recipe's colour, paler."""
    split = {weights: recipe_and_control(weights) for weights in scores}
    names = dict.fromkeys(recipe for recipe, _ in split.values() if recipe != "pretrained")
    own = {"pretrained": "#9aa5b1"} | dict(zip(names, itertools.cycle(PALETTE), strict=False))
    pale = dict(zip(CONTROLS, (0.6, 0.3), strict=True))
    return {w: (own[recipe], pale[control]) if control else own[recipe] for w, (recipe, control) in split.items()}


def patterns(scores: dict[str, Scores], published: Published | None):
    """Pairs right per pattern and pooling rule, a bar for each set of weights; diamonds are the paper's figures.

    None if no pairs were scored.
    """
    if not scores["pretrained"].mmvp:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for axis, pooling in zip(axes, POOLINGS, strict=True):
        tables = {w: scores[w].mmvp[pooling]["statement_to_image"]["patterns"] for w in without_controls(scores)}
        pd.DataFrame(tables).plot.barh(ax=axis, width=0.75, color=colours(scores))
        values = published and (published.before_patterns if pooling == "stock" else published.after_patterns)
        if values:
            axis.scatter(values, range(len(values)), marker="D", color="#1f2933", zorder=3, label="the paper's")
            axis.legend()
        axis.set(title=COLUMNS[f"pairs_{pooling}"], xlabel="pairs right, %", ylabel="", xlim=(0, 100))
    axes[0].invert_yaxis()  # shared by both: patterns in their order, pretrained on top
    return figure


def gains(weights: dict[str, dict]):
    """The gain of every column with its interval, recipes and controls side by side; weights: as in evidence.json.

    None if there is no gain.
    """
    columns = [column for column in COLUMNS if all(column in result["gain"] for result in weights.values())]
    if not weights or not columns:
        return None
    figure, axis = plt.subplots(figsize=(11, 0.9 + (0.2 + 0.1 * len(weights)) * len(columns)), layout="constrained")
    for i, (name, result) in enumerate(weights.items()):
        value, low, high = zip(*(result["gain"][column] for column in columns), strict=True)
        places = [row + 0.7 / len(weights) * (i - (len(weights) - 1) / 2) for row in range(len(columns))]
        errors = [[v - b for v, b in zip(value, low, strict=True)], [b - v for v, b in zip(value, high, strict=True)]]
        axis.errorbar(
            value,
            places,
            xerr=errors,
            fmt="o",
            markersize=4,
            capsize=2,
            color=colours(weights)[name],
            label=label(name),
        )
    axis.axvline(0, color="#1f2933", linewidth=0.8)
    axis.set_yticks(range(len(columns)), [COLUMNS[column] for column in columns])
    axis.set(xlabel="points over pretrained, 95 % interval")
    axis.invert_yaxis()
    axis.legend()
    return figure


def seeds(table: pd.DataFrame):
    """Gains of one backbone by training seed, a panel for each column."""
    columns = [column for column in COLUMNS if table[column].notna().all()]
    names = list(table.weights.unique())
    figure, axes = plt.subplots(1, len(columns), figsize=(11, 3.4), layout="constrained", squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        for i, (weights, group) in enumerate(table.groupby("weights", sort=False)):
            axis.scatter([i] * len(group), group[column], s=14, color=colours(names)[str(weights)])
            axis.plot([i - 0.25, i + 0.25], [group[column].mean()] * 2, color=colours(names)[str(weights)])
        axis.axhline(0, color="#1f2933", linewidth=0.8)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.tick_params(axis="y", labelsize=8)
        axis.set_title(COLUMNS[column].replace(", ", ",\n").replace(" to ", "\nto "), fontsize=8)
    return figure


def losses(curves: dict[str, Path]):
    """The loss, with all its terms, of both phases for all weights that were trained; None if there are none."""
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
        axis.plot(table.step, table.loss, color=colours(curves)[weights], linewidth=0.6, alpha=0.4)
        axis.plot(
            table.step,
            table.loss.rolling(20, min_periods=1).mean(),
            color=colours(curves)[weights],
            label=label(weights),
        )
        axis.set(title=f"{phase}: loss", xlabel="step")
        axis.legend()
    return figure


def probe(scores: dict[str, Scores]):
    """Accuracy of the linear probe per attribute; None if no such set was scored."""
    shown = without_controls(scores)
    probes = {w: s for w in shown for s in scores[w].zeroshot.values() if s["kind"] == "probe"}
    if not probes:
        return None
    table = pd.DataFrame(probes).drop(["kind", "average"]).astype(float)
    figure, axis = plt.subplots(figsize=(11, 4.4), layout="constrained")
    table.plot.barh(ax=axis, width=0.8, color=colours(scores))
    axis.invert_yaxis()
    axis.set(title="what a linear probe reads off the embedding", xlabel="accuracy, %", xlim=(0, 100))
    return figure


def url(figure) -> str:
    """A figure as a data URL; the figure is closed."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image_url(path: Path) -> str:
    with Image.open(path) as image:
        mime = Image.MIME[image.format or "PNG"]
    return f"data:{mime};base64," + base64.b64encode(path.read_bytes()).decode()


def by_pattern(scores: dict[str, Scores]) -> pd.DataFrame:
    """Pairs right per pattern, stock embedding, for `dvc plots`."""
    rows = [
        (f"{weights}: {name}", right)
        for weights in without_controls(scores)
        if scores[weights].mmvp
        for name, right in scores[weights].mmvp["stock"]["statement_to_image"]["patterns"].items()
    ]
    return pd.DataFrame(rows, columns=["pattern", "right"]).round(2)
