"""Stage checkpoint@<backbone>-<checkpoint>: tuned weights that others made, in the folder format of their backbone.

models/<profile>/<checkpoint>/<backbone>/           the backbone's folder with those weights
metrics/<profile>/checkpoint/<backbone>-<checkpoint>.json      their source and its hash

If the checkpoint holds the image tower alone (`parts`, see sections/checkpoint.py), the text tower comes from the
pretrained backbone. Tokenizer and preprocessing always do.
"""

import tempfile
from pathlib import Path

from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import stage
from pipeline.data import downloads
from pipeline.models import backbones, imports
from pipeline.sections.checkpoint import TunedWeights
from pipeline.sections.download import Download


@stage
def main(backbone: str, checkpoint: str) -> None:
    profile = config.profile()
    entry: TunedWeights = config.read(TunedWeights, f"backbones.{backbone}.checkpoints.{checkpoint}")
    original = Path("models", profile, "pretrained", backbone)
    outputs = (
        Path("models", profile, checkpoint, backbone),
        Path("metrics", profile, "checkpoint", f"{backbone}-{checkpoint}.json"),
    )
    with atomic(*outputs) as (folder, metrics_file):
        folder.mkdir()
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # where neither git nor DVC looks, killed or not
            if isinstance(entry.weights, Download):
                origin = downloads.fetch(entry.weights, Path(scratch), config.recorded(outputs[1]))
                source = imports.only_model(Path(scratch))
            else:
                origin, source = downloads.found_here(entry.weights), Path(entry.weights.path)
            tensors = imports.tensors(source, original, entry.parts)
            backbones.save_like(original, tensors, folder)
        backbones.Backbone.load(folder)  # fail here if later stages could not load it
        write_json(metrics_file, origin)


if __name__ == "__main__":
    main()
