"""The whole pipeline through DVC, in temporary clones of this repository: two weights, and exhaustively all four.

By default stages of this process fill a clone, and DVC takes their outputs over; exhaustively `dvc repro` fills it.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import psutil
import pytest
from clones import LOCKS, LOSS_CURVE, WEIGHTS, Clone, stages_run
from shrunk import ROOT, read_yaml, run, run_every_stage, write_shards, write_yaml

from pipeline import export, train
from pipeline.core.outputs import write_json

pytestmark = pytest.mark.slow
Once = Callable[[str, Callable[[Path], None]], Path]
TRAIN = "pipeline/dvc.yaml:train@mini-diva"


@pytest.fixture(scope="session", params=[WEIGHTS[:2], pytest.param(WEIGHTS, marks=pytest.mark.exhaustive)], ids=len)
def weights(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


def finished_clone(once: Once, name: str, make: Callable[[Path], str]) -> Clone:
    """A clone that one of pytest's workers makes for all; `make` returns what its command printed."""

    def make_and_note(folder: Path) -> None:
        output = make(folder)
        (folder / ".dvc/tmp/output").write_text(output)

    folder = once(name, make_and_note)
    return Clone(folder, (folder / ".dvc/tmp/output").read_text())


@pytest.fixture(scope="session")
def reproduced(once: Once, weights: tuple[str, ...]) -> Clone:
    """In which every stage has run. Tests that change a clone copy it first."""

    def make(folder: Path) -> str:
        clone = Clone.make(folder, weights)
        if weights == WEIGHTS:
            return clone.run("dvc", "repro")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(clone.root)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            write_shards(Path("data/mini/images"), 12)  # `make repro` draws and fetches them
            Path("metrics/mini").mkdir()
            write_json(Path("metrics/mini/images.json"), {"downloaded": 12})
            run_every_stage(weights)
            for name in weights:
                run(export, "mini", name)
        return clone.run("dvc", "commit", "--force")

    return finished_clone(once, f"reproduced{len(weights)}", make)


@pytest.fixture(scope="session")
def changed(once: Once, reproduced: Clone, weights: tuple[str, ...]) -> Clone:
    """In which an experiment followed: another seed, and another rate."""

    def make(folder: Path) -> str:
        clone = reproduced.copy(folder)
        clone.commit("before")
        # DVC writes this rate as 5e-05, which YAML 1.1 reads as a string.
        rate = "profiles.mini.recipes.diva.optimizer.lr=0.00005"
        return clone.run("dvc", "exp", "run", "--set-param", "seed=3", "-S", rate)

    return finished_clone(once, f"changed{len(weights)}", make)


def by_dvc_alone(test: Callable) -> Callable:
    return pytest.mark.exhaustive(pytest.mark.parametrize("weights", [WEIGHTS], ids=len, indirect=True)(test))


def group(weights: str) -> str:
    return "" if weights == "pretrained" else "-controls" if "-" in weights else "-recipes"


def scored(*weights: str) -> set[str]:
    return {f"score{group(w)}@{benchmark}-mini-{w}" for benchmark in ("mmvp", "zeroshot") for w in weights}


def exported(*weights: str) -> set[str]:
    return {f"export{group(w)}@mini-{w}" for w in weights if "-" not in w}


def trained(weights: tuple[str, ...]) -> set[str]:
    return {"train@mini-diva", *(f"control@mini-{w}" for w in weights if "-" in w)}


@by_dvc_alone
def test_repro_from_nothing_makes_every_output_and_prints_the_table(
    reproduced: Clone, weights: tuple[str, ...]
) -> None:
    clone = reproduced
    imported = clone.run("python", "-c", "import pipeline; print(pipeline.__file__)")
    assert Path(imported.strip()) == clone.root / "pipeline" / "__init__.py"
    everything = {"plan", "input@images", "mmvp_vlm", "zeroshot_sets", "input@denoiser", "encoder@diva"}
    everything |= {"backbone@mini", "report"} | trained(weights) | scored(*weights) | exported(*weights)
    assert sorted(stages_run(clone.output)) == sorted(everything)
    assert all((clone.root / output).exists() for output in clone.md5())
    page, md5 = (clone.root / "metrics/mini/report.md").read_text(), clone.md5()
    named = {path for path in md5 if f"- {path}: {md5[path]}\n" in page}
    assert named == {path for path in md5 if re.match(r"(data|models)/mini/(?!export/|planned)", path)}
    _, table = clone.output.split("Running stage 'report':")
    assert "What feedback gained, and what it cost" in table
    status = clone.run("git", "status", "--porcelain").splitlines()
    assert status == ["?? dvc.lock", "?? metrics/mini/", "?? pipeline/dvc.lock"]


@by_dvc_alone
def test_an_experiment_runs_what_depends_on_it_and_is_compared(
    reproduced: Clone, changed: Clone, weights: tuple[str, ...]
) -> None:
    clone = changed
    rerun = scored(*weights[1:]) | exported(*weights[1:])  # a card has the scores of its weights alone
    assert set(stages_run(clone.output)) == rerun | trained(weights) | {"plan", "report"}
    made = json.loads((clone.root / "models/mini/diva/mini/diva.json").read_text())
    assert (made["seed"], made["recipe"]["optimizer"]["lr"]) == (3, 5e-05)
    first_losses = [(each.root / LOSS_CURVE).read_text().splitlines()[1] for each in (reproduced, changed)]
    assert first_losses[0] != first_losses[1]  # the rate has no part in them yet, the seed has

    assert re.search(r"^metrics/mini/train/mini-diva/metrics.json +loss_first_tenth +\S+ +\S+ +\S+$",
                     clone.run("dvc", "metrics", "diff"), re.MULTILINE)  # fmt: skip
    assert "mini.gain.diva.pairs_stock" in clone.run("dvc", "metrics", "diff", "--all")
    table = clone.run("dvc", "exp", "show", "--csv").splitlines()
    assert {"mini.gain.diva.pairs_stock", "loss_last_tenth"} <= set(re.split(r"[,:]", table[0]))

    clone.run("dvc", "plots", "show", "--out", ".dvc/tmp/plots")
    page = (clone.root / ".dvc/tmp/plots/index.html").read_text()
    assert LOSS_CURVE.removeprefix("metrics/mini/") in page
    assert all(f"{weights}: Camera Perspective" in page for weights in ("pretrained", "diva"))


@by_dvc_alone
def test_two_commits_are_compared(changed: Clone, tmp_path: Path) -> None:
    clone = changed.copy(tmp_path / "clone")
    clone.commit("after")
    output = clone.run("dvc", "metrics", "diff", "--json", "HEAD~1", "HEAD")
    between = json.loads(output.splitlines()[-1])  # before it stands that metrics of other weights are missing
    change = between["metrics/mini/train/mini-diva/metrics.json"]["loss_first_tenth"]
    assert change["diff"] == pytest.approx(change["new"] - change["old"]) != 0


def test_every_verb_of_dvc_ends_well(reproduced: Clone, tmp_path: Path) -> None:
    reproduced.copy(tmp_path / "clone").use_every_verb(tmp_path)


@pytest.mark.exhaustive
def test_clones_that_share_a_cache_take_over_what_no_lock_has(reproduced: Clone, tmp_path: Path) -> None:
    """By DVC's record of runs; the commit that the new clone has knows of no run.

    `dvc repro` records no stage that leaves figures to git, unless they are metrics or plots; `dvc commit` does.
    """
    clone, fresh = reproduced.copy(tmp_path / "clone"), Clone(tmp_path / "fresh")
    clone.run("dvc", "commit", "--force")
    clone.run("git", "clone", "--quiet", ".", str(fresh.root))
    assert not any((fresh.root / lock).exists() for lock in LOCKS)
    fresh.run("dvc", "cache", "dir", "--local", str(clone.root / ".dvc/cache"))
    always = {"zeroshot_sets", "report"}  # DVC records no stage with an output that persists
    assert set(stages_run(fresh.run("dvc", "repro"))) == always
    made = clone.md5()
    assert fresh.md5() == made | {path: md5 for path, md5 in fresh.md5().items() if path not in made}


@pytest.mark.exhaustive
def test_a_refused_run_of_profile_paper_leaves_mini_s_files(reproduced: Clone, tmp_path: Path) -> None:
    """The README's command, on a machine that reaches no server."""
    clone, made = reproduced.copy(tmp_path / "clone"), ("data/mini", "models/mini", "metrics/mini")
    clone.commit("run")
    clone.environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    (command,) = re.findall(r"^dvc exp run report .*", (ROOT / "README.md").read_text(), re.MULTILINE)
    said = clone.run(*shlex.split(command), status=255)
    assert stages_run(said) == ["plan"]
    assert "The files could not be located" in said
    assert clone.contents(*made) == reproduced.contents(*made) != {}


# ---------------------------------------------------------------------------------------------- kills and interruptions


def start_until(clone: Clone, written: str, *command: str) -> subprocess.Popen[str]:
    """Start DVC; it has come as far as to write this when the call returns."""
    dvc = clone.start("dvc", "repro", *command)
    while not (clone.root / written).exists():
        assert dvc.poll() is None, dvc.communicate()[0]
        time.sleep(0.002)
    return dvc


def printed_at_its_end(clone: Clone, dvc: subprocess.Popen[str]) -> str:
    """Wait until all has ended that DVC started; returns what it printed."""
    assert dvc.wait(300) != 0
    _, survivors = psutil.wait_procs(clone.processes(), 300)  # the stage, and what it started, end with DVC
    for process in survivors:
        process.kill()
    assert survivors == []
    return dvc.communicate()[0]


def test_a_killed_training_ends_with_the_same_bytes(
    reproduced: Clone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DVC is killed with a signal that it cannot catch, while a second training is refused."""
    clone, made = reproduced.copy(tmp_path / "clone"), ("models/mini/diva", "metrics/mini/train/mini-diva")
    content = read_yaml(clone.root / "params.yaml")
    write_yaml(clone.root / "params.yaml", content | {"seed": 3})
    undisturbed = clone.copy(tmp_path / "undisturbed")
    with chdir(undisturbed.root):
        run(train, "mini", "diva")

    dvc = start_until(clone, "metrics/mini/train/.mini-diva.partial", TRAIN)
    os.killpg(dvc.pid, signal.SIGSTOP)
    with chdir(clone.root), pytest.raises(SystemExit):
        run(train, "mini", "diva")
    refused = r"models/mini/diva/mini is being written by process (\d+) on .*pipeline/train.py"
    holder = re.search(refused, capsys.readouterr().err)
    assert holder
    assert int(holder[1]) in {process.pid for process in clone.processes()} - {dvc.pid}
    dvc.kill()
    os.killpg(dvc.pid, signal.SIGCONT)
    printed_at_its_end(clone, dvc)
    assert clone.contents(*made) == {}

    with chdir(clone.root):
        run(train, "mini", "diva")
    assert clone.contents(*made) == undisturbed.contents(*made) != reproduced.contents(*made)


@by_dvc_alone
@pytest.mark.usefixtures("interruptible")
def test_a_run_killed_and_interrupted_ends_with_the_same_bytes(
    reproduced: Clone, weights: tuple[str, ...], tmp_path: Path
) -> None:
    """From nothing: DVC killed while img2dataset's processes fetch, a stage interrupted, another killed with DVC."""
    clone, left = Clone.make(tmp_path, weights), []

    dvc = start_until(clone, "data/mini/.images.partial", "pipeline/dvc.yaml:input@images")
    os.killpg(dvc.pid, signal.SIGSTOP)
    refused = clone.run("python", "-m", "pipeline.images", status=1)
    assert re.search(r"data/mini/images is being written by process \d+ on .*pipeline/images.py", refused)
    assert f"(PID {dvc.pid}): " in clone.run("dvc", "repro", status=255)
    dvc.kill()
    os.killpg(dvc.pid, signal.SIGCONT)  # a process that the stage has just started is still stopped: let it notice
    printed_at_its_end(clone, dvc)
    left.append(clone.contents("data", "models", "metrics"))

    dvc = start_until(clone, "data/mini/.denoiser.partial", "pipeline/dvc.yaml:input@denoiser")
    os.killpg(dvc.pid, signal.SIGINT)
    assert "interrupted: no unfinished output is left" in printed_at_its_end(clone, dvc)
    left.append(clone.contents("data", "models", "metrics"))

    dvc = start_until(clone, "metrics/mini/train/.mini-diva.partial")
    os.killpg(dvc.pid, signal.SIGKILL)
    printed_at_its_end(clone, dvc)
    left.append(clone.contents("data", "models", "metrics"))

    assert stages_run(clone.run("dvc", "repro"))[0] == "train@mini-diva"
    expected = reproduced.contents(*LOCKS, "data", "models", "metrics")
    assert clone.contents(*LOCKS, "data", "models", "metrics") == expected
    assert all(contents.items() <= expected.items() for contents in left)
