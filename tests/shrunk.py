"""The mini world shrunk to seconds: its parameters, its images, and how a test runs a stage."""

import io
import itertools
import shutil
import sys
import tarfile
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from noting import watched
from PIL import Image

from pipeline import (
    backbone,
    denoiser,
    drift,
    encoder,
    mmvp,
    mmvp_vlm,
    plan,
    report,
    shuffled,
    train,
    zeroshot,
    zeroshot_sets,
)
from pipeline.core.outputs import write_json
from pipeline.mini import world
from pipeline.mini.images import SET

ROOT = Path(__file__).parents[1]
DATA, MODELS, METRICS = Path("data/mini"), Path("models/mini"), Path("metrics/mini")
SHRUNK = {
    "profiles.mini.images.count": 12,
    "profiles.mini.images.shard_size": 6,
    "profiles.mini.images.processes": 1,
    "profiles.mini.mmvp_vlm.pairs_per_pattern": 2,
    "profiles.mini.zeroshot_sets": {
        "kind": "mini", "classification": 12, "retrieval": 6, "probe_train": 80, "probe_test": 20
    },
    "profiles.mini.segmentation_sets": {"kind": "mini", "train": 8, "test": 5},
    "profiles.mini.segmentation.probe": {"cells": 2, "steps": 4, "batch": 32, "lr": 0.01},
    "profiles.mini.mllm_sets": {"kind": "mini", "train": 6, "pairs_per_pattern": 2},
    "profiles.mini.mllm": {
        "seeds": 2, "context": 40, "batch": 8, "precision": "float32",
        "phases": [
            {
                "split": "train", "trained": "projector_and_language", "prompt": "{question}", "steps": 2, "batch": 8,
                "lr": 0.003, "warmup_ratio": 0.1, "weight_decay": 0.01,
            }
        ],
        "language": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
    "profiles.mini.denoiser.images": 48,
    "profiles.mini.denoiser.validation": 12,
    "profiles.mini.denoiser.autoencoder.latent_channels": 4,
    "profiles.mini.denoiser.unet.block_out_channels": [8, 16],
    "profiles.mini.denoiser.unet.norm_num_groups": 4,
    "profiles.mini.denoiser.unet.cross_attention_dim": 16,
    "profiles.mini.denoiser.text_encoder": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "projection_dim": 16,
    },
    "profiles.mini.denoiser.steps": 2,
    "profiles.mini.denoiser.batch": 8,
    "profiles.mini.encoder": {
        "kind": "mini", "architecture": "vit_tiny_patch16_224",
        "arguments": {"patch_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2},
        "images": 40, "probe_train": 80, "probe_test": 20, "target": {"latent_channels": 4, "patch_size": 8},
        "decoder_width": 8, "steps": 3, "batch": 8, "lr": 0.01,
    },
    "profiles.mini.recipes.diva.batch": 4,
    "profiles.mini.train.micro_batch": 2,
    "profiles.mini.train.validation": {"images": 3, "every": 2},
    "profiles.mini.recipes.diva.steps": 4,
    "profiles.mini.recipes.diva.warmup.steps": 3,
    "profiles.mini.recipes.diva.optimizer.lr": 0.5,  # so that the tower's four steps are seen in the loss curve
    "profiles.mini.mmvp.draws": 3,
    "backbones.mini.source.architecture": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
        "text_cfg": {"width": 16, "heads": 2, "layers": 1},
    },
    "backbones.mini.source.text_tower.steps": 2,
    "backbones.mini.source.text_tower.batch": 8,
    "backbones.mini.source.image_tower.images": 16,
    "backbones.mini.source.image_tower.steps": 2,
    "backbones.mini.source.image_tower.batch": 8,
    "backbones.mini.published_pooling.tokens": {"kind": "random", "number": 3},
}  # fmt: skip

CHECKPOINTS = ("released", "genhancer", "dcr", "un2clip")
SCORED = ("pretrained", "diva", "diva-shuffled", "diva-drift")


def run_of(weights: Sequence[str]) -> dict[str, list[str]]:
    """The lists of `run` under which these weights are scored, of which every recipe has the same controls."""
    recipes = [name for name in weights if name not in ("pretrained", *CHECKPOINTS) and "-" not in name]
    return {
        "run.benchmarks": ["mmvp", "zeroshot"],
        "run.benchmark_sets": [],
        "run.checkpoints": [name for name in weights if name in CHECKPOINTS],
        "run.recipes": recipes,
        "run.controls": list(dict.fromkeys(name.partition("-")[2] for name in weights if "-" in name)),
        "run.inputs": ["images", "denoiser"] if recipes else [],
    }


def read_yaml(file: Path) -> Any:
    """Nine times as fast as yaml.safe_load."""
    return yaml.load(file.read_text(), yaml.CSafeLoader)


def write_yaml(file: Path, content: Any) -> None:
    file.write_text(yaml.dump(content, Dumper=yaml.CSafeDumper, sort_keys=False))


def write_params(folder: Path = Path(), **changes: Any) -> None:
    """Write the committed params.yaml, shrunk; a change's key is dotted."""
    content = read_yaml(ROOT / "params.yaml")
    for key, value in {**SHRUNK, **run_of(SCORED), **changes}.items():
        *parents, last = key.split(".")
        reduce(dict.__getitem__, parents, content)[last] = value
    write_yaml(folder / "params.yaml", content)


def copy_untrained(finished: Path, folder: Path) -> Path:
    """A folder in which every stage has run, without what was trained."""
    shutil.copytree(finished, folder)
    for weights in ("diva", "diva-shuffled", "diva-drift"):
        shutil.rmtree(folder / MODELS / weights)
    shutil.rmtree(folder / METRICS / "train")
    return folder


def write_shards(folder: Path, count: int) -> None:
    """One shard of post-training images, as pipeline/data/shards.py documents it."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(count):
            file, (pixels, scene) = io.BytesIO(), world.image(SET, i)
            Image.fromarray(pixels).save(file, "JPEG", quality=95)
            for name, data in ((f"{i:07d}.jpg", file.getvalue()), (f"{i:07d}.txt", world.caption(scene).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    write_json(folder / "shards.json", {"size": 64, "samples": count, "shards": {"00000.tar": count}})


def write_seeds(*rows: str) -> None:
    """The table that tools/sweep.py writes; a row: backbone,recipe,weights,seed,<seven gains>,run."""
    file = Path("metrics/seeds/mini.csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([(ROOT / "metrics/seeds/paper.csv").read_text().strip(), *rows, ""]))


def run(stage: ModuleType, *arguments: str) -> None:
    """Run a stage's main() as `python -m pipeline.<stage> <arguments>` would."""
    with pytest.MonkeyPatch.context() as patch, watched(stage, arguments):
        patch.setattr(sys, "argv", [stage.__name__, *arguments])
        stage.main()


def run_every_stage(weights: Sequence[str] = SCORED) -> None:
    """Fill the working directory, which has parameters and images, with what the other stages make."""
    for stage in (plan, mmvp_vlm, zeroshot_sets, denoiser):
        run(stage)
    run(backbone, "mini")
    for recipe in run_of(weights)["run.recipes"]:
        run(encoder, recipe)
    trained = {"diva": train, "diva-shuffled": shuffled, "diva-drift": drift}
    for name in (name for name in weights if name in trained):
        run(trained[name], "mini", "diva")
    for stage, name in itertools.product((mmvp, zeroshot), weights):
        run(stage, "mini", name)
    write_seeds()
    run(report)
