"""A frozen image encoder beside CLIP, which the losses of some recipes read: any image model of timm.

config.json  model.safetensors      timm's own format on the hub, so a published one is read as it comes
"""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models._hub import save_for_hf
from torch import nn
from torch.nn import functional as F

from pipeline.core.stages import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class FrozenEncoder(nn.Module):
    """Images to pooled embeddings. Nothing of it is trained, and no gradient passes."""

    def __init__(self, model: nn.Module) -> None:
        """model: of timm, whose pretrained_cfg has its image size and statistics."""
        super().__init__()
        config = model.pretrained_cfg
        self.model = model
        self.architecture: str = config["architecture"]
        self.size: tuple[int, int] = tuple(config["input_size"][1:])
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(config[name]).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: Path) -> "FrozenEncoder":
        """Raises UserError where a file is missing, or the weights are not those of the configuration."""
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} has no {name}. If a loss of the recipe reads the encoder, make it: `dvc repro`."
                )
        try:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
        except (RuntimeError, SafetensorError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: timm cannot load this model: {error}. Fetch or make it again.") from error
        return cls(model)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_for_hf(self.model.cpu(), str(folder), safe_serialization=True)

    @torch.no_grad()
    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 pixels of any size, resized to the encoder's own, to float32 [B, D], not normalised."""
        resized_BCHW = pixels_BCHW.float()
        if resized_BCHW.shape[2:] != self.size:
            resized_BCHW = F.interpolate(resized_BCHW, self.size, mode="bicubic", antialias=True).clamp(0, 255)
        return self.model((resized_BCHW - self.mean) / self.std).float()


def new_model(architecture: str, arguments: dict[str, Any], **pixels: Any) -> nn.Module:
    """A model of timm with random weights. Raises UserError for a name or arguments that timm does not know.

    arguments: of timm's constructor. pixels: its `input_size`, and the `mean` and `std` of pixels from 0 to 1, where
    they are not timm's own.
    """
    try:
        return timm.create_model(architecture, num_classes=0, pretrained_cfg_overlay=pixels, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"timm cannot make the image model '{architecture}': {error}") from error
