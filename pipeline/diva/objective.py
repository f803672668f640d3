"""The feedback: how well a frozen denoiser restores an image when the image tower tells it what is there."""

from typing import Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.diva.condition import TokenRule, condition, recap
from pipeline.diva.diffusion import Draw, Prediction, add_noise, target


class Tower(Protocol):
    """An image tower whose parameters are trained."""

    def image_tokens(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(pooled [B, D], patches [B, N, D])"""
        ...


class Denoiser(Protocol):
    """A frozen denoiser in the latent space."""

    alphas_cumprod: torch.Tensor
    prediction_type: Prediction

    def __call__(
        self, noised_BChw: torch.Tensor, timestep_B: torch.Tensor, condition_BTD: torch.Tensor
    ) -> torch.Tensor: ...


class Feedback(nn.Module):
    """Image tower, the fresh linear layer after it ("visual projection"), and the frozen denoiser that judges them."""

    def __init__(
        self,
        tower: Tower,
        projection: nn.Linear,
        denoiser: Denoiser,
        text_1LD: torch.Tensor,
        tokens: TokenRule,
        text_rule: Literal["sequence", "mean"],
    ) -> None:
        super().__init__()
        self.tower, self.projection, self.denoiser = tower, projection, denoiser
        self.register_buffer("text_1LD", text_1LD, persistent=False)
        self.tokens, self.text_rule = tokens, text_rule

    def condition(
        self, pooled_BD: torch.Tensor, patches_BND: torch.Tensor, positions_BK: torch.Tensor | None
    ) -> torch.Tensor:
        tokens_BTD = recap(pooled_BD, patches_BND, self.tokens, positions_BK)
        return condition(self.text_1LD, self.projection(tokens_BTD), self.text_rule)

    def forward(self, pixels_BCHW: torch.Tensor, latent_BChw: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
        """Mean squared error of each draw, [draws].

        The published code runs the tower once for each draw. The tower itself is deterministic, so one run serves all
        draws: their gradients meet at its tokens (tests/test_golden.py holds both against the published arrays).
        """
        pooled_BD, patches_BND = self.tower.image_tokens(pixels_BCHW)
        return torch.stack([self._error(pooled_BD, patches_BND, latent_BChw, draw) for draw in draws])

    def _error(
        self, pooled_BD: torch.Tensor, patches_BND: torch.Tensor, latent_BChw: torch.Tensor, draw: Draw
    ) -> torch.Tensor:
        alphas, t_B, noise = self.denoiser.alphas_cumprod, draw.timestep_B, draw.noise_BChw
        noised = add_noise(latent_BChw, noise, t_B, alphas)
        predicted = self.denoiser(noised, t_B, self.condition(pooled_BD, patches_BND, draw.positions_BK))
        wanted = target(latent_BChw, noise, t_B, alphas, self.denoiser.prediction_type)
        return F.mse_loss(predicted.float(), wanted)
