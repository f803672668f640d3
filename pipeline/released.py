"""Stage released@<backbone>: the authors' own tuned weights, so that their figures can be checked without training.

models/<profile>/released/<backbone>/           the backbone's folder with those weights
metrics/<profile>/released/<backbone>.json      whence they came
"""

import sys
import tempfile
from pathlib import Path

from pipeline.core import params
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, stage
from pipeline.data import downloads
from pipeline.models import backbones


@stage
def main() -> None:
    p, name = params.load(), sys.argv[1]
    profile, released = p.run.profile, p.backbones[name].released
    if released is None:
        raise UserError(
            f"backbones.{name}.released: there are none. Name them there, or take 'released' out of run.checkpoints."
        )
    original = Path("models", profile, "pretrained", name)
    outputs = Path("models", profile, "released", name), Path("metrics", profile, "released", f"{name}.json")
    with atomic(*outputs) as (folder, metrics_file):
        folder.mkdir()
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # where neither git nor DVC looks, killed or not
            origin = downloads.fetch(released, Path(scratch))
            checkpoint = Path(scratch, *released.files)
            tensors = backbones.fitting(backbones.read_checkpoint(checkpoint), original, checkpoint)
            backbones.save_like(original, tensors, folder)
        backbones.Backbone.load(folder)  # what later stages will load can be loaded
        write_json(metrics_file, origin)


if __name__ == "__main__":
    main()
