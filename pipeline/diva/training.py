"""Post-training by diffusion feedback: two phases, one step.

The step is written out once, in `run`; a phase says what is trained and by which optimizer. The published recipe has
the second phase alone; `projection_steps` fits the fresh visual projection first, with the tower frozen.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.diva.diffusion import Draw
from pipeline.diva.objective import Feedback


@dataclass(frozen=True)
class Recipe:
    """draw_weights: one noising of every image for each; a step's gradient is the sum of weight x mean over the batch.

    The released code gives two draws [A, 1]: it divides by the accumulation steps A = 5 what the trainer
    back-propagates, the last draw, and not what is back-propagated inside forward (tests/golden/README.md).
    """

    steps: int
    lr: float
    momentum: float
    weight_decay: float
    warmup_ratio: float
    clip_norm: float
    draw_weights: list[float]
    projection_steps: int
    projection_lr: float


@dataclass(frozen=True)
class MicroBatch:
    """pixels [B, C, H, W] for the tower, latent [B, c, h, w], and the draws of its images."""

    pixels_BCHW: torch.Tensor
    latent_BChw: torch.Tensor
    draws: list[Draw]


@dataclass(frozen=True)
class Record:
    """One finished step. loss: mean over images and draws; gradient_norm: before clipping."""

    phase: str
    step: int
    loss: float
    lr: float
    gradient_norm: float


@dataclass(frozen=True)
class Phase:
    name: str
    steps: int
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr: Callable[[int], float]
    draw_weights: list[float]
    clip_norm: float


class NotFiniteError(Exception):
    """A loss or a gradient is NaN or infinite; the parameters are still those of the last good step."""

    def __init__(self, phase: str, step: int, what: str, value: float) -> None:
        super().__init__(f"{what} is {value} in step {step} of phase '{phase}'")
        self.phase, self.step = phase, step


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Rate of optimizer step `step` (0-based): linear from 0 over ceil(steps x ratio) steps, then cosine to 0."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def phases(feedback: Feedback, tower_parameters: list[nn.Parameter], recipe: Recipe) -> list[Phase]:
    """What the recipe trains, in order. The tower's phase trains tower and projection together, as published."""
    projection = list(feedback.projection.parameters())
    trained = [*tower_parameters, *projection]
    return [
        Phase(
            name="projection",
            steps=recipe.projection_steps,
            parameters=projection,
            optimizer=torch.optim.AdamW(projection, lr=recipe.projection_lr),
            lr=lambda step: recipe.projection_lr,
            draw_weights=[1.0] * len(recipe.draw_weights),
            clip_norm=recipe.clip_norm,
        ),
        Phase(
            name="tower",
            steps=recipe.steps,
            parameters=trained,
            optimizer=torch.optim.SGD(
                trained, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
            ),
            lr=lambda step: learning_rate(step, recipe.steps, recipe.lr, recipe.warmup_ratio),
            draw_weights=recipe.draw_weights,
            clip_norm=recipe.clip_norm,
        ),
    ]


def run(
    feedback: Feedback, phase: Phase, batch: Callable[[int], list[MicroBatch]], precision: torch.dtype
) -> Iterator[Record]:
    """Train one phase, yielding a record after every step. `batch(step)` gives the step's micro-batches.

    Raises NotFiniteError before the parameters are touched.
    """
    feedback.requires_grad_(False)
    for parameter in phase.parameters:
        parameter.requires_grad_(True)
    for step in range(phase.steps):
        # --------------------------------------------------------------------------------------------------- one step
        micro_batches = batch(step)
        phase.optimizer.zero_grad(set_to_none=True)
        mean_loss = 0.0
        for micro in micro_batches:
            device = micro.pixels_BCHW.device.type
            with torch.autocast(device, dtype=precision, enabled=precision != torch.float32):
                losses = feedback(micro.pixels_BCHW, micro.latent_BChw, micro.draws)
            weights = torch.tensor(phase.draw_weights, device=losses.device) / len(micro_batches)
            (weights * losses).sum().backward()
            mean_loss += losses.mean().item() / len(micro_batches)
        gradient_norm = torch.nn.utils.clip_grad_norm_(phase.parameters, phase.clip_norm).item()
        for what, value in (("the loss", mean_loss), ("the gradient's norm", gradient_norm)):
            if not math.isfinite(value):
                raise NotFiniteError(phase.name, step, what, value)
        lr = phase.lr(step)
        for group in phase.optimizer.param_groups:
            group["lr"] = lr
        phase.optimizer.step()
        # ------------------------------------------------------------------------------------------------------------
        yield Record(phase.name, step, mean_loss, lr, gradient_norm)
