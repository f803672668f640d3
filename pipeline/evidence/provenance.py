"""Provenance of a report: hashes of parameters, code and data, seeds, versions, hardware, wall time.

The git commit is not part of it, because a report is written before it is committed. `git log` on the report names the
commit; the hashes name what it was made from.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil
import threadpoolctl
import yaml

from pipeline import PINS
from pipeline.core import config
from pipeline.core.code import program
from pipeline.core.stages import TIMINGS
from pipeline.sections.reported import Reported

PACKAGES = (
    "torch", "diffusers", "transformers", "open_clip_torch", "timm", "clip-benchmark", "img2dataset", "dvc", "numpy",
    "scipy",
)  # fmt: skip

LIBRARIES = {"MKL": r"Math Kernel Library Version ([\d.]+)", "oneDNN": r"MKL-DNN v([\d.]+)"}
PROCESSOR = {"cpu family": "family", "model": "model", "stepping": "stepping"}


# Whatever the gains of the seeds table depend on, and the profile's sections of these names; tests/test_house.py holds
# that these are all stages but those that come after the scores, and the benchmarks whose gains are not in that table.
DECIDE = (
    "images.py", "mmvp_vlm.py", "zeroshot_sets.py", "denoiser.py", "encoder.py", "backbone.py", "train.py",
    "shuffled.py", "drift.py", "mmvp.py", "zeroshot.py", "evidence/results.py",
)  # fmt: skip


def provenance(p: Reported) -> dict[str, dict[str, str]]:
    """The sections of the provenance, as text."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "Run": {
            "training seed": str(p.seed),
            "profile": p.run.profile,
            "backbones": ", ".join(p.run.backbones),
            "weights": ", ".join(p.run.weights),
            **{
                f"run of {backbone}, {recipe}": run(p.run.profile, backbone, recipe)
                for backbone in p.run.backbones
                for recipe in p.run.recipes
            },
        },
        "Hardware": hardware(),
        "Versions": {"python": platform.python_version(), **versions},
        "Data and models (md5 in DVC's locks)": hashes(scored(p)),
        "Wall time and peak memory of the last run of each stage here": times(),
    }


def run(profile: str, backbone: str, recipe: str) -> str:
    """A hash of all code and parameters that decide a recipe's gains in the seeds table, except the seed: runs with the
    same hash count together.
    """
    anything, key = dict[str, Any], f"profiles.{profile}"
    named = {"threads", *(Path(file).stem for file in DECIDE)}
    decide: dict[str, Any] = {name: value for name, value in config.read(anything, key).items() if name in named}
    decide |= {"recipe": config.read(anything, f"{key}.recipes.{recipe}", base=f"{key}.base_recipe")}
    entry = config.read(anything, f"backbones.{backbone}")
    own = [entry[name] for name in ("source", "condition", "published_pooling")]
    return hashlib.sha256(json.dumps([decide, own, program(*DECIDE)], sort_keys=True).encode()).hexdigest()[:12]


def scored(p: Reported) -> list[str]:
    """The folders of the scores that the figures come from."""
    profile = p.run.profile
    return [
        f"metrics/{profile}/scores/{benchmark}/{backbone}-{weights}"
        for backbone in p.run.backbones
        for weights in p.run.weights
        for benchmark in p.run.benchmarks
    ]


def hardware() -> dict[str, str]:
    """The machine, and those of its properties that decide the bytes of arithmetic on its CPU."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor(),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "GPU": ", ".join(gpus) or "none",
        "instruction set in use": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "BLAS": blas(),
        "pinned": ", ".join(f"{name}={os.environ[name]}" for name in PINS) or "nothing",
    }


def processor() -> str:
    """Name, family, model and stepping (as Linux reports them), and cores."""
    file, found = Path("/proc/cpuinfo"), {}
    if file.exists():
        first = file.read_text(encoding="utf-8").partition("\n\n")[0]
        found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    numbers = [f"{name} {found[key]}" for key, name in PROCESSOR.items() if key in found]
    return ", ".join([found.get("model name", platform.machine()), *numbers, f"{os.cpu_count()} cores"])


def blas() -> str:
    """Torch's libraries of matrix products and convolutions, numpy's and scipy's with the kernels that they chose."""
    import scipy.linalg  # noqa: F401  (loads its OpenBLAS)
    import torch

    config = torch.__config__.show()
    versions = {name: re.search(pattern, config) for name, pattern in LIBRARIES.items()}
    built = [f"{name} {found[1]}" for name, found in versions.items() if found]
    loaded = {
        f"{library['internal_api']} {library['version']} ({library.get('architecture', 'unknown kernels')})"
        for library in threadpoolctl.threadpool_info()
        if library["user_api"] == "blas"
    }
    return ", ".join([*built, *sorted(loaded)])


def hashes(paths: list[str]) -> dict[str, str]:
    """md5 of these paths and of the data and models that they were made from, as the locks have them."""
    made: dict[str, dict[str, str]] = {}
    md5s: dict[str, str] = {}
    for lock in (Path("pipeline/dvc.lock"), Path("dvc.lock")):
        stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.exists() else {}
        for stage in stages.values():
            deps, outs = ({entry["path"]: entry["md5"] for entry in stage.get(kind, [])} for kind in ("deps", "outs"))
            made |= dict.fromkeys(outs, deps)
            md5s |= outs
    found, ahead = {}, set(paths)
    while ahead:
        path = ahead.pop()
        found[path] = md5s.get(path, "unknown: no dvc.lock here lists it")
        ahead |= made.get(path, {}).keys() - found.keys()
    return {path: found[path] for path in sorted(found) if re.match("(data|models)/(?!.*/planned/)", path)}


def times() -> dict[str, str]:
    """Of the stages; lines of other commands, which stand in the same file, are left out."""
    alone = {file.stem for file in Path(__file__).parents[1].glob("*.py")}  # the stages that no matrix makes several of
    lines = [json.loads(line) for line in TIMINGS.read_text(encoding="utf-8").splitlines()] if TIMINGS.exists() else []
    return {
        line["stage"]: f"{line['seconds']:,.0f} s, {line['peak_memory_mb']:,} MB, {line['finished']}"
        for line in lines
        if "@" in line["stage"] or line["stage"] in alone
    }
