"""Gains of segmentation and of a small LLaVA on the frozen image tower: before and after training, with controls.

A benchmark may read no tensor that training changed: a residual head stands behind the tower, and the small LLaVA does
not read the last block. Then its score cannot change, and CANNOT_CHANGE takes the place of an interval.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.core.stages import UserError
from pipeline.evidence import statistics
from pipeline.evidence.results import CONTROLS, Read, differences, label, recipe_and_control
from pipeline.evidence.statistics import Interval

CANNOT_CHANGE = "cannot change: nothing that was trained is read"
READINGS = {"probe": "linear probe", "training_free": "training-free"}
PIXELS = ["right", "predicted", "labelled"]
FILES = {"segmentation": "pixels.parquet", "mllm": "right.parquet"}


@dataclass(frozen=True)
class Reading:
    """The scores of one set of weights in one column of the report.

    figures: in %; gains are of the first one; empty if the reading is undefined, for the reason given. reads: sha256 of
    the tensors that the benchmark reads. asked: the record of the scoring, and which samples it asked; readings with
    different records are not compared. answers: the samples of the interval, as `change` takes them.
    """

    reads: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    figures: tuple[float, ...] = ()
    answers: np.ndarray = field(default_factory=lambda: np.empty(0))
    change: Callable[[np.ndarray, np.ndarray], Interval] = statistics.iou_change
    undefined: str = ""


def read(
    profile: str, backbone: str, weights: str, benchmarks: Iterable[str], read: Read = Path.read_bytes
) -> dict[str, Reading]:
    """The readings of those of FILES' benchmarks that `benchmarks` names, by column; `read` as for results.Scores."""
    found = dict[str, Reading]()
    for benchmark in (name for name in FILES if name in benchmarks):
        folder = Path("metrics", profile, "scores", benchmark, f"{backbone}-{weights}")
        table = pd.read_parquet(io.BytesIO(read(folder / FILES[benchmark])))
        scores, scoring = (json.loads(read(folder / name)) for name in ("scores.json", "scoring.json"))
        found |= OF[benchmark](scores, table, scoring)
    return found


def of_segmentation(scores: dict, table: pd.DataFrame, scoring: dict) -> dict[str, Reading]:
    """The readings of what pipeline/segmentation.py wrote; answers: pixels [images, classes, 3]."""
    found = {}
    for name, readings in scores["sets"].items():
        for reading, result in readings.items():
            column = f"{name}, {READINGS[reading]}: mean IoU (pixel accuracy)"
            if "undefined" in result:
                found[column] = Reading(undefined=result["undefined"])
                continue
            rows = table[(table.set == name) & (table.reading == reading)].sort_values(["image", "label"])
            pixels = rows[PIXELS].to_numpy().reshape(rows.image.nunique(), -1, 3)
            figures = result["mean_iou"], result["pixel_accuracy"]
            asked = {**scoring, "masks": hashlib.sha256(pixels[..., 2].astype(np.int64).tobytes()).hexdigest()}
            found[column] = Reading(scores["reads_sha256"], asked, figures, pixels)
    return found


def of_mllm(scores: dict, table: pd.DataFrame, scoring: dict) -> dict[str, Reading]:
    """The readings of what pipeline/mllm.py wrote; answers: how much of a sample is right, in %, [seeds, samples]."""
    found = {}
    for name, result in scores["tests"].items():
        own = "" if name == "test" else f", {name}"  # the mini world's only one
        second, value = ("F1 of yes", "yes_f1") if result["counted"] == "question" else ("questions", "questions")
        rows = table[table.test == name]
        right = 100.0 * rows.pivot(index="seed", columns="sample", values="right").to_numpy(dtype=float)
        asked = {**scoring, "seeds": len(right), "samples": right.shape[1]}
        found[f"small LLaVA{own}: {result['counted']}s ({second})"] = Reading(
            scores["reads_sha256"],
            asked,
            (result["right"], result[value]),
            right,
            lambda before, after: statistics.over_seeds_and_answers(after - before),
        )
    return found


OF = {"segmentation": of_segmentation, "mllm": of_mllm}


def evidence(readings: dict[str, dict[str, Reading]]) -> dict[str, dict]:
    """Scores, gains and effects of readings, which are given by weights and column. Returns by column:

    score: figures in %, by weights. gain: by weights. effect: the recipe's gain minus the control's, by the control's
    weights. Both are in points, [value, low, high], or CANNOT_CHANGE. undefined: why there are none of these.
    """
    found = dict[str, dict]()
    trained = [weights for weights in readings if weights != "pretrained"]
    controls = {weights: recipe_and_control(weights)[0] for weights in trained if recipe_and_control(weights)[1]}
    for column, before in readings["pretrained"].items():
        if before.undefined:
            found[column] = {"undefined": before.undefined}
            continue
        found[column] = {
            "score": {weights: list(of[column].figures) for weights, of in readings.items()},
            "gain": {weights: _change(before, readings[weights][column]) for weights in trained},
            "effect": {w: _change(readings[w][column], readings[recipe][column]) for w, recipe in controls.items()},
        }
    return found


def _change(before: Reading, after: Reading) -> list[float] | str:
    if other := differences(before.asked, after.asked):
        raise UserError(
            f"two weights were scored in different ways, so their difference means nothing: {'; '.join(other)}. Run "
            "`dvc repro` to score all weights in the same way."
        )
    if before.reads == after.reads:
        return CANNOT_CHANGE
    return [round(value, 2) + 0.0 for value in before.change(before.answers, after.answers)]


def table(found: dict[str, dict]) -> list[list[str]]:
    """Rows for the report: headings, scores, gains, and effects over the controls. Empty if nothing was scored."""
    first = next((of for of in found.values() if "score" in of), None)
    if not first:
        return []
    rows = [["%; gains and effects in points", *found]]
    for kind, heading in (("score", "{}"), ("gain", "gain: {}"), ("effect", "effect: {} over {}")):
        for weights in first[kind]:
            recipe, control = recipe_and_control(weights)
            names = (recipe, CONTROLS.get(control)) if kind == "effect" else (label(weights),)
            rows.append([heading.format(*names), *(_cell(of, kind, weights) for of in found.values())])
    return rows


def _cell(of_column: dict, kind: str, weights: str) -> str:
    if "undefined" in of_column:
        return f"undefined: {of_column['undefined']}"
    value = of_column[kind][weights]
    if kind == "score":
        return "{:.1f} ({:.1f})".format(*value)
    return value if isinstance(value, str) else Interval(*value).text()
