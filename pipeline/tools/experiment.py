"""Do the recipes help, and is it feedback that helps? The experiment of metrics/recipes/plan.md.

    python -m pipeline.tools.experiment         after `dvc repro`; goes on where it was interrupted; about two hours

Makes three backbones and three denoisers of the mini world, lets every recipe choose its rate on the development pairs,
then trains and scores each cell of the plan. Every finished run is a row of metrics/recipes/runs.csv and is not made
again; delete the file to begin anew. At the end stand metrics/recipes/results.{csv,md,png}. Models lie in
data/.experiment.scratch, which may be removed when all is done.
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure

from pipeline import backbone as backbone_stage
from pipeline import denoiser as denoiser_stage
from pipeline import drift as drift_stage
from pipeline import images as images_stage
from pipeline import mmvp, mmvp_vlm, params, zeroshot
from pipeline.adapters.backbones import Backbone, save_like
from pipeline.adapters.benchmarks import read_mmvp_vlm
from pipeline.adapters.denoisers import Denoiser
from pipeline.adapters.shards import Shards
from pipeline.diva import training
from pipeline.evidence.results import headline
from pipeline.evidence.statistics import over_seeds
from pipeline.mini import world
from pipeline.params import MiniDenoiser, MiniImages, MiniSource, Recipe
from pipeline.runtime import UserError, device, progress, remove, stage, whole
from pipeline.train import Checkpoint, build_feedback, train, tuned

SCRATCH, OUTPUT = Path("data/.experiment.scratch"), Path("metrics/recipes")
NAME = "mini"
DETAIL_SHARES = (1.0, 0.6, 0.3)  # of the captions that text tower and projection learn from
DENOISER_STEPS = (500, 1000, 2000)
SEEDS = (1, 2, 3)
TUNED_IN = (0.6, 1000, 0)  # detail share, denoiser steps, seed: no cell of the test has this seed
RATES = {
    "diva": (0.003, 0.01, 0.03),
    "text_anchored": (0.0007, 0.002, 0.006),
    "two_stage": (0.0003, 0.001, 0.003),
    "contrastive": (0.0003, 0.001, 0.003),
}
OURS = "text_anchored"
DEVELOPMENT_PAIRS = 50  # a pattern
MEASURES = ("pairs_plain", "image_to_statement_plain", "zeroshot", "zeroshot_unanchored", "probe")


@dataclass(frozen=True)
class Run:
    """One row: a recipe or a control of it, in one cell, at one rate, on one benchmark."""

    benchmark: str  # development | test
    recipe: str  # `none`: the backbone before training
    weights: str  # pretrained | diva | shuffled | drift
    detail_share: float
    denoiser_steps: int
    seed: int
    rate: float


def cells() -> list[tuple[float, int, int]]:
    """A Latin square: every text tower with every denoiser; each seed once with each of either."""
    return [
        (share, steps, SEEDS[(i + j) % 3])
        for (i, share), (j, steps) in itertools.product(enumerate(DETAIL_SHARES), enumerate(DENOISER_STEPS))
    ]


def tuning() -> Iterator[Run]:
    share, steps, seed = TUNED_IN
    yield Run("development", "none", "pretrained", share, 0, 0, 0.0)
    for recipe, rates in RATES.items():
        yield from (Run("development", recipe, "diva", share, steps, seed, rate) for rate in rates)


def testing(best: dict[str, float]) -> Iterator[Run]:
    """Untrained backbones first; then every cell: recipe and drift everywhere, shuffled where the seed is the first."""
    yield from (Run("test", "none", "pretrained", share, 0, 0, 0.0) for share in DETAIL_SHARES)
    for cell, (recipe, rate) in itertools.product(cells(), best.items()):
        for weights in ("diva", "drift", *(["shuffled"] if cell[2] == SEEDS[0] else [])):
            yield Run("test", recipe, weights, *cell, rate)


def best_rates(rows: pd.DataFrame) -> dict[str, float]:
    """Each recipe's rate with the most development pairs right; of equals the smaller."""
    found = rows[(rows.benchmark == "development") & (rows.weights == "diva")].sort_values("rate")
    return {recipe: float(found[found.recipe == recipe].set_index("rate").pairs_plain.idxmax()) for recipe in RATES}


class Tunnel:
    """The backbones, denoisers and pictures that the runs share, each made when first asked for."""

    def __init__(self, p: params.Params, compute: torch.device) -> None:
        self.p, self.compute, self.processes = p, compute, Accelerator(cpu=compute.type == "cpu")
        source, section, images = p.backbones[NAME].source, p.profile.denoiser, p.profile.images
        if not (
            isinstance(source, MiniSource) and isinstance(section, MiniDenoiser) and isinstance(images, MiniImages)
        ):
            raise UserError("the experiment is one of the mini world. Set run.profile to mini in params.yaml.")
        self.source, self.section, self.images = source, section, images

    def backbone(self, share: float) -> Path:
        folder = SCRATCH / f"backbone-{share}"
        if not folder.exists():
            text_tower = self.source.text_tower.model_copy(update={"detail_share": share})
            with whole(folder) as (new,):
                backbone_stage.make(self.source.model_copy(update={"text_tower": text_tower}), new)
        return folder

    def denoiser(self, steps: int) -> Path:
        folder = SCRATCH / f"denoiser-{steps}"
        if not folder.exists():
            with whole(folder) as (new,):
                denoiser_stage.make(self.section.model_copy(update={"steps": steps}), new, self.compute)
        return folder

    def pictures(self, share: float) -> Shards:
        folder, section = SCRATCH / f"images-{share}", self.p.profile.train
        if not folder.exists():
            with whole(folder) as (new,):
                images_stage.mini(self.images.model_copy(update={"detail_share": share}), new)
        return Shards(folder, section.max_undecodable, section.held_out.images)

    def development(self) -> Path:
        folder = SCRATCH / "development"
        if not folder.exists():
            with whole(folder) as (new,):
                mmvp_vlm.render(new, DEVELOPMENT_PAIRS, "development")
        return folder

    def trained(self, run: Run) -> Path:
        """The model's folder, trained here where it is not there yet."""
        original = self.backbone(run.detail_share)
        if run.weights == "pretrained":
            return original
        key = f"{run.recipe}-{run.detail_share}-{run.denoiser_steps}-{run.seed}-{run.rate:g}"
        folder = SCRATCH / f"{run.weights}-{key}"
        if folder.exists():
            return folder
        if run.weights == "drift":
            diva = self.trained(Run(**asdict(run) | {"weights": "diva"}))
            with whole(folder) as (new,):
                drift_stage.drift(original, diva, run.seed, new)
            return folder
        chosen = self.p.profile.recipes[run.recipe]
        recipe = chosen.model_copy(update={"optimizer": chosen.optimizer.model_copy(update={"lr": run.rate})})
        with whole(folder) as (new,):
            save_like(original, self.tensors(run, original, recipe), new)
        return folder

    def tensors(self, run: Run, original: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
        section, own = self.p.profile.train, self.p.backbones[NAME].condition
        backbone, shards = Backbone.load(original), self.pictures(run.detail_share)
        denoiser = Denoiser.load(self.denoiser(run.denoiser_steps))
        feedback = build_feedback(backbone, denoiser, own, section, recipe, run.seed, shards, self.compute)
        checkpoint = Checkpoint(SCRATCH / "checkpoint", {}, float("inf"), self.processes)
        train(
            feedback, backbone, denoiser, shards, section, recipe, run.seed, SCRATCH / "curves", self.processes,
            checkpoint, shuffled=run.weights == "shuffled",
        )  # fmt: skip
        shutil.rmtree(SCRATCH / "curves")
        return tuned(backbone)

    def score(self, run: Run) -> dict[str, float]:
        """The measures in %; of the development benchmark the pairs alone."""
        data, p = Path("data", self.p.run.profile), self.p.profile
        if run.benchmark == "development":
            folder, count = self.development(), DEVELOPMENT_PAIRS
        else:
            folder, count = data / "mmvp_vlm", p.mmvp_vlm.pairs_per_pattern
        try:
            backbone = Backbone.load(self.trained(run)).to(self.compute)
        except training.NotFiniteError as error:
            print(f"{run}: {error}")
            return dict.fromkeys(MEASURES, float("nan"))
        read_out = mmvp.read_out_of(self.p.backbones[NAME].published_read_out)
        pairs, _, _ = mmvp.score(backbone, read_mmvp_vlm(folder, count), read_out, p.mmvp, self.compute)
        if run.benchmark == "development":
            return {"pairs_plain": pairs["plain"]["statement_to_image"]["average"]}
        sets, answers = zeroshot.score(backbone, data / "zeroshot_sets", p.zeroshot, self.compute)
        found = headline(pairs, sets)
        return {
            **{key: found[key] for key in MEASURES if key in found},
            "zeroshot_unanchored": self.unanchored(answers),
        }

    def unanchored(self, answers: pd.DataFrame) -> float:
        """Zero-shot accuracy on the pictures whose object no anchor's prompt names, %."""
        anchored = " ".join(self.p.profile.recipes["text_anchored"].anchor.prompts)  # type: ignore[union-attr]
        asked = answers[answers.measure == "accuracy"]
        objects = [world.OBJECTS[world.picture("scorings", 1, int(i))[1][0]] for i in asked.image]
        outside = [name not in anchored.split() for name in objects]
        return 100 * float(asked.right[outside].mean())


def read() -> pd.DataFrame:
    file = OUTPUT / "runs.csv"
    return pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=[*Run.__dataclass_fields__, *MEASURES])


def carry_out(tunnel: Tunnel, runs: list[Run]) -> None:
    """Make what has no row yet, writing each row as it comes."""
    keys = list(Run.__dataclass_fields__)
    for run in progress(runs, "runs"):
        rows = read()
        wanted = asdict(run)
        if (rows[keys] == pd.Series(wanted)).all(axis=1).any():
            continue
        row = {**wanted, **tunnel.score(run)}
        with whole(OUTPUT / "runs.csv") as (file,):
            table = pd.concat([rows, pd.DataFrame([row])]) if len(rows) else pd.DataFrame([row])
            table.reindex(columns=[*keys, *MEASURES]).to_csv(file, index=False, float_format="%.4f")


def gains(rows: pd.DataFrame) -> pd.DataFrame:
    """Test runs less their backbone before training, in points."""
    test = rows[rows.benchmark == "test"]
    before = test[test.recipe == "none"].set_index("detail_share")[list(MEASURES)]
    after = test[test.recipe != "none"].copy()
    after[list(MEASURES)] = after[list(MEASURES)].to_numpy() - before.loc[after.detail_share].to_numpy()
    return after


def results(gained: pd.DataFrame) -> pd.DataFrame:
    """Mean gain and 95 % t interval over cells, by recipe, weights and measure.

    Two kinds of weights are differences, cell by cell: `remains`, the recipe less its shuffled control, and `behind`,
    text_anchored less the recipe.
    """
    keys, found = ["detail_share", "denoiser_steps", "seed"], []
    ours = gained[(gained.recipe == OURS) & (gained.weights == "diva")].set_index(keys)[list(MEASURES)]
    for recipe, own in gained.groupby("recipe", sort=False):
        parts = dict(list(own.set_index(keys).groupby("weights", sort=False)))
        if {"diva", "shuffled"} <= parts.keys():
            shared = parts["shuffled"].index
            parts["remains"] = parts["diva"].loc[shared, list(MEASURES)] - parts["shuffled"][list(MEASURES)]
        if recipe != OURS and len(ours):
            parts["behind"] = ours - parts["diva"].loc[ours.index, list(MEASURES)]
        for weights, part in parts.items():
            for measure in MEASURES:
                interval = over_seeds(part[measure].tolist())
                found.append((recipe, weights, measure, len(part), *(round(value, 2) for value in interval)))
    return pd.DataFrame(found, columns=["recipe", "weights", "measure", "cells", "gain", "low", "high"])


def markdown(table: pd.DataFrame, gained: pd.DataFrame) -> str:
    """The table of all gains, and that of the pairs by text tower (the mean of its three cells)."""
    lines = [f"| recipe | weights | cells | {' | '.join(MEASURES)} |", "|---" * (3 + len(MEASURES)) + "|"]
    for (recipe, weights), own in table.groupby(["recipe", "weights"], sort=False):
        texts = [f"{row.gain:+.1f} [{row.low:+.1f}, {row.high:+.1f}]" for row in own.itertuples()]
        lines.append(f"| {recipe} | {weights} | {own.cells.iloc[0]} | {' | '.join(texts)} |")
    shares = sorted(set(gained.detail_share), reverse=True)
    texts = [f"{100 * share:.0f} % of captions detailed" for share in shares]
    lines += ["", f"| pairs_plain, by text tower | {' | '.join(texts)} |", "|---" * (1 + len(shares)) + "|"]
    for recipe, own in gained[gained.weights == "diva"].groupby("recipe", sort=False):
        means = own.groupby("detail_share").pairs_plain.mean()
        lines.append(f"| {recipe} | {' | '.join(f'{means[share]:+.1f}' for share in shares)} |")
    return "\n".join(lines) + "\n"


def figure(table: pd.DataFrame) -> Figure:
    """Each gain with its interval: a row for a recipe's weights, a panel for a measure."""
    drawn = Figure(figsize=(12, 5), layout="constrained")
    for axis, measure in zip(drawn.subplots(1, 3, sharey=True), ("pairs_plain", "zeroshot", "probe"), strict=True):
        own = table[(table.measure == measure) & (table.weights != "behind")]
        colours = ["tab:grey" if weights in ("drift", "shuffled") else "tab:blue" for weights in own.weights]
        axis.axvline(0, color="black", linewidth=0.8)
        axis.hlines(range(len(own)), own.low, own.high, colors=colours)
        axis.scatter(own.gain, range(len(own)), c=colours)
        axis.set(title=measure, xlabel="gain, points")
    axis.set_yticks(range(len(own)), own.recipe + ", " + own.weights.replace("diva", "tuned"))
    axis.invert_yaxis()  # the panels share it
    return drawn


@stage
def main() -> None:
    tunnel = Tunnel(params.load(), device())
    carry_out(tunnel, list(tuning()))
    best = best_rates(read())
    print(f"rates chosen on the development pairs: {best}")
    carry_out(tunnel, list(testing(best)))
    gained = gains(read())
    table = results(gained)
    with whole(*(OUTPUT / f"results.{suffix}" for suffix in ("csv", "md", "png"))) as (csv, md, png):
        table.to_csv(csv, index=False)
        md.write_text(markdown(table, gained))
        figure(table).savefig(png, format="png", dpi=110, metadata={"Software": None})
    print(markdown(table, gained))
    remove(SCRATCH / "checkpoint")


if __name__ == "__main__":
    main()
