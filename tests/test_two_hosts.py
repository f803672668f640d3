"""Two hosts in network namespaces, which have a clone each and share no folder: one training, also after one has died.

`two_hosts.sh` makes them, where that is permitted. torchrun's c10d rendezvous brings them together, over gloo.
"""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import launch
import psutil
import pytest
from clones import Clone
from shrunk import MODELS, ROOT, write_params
from test_engine import curves, outputs

SCRIPT = ROOT / "tests/two_hosts.sh"
PORT = 29400
HOSTS = {"a": ("10.77.0.1", "to-b"), "b": ("10.77.0.2", "to-a")}
HANG = 900  # seconds: only a hang takes as long
pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module", autouse=True)
def _network() -> Iterator[None]:
    if not shutil.which("ip"):
        pytest.skip("there is no iproute2 here (apt-get install iproute2)")
    made = subprocess.run([SCRIPT, "up"], capture_output=True, text=True)
    if made.returncode:
        subprocess.run([SCRIPT, "down"], capture_output=True)
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    yield
    subprocess.run([SCRIPT, "down"], check=True)


@pytest.fixture
def clones(here: Path, tmp_path: Path) -> dict[str, Clone]:
    """A clone for each host, with the inputs of a training and nothing trained."""
    found = {}
    for host in HOSTS:
        found[host] = Clone.make(tmp_path / host)
        for name in ("data", "models"):
            shutil.copytree(here / name, found[host].root / name, dirs_exist_ok=True)
        write_params(
            found[host].root,
            **{
                "launch": {"train": "torchrun", "processes": 2},
                "launch.checkpoint_minutes": 0.0,
                "profiles.mini.recipes.diva.steps": 12,
                "profiles.mini.recipes.diva.optimizer.lr": 0.05,
            },
        )
    return found


def start(host: str, clone: Clone) -> subprocess.Popen[str]:
    """What stage train becomes on this host."""
    address, device = HOSTS[host]
    clone.environment = {"GLOO_SOCKET_IFNAME": device, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torchrun = ["torchrun", "--nnodes=2", "--nproc-per-node=1", f"--local-addr={address}"]
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={HOSTS['a'][0]}:{PORT}", "--rdzv-id=test"]
    meet += [f"--rdzv-conf=is_host={int(host == 'a')},join_timeout={HANG}"]  # both have this machine's name
    return clone.start("ip", "netns", "exec", f"diva-{host}", *torchrun, *meet, "-m", "pipeline.train", "mini", "diva")


def ended(running: dict[str, subprocess.Popen[str]], status: int = 0) -> dict[str, str]:
    """What each host printed."""
    printed = {host: process.communicate(timeout=HANG)[0] for host, process in running.items()}
    for host, process in running.items():
        assert (process.returncode != 0) == (status != 0), printed[host]
    return printed


def test_two_hosts_train_as_one_process_and_go_on_after_one_has_died(
    clones: dict[str, Clone], here: Path, tmp_path: Path
) -> None:
    a, b = clones["a"].root, clones["b"].root
    alone = tmp_path / "alone"
    shutil.copytree(here, alone)
    shutil.copy(a / "params.yaml", alone)
    content = (alone / "params.yaml").read_text().replace("train: torchrun", "train: ''")
    (alone / "params.yaml").write_text(content)
    launch.finish(alone)

    ended({host: start(host, clone) for host, clone in clones.items()})
    undisturbed = outputs(a)
    expected = curves(alone)
    for name, values in curves(a).items():
        assert values == pytest.approx(expected[name], rel=1e-5 if name.endswith("/loss") else 1e-4), name
    assert outputs(b) == {}
    shutil.rmtree(a / MODELS / "diva")
    shutil.rmtree(a / "metrics/mini/train")

    running = {host: start(host, clone) for host, clone in clones.items()}
    checkpoint = a / MODELS / "diva/.mini.checkpoint"
    while not checkpoint.exists() and running["a"].poll() is None:
        time.sleep(0.01)
    for process in clones["b"].processes():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    ended(running, status=1)  # the other one misses it
    again = {host: start(host, clone) for host, clone in clones.items()}
    assert "going on after step" in ended(again)["a"]
    assert outputs(a) == undisturbed
    assert outputs(b) == {}


def test_a_host_with_other_code_is_refused_on_both(clones: dict[str, Clone]) -> None:
    with (clones["b"].root / "pipeline/diva/step.py").open("a") as file:
        file.write("\nFORGOTTEN = 1\n")
    running = {host: start(host, clone) for host, clone in clones.items()}
    for printed in ended(running, status=1).values():
        assert "differs from" in printed
        assert "in code" in printed
    assert outputs(clones["a"].root) == {}
