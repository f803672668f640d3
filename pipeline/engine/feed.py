"""What each step is fed: the images of this process's streams, their crops and draws, as micro-batches on its device.

A step's batch is cut into as many equal chunks as there are streams (profiles.<profile>.train.streams), however many
processes and workers share these: what sample i of step s is, and how it is drawn, depends on the seed alone.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms.functional import pil_to_tensor

from pipeline.core.compute import generator
from pipeline.core.params import Recipe, Train
from pipeline.core.processes import cpus
from pipeline.core.stages import UserError
from pipeline.data.shards import Shards
from pipeline.diva import diffusion, pixels
from pipeline.diva.condition import TokenRule
from pipeline.diva.training import MicroBatch
from pipeline.models.backbones import Backbone
from pipeline.models.stable_diffusion import Denoiser

Position = tuple[int, int]  # of a stream: see adapters.shards.Sample


class Chunk(NamedTuple):
    """What one stream gives to one step: uint8 pixels at the generator's size; `after`: where the stream goes on.

    shown_BCHW: of the control alone, what the tower is shown in the pixels' place.
    """

    stream: int
    phase: str
    pixels_BCHW: torch.Tensor
    view_BCHW: torch.Tensor | None
    captions: list[str]
    draws: list[diffusion.Draw]
    after: Position
    undecodable: list[str]
    shown_BCHW: torch.Tensor | None = None


def share(total: int, index: int, of: int) -> range:
    """The part of range(total) that falls to process `index` of `of`; the parts are as equal as can be."""
    return range(total * index // of, total * (index + 1) // of)


def derangement(count: int, draws: torch.Generator) -> torch.Tensor:
    """A permutation of range(count) that leaves nothing in its place, each of them as likely; count: two at least."""
    while True:
        order = torch.randperm(count, generator=draws)
        if not (order == torch.arange(count)).any():
            return order


class Chunks(IterableDataset):
    """The chunks of some streams, step by step in the streams' order; a worker process makes those of its streams.

    DataLoader asks its workers in turn, so each gives as many items a step as any other, None where it has no chunk;
    a UserError travels as an item, too, since DataLoader would put a traceback into its message.
    """

    def __init__(
        self, shards: Shards, p: Train, recipe: Recipe, seed: int, streams: range, after: dict[int, Position],
        steps: list[tuple[str, int]], latent_shape: torch.Size, patches: int, rule: TokenRule,
    ) -> None:  # fmt: skip
        self.shards, self.p, self.recipe, self.seed = shards, p, recipe, seed
        self.streams, self.after, self.steps = streams, after, steps
        self.latent_shape, self.patches, self.rule = latent_shape, patches, rule

    def __iter__(self) -> Iterator[Chunk | UserError | None]:
        worker = get_worker_info()
        index, of = (worker.id, worker.num_workers) if worker else (0, 1)
        own = [self.of_stream(number) for number in self.streams[index::of]]
        empty = [None] * (math.ceil(len(self.streams) / of) - len(own))
        try:
            for _ in self.steps:
                yield from (next(chunks) for chunks in own)
                yield from empty
        except UserError as error:
            yield error

    def of_stream(self, number: int) -> Iterator[Chunk]:
        size = self.recipe.batch // self.p.streams
        samples = range(number * size, (number + 1) * size)
        stream = self.shards.stream(self.seed, number, self.p.streams, self.after.get(number))
        for phase, step in self.steps:
            cropped: list[torch.Tensor] = []
            views, captions, undecodable = [], [], []
            while len(cropped) < size:
                key, image, caption, after, tar = next(stream)
                if image is None:
                    undecodable.append(f"{tar}: {key}")
                    continue
                of_sample = (phase, step, samples[len(cropped)])
                if self.recipe.contrast and phase == "tower":
                    draws = generator(self.seed, "view", *of_sample)
                    views.append(self.crop(image, (self.recipe.contrast.view, 1.0), draws))
                low, high = self.p.crop.scale
                cropped.append(self.crop(image, (low, high), generator(self.seed, "crop", *of_sample)))
                captions.append(caption)
            drawn = [
                self.draw([generator(self.seed, "draw", phase, step, i, k) for i in samples])
                for k in range(len(self.recipe.draw_weights))
            ]
            view_BCHW = torch.stack(views) if views else None
            yield Chunk(number, phase, torch.stack(cropped), view_BCHW, captions, drawn, after, undecodable)

    def crop(self, image: Image.Image, scale: tuple[float, float], draws: torch.Generator) -> torch.Tensor:
        """A random crop, resized to the generator's size: uint8 [3, size, size]; scale: its share of the area."""
        (width, height), (narrow, wide) = image.size, self.p.crop.ratio
        box = pixels.crop_box(width, height, scale=scale, ratio=(narrow, wide), generator=draws)
        return pil_to_tensor(image.crop(box).resize((self.p.size, self.p.size), Image.Resampling.BICUBIC))

    def draw(self, generators: list[torch.Generator]) -> diffusion.Draw:
        low, high = self.recipe.timesteps
        return diffusion.draw(self.latent_shape, self.patches, self.rule, (low, high), generators)


class Batches:
    """Call with a step, in order, for the micro-batches of this process.

    after: where each stream of this process goes on after the last micro-batch given; undecodable: keys of the images
    that were passed over; waited: seconds spent waiting for images.
    """

    def __init__(
        self, shards: Shards, backbone: Backbone, denoiser: Denoiser, rule: TokenRule, p: Train, recipe: Recipe,
        seed: int, compute: torch.device, steps: list[tuple[str, int]], *, process: int = 0, processes: int = 1,
        after: dict[int, Position] | None = None, undecodable: set[str] | None = None, workers: int | None = None,
        mismatched: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """steps: (phase, step) of all that will be asked for, phases being those of the training and `gap`, whose
        batches have captions; workers: processes that decode, by default one for each
        core of this process where a GPU computes, none where the cores do; mismatched: a control in which the tower is
        shown another image of the step than the one to be restored, of whichever process: the function gathers a
        tensor of every process, all of one shape.
        """
        if processes > p.streams:
            raise UserError(
                f"{processes} processes share {p.streams} streams of images: some would have none. Start fewer, or "
                "raise train.streams in params.yaml."
            )
        self.backbone, self.denoiser, self.p, self.compute, self.gather = backbone, denoiser, p, compute, mismatched
        self.captioned = {"gap"} | ({"projection"} if recipe.fit and recipe.fit.told == "captions" else set())
        self.process, self.processes = process, processes
        self.image_size = backbone.image_size
        own = pixels.Statistics(backbone.mean, backbone.std)
        self.tower_statistics = pixels.OPENAI if p.pixels.tower_statistics == "openai" else own
        published = p.pixels.generator_statistics == "imagenet"
        self.undone_by = pixels.IMAGENET if published else self.tower_statistics
        streams = share(p.streams, process, processes)
        self.after = {stream: position for stream, position in (after or {}).items() if stream in streams}
        self.undecodable, self.waited = set(undecodable or ()), 0.0
        self.count = len(streams) * (recipe.batch // p.streams)
        smallest = min(self.count, self.count % p.micro_batch or p.micro_batch)
        if recipe.contrast and smallest <= recipe.contrast.negatives:
            raise UserError(
                f"the recipe: {self.count} images a step and process in micro-batches of {p.micro_batch} leave "
                f"one of {smallest}, too few for {recipe.contrast.negatives} negatives. Choose another "
                "train.micro_batch, fewer processes, or lower contrast.negatives."
            )
        self.chunks = Chunks(
            shards,
            p,
            recipe,
            seed,
            streams,
            dict(self.after),
            steps,
            denoiser.latent_shape(p.size),
            backbone.patches,
            rule,
        )
        gpu = compute.type == "cuda"
        if workers is None:
            cores = cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            workers = max(1, min(cores, len(streams))) if gpu else 0
        self.loader = iter(DataLoader(self.chunks, batch_size=None, num_workers=workers, pin_memory=gpu))

    def __call__(self, step: int) -> Iterator[MicroBatch]:
        none = torch.empty(0, 3, self.p.size, self.p.size, dtype=torch.uint8, device=self.compute)
        raw_BCHW = shown_BCHW = view_BCHW = none  # to be restored; shown to the tower
        captions: list[str] = []
        draws: list[diffusion.Draw] = []
        chunks: Iterator[Chunk] = (self._next() for _ in self.chunks.streams)
        if self.gather:
            chunks = self._mismatched(step, list(chunks), self.gather)
        left = self.count
        while left:
            size = min(self.p.micro_batch, left)
            while len(raw_BCHW) < size:
                chunk = next(chunks)
                more = chunk.pixels_BCHW.to(self.compute, non_blocking=True)
                drawn = [draw.to(self.compute) for draw in chunk.draws]
                shown = more if chunk.shown_BCHW is None else chunk.shown_BCHW
                raw_BCHW, shown_BCHW = torch.cat([raw_BCHW, more]), torch.cat([shown_BCHW, shown])
                if chunk.view_BCHW is not None:
                    viewed = chunk.view_BCHW.to(self.compute, non_blocking=True)
                    view_BCHW = torch.cat([view_BCHW, viewed])
                captions += chunk.captions
                draws = [diffusion.Draw.cat(two) for two in zip(draws, drawn, strict=True)] if draws else drawn
            left -= size
            yield self._micro_batch(
                raw_BCHW[:size], shown_BCHW[:size], [draw.images(slice(size)) for draw in draws], last=not left,
                view_BCHW=view_BCHW[:size], captions=captions[:size] if chunk.phase in self.captioned else [],
            )  # fmt: skip
            raw_BCHW, shown_BCHW, view_BCHW = raw_BCHW[size:], shown_BCHW[size:], view_BCHW[size:]
            captions, draws = captions[size:], [draw.images(slice(size, None)) for draw in draws]

    def held_out(self) -> tuple[list[MicroBatch], int]:
        """This process's part of the images that are never trained on, and the number of all of them.

        Crops and draws are the same in every run: one draw an image, its timestep the middle of an equal part of their
        range.
        """
        images = self.chunks.shards.held_out()
        own = share(len(images), self.process, self.processes)
        low, high = self.chunks.recipe.timesteps
        scale = self.p.crop.scale[0], self.p.crop.scale[1]
        micro_batches = []
        for first in range(own.start, own.stop, self.p.micro_batch):
            chosen = range(first, min(first + self.p.micro_batch, own.stop))
            cropped = [self.chunks.crop(images[i], scale, generator("held out", "crop", i)) for i in chosen]
            timestep_B = torch.tensor([low + (2 * i + 1) * (high - low) // (2 * len(images)) for i in chosen])
            draw = self.chunks.draw([generator("held out", "draw", i) for i in chosen])._replace(timestep_B=timestep_B)
            raw_BCHW = torch.stack(cropped).to(self.compute)
            micro_batches.append(self._micro_batch(raw_BCHW, raw_BCHW, [draw.to(self.compute)], last=False))
        return micro_batches, len(images)

    def _mismatched(
        self, step: int, chunks: list[Chunk], gather: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[Chunk]:
        """The chunks of a step, the tower being shown, under each image's number, that of another."""
        batch, streams = self.chunks.recipe.batch, self.p.streams
        order = derangement(batch, generator(self.chunks.seed, "mismatched", step)).to(self.compute)

        def of_all(own: list[torch.Tensor]) -> torch.Tensor:
            size, most = len(own[0]), math.ceil(streams / self.processes)
            padding = [torch.zeros_like(own[0])] * (most - len(own))  # a process may have a stream less than another
            gathered = gather(torch.cat([*own, *padding]).to(self.compute)).split(most * size)
            counts = [size * len(share(streams, process, self.processes)) for process in range(self.processes)]
            return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

        shown = {"shown_BCHW": of_all([chunk.pixels_BCHW for chunk in chunks])}
        if views := [chunk.view_BCHW for chunk in chunks if chunk.view_BCHW is not None]:
            shown["view_BCHW"] = of_all(views)
        for chunk in chunks:
            others_B = order.view(streams, -1)[chunk.stream]
            yield chunk._replace(**{name: images[others_B] for name, images in shown.items()})

    def _next(self) -> Chunk:
        start = time.perf_counter()
        chunk = None
        while chunk is None:
            chunk = next(self.loader)
            if isinstance(chunk, UserError):
                raise chunk
        self.waited += time.perf_counter() - start
        self.after[chunk.stream] = (chunk.after[0], chunk.after[1])
        self.undecodable.update(chunk.undecodable)
        return chunk

    def _micro_batch(
        self, raw_BCHW: torch.Tensor, shown_BCHW: torch.Tensor, draws: list[diffusion.Draw], last: bool,
        view_BCHW: torch.Tensor | None = None, captions: list[str] | None = None,
    ) -> MicroBatch:  # fmt: skip
        restored = raw_BCHW.float() / 255
        latent = self.denoiser.latent(pixels.generator_pixels(restored, self.tower_statistics, self.undone_by))
        view = None if view_BCHW is None or not len(view_BCHW) else self._seen(view_BCHW)
        caption_BD = self.backbone.embed(captions) if captions else None
        return MicroBatch(self._seen(shown_BCHW), latent, draws, last, caption_BD, view)

    def _seen(self, raw_BCHW: torch.Tensor) -> torch.Tensor:
        """What the tower is shown of uint8 pixels."""
        shown, antialias = raw_BCHW.float() / 255, self.p.pixels.tower_antialias
        return pixels.tower_pixels(shown, self.tower_statistics, self.image_size, antialias)
