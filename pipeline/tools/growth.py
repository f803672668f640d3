"""The loader by millions of images: time to the first batch, from a start and resumed, and memory; for tools/bench.py.

The images are made up: an index names one shard again and again, so that the cache holds it once. What the network
takes is therefore not in the times; all else is.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch

from pipeline.core.outputs import write_json
from pipeline.data.remote import CACHE
from pipeline.data.shards import INDEX, WINDOW, Shards
from pipeline.diva.losses import Denoise
from pipeline.diva.rules import TokenRule
from pipeline.engine.feed import Feed
from pipeline.sections.params import Params
from pipeline.tools.index import index

MILLIONS = 1, 3, 10, 400
LINE = "index_mb", "index_seconds"  # what a line through all but the last is to foretell for the last


def large_feed(p: Params, shards: Shards, steps: list[tuple[str, int]], threads: int | None = None) -> Feed:
    """What feeds openai_224 with these steps of profile paper's recipe, without its models."""
    clip: Any = SimpleNamespace(patches=256)  # what is read of the models
    denoiser: Any = SimpleNamespace(latent_shape=lambda size: torch.Size([4, size // 8, size // 8]))
    section, recipe = p.profiles["paper"].train, p.profiles["paper"].recipes["diva"]
    return Feed(
        shards, clip, denoiser, TokenRule("random", 76), section, recipe, [Denoise(1.0)], 0, torch.device("cpu"), steps,
        threads=threads,
    )  # fmt: skip


def growth(p: Params, folder: Path) -> dict[str, Any]:
    """folder: one shard, whose images stand for all. Each number of images is measured in a process of its own."""
    seconds, found = _timed(lambda: index(folder, str(folder.resolve()), p.profiles["paper"].train.size))
    ((name, images),), (file,) = found["shards"].items(), found["files"].values()
    result: dict[str, Any] = {"images_of_a_shard": images, "seconds_to_make_the_index_of_a_shard": seconds}
    with TemporaryDirectory(dir=folder) as made:
        scratch = Path(made)
        (scratch / CACHE).mkdir(parents=True)
        (scratch / CACHE / f"{file['sha256']}.tar").hardlink_to(folder / name)
        for millions in MILLIONS:
            names = [f"{i:06d}.tar" for i in range(round(1e6 * millions / images))]
            counts = dict.fromkeys(names, images)
            found |= {"samples": images * len(names), "shards": counts, "captioned": counts}
            write_json(scratch / INDEX, {**found, "files": dict.fromkeys(names, file)})
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
                measured = own.submit(_measured, p, scratch, images).result()
            file_mb = round((scratch / INDEX).stat().st_size / 1e6, 2)
            result[f"{millions}_million"] = {"index_file_mb": file_mb, **measured}
            print(f"{millions} million: {result[f'{millions}_million']}", flush=True)
    *smaller, last = MILLIONS
    lines = {key: np.polyfit(smaller, [result[f"{few}_million"][key] for few in smaller], 1) for key in LINE}
    return {**result, "by_the_line": {key: round(float(np.polyval(line, last)), 2) for key, line in lines.items()}}


def _measured(p: Params, folder: Path, images: int) -> dict[str, float]:
    """Of the index and of the whole loader: seconds and MB, beyond what the imports take. images: of a shard.

    The seconds to start and to resume, there in the middle of the second epoch, include the index; the MB are those of
    a loader with the tables of three windows, as many as it keeps.
    """
    batch = p.profiles["paper"].recipes["diva"].batch
    before = psutil.Process().memory_full_info().uss

    def grown() -> float:
        return round((psutil.Process().memory_full_info().uss - before) / 1e6, 1)

    def first_batch(epochs: float) -> Shards:
        shards = Shards(Path())
        for coming in large_feed(p, shards, [("tower", int(epochs * len(shards)) // batch)]).coming:
            for filled in coming.filling:
                filled()
        return shards

    with chdir(folder):
        index_seconds, shards = _timed(lambda: Shards(Path()))
        index_mb = grown()
        del shards
        start = _timed(lambda: first_batch(0))[0]
        resume, shards = _timed(lambda: first_batch(1.5))
        for window in (0, 1):
            shards.open(shards.place(0, images * WINDOW * window)[0])
        return {
            "index_seconds": index_seconds, "index_mb": index_mb, "seconds_to_start": start,
            "seconds_to_resume": resume, "memory_mb": grown(),
        }  # fmt: skip


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    made = work()
    return round(time.perf_counter() - start, 2), made
