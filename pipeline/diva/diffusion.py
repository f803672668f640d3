"""Noising and its target, and the random draws of one step."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from pipeline.diva.condition import draw_positions
from pipeline.diva.rules import TokenRule


class Draw(NamedTuple):
    """The random draws of one noising of B images: timestep [B], noise [B, C, h, w], token positions [B, K] or None."""

    timestep_B: torch.Tensor
    noise_BChw: torch.Tensor
    positions_BK: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Draw":
        """A copy on the device; asynchronous if the tensors lie in pinned memory."""
        return Draw(*(None if part is None else part.to(device, non_blocking=True) for part in self))

    def of_one(self, count: int) -> "Draw":
        """The draw of the first image, repeated for `count` images."""
        return Draw(*(None if part is None else part[:1].expand(count, *part.shape[1:]) for part in self))

    def pinned(self) -> "Draw":
        return Draw(*(None if part is None else part.pin_memory() for part in self))


def draw(
    latent_shape: torch.Size,
    patches: int,
    rule: TokenRule,
    timesteps: tuple[int, int],
    generators: list[torch.Generator],
) -> Draw:
    """One draw, with a generator for each image, so that it does not depend on how images are spread over processes.

    latent_shape: [C, h, w]; timesteps: uniform in low..high-1.
    """
    return Draw(
        timestep_B=torch.stack([torch.randint(*timesteps, (), generator=g) for g in generators]),
        noise_BChw=torch.stack([torch.randn(latent_shape, generator=g) for g in generators]),
        positions_BK=draw_positions(rule, patches, generators),
    )


def add_noise(
    latent_BChw: torch.Tensor, noise_BChw: torch.Tensor, timestep_B: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """sqrt(a_t) latent + sqrt(1 - a_t) noise."""
    signal, sigma = _coefficients(timestep_B, alphas_cumprod)
    return signal * latent_BChw + sigma * noise_BChw


def target(
    latent_BChw: torch.Tensor,
    noise_BChw: torch.Tensor,
    timestep_B: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: Literal["epsilon", "v_prediction"],
) -> torch.Tensor:
    """What the denoiser should predict: the noise, or the velocity sqrt(a_t) noise - sqrt(1 - a_t) latent."""
    if prediction_type == "epsilon":
        return noise_BChw
    signal, sigma = _coefficients(timestep_B, alphas_cumprod)
    return signal * noise_BChw - sigma * latent_BChw


def _coefficients(timestep_B: torch.Tensor, alphas_cumprod: torch.Tensor) -> Sequence[torch.Tensor]:
    alpha = alphas_cumprod[timestep_B][:, None, None, None]
    return alpha.sqrt(), (1 - alpha).sqrt()
