"""What all tests share."""

import os
import shutil
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # on a busy machine, waiting for a second thread takes far longer than tiny tensors
import pipeline  # noqa: F401, I001  (its pins come before numpy and torch)
import pytest
from filelock import FileLock
from shrunk import METRICS, MODELS, run_every_stage


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is exhaustive is slow, too."""
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all of pytest's workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "popen-gw" in base.name else base


@pytest.fixture(scope="session")
def finished(once: Path) -> Path:
    """A folder in which every stage has run, made by the first worker that asks; tests only read it."""
    folder = once / "finished"
    with FileLock(once / "finished.lock"):
        if not folder.exists():
            making = once / "finished.making"
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(making)
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
                run_every_stage()
            making.rename(folder)
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in, with nothing trained yet."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    for weights in ("diva", "shuffled", "drift"):
        shutil.rmtree(folder / MODELS / weights)
    shutil.rmtree(folder / METRICS / "train")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return folder
