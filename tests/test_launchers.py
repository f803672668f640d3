"""Training through a launcher under DVC, and the ready files for SLURM and SkyPilot."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from clones import Clone
from shrunk import MODELS, ROOT
from test_engine import outputs

LAUNCH = ROOT / "pipeline/launch"
HANG = 1500  # seconds: only a hang takes as long
TRAIN = "pipeline/dvc.yaml:train@mini-diva"
INPUTS = ("input@images", "input@denoiser", "backbone@mini")


def launched_by(clone: Clone, train: str, processes: int = 1) -> None:
    content = yaml.safe_load((clone.root / "params.yaml").read_text())
    content["launch"] = {"train": train, "processes": processes}
    (clone.root / "params.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture
def ready(tmp_path: Path) -> Clone:
    """A clone with all that a training of some seconds needs."""
    clone = Clone.make(tmp_path / "ready")
    content = yaml.safe_load((clone.root / "params.yaml").read_text())
    content["profiles"]["mini"]["train"]["checkpoint_minutes"] = 0.0
    content["profiles"]["mini"]["recipes"]["diva"] |= {"steps": 60}
    (clone.root / "params.yaml").write_text(yaml.safe_dump(content))
    clone.run("dvc", "repro", *(f"pipeline/dvc.yaml:{name}" for name in INPUTS))
    return clone


@pytest.mark.exhaustive
def test_a_wrong_launcher_fails_the_stage_with_its_words(ready: Clone) -> None:
    launched_by(ready, "torchrun --standalone --nproc-per-node 1", 2)
    assert "a group of 1 processes, but launch.processes is 2" in ready.run("dvc", "repro", TRAIN, status=255)
    launched_by(ready, "python", 2)
    assert "outside a group of processes" in ready.run("dvc", "repro", TRAIN, status=255)
    assert outputs(ready.root) == {}


@pytest.mark.exhaustive
def test_a_killed_dvc_takes_launcher_and_processes_with_it(ready: Clone) -> None:
    launched_by(ready, "torchrun --standalone --nproc-per-node 2", 2)
    repro, checkpoint = ready.start("dvc", "repro", TRAIN), ready.root / MODELS / "diva/.mini.checkpoint"
    while not checkpoint.exists() and repro.poll() is None:
        time.sleep(0.05)
    assert repro.poll() is None
    repro.send_signal(signal.SIGKILL)
    repro.communicate(timeout=HANG)
    for _ in range(600):
        if not ready.processes():
            break
        time.sleep(0.1)
    assert ready.processes() == []


def test_the_ready_files_are_well_formed() -> None:
    """SkyPilot's keys are those of its task schema (0.14, sky/utils/schemas.py); the shell parses what it is to run."""
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task.keys() <= {
        "name",
        "num_nodes",
        "workdir",
        "resources",
        "setup",
        "run",
        "envs",
        "secrets",
        "file_mounts",
    }
    assert isinstance(task["num_nodes"], int)
    assert task["resources"].keys() <= {"accelerators", "disk_size", "cpus", "memory", "use_spot", "infra"}
    for shell in (task["setup"], task["run"], *((LAUNCH / name).read_text() for name in ("node.sh", "slurm.sbatch"))):
        subprocess.run(["bash", "-n"], input=shell, text=True, check=True)
