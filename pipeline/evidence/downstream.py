"""What a downstream reader of the image tower gains: segmentation and a small LLaVA, before and after, with controls.

Where weights differ from those before in nothing that a benchmark reads (a head behind the tower; the last block, for a
reader of the last layer but one), there is no change to be measured: CANNOT_CHANGE instead of an interval.
"""

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.core.stages import UserError
from pipeline.evidence import statistics
from pipeline.evidence.results import CONTROLS, Read, label, recipe_and_control
from pipeline.evidence.statistics import Interval

CANNOT_CHANGE = "cannot change: nothing that was trained is read"
READINGS = {"probe": "linear probe", "training_free": "training-free"}
PIXELS = ["right", "predicted", "labelled"]
FILES = {"segmentation": "pixels.parquet", "mllm": "pairs.parquet"}


@dataclass(frozen=True)
class Reading:
    """What some weights scored in a column.

    figures: in %, the first one that which changes are of; none where the reading is undefined, for the reason given.
    reads: sha256 of the tensors that were read. answers: what an interval is over, as `change` takes them.
    """

    reads: str = ""
    figures: tuple[float, ...] = ()
    answers: np.ndarray = field(default_factory=lambda: np.empty(0))
    change: Callable[[np.ndarray, np.ndarray], Interval] = statistics.iou_change
    undefined: str = ""


def read(
    profile: str, backbone: str, weights: str, benchmarks: Iterable[str], read: Read = Path.read_bytes
) -> dict[str, Reading]:
    """The readings of these of FILES' benchmarks by column; `read` as for results.Scores."""
    found = dict[str, Reading]()
    for benchmark in (name for name in FILES if name in benchmarks):
        folder = Path("metrics", profile, "scores", benchmark, f"{backbone}-{weights}")
        table = pd.read_parquet(io.BytesIO(read(folder / FILES[benchmark])))
        found |= OF[benchmark](json.loads(read(folder / "scores.json")), table)
    return found


def of_segmentation(scores: dict, table: pd.DataFrame) -> dict[str, Reading]:
    """Of what pipeline/segmentation.py scores; answers: pixels [images, classes, 3]."""
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
            found[column] = Reading(scores["reads_sha256"], figures, pixels, _iou_change)
    return found


def of_mllm(scores: dict, table: pd.DataFrame) -> dict[str, Reading]:
    """Of what pipeline/mllm.py scores; answers: whether pairs are right, in %, [seeds, pairs]."""
    right = 100.0 * table.pivot(index="seed", columns="pair", values="right").to_numpy(dtype=float)
    questions = float(np.mean([of_seed["questions"] for of_seed in scores["seeds"].values()]))
    return {
        "small LLaVA: pairs (questions)": Reading(
            scores["reads_sha256"], (scores["pairs"], questions), right, _mean_change
        )
    }


OF = {"segmentation": of_segmentation, "mllm": of_mllm}


def _iou_change(before: np.ndarray, after: np.ndarray) -> Interval:
    _of_the_same(before.shape == after.shape and bool((before[..., 2] == after[..., 2]).all()))
    return statistics.iou_change(before, after)


def _mean_change(before: np.ndarray, after: np.ndarray) -> Interval:
    _of_the_same(before.shape == after.shape)
    return statistics.over_seeds_and_answers(after - before)


def _of_the_same(same: bool) -> None:
    if not same:
        raise UserError("answers to other masks or questions cannot be compared. Score all weights anew: `dvc repro`.")


def evidence(readings: dict[str, dict[str, Reading]]) -> dict[str, dict]:
    """Of readings by weights and column. By column: score, by weights: figures in %; gain, by weights, and effect, by a
    control's weights (the recipe's gain minus the control's): in points, [value, low, high] or CANNOT_CHANGE;
    undefined: why there are none of these.
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
    if before.reads == after.reads:
        return CANNOT_CHANGE
    return [round(value, 2) + 0.0 for value in before.change(before.answers, after.answers)]


def table(found: dict[str, dict]) -> list[list[str]]:
    """Rows for the report, the first one of headings: scores, gains, and effects over the controls; none of nothing."""
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
