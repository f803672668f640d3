"""Do the recipes help, and is it feedback that helps? The experiment of metrics/recipes/plan.md.

    python -m metrics.recipes.experiment         goes on where it was interrupted; about four hours on two cores

Makes three backbones and three denoisers of the mini world, lets three studies choose every recipe's settings on the
dev split, then trains and scores each cell of the plan. Each run uses one thread; as many run at once as there are
cores. Every finished run is a row of metrics/recipes/runs.csv and is not made again. To start anew, delete that file
and the folder data/.experiment.scratch, which holds models and logs. At the end it writes
metrics/recipes/results.{csv,md,png}.
"""

import gc
import itertools
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from pipeline.core.compute import deterministic_device, generator
from pipeline.core.outputs import atomic
from pipeline.core.processes import cpus, end_with_parent
from pipeline.core.stages import UserError, progress, stage
from pipeline.evidence.statistics import CONFIDENCE, Interval, interval
from pipeline.mini import world
from pipeline.sections import params
from pipeline.tools.pages import table
from pipeline.tools.trials import MEASURES, RIGHT, Assets, Trial

SCRATCH, OUTPUT = Path("data/.experiment.scratch"), Path("metrics/recipes")
DETAIL_SHARES = (1.0, 0.6, 0.3)  # of the captions that text tower and projection learn from
DENOISER_STEPS = (500, 1000, 2000)
SEEDS = (1, 2, 3)
TUNED_IN = (0.6, 1000)  # detail share, denoiser steps
STUDIES = (11, 12, 13)  # training seeds of the tuning, one for each study; study i chooses for the cells of SEEDS[i]
TRIALS = 3  # settings that a study tries for each recipe, of the 15 of its space
RATE, WEIGHT = "optimizer.lr", "losses.keep_embedding.weight"
SPACE: dict[str, dict[str, tuple[float, ...]]] = {  # five rates, and three values of what matters most beside it
    "diva": {RATE: (0.0001, 0.0003, 0.001, 0.003, 0.01), "warmup.steps": (50, 150, 450)},
    "text_anchored": {RATE: (0.0001, 0.0003, 0.001, 0.003, 0.01), "losses.self_distillation.weight": (0.3, 1, 3)},
    "captions": {RATE: (0.0001, 0.0003, 0.001, 0.003, 0.01), WEIGHT: (1, 10, 100)},
    "kernel": {RATE: (0.0001, 0.0003, 0.001, 0.003, 0.01), WEIGHT: (0.1, 1, 10)},
    "reranked": {RATE: (0.0001, 0.0003, 0.001, 0.003, 0.01), "losses.reranking.evidence": (50, 100, 200)},
}
ALLOWED = 0.5  # points of zero-shot accuracy that a setting may cost on the dev split
COMPARED = ("reranked", "captions")  # what the plan compares with the other recipes, cell by cell
BENCHMARKS = ("dev", "test 3")  # splits, each drawn from the set of that name of pipeline/mini/world.py
COMPARISONS = 2 * len(SPACE) - 1  # of pairs, as the plan counts: each recipe with nothing, `reranked` with each other


KEYS = list(Trial.__dataclass_fields__)
COLUMNS = [*KEYS, *MEASURES, RIGHT]


def cells() -> list[tuple[float, int, int]]:
    """A Latin square: every text tower with every denoiser; each seed once with each of either."""
    return [
        (share, steps, SEEDS[(i + j) % 3])
        for (i, share), (j, steps) in itertools.product(enumerate(DETAIL_SHARES), enumerate(DENOISER_STEPS))
    ]


def choices(recipe: str, study: int) -> list[str]:
    """What a study tries: settings drawn from the recipe's space, none of them twice."""
    space = SPACE[recipe]
    every = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    order = torch.randperm(len(every), generator=generator(study, "study", recipe))[:TRIALS]
    return [" ".join(f"{key}={value:g}" for key, value in every[i].items()) for i in sorted(order.tolist())]


def tuning() -> Iterator[Trial]:
    share, steps = TUNED_IN
    yield Trial("dev", "none", "pretrained", share, 0, 0, "none")
    for study, recipe in itertools.product(STUDIES, SPACE):
        for choice in choices(recipe, study):
            yield Trial("dev", recipe, "trained", share, steps, study, choice)


def testing(best: dict[tuple[str, int], str]) -> Iterator[Trial]:
    """Untrained backbones first; then every cell. Only cells of the first seed have controls."""
    yield from (Trial(BENCHMARKS[1], "none", "pretrained", share, 0, 0, "none") for share in DETAIL_SHARES)
    for cell, recipe in itertools.product(cells(), SPACE):
        choice = best[recipe, STUDIES[SEEDS.index(cell[2])]]
        for weights in ("trained", *(["drift", "shuffled"] if cell[2] == SEEDS[0] else [])):
            yield Trial(BENCHMARKS[1], recipe, weights, *cell, choice)


def best_choices(rows: pd.DataFrame) -> dict[tuple[str, int], str]:
    """What each study chooses for each recipe: the most pairs right on the dev split where zero-shot ability is kept.

    Of equals, the first of `choices`. If nothing keeps it, what loses least.
    """
    dev = rows[rows.benchmark == "dev"]
    (before,) = dev[dev.weights == "pretrained"].zeroshot
    best = {}
    for recipe, study in itertools.product(SPACE, STUDIES):
        own = dev[(dev.recipe == recipe) & (dev.seed == study)].set_index("choice").loc[choices(recipe, study)]
        kept = own[own.zeroshot >= before - ALLOWED]
        best[recipe, study] = str(kept.pairs_stock.idxmax() if len(kept) else own.zeroshot.idxmax())
    return best


_assets: Assets  # of a worker


def _start_worker(p: params.Params) -> None:
    global _assets
    end_with_parent()  # a killed experiment must leave no second writer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that hands out the work, which ends this
    sys.stdout = sys.stderr = (SCRATCH / f"worker-{os.getpid()}.log").open(
        "w", buffering=1, encoding="utf-8"
    )  # the parent's progress bar is alone on the terminal
    gc.freeze()  # accelerate collects garbage around every training: spare it the objects of the imports
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's and scikit-learn's
    _assets = Assets(p, deterministic_device(), SCRATCH)


def _make(what: str, *values: float | str) -> None:
    getattr(_assets, what)(*values)


def _score(runs: list[Trial]) -> list[dict]:
    return [asdict(run) | _assets.score(run) for run in runs]


@contextmanager
def workers(p: params.Params) -> Iterator[ProcessPoolExecutor]:
    """A process a core, each on one thread: small models use no more, and the numbers are the same on any of them."""
    context, cores = multiprocessing.get_context("forkserver"), cpus()
    context.set_forkserver_preload(["metrics.recipes.experiment"])  # its imports are done once, not in each of them
    with ProcessPoolExecutor(cores, context, _start_worker, (p,)) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory. The runs so far are kept: the same command "
                "goes on from there, on fewer cores under `taskset -c 0`."
            ) from error
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


def read() -> pd.DataFrame:
    file = OUTPUT / "runs.csv"
    return (
        pd.read_csv(file, keep_default_na=False, na_values=dict.fromkeys(MEASURES, ""))
        if file.is_file()
        else pd.DataFrame(columns=COLUMNS)
    )


def write(rows: pd.DataFrame) -> None:
    with atomic(OUTPUT / "runs.csv") as (file,):
        rows.sort_values(KEYS).to_csv(file, index=False, float_format="%g")


def carry_out(pool: ProcessPoolExecutor, runs: Iterable[Trial]) -> None:
    """Make what has no row yet, writing rows as they come. A worker trains a recipe, then its controls."""
    done = {Trial(**row) for row in read()[KEYS].to_dict("records")}
    together: dict[tuple, list[Trial]] = {}
    for run in runs:
        if run not in done:
            cell = tuple(value for key, value in asdict(run).items() if key != "weights")
            together.setdefault(cell, []).append(run)
    working = [pool.submit(_score, group) for group in together.values()]
    for work in progress(as_completed(working), "runs", len(working)):
        write(pd.DataFrame([*read().to_dict("records"), *work.result()])[COLUMNS])


def gains(rows: pd.DataFrame, pairs: int) -> pd.DataFrame:
    """The test runs minus the same backbone before training, in points; `right`: of each of so many pairs, an array."""
    test = rows[rows.benchmark == BENCHMARKS[1]]
    packed = [np.frombuffer(bytes.fromhex(digits), np.uint8) for digits in test[RIGHT]]
    none = np.full(pairs, np.nan)  # no digits: of a run without finite numbers
    answers = [100.0 * np.unpackbits(digits, count=pairs) if len(digits) else none for digits in packed]
    test = test.assign(**{RIGHT: answers})
    before = test[test.recipe == "none"].set_index("detail_share")[[*MEASURES, RIGHT]]
    after = test[test.recipe != "none"].copy()
    after[[*MEASURES, RIGHT]] = after[[*MEASURES, RIGHT]].to_numpy() - before.loc[after.detail_share].to_numpy()
    return after


def over_groups(changes: np.ndarray, level: float = CONFIDENCE) -> tuple[Interval, Interval]:
    """The mean of changes [groups, cells] or [groups, cells, answers], with t intervals that answer two questions:
    (of new groups, of these groups with new cells).

    New groups differ from each other as these do, so what counts is the spread of the groups' means; of these groups
    it is the spread within them, NaN where each has a single cell. Where answers are given, both are of new answers,
    too: the variance of the answers' means is added, with Satterthwaite's degrees of freedom. Raises ValueError for
    fewer than two groups.
    """
    values = np.asarray(changes, dtype=float)
    cells = values.mean(2) if values.ndim == 3 else values
    number, size = cells.shape
    if number < 2:
        raise ValueError(f"found {number} groups, wanted two at least")
    answers = values.mean((0, 1)) if values.ndim == 3 else np.zeros(2)
    of_answers = float(np.var(answers, ddof=1)) / len(answers), len(answers) - 1
    value, freedom = float(values.mean()), number * (size - 1)
    new = interval(value, [(float(np.var(cells.mean(1), ddof=1)) / number, number - 1), of_answers], level)
    if not freedom:
        return new, Interval(value, math.nan, math.nan)
    within = float(((cells - cells.mean(1, keepdims=True)) ** 2).sum()) / freedom / cells.size
    return new, interval(value, [(within, freedom), of_answers], level)


def results(gained: pd.DataFrame) -> pd.DataFrame:
    """Mean gain of the cells, by recipe, weights and measure, with 95 % t intervals that answer two questions.

    new_*: what would other text towers give? The spread of the text towers' means. these_*: what would these give with
    other denoisers, seeds and choices of settings? The spread of the cells of a text tower; NaN with a cell each. Those
    of pairs_stock are of other pairs, too, and corrected_* are theirs at 1 - 5 % / COMPARISONS (Bonferroni), so that
    all of them together hold with 95 %.

    Some weights are differences, cell by cell: `effect`, the recipe minus its mismatched-image control, and
    `reranked less it` and `captions less it`, those two minus the recipe.
    """
    keys, found, values = ["detail_share", "denoiser_steps", "seed"], [], [*MEASURES, RIGHT]
    trained = gained[gained.weights == "trained"]
    compared = {name: own.set_index(keys)[values] for name, own in trained.groupby("recipe") if name in COMPARED}
    for recipe, own in gained.groupby("recipe", sort=False):
        parts = {weights: part.set_index(keys)[values] for weights, part in own.groupby("weights", sort=False)}
        if {"trained", "shuffled"} <= parts.keys():
            parts["effect"] = parts["trained"].loc[parts["shuffled"].index] - parts["shuffled"]
        for name in COMPARED[: COMPARED.index(recipe) if recipe in COMPARED else None]:
            if name in compared:
                parts[f"{name} less it"] = compared[name] - parts["trained"].loc[compared[name].index]
        for weights, part in parts.items():
            for measure in MEASURES:
                column = RIGHT if measure == "pairs_stock" else measure
                towers = [np.stack(tower.to_list()) for _, tower in part[column].groupby("detail_share")]
                answers = np.stack(towers)
                new, these = over_groups(answers)
                corrected, _ = over_groups(answers, 1 - (1 - CONFIDENCE) / COMPARISONS)
                if measure != "pairs_stock":
                    corrected = Interval(new.value, math.nan, math.nan)
                rounded = (round(value, 2) for value in (*new, *these[1:], *corrected[1:]))
                found.append((recipe, weights, measure, len(part), *rounded))
    columns = ["gain", *(f"{which}_{end}" for which in ("new", "these", "corrected") for end in ("low", "high"))]
    return pd.DataFrame(found, columns=["recipe", "weights", "measure", "cells", *columns])


def tuned(rows: pd.DataFrame) -> str:
    """What the studies chose, and how far their choices lie apart on the dev split."""
    best, dev = best_choices(rows), rows[rows.benchmark == "dev"]
    (before,) = dev[dev.weights == "pretrained"].pairs_stock
    shown = [["recipe", *(f"study {i + 1}" for i in range(len(STUDIES))), "pairs, dev", "range"]]
    for recipe in SPACE:
        own = dev[dev.recipe == recipe].set_index(["seed", "choice"]).pairs_stock - before
        gained = [own[study, best[recipe, study]] for study in STUDIES]
        texts = [f"`{best[recipe, study]}`" for study in STUDIES]
        spread = f"{min(gained):+.1f} to {max(gained):+.1f}"
        shown.append([recipe, *texts, f"{np.mean(gained):+.1f}", spread])
    return table(shown)


INTERVALS = f"""Gains in points. First interval: what other text towers would give (t interval over the means of these).
Second: what these text towers would give with other denoisers, seeds and studies (t interval within them; none where a
tower has one cell). Those of pairs_stock are of other pairs, too; the third is the first, corrected for {COMPARISONS}
comparisons."""


def markdown(found: pd.DataFrame, gained: pd.DataFrame) -> str:
    """The table of all gains, and those of the pairs by text tower and by study (means of their cells)."""
    shown = [["recipe", "weights", "cells", *MEASURES]]
    for (recipe, weights), own in found.groupby(["recipe", "weights"], sort=False):
        texts = []
        for row in own.itertuples():
            text = Interval(row.gain, row.new_low, row.new_high).text()
            for low, high in ((row.these_low, row.these_high), (row.corrected_low, row.corrected_high)):
                if not math.isnan(low):
                    text += " " + Interval(row.gain, low, high).text().partition(" ")[2]
            texts.append(text)
        shown.append([recipe, weights, own.cells.iloc[0], *texts])
    tables = [table(shown)]
    for factor, heading, names in (
        ("detail_share", "text tower", {share: f"{100 * share:.0f} % of captions detailed" for share in DETAIL_SHARES}),
        ("seed", "study", {seed: f"study {i + 1}" for i, seed in enumerate(SEEDS)}),
    ):
        by = gained[gained.weights == "trained"].groupby(["recipe", factor], sort=False)
        means = by.pairs_stock.agg(lambda values: values.mean(skipna=False))
        by_level = [[f"pairs_stock, by {heading}", *names.values()]]
        for recipe in gained.recipe.unique():
            by_level.append([recipe, *(f"{means[recipe, level]:+.1f}" for level in names)])
        tables.append(table(by_level))
    return "\n\n".join((INTERVALS, *tables)) + "\n"


def figure(found: pd.DataFrame) -> Figure:
    """Each gain with its intervals (thin: other text towers; thick: these): a row for a recipe's weights."""
    drawn = Figure(figsize=(12, 5), layout="constrained")
    for axis, measure in zip(drawn.subplots(1, 3, sharey=True), ("pairs_stock", "zeroshot", "probe"), strict=True):
        own = found[(found.measure == measure) & ~found.weights.str.endswith(" less it")]
        colours = ["tab:grey" if weights in ("drift", "shuffled") else "tab:blue" for weights in own.weights]
        axis.axvline(0, color="black", linewidth=0.8)
        axis.hlines(range(len(own)), own.new_low, own.new_high, colors=colours, linewidth=1)
        axis.hlines(range(len(own)), own.these_low, own.these_high, colors=colours, linewidth=4)
        axis.scatter(own.gain, range(len(own)), c=colours)
        axis.set(title=measure, xlabel="gain, points")
    axis.set_yticks(range(len(own)), own.recipe + ", " + own.weights)
    axis.invert_yaxis()  # the panels share it
    return drawn


@stage
def main() -> None:
    p = params.load()
    assets = Assets(p, deterministic_device(), SCRATCH)
    for share in progress(DETAIL_SHARES, "images of post-training"):  # img2dataset has processes of its own
        assets.post_training(share)
    with workers(p) as pool:
        made = [pool.submit(_make, "denoiser", steps) for steps in sorted(DENOISER_STEPS, reverse=True)]
        made += [pool.submit(_make, "backbone", share) for share in DETAIL_SHARES]
        made += [pool.submit(_make, "encoder")]
        made += [pool.submit(_make, "benchmark", name) for name in BENCHMARKS]
        for work in progress(as_completed(made), "denoisers, backbones, encoder, benchmarks", len(made)):
            work.result()
        carry_out(pool, tuning())
        print(tuned(read()))
        carry_out(pool, testing(best_choices(read())))
    gained = gains(read(), len(world.PATTERNS) * p.profile.mmvp_vlm.pairs_per_pattern)
    found = results(gained)
    with atomic(*(OUTPUT / f"results.{suffix}" for suffix in ("csv", "md", "png"))) as (csv, md, png):
        found.to_csv(csv, index=False)
        md.write_text(f"{tuned(read())}\n\n{markdown(found, gained)}", encoding="utf-8")
        figure(found).savefig(png, format="png", dpi=110, metadata={"Software": None})
    print(markdown(found, gained))


if __name__ == "__main__":
    main()
