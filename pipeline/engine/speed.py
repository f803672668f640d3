"""Speed of a training: images per second, and its FLOP/s as a share of the GPU's peak."""

import time

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from pipeline.core.stages import note_timing
from pipeline.diva.feedback import Feedback
from pipeline.diva.schedule import Phase
from pipeline.diva.step import MicroBatch, choose, stand_in, terms, weighted_sum

PEAKS = {  # dense TFLOP/s in bfloat16 and in float32, by a part of the GPU's name; the first that fits
    "H200": (989.0, 67.0), "H100 PCIe": (756.0, 51.0), "H100": (989.0, 67.0), "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6), "A10": (125.0, 31.2), "RTX 4090": (165.2, 82.6), "RTX 3090": (71.0, 35.6),
}  # fmt: skip


class Speed:
    """The speed of one phase. Wall time differs between runs, so it is printed and added to metrics/timings.jsonl, but
    is part of no output. The share of the peak is given for the last phase, on GPUs whose peak is known."""

    def __init__(
        self, feedback: Feedback, phase: Phase, examples: list[MicroBatch], processes: Accelerator,
        precision: torch.dtype,
    ) -> None:  # fmt: skip
        """examples: micro-batches; the first has the sizes of those in training."""
        self.phase, self.steps, self.flops = phase, 0, 0.0
        self.peak = peak(processes.device, precision) * processes.num_processes
        if self.peak and phase.name == "tower" and processes.is_main_process:
            self.flops = flops(feedback, phase, examples[0], precision)

    def count(self) -> None:
        """Count a step. The first one fills caches, so the clock starts after it."""
        self.steps += 1
        if self.steps == 1:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - self.start

    def report(self) -> None:
        if self.steps < 2:
            return
        rate = (self.steps - 1) * self.phase.batch / self.seconds
        found = {"phase": self.phase.name, "images_per_second": round(rate, 2)}
        if self.flops:
            found["share_of_peak"] = round(rate * self.flops / self.peak, 4)
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items()))
        note_timing(found)


def peak(compute: torch.device, precision: torch.dtype) -> float:
    """The peak FLOP/s of the device, as its maker states it; 0 if unknown."""
    name = torch.cuda.get_device_name(compute) if compute.type == "cuda" else ""
    found = next((peaks for part, peaks in PEAKS.items() if part in name), (0.0, 0.0))
    return 1e12 * found[precision == torch.float32]


def flops(feedback: Feedback, phase: Phase, example: MicroBatch, precision: torch.dtype) -> float:
    """Operations of the forward and backward pass of one image with all its draws.

    They are counted on as few images as the losses allow. What is computed twice to save memory counts twice.
    Compilation is off meanwhile, because it hides operations from the counter.
    """
    count = max(loss.images for loss in phase.losses)
    images_BCHW = example.images_BCHW[:1].repeat(count, 1, 1, 1)
    draws = [example.draws[0].of_one(count)] * len(phase.draw_weights)
    choose(feedback, phase)
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        micro = stand_in(images_BCHW, draws, phase.losses, feedback.projection.in_features)
        found = terms(feedback, phase.losses, micro, precision)
        weighted_sum(phase, found).backward()
    phase.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops() / count
