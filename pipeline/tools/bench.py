"""How fast the training engine is on the machine it finds, side by side with the schedule of the released code.

    python -m pipeline.tools.bench [SUBJECT ...]        by default `mini` and `block`, on a GPU the four large backbones
    python -m pipeline.tools.bench loader --images N    images decoded and cropped a second, and the memory
    python -m pipeline.tools.bench growth               the loader by millions of images: seconds to start, and memory
    python -m pipeline.tools.bench scoring --images N --rounds R    zero-shot scoring beside clip_benchmark's program
    python -m pipeline.tools.bench mllm segmentation    these at true size; writes downstream.json

Weights are random and of true shape, images are made here. Both schedules take turns, A B A B, step by step, in one
process, fed by the same loader; the released one runs the tower once for each draw, one UNet batch a draw, under
autocast with float32 weights. The first step counts operations, the second warms up. Results go to metrics/bench/.
"""

import argparse
import dataclasses
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import psutil
import torch
from accelerate import Accelerator, PartialState
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from webdataset import TarWriter

from pipeline.benchmarks.encoder import CHUNK, Encoder
from pipeline.benchmarks.sets import SetImage, read
from pipeline.core.compute import deterministic_device, seeded
from pipeline.core.outputs import atomic, remove, write_json
from pipeline.core.processes import cpus
from pipeline.core.stages import UserError, progress, stage
from pipeline.data.decoding import FORMATS
from pipeline.data.shards import INDEX, Shards
from pipeline.diva import step
from pipeline.diva.feedback import Feedback
from pipeline.diva.losses import Denoise
from pipeline.diva.rules import Condition
from pipeline.diva.schedule import Phase
from pipeline.engine.assemble import phases, pixel_rule
from pipeline.engine.feed import Feed
from pipeline.engine.trial import STABLE_DIFFUSION_2_1_BASE, random_clip, random_denoiser
from pipeline.models.backbones import Backbone, model_config, save_weights, write_config
from pipeline.models.registry import complete
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import params
from pipeline.sections.params import Params
from pipeline.sections.recipe import Recipe
from pipeline.sections.train import Train
from pipeline.tools import true_size
from pipeline.tools.growth import growth, large_feed
from pipeline.tools.pages import table

OUTPUT, SCRATCH = Path("metrics/bench"), Path("data/.bench.scratch")
LARGE = ["openai_224", "siglip_384", "dfn_378", "metaclip_h14"]
ONE_BLOCK: dict[str, dict[str, Any]] = {  # that UNet's first block, down and up; the VAE at an eighth of its channels
    "unet": STABLE_DIFFUSION_2_1_BASE["unet"] | {
        "block_out_channels": (320,), "layers_per_block": 1, "attention_head_dim": 5,
        "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
    },
    "vae": STABLE_DIFFUSION_2_1_BASE["vae"] | {
        "block_out_channels": (16, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 16,
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- what is timed


class Subject(NamedTuple):
    """A backbone with a denoiser, and how they train; `text`: [1, L, D], random."""

    backbone: Backbone
    denoiser: Denoiser
    text: torch.Tensor
    condition: Condition
    train: Train
    recipe: Recipe


def subject(name: str, p: Params, compute: torch.device) -> Subject:
    """By name: a backbone of params.yaml, or `block`, one layer of openai_224's tower and of its denoiser."""
    key = "openai_224" if name == "block" else name
    entry = p.backbone(key)
    source = complete(key, entry.source)
    section = p.profiles[entry.profile].train
    on_gpu = compute.type == "cuda"
    size = section.micro_batch if entry.profile == "mini" or on_gpu else 1
    changes = {"micro_batch": size, "compile": section.compile and on_gpu}
    precision = "bfloat16" if on_gpu and entry.profile == "paper" else "float32"
    config, shape = model_config(source.architecture), STABLE_DIFFUSION_2_1_BASE
    if name == "block":
        config["vision_cfg"], shape = config["vision_cfg"] | {"layers": 1}, ONE_BLOCK
    with seeded("bench", name), compute:  # weights are drawn where they are used: a CPU takes a minute for two UNets
        backbone = random_clip(config, source.preprocessing.model_dump())
        denoiser = random_denoiser(p.profiles[entry.profile].denoiser, shape)
        text = torch.randn(1, 77, denoiser.unet.config.cross_attention_dim)
    return Subject(
        backbone, denoiser, text, entry.condition,
        section.model_copy(update=changes | {"precision": precision}),
        p.profiles[entry.profile].recipes["diva"].model_copy(update={"batch": 2 * size}),
    )  # fmt: skip


class ReleasedDenoiser(Denoiser):
    """As the released code runs it: float32 weights under autocast, and one encoding for all draws of an image."""

    encoded: tuple[torch.Tensor, torch.Tensor] | None = None

    def latent(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        if self.encoded is None or not torch.equal(self.encoded[0], pixels_BCHW):
            half = self.precision != torch.float32
            with torch.autocast(pixels_BCHW.device.type, self.precision, half), torch.no_grad():
                mean = self.vae.encode(pixels_BCHW).latent_dist.mean
            self.encoded = pixels_BCHW, mean.float() * self.vae.config.scaling_factor
        return self.encoded[1]

    def forward(self, noised_BCHW: torch.Tensor, timestep_B: torch.Tensor, condition_BTD: torch.Tensor) -> torch.Tensor:
        return self.unet(noised_BCHW, timestep_B, condition_BTD).sample


def published_gradient(
    feedback: Feedback, micro_batches: Iterator[step.MicroBatch], batch: int, draw_weights: list[float],
    precision: torch.dtype,
) -> float:  # fmt: skip
    """Add a step's gradient as the released code does, the tower run for each draw in turn; returns the mean loss."""
    mean = 0.0
    for micro in micro_batches:
        share = len(micro.images_BCHW) / batch
        for weight, draw in zip(draw_weights, micro.draws, strict=True):
            (loss,) = step.terms(feedback, [Denoise(1.0)], dataclasses.replace(micro, draws=[draw]), precision).values()
            (weight * share * loss).sum().backward()
            mean += loss.item() * share / len(draw_weights)
    return mean


def published_steps(phase: Phase, feedback: Feedback, feed: Feed, precision: torch.dtype) -> Iterator[float]:
    """Train by the released schedule; yields each step's loss."""
    optimizer = torch.optim.SGD(phase.parameters, lr=phase.lr(1), momentum=0.9)
    for parameter in phase.parameters:
        parameter.requires_grad_(True)
    for number in range(phase.steps):
        optimizer.zero_grad(set_to_none=True)
        loss = published_gradient(feedback, feed(number), phase.batch, phase.draw_weights, precision)
        torch.nn.utils.clip_grad_norm_(phase.parameters, phase.clip_norm)
        optimizer.step()
        yield loss


# ------------------------------------------------------------------------------------------------------- the timing


def compare(name: str, p: Params, rounds: int, compute: torch.device) -> dict[str, Any]:
    """Time both schedules step by step in turns; the figures of one subject."""
    steps: dict[str, Iterator[Any]] = {}
    fed: dict[str, Feed] = {}
    compiled: list[Callable[[], None]] = []
    for schedule in ("engine", "published"):
        s = subject(name, p, compute)
        precision = getattr(torch, s.train.precision)
        with seeded("bench", "projection"):
            projection = torch.nn.Linear(s.backbone.width, s.text.shape[-1])
        if schedule == "engine":
            s.denoiser.for_feedback(precision)
        else:
            s.denoiser.__class__, s.denoiser.precision = ReleasedDenoiser, precision
        tokens, rule, pixels = s.condition.tokens, s.condition.text, pixel_rule(s.backbone, s.train)
        feedback = Feedback(s.backbone.tower, projection, s.denoiser, s.text, tokens, rule, pixels).to(compute)
        if schedule == "engine" and s.train.compile:
            compiled += [feedback.tower.compile, s.denoiser.compile, s.denoiser.vae.encoder.compile]
        recipe = s.recipe.model_copy(update={"steps": rounds + 2, "warmup": None})
        (phase,) = phases(feedback, recipe, [Denoise(1.0)])
        schedule_of = [(phase.name, number) for number in range(phase.steps)]
        shards = Shards(photo_shards(s.train.size, 64))
        feed = Feed(
            shards, s.backbone, s.denoiser, feedback.tokens, s.train, recipe, phase.losses, 0, compute, schedule_of
        )
        fed[schedule] = feed
        steps[schedule] = (
            step.run(feedback, phase, feed, precision, Accelerator(cpu=compute.type == "cpu"))
            if schedule == "engine"
            else published_steps(phase, feedback, feed, precision)
        )

    seconds: dict[str, list[float]] = {"engine": [], "published": []}
    memory, flops = dict.fromkeys(steps, 0.0), dict.fromkeys(steps, 0)
    for schedule, iterator in steps.items():  # the first step counts operations, not time
        with FlopCounterMode(display=False) as counter:
            next(iterator)
        flops[schedule] = counter.get_total_flops()
    for compilation in compiled:
        compilation()
    for iterator in steps.values():  # the second compiles, and warms caches
        next(iterator)
    waited = fed["engine"].waited
    for _ in progress(range(rounds), f"{name}, A B"):
        for schedule, iterator in steps.items():
            if compute.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            next(iterator)
            if compute.type == "cuda":
                torch.cuda.synchronize()
                memory[schedule] = max(memory[schedule], torch.cuda.max_memory_allocated() / 1e9)
            seconds[schedule].append(time.perf_counter() - start)

    batch = s.recipe.batch
    ratios = [b / a for a, b in zip(seconds["engine"], seconds["published"], strict=True)]
    rate = matmul_rate(compute, getattr(torch, s.train.precision))
    speed = {schedule: batch / statistics.median(times) for schedule, times in seconds.items()}
    result: dict[str, Any] = {
        "precision": s.train.precision,
        "compiled": bool(compiled),
        "micro_batch": s.train.micro_batch,
        "images_per_second": {schedule: round(value, 3) for schedule, value in speed.items()},
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
        },
        "gflop_per_image": {schedule: float(f"{count / batch / 1e9:.4g}") for schedule, count in flops.items()},
        "matmul_tflop_per_second": round(rate / 1e12, 3),
        "utilisation": {schedule: round(speed[schedule] * flops[schedule] / batch / rate, 3) for schedule in speed},
        "waiting_for_images": round((fed["engine"].waited - waited) / sum(seconds["engine"]), 4),
    }
    return result | ({"peak_memory_gb": {k: round(v, 2) for k, v in memory.items()}} if compute.type == "cuda" else {})


def matmul_rate(compute: torch.device, precision: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of ten."""
    n = 8192 if compute.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=compute, dtype=precision) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        if compute.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# ------------------------------------------------------------------------------------------------------- the loader


def photo_shards(size: int, count: int) -> Path:
    """A folder of shards with `count` images that compress like photographs, of which 64 are distinct."""
    folder = SCRATCH / f"{size}-{count}"
    if (folder / INDEX).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    encoded = [_jpeg((size * 3 // 2, size), i) for i in range(min(64, count))]
    counts = {}
    for shard, first in enumerate(progress(range(0, count, 5000), "shards of images")):
        name, numbers = f"{shard:05d}.tar", range(first, min(count, first + 5000))
        with TarWriter(str(folder / name)) as tar:
            for i in numbers:
                tar.write({"__key__": f"{i:07d}", "jpg": encoded[i % len(encoded)], "txt": b"-"})
        counts[name] = len(numbers)
    write_json(folder / INDEX, {"size": size, "samples": count, "shards": counts})
    return folder


def _jpeg(shape: tuple[int, int], number: int) -> bytes:
    """Noise at every scale, the coarser the stronger, as a photo of this width and height."""
    draws, total = np.random.default_rng(number), np.zeros((shape[1], shape[0], 3))
    for scale in (4, 16, 64, 256):
        coarse = Image.fromarray(draws.integers(0, 256, (scale * 2 // 3 + 1, scale, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize(shape, Image.Resampling.BICUBIC), float) / scale**0.7
    pixels = 255 * (total - total.min()) / np.ptp(total)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def loader(p: Params, images: int) -> dict[str, Any]:
    """Speed and memory of the loader that feeds openai_224, with one thread and with one for each core."""
    section, recipe = p.profiles["paper"].train, p.profiles["paper"].recipes["diva"]
    folder, cores = photo_shards(section.size, images), cpus()
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    result: dict[str, Any] = {"cores": cores, "images": images, "kilobytes_per_image": round(size / images / 1e3, 1)}
    for threads, number in ((1, min(images, 4000)), (cores, images)):
        steps = [("tower", i) for i in range(max(2, number // recipe.batch))]
        feed = large_feed(p, Shards(folder), steps, threads)
        done, memory, times = 0, [], []
        for coming in progress(feed.coming, f"{threads} threads", len(steps) * recipe.batch // section.micro_batch):
            for filled in coming.filling:
                filled()
            done += len(coming.samples)
            if done % recipe.batch == 0:
                times.append(time.perf_counter())
                memory.append(psutil.Process().memory_full_info().uss // 10**6)
        result[f"threads_{threads}"] = {
            "images": done,  # of which those of the first step, for which shards are opened, are not timed
            "images_per_second": round((done - recipe.batch) / (times[-1] - times[0]), 1),
            "most_memory_mb_by_quarter": [max(part.tolist()) for part in np.array_split(memory, 4) if len(part)],
        }
    return result


# ------------------------------------------------------------------------------------------------------- scoring


SHARDS = 8  # clip_benchmark's four workers share whole shards


def photo_set(root: Path, count: int) -> None:
    """A set in clip-benchmark's layout of `count` JPEGs of 500 x 375 px, of which 64 are distinct."""
    folder, classes = root / "wds" / "photos", [f"class {i}" for i in range(10)]
    (folder / "test").mkdir(parents=True)
    encoded = [_jpeg((500, 375), i) for i in range(min(64, count))]
    for shard in range(SHARDS):
        with TarWriter(str(folder / "test" / f"{shard}.tar")) as tar:
            for i in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                tar.write({"__key__": f"{i:07d}", "jpg": encoded[i % len(encoded)], "cls": i % len(classes)})
    for file, lines in {
        "test/nshards.txt": [str(SHARDS)], "dataset_type.txt": ["classification"], "classnames.txt": classes,
        "zeroshot_classification_templates.txt": ["a photo of a {c}"],
    }.items():  # fmt: skip
        (folder / file).write_text("\n".join(lines), encoding="utf-8")


def scored_clip(p: Params, folder: Path, gpu: bool) -> None:
    """The backbone that is scored, with random weights, as a folder that open_clip loads: openai_224 on a GPU, else
    the mini backbone's towers with CLIP's own tokenizer."""
    name = "openai_224" if gpu else "mini"
    source = complete(name, p.backbone(name).source)
    config = model_config(source.architecture)
    config["text_cfg"] |= {"context_length": 77, "vocab_size": 49408}
    write_config(config, source.preprocessing.model_dump(), folder)
    with seeded("bench", "scoring"):
        save_weights(random_clip(config, source.preprocessing.model_dump()).clip.state_dict(), folder)


def _decode(preprocessing: dict[str, Any], samples: list[SetImage]) -> None:
    """Read, decode and resize as a backbone does, and nothing else; the work of a process that does so alone."""
    backbone: Any = SimpleNamespace(preprocessing=preprocessing, resizing={})  # what is read of it
    for sample in samples:
        with Image.open(io.BytesIO(sample.read()), formats=FORMATS) as image:
            Backbone.resize(backbone, image.convert("RGB"))


def scoring(p: Params, images: int, rounds: int, compute: torch.device) -> dict[str, Any]:
    """Images a second of decoding alone, of our scoring, and of clip_benchmark's program, in turns.

    The program's are those of its own bar, its start left out; ours count from the look through the set to the answers.
    The ways that decode in one thread see an eighth of the images.
    """
    from pipeline.benchmarks.clip_sets import classification  # not above: nothing else here needs clip_benchmark

    all_of_it, part, model, gpu = SCRATCH / "scoring", SCRATCH / "eighth", SCRATCH / "clip", compute.type == "cuda"
    few = images // SHARDS
    photo_set(all_of_it, images)
    photo_set(part, few)
    scored_clip(p, model, gpu)
    batch, processes = p.profiles["paper" if gpu else "mini"].zeroshot.batch, PartialState(cpu=not gpu)
    backbone = Backbone.load(model).to(compute)
    (found,) = read(all_of_it)

    def decoding() -> float:
        """By one process a core, warm before the clock starts."""
        samples, cores, preprocessing = found.splits["test"], cpus(), backbone.preprocessing
        with ProcessPoolExecutor(cores) as pool:
            for _ in pool.map(_decode, [preprocessing] * cores, [samples[:CHUNK]] * cores):
                pass
            start = time.perf_counter()
            for _ in pool.map(_decode, [preprocessing] * cores, [samples[i::cores] for i in range(cores)]):
                pass
        return images / (time.perf_counter() - start)

    def ours(root: Path, count: int, precision: str = "float32", processes_here: int = 1) -> float:
        """processes_here: as a process does that shares the machine with others, down to one thread."""
        with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(processes_here)):
            start = time.perf_counter()
            classification(Encoder(backbone, processes, batch, precision), *read(root))
        return count / (time.perf_counter() - start)

    def program(root: Path, count: int, *options: str) -> float:
        command = [sys.executable, "-m", "clip_benchmark.cli", "eval", "--dataset", "wds/photos", *options]
        command += ["--dataset_root", str(root / "wds" / "photos"), "--task", "zeroshot_classification"]
        command += ["--model", f"local-dir:{model}", "--pretrained", "", "--output", str(SCRATCH / "out.json")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return count / bar_seconds(done.stderr)

    ways: dict[str, Callable[[], float]] = {
        "decoding alone, a process a core": decoding,
        "ours, float32": lambda: ours(all_of_it, images),
        **({"ours, bfloat16": lambda: ours(all_of_it, images, "bfloat16")} if gpu else {}),
        "ours, float32, one thread decodes": lambda: ours(part, few, processes_here=cpus()),
        "clip_benchmark": lambda: program(all_of_it, images),
        "clip_benchmark, no worker": lambda: program(part, few, "--num_workers", "0"),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    ours(part, few)  # warm
    for _ in range(rounds):
        for way, measure in ways.items():
            load = os.getloadavg()[0]
            rates[way].append(round(measure(), 1))
            print(f"{way}: {rates[way][-1]} images/s (load before: {load:.1f})", flush=True)
    return {"cores": cpus(), "images": images, "images_per_second": rates}


def bar_seconds(said: str) -> float:
    """How long the loop of clip_benchmark took, by the last state of its last bar: `n` batches at so many a second."""
    bars = re.findall(r"\b(\d+)it \[[\d:]+, +([\d.]+)(it/s|s/it)\]", said)
    if not bars:
        raise UserError(f"clip_benchmark's bar of batches is not in what it said:\n{said[-2000:]}")
    batches, rate, unit = bars[-1]
    return int(batches) / float(rate) if unit == "it/s" else int(batches) * float(rate)


# ------------------------------------------------------------------------------------------------------- the tables


def markdown(results: dict[str, dict[str, Any]], machine: str) -> str:
    """A table with a row for each subject."""
    rows: list[list[str]] = [[
        "subject", "precision", "at once", "images/s, engine", "images/s, released", "ratio (range)", "GFLOP an image",
        "of the matmul rate", "waiting for images", "peak GB",
    ]]  # fmt: skip
    for name, r in results.items():
        keys = ("images_per_second", "ratio", "gflop_per_image", "peak_memory_gb")
        speed, ratio, flop, memory = (r.get(key, {}) for key in keys)
        rows.append([
            name, r["precision"], str(r["micro_batch"]), f"{speed['engine']:g}", f"{speed['published']:g}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            f"{flop['engine']:g} / {flop['published']:g}", f"{r['utilisation']['engine']:.0%}",
            f"{r['waiting_for_images']:.1%}", " / ".join(f"{value:g}" for value in memory.values()) or "-",
        ])  # fmt: skip
    said = f"Engine against the released schedule on {machine}; random weights, A B A B in one process."
    return f"{said}\n\n{table(rows)}\n"


@stage
def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT")
    parser.add_argument("--rounds", type=int, help="by default 8, of scoring 2, of mllm and segmentation 1 on a CPU")
    parser.add_argument("--images", type=int, help="by default 100,000, of scoring 20,000, of growth 5,000 in a shard")
    asked = parser.parse_args(arguments)
    p, compute = params.load(), deterministic_device()
    gpu = compute.type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else f"{cpus()} CPU cores"
    stem = machine.lower().replace(" ", "-")
    try:
        alone: dict[str, Callable[[], dict[str, Any]]] = {
            "loader": lambda: loader(p, asked.images or 100_000),
            "growth": lambda: growth(p, photo_shards(p.profiles["paper"].train.size, asked.images or 5000)),
            "scoring": lambda: scoring(p, asked.images or 20_000, asked.rounds or 2, compute),
        }
        names = asked.subjects or (LARGE if gpu else ["mini", "block"])
        together = [*true_size.SUBJECTS], ["block", *p.backbones]
        if names[1:] or names[0] not in alone:
            if not any({*names} <= {*kind} for kind in together):
                some = " or ".join(f"some of {', '.join(kind)}" for kind in together)
                raise UserError(f"found {' '.join(names)}, wanted one of {', '.join(alone)}, or {some}")
        else:
            (what,) = names
            with atomic(OUTPUT / f"{what}-{stem}.json") as (file,):
                result = {"machine": machine, "torch": torch.__version__, **alone[what]()}
                write_json(file, result)
            print(json.dumps(result, indent=2))
            return
        if names[0] in true_size.SUBJECTS:
            with atomic(OUTPUT / "downstream.json") as (file,):
                rounds = asked.rounds or (8 if gpu else 1)
                result = {"machine": machine, "torch": torch.__version__, "transformers": version("transformers")}
                result |= {name: true_size.SUBJECTS[name](p, rounds, compute) for name in names}
                write_json(file, result)
            print(json.dumps(result, indent=2))
            return
        results = {name: compare(name, p, asked.rounds or 8, compute) for name in names}
        with atomic(OUTPUT / f"{stem}.json", OUTPUT / f"{stem}.md") as (json_file, markdown_file):
            write_json(json_file, {"machine": machine, "torch": torch.__version__, "subjects": results})
            markdown_file.write_text(markdown(results, machine), encoding="utf-8")
        print(markdown(results, machine))
    finally:
        remove(SCRATCH)


if __name__ == "__main__":
    main()
