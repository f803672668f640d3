"""The mini world's sets for the benchmarks: pairs, zero-shot sets, images with masks, and questions."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.benchmarks.pairs import PROMPT
from pipeline.benchmarks.sets import Samples, png, write_split
from pipeline.core.outputs import write_json
from pipeline.core.stages import progress
from pipeline.mini import world
from pipeline.sections.mllm_sets import MiniMllmSets
from pipeline.sections.segmentation_sets import MiniSegmentationSets
from pipeline.sections.zeroshot_sets import MiniZeroshotSets

SPLITS = {"train": "probe", "test": "scorings"}  # of a set, and whose images of the mini world they are
MASKS, QUESTIONS = 4, 5  # groups of a set's images: those of one benchmark are no other's
WORDS = {  # for the mini world's segments; background has none
    "background": [],
    "object": list(world.OBJECTS),
    "hat": ["hat"],
    "star": ["star"],
    "balls": ["ball", "balls"],
    "letter": ["letter"],
}


def pairs(folder: Path, pairs_per_pattern: int, set_name: str = "scorings") -> None:
    """Draw pairs of the mini world: two images of one scene that differ in one detail."""
    rows: list[tuple[int, str, str]] = []
    for pattern, name in enumerate(progress(world.PATTERNS, "pairs")):
        images = folder / "MLLM_VLM Images" / name
        images.mkdir(parents=True)
        for index in range(pairs_per_pattern):
            for pixels, scene in zip(*world.pair(pattern, index, set_name), strict=True):
                rows.append((len(rows) + 1, name, world.caption(scene, [pattern]).removeprefix(PROMPT)))
                Image.fromarray(pixels).save(images / f"{len(rows)}.jpg", quality=95)
    with (folder / "Questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *rows])


# Zero-shot sets


def zeroshot(root: Path, sizes: MiniZeroshotSets, set_name: str = "scorings") -> None:
    """Draw the mini world's three sets: objects, captions, details. Their test splits come from `set_name`."""
    objects, captions, details = (root / "wds" / name for name in ("objects", "captions", "details"))
    write_split(objects, "test", "classification", _samples(set_name, 1, sizes.classification, _label))
    (objects / "classnames.txt").write_text("\n".join(world.OBJECTS) + "\n", encoding="utf-8")
    (objects / "zeroshot_classification_templates.txt").write_text(PROMPT + "a {c}\n", encoding="utf-8")
    write_split(captions, "test", "retrieval", _samples(set_name, 2, sizes.retrieval, _caption))
    write_split(details, "train", "probe", _samples("probe", 0, sizes.probe_train, _attributes))
    write_split(details, "test", "probe", _samples(set_name, 3, sizes.probe_test, _attributes))


def _samples(set_name: str, group: int, count: int, target) -> Samples:
    for index in progress(range(count), f"{target.__name__.strip('_')} images"):
        pixels, scene = world.image(set_name, group, index)
        yield f"{index:06d}", {"png": png(pixels), **target(scene)}


def _label(scene: np.ndarray) -> dict[str, bytes]:
    return {"cls": b"%d" % scene[0]}


def _caption(scene: np.ndarray) -> dict[str, bytes]:
    return {"txt": world.caption(scene).encode()}


def _attributes(scene: np.ndarray) -> dict[str, bytes]:
    return {"json": json.dumps(dict(zip(world.PATTERNS, map(int, scene[1:]), strict=True))).encode()}


# Images with masks


def segmentation(root: Path, sizes: MiniSegmentationSets) -> None:
    """Draw the mini world's set, with its exact masks."""
    for split, set_name in SPLITS.items():
        write_split(root / "segments", split, "segmentation", _drawn(set_name, getattr(sizes, split)))
    write_json(root / "segments/classes.json", {"classes": WORDS, "templates": [f"{PROMPT}a {{c}}"]})


def _drawn(set_name: str, count: int) -> Samples:
    for index in progress(range(count), f"images with masks of {set_name}"):
        pixels, mask = world.segmented(set_name, MASKS, index)
        yield f"{index:06d}", {"png": png(pixels), "mask.png": png(mask)}


# Questions


def question(pattern: str) -> str:
    return f"what is the {pattern.lower()} ?"


def mllm(root: Path, section: MiniMllmSets) -> None:
    """Draw the mini world's questions."""
    write_split(root, "train", "questions", _questions(section.train))
    write_split(root, "test", "questions", _asked_pairs(section.pairs_per_pattern))
    write_json(root / "tests.json", {"test": "pair"})


def _questions(count: int) -> Samples:
    asked = {"Object": world.OBJECTS, **world.PATTERNS}
    for index in progress(range(count), "images with questions"):
        pixels, scene = world.image("probe", QUESTIONS, index)
        questions = [
            {"question": question(pattern), "options": options, "answer": int(value)}
            for (pattern, options), value in zip(asked.items(), scene, strict=True)
        ]
        yield f"{index:06d}", {"png": png(pixels), "json": json.dumps(questions).encode()}


def _asked_pairs(pairs_per_pattern: int) -> Samples:
    for number, (pattern, values) in enumerate(progress(list(world.PATTERNS.items()), "pairs of questions")):
        for index in range(pairs_per_pattern):
            images, scenes = world.pair(number, index)
            options = [values[scene[1 + number]] for scene in scenes]
            for which, pixels in enumerate(images):
                asked = {"question": question(pattern), "options": options, "answer": which, "pattern": pattern}
                key = f"{number}{index:05d}{which}"
                yield key, {"png": png(pixels), "json": json.dumps([asked]).encode()}
