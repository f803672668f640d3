"""Stage backbone@<backbone>: the CLIP to be post-trained, as one of open_clip's local folders.

models/<profile>/pretrained/<backbone>/
metrics/<profile>/backbone/<backbone>.json      parameters; training losses, or the source
"""

import tempfile
from pathlib import Path
from typing import Any

from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import stage
from pipeline.data import downloads
from pipeline.mini.backbone import make
from pipeline.models import backbones, imports
from pipeline.models.registry import complete
from pipeline.sections.source import CheckpointSource, MiniSource, Source


def fetch(source: CheckpointSource, folder: Path) -> dict[str, Any]:
    """Fetch a published checkpoint and its tokenizer, and convert them; returns their source."""
    backbones.write_config(source.architecture, source.preprocessing.model_dump(), folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted = {Path(scratch): source.weights} | ({folder: source.tokenizer} if source.tokenizer else {})
        records = downloads.fetch_all(wanted)
        checkpoint = Path(scratch, *source.weights.files)
        backbones.save_weights(imports.fitting(imports.read_checkpoint(checkpoint), folder, checkpoint), folder)
    return {"weights": records[Path(scratch)], "tokenizer": records.get(folder)}


@stage
def main(backbone: str) -> None:
    profile = config.profile()
    source = complete(backbone, config.read(Source, f"backbones.{backbone}.source"))
    outputs = (
        Path("models", profile, "pretrained", backbone),
        Path("metrics", profile, "backbone", f"{backbone}.json"),
    )
    with atomic(*outputs) as (folder, metrics_file):
        metrics = make(backbone, source, folder) if isinstance(source, MiniSource) else fetch(source, folder)
        clip = backbones.Backbone.load(folder)  # fail here if later stages could not load it
        write_json(metrics_file, {"parameters": sum(q.numel() for q in clip.parameters()), **metrics})


if __name__ == "__main__":
    main()
