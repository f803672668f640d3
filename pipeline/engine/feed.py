"""The inputs of each step: crops of images and random draws, as micro-batches on the device of this process.

Sample i of step s of a phase, its crop and its noise are a function of the seed, the phase, s and i alone. So a run
resumes at any step, and any number of processes share a batch, each a contiguous part of it. Where a GPU computes,
threads of this process read and crop ahead; PIL and numpy release the interpreter's lock meanwhile, so no worker
processes are needed. On a CPU threads would take its cores from the step, which costs more than reading before it.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image

from pipeline.core.compute import generator
from pipeline.core.processes import cpus
from pipeline.data.shards import Shards, Window
from pipeline.diva import diffusion, pixels
from pipeline.diva.losses import Loss
from pipeline.diva.rules import TokenRule
from pipeline.diva.step import MicroBatch
from pipeline.engine.losses import check_micro_batches
from pipeline.models.backbones import Backbone
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections.recipe import Recipe
from pipeline.sections.train import Train


def share(total: int, index: int, of: int) -> range:
    """The part of range(total) of process `index` among `of`. Sizes differ by one at most; the first has most."""
    return range(-(-total * index // of), -(-total * (index + 1) // of))


def derangement(count: int, draws: torch.Generator) -> list[int]:
    """A uniformly random permutation of range(count) without fixed points; count must be at least 2."""
    while True:
        order = torch.randperm(count, generator=draws)
        if not (order == torch.arange(count)).any():
            return order.tolist()


# Where the crop is written, its share of the area, its draws.
Cropping = tuple[np.ndarray, tuple[float, float], torch.Generator]


@dataclass(frozen=True)
class Coming:
    """A micro-batch that is being filled: uint8 pixels [B, 3, size, size].

    samples: numbers within the batch. shown, view: None where the step wants none. filling: calls that return, once
    the image is there, its caption: of each sample, then of the images shown in their place.
    """

    phase: str
    step: int
    samples: range
    pixels_BCHW: torch.Tensor
    shown_BCHW: torch.Tensor | None
    view_BCHW: torch.Tensor | None
    filling: list[Callable[[], str]]


class Feed:
    """Call with a step, in order, for the micro-batches of this process. waited: seconds spent waiting for images."""

    def __init__(
        self, shards: Shards, backbone: Backbone, denoiser: Denoiser, rule: TokenRule, p: Train, recipe: Recipe,
        losses: list[Loss], seed: int, compute: torch.device, steps: list[tuple[str, int]], *, process: int = 0,
        processes: int = 1, threads: int | None = None, mismatched: bool = False,
    ) -> None:  # fmt: skip
        """steps: (phase, step) of every call to come; the phases are those of the training, and `gap`, whose batches
        have captions. threads: how many read ahead, none if 0; by default one for each core of this process if a GPU
        computes, else 0. mismatched: show the tower another image of the step than the one to be restored, as a
        control.

        Raises UserError if a process would have no image, or a micro-batch too few images for a loss.
        """
        self.shards, self.backbone, self.denoiser, self.rule, self.p, self.recipe = (
            shards, backbone, denoiser, rule, p, recipe
        )  # fmt: skip
        self.seed, self.compute, self.steps, self.mismatched = seed, compute, steps, mismatched
        self.on_captions = {"projection"} if recipe.warms_up_on_captions else set[str]()
        self.captioned = {"gap"} | self.on_captions | ({"tower"} if any(loss.captioned for loss in losses) else set())
        self.first = {"tower": recipe.warmup.steps if recipe.warmup else 0}  # steps before the first of a phase
        self.view = max(loss.second_view for loss in losses)
        self.latent_shape, self.waited = denoiser.latent_shape(p.size), 0.0
        self.process, self.processes = process, processes
        self.own = share(recipe.batch, process, processes)
        check_micro_batches(losses, recipe.batch, processes, p.micro_batch)
        self.gpu = compute.type == "cuda"
        if threads is None:
            threads = max(1, cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if self.gpu else 0
        self.ahead = 2 + 2 * threads // min(p.micro_batch, len(self.own)) if threads else 0
        self.pool = ThreadPoolExecutor(threads, "images") if threads else None
        self.coming = self._coming()
        self.following: Window | None = None
        self.opener = ThreadPoolExecutor(1, "shards")  # its own thread, because fetching a window may take long
        self.last = max(((self.first.get(phase, 0) + step + 1) * recipe.batch - 1 for phase, step in steps), default=0)

    def __call__(self, step: int) -> Iterator[MicroBatch]:
        for _ in range(0, len(self.own), self.p.micro_batch):
            coming = next(self.coming)
            assert coming.step == step, f"step {coming.step} is next, and {step} was asked for"
            start = time.perf_counter()
            captions = [filled() for filled in coming.filling][: len(coming.samples)]
            self.waited += time.perf_counter() - start
            draws = [
                self.draw([generator(self.seed, "draw", coming.phase, step, i, k) for i in coming.samples])
                for k in range(len(self.recipe.draw_weights))
            ]
            yield MicroBatch(
                self._there(coming.pixels_BCHW),
                self._on_device(draws),
                None if coming.shown_BCHW is None else self._there(coming.shown_BCHW),
                None if coming.view_BCHW is None else self._there(coming.view_BCHW),
                self.backbone.embed(captions) if coming.phase in self.captioned else None,
                coming.phase in self.on_captions,
            )

    def _coming(self) -> Iterator[Coming]:
        """The micro-batches in order; while one is used, the next `ahead` are filled."""
        waiting: deque[Coming] = deque()
        for phase, step in self.steps:
            for first in range(self.own.start, self.own.stop, self.p.micro_batch):
                waiting.append(self._start(phase, step, range(first, min(first + self.p.micro_batch, self.own.stop))))
                if len(waiting) > self.ahead:
                    yield waiting.popleft()
        yield from waiting

    def _start(self, phase: str, step: int, samples: range) -> Coming:
        """Begin to fill a micro-batch."""
        pixels_BCHW = self._room(samples)
        shown_BCHW = self._room(samples) if self.mismatched else None
        view_BCHW = self._room(samples) if self.view and phase == "tower" else None
        order = list(range(self.recipe.batch))
        if self.mismatched:
            order = derangement(self.recipe.batch, generator(self.seed, "mismatched", step))
        low, high = self.p.crop.scale
        filling, others = [], []
        for i, sample in enumerate(samples):
            seen, crops = order[sample], list[Cropping]()
            if shown_BCHW is not None:
                crops.append((shown_BCHW[i].numpy(), (low, high), generator(self.seed, "crop", phase, step, seen)))
            if view_BCHW is not None:
                crops.append((view_BCHW[i].numpy(), (self.view, 1.0), generator(self.seed, "view", phase, step, seen)))
            own: Cropping = pixels_BCHW[i].numpy(), (low, high), generator(self.seed, "crop", phase, step, sample)
            filling.append(self._submit(phase, step, sample, [own] if self.mismatched else [own, *crops]))
            if self.mismatched:
                others.append(self._submit(phase, step, seen, crops))
        return Coming(phase, step, samples, pixels_BCHW, shown_BCHW, view_BCHW, filling + others)

    def _room(self, samples: range) -> torch.Tensor:
        size = self.p.size
        return torch.empty(len(samples), 3, size, size, dtype=torch.uint8, pin_memory=self.gpu)

    def _submit(self, phase: str, step: int, sample: int, crops: list[Cropping]) -> Callable[[], str]:
        number = (self.first.get(phase, 0) + step) * self.recipe.batch + sample
        window, place = self.shards.place(self.seed, number)
        following, _ = self.shards.place(self.seed, min(number + len(window.order) // 4, self.last))
        if following is not self.following:
            self.following = following
            self.opener.submit(self.shards.open, following)  # its errors are raised where the shard is read
        fill = partial(self._fill, window, place, crops)
        return self.pool.submit(fill).result if self.pool else fill

    def _fill(self, window: Window, place: int, crops: list[Cropping]) -> str:
        """Write crops of a sample where they belong; returns the caption."""
        sample = self.shards.read(window, place)
        for target, scale, draws in crops:
            target[...] = self.crop(sample.image, scale, draws)
        return sample.caption

    def crop(self, image: Image.Image, scale: tuple[float, float], draws: torch.Generator) -> np.ndarray:
        """A random crop, resized to the denoiser's size: uint8 [3, size, size]; scale: its share of the area."""
        (width, height), (narrow, wide) = image.size, self.p.crop.ratio
        box = pixels.crop_box(width, height, scale=scale, ratio=(narrow, wide), generator=draws)
        resized = image.crop(box).resize((self.p.size, self.p.size), Image.Resampling.BICUBIC)
        return np.asarray(resized).transpose(2, 0, 1)

    def draw(self, generators: list[torch.Generator]) -> diffusion.Draw:
        low, high = self.recipe.timesteps
        return diffusion.draw(self.latent_shape, self.backbone.patches, self.rule, (low, high), generators)

    def validation(self) -> tuple[list[MicroBatch], int]:
        """This process's part of the images that are never trained on, and the number of all of them.

        Crops and draws are the same in every run: one draw an image, its timestep the middle of an equal part of their
        range.
        """
        images = self.shards.validation()
        own = share(len(images), self.process, self.processes)
        low, high = self.recipe.timesteps
        scale = self.p.crop.scale[0], self.p.crop.scale[1]
        micro_batches = []
        for first in range(own.start, own.stop, self.p.micro_batch):
            chosen = range(first, min(first + self.p.micro_batch, own.stop))
            cropped = [self.crop(images[i], scale, generator("validation", "crop", i)) for i in chosen]
            timestep_B = torch.tensor([low + (2 * i + 1) * (high - low) // (2 * len(images)) for i in chosen])
            draw = self.draw([generator("validation", "draw", i) for i in chosen])._replace(timestep_B=timestep_B)
            images_BCHW = torch.from_numpy(np.stack(cropped)).to(self.compute)
            micro_batches.append(MicroBatch(images_BCHW, self._on_device([draw])))
        return micro_batches, len(images)

    def _there(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """On the device; the copy from pinned memory is asynchronous."""
        return pixels_BCHW.to(self.compute, non_blocking=True)

    def _on_device(self, draws: list[diffusion.Draw]) -> list[diffusion.Draw]:
        return [(draw.pinned() if self.gpu else draw).to(self.compute) for draw in draws]
