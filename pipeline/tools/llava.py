"""The small LLaVA of benchmark `mllm` as a folder of transformers, for other programs such as lmms-eval.

    python -m pipeline.tools.llava <backbone> <weights>        after `dvc repro` with mllm in run.benchmarks

Trains projector and language model as score@mllm does with its first seed, and writes
models/<profile>/llava/<backbone>-<weights>/: LlavaForConditionalGeneration, LlavaProcessor and the prompt as a chat
template. The same command goes on where it was interrupted.
"""

from contextlib import nullcontext
from pathlib import Path

from accelerate import PartialState

from pipeline.benchmarks.mllm import save
from pipeline.benchmarks.mllm_score import score
from pipeline.core import config
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, remove
from pipeline.core.processes import on_every_gpu
from pipeline.core.stages import UserError, stage
from pipeline.models.backbones import Backbone
from pipeline.models.exports import image_processor
from pipeline.sections.mllm import Mllm


@stage
def main(backbone: str, weights: str) -> None:
    on_every_gpu("pipeline.tools.llava")
    profile, compute = config.profile(), deterministic_device()
    section: Mllm = config.read(Mllm, f"profiles.{profile}.mllm").model_copy(update={"seeds": 1})
    clip, data = Backbone.load(Path("models", profile, weights, backbone)), Path("data", profile, "mllm")
    output = Path("models", profile, "llava", f"{backbone}-{weights}")
    checkpoint = output.with_name(f".{output.name}.checkpoint")
    if not data.is_dir():
        raise UserError(
            f"{data} does not exist. Name mllm in run.benchmarks and run.benchmark_sets of params.yaml, then "
            "`dvc repro pipeline/dvc.yaml:benchmark_sets@mllm`."
        )
    writes = PartialState(cpu=compute.type == "cpu").is_main_process
    with atomic(output) if writes else nullcontext((output,)) as (folder,):
        keep = (lambda llava: save(llava, image_processor(clip), section.phases[-1].prompt, folder)) if writes else None
        score(clip, data, section, compute, checkpoint, keep)
        if writes and not folder.exists():  # a run before this one was stopped after its answers
            remove(checkpoint)
            raise UserError(f"{checkpoint} was of a training that had ended. It was removed: run the command again.")
    if writes:
        remove(checkpoint)
        print(f"written: {output}")


if __name__ == "__main__":
    main()
