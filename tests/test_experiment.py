"""The experiment's design, its one rule of choice, its table, and a run that is interrupted and goes on."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import pandas as pd
import psutil
import pytest
from scipy import stats
from shrunk import ROOT, run, write_params
from test_recipes import SMALL

from pipeline.core.stages import UserError
from pipeline.sections import params
from pipeline.tools import experiment
from pipeline.tools.experiment import MEASURES, Trial


def test_the_cells_are_a_latin_square() -> None:
    cells = experiment.cells()
    assert len(cells) == len(set(cells)) == 9
    for a, b in combinations(range(3), 2):  # every level of a factor with every level of another, once
        assert set(Counter((cell[a], cell[b]) for cell in cells).values()) == {1}


def test_the_test_has_every_recipe_and_control_of_the_plan_and_no_seed_of_the_tuning() -> None:
    runs = list(experiment.testing(dict.fromkeys(experiment.RATES, 0.1)))
    assert Counter((run.recipe, run.weights) for run in runs) == {
        ("none", "pretrained"): 3,
        **{(recipe, "trained"): 9 for recipe in experiment.RATES},
        **{(recipe, "drift"): 9 for recipe in experiment.RATES},
        **{(recipe, "shuffled"): 3 for recipe in experiment.RATES},
    }
    assert {run.benchmark for run in runs} == {"test"}
    tuning = list(experiment.tuning())
    assert {run.benchmark for run in tuning} == {"dev"}
    assert Counter(run.recipe for run in tuning) == {"none": 1, **dict.fromkeys(experiment.RATES, 5)}
    assert {run.seed for run in tuning}.isdisjoint(run.seed for run in runs if run.weights == "trained")


def rows(values: dict[Trial, dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame([asdict(run) | found for run, found in values.items()])


def test_a_recipe_keeps_the_rate_with_the_most_development_pairs_that_keeps_zero_shot_ability() -> None:
    found = {run: {"pairs_stock": 50.0, "zeroshot": 90.0} for run in experiment.tuning()}
    for recipe, rates in experiment.RATES.items():
        of = {rate: Trial("dev", recipe, "trained", *experiment.TUNED_IN, rate) for rate in rates}
        found[of[rates[1]]] = {"pairs_stock": 60.0, "zeroshot": 89.0}  # all that is allowed
        found[of[rates[2]]] = {"pairs_stock": 70.0, "zeroshot": 88.9}
        test = Trial("test", recipe, "trained", *experiment.TUNED_IN, rates[3])
        found[test] = {"pairs_stock": 99.0, "zeroshot": 90.0}  # is not looked at
    assert experiment.best_rates(rows(found)) == {recipe: rates[1] for recipe, rates in experiment.RATES.items()}
    equal = {run: {"pairs_stock": 50.0, "zeroshot": 90.0} for run in experiment.tuning()}
    assert experiment.best_rates(rows(equal)) == {recipe: rates[0] for recipe, rates in experiment.RATES.items()}
    lost = {run: {"pairs_stock": 50.0 + run.rate, "zeroshot": 90.0 - 5 * (run.recipe != "none")} for run in equal}
    for recipe, rates in experiment.RATES.items():
        lost[Trial("dev", recipe, "trained", *experiment.TUNED_IN, rates[1])]["zeroshot"] = 86.0
    assert experiment.best_rates(rows(lost)) == {recipe: rates[1] for recipe, rates in experiment.RATES.items()}


def test_gains_are_over_the_same_backbone_and_the_effect_over_the_same_cells() -> None:
    found: dict[Trial, dict[str, float]] = {}
    for one in experiment.testing({"diva": 0.1}):
        base = {1.0: 40.0, 0.6: 30.0, 0.3: 20.0}[one.detail_share]
        gain = {"pretrained": 0, "trained": one.denoiser_steps / 1000 + 5, "shuffled": 2, "drift": -1}[one.weights]
        found[one] = dict.fromkeys(MEASURES, base + gain)
    gained = experiment.gains(rows(found))
    table = experiment.results(gained).set_index(["weights", "measure"])
    row = table.loc[("trained", "probe")]  # 5.5, 6 and 7 for each text tower
    assert row[["cells", "gain"]].tolist() == [9, pytest.approx(6.17, abs=0.005)]
    assert row[["new_low", "new_high"]].tolist() == pytest.approx([6.17, 6.17])  # the text towers do not differ
    half = stats.t.ppf(0.975, 6) * stats.sem([5.5, 6.0, 7.0]) / 3**0.5
    assert row[["these_low", "these_high"]].tolist() == pytest.approx([6.1667 - half, 6.1667 + half], abs=0.005)
    assert table.loc[("drift", "probe"), ["cells", "gain"]].tolist() == [9, -1]
    row = table.loc[("effect", "probe")]  # a cell a text tower: 3.5, 4 and 5, so of these towers nothing is known
    wanted = stats.t.interval(0.95, 2, loc=12.5 / 3, scale=stats.sem([3.5, 4, 5]))
    assert row[["new_low", "new_high"]].tolist() == pytest.approx(wanted, abs=0.005)
    assert row[["cells", "gain"]].tolist() == [3, pytest.approx(4.17, abs=0.005)]
    assert row[["these_low", "these_high"]].isna().all()
    text = experiment.markdown(table.reset_index(), gained)
    assert "| diva | effect | 3 | +4.2 [+2.3, +6.1] |" in text
    assert "| diva | trained | 9 | +6.2 [+6.2, +6.2] [+5.5, +6.8] |" in text
    assert "| diva | +6.2 | +6.2 | +6.2 |" in text


def ahead(share: float, steps: int, seed: int) -> float:
    return 2 * seed + steps / 1000 + 3 * share**2


def test_every_recipe_is_compared_with_text_anchored_cell_by_cell() -> None:
    found: dict[Trial, dict[str, float]] = {}
    for one in experiment.testing({"diva": 0.1, "text_anchored": 0.1}):
        gain = {"none": 0, "diva": one.seed, "text_anchored": ahead(one.detail_share, one.denoiser_steps, one.seed)}[
            one.recipe
        ]
        found[one] = dict.fromkeys(MEASURES, 50.0 + gain * (one.weights == "trained"))
    found = dict(reversed(found.items()))  # rows are matched by cell, not by where they stand
    table = experiment.results(experiment.gains(rows(found))).set_index(["recipe", "weights", "measure"])
    less = [ahead(*cell) - cell[2] for cell in experiment.cells()]
    means = [sum(less[i : i + 3]) / 3 for i in (0, 3, 6)]
    low, high = stats.t.interval(0.95, 2, loc=sum(less) / 9, scale=stats.sem(means))
    assert table.loc[("diva", "difference", "zeroshot"), ["cells", "gain", "new_low", "new_high"]].tolist() == [
        9, pytest.approx(sum(less) / 9, abs=0.005), pytest.approx(low, abs=0.005), pytest.approx(high, abs=0.005)
    ]  # fmt: skip
    assert ("text_anchored", "difference") not in set(table.index.droplevel("measure"))
    panels = experiment.figure(table.reset_index()).axes
    assert [panel.get_title() for panel in panels] == ["pairs_stock", "zeroshot", "probe"]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels.count("diva, trained") == 1
    assert len(labels) == 8


@pytest.mark.usefixtures("here")
@pytest.mark.exhaustive
def test_an_interrupted_experiment_goes_on_and_ends_with_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "DETAIL_SHARES", (1.0, 0.6))
    monkeypatch.setattr(experiment, "DENOISER_STEPS", (2,))
    monkeypatch.setattr(experiment, "TUNED_IN", (0.6, 2, 0))
    monkeypatch.setattr(experiment, "SEEDS", (1, 1, 1))  # both cells have the shuffled control
    monkeypatch.setattr(experiment, "RATES", {"text_anchored": (0.01,), "contrastive": (0.01,)})
    small = {
        f"profiles.mini.recipes.{recipe}.{key}": value
        for recipe, own in SMALL.items()
        for key, value in {"batch": 4, "steps": 2, **own}.items()
    }
    write_params(**small)
    write, written = experiment.write, []

    def interrupted(table: pd.DataFrame) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(table)
        write(table)

    monkeypatch.setattr(experiment, "write", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run(experiment)
    assert multiprocessing.active_children() == []
    assert experiment.read().equals(pd.read_csv("metrics/recipes/runs.csv"))
    assert len(written[-1]) == len(experiment.read()) > 4
    monkeypatch.setattr(experiment, "write", write)
    run(experiment)
    files = [Path("metrics/recipes") / name for name in ("runs.csv", "results.csv", "results.md", "results.png")]
    first = [file.read_bytes() for file in files]
    found = experiment.read()
    assert not found.duplicated(list(Trial.__dataclass_fields__)).any()
    assert found[found.benchmark == "test"][list(MEASURES)].notna().all().all()
    run(experiment)  # nothing is left to do
    assert [file.read_bytes() for file in files] == first
    experiment.remove(experiment.SCRATCH)
    for file in files:
        file.unlink()
    run(experiment)  # from nothing, undisturbed
    assert [file.read_bytes() for file in files] == first


ENDLESS = """
import os, signal, time
from pipeline.sections import params
from pipeline.tools import experiment
if __name__ == "__main__":
    experiment.SCRATCH.mkdir(parents=True)
    with experiment.workers(params.load()) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 10_000)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_worker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with experiment.workers(params.load(ROOT / "params.yaml")) as working:
            working.submit(os._exit, 1).result()

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        monkeypatch.setattr(experiment, "ProcessPoolExecutor", lambda *arguments: nullcontext(pool))
        with pytest.raises(UserError, match=r"a worker process was killed.*the same command goes on"):
            work()


@pytest.mark.usefixtures("here")
@pytest.mark.exhaustive
def test_the_workers_of_a_killed_experiment_end() -> None:
    """Else they would go on writing, and the next start would be refused."""
    Path("endless.py").write_text(ENDLESS)
    with Path("worker").open("w") as output:
        killed = subprocess.run(
            [sys.executable, "endless.py"], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=output, timeout=600
        )
    assert killed.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        worker = psutil.Process(int(Path("worker").read_text()))
        try:
            worker.wait(300)
        finally:
            worker.kill()
