"""One step of post-training by diffusion feedback, from images to the update, and the loop around it."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from pipeline.diva.diffusion import Draw, add_noise, target
from pipeline.diva.feedback import Feedback
from pipeline.diva.losses import Denoise, Loss, Made
from pipeline.diva.schedule import Phase


@dataclass(frozen=True)
class MicroBatch:
    """Images as uint8 [B, 3, H, W], and the draws of their noise.

    shown: the other images that the tower sees in the mismatched-image control; else None. view: a second crop.
    caption: embeddings [B, D] of the captions. on_captions: whether the denoiser is conditioned on them instead of
    image tokens.
    """

    images_BCHW: torch.Tensor
    draws: list[Draw]
    shown_BCHW: torch.Tensor | None = None
    view_BCHW: torch.Tensor | None = None
    caption_BD: torch.Tensor | None = None
    on_captions: bool = False


def stand_in(
    images_BCHW: torch.Tensor, draws: list[Draw], losses: list[Loss], width: int, on_captions: bool = False
) -> MicroBatch:
    """A micro-batch that has whatever the losses need; captions, of this width, are zero."""
    caption_BD = images_BCHW.new_zeros(len(images_BCHW), width, dtype=torch.float32)
    return MicroBatch(
        images_BCHW, draws,
        view_BCHW=images_BCHW if any(loss.second_view for loss in losses) else None,
        caption_BD=caption_BD if on_captions or any(loss.captioned for loss in losses) else None,
        on_captions=on_captions,
    )  # fmt: skip


class Processes(Protocol):
    """What a step uses of `accelerate.Accelerator`; each process has all parameters and a part of the batch."""

    num_processes: int

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor: ...


# ------------------------------------------------------------------------------------------------------------- one step


def terms(feedback: Feedback, losses: list[Loss], micro: MicroBatch, precision: torch.dtype) -> dict[str, torch.Tensor]:
    """Each loss by its name. The tower runs once for all draws, which the denoiser sees as one batch."""
    denoiser, pixels, draws = feedback.denoiser, feedback.pixels, micro.draws
    t, noised, wanted, predicted = torch.cat([draw.timestep_B for draw in draws]), None, None, None
    if any(loss.denoises for loss in losses):
        latent_KBChw = denoiser.latent(pixels.denoiser(micro.images_BCHW)).repeat(len(draws), 1, 1, 1)
        noise = torch.cat([draw.noise_BChw for draw in draws])
        noised = add_noise(latent_KBChw, noise, t, denoiser.alphas_cumprod)
        wanted = target(latent_KBChw, noise, t, denoiser.alphas_cumprod, denoiser.prediction_type)
    shown = pixels.tower(micro.images_BCHW if micro.shown_BCHW is None else micro.shown_BCHW)
    view = None if micro.view_BCHW is None else pixels.tower(micro.view_BCHW)
    with torch.autocast(t.device.type, precision, precision != torch.float32):
        positions, pooled, conditions = [draw.positions_BK for draw in draws], None, list[torch.Tensor]()
        if micro.on_captions:
            assert micro.caption_BD is not None
            conditions = [feedback.condition_on_text(micro.caption_BD)] * len(draws)
        else:
            pooled, patches = feedback.tower(shown)
            if any(loss.conditions for loss in losses):
                conditions = [feedback.condition(pooled, patches, drawn) for drawn in positions]
        if any(loss.predicts for loss in losses):
            predicted = denoiser(noised, t, torch.cat(conditions)).float()
        made = Made(
            feedback, micro.images_BCHW, shown, view, micro.caption_BD, pooled, positions, conditions,
            noised, t, wanted, predicted,
        )  # fmt: skip
        return {loss.name: loss(made) for loss in losses}


def step(
    feedback: Feedback, phase: Phase, number: int, batch: Iterable[MicroBatch], precision: torch.dtype,
    processes: Processes, broken: torch.Tensor,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Train one step; returns its values, on the device. `broken` is set to 1 from the first step on whose loss or
    gradient is not finite, and the optimizer leaves that step and all later ones out."""
    phase.optimizer.zero_grad(set_to_none=True)
    values: dict[str, torch.Tensor] = {}
    for micro in batch:
        share, found = len(micro.images_BCHW) / phase.batch, terms(feedback, phase.losses, micro, precision)
        (weighted_sum(phase, found) * share).backward()
        for name, term in found.items():
            values[name] = values.get(name, 0) + term.detach().mean() * share
    add_up(phase.parameters, values, processes)
    values["loss"] = torch.stack([loss.weight * values[loss.name] for loss in phase.losses]).sum()
    values["gradient_norm"] = nn.utils.clip_grad_norm_(phase.parameters, phase.clip_norm)
    broken.copy_(torch.maximum(broken, (~(values["loss"] + values["gradient_norm"]).isfinite()).float()))
    for group in phase.optimizer.param_groups:
        group["lr"] = phase.lr(number)
    trained = [parameter.detach() for parameter in phase.parameters]
    before = [tensor.clone() for tensor in trained]
    phase.optimizer.found_inf = broken  # type: ignore[attr-defined]
    phase.optimizer.step()
    norms = [nn.utils.get_total_norm(tensors) for tensors in (trained, torch._foreach_sub(trained, before))]
    return values | {"parameter_norm": norms[0], "update_norm": norms[1]}


def weighted_sum(phase: Phase, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of all terms by their weights, and of their draws by the draws' weights."""
    parts = []
    for loss in phase.losses:
        term = found[loss.name]
        draws = zip(phase.draw_weights, term, strict=True) if term.ndim else [(1.0, term)]
        parts += [loss.weight * weight * draw for weight, draw in draws]
    return torch.stack(parts).sum()


@torch.no_grad()
def add_up(parameters: list[nn.Parameter], values: dict[str, torch.Tensor], processes: Processes) -> None:
    """Replace gradients and values by their sums over all processes, in one exchange."""
    if processes.num_processes == 1:
        return
    own = [*(parameter.grad for parameter in parameters if parameter.grad is not None), *values.values()]
    sums = processes.reduce(torch.cat([tensor.flatten() for tensor in own]), "sum")
    for tensor, part in zip(own, sums.split([tensor.numel() for tensor in own]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def denoising_loss(
    feedback: Feedback, micro_batches: list[MicroBatch], images: int, precision: torch.dtype, processes: Processes
) -> float:
    """Mean squared error over `images` and draws, of which this process has `micro_batches`."""
    loss = torch.zeros((), device=feedback.text_1LD.device)
    for micro in micro_batches:
        found = terms(feedback, [Denoise(1.0)], micro, precision)[Denoise.name]
        loss += found.mean() * (len(micro.images_BCHW) / images)
    return processes.reduce(loss, "sum").item()


# ------------------------------------------------------------------------------------------------------------ the loop


@dataclass(frozen=True)
class Record:
    """One finished step.

    loss: the sum of the terms by their weights; terms: each loss's mean over images and draws, by name; gradient_norm:
    before clipping; parameter_norm: after the step; update_norm: of what the step changed; validation_loss: squared
    error after the step, None where it was not measured.
    """

    phase: str
    step: int
    loss: float
    terms: dict[str, float]
    lr: float
    gradient_norm: float
    parameter_norm: float
    update_norm: float
    validation_loss: float | None


class NotFiniteError(Exception):
    """A loss or a gradient is NaN or infinite; the parameters are still those of the last good step."""


def run(
    feedback: Feedback,
    phase: Phase,
    batch: Callable[[int], Iterable[MicroBatch]],
    precision: torch.dtype,
    processes: Processes,
    start: int = 0,
    validation: Callable[[int], float | None] = lambda step: None,
    pause: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Record, bool]]:
    """Train one phase from step `start` on, yielding a record of every step, and whether the parameters are at rest.

    A GPU has its next step in its queue before the values of this one are read, so it never idles. `pause` asks
    for a rest; it comes in all processes alike, soon after one of them has asked, and a record that comes with it is
    of the last step that the parameters have gone.

    `batch(step)` gives the micro-batches of this process, one at a time; `validation(step)` measures after the step.
    Raises NotFiniteError in all processes alike; the parameters are those before that step.
    """
    choose(feedback, phase)
    device, asked = feedback.text_1LD.device, False
    broken, queue = torch.zeros((), device=device), deque[tuple[int, Values, float | None]]()
    for number in range(start, phase.steps):
        values = step(feedback, phase, number, batch(number), precision, processes, broken)
        values["pause"] = processes.reduce(torch.full((), float(pause()), device=device), "sum")
        queue.append((number, Values(values), validation(number)))
        rest = asked or waits(device) or number == phase.steps - 1
        while len(queue) > (0 if rest else 1):
            record, wanted = finished(phase, *queue.popleft())
            asked = asked or wanted
            yield record, asked and not queue
        asked = asked and bool(queue)


def choose(feedback: Feedback, phase: Phase) -> None:
    """Enable gradients for the parameters that the phase trains, and for no others."""
    feedback.requires_grad_(False)
    for parameter in phase.parameters:
        parameter.requires_grad_(True)


def waits(device: torch.device) -> bool:
    """Whether the device finishes a step before Python's next line; a GPU queues it instead."""
    return device.type == "cpu"


class Values:
    """Numbers that are being copied from the device."""

    def __init__(self, on_device: dict[str, torch.Tensor]) -> None:
        self.names, stacked = list(on_device), torch.stack([*on_device.values()])
        self.here = stacked.to("cpu", non_blocking=True)
        self.come = torch.cuda.Event() if stacked.is_cuda else None
        if self.come:
            self.come.record()

    def read(self) -> dict[str, float]:
        if self.come:
            self.come.synchronize()
        return dict(zip(self.names, self.here.tolist(), strict=True))


def finished(phase: Phase, number: int, values: Values, validation: float | None) -> tuple[Record, bool]:
    """A step's record, and whether a process asked for a rest."""
    read = values.read()
    for what, key in (("the loss", "loss"), ("the gradient's norm", "gradient_norm")):
        if not math.isfinite(read[key]):
            raise NotFiniteError(f"{what} is {read[key]} in step {number} of phase '{phase.name}'")
    record = Record(
        phase.name, number, read["loss"], {loss.name: read[loss.name] for loss in phase.losses}, phase.lr(number),
        read["gradient_norm"], read["parameter_norm"], read["update_norm"], validation,
    )  # fmt: skip
    return record, read["pause"] > 0


# ------------------------------------------------------------------------------------------------------- what is kept


def tensors_of(feedback: Feedback, phase: Phase) -> dict[str, torch.Tensor]:
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
    """Put back the parameters that `tensors_of` gave."""
    for name, parameter in _trained(feedback).items():
        parameter.copy_(tensors[f"model.{name}"])


def restore_optimizer(phase: Phase, tensors: dict[str, torch.Tensor]) -> None:
    """Put back the optimizer that `tensors_of` gave, of the same phase."""
    optimizer: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            i, _, name = rest.partition(".")
            optimizer.setdefault(int(i), {})[name] = tensor
    phase.optimizer.load_state_dict({**phase.optimizer.state_dict(), "state": optimizer})


def _trained(feedback: Feedback) -> dict[str, nn.Parameter]:
    parts = {"tower": feedback.tower, "projection": feedback.projection}
    if feedback.warms_up_denoiser:
        parts["denoiser.unet"] = feedback.denoiser.unet
    return {
        f"{part}.{name}": parameter for part, module in parts.items() for name, parameter in module.named_parameters()
    }
