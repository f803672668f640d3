"""Whence a report: hashes of parameters, code and data, seeds, versions, hardware, wall time.

The git revision is not among it: a file that is written before it is committed cannot know its commit. Git tells which
commit a file came with, and the hashes tell what it was made of.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import psutil
import yaml

from pipeline.params import Params
from pipeline.runtime import TIMINGS, program

PACKAGES = (
    "torch", "diffusers", "transformers", "open_clip_torch", "timm", "clip-benchmark", "img2dataset", "dvc", "numpy",
    "scipy",
)  # fmt: skip


# Whatever a gain depends on; tests/test_house.py holds that these are all stages but those that come after the scores.
DECIDE = (
    "images.py", "mmvp_vlm.py", "zeroshot_sets.py", "denoiser.py", "backbone.py", "train.py", "drift.py", "mmvp.py",
    "zeroshot.py", "evidence/results.py",
)  # fmt: skip


def provenance(p: Params) -> dict[str, dict[str, str]]:
    """Sections of what people ask first, as text."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "Run": {
            "training seed": str(p.seed),
            "profile": p.run.profile,
            "backbones": ", ".join(p.run.backbones),
            "weights": ", ".join(p.run.weights),
            **{f"run of {backbone}": run(p, backbone) for backbone in p.run.backbones},
        },
        "Hardware": hardware(),
        "Versions": {"python": platform.python_version(), **versions},
        "Data and models (md5 in DVC's locks)": hashes(scored(p)),
        "Wall time and peak memory of the last run of each stage here": times(),
    }


def run(p: Params, backbone: str) -> str:
    """Names the run whose seeds count together: a hash of all code and parameters that decide gains, but the seed."""
    train = p.profile.train.model_dump(mode="json", exclude={"checkpoint_minutes"})
    of_profile = p.profile.model_dump(mode="json", exclude={"train", "recipes"})
    chosen = p.profile.recipe.model_dump(mode="json")
    own = p.backbones[backbone].model_dump(mode="json", include={"source", "condition", "published_read_out"})
    together = json.dumps([of_profile, train, chosen, own, program(*DECIDE)], sort_keys=True)
    return hashlib.sha256(together.encode()).hexdigest()[:12]


def scored(p: Params) -> list[str]:
    """What the figures were read from."""
    profile = p.run.profile
    return [
        output
        for backbone in p.run.backbones
        for weights in p.run.weights
        for output in (
            f"data/{profile}/embeddings/{backbone}-{weights}.safetensors",
            f"metrics/{profile}/zeroshot/{backbone}-{weights}.json",
        )
    ]


def hardware() -> dict[str, str]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = [line.partition(":")[2].strip() for line in names.splitlines() if line.startswith("model name")]
    return {
        "processor": f"{model[0] if model else platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "GPU": ", ".join(gpus) or "none",
    }


def hashes(paths: list[str]) -> dict[str, str]:
    """md5 of these paths and of all that they were made from, as the locks have them, where it is data or a model."""
    made: dict[str, dict[str, str]] = {}
    md5s: dict[str, str] = {}
    for lock in (Path("pipeline/dvc.lock"), Path("dvc.lock")):
        stages = yaml.safe_load(lock.read_text())["stages"] if lock.exists() else {}
        for stage in stages.values():
            deps, outs = ({entry["path"]: entry["md5"] for entry in stage.get(kind, [])} for kind in ("deps", "outs"))
            made |= dict.fromkeys(outs, deps)
            md5s |= outs
    found, ahead = {}, set(paths)
    while ahead:
        path = ahead.pop()
        found[path] = md5s.get(path, "unknown: no dvc.lock here tells of it")
        ahead |= made.get(path, {}).keys() - found.keys()
    return {path: found[path] for path in sorted(found) if path.startswith(("data/", "models/"))}


def times() -> dict[str, str]:
    lines = [json.loads(line) for line in TIMINGS.read_text().splitlines()] if TIMINGS.exists() else []
    return {
        line["stage"]: f"{line['seconds']:,.0f} s, {line['peak_memory_mb']:,} MB, {line['finished']}" for line in lines
    }
