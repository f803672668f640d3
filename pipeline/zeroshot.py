"""Stage score@zeroshot-<backbone>-<weights>: what the tower can still do, and what its embedding holds.

metrics/<profile>/scores/zeroshot/<backbone>-<weights>/
  scores.json        accuracy, recall and probe accuracy in %, by set
  scoring.json       version and hash of what was asked: rule, precision, classes and templates of the sets
  answers.parquet    what of it was right: one row an answer (set, measure, image)
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from pipeline.benchmarks import scoring
from pipeline.benchmarks.zeroshot import score
from pipeline.core import config
from pipeline.core.code import program
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import stage
from pipeline.engine import hosts
from pipeline.models.backbones import Backbone, text_sha256
from pipeline.sections.launch import Launch
from pipeline.sections.zeroshot import Zeroshot

VERSION = 1  # of the scoring, see benchmarks/scoring.py


@stage
def main(backbone: str, weights: str) -> None:
    hosts.start("pipeline.zeroshot", config.read(Launch, "launch"), "score")
    profile, processes = config.profile(), hosts.join()
    section: Zeroshot = config.read(Zeroshot, f"profiles.{profile}.zeroshot")
    model, data = Path("models", profile, weights, backbone), Path("data", profile)
    output = Path("metrics", profile, "scores", "zeroshot", f"{backbone}-{weights}")

    def load() -> tuple[dict[str, str], dict[str, Any]]:
        """Hashes of the sets, and what must be the same on all hosts."""
        folders = sorted(path for path in (data / "zeroshot" / "wds").glob("*") if path.is_dir())
        sets = {path.name: scoring.content(path, (".txt",)) for path in folders}
        same = {"code": program("zeroshot.py"), "torch": torch.__version__, "packages": hosts.packages()}
        return sets, {**same, "scoring": section.model_dump(), "sets": sets}

    with atomic(output) if processes.is_main_process else nullcontext((output,)) as (folder,):
        sets = hosts.agreed(processes, load)
        with hosts.sent(processes, model) as own:
            clip, texts = Backbone.load(own), data / ".texts" / text_sha256(own)
        summary, answers = score(clip, data / "zeroshot", section, processes.device, texts)
        if processes.is_main_process:
            folder.mkdir()
            scoring.write(
                folder, VERSION, rule="clip_benchmark's; an image's first answer", precision=section.precision,
                recall=section.recall, preprocessing=clip.preprocessing,
                sets=sets,
            )  # fmt: skip
            write_json(folder / "scores.json", summary)
            answers.to_parquet(folder / "answers.parquet", index=False)


if __name__ == "__main__":
    main()
