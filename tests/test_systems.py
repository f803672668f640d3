"""What runs on systems other than Linux: a training without what macOS lacks, and one sentence on Windows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from shrunk import METRICS, MODELS, ROOT

# Third parties come first: those here have their parts for Linux. What macOS lacks is gone before ours are imported.
MACOS = """
import ctypes, os, resource, runpy, sys
import accelerate, diffusers, open_clip, pandas, psutil, torch, tqdm, transformers
sys.platform = "darwin"
del os.sched_getaffinity
def absent(*name):
    raise AttributeError("macOS has no prctl")
ctypes.CDLL = absent
counted = resource.getrusage
class Bytes:
    def __init__(self, who):
        self.ru_maxrss = 1024 * counted(who).ru_maxrss
resource.getrusage = Bytes
sys.argv = ["train", "mini", "diva"]
runpy.run_module("pipeline.train", run_name="__main__")
"""


@pytest.mark.slow
def test_a_training_without_what_macos_lacks(here: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "STARTED_BY": str(os.getpid())}
    done = subprocess.run([sys.executable, "-c", MACOS], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (here / MODELS / "diva/mini").is_dir()
    assert (here / METRICS / "train/mini-diva/metrics.json").is_file()
    noted = json.loads((here / "metrics/timings.jsonl").read_text().splitlines()[-1])
    assert 100 < noted["peak_memory_mb"] < psutil.virtual_memory().total / 2**20
    assert noted["cores"] == os.cpu_count()


@pytest.mark.parametrize("module", ["pipeline.plan", "pipeline.core.outputs", "pipeline.core.stages"])
def test_windows_is_told_in_one_sentence(module: str) -> None:
    """In the place of an ImportError for fcntl or resource."""
    code = (
        "import sys, yaml; sys.platform = 'win32'; sys.modules |= dict.fromkeys(['fcntl', 'resource']); "
        f"import {module}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    sentence = "error: this pipeline runs on Linux and macOS; on Windows, run it inside WSL, which is a Linux.\n"
    assert done.stderr == sentence


def test_the_readme_says_which_systems() -> None:
    assert "macOS" in (ROOT / "README.md").read_text()
