"""Stage mmvp_vlm: the benchmark of image pairs, in the folder format of the hub's MMVP-VLM.

data/<profile>/mmvp/Questions.csv                       Question ID,Type,Statement
data/<profile>/mmvp/MLLM_VLM Images/<Type>/<id>.jpg     ids 1.., the two of a pair one after the other
"""

from pathlib import Path

from pipeline.benchmarks.pairs import read_mmvp_vlm
from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import progress, stage
from pipeline.data import downloads
from pipeline.mini import sets
from pipeline.sections.mmvp_vlm import MiniMmvpVlm, MmvpVlm, PublishedMmvpVlm


@stage
def main() -> None:
    profile = config.profile()
    section: MiniMmvpVlm | PublishedMmvpVlm = config.read(MmvpVlm, f"profiles.{profile}.mmvp_vlm")
    outputs = Path("data", profile, "mmvp"), Path("metrics", profile, "mmvp_vlm.json")
    with atomic(*outputs) as (folder, report):
        if isinstance(section, MiniMmvpVlm):
            origin = None
            sets.pairs(folder, section.pairs_per_pattern)
        else:
            origin = downloads.fetch(section.download, folder)
        questions = read_mmvp_vlm(folder, section.pairs_per_pattern)  # fail here if scoring could not read it
        for question in progress(questions, "decoding"):
            question.image()
        write_json(report, {"pairs": len(questions) // 2, "origin": origin})


if __name__ == "__main__":
    main()
