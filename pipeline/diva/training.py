"""Post-training by diffusion feedback: two phases, one step.

The step is written out once, in `run`; a phase says what is trained and by which optimizer. The published recipe has
the second phase alone; the first fits the fresh visual projection, with the tower frozen.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from pipeline.diva.diffusion import Draw
from pipeline.diva.objective import Feedback


@dataclass(frozen=True)
class Recipe:
    """batch: images of a step, over all processes.
    draw_weights: one noising of every image for each; a step's gradient is the sum of weight x mean over the batch.
    trained: what the second phase trains of the tower: all of it, what lora.adapt added, or its residual head.
    momentum: of sgd; adamw has its own. anchor_weight: of feedback's anchor, 0 without.

    The released code gives two draws [A, 1]: it divides by the accumulation steps A = 5 what the trainer
    back-propagates, the last draw, and not what is back-propagated inside forward (tests/golden/README.md).
    """

    batch: int
    steps: int
    lr: float
    momentum: float
    weight_decay: float
    warmup_ratio: float
    clip_norm: float
    draw_weights: list[float]
    projection_steps: int
    projection_lr: float
    trained: Literal["tower", "lora", "head"] = "tower"
    with_projection: bool = True
    optimizer: Literal["sgd", "adamw"] = "sgd"
    anchor_weight: float = 0.0


@dataclass(frozen=True)
class MicroBatch:
    """pixels [B, C, H, W] for the tower, latent [B, c, h, w], and the draws of its images.

    last: of this process in this step; only then do processes exchange gradients. caption, view: see Feedback.forward.
    """

    pixels_BCHW: torch.Tensor
    latent_BChw: torch.Tensor
    draws: list[Draw]
    last: bool
    caption_BD: torch.Tensor | None = None
    view_BCHW: torch.Tensor | None = None


class Processes(Protocol):
    """What `accelerate.Accelerator` is to a step; each process has the same parameters and a part of the batch."""

    num_processes: int

    def prepare(self, model: nn.Module) -> nn.Module: ...

    def no_sync(self, model: nn.Module) -> AbstractContextManager: ...

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor: ...

    def free_memory(self) -> object: ...


@dataclass(frozen=True)
class Record:
    """One finished step.

    loss: mean over images and draws, without the anchor's part; gradient_norm: before clipping; parameter_norm: after
    the step; update_norm: of what the step changed; validation_loss: after the step, None where it was not measured.
    """

    phase: str
    step: int
    loss: float
    lr: float
    gradient_norm: float
    parameter_norm: float
    update_norm: float
    validation_loss: float | None


@dataclass(frozen=True)
class Phase:
    name: str
    steps: int
    batch: int
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr: Callable[[int], float]
    draw_weights: list[float]
    clip_norm: float
    anchor_weight: float = 0.0


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


def phases(feedback: Feedback, recipe: Recipe) -> list[Phase]:
    """What the recipe trains, in order."""
    projection = list(feedback.projection.parameters())
    trained = [*trained_of(feedback, recipe), *(projection if recipe.with_projection else [])]
    fitted = [*projection, *(feedback.denoiser.unet.parameters() if feedback.fits_denoiser else [])]
    return [
        Phase(
            name="projection",
            steps=recipe.projection_steps,
            batch=recipe.batch,
            parameters=fitted,
            optimizer=torch.optim.AdamW(fitted, lr=recipe.projection_lr, fused=True),
            lr=lambda step: recipe.projection_lr,
            draw_weights=[1.0] * len(recipe.draw_weights),
            clip_norm=recipe.clip_norm,
        ),
        Phase(
            name="tower",
            steps=recipe.steps,
            batch=recipe.batch,
            parameters=trained,
            optimizer=torch.optim.SGD(
                trained, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
            )
            if recipe.optimizer == "sgd"
            else torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True),
            lr=lambda step: learning_rate(step, recipe.steps, recipe.lr, recipe.warmup_ratio),
            draw_weights=recipe.draw_weights,
            clip_norm=recipe.clip_norm,
            anchor_weight=recipe.anchor_weight,
        ),
    ]


PARTS = {"tower": "", "lora": ".lora_", "head": "residual_head."}


def trained_of(feedback: Feedback, recipe: Recipe) -> list[nn.Parameter]:
    """The tower's parameters that the recipe trains: those whose names tell of the part."""
    return [parameter for name, parameter in feedback.tower.named_parameters() if PARTS[recipe.trained] in name]


def run(
    feedback: Feedback,
    phase: Phase,
    batch: Callable[[int], Iterable[MicroBatch]],
    precision: torch.dtype,
    processes: Processes,
    start: int = 0,
    validation: Callable[[int], float | None] = lambda step: None,
) -> Iterator[Record]:
    """Train one phase from step `start` on, yielding a record after every step.

    `batch(step)` gives the micro-batches of this process, one at a time; `validation(step)` measures after the step.
    Raises NotFiniteError, in all processes alike, before the parameters are touched.
    """
    feedback.requires_grad_(False)
    for parameter in phase.parameters:
        parameter.requires_grad_(True)
    model = processes.prepare(feedback)
    for step in range(start, phase.steps):
        # --------------------------------------------------------------------------------------------------- one step
        phase.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros(())
        for micro in batch(step):
            share = len(micro.pixels_BCHW) / phase.batch
            with nullcontext() if micro.last else processes.no_sync(model):
                with autocast(micro.pixels_BCHW.device, precision):
                    losses = model(
                        micro.pixels_BCHW, micro.latent_BChw, micro.draws, micro.caption_BD, micro.view_BCHW,
                        anchored=phase.anchor_weight > 0,
                    )  # fmt: skip
                terms = phase.draw_weights + [phase.anchor_weight] * (len(losses) - len(micro.draws))
                weights = losses.new_tensor(terms) * (share * processes.num_processes)  # processes average
                (weights * losses).sum().backward()
            loss = loss.to(losses.device) + losses.detach()[: len(micro.draws)].mean() * share
        mean_loss = processes.reduce(loss, "sum").item()
        gradient_norm = nn.utils.clip_grad_norm_(phase.parameters, phase.clip_norm).item()
        for what, value in (("the loss", mean_loss), ("the gradient's norm", gradient_norm)):
            if not math.isfinite(value):
                raise NotFiniteError(phase.name, step, what, value)
        lr = phase.lr(step)
        for group in phase.optimizer.param_groups:
            group["lr"] = lr
        before = [parameter.detach().clone() for parameter in phase.parameters]
        phase.optimizer.step()
        # ------------------------------------------------------------------------------------------------------------
        updates = torch._foreach_sub([parameter.detach() for parameter in phase.parameters], before)
        parameter_norm, update_norm = (norm(tensors) for tensors in (phase.parameters, updates))
        yield Record(
            phase.name, step, mean_loss, lr, gradient_norm, parameter_norm, update_norm, validation(step)
        )  # fmt: skip
    processes.free_memory()  # the wrapper of this phase's parameters


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


@torch.no_grad()
def norm(tensors: Iterable[torch.Tensor]) -> float:
    return nn.utils.get_total_norm(tensors).item()


@torch.no_grad()
def denoising_loss(
    feedback: Feedback, micro_batches: list[MicroBatch], images: int, precision: torch.dtype, processes: Processes
) -> float:
    """Mean squared error over `images` and draws, of which this process has `micro_batches`."""
    loss = torch.zeros((), device=feedback.text_1LD.device)
    for micro in micro_batches:
        with autocast(loss.device, precision):
            losses = feedback(micro.pixels_BCHW, micro.latent_BChw, micro.draws)
        loss += losses.mean() * (len(micro.pixels_BCHW) / images)
    return processes.reduce(loss, "sum").item()


def state(feedback: Feedback, phase: Phase) -> dict[str, torch.Tensor]:
    """Every tensor that the next step of a phase depends on, by name."""
    return {
        **{f"model.{name}": tensor.detach() for name, tensor in _trained(feedback).items()},
        **{
            f"optimizer.{i}.{name}": tensor
            for i, tensors in phase.optimizer.state_dict()["state"].items()
            for name, tensor in tensors.items()
            if tensor is not None
        },
    }


@torch.no_grad()
def restore(feedback: Feedback, tensors: dict[str, torch.Tensor]) -> None:
    """Put back the parameters that `state` gave."""
    for name, parameter in _trained(feedback).items():
        parameter.copy_(tensors[f"model.{name}"])


def restore_optimizer(phase: Phase, tensors: dict[str, torch.Tensor]) -> None:
    """Put back the optimizer that `state` gave, of the same phase."""
    optimizer: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            i, _, name = rest.partition(".")
            optimizer.setdefault(int(i), {})[name] = tensor
    phase.optimizer.load_state_dict({**phase.optimizer.state_dict(), "state": optimizer})


def _trained(feedback: Feedback) -> dict[str, nn.Parameter]:
    parts = {"tower": feedback.tower, "projection": feedback.projection}
    if feedback.fits_denoiser:
        parts["denoiser.unet"] = feedback.denoiser.unet
    return {
        f"{part}.{name}": parameter for part, module in parts.items() for name, parameter in module.named_parameters()
    }
