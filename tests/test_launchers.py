"""Training through a launcher under DVC: torchrun, and a real SLURM that preempts it; the ready files for both clouds.

`slurm.sh` starts SLURM from the distribution's packages, where they are installed and namespaces are permitted.
"""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clones import Clone, stages_run
from shrunk import MODELS, ROOT, read_yaml, write_yaml
from test_engine import outputs

from pipeline.core.processes import cpus

SLURM = ROOT / "tests/slurm.sh"
LAUNCH = ROOT / "pipeline/launch"
HANG = 1500  # seconds: only a hang takes as long
TRAIN = "pipeline/dvc.yaml:train@mini-diva"
INPUTS = ("input@images", "input@denoiser", "encoder@diva", "backbone@mini")


def launched_by(clone: Clone, train: str, processes: int = 1) -> None:
    content = read_yaml(clone.root / "params.yaml")
    content["launch"] |= {"train": train, "processes": processes}
    write_yaml(clone.root / "params.yaml", content)


@pytest.fixture
def ready(tmp_path: Path) -> Clone:
    """A clone with all that a training of some seconds needs."""
    clone = Clone.make(tmp_path / "ready")
    content = read_yaml(clone.root / "params.yaml")
    content["launch"]["checkpoint_minutes"] = 0.0
    content["profiles"]["mini"]["recipes"]["diva"] |= {"steps": 60}
    write_yaml(clone.root / "params.yaml", content)
    clone.run("dvc", "repro", *(f"pipeline/dvc.yaml:{name}" for name in INPUTS))
    return clone


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[list[str]]:
    """What begins a command that SLURM is to see."""
    if not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch", "ip")):
        pytest.skip("there is no SLURM here (apt-get install slurmctld slurmd slurm-client munge iproute2)")
    (tmp_path / "slurm").mkdir()
    made = subprocess.run([SLURM, "up", tmp_path / "slurm"], capture_output=True, text=True)
    if "Operation not permitted" in made.stderr:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    try:
        assert made.returncode == 0, made.stderr
        yield ["nsenter", "--net=/run/netns/diva-slurm", "env", f"SLURM_CONF={tmp_path}/slurm/slurm.conf"]
    finally:
        subprocess.run([SLURM, "down"], check=True)


@pytest.mark.exhaustive
def test_slurm_preempts_a_training_and_it_goes_on(ready: Clone, tmp_path: Path, inside: list[str]) -> None:
    """The same bytes and the same lock as torchrun without SLURM; neither launcher makes a stage stale."""
    plain = ready.copy(tmp_path / "plain")
    launched_by(plain, f"torchrun --standalone --nproc-per-node {cpus()}", cpus())
    assert stages_run(plain.run("dvc", "repro", TRAIN)) == ["train@mini-diva"]

    launched_by(ready, "srun pipeline/launch/node.sh", cpus())
    ready.environment = {"GLOO_SOCKET_IFNAME": "lo"}
    submit = [*inside, "sbatch", "--wait", f"--cpus-per-task={cpus()}"]
    options = ["--nodes=1", "--gpus-per-node=0", "--output=job.log", "--partition=low"]
    job = ready.start(*submit, *options, "pipeline/launch/slurm.sbatch", TRAIN)
    checkpoint, log = ready.root / MODELS / "diva/.mini.checkpoint", ready.root / "job.log"
    while not checkpoint.exists() and job.poll() is None:
        time.sleep(0.05)
    ready.run(*submit, "--partition=high", "--output=/dev/null", "--wrap=true")
    output, _ = job.communicate(timeout=HANG)
    printed = log.read_text()
    assert job.returncode == 0, output + printed
    assert "DUE TO PREEMPTION" in printed
    assert stages_run(printed) == ["train@mini-diva"] * 2
    assert "going on after step" in printed
    assert outputs(ready.root) == outputs(plain.root)
    assert (ready.root / "pipeline/dvc.lock").read_text() == (plain.root / "pipeline/dvc.lock").read_text()
    launched_by(ready, "")
    assert stages_run(ready.run("dvc", "repro", TRAIN)) == []


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
    task = read_yaml(LAUNCH / "sky.yaml")
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
