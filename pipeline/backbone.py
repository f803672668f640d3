"""Stage backbone@<backbone>: the CLIP to be post-trained, as one of open_clip's local folders.

models/<profile>/pretrained/<backbone>/
metrics/<profile>/backbone/<backbone>.json
"""

import sys
from pathlib import Path

import numpy as np
import torch

from pipeline import params
from pipeline.adapters import backbones
from pipeline.mini import pretrain
from pipeline.params import Source
from pipeline.runtime import device, stage, whole, write_json


def make(source: Source, folder: Path, compute: torch.device) -> dict:
    """Train the mini backbone: the text tower first, then the image tower on captions that hardly name a detail."""
    clip, tok, architecture = pretrain.new_clip(source.architecture)
    clip.to(compute)
    image = source.image_tower
    text_losses = pretrain.text_tower(clip, tok, source.text_tower)
    blind = pretrain.hardly_a_detail(image.detail_probability)
    image_losses = pretrain.image_tower(clip, tok, source.preprocessing, image, image.steps, blind)
    size = architecture["vision_cfg"]["image_size"]
    backbones.write(clip, tok, architecture, {"size": size, **source.preprocessing}, folder)
    return {
        "parameters": sum(p.numel() for p in clip.parameters()),
        "text_tower_loss": round(float(np.mean(text_losses[-20:])), 5),
        "image_tower_loss": round(float(np.mean(image_losses[-20:])), 5),
    }


@stage
def main() -> None:
    p, name = params.load(), sys.argv[1]
    outputs = (
        Path("models", p.run.profile, "pretrained", name),
        Path("metrics", p.run.profile, "backbone", f"{name}.json"),
    )
    with whole(*outputs) as (folder, metrics_file):
        write_json(metrics_file, make(p.backbones[name].source, folder, device()))


if __name__ == "__main__":
    main()
