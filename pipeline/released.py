"""Stage released@<backbone>: the authors' tuned weights, to check their published scores without training.

models/<profile>/released/<backbone>/           the backbone's folder with those weights
metrics/<profile>/released/<backbone>.json      their source
"""

import sys
import tempfile
from pathlib import Path

from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import stage
from pipeline.data import downloads
from pipeline.models import backbones
from pipeline.sections.download import Download


@stage
def main() -> None:
    profile, name = config.profile(), sys.argv[1]
    released: Download = config.read(Download, f"backbones.{name}.released")
    original = Path("models", profile, "pretrained", name)
    outputs = Path("models", profile, "released", name), Path("metrics", profile, "released", f"{name}.json")
    with atomic(*outputs) as (folder, metrics_file):
        folder.mkdir()
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # where neither git nor DVC looks, killed or not
            origin = downloads.fetch(released, Path(scratch))
            checkpoint = Path(scratch, *released.files)
            tensors = backbones.fitting(backbones.read_checkpoint(checkpoint), original, checkpoint)
            backbones.save_like(original, tensors, folder)
        backbones.Backbone.load(folder)  # fail here if later stages could not load it
        write_json(metrics_file, origin)


if __name__ == "__main__":
    main()
