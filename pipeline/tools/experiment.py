"""Do the recipes help, and is it feedback that helps? The experiment of metrics/recipes/plan.md.

    python -m pipeline.tools.experiment         goes on where it was interrupted; 75 min on two cores

Makes three backbones and three denoisers of the mini world, chooses every recipe's rate on the dev split, then trains
and scores each cell of the plan. Each run uses one thread; as many run at once as there are cores. Every finished run
is a row of metrics/recipes/runs.csv and is not made again. To start anew, delete that file and the folder
data/.experiment.scratch, which holds models and logs. At the end it writes metrics/recipes/results.{csv,md,png}.
"""

import gc
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from pipeline import backbone as backbone_stage
from pipeline import denoiser as denoiser_stage
from pipeline import drift as drift_stage
from pipeline import images as images_stage
from pipeline import mmvp, mmvp_vlm, zeroshot, zeroshot_sets
from pipeline.benchmarks.pairs import read_mmvp_vlm
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, remove
from pipeline.core.processes import cpus, end_with_parent_of_pool
from pipeline.core.stages import UserError, progress, stage
from pipeline.data.shards import Shards
from pipeline.diva.step import NotFiniteError
from pipeline.engine.assemble import FITTED, Checkpoint, Training, build_feedback, save_fitted, train, tuned
from pipeline.engine.losses import losses_of
from pipeline.evidence.results import headline
from pipeline.evidence.statistics import Interval, over_groups
from pipeline.mini import world
from pipeline.models.backbones import Backbone, save_like
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import params
from pipeline.sections.denoiser import MiniDenoiser
from pipeline.sections.images import MiniImages
from pipeline.sections.mmvp_vlm import MiniMmvpVlm
from pipeline.sections.recipe import Recipe
from pipeline.sections.source import MiniSource
from pipeline.sections.zeroshot_sets import MiniZeroshotSets

SCRATCH, OUTPUT = Path("data/.experiment.scratch"), Path("metrics/recipes")
NAME = "mini"
DETAIL_SHARES = (1.0, 0.6, 0.3)  # of the captions that text tower and projection learn from
DENOISER_STEPS = (500, 1000, 2000)
SEEDS = (1, 2, 3)
TUNED_IN = (0.6, 1000, 0)  # detail share, denoiser steps, seed: no cell of the test has this seed
RATES = {
    "diva": (0.0001, 0.0003, 0.001, 0.003, 0.01),
    "text_anchored": (0.00003, 0.0001, 0.0003, 0.001, 0.003),
    "two_stage": (0.00001, 0.00003, 0.0001, 0.0003, 0.001),
    "contrastive": (0.00001, 0.00003, 0.0001, 0.0003, 0.001),
}
ALLOWED = 1.0  # points of zero-shot accuracy that a rate may cost on the dev split
OURS = "text_anchored"
BENCHMARKS = ("dev", "test")  # splits, each drawn from the set of that name of pipeline/mini/world.py
MEASURES = ("pairs_stock", "image_to_statement_stock", "zeroshot", "zeroshot_outside_bank", "probe")


@dataclass(frozen=True)
class Trial:
    """One row: a recipe or a control of it, in one cell, at one rate, on one benchmark."""

    benchmark: str  # dev | test
    recipe: str  # `none`: the backbone before training
    weights: str  # pretrained | trained | shuffled | drift
    detail_share: float
    denoiser_steps: int
    seed: int
    rate: float


KEYS = list(Trial.__dataclass_fields__)


def cells() -> list[tuple[float, int, int]]:
    """A Latin square: every text tower with every denoiser; each seed once with each of either."""
    return [
        (share, steps, SEEDS[(i + j) % 3])
        for (i, share), (j, steps) in itertools.product(enumerate(DETAIL_SHARES), enumerate(DENOISER_STEPS))
    ]


def tuning() -> Iterator[Trial]:
    share, steps, seed = TUNED_IN
    yield Trial("dev", "none", "pretrained", share, 0, 0, 0.0)
    for recipe, rates in RATES.items():
        yield from (Trial("dev", recipe, "trained", share, steps, seed, rate) for rate in rates)


def testing(best: dict[str, float]) -> Iterator[Trial]:
    """Untrained backbones first; then every cell. Only cells of the first seed have the control `shuffled`."""
    yield from (Trial("test", "none", "pretrained", share, 0, 0, 0.0) for share in DETAIL_SHARES)
    for cell, (recipe, rate) in itertools.product(cells(), best.items()):
        for weights in ("trained", "drift", *(["shuffled"] if cell[2] == SEEDS[0] else [])):
            yield Trial("test", recipe, weights, *cell, rate)


def best_rates(rows: pd.DataFrame) -> dict[str, float]:
    """Each recipe's rate on the dev split: the most pairs right among the rates that keep zero-shot ability.

    Of equal rates, the smaller. If no rate keeps it, the one that loses least.
    """
    dev = rows[rows.benchmark == "dev"].sort_values("rate")
    (before,) = dev[dev.weights == "pretrained"].zeroshot
    best = {}
    for recipe in RATES:
        own = dev[dev.recipe == recipe].set_index("rate")
        kept = own[own.zeroshot >= before - ALLOWED]
        best[recipe] = float(kept.pairs_stock.idxmax() if len(kept) else own.zeroshot.idxmax())
    return best


class Assets:
    """The backbones, denoisers and images that the runs share, each made when first asked for."""

    def __init__(self, p: params.Params, compute: torch.device) -> None:
        self.p, self.compute, self.processes = p, compute, Accelerator(cpu=compute.type == "cpu")
        source, profile = p.backbones[NAME].source, p.profile
        if not (
            isinstance(source, MiniSource)
            and isinstance(profile.denoiser, MiniDenoiser)
            and isinstance(profile.images, MiniImages)
            and isinstance(profile.mmvp_vlm, MiniMmvpVlm)
            and isinstance(profile.zeroshot_sets, MiniZeroshotSets)
        ):
            raise UserError("the experiment is one of the mini world. Set run.profile to mini in params.yaml.")
        self.source, self.section, self.images = source, profile.denoiser, profile.images
        self.pairs, self.sets = profile.mmvp_vlm, profile.zeroshot_sets

    def backbone(self, share: float) -> Path:
        folder = SCRATCH / f"backbone-{share}"
        if not folder.exists():
            text_tower = self.source.text_tower.model_copy(update={"detail_share": share})
            with atomic(folder) as (new,):
                backbone_stage.make(self.source.model_copy(update={"text_tower": text_tower}), new)
        return folder

    def denoiser(self, steps: int) -> Path:
        folder = SCRATCH / f"denoiser-{steps}"
        if not folder.exists():
            with atomic(folder) as (new,):
                denoiser_stage.make(self.section.model_copy(update={"steps": steps}), new, self.compute)
        return folder

    def post_training(self, share: float) -> Shards:
        folder, section = SCRATCH / f"images-{share}", self.p.profile.train
        if not folder.exists():
            with atomic(folder) as (new,):
                images_stage.mini(self.images.model_copy(update={"detail_share": share}), new)
        return Shards(folder, section.max_undecodable, section.validation.images)

    def benchmark(self, name: str) -> tuple[Path, Path]:
        """The folders of the pairs and of the sets of zero-shot ability."""
        folder = SCRATCH / name
        if not folder.exists():
            with atomic(folder) as (new,):
                mmvp_vlm.make(new / "mmvp_vlm", self.pairs.pairs_per_pattern, name)
                zeroshot_sets.make(new / "zeroshot_sets", self.sets, name)
        return folder / "mmvp_vlm", folder / "zeroshot_sets"

    def trained(self, run: Trial) -> Path:
        """The model's folder, trained here where it is not there yet."""
        original = self.backbone(run.detail_share)
        if run.weights == "pretrained":
            return original
        key = f"{run.recipe}-{run.detail_share}-{run.denoiser_steps}-{run.seed}-{run.rate:g}"
        folder = SCRATCH / f"{run.weights}-{key}"
        if folder.exists():
            return folder
        trained = None
        if run.weights != "trained":
            trained = self.trained(Trial(**asdict(run) | {"weights": "trained"}))
        if run.weights == "drift":
            assert trained
            with atomic(folder) as (new,):
                drift_stage.drift(original, trained, run.seed, new)
            return folder
        chosen = self.p.profile.recipes[run.recipe]
        recipe = chosen.model_copy(update={"optimizer": chosen.optimizer.model_copy(update={"lr": run.rate})})
        with atomic(folder) as (new,):
            self.train(run, original, recipe, trained / FITTED if trained else None, new)
        return folder

    def train(self, run: Trial, original: Path, recipe: Recipe, fitted: Path | None, folder: Path) -> None:
        """Write the model's folder; fitted: where a control starts from."""
        section, own = self.p.profile.train, self.p.backbones[NAME].condition
        backbone, shards = Backbone.load(original), self.post_training(run.detail_share)
        denoiser = Denoiser.load(self.denoiser(run.denoiser_steps))
        losses = losses_of(run.recipe, recipe)
        t = Training(section, recipe, own, losses, run.seed, backbone, denoiser, shards, fitted)
        feedback = build_feedback(t, self.compute)
        curves, never = (folder.with_name(f"{folder.name}.{what}") for what in ("curves", "checkpoint"))
        checkpoint = Checkpoint(never, {}, float("inf"), self.processes)
        end = train(t, feedback, curves, self.processes, checkpoint)
        remove(curves)
        save_like(original, tuned(backbone), folder)
        if not fitted:
            assert end.start
            save_fitted(feedback, end.start, folder / FITTED)

    def score(self, run: Trial) -> dict[str, float]:
        """The measures in %, all NaN where training came to numbers that are not finite."""
        pairs_folder, sets_folder = self.benchmark(run.benchmark)
        try:
            backbone = Backbone.load(self.trained(run)).to(self.compute)
        except NotFiniteError as error:
            print(f"{run}: {error}")
            return dict.fromkeys(MEASURES, float("nan"))
        p, pooling = self.p.profile, self.p.backbones[NAME].published_pooling
        questions = read_mmvp_vlm(pairs_folder, self.pairs.pairs_per_pattern)
        pairs, _, _ = mmvp.score(backbone, questions, pooling, p.mmvp, self.compute)
        sets, answers = zeroshot.score(backbone, sets_folder, p.zeroshot, self.compute)
        found = headline(pairs, sets) | {"zeroshot_outside_bank": self.outside_bank(answers, run.benchmark)}
        return {key: found[key] for key in MEASURES}

    def outside_bank(self, answers: pd.DataFrame, set_name: str) -> float:
        """Zero-shot accuracy on the images whose object no prompt of the bank names, %."""
        anchored = " ".join(self.p.profile.recipes[OURS].losses["self_distillation"]["prompts"])
        asked = answers[answers.measure == "accuracy"]
        objects = [world.OBJECTS[world.image(set_name, 1, int(i))[1][0]] for i in asked.image]
        outside = [name not in anchored.split() for name in objects]
        return 100 * float(asked.right[outside].mean())


_assets: Assets  # of a worker


def _start_worker(p: params.Params) -> None:
    global _assets
    end_with_parent_of_pool(lambda: os._exit(1))  # a killed experiment must leave no second writer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that hands out the work, which ends this
    sys.stdout = sys.stderr = (SCRATCH / f"worker-{os.getpid()}.log").open(
        "w", buffering=1, encoding="utf-8"
    )  # the parent's progress bar is alone on the terminal
    gc.freeze()  # accelerate collects garbage around every training: spare it the objects of the imports
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's and scikit-learn's
    _assets = Assets(p, deterministic_device())


def _make(what: str, value: float | str) -> None:
    getattr(_assets, what)(value)


def _score(runs: list[Trial]) -> list[dict]:
    return [asdict(run) | _assets.score(run) for run in runs]


@contextmanager
def workers(p: params.Params) -> Iterator[ProcessPoolExecutor]:
    """A process a core, each on one thread: small models use no more, and the numbers are the same on any of them."""
    context, cores = multiprocessing.get_context("forkserver"), cpus()
    context.set_forkserver_preload(["pipeline.tools.experiment"])  # its imports are done once, not in each of them
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
    return pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=[*KEYS, *MEASURES])


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
        write(pd.DataFrame([*read().to_dict("records"), *work.result()])[[*KEYS, *MEASURES]])


def gains(rows: pd.DataFrame) -> pd.DataFrame:
    """The test runs minus the same backbone before training, in points."""
    test = rows[rows.benchmark == "test"]
    before = test[test.recipe == "none"].set_index("detail_share")[list(MEASURES)]
    after = test[test.recipe != "none"].copy()
    after[list(MEASURES)] = after[list(MEASURES)].to_numpy() - before.loc[after.detail_share].to_numpy()
    return after


def results(gained: pd.DataFrame) -> pd.DataFrame:
    """Mean gain of the cells, by recipe, weights and measure, with 95 % t intervals that answer two questions.

    new_*: what would other text towers give? The spread of the text towers' means. these_*: what would these give with
    other denoisers and seeds? The spread of the cells of a text tower; NaN with a cell each. Neither holds the error
    of the questions that were asked: all cells answer the same, and runs.csv has no single answers.

    Two kinds of weights are differences, cell by cell: `effect`, the recipe minus its mismatched-image control, and
    `difference`, text_anchored minus the recipe.
    """
    keys, found = ["detail_share", "denoiser_steps", "seed"], []
    ours = gained[(gained.recipe == OURS) & (gained.weights == "trained")].set_index(keys)[list(MEASURES)]
    for recipe, own in gained.groupby("recipe", sort=False):
        parts = dict(list(own.set_index(keys).groupby("weights", sort=False)))
        if {"trained", "shuffled"} <= parts.keys():
            shared = parts["shuffled"].index
            parts["effect"] = parts["trained"].loc[shared, list(MEASURES)] - parts["shuffled"][list(MEASURES)]
        if recipe != OURS and len(ours):
            parts["difference"] = ours - parts["trained"].loc[ours.index, list(MEASURES)]
        for weights, part in parts.items():
            for measure in MEASURES:
                new, these = over_groups([group.tolist() for _, group in part[measure].groupby("detail_share")])
                rounded = (round(value, 2) for value in (*new, *these[1:]))
                found.append((recipe, weights, measure, len(part), *rounded))
    columns = ["recipe", "weights", "measure", "cells", "gain", "new_low", "new_high", "these_low", "these_high"]
    return pd.DataFrame(found, columns=columns)


INTERVALS = """Gains in points. First interval: what other text towers would give (t interval over the means of these).
Second: what these text towers would give with other denoisers and seeds (t interval within them; none where a tower has
one cell). All cells answer the same questions, and no answer is kept by question, so their error is in neither.
"""


def markdown(table: pd.DataFrame, gained: pd.DataFrame) -> str:
    """The table of all gains, and that of the pairs by text tower (the mean of its cells)."""
    lines = [INTERVALS, f"| recipe | weights | cells | {' | '.join(MEASURES)} |"]
    lines += ["|---" * (3 + len(MEASURES)) + "|"]
    for (recipe, weights), own in table.groupby(["recipe", "weights"], sort=False):
        texts = []
        for row in own.itertuples():
            these = Interval(row.gain, row.these_low, row.these_high).text().partition(" ")[2]
            texts.append(
                Interval(row.gain, row.new_low, row.new_high).text() + f" {these}" * (row.these_low == row.these_low)
            )
        lines.append(f"| {recipe} | {weights} | {own.cells.iloc[0]} | {' | '.join(texts)} |")
    shares = sorted(set(gained.detail_share), reverse=True)
    texts = [f"{100 * share:.0f} % of captions detailed" for share in shares]
    lines += ["", f"| pairs_stock, by text tower | {' | '.join(texts)} |", "|---" * (1 + len(shares)) + "|"]
    for recipe, own in gained[gained.weights == "trained"].groupby("recipe", sort=False):
        means = own.groupby("detail_share").pairs_stock.mean()
        lines.append(f"| {recipe} | {' | '.join(f'{means[share]:+.1f}' for share in shares)} |")
    return "\n".join(lines) + "\n"


def figure(table: pd.DataFrame) -> Figure:
    """Each gain with its intervals (thin: other text towers; thick: these): a row for a recipe's weights."""
    drawn = Figure(figsize=(12, 5), layout="constrained")
    for axis, measure in zip(drawn.subplots(1, 3, sharey=True), ("pairs_stock", "zeroshot", "probe"), strict=True):
        own = table[(table.measure == measure) & (table.weights != "difference")]
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
    assets = Assets(p, deterministic_device())
    for share in progress(DETAIL_SHARES, "images of post-training"):  # img2dataset has processes of its own
        assets.post_training(share)
    with workers(p) as pool:
        made = [pool.submit(_make, "denoiser", steps) for steps in sorted(DENOISER_STEPS, reverse=True)]
        made += [pool.submit(_make, "backbone", share) for share in DETAIL_SHARES]
        made += [pool.submit(_make, "benchmark", name) for name in BENCHMARKS]
        for work in progress(as_completed(made), "denoisers, backbones, benchmarks", len(made)):
            work.result()
        carry_out(pool, tuning())
        best = best_rates(read())
        print(f"rates chosen on the dev split: {best}")
        carry_out(pool, testing(best))
    gained = gains(read())
    table = results(gained)
    with atomic(*(OUTPUT / f"results.{suffix}" for suffix in ("csv", "md", "png"))) as (csv, md, png):
        table.to_csv(csv, index=False)
        md.write_text(markdown(table, gained), encoding="utf-8")
        figure(table).savefig(png, format="png", dpi=110, metadata={"Software": None})
    print(markdown(table, gained))


if __name__ == "__main__":
    main()
