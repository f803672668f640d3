"""Stage mmvp_vlm: the benchmark of image pairs, in the folder format of the hub's MMVP-VLM.

data/<profile>/mmvp/Questions.csv                       Question ID,Type,Statement
data/<profile>/mmvp/MLLM_VLM Images/<Type>/<id>.jpg     ids 1.., the two of a pair one after the other
"""

import csv
from pathlib import Path

from PIL import Image

from pipeline.benchmarks.pairs import read_mmvp_vlm
from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import progress, stage
from pipeline.data import downloads
from pipeline.mini import world
from pipeline.sections.mmvp_vlm import MiniMmvpVlm, MmvpVlm, PublishedMmvpVlm


def make(folder: Path, pairs_per_pattern: int, set_name: str = "scorings") -> None:
    """Draw pairs of the mini world: two images of one scene that differ in one detail."""
    rows: list[tuple[int, str, str]] = []
    for pattern, name in enumerate(progress(world.PATTERNS, "pairs")):
        images = folder / "MLLM_VLM Images" / name
        images.mkdir(parents=True)
        for index in range(pairs_per_pattern):
            for pixels, scene in zip(*world.pair(pattern, index, set_name), strict=True):
                rows.append((len(rows) + 1, name, world.caption(scene, [pattern]).removeprefix(world.PROMPT)))
                Image.fromarray(pixels).save(images / f"{len(rows)}.jpg", quality=95)
    with (folder / "Questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *rows])


@stage
def main() -> None:
    profile = config.profile()
    section: MiniMmvpVlm | PublishedMmvpVlm = config.read(MmvpVlm, f"profiles.{profile}.mmvp_vlm")
    outputs = Path("data", profile, "mmvp"), Path("metrics", profile, "mmvp_vlm.json")
    with atomic(*outputs) as (folder, report):
        if isinstance(section, MiniMmvpVlm):
            origin = None
            make(folder, section.pairs_per_pattern)
        else:
            origin = downloads.fetch(section.download, folder)
        questions = read_mmvp_vlm(folder, section.pairs_per_pattern)  # fail here if scoring could not read it
        for question in progress(questions, "decoding"):
            question.image()
        write_json(report, {"pairs": len(questions) // 2, "origin": origin})


if __name__ == "__main__":
    main()
