"""Stage benchmark_sets@mllm: questions on images of the mini world, for benchmarks/questions.py.

data/<profile>/mllm/train/0.tar, test/0.tar

As in MMVP the two images of a pair differ in a detail, the question is the same, and the options are the two values.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.benchmarks.sets import png, write_split
from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import progress, stage
from pipeline.mini import world
from pipeline.sections.mllm_sets import MllmSets

GROUP = 5  # of the probe's images: no other benchmark has them


def question(pattern: str) -> str:
    return f"what is the {pattern.lower()} ?"


def _train(count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    asked = {"Object": world.OBJECTS, **world.PATTERNS}
    for index in progress(range(count), "images with questions"):
        pixels, scene = world.image("probe", GROUP, index)
        questions = [
            {"question": question(pattern), "options": options, "answer": int(value)}
            for (pattern, options), value in zip(asked.items(), scene, strict=True)
        ]
        yield f"{index:06d}", {"png": png(pixels), "json": json.dumps(questions).encode()}


def _test(pairs_per_pattern: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, (pattern, values) in enumerate(progress(list(world.PATTERNS.items()), "pairs of questions")):
        for index in range(pairs_per_pattern):
            images, scenes = world.pair(number, index)
            options = [values[scene[1 + number]] for scene in scenes]
            for which, pixels in enumerate(images):
                asked = {"question": question(pattern), "options": options, "answer": which, "pattern": pattern}
                key = f"{number}{index:05d}{which}"
                yield key, {"png": png(pixels), "json": json.dumps([asked]).encode()}


@stage
def main() -> None:
    profile = config.profile()
    section: MllmSets = config.read(MllmSets, f"profiles.{profile}.mllm_sets")
    outputs = Path("data", profile, "mllm"), Path("metrics", profile, "mllm_sets.json")
    with atomic(*outputs) as (folder, report):
        write_split(folder, "train", "questions", _train(section.train))
        write_split(folder, "test", "questions", _test(section.pairs_per_pattern))
        write_json(report, {"images": section.train, "pairs": section.pairs_per_pattern * len(world.PATTERNS)})


if __name__ == "__main__":
    main()
