"""What all tests share. Imports of the pipeline stand in the fixtures: the process that hands out tests needs none."""

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # on a busy machine, waiting for a second thread takes far longer than tiny tensors
os.environ["DVC_NO_ANALYTICS"] = "1"  # else every command of DVC starts one more, which asks the network
import pipeline  # noqa: F401, I001  (its pins come before numpy and torch)
import pytest
from filelock import FileLock


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is exhaustive is slow, too, and so is what needs a folder in which every stage has run."""
    for item in items:
        if item.get_closest_marker("exhaustive") or "finished" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Accelerate collects garbage around every training: spare it the hundred thousands of objects of the imports."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Let the first of pytest's workers that asks make a folder for all of them; tests only read it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "popen-gw" in base.name else base

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, making = shared / name, shared / f"{name}.making"
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                shutil.rmtree(making, ignore_errors=True)
                make(making)
                making.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def finished(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A folder in which every stage has run."""
    from shrunk import run_every_stage, write_params, write_shards

    def make(folder: Path) -> None:
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            write_params()
            write_shards(Path("data/mini/images"), 12)  # their stage has tests of its own
            run_every_stage()

    return once("finished", make)


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in, with nothing trained yet."""
    from shrunk import copy_untrained

    folder = copy_untrained(finished, tmp_path / "copy")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let what a test starts be interrupted: a test run in the background would pass on that it ignores this."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
