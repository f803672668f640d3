"""The ladder of recipes: who gains the most pairs at hardly any cost, in a frozen world that anybody can make.

    python -m pipeline.tools.ladder NAME            train and score the seeds that the entry's log lacks, and judge it
    python -m pipeline.tools.ladder NAME --again    the same without its log: train and score all of its seeds
    python -m pipeline.tools.ladder                 the table of all entries

Both go on where they were interrupted.

An entry is metrics/recipes/ladder/<NAME>.yaml: who made it, its claim in points of pairs, its seeds, and its recipe, a
block as in profiles.mini.recipes of params.yaml. Its log, <NAME>.csv, has a row for each seed; rows of another recipe,
whose hash is not the entry's, make room. The world is the default of profile mini; the scores are on images of its set
"ladder", on which nothing is trained or tuned. This makes the world:

    dvc repro pipeline/dvc.yaml:input@images pipeline/dvc.yaml:input@denoiser pipeline/dvc.yaml:backbone@mini

The claim holds if the seeds' mean gain is larger and their mean loss of zero-shot accuracy smaller than ALLOWED, each
by a one-sided t test at LEVEL. Exit status 1 if it does not.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import Field
from scipy import stats

from pipeline.core import config
from pipeline.core.compute import deterministic_device
from pipeline.core.config import PositiveFloat, Section, Seed
from pipeline.core.outputs import atomic, remove
from pipeline.core.stages import UserError, progress, stage
from pipeline.data.shards import Shards
from pipeline.engine.losses import losses_of
from pipeline.sections import params
from pipeline.sections.recipe import Recipe
from pipeline.tools.pages import table
from pipeline.tools.trials import MEASURES, NAME, Assets, Trial

ENTRIES, SET, SCRATCH = Path("metrics/recipes/ladder"), "ladder", Path("data/.ladder.scratch")
ALLOWED, LEVEL = 0.5, 0.01
COST = "seconds"


class Entry(Section):
    """by: who made it, and where to read of it. knows: what the recipe learns from, beside images. claim: points of
    pairs. recipe: differs from profiles.mini.base_recipe."""

    by: str
    knows: str
    claim: PositiveFloat
    seeds: list[Seed] = Field(min_length=5)
    recipe: dict[str, Any]


class FrozenWorld(Assets):
    """The default world of profile mini, as `dvc repro` makes it, and one recipe."""

    def __init__(self, p: params.Params, compute: torch.device, recipe: Recipe) -> None:
        super().__init__(p, compute, SCRATCH)
        self.own = recipe

    def recipe(self, run: Trial) -> Recipe:
        return self.own

    def backbone(self, share: float) -> Path:
        return self._made(Path("models/mini/pretrained", NAME), f"backbone@{NAME}")

    def denoiser(self, steps: int) -> Path:
        return self._made(Path("data/mini/denoiser"), "input@denoiser")

    def post_training(self, share: float) -> Shards:
        section, folder = self.p.profile.train, self._made(Path("data/mini/images"), "input@images")
        return Shards(folder, section.max_undecodable, section.validation.images, captioned=True)

    def _made(self, folder: Path, made_by: str) -> Path:
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist. Make the frozen world: `dvc repro pipeline/dvc.yaml:{made_by}`.")
        return folder


def entry(name: str) -> Entry:
    """Raises UserError for an entry that is not there, or is wrong."""
    file = ENTRIES / f"{name}.yaml"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in ENTRIES.glob("*.yaml")))
        raise UserError(f"{file} does not exist. Write it, or name one of these: {there}.")
    return config.checked(Entry, config.content(file), path=file)


def block(found: Entry) -> dict[str, Any]:
    """The whole recipe, as params.yaml would hold it."""
    return {**config.content()["profiles"]["mini"]["base_recipe"], **found.recipe}


def recipe_of(name: str, found: Entry) -> Recipe:
    file = ENTRIES / f"{name}.yaml"
    recipe: Recipe = config.checked(Recipe, block(found), "recipe", file)
    losses_of("recipe", recipe, file)
    return recipe


def hash_of(found: Entry) -> str:
    """The start of the sha256 of its recipe, which its rows bear."""
    return hashlib.sha256(json.dumps(block(found), sort_keys=True).encode()).hexdigest()[:12]


def measured(world: FrozenWorld, name: str, weights: str, seed: int) -> dict[str, Any]:
    """A row of the log: the measures in %, and the seconds that training took."""
    run, start = Trial(SET, name, weights, 0.0, 0, seed, "none"), time.perf_counter()
    folder = world.trained(run)
    seconds = round(time.perf_counter() - start) if weights == "trained" else 0
    found = world.score(run)
    if weights == "trained":
        remove(folder)
    return {"weights": weights, "seed": seed, **{key: found[key] for key in MEASURES}, COST: seconds}


def log(world: FrozenWorld, name: str, found: Entry, file: Path) -> pd.DataFrame:
    """The rows of the pretrained backbone and of the entry's seeds; those that `file` lacks are made and added."""
    recipe, logged = hash_of(found), pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=["recipe"])
    rows = logged[logged.recipe == recipe].to_dict("records")
    if others := len(logged) - len(rows):
        print(f"{others} rows of {file} are of another recipe and make room")
    there = {(row["weights"], row["seed"]) for row in rows}
    wanted = [("pretrained", 0), *(("trained", seed) for seed in found.seeds)]
    for weights, seed in progress([key for key in wanted if key not in there], f"seeds of {name}"):
        rows.append({"recipe": recipe, **measured(world, name, weights, seed)})
        with atomic(file) as (new,):
            pd.DataFrame(rows).to_csv(new, index=False)
    return pd.DataFrame(rows)


def gains(found: Entry, rows: pd.DataFrame) -> pd.DataFrame:
    """Of each seed that the entry names over the backbone before training, in points."""
    (before,) = rows[rows.weights == "pretrained"][list(MEASURES)].to_numpy()
    return rows[(rows.weights == "trained") & rows.seed.isin(found.seeds)][list(MEASURES)] - before


def larger(values: pd.Series, than: float) -> float:
    """One-sided p of the seeds' mean being no larger."""
    if values.std(skipna=False) == 0:
        return float(values.mean() <= than)
    return float(stats.ttest_1samp(values, than, alternative="greater").pvalue)


def claims(found: Entry, gained: pd.DataFrame) -> dict[str, float]:
    """What the entry claims, each with the p of its being wrong."""
    return {
        f"gains more than {found.claim:g} points of pairs": larger(gained.pairs_stock, found.claim),
        f"loses less than {ALLOWED} points of zero-shot accuracy": larger(gained.zeroshot, -ALLOWED),
    }


def judge(name: str, found: Entry, rows: pd.DataFrame) -> None:
    """Print what was found. Raises UserError where the claim does not hold."""
    print(rows.to_string(index=False))
    gained = gains(found, rows)
    for measure in MEASURES:
        mean, sd = gained[measure].mean(skipna=False), gained[measure].std(skipna=False)
        print(f"{measure:28} {mean:+6.2f}  s.d. {sd:.2f}")
    wanted = claims(found, gained)
    for claim, p in wanted.items():
        print(f"{claim}: p = {p:.2g}")
    if failed := [claim for claim, p in wanted.items() if not p < LEVEL]:
        raise UserError(f"{name}: not shown at p < {LEVEL} that it {' or '.join(failed)}.")


def markdown() -> str:
    """The table of all entries that have a log of their recipe, the largest gain first. Until all of its seeds are
    there, no claim is judged."""
    rows = []
    for file in ENTRIES.glob("*.csv"):
        found, logged = entry(file.stem), pd.read_csv(file)
        logged = logged[logged.recipe == hash_of(found)]
        if logged.empty:
            continue
        gained = gains(found, logged)
        values = [f"{gained[measure].mean(skipna=False):+.1f}" for measure in MEASURES]
        seconds = logged[logged.weights == "trained"][COST].mean()
        holds = "yes" if all(p < LEVEL for p in claims(found, gained).values()) else "no"
        if len(gained) < len(set(found.seeds)):
            holds = "unfinished"
        own = [f"`{file.stem}`", found.knows, f"{found.claim:g}", holds, str(len(gained))]
        row = [*own, *values, f"{seconds:.0f}", found.by]
        rows.append((-gained.pairs_stock.mean(), row))
    head = ["entry", "knows, beside images", "claim", "holds", "seeds", *MEASURES, "s a seed", "by"]
    return table([head, *(row for _, row in sorted(rows))])


@stage
def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.tools.ladder", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("name", nargs="?", help="of an entry; without it, the table of all")
    parser.add_argument("--again", action="store_true", help="train and score all of its seeds, whatever its log has")
    asked = parser.parse_args(arguments)
    if not asked.name:
        print(markdown())
        return
    found = entry(asked.name)
    world = FrozenWorld(params.load(), deterministic_device(), recipe_of(asked.name, found))
    folder = SCRATCH if asked.again else ENTRIES
    rows = log(world, asked.name, found, folder / f"{asked.name}.csv")
    remove(SCRATCH)
    judge(asked.name, found, rows)


if __name__ == "__main__":
    main()
