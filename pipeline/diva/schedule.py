"""What is trained when, and at which rate. The published recipe has the phase `tower` alone; in the one before it,
`projection`, the fresh visual projection is warmed up with the tower frozen."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.diva.losses import Loss


@dataclass(frozen=True)
class Phase:
    """What a phase trains, and how.

    batch: images of a step, over all processes. optimizer: a fused one, which can leave a step out on the device.
    draw_weights: one noising of every image for each; a step's gradient is the sum of weight x mean over the batch.

    The released code gives two draws [A, 1]: it divides by the accumulation steps A = 5 what the trainer
    back-propagates, the last draw, and not what is back-propagated inside forward (tests/golden/README.md).
    """

    name: str
    steps: int
    batch: int
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr: Callable[[int], float]
    draw_weights: list[float]
    clip_norm: float
    losses: list[Loss]

    def release(self) -> None:
        """Drop gradients and the optimizer's moments. Those of a UNet would fill a GPU during the next phase."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Rate of optimizer step `step` (0-based): linear from 0 over ceil(steps x ratio) steps, then cosine to 0."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
