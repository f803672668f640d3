"""Image tower, the fresh linear layer after it ("visual projection"), and the denoiser that is conditioned on them."""

from typing import Literal

import torch
from torch import nn

from pipeline.diva.condition import condition, recap
from pipeline.diva.gap_correction import GapCorrection
from pipeline.diva.pixels import PixelRule
from pipeline.diva.rules import TokenRule


class Feedback(nn.Module):
    """The parts of a training, and how the denoiser is conditioned on an image or on a caption."""

    def __init__(
        self,
        tower: nn.Module,
        projection: nn.Linear,
        denoiser: nn.Module,
        text_1LD: torch.Tensor,
        tokens: TokenRule,
        text_rule: Literal["sequence", "mean"],
        pixels: PixelRule,
        gap_correction: GapCorrection | None = None,
        warms_up_denoiser: bool = False,
    ) -> None:
        """tower: pixels to (pooled [B, D], patches [B, N, D]). denoiser: (noised, timestep, condition) to its
        prediction, with `latent` of pixels, `unet`, `alphas_cumprod` and `prediction_type`.

        gap_correction: the map before the projection. warms_up_denoiser: whether the warm-up trains `unet`, too, which
        then belongs to what a run changes.
        """
        super().__init__()
        self.warms_up_denoiser, self.gap_correction = warms_up_denoiser, gap_correction
        self.tower, self.projection, self.denoiser = tower, projection, denoiser
        self.register_buffer("text_1LD", text_1LD, persistent=False)
        self.tokens, self.text_rule, self.pixels = tokens, text_rule, pixels

    def condition(
        self, pooled_BD: torch.Tensor, patches_BND: torch.Tensor, positions_BK: torch.Tensor | None
    ) -> torch.Tensor:
        tokens_BTD = recap(pooled_BD, patches_BND, self.tokens, positions_BK)
        return self._condition(self.gap_correction(tokens_BTD) if self.gap_correction else tokens_BTD)

    def condition_on_text(self, text_BD: torch.Tensor) -> torch.Tensor:
        """The condition that embeddings of the text tower make, in the place of the image tower's."""
        return self._condition((self.gap_correction.text(text_BD) if self.gap_correction else text_BD)[:, None])

    def _condition(self, tokens_BTD: torch.Tensor) -> torch.Tensor:
        return condition(self.text_1LD, self.projection(tokens_BTD), self.text_rule)
