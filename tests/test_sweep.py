"""Which results count as the same run with another seed, and the loop over `dvc exp run` in a pipeline of seconds."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pipeline.evidence.results import COLUMNS
from pipeline.tools import sweep
from pipeline.tools.sweep import Result


def data(seed: int, gain: float, **changes: dict) -> dict:
    """What `dvc exp show --json` says of one revision, as far as it is read."""
    report = {"mini": {name: dict.fromkeys(COLUMNS, gain) for name in ("gain", "gain_shuffled", "gain_drift")}}
    found = {
        "params": {
            "params.yaml": {
                "data": {
                    "seed": 0,
                    "profiles": {"mini": {"lr": 1, "train": {"recipe": "diva"}}},
                    "backbones": {"mini": {"a": 1}},
                }
            }
        },
        "deps": {"pipeline/train.py": {"hash": "t"}, "pipeline/report.py": {"hash": "r"}, "data/x": {"hash": "d"}},
        "metrics": {
            "metrics/mini/report.json": {"data": report},
            "metrics/mini/train/mini-diva/metrics.json": {"data": {"seed": seed}},
        },
    }
    for section, change in changes.items():
        found[section] = found[section] | change
    return found


def results(*states: tuple[str, dict]) -> list[Result]:
    return [Result.of(name, state) for name, state in states]


WORKSPACE = ("workspace", data(42, 1.0))


def rows(*others: tuple[str, dict]) -> list[tuple[int, float, str]]:
    """(seed, gain, revision) of diva."""
    table = sweep.table(results(WORKSPACE, *others), "mini", ["mini"])
    found = table[table.weights == "diva"]
    return list(zip(found.seed, found.pairs_plain, found.revision, strict=True))


def test_results_of_the_same_run_count_by_the_seed_that_training_noted() -> None:
    found = rows(("c1", data(42, 1.0)), ("c2", data(3, 2.0)), ("exp", data(1, 3.0)))
    assert found == [(1, 3.0, "exp"), (3, 2.0, "c2"), (42, 1.0, "c1")]
    assert rows() == [(42, 1.0, "workspace")]
    assert rows(("c1", data(5, 9.0)), ("c2", data(5, 9.0)), ("c3", data(5, 8.0))) == [
        (5, 9.0, "c1"),
        (5, 8.0, "c3"),
        (42, 1.0, "workspace"),
    ]  # fmt: skip  (another processor rounds differently)


def recipe(profile: dict, backbone: dict, **others: dict) -> dict:
    profiles = {"mini": {"train": {"recipe": "diva"}} | profile}
    return {"params": {"params.yaml": {"data": {"profiles": profiles, "backbones": {"mini": backbone} | others}}}}


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"deps": {"pipeline/train.py": {"hash": "other"}}}, False),
        ({"deps": {"pipeline/diva/pixels.py": {"hash": "more"}}}, False),
        (recipe({"lr": 2}, {"a": 1}), False),
        (recipe({"lr": 1}, {"a": 2}), False),
        (recipe({"lr": 1, "train": {"recipe": "other"}}, {"a": 1}), False),
        (recipe({"lr": 1}, {"a": 1}, other={}), True),
        ({"deps": {"pipeline/report.py": {"hash": "other"}, "data/x": {"hash": "other"}}}, True),
        ({"deps": {"pipeline/evidence/figures.py": {"hash": "other"}}}, True),
        ({"metrics": {"metrics/mini/train/mini-diva/metrics.json": {}}}, False),
        ({"metrics": {"metrics/mini/report.json": {"error": {}}}}, False),
    ],
)  # fmt: skip
def test_what_makes_it_another_run(changes: dict, counts: bool) -> None:
    assert ((1, 5.0, "other") in rows(("other", data(1, 5.0, **changes)))) == counts


def test_the_table_is_sorted_and_names_what_is_missing() -> None:
    without_drift = copy.deepcopy(data(2, 4.0))
    del without_drift["metrics"]["metrics/mini/report.json"]["data"]["mini"]["gain_drift"]
    table = sweep.table(results(WORKSPACE, ("c", without_drift), ("d", data(7, 3.0))), "mini", ["mini"])
    assert list(table.columns) == ["backbone", "recipe", "weights", "seed", *COLUMNS, "revision"]
    assert set(table.recipe) == {"diva"}
    assert list(zip(table.weights, table.seed, strict=True)) == [
        ("diva", 2), ("diva", 7), ("diva", 42), ("shuffled", 2), ("shuffled", 7), ("shuffled", 42),
        ("drift", 7), ("drift", 42),
    ]  # fmt: skip
    assert sweep.missing(table, ["mini"], [1, 2, 42]) == [1]
    assert sweep.missing(table, ["mini", "other"], [2]) == [2]


def test_seeds_are_ranges_and_lists() -> None:
    assert sweep.parse_seeds("42,1..3,2") == [42, 1, 2, 3]
    for wrong in ("", "3..1", "a", "1..", "-1"):
        with pytest.raises(sweep.argparse.ArgumentTypeError, match="wanted seeds such as"):
            sweep.parse_seeds(wrong)


TRAIN = """
import json, pathlib, yaml
p = yaml.safe_load(open("params.yaml"))
if pathlib.Path("trap").exists() and p["seed"] == 2:
    raise SystemExit(3)
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
pathlib.Path("metrics/mini/report.json").write_text(json.dumps({{"mini": {{"gain": gain}}}}))
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
"""


@pytest.mark.slow
def test_a_sweep_goes_on_and_leaves_the_workspace_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    parameters = b"seed: 42   # kept as it is\nprofiles: {mini: {train: {recipe: diva}}}\nbackbones: {mini: {}}\n"
    Path("params.yaml").write_bytes(parameters)
    Path("metrics/seeds/mini.csv").write_text(
        ",".join(["backbone", "recipe", "weights", "seed", *COLUMNS, "revision"]) + "\n"
    )
    Path(".gitignore").write_text("runs\ntrap\n")
    do("git", "init", "--quiet")
    do(*sweep.DVC, "init", "--quiet")
    do(*sweep.DVC, "repro", "--quiet")
    do("git", "add", "--all")
    do("git", "commit", "--quiet", "--message", "first")

    Path("trap").touch()
    with pytest.raises(sweep.UserError, match="seed 2: `dvc exp run` ended with status"):
        sweep.sweep("mini", ["mini"], [1, 2, 3])
    assert Path("params.yaml").read_bytes() == parameters
    Path("trap").unlink()
    result = sweep.sweep("mini", ["mini"], [1, 2, 3])
    assert "1 are there, 2 to run" in capsys.readouterr().out
    assert result.seed.tolist() == [1, 2, 3, 42]
    assert result.pairs_plain.tolist() == [0.1, 0.2, 0.3, 4.2]
    assert Path("runs").read_text().split() == ["42", "1", "2", "3"]  # and the workspace's own came from DVC's memory
    assert Path("params.yaml").read_bytes() == parameters
    assert json.loads(Path("metrics/mini/report.json").read_text())["mini"]["gain"]["probe"] == 4.2
    assert Path("metrics/mini/seen").read_text() == "5"  # the report saw the new table
    written = Path("metrics/seeds/mini.csv").read_bytes()
    assert pd.read_csv("metrics/seeds/mini.csv").seed.tolist() == [1, 2, 3, 42]
    sweep.show(result)
    assert "1,2,3,42" in capsys.readouterr().out
    assert sweep.sweep("mini", ["mini"], [2, 3]).seed.tolist() == [1, 2, 3, 42]
    assert Path("runs").read_text().split() == ["42", "1", "2", "3"]
    assert Path("metrics/seeds/mini.csv").read_bytes() == written
