"""A stage lives as long as the process that started it, whoever is process 1 and whoever adopts orphans."""

import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from clones import Clone
from shrunk import ROOT

HANG = 600  # seconds: only a hang takes as long
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]
PROGRAMS = {
    "stage.py": """
import sys, time
from pathlib import Path
import psutil  # which looks for parts of its own of the real system
sys.platform = sys.argv[1]
from pipeline.core.stages import stage
def main(platform):
    Path("running").touch()
    while not Path("end").exists():
        time.sleep(0.01)
stage(main)()
""",
    # DVC's part: a shell that becomes the stage, but as late as it is told to
    "parent.py": """
import subprocess, sys
shell = 'by=$PPID; touch shell; until test -e go; do sleep 0.01; done; exec env STARTED_BY=$by "$@"'
sys.exit(subprocess.run(["sh", "-c", shell, "sh", sys.executable, "stage.py", sys.argv[1]]).returncode)
""",
    # Adopts orphans, as `tini -s`, systemd and container runtimes do, or as process 1 of a namespace
    "reaper.py": """
import ctypes, os, subprocess, sys
subreaper = 36
assert ctypes.CDLL(None).prctl(subreaper, 1) == 0
started = subprocess.Popen([sys.executable, "parent.py", sys.argv[1]])
status = {}
while True:
    try:
        pid, status[pid] = os.wait()
    except ChildProcessError:
        sys.exit(os.waitstatus_to_exitcode(status[started.pid]) & 0xFF)
""",
}


def may_make_namespaces() -> bool:
    return bool(shutil.which("unshare")) and not subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode


TREES = {
    "plain": ["parent.py"],
    "adopted": ["reaper.py"],
    "process 1": [*NAMESPACE, "parent.py"],
    "adopted by process 1": [*NAMESPACE, "reaper.py"],
}


@pytest.fixture(params=TREES)
def tree(request: pytest.FixtureRequest) -> list[str]:
    *around, program = TREES[request.param]
    if around and not may_make_namespaces():
        pytest.skip("this user may not make PID namespaces")
    return [*around, sys.executable, program]


class Family:
    """The processes of a test, which work in its folder."""

    def __init__(self, folder: Path, command: list[str], platform: str = sys.platform) -> None:
        self.folder = folder
        for name, text in PROGRAMS.items():
            (folder / name).write_text(text)
        self.first = subprocess.Popen(
            [*command, platform], cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def members(self, name: str = "") -> list[psutil.Process]:
        found = psutil.process_iter(["cwd", "cmdline"])
        inside = [process for process in found if process.info["cwd"] == str(self.folder.resolve())]
        return [process for process in inside if any(name in word for word in process.info["cmdline"] or ())]

    def await_file(self, name: str) -> None:
        limit = time.monotonic() + HANG
        while not (self.folder / name).exists():
            assert self.first.poll() is None, self.first.communicate()[1]
            assert time.monotonic() < limit
            time.sleep(0.01)

    def kill_parent(self) -> None:
        (parent,) = [p for p in self.members("parent.py") if "unshare" not in p.cmdline()]
        parent.kill()
        with suppress(psutil.NoSuchProcess):  # it is gone
            while parent.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)

    def said(self) -> str:
        """Wait until all have ended; returns what they said."""
        others = [process for process in self.members() if process.pid != self.first.pid]
        _, left = psutil.wait_procs(others, HANG)
        for process in left:
            process.kill()
        assert left == []
        return self.first.communicate(timeout=HANG)[1]


def test_a_stage_runs_to_its_end(tree: list[str], tmp_path: Path) -> None:
    family = Family(tmp_path, tree)
    for name in ("go", "end"):
        (tmp_path / name).touch()
    assert "error" not in family.said()
    assert family.first.returncode == 0
    assert (tmp_path / "running").exists()


def test_a_stage_whose_parent_is_killed_ends(tree: list[str], tmp_path: Path) -> None:
    family = Family(tmp_path, tree)
    (tmp_path / "go").touch()
    family.await_file("running")
    family.kill_parent()
    assert "error" not in family.said()
    assert family.first.returncode != 0


@pytest.mark.slow
def test_a_stage_whose_parent_was_killed_before_it_started_says_so(tmp_path: Path) -> None:
    """Whoever adopted it, it neither works on nor waits."""
    family = Family(tmp_path, [sys.executable, "reaper.py"])
    family.await_file("shell")
    family.kill_parent()
    (tmp_path / "go").touch()
    said = family.said()
    assert "which started this stage, ended while the stage was starting" in said
    assert not (tmp_path / "running").exists()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_without_a_signal_at_the_parent_s_death_it_is_watched(killed: bool, tmp_path: Path) -> None:
    """As on macOS."""
    family = Family(tmp_path, [sys.executable, "parent.py"], "darwin")
    (tmp_path / "go").touch()
    family.await_file("running")
    if killed:
        family.kill_parent()
    else:
        (tmp_path / "end").touch()
    assert "error" not in family.said()
    assert (family.first.returncode == 0) != killed


@pytest.mark.slow
def test_dvc_as_process_1_of_a_container(tmp_path: Path) -> None:
    if not may_make_namespaces():
        pytest.skip("this user may not make PID namespaces")
    clone = Clone.make(tmp_path)
    clone.run(*NAMESPACE, "dvc", "repro", "--force", "--single-item", "pipeline/dvc.yaml:plan")
    assert (clone.root / "data/mini/planned").exists()
