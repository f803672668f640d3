"""The mini backbone: a CLIP whose image tower misses details that its text tower knows."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.compute import deterministic_device
from pipeline.mini import pretrain
from pipeline.models import backbones
from pipeline.sections.source import MiniSource


def make(name: str, source: MiniSource, folder: Path) -> dict[str, Any]:
    """Train the mini backbone: the text tower first, then the image tower on captions that rarely name a detail."""
    clip, tok, architecture = pretrain.new_clip(name, source.architecture)
    clip.to(deterministic_device())
    image, preprocessing = source.image_tower, source.preprocessing.model_dump()
    text_losses = pretrain.text_tower(clip, tok, source.text_tower)

    def rarely(rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(9)[: int(rng.random() < image.detail_probability)]

    image_losses = pretrain.image_tower(clip, tok, preprocessing, image, image.steps, rarely)
    backbones.write_config(architecture, preprocessing, folder)
    tok.save_pretrained(folder)
    backbones.save_weights(clip.state_dict(), folder)
    return {
        "text_tower_loss": round(float(np.mean(text_losses[-20:])), 5),
        "image_tower_loss": round(float(np.mean(image_losses[-20:])), 5),
    }
