"""A backbone's embeddings of a set's images and texts, as fast as the machine can.

Threads of this process read, decode and resize the next images while the device computes. Pillow releases Python's
lock, and threads need no shared memory, of which a container often has 64 MB. Of N processes, one for each GPU, each
takes every N-th batch. The batches do not depend on N, so no score does.
"""

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import open_clip
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from safetensors.torch import load_file, save
from torch.nn.functional import normalize

from pipeline.benchmarks.sets import BenchmarkSet, SetImage
from pipeline.core.code import program
from pipeline.core.compute import autocast
from pipeline.core.processes import cpus
from pipeline.core.stages import UserError, progress
from pipeline.data.decoding import FORMATS
from pipeline.models.backbones import Backbone

AHEAD = 2  # batches that threads fill while one is computed
CHUNK = 8  # images that a thread takes at once

T = TypeVar("T")


class FillingBatch(NamedTuple):
    """A batch that threads are filling: its number in the set, its samples, uint8 pixels [B, size, size, 3].

    filling: the threads' results, messages about images that cannot be decoded.
    """

    number: int
    samples: list[SetImage]
    pixels_BHWC: torch.Tensor
    filling: list[Future[list[str]]]


@dataclass(frozen=True)
class Encoder:
    """One backbone on the device of this process. precision: of both towers; everything else is float32.

    texts: a folder that keeps the classifiers made by this text tower, or None.
    """

    backbone: Backbone
    processes: PartialState
    batch: int
    precision: str
    texts: Path | None = None

    @torch.no_grad()
    def images(self, found: BenchmarkSet, split: str = "test") -> Iterator[tuple[int, list[SetImage], torch.Tensor]]:
        """This process's batches of a split: number, samples and image embeddings of length 1, [B, D].

        Raises UserError at the end if any process met an image that cannot be decoded; it says how many, and which.
        """
        samples, rank, ranks = found.splits[split], self.processes.process_index, self.processes.num_processes
        starts = range(rank * self.batch, len(samples), ranks * self.batch)
        undecodable: list[str] = []
        with ThreadPoolExecutor(max(1, cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), "images") as pool:
            what = {"unit": " images", "unit_scale": self.batch * ranks, "disable": not self.processes.is_main_process}
            for coming in progress(self._coming(samples, starts, pool), f"{found.name}, {split}", len(starts), **what):
                for future in coming.filling:
                    undecodable += future.result()
                if not undecodable:
                    pixels_BHWC = coming.pixels_BHWC.to(self.processes.device, non_blocking=True)
                    with autocast(self.processes.device, self.precision):
                        embeddings_BD = self.backbone.encode_image(self.backbone.normalize(pixels_BHWC))
                    yield coming.number, coming.samples, normalize(embeddings_BD.float(), dim=-1)
        if undecodable := self.of_all(list(enumerate(undecodable))):
            raise UserError(
                f"{len(undecodable)} of the {len(samples)} images of set {found.name} ({split}) cannot be decoded: "
                f"{'; '.join(undecodable[:5])}{'; ...' if undecodable[5:] else ''}. A score without them could not be "
                f"compared. Fetch the set again (`dvc repro --force pipeline/dvc.yaml:zeroshot_sets`), or remove "
                f"'{found.name}' from zeroshot_sets.sets in params.yaml."
            )

    def _coming(self, samples: list[SetImage], starts: range, pool: ThreadPoolExecutor) -> Iterator[FillingBatch]:
        """The batches in order; while one is used, the next are filled."""
        waiting: deque[FillingBatch] = deque()
        for start in starts:
            own, size = samples[start : start + self.batch], self.backbone.image_size
            on_gpu = self.processes.device.type == "cuda"
            pixels_BHWC = torch.empty(len(own), size, size, 3, dtype=torch.uint8, pin_memory=on_gpu)
            filling = [
                pool.submit(self._fill, own[first : first + CHUNK], pixels_BHWC[first : first + CHUNK])
                for first in range(0, len(own), CHUNK)
            ]
            waiting.append(FillingBatch(start // self.batch, own, pixels_BHWC, filling))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _fill(self, samples: list[SetImage], pixels_BHWC: torch.Tensor) -> list[str]:
        undecodable = []
        for sample, pixels_HWC in zip(samples, pixels_BHWC.numpy(), strict=True):
            content = sample.read()
            try:
                with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                    # As clip_benchmark does: what is transparent stays black.
                    pixels_HWC[...] = self.backbone.resize(image.convert("RGB"))
            except MemoryError:  # says something of the machine, and nothing of the image
                raise
            except Exception as error:  # Pillow's readers fail in a dozen ways where a file lies
                undecodable.append(f"{sample.file.tar.name}: {sample.key} ({type(error).__name__}: {error})")
        return undecodable

    @torch.no_grad()
    def embed(self, texts: list[str]) -> torch.Tensor:
        """Text embeddings of length 1, [texts, D]."""
        with autocast(self.processes.device, self.precision):
            return normalize(self.backbone.embed(texts).float(), dim=-1)

    def classifier(self, found: BenchmarkSet) -> torch.Tensor:
        """[D, classes]: each class's mean over the templates, of length 1.

        All weights of a backbone have the same text tower: what one has computed, the next reads from `texts`.
        """
        made_of = [
            found.classes, found.templates, self.precision, self.processes.device.type, torch.get_num_threads(),
            torch.__version__, open_clip.__version__, program("benchmarks/encoder.py"),
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        kept = self.texts / f"{digest}.safetensors" if self.texts else None
        if kept and kept.is_file():
            return load_file(kept)["classifier"].to(self.processes.device)
        columns = []
        others = not self.processes.is_main_process
        for name in progress(found.classes, f"{found.name}, text", unit=" classes", disable=others):
            mean_D = self.embed([template.format(c=name) for template in found.templates]).mean(0)
            columns.append(mean_D / mean_D.norm())
        classifier_DC = torch.stack(columns, 1)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_name(f".{kept.name}.{os.getpid()}.partial")  # others may be writing the same
            partial.write_bytes(save({"classifier": classifier_DC.cpu().contiguous()}))
            partial.replace(kept)
        return classifier_DC

    def of_all(self, parts: list[tuple[int, T]]) -> list[T]:
        """The parts of all processes, sorted by their numbers."""
        return [part for _, part in sorted(gather_object(parts), key=lambda numbered: numbered[0])]
