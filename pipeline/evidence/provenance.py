"""Whence a report: revision, seeds, hashes, versions, hardware, wall time. Half of it differs from run to run."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import psutil
import yaml

from pipeline.params import Params
from pipeline.runtime import TIMINGS

PACKAGES = (
    "torch", "diffusers", "transformers", "open_clip_torch", "timm", "clip-benchmark", "img2dataset", "dvc", "numpy",
    "scipy",
)  # fmt: skip


def provenance(p: Params) -> dict[str, dict[str, str]]:
    """Sections of what people ask first, as text."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "Run": {
            "git revision": revision(),
            "training seed": str(p.seed),
            "profile": p.run.profile,
            "backbones": ", ".join(p.run.backbones),
            "weights": ", ".join(p.run.weights),
        },
        "Hardware": hardware(),
        "Versions": {"python": platform.python_version(), **versions},
        "Data and models (DVC's md5)": hashes(p.run.profile),
        "Wall time and peak memory of the last run of each stage here": times(),
    }


def revision() -> str:
    """Of the commit that is checked out; `-dirty` where files were changed since."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "not a git repository"


def code_revision() -> str:
    """Of the last commit that changed the stages' code or params.yaml: commits of results or tools do not change it."""
    code = ("--", "pipeline", "params.yaml", "requirements.lock", ":!pipeline/dvc.lock", ":!pipeline/tools")
    commit, changed = (
        subprocess.run(["git", *command, *code], capture_output=True, text=True).stdout.strip()
        for command in (("log", "-1", "--format=%h"), ("status", "--porcelain"))
    )
    return f"{commit}{', with uncommitted changes' if changed else ''}" if commit else "not a git repository"


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


def hashes(profile: str) -> dict[str, str]:
    """Of every output below data/<profile> and models/<profile>, as the locks have them."""
    found = {}
    for lock in (Path("pipeline/dvc.lock"), Path("dvc.lock")):
        stages = yaml.safe_load(lock.read_text())["stages"] if lock.exists() else {}
        for out in (out for stage in stages.values() for out in stage.get("outs", [])):
            path = out["path"].removeprefix("../")
            if path.startswith((f"data/{profile}/", f"models/{profile}/")):
                found[path] = out["md5"]
    return dict(sorted(found.items()))


def times() -> dict[str, str]:
    lines = [json.loads(line) for line in TIMINGS.read_text().splitlines()] if TIMINGS.exists() else []
    return {
        line["stage"]: f"{line['seconds']:,.0f} s, {line['peak_memory_mb']:,} MB, {line['finished']}" for line in lines
    }
