"""The experiment's design, its one rule of choice, its table, and a run that is interrupted and goes on."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import reduce
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from scipy import stats
from shrunk import ROOT, run, write_params
from test_recipes import SMALL

from metrics.recipes import experiment
from pipeline.core.outputs import remove
from pipeline.core.stages import UserError
from pipeline.evidence.statistics import over_seeds
from pipeline.sections import params
from pipeline.tools import trials
from pipeline.tools.trials import MEASURES, Trial


def test_the_cells_are_a_latin_square() -> None:
    cells = experiment.cells()
    assert len(cells) == len(set(cells)) == 9
    for a, b in combinations(range(3), 2):  # every level of a factor with every level of another, once
        assert set(Counter((cell[a], cell[b]) for cell in cells).values()) == {1}


BEST = {(recipe, study): "x" for recipe in experiment.SPACE for study in experiment.STUDIES}


def test_the_test_has_every_recipe_and_control_of_the_plan_and_no_seed_of_the_tuning() -> None:
    runs = list(experiment.testing(BEST))
    assert Counter((run.recipe, run.weights) for run in runs) == {
        ("none", "pretrained"): 3,
        **{(recipe, "trained"): 9 for recipe in experiment.SPACE},
        **{(recipe, control): 3 for recipe in experiment.SPACE for control in ("drift", "shuffled")},
    }
    assert {run.benchmark for run in runs} == {"test 3"}
    tuning = list(experiment.tuning())
    assert {run.benchmark for run in tuning} == {"dev"}
    assert Counter((run.recipe, run.seed) for run in tuning) == {
        ("none", 0): 1, **{(recipe, study): 3 for recipe in experiment.SPACE for study in experiment.STUDIES}
    }  # fmt: skip
    assert {run.seed for run in tuning}.isdisjoint(run.seed for run in runs if run.weights == "trained")


def test_every_space_has_as_many_settings_and_its_recipe_takes_each() -> None:
    recipes = params.load(ROOT / "params.yaml").profile.recipes
    assert experiment.SPACE.keys() <= recipes.keys()
    for recipe, space in experiment.SPACE.items():
        assert [len(values) for values in space.values()] == [5, 3]
        tried = {study: experiment.choices(recipe, study) for study in experiment.STUDIES}
        assert len({tuple(each) for each in tried.values()}) == 3  # the studies are independent
        for choice in chain.from_iterable(tried.values()):
            found = trials.chosen(recipes[recipe], choice).model_dump()
            for key, _, value in (each.partition("=") for each in choice.split()):
                assert reduce(dict.__getitem__, key.split("."), found) == float(value)
    assert trials.chosen(recipes["two_stage"], "trained.rank=4").trained.rank == 4  # a whole number


def rows(values: dict[Trial, dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame([asdict(run) | {"right": ""} | found for run, found in values.items()])


def test_a_study_keeps_the_setting_with_the_most_dev_pairs_that_keeps_zero_shot_ability() -> None:
    def best(of: Callable[[int], tuple[float, float]]) -> set[int]:
        """The places of what is chosen, where the setting at place i has (pairs, zero-shot) `of(i)`."""
        places = {
            (recipe, study, choice): i
            for recipe in experiment.SPACE
            for study in experiment.STUDIES
            for i, choice in enumerate(experiment.choices(recipe, study))
        }
        found = {}
        for one in experiment.tuning():
            pairs, zeroshot = (50.0, 90.0) if one.recipe == "none" else of(places[one.recipe, one.seed, one.choice])
            found[one] = {"pairs_stock": pairs, "zeroshot": zeroshot}
            test = Trial("test 3", *list(asdict(one).values())[1:])
            found[test] = {"pairs_stock": 50.0 + (one.seed == 12), "zeroshot": 90.0}  # is not looked at
        return {places[(*key, choice)] for key, choice in experiment.best_choices(rows(found)).items()}

    assert best(lambda i: [(55, 90), (60, 89.5), (70, 89.4)][i]) == {1}  # 0.5 points are allowed
    assert best(lambda i: (50, 90)) == {0}
    assert best(lambda i: (50 + i, [80, 86, 82][i])) == {1}


def test_groups_answer_two_questions() -> None:
    new, these = experiment.over_groups([[6, 6.4, 6.3], [7.7, 6.7, 6.7], [2.3, 2, 3.9]])
    assert new == pytest.approx(over_seeds([18.7 / 3, 21.1 / 3, 8.2 / 3]))
    assert these == pytest.approx((5.33, 4.77, 5.89), abs=0.01)
    assert np.isnan(experiment.over_groups([[1], [2]])[1].low)
    with pytest.raises(ValueError, match="two at least"):
        experiment.over_groups([[1, 2]])


def test_with_answers_the_interval_is_of_new_answers_too() -> None:
    changes = np.random.default_rng(3).normal(2, 5, (3, 3, 40)) + np.arange(3)[:, None, None]
    for by_answer, plain in zip(experiment.over_groups(changes), experiment.over_groups(changes.mean(2)), strict=True):
        assert by_answer.value == pytest.approx(plain.value)
        assert by_answer.high - by_answer.low > 0
    alike = np.broadcast_to(np.random.default_rng(4).normal(2, 5, 40), (3, 3, 40))  # cells differ in nothing
    for found in experiment.over_groups(alike):
        low, high = stats.t.interval(0.95, 39, loc=alike[0, 0].mean(), scale=stats.sem(alike[0, 0]))
        assert found == pytest.approx((alike[0, 0].mean(), low, high))
    wide, narrow = (experiment.over_groups(changes, level)[0] for level in (0.99, 0.9))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.slow
def test_each_interval_covers_its_own_truth_in_95_of_100_experiments() -> None:
    rng, covered = np.random.default_rng(1), np.zeros(2)
    for _ in range(2000):
        groups = 5 + rng.normal(0, 2, (3, 1))
        new, these = experiment.over_groups((groups + rng.normal(0, 1, (3, 3))).tolist())
        covered += new.low < 5 < new.high, these.low < groups.mean() < these.high
    assert covered / 2000 == pytest.approx([0.95, 0.95], abs=0.015)


def right(*pairs: int) -> str:
    return np.packbits(np.array(pairs, bool)).tobytes().hex()


def test_gains_are_over_the_same_backbone_and_the_effect_over_the_same_cells() -> None:
    found: dict[Trial, dict[str, Any]] = {}
    for one in experiment.testing(BEST):
        if one.recipe in ("none", "diva"):
            base = {1.0: 40.0, 0.6: 30.0, 0.3: 20.0}[one.detail_share]
            gain = {"pretrained": 0, "trained": one.denoiser_steps / 1000 + 5, "shuffled": 2, "drift": -1}[one.weights]
            pairs = (0, 0, 1, 1, 0, 0, 0) if one.weights == "pretrained" else (1, 1, 1, 0, 0, 0, one.seed == 2)
            found[one] = {**dict.fromkeys(MEASURES, base + gain), "right": right(*pairs)}
    gained = experiment.gains(rows(found), 7)
    table = experiment.results(gained).set_index(["weights", "measure"])
    row = table.loc[("trained", "probe")]  # 5.5, 6 and 7 for each text tower
    assert row[["cells", "gain"]].tolist() == [9, pytest.approx(6.17, abs=0.005)]
    towers = [[5.5, 6, 7]] * 3
    assert row[["new_low", "new_high", "these_low", "these_high"]].tolist() == [
        pytest.approx(value, abs=0.005) for found in experiment.over_groups(np.array(towers)) for value in found[1:]
    ]
    assert np.isnan(row.corrected_low)
    effect = table.loc[("effect", "zeroshot")]
    assert effect[["cells", "gain"]].tolist() == [3, pytest.approx(4.17, abs=0.005)]
    assert np.isnan(effect.these_low)
    pairs = table.loc[("trained", "pairs_stock")]
    assert pairs.gain == pytest.approx(100 * (2 - 1 + 1 / 3) / 7, abs=0.005)  # of pairs, not of their average
    answers = np.array([[100, 100, 0, -100, 0, 0, 100 * (cell[2] == 2)] for cell in experiment.cells()])
    new, these = experiment.over_groups(answers.reshape(3, 3, 7))
    wider, _ = experiment.over_groups(answers.reshape(3, 3, 7), 1 - 0.05 / 9)
    assert pairs[["new_low", "these_low", "corrected_low"]].tolist() == [
        pytest.approx(found.low, abs=0.005) for found in (new, these, wider)
    ]
    assert wider.low < new.low
    text = experiment.markdown(table.reset_index(), gained)
    assert "| diva | trained | 9 |" in text
    assert text.count("| diva | +6.2 | +6.2 | +6.2 |\n") == 2  # by text tower and by study
    assert "nan" not in text
    diverged = rows(found | {Trial("test 3", "diva", "trained", 0.6, 1000, 3, "x"): {**BLANK, "right": ""}})
    gained = experiment.gains(diverged, 7)
    text = experiment.markdown(experiment.results(gained), gained)
    assert "| diva | +6.2 | +nan | +6.2 |" in text  # not the mean of those that came to an end


BLANK = dict.fromkeys(MEASURES, float("nan"))


def ahead(share: float, steps: int, seed: int) -> float:
    return 2 * seed + steps / 1000 + 3 * share**2


def test_every_recipe_is_compared_with_two_cell_by_cell() -> None:
    found: dict[Trial, dict[str, Any]] = {}
    for one in experiment.testing(BEST):
        if one.recipe in ("none", "diva", *experiment.COMPARED):
            cell = one.detail_share, one.denoiser_steps, one.seed
            own = {"none": 0, "diva": one.seed, "reranked": ahead(*cell), "captions": 2 * ahead(*cell)}
            gain = own[one.recipe] * (one.weights == "trained")
            found[one] = {**dict.fromkeys(MEASURES, 50.0 + gain), "right": right(1, 0, 1, 0, 0, 0, 0)}
    found = dict(reversed(found.items()))  # rows are matched by cell, not by where they stand
    table = experiment.results(experiment.gains(rows(found), 7)).set_index(["recipe", "weights", "measure"])
    for recipe, weights, less in (
        ("diva", "reranked less it", [ahead(*cell) - cell[2] for cell in experiment.cells()]),
        ("diva", "captions less it", [2 * ahead(*cell) - cell[2] for cell in experiment.cells()]),
        ("captions", "reranked less it", [-ahead(*cell) for cell in experiment.cells()]),
    ):
        means = [sum(less[i : i + 3]) / 3 for i in (0, 3, 6)]
        low, high = stats.t.interval(0.95, 2, loc=sum(less) / 9, scale=stats.sem(means))
        assert table.loc[(recipe, weights, "zeroshot"), ["cells", "gain", "new_low", "new_high"]].tolist() == [
            9, pytest.approx(sum(less) / 9, abs=0.005), pytest.approx(low, abs=0.005), pytest.approx(high, abs=0.005)
        ]  # fmt: skip
    compared = {key for key in table.index.droplevel("measure") if "less" in key[1]}
    assert compared == {("diva", "reranked less it"), ("diva", "captions less it"), ("captions", "reranked less it")}
    panels = experiment.figure(table.reset_index()).axes
    assert [panel.get_title() for panel in panels] == ["pairs_stock", "zeroshot", "probe"]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels.count("diva, trained") == 1
    assert len(labels) == 12


@pytest.mark.usefixtures("here")
@pytest.mark.exhaustive
def test_an_interrupted_experiment_goes_on_and_ends_with_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "DETAIL_SHARES", (1.0, 0.6))
    monkeypatch.setattr(experiment, "DENOISER_STEPS", (2,))
    monkeypatch.setattr(experiment, "TUNED_IN", (0.6, 2))
    monkeypatch.setattr(experiment, "STUDIES", (11,))
    monkeypatch.setattr(experiment, "SEEDS", (1, 1, 1))  # both cells have the controls
    monkeypatch.setattr(
        experiment, "SPACE", {"text_anchored": {"optimizer.lr": (0.01,)}, "reranked": {"optimizer.lr": (0.01,)}}
    )
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
    assert found[found.benchmark == "test 3"][list(MEASURES)].notna().all().all()
    run(experiment)  # nothing is left to do
    assert [file.read_bytes() for file in files] == first
    remove(experiment.SCRATCH)
    for file in files:
        file.unlink()
    run(experiment)  # from nothing, undisturbed
    assert [file.read_bytes() for file in files] == first


ENDLESS = """
import os, signal, time
from metrics.recipes import experiment
from pipeline.sections import params
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
