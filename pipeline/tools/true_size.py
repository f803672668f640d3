"""Small LLaVA and segmentation at true size, timed with random weights, for tools/bench.py.

Nothing is fetched. Profile paper gives the values; the tower is openai_336's, the language model has the sizes of
Qwen2.5-0.5B. On a CPU a step takes two texts, on a GPU as many as in params.yaml.
"""

import gc
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from transformers import Qwen2Config

from pipeline.benchmarks import mllm
from pipeline.benchmarks import segmentation as patches
from pipeline.benchmarks.masks import SegmentationSet
from pipeline.benchmarks.mllm_score import vision_tower
from pipeline.benchmarks.questions import Conversation
from pipeline.core.compute import generator, seeded
from pipeline.core.stages import progress
from pipeline.engine.trial import random_clip
from pipeline.models.backbones import Backbone, model_config
from pipeline.models.registry import complete
from pipeline.sections.params import Params
from pipeline.sections.segmentation import Attention

TOWER, PIXELS = "openai_336", 512  # of the image that is segmented, the shorter side
QWEN2_5_05B = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
WORDS = 100  # of question and answer
CLASSES, IMAGES, STEPS = 150, 100, 10  # ADE20K's; whose tokens the probe draws its rows from; of the probe


def tower(p: Params, compute: torch.device) -> Backbone:
    """The CLIP of TOWER with random weights."""
    source = complete(TOWER, p.backbone(TOWER).source)
    with seeded("bench", TOWER):
        return random_clip(model_config(source.architecture), source.preprocessing.model_dump()).to(compute)


def measured(work: Callable[[], Any], rounds: int, compute: torch.device) -> dict[str, float]:
    """Seconds of `work`, the median of `rounds` after one that warms up, and the peak of memory."""
    seconds = []
    for number in progress(range(rounds + 1), "rounds, the first one warms up"):
        if compute.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if compute.type == "cuda":
            torch.cuda.synchronize()
        seconds += [time.perf_counter() - start] if number else []
    peak = (
        torch.cuda.max_memory_allocated()
        if compute.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {"seconds": round(statistics.median(seconds), 4), "rounds": rounds, "peak_memory_gb": round(peak / 1e9, 2)}


def small_llava(p: Params, rounds: int, compute: torch.device) -> dict[str, Any]:
    """A step of each phase of the small LLaVA, from pixels to updated weights."""
    section, processes = p.profiles["paper"].mllm, PartialState(cpu=compute.type == "cpu")
    ids = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2)  # of texts that nobody writes
    vision = vision_tower(tower(p, compute).clip, ids).to(compute)
    half = WORDS // 2
    asked, told = (" ".join(f"word{i}" for i in range(first, first + half)) for first in (0, half))
    conversations = [Conversation(0, ((asked, told),))]
    tok = mllm.tokenizer([*conversations, Conversation(0, ((section.phases[-1].prompt, ""),))])
    language = Qwen2Config(
        **QWEN2_5_05B, pad_token_id=tok.pad_token_id, bos_token_id=None, eos_token_id=tok.eos_token_id
    )
    model = mllm.new(vision, language, tok, 0).to(compute)
    precision = section.precision if compute.type == "cuda" else "float32"
    llava = mllm.Llava(
        model, tok, section.context, section.batch if compute.type == "cuda" else 1, processes, precision
    )
    side = vision.config.image_size
    noise = torch.randn(1, 3, side, side, generator=generator("bench", "pixels"))
    tokens = mllm.PatchTokens(
        vision, lambda numbers: noise.expand(len(numbers), -1, -1, -1), 10**9, llava.rows, precision
    )
    found: dict[str, Any] = {
        "tower": TOWER, "precision": precision, "at_once": llava.rows, "image_tokens": model.config.image_seq_length,
        "parameters": sum(each.numel() for each in model.parameters()), "phases": {},
    }  # fmt: skip
    for phase in section.phases:
        batch = phase.batch if compute.type == "cuda" else 2
        fit = mllm.Fit(llava, phase.trained, rounds + 1, phase.lr, phase.warmup_ratio, phase.weight_decay)
        result = measured(partial(fit.step, conversations * batch, tokens, phase.prompt), rounds, compute)
        speed = round(batch / result["seconds"], 3)
        found["phases"][phase.trained] = {"batch": batch, "images_per_second": speed, **result}
        del fit
        gc.collect()
    return found


def segmentation(p: Params, rounds: int, compute: torch.device) -> dict[str, Any]:
    """One image by sliding windows, by every kind of attention and by a probe; one step of that probe."""
    backbone = tower(p, compute)
    section = p.profiles["paper"].segmentation.model_copy(update={"scale": PIXELS / backbone.image_size})
    draws = np.random.default_rng(0)
    image = Image.fromarray(draws.integers(0, 256, (PIXELS, PIXELS * 4 // 3, 3), np.uint8))
    mask = draws.integers(0, CLASSES, image.size[::-1], np.uint8)
    names = {f"class {i}": [f"class {i}"] for i in range(CLASSES)}
    classify = patches.text_classifier(backbone, SegmentationSet(Path(), names, ["a photo of a {c}."]))
    found: dict[str, Any] = {"tower": TOWER, "image_px": list(image.size), "precision": "float32"}

    def timed(grids: patches.Grids) -> dict[str, float]:
        def work() -> None:
            patches.predictions(backbone, image, mask, section, {"": grids}, compute)

        return measured(work, rounds, compute)

    for kind in get_args(Attention):
        read = partial(
            patches.text_space_tokens, backbone.clip.visual, attention=kind, neighbourhood=section.neighbourhood
        )
        found[kind] = timed(lambda pixels: classify(read(pixels)))  # noqa: B023
    settings = section.probe
    rows = IMAGES * backbone.patches
    tokens = draws.standard_normal((rows, backbone.width), np.float32).astype(np.float16)
    counts = draws.integers(0, 2, (rows, CLASSES, settings.cells**2)).astype(np.float16)
    fitted = partial(patches.fit_probe, tokens, counts, STEPS, settings.batch, settings.lr, compute)
    steps = measured(fitted, rounds, compute)
    found["probe_step"] = {"batch": settings.batch, **steps, "seconds": round(steps["seconds"] / STEPS, 5)}
    probe = fitted()
    with torch.no_grad():
        found["probe"] = timed(lambda pixels: probe.grids(backbone.image_tokens(pixels)[1]))
    return found


SUBJECTS = {"mllm": small_llava, "segmentation": segmentation}
