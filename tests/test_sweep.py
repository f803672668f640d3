"""What the table of seeds keeps, takes up and leaves out, and the loop over `dvc exp run` in a pipeline of seconds."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from shrunk import read_yaml, run_of, write_params

from pipeline.core.outputs import write_json
from pipeline.core.stages import UserError
from pipeline.evidence.provenance import run
from pipeline.evidence.results import COLUMNS, PAIRS, seeds_table
from pipeline.sections import params
from pipeline.tools import sweep

ROOT = Path(__file__).parents[1]
TABLE = Path("metrics/seeds/mini.csv")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add(
    seed: int,
    gain: float,
    names: tuple[str, ...] = ("diva", "diva-shuffled", "diva-drift"),
    columns: Iterable[str] = COLUMNS,
    **changes: Any,
) -> None:
    """Let a run end that found this gain in all of these columns, and add it to the table."""
    write_params(seed=seed, **changes)
    Path("metrics/mini").mkdir(parents=True, exist_ok=True)
    write_json(
        Path("metrics/mini/report.json"), {"mini": {"gain": {name: dict.fromkeys(columns, gain) for name in names}}}
    )
    sweep.add(params.load(), Path("metrics/mini/report.json").read_text())


def found(weights: str = "diva") -> list[tuple[str, int, float]]:
    table = seeds_table("mini")
    rows = table[table.weights == weights]
    return list(zip(rows.recipe, rows.seed, rows.pairs_stock, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_a_table_grows_and_a_seed_counts_once(capsys: pytest.CaptureFixture[str]) -> None:
    add(42, 1.0)
    add(3, 2.0)
    written = TABLE.read_text()
    add(3, 2.5)  # another machine rounds differently: what stands there stays
    assert TABLE.read_text() == written
    assert found() == [("diva", 3, 2.0), ("diva", 42, 1.0)]
    table = pd.read_csv(TABLE, dtype={"run": str})
    assert list(table.columns) == ["backbone", "recipe", "weights", "seed", *COLUMNS, "run"]
    assert set(table.run) == {run("mini", "mini", "diva")}
    assert [*table.weights] == [w for w in ("diva", "diva-shuffled", "diva-drift") for _ in range(2)]
    merged = written + "".join(line.replace("2.0", "2.5") for line in written.splitlines(True)[1:])  # by git, say
    TABLE.write_text(merged)
    assert found() == [("diva", 3, 2.0), ("diva", 42, 1.0)]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("launch.checkpoint_minutes", 7, True),
        ("profiles.mini.mllm.seeds", 7, True),
        ("profiles.mini.segmentation_sets.test", 7, True),
        ("profiles.mini.recipes.two_stage.steps", 7, True),
        ("profiles.paper.mmvp.draws", 7, True),
        ("run.controls", [], True),
        ("run.recipes", ["diva", "two_stage"], True),
        ("profiles.mini.recipes.diva.steps", 7, False),
        ("profiles.mini.mmvp.draws", 7, False),
        ("profiles.mini.images.count", 7, False),
        ("backbones.mini.source.text_tower.steps", 7, False),
    ],
)
def test_rows_of_other_parameters_make_room_and_it_is_said(
    key: str, value: Any, same: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    add(1, 1.0)
    add(2, 2.0, **{key: value})
    assert found() == ([("diva", 1, 1.0)] if same else []) + [("diva", 2, 2.0)]
    said = "removed 3 rows of mini, diva: they are of other code or parameters"
    assert (said in capsys.readouterr().out) == (not same)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_a_seed_without_a_benchmark_s_figures_is_run_again_and_gets_them() -> None:
    pairs = {"run.benchmarks": ["mmvp"]}
    add(1, 1.0, columns=PAIRS, **pairs)
    assert sweep.seeds_to_run(params.load(), [1]) == []
    names = {sweep.name_of(params.load(), sweep.runs(params.load()), 1)}
    write_params()
    assert sweep.seeds_to_run(params.load(), [1]) == [1]
    names.add(sweep.name_of(params.load(), sweep.runs(params.load()), 1))
    add(1, 2.0)
    assert sweep.seeds_to_run(params.load(), [1]) == []
    table = seeds_table("mini")
    assert len(table) == 3
    assert table[[*PAIRS]].eq(1).all(axis=None)
    assert table[[column for column in COLUMNS if column not in PAIRS]].eq(2).all(axis=None)
    write_params(**{"run.controls": []})
    names.add(sweep.name_of(params.load(), sweep.runs(params.load()), 1))
    assert len(names) == 3  # an experiment without a control or a benchmark is not taken for one with it


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_rows_of_another_recipe_or_backbone_stay(capsys: pytest.CaptureFixture[str]) -> None:
    add(1, 1.0)
    row = TABLE.read_text().splitlines()[1].replace("mini,", "openai_224,")
    unnamed = row.replace("224,", "336,").rpartition(",")[0] + ","  # a row that names no run
    TABLE.write_text(TABLE.read_text() + f"{row}\n{unnamed}\n")
    add(1, 2.0, ("two_stage", "two_stage-drift"), **{"run.recipes": ["two_stage"]})
    assert found() == [("diva", 1, 1.0)] * 3
    assert found("two_stage") == found("two_stage-drift") == [("two_stage", 1, 2.0)]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_what_is_missing_is_what_no_row_of_this_run_has() -> None:
    add(1, 1.0)
    add(2, 1.0, names=("diva", "diva-shuffled"))
    assert sweep.seeds_to_run(params.load(), [3, 1, 2]) == [3, 2]
    write_params(**run_of(["diva", "diva-shuffled"]))
    assert sweep.seeds_to_run(params.load(), [3, 1, 2]) == [3]
    write_params(**run_of(["diva", "two_stage"]))
    assert sweep.seeds_to_run(params.load(), [3, 1, 2]) == [3, 1, 2]
    add(2, 1.0, names=("diva", "two_stage"), **run_of(["diva", "two_stage"]))
    assert sweep.seeds_to_run(params.load(), [3, 1, 2]) == [3, 1]
    write_params(**{"profiles.mini.recipes.diva.steps": 7})
    assert sweep.seeds_to_run(params.load(), [3, 1, 2]) == [3, 1, 2]


def test_seeds_are_ranges_and_lists() -> None:
    assert sweep.parse_seeds("42,1..3,2") == [42, 1, 2, 3]
    for wrong in ("", "3..1", "a", "1..", "-1"):
        with pytest.raises(sweep.argparse.ArgumentTypeError, match="wanted seeds such as"):
            sweep.parse_seeds(wrong)


TRAIN = """
import json, pathlib, time, yaml
p = yaml.safe_load(open("params.yaml"))
if pathlib.Path("trap").exists() and p["seed"] == 2:
    raise SystemExit(3)
if p["seed"] == 9:
    pathlib.Path("waiting").touch()
    time.sleep(600)
pathlib.Path("runs").open("a").write(f"{p['seed']}\\n")
folder = pathlib.Path("metrics/mini/train/mini-diva")
folder.mkdir(parents=True, exist_ok=True)
(folder / "metrics.json").write_text(json.dumps({"seed": p["seed"]}))
"""
REPORT = f"""
import json, pathlib
seed = json.load(open("metrics/mini/train/mini-diva/metrics.json"))["seed"]
seeds = len(open("metrics/seeds/mini.csv").readlines())
gain = dict.fromkeys({list(COLUMNS)}, seed / 10)
pathlib.Path("metrics/mini/report.json").write_text(json.dumps({{"mini": {{"gain": {{"diva": gain}}}}}}))
pathlib.Path("metrics/mini/seen").write_text(str(seeds))
"""
PIPELINE = """
stages:
  train:
    cmd: python pipeline/train.py
    deps: [pipeline/train.py]
    params: [seed]
    metrics: [metrics/mini/train/mini-diva/metrics.json: {cache: false}]
  report:
    cmd: python pipeline/report.py
    deps: [pipeline/report.py, metrics/mini/train/mini-diva/metrics.json, metrics/seeds/mini.csv]
    outs: [metrics/mini/seen: {cache: false}]
    metrics: [metrics/mini/report.json: {cache: false}]
  export:
    cmd: cp metrics/mini/report.json exported && echo >>exports
    deps: [metrics/mini/report.json]
    outs: [exported: {cache: false}]
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """One with a pipeline of seconds that has run, to work in; its params.yaml."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "tests")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "tests@localhost")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")

    def do(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    for folder in ("pipeline", "metrics/seeds", "metrics/mini"):
        Path(folder).mkdir(parents=True)
    Path("pipeline/train.py").write_text(TRAIN)
    Path("pipeline/report.py").write_text(REPORT)
    Path("dvc.yaml").write_text(PIPELINE)
    write_params(**run_of(["diva"]))
    parameters = Path("params.yaml").read_bytes() + b"# kept as it is\n"
    Path("params.yaml").write_bytes(parameters)
    TABLE.write_text(",".join(["backbone", "recipe", "weights", "seed", *COLUMNS, "run"]) + "\n")
    Path(".dvc").mkdir()
    Path(".dvc/config").touch()
    Path(".gitignore").write_text("runs\nran\nexports\ntrap\nwaiting\n/.dvc/cache\n/.dvc/tmp\n")
    do("git", "init", "--quiet")
    do(*sweep.DVC, "repro", "--quiet")
    do("git", "add", "--all")
    do("git", "commit", "--quiet", "--message", "first")
    return parameters


@pytest.mark.slow
def test_a_sweep_goes_on_and_leaves_the_workspace_as_it_was(
    repository: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = repository
    Path("trap").touch()
    with pytest.raises(sweep.UserError, match="seed 2: `dvc exp run` ended with status"):
        sweep.sweep(params.load(), [1, 2])
    assert Path("params.yaml").read_bytes() == parameters
    Path("trap").unlink()
    result = sweep.sweep(params.load(), [1, 2])
    assert "1 are there, 1 to run" in capsys.readouterr().out
    assert result.seed.tolist() == [1, 2, 42]
    assert result.pairs_stock.tolist() == [0.1, 0.2, 4.2]
    assert Path("runs").read_text().split() == ["42", "1", "2"]  # and the workspace's own came from DVC's memory
    assert Path("params.yaml").read_bytes() == parameters
    assert json.loads(Path("metrics/mini/report.json").read_text())["mini"]["gain"]["diva"]["probe"] == 4.2
    assert Path("metrics/mini/seen").read_text() == "4"  # the report saw the new table
    assert Path("exports").read_text() == "\n"  # no seed is exported but the workspace's own
    written = TABLE.read_bytes()
    assert pd.read_csv(TABLE).seed.tolist() == [1, 2, 42]
    sweep.show(result)
    assert "1,2,42" in capsys.readouterr().out
    assert sweep.sweep(params.load(), [1, 2]).seed.tolist() == [1, 2, 42]
    assert Path("runs").read_text().split() == ["42", "1", "2"]
    assert TABLE.read_bytes() == written


@pytest.mark.exhaustive
def test_a_killed_sweep_leaves_no_process_and_the_parameters(
    repository: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # else the folder `pipeline` here hides the package
    killed = subprocess.Popen([sys.executable, "-m", "pipeline.tools.sweep", "--seeds", "9"], stdout=subprocess.DEVNULL)
    while not Path("waiting").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    started = psutil.Process(killed.pid).children(recursive=True)
    assert read_yaml(Path("params.yaml"))["seed"] == 9
    killed.kill()
    _, survivors = psutil.wait_procs(started, 60)  # DVC, its stage, and who puts params.yaml right
    for process in survivors:
        process.kill()
    assert survivors == []
    assert Path("params.yaml").read_bytes() == repository


@pytest.mark.exhaustive
def test_side_by_side_gives_the_table_of_one_after_the_other(
    repository: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in a folder and on a GPU of its own; one that fails costs no other, and runs again alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    program = Path("pipeline/train.py")
    fails = f'import os\nopen({str(Path("ran").resolve())!r}, "a").write(os.environ["CUDA_VISIBLE_DEVICES"] + "\\n")\n'
    program.write_text(TRAIN.replace('pathlib.Path("trap")', f"pathlib.Path({str(Path('trap').resolve())!r})") + fails)
    for command in (["git", "add", "--all"], ["git", "commit", "--quiet", "--message", "second"]):
        subprocess.run(command, check=True)
    Path("trap").touch()
    with pytest.raises(sweep.UserError, match="failed for seed 2 with status"):
        sweep.sweep(params.load(), [1, 2, 3, 4], at_once=2)
    assert set(Path("ran").read_text().split()) == {"5", "7"}
    assert Path("params.yaml").read_bytes() == repository
    Path("trap").unlink()
    count = len(Path("ran").read_text().split())
    result = sweep.sweep(params.load(), [1, 2, 3, 4], at_once=2)
    assert "3 are there, 1 to run" in capsys.readouterr().out
    assert len(Path("ran").read_text().split()) == count + 2  # seed 2, and the workspace's own
    side_by_side = TABLE.read_bytes()
    assert result.seed.tolist() == [1, 2, 3, 4, 42]
    TABLE.write_text(side_by_side.decode().splitlines()[0] + "\n")
    capsys.readouterr()
    sweep.sweep(params.load(), [1, 2, 3, 4])
    assert "seeds 1, 2, 3, 4: taken up from experiments that have run" in capsys.readouterr().out
    assert TABLE.read_bytes() == side_by_side
    TABLE.write_text(side_by_side.decode().splitlines()[0] + "\n")
    for name in subprocess.check_output([*sweep.DVC, "exp", "list", "--name-only"], text=True).split():
        subprocess.run([*sweep.DVC, "exp", "remove", name], check=True)
    sweep.sweep(params.load(), [1, 2, 3, 4])
    assert TABLE.read_bytes() == side_by_side


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_a_slurm_array_has_a_task_for_each_missing_seed() -> None:
    add(2, 1.0)
    written = sweep.array(params.load(), [1, 2, 3])
    assert "#SBATCH --array 1,3\n" in written
    name = sweep.name_of(params.load(), sweep.runs(params.load()), 7).removesuffix("7")
    assert f"dvc exp run report --temp --name {name}$SLURM_ARRAY_TASK_ID -S seed=$SLURM_ARRAY_TASK_ID >" in written
    subprocess.run(["bash", "-n"], input=written, text=True, check=True)
    with pytest.raises(UserError, match="seeds 2 are all there"):
        sweep.array(params.load(), [2])
