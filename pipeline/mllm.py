"""Stage score@mllm-<backbone>-<weights>: questions on images, answered by a small LLaVA on the frozen image tower.

metrics/<profile>/scores/mllm/<backbone>-<weights>/
  scores.json    by test what was answered right in %: samples (pairs, images, or questions) and questions, by
                 training seed and by pattern; the F1 of yes, where all answers are yes or no; a hash of the tensors
                 that it reads
  scoring.json   version and hash of what was asked: settings and prompts, the language model, the tests
  right.parquet  how much of a sample was right, 0 to 1: one row a test, seed and sample

Projector and language model are trained anew for every tower, in the same way, with several seeds (benchmarks/mllm.py),
by all GPUs of the machine. A training that was stopped goes on from its checkpoint.
"""

from contextlib import nullcontext
from pathlib import Path

from accelerate import PartialState

from pipeline.benchmarks import scoring
from pipeline.benchmarks.mllm_score import score
from pipeline.core import config
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, remove, write_json
from pipeline.core.processes import on_every_gpu
from pipeline.core.stages import stage
from pipeline.models.backbones import Backbone
from pipeline.sections.mllm import Mllm

VERSION = 1  # of the scoring, see benchmarks/scoring.py


@stage
def main(backbone: str, weights: str) -> None:
    on_every_gpu("pipeline.mllm")
    profile, compute = config.profile(), deterministic_device()
    section: Mllm = config.read(Mllm, f"profiles.{profile}.mllm")
    data = Path("data", profile, "mllm")
    output = Path("metrics", profile, "scores", "mllm", f"{backbone}-{weights}")
    checkpoint = output.with_name(f".{output.name}.checkpoint")
    writes = PartialState(cpu=compute.type == "cpu").is_main_process
    with atomic(output) if writes else nullcontext((output,)) as (folder,):
        clip = Backbone.load(Path("models", profile, weights, backbone))
        summary, table = score(clip, data, section, compute, checkpoint)
        if writes:
            folder.mkdir()
            scoring.write(
                folder, VERSION, rule="the likeliest option; of equal ones the first",
                preprocessing=clip.preprocessing, sets=scoring.content(data, (".json",)),
                **section.model_dump(exclude={"batch"}),
            )  # fmt: skip
            write_json(folder / "scores.json", summary)
            table.to_parquet(folder / "right.parquet", index=False)
    if writes:
        remove(checkpoint)


if __name__ == "__main__":
    main()
