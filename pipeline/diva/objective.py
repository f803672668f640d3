"""The feedback: how well a frozen denoiser restores an image when the image tower tells it what is there."""

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.diva.condition import TokenRule, condition, recap
from pipeline.diva.diffusion import Draw, Prediction, add_noise, target


class Tower(Protocol):
    """An image tower, all of whose parameters are trained."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def image_tokens(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(pooled [B, D], patches [B, N, D])"""
        ...


class Denoiser(Protocol):
    """A frozen denoiser in the latent space."""

    alphas_cumprod: torch.Tensor
    prediction_type: Prediction

    def parameters(self) -> Iterator[nn.Parameter]: ...

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

        The published code runs tower and UNet once for each draw. The tower is deterministic, so one run serves all
        draws, and their gradients meet at its tokens; the UNet sees all draws as one batch.
        """
        pooled_BD, patches_BND = self.tower.image_tokens(pixels_BCHW)
        condition_BTD = torch.cat([self.condition(pooled_BD, patches_BND, draw.positions_BK) for draw in draws])
        t_B, noise = (torch.cat(parts) for parts in ([d.timestep_B for d in draws], [d.noise_BChw for d in draws]))
        latent, alphas = latent_BChw.repeat(len(draws), 1, 1, 1), self.denoiser.alphas_cumprod
        predicted = self.denoiser(add_noise(latent, noise, t_B, alphas), t_B, condition_BTD)
        wanted = target(latent, noise, t_B, alphas, self.denoiser.prediction_type)
        return F.mse_loss(predicted.float(), wanted, reduction="none").flatten(1).mean(1).view(len(draws), -1).mean(1)
