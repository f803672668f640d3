"""The whole pipeline through DVC, on a mini world shrunk further, in temporary clones of this repository.

A clone holds copies of the files that git tracks or would track, and runs the virtual environment's own `dvc`.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from clones import LOCKS, LOSS_CURVE, WEIGHTS, Clone, stages_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Clone]]:
    """Start one `dvc repro`; call for the clone when it has ended. Tests that change that clone copy it first."""
    clone = Clone.make(tmp_path_factory.mktemp("undisturbed"))
    dvc = clone.start("dvc", "repro")

    @cache
    def ended() -> Clone:
        clone.output, _ = dvc.communicate(timeout=300)
        assert dvc.returncode == 0, clone.output
        return clone

    yield ended
    with suppress(ProcessLookupError):
        os.killpg(dvc.pid, signal.SIGKILL)


def test_a_run_killed_and_interrupted_ends_with_the_same_bytes(
    undisturbed: Callable[[], Clone], tmp_path: Path
) -> None:
    clone, left = Clone.make(tmp_path), []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background would pass on "ignore"

    def stop_once_written(partial: str, stop: Callable[[subprocess.Popen[str]], None]) -> str:
        dvc = clone.start("dvc", "repro")
        while not (clone.root / partial).exists():
            assert dvc.poll() is None, dvc.communicate()[0]
            time.sleep(0.002)
        stop(dvc)
        assert dvc.wait(10) != 0
        end = time.monotonic() + 20  # a process of img2dataset looks for its parent once it has imported what it needs
        while (survivors := clone.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        for process in survivors:
            process.kill()
        assert survivors == []  # the stage, and what it started, end with DVC
        output, _ = dvc.communicate()
        left.append(clone.contents("data", "models", "metrics"))
        return output

    def refuse_a_second_writer_then_kill_dvc(dvc: subprocess.Popen[str]) -> None:
        os.killpg(dvc.pid, signal.SIGSTOP)
        refused = clone.run("python", "-m", "pipeline.images", status=1)
        assert re.search(r"data/mini/images is being written by process \d+ on .*pipeline/images.py", refused)
        assert f"(PID {dvc.pid}): " in clone.run("dvc", "repro", status=255)
        dvc.kill()
        os.killpg(dvc.pid, signal.SIGCONT)  # a process that the stage has just started is still stopped: let it notice

    stop_once_written("data/mini/.images.partial", refuse_a_second_writer_then_kill_dvc)
    output = stop_once_written("models/mini/.denoiser.partial", lambda dvc: os.killpg(dvc.pid, signal.SIGINT))
    assert "interrupted: nothing unfinished is left behind" in output
    stop_once_written("metrics/mini/train/.mini-diva.partial", lambda dvc: os.killpg(dvc.pid, signal.SIGKILL))
    assert stages_run(clone.run("dvc", "repro"))[0] == "train@mini"

    expected = undisturbed().contents(*LOCKS, "data", "models", "metrics")
    assert clone.contents(*LOCKS, "data", "models", "metrics") == expected
    assert all(contents.items() <= expected.items() for contents in left)


def test_repro_from_nothing_makes_every_output_and_prints_the_table(undisturbed: Callable[[], Clone]) -> None:
    clone = undisturbed()
    imported = clone.run("python", "-c", "import pipeline; print(pipeline.__file__)")
    assert Path(imported.strip()) == clone.root / "pipeline" / "__init__.py"
    everything = [
        "plan", "images", "mmvp_vlm", "zeroshot_sets", "denoiser", "backbone@mini", "train@mini",
        "shuffled@mini", "drift@mini", "report",
        *(f"{scoring}@mini-{weights}" for scoring in ("mmvp", "zeroshot", "export") for weights in WEIGHTS),
    ]  # fmt: skip
    assert sorted(stages_run(clone.output)) == sorted(everything)
    assert all((clone.root / output).exists() for output in clone.md5())
    page, md5 = (clone.root / "metrics/mini/report.md").read_text(), clone.md5()
    named = {path for path in md5 if f"- {path}: {md5[path]}\n" in page}
    assert named == {path for path in md5 if re.match(r"(data|models)/mini/(?!export/)", path)}
    _, table = clone.output.split("Running stage 'report':")
    assert "What feedback gained, and what it cost" in table
    assert clone.run("git", "status", "--porcelain").split() == [
        "??",
        "dvc.lock",
        "??",
        "metrics/mini/",
        "??",
        LOCKS[1],
    ]


def test_a_second_repro_runs_nothing_within_five_seconds(undisturbed: Callable[[], Clone]) -> None:
    clone = undisturbed()
    assert "released@mini" in clone.run("dvc", "status")  # which nobody asked for
    assert clone.run("dvc", "status", "--with-deps", "report").strip() == "Data and pipelines are up to date."
    start = time.monotonic()
    assert stages_run(clone.run("dvc", "repro")) == []
    assert time.monotonic() - start < 5


def test_an_experiment_runs_what_depends_on_it_and_is_compared(
    undisturbed: Callable[[], Clone], tmp_path: Path
) -> None:
    clone = undisturbed().copy(tmp_path / "clone")
    clone.commit("before")
    before = clone.contents("metrics")
    # DVC writes this rate as 5e-05, which YAML 1.1 reads as a string.
    output = clone.run(
        "dvc", "exp", "run", "--set-param", "seed=3", "-S", "profiles.mini.recipes.diva.optimizer.lr=0.00005"
    )
    rerun = {f"{scoring}@mini-{weights}" for scoring in ("mmvp", "zeroshot") for weights in WEIGHTS[1:]}
    rerun |= {f"export@mini-{weights}" for weights in WEIGHTS}  # a card has the scores, and the seed
    assert set(stages_run(output)) == rerun | {"train@mini", "shuffled@mini", "drift@mini", "report"}
    made = json.loads((clone.root / "models/mini/diva/mini/diva.json").read_text())
    assert (made["seed"], made["recipe"]["optimizer"]["lr"]) == (3, 5e-05)
    first_losses = [files[LOSS_CURVE].splitlines()[1] for files in (before, clone.contents("metrics"))]
    assert first_losses[0] != first_losses[1]  # the rate has no part in them yet, the seed has

    assert re.search(r"^metrics/mini/train/mini-diva/metrics.json +loss_first_tenth +\S+ +\S+ +\S+$",
                     clone.run("dvc", "metrics", "diff"), re.MULTILINE)  # fmt: skip
    assert "mini.gain.pairs_plain" in clone.run("dvc", "metrics", "diff", "--all")
    table = clone.run("dvc", "exp", "show", "--csv").splitlines()
    assert {"mini.gain.pairs_plain", "loss_last_tenth"} <= set(re.split(r"[,:]", table[0]))

    clone.run("dvc", "plots", "show", "--out", "plots")
    page = (clone.root / "plots" / "index.html").read_text()
    assert LOSS_CURVE.removeprefix("metrics/mini/") in page
    assert all(f"{weights}: Camera Perspective" in page for weights in ("pretrained", "diva"))

    clone.commit("after")
    between = json.loads(clone.run("dvc", "metrics", "diff", "--json", "HEAD~1", "HEAD"))
    change = between["metrics/mini/train/mini-diva/metrics.json"]["loss_first_tenth"]
    assert change["diff"] == pytest.approx(change["new"] - change["old"]) != 0
