"""Chance or fault: a run of profile mini against the band that reference runs define.

    python -m pipeline.tools.reference [FOLDER]     check metrics/mini (or FOLDER, a copy of somebody's metrics/mini)
    python -m pipeline.tools.reference --make       make the reference of the last commit; goes on where interrupted

A reference run is `dvc repro report` in a clone, with a training seed of its own and another rounding (threads,
instruction sets), which changes every model and score as another processor without the pins would. The run that was
committed then is one of them. The band of a headline figure is the 99 % t prediction interval of one new run.
metrics/reference/mini.json has the runs, pairs.csv how many of the others have each pair right.

The check ends with status 1 where a figure is outside its band, a count is another, or a verdict is not the word that
all reference runs share.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline.core.outputs import atomic, remove, write_json
from pipeline.core.stages import UserError, progress, stage
from pipeline.evidence.results import POOLINGS, recipe_and_control, without_controls
from pipeline.evidence.statistics import interval

METRICS, OUTPUT, SCRATCH = Path("metrics/mini"), Path("metrics/reference"), Path("data/.reference.scratch")
LOCKS = ("dvc.lock", "pipeline/dvc.lock")
NOT_MEASURED = ("report.html", "report.md", "oracle", "sensitivity")  # machine and times, or of other commands
MEASURED = ("metrics/mini", *(f":!metrics/mini/{name}" for name in NOT_MEASURED))
LEVEL = 0.99
MODELS = ("pretrained.", "denoiser.")  # figures that no training seed touches, only rounding
OTHER = {"stock": "published", "published": "stock"}
HEADLINES = ("pairs_stock", "pairs_published", "zeroshot", "retrieval", "probe")  # of pretrained; each recipe's gain
OF_CONTROLS = ("pairs_stock", "zeroshot")  # of each control's gain
ROUNDINGS: dict[int, dict[str, str]] = {  # of the reference runs, by training seed
    1: {"OMP_NUM_THREADS": "1"},
    2: {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
    3: {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    4: {"ATEN_CPU_CAPABILITY": "default"},
    5: {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    6: {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


class MeasuredRun(NamedTuple):
    """figures: what chance moves; counts: what it does not; verdicts: words.

    right: which pairs the pretrained backbone has right (0 or 1), a row a pair, a column a pooling rule.
    """

    figures: dict[str, float]
    counts: dict[str, float]
    verdicts: dict[str, str]
    right: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> "MeasuredRun":
        """Of a folder such as metrics/mini. Raises UserError."""

        def content(name: str) -> Any:
            return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))

        try:
            report, weights = content("report")["mini"], content("evidence")["mini"]["weights"]
            recipes = without_controls(weights)
            denoiser, images, backbone = content("denoiser"), content("images"), content("backbone/mini")
            training = {recipe: content(f"train/mini-{recipe}/metrics") for recipe in recipes}
            mmvp = {name: content(f"scores/mmvp/mini-{name}/scores") for name in ("pretrained", *recipes)}
            pairs = pd.read_csv(folder / "scores/mmvp/mini-pretrained/pairs.csv", keep_default_na=False)
            right = pairs.pivot(index=["pair", "pattern"], columns="pooling", values="statement_to_image")
            scored = {"pretrained": report["score"]["pretrained"], "gain": report["gain"]}
            loss = denoiser["validation_loss"]
            figures = {
                "pretrained": judged(scored["pretrained"]),
                "gain": {name: judged(gain, name) for name, gain in scored["gain"].items()},
                "denoiser": {"right": loss["right"]}
                | {f"{k}_less_right": loss[k] - loss["right"] for k in ("empty", "wrong")},
                "training": {
                    recipe: {"validation_loss_fell_by": found["validation_loss_first"] - found["validation_loss_last"]}
                    for recipe, found in training.items()
                },
            }
            counts = {
                "images": images,
                "training": {
                    recipe: {key: found[key] for key in ("steps", "images", "undecodable_images")}
                    for recipe, found in training.items()
                },
                "parameters": {"backbone": backbone["parameters"], "unet": denoiser["unet_parameters"]},
                "draws": {
                    name: {
                        pooling: {direction: found[pooling][direction]["draws"] for direction in found[pooling]}
                        for pooling in POOLINGS
                    }
                    for name, found in mmvp.items()
                },
            }
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder}: not the metrics of a run of profile mini with the committed `run`: {error}. "
                "Run `dvc repro`."
            ) from None
        return cls(
            flat(figures), flat(counts), flat({name: found["verdict"] for name, found in weights.items()}), right
        )


def judged(row: dict[str, float], weights: str = "pretrained") -> dict[str, float]:
    """The figures of a row of report.json that are judged; NaN where it lacks one."""
    return {key: row.get(key, np.nan) for key in (OF_CONTROLS if recipe_and_control(weights)[1] else HEADLINES)}


def flat(nested: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as one, under names such as gain.diva.pairs_stock."""
    return pd.json_normalize(nested).to_dict("records")[0]


def agreement(right: pd.DataFrame, others: pd.DataFrame) -> dict[str, float]:
    """How well a run has the same pairs right as other runs do: `others` says how many of them, in the same form.

    smallest_pattern: the smallest correlation in a pattern, stock embedding. It tells a pattern whose pairs are
    mislabelled, whose average may hardly change. pooling: how much better each pooling rule correlates with itself than
    with the other one. It tells pooling rules that were swapped.
    """
    with np.errstate(invalid="ignore"):  # a pattern that is all right or all wrong agrees with nothing: NaN
        by_pattern = [right.stock[own.index].corr(own) for _, own in others.stock.groupby("pattern")]
    same, swapped = (right.corrwith(columns).mean() for columns in (others, others.rename(columns=OTHER)))
    found = {"agreement.smallest_pattern": np.min(by_pattern), "agreement.pooling": same - swapped}
    return {name: round(float(value), 6) for name, value in found.items()}


def band(values: list[float]) -> tuple[float, float]:
    """The prediction interval of one more value."""
    n, variance = len(values), float(np.var(values, ddof=1))
    _, low, high = interval(float(np.mean(values)), [(variance * (1 + 1 / n), n - 1)], LEVEL)
    return low, high


def faults(run: MeasuredRun, reference: dict[str, Any], pairs: pd.DataFrame) -> tuple[Table, list[str]]:
    """(a table of what differs from the reference's first run, the one committed then; what is outside of its band, or
    another count or verdict).
    """
    runs, wrong = reference["runs"], []
    figures = run.figures | agreement(run.right, pairs)
    table = Table(
        "figure", "here", "first of them", "band", "of the band", title=f"What differs from {len(runs)} reference runs"
    )
    for name in runs[0]["figures"]:
        own, values = figures.get(name, float("nan")), [other["figures"][name] for other in runs]
        low, high = band(values)
        share = abs(own - (low + high) / 2) / max((high - low) / 2, 1e-9)
        if own != values[0]:
            table.add_row(name, f"{own:.4g}", f"{values[0]:.4g}", f"{low:.4g} to {high:.4g}", f"{share:.0%}")
        if not low <= own <= high:
            wrong.append(f"{name} is {own:.4g}, outside {low:.4g} to {high:.4g}")
    for name, value in reference["counts"].items():
        if run.counts.get(name) != value:
            wrong.append(f"{name} is {run.counts.get(name)}, wanted {value}")
    for name in runs[0]["verdicts"]:
        words = {other["verdicts"][name] for other in runs}
        if len(words) == 1 and run.verdicts.get(name) not in words:
            wrong.append(f"the verdict {name} is '{run.verdicts.get(name)}', all reference runs say '{words.pop()}'")
    return table, wrong


def check(folder: Path) -> None:
    """Print what differs. Raises UserError where `faults` finds any."""
    file = OUTPUT / "mini.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist. Restore it with git, or make the reference runs: --make.")
    same = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *LOCKS, *MEASURED], capture_output=True)
    if folder == METRICS and same.returncode == 0:
        print("equal byte for byte: the locks, which hash every output, and the figures are the committed ones")
    pairs = pd.read_csv(OUTPUT / "pairs.csv", keep_default_na=False).set_index(["pair", "pattern"])
    table, wrong = faults(MeasuredRun.read(folder), json.loads(file.read_text(encoding="utf-8")), pairs)
    if table.row_count:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    if wrong:
        raise UserError(
            f"{folder}: what follows lies outside its band, or is another count or verdict than the reference runs'. "
            "One figure or verdict alone is no proof of a fault: look at what else moved. Another count is a reason to "
            "look for one (metrics/README.md, 'Chance or fault').\n  " + "\n  ".join(wrong)
        )
    chance = "lies in its band" if table.row_count else "is that of the first reference run"
    print(f"{folder}: every figure {chance}")


def reference_run(seed: int, rounding: dict[str, str]) -> Path:
    """Make a seed's run in a clone of the last commit, unless it is finished; returns the folder of its metrics."""
    clone = SCRATCH / f"run-{seed}"
    if not (clone / ".git").is_dir():
        with atomic(clone) as (new,):
            subprocess.run(["git", "clone", "--quiet", "--shared", ".", str(new)], check=True)
            for name in ("images", "mmvp", "zeroshot"):  # drawn, not computed: the same whatever the rounding
                if Path("data/mini", name).is_dir():
                    shutil.copytree(Path("data/mini", name), new / "data/mini" / name)
            text = (new / "params.yaml").read_text(encoding="utf-8")
            (new / "params.yaml").write_text(re.sub(r"(?m)^seed: \d+", f"seed: {seed}", text), encoding="utf-8")
            shutil.rmtree(new / METRICS)
    with (clone / "log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "dvc", "repro", "report"]
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=clone, env=os.environ | path | rounding, stdout=log, stderr=log)
    if done.returncode:
        raise UserError(
            f"the reference run of seed {seed} ended with status {done.returncode}. {clone / 'log'} says why; correct "
            "the cause and run the same command again."
        )
    return clone / METRICS


def make() -> None:
    """Make the reference runs, one for each core at a time, and write the reference."""
    changed = subprocess.run(
        ["git", "status", "--porcelain", "pipeline", "params.yaml", "dvc.yaml", *LOCKS, *MEASURED], capture_output=True
    )
    if changed.returncode or changed.stdout:
        raise UserError(
            "reference runs are made from the last commit, but this folder is no git repository or has changes. "
            "Commit them."
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        working = [pool.submit(reference_run, seed, rounding) for seed, rounding in ROUNDINGS.items()]
        folders = [METRICS, *(work.result() for work in progress(working, "reference runs"))]
    runs = [MeasuredRun.read(folder) for folder in folders]
    write(runs)
    remove(SCRATCH)


def write(runs: list[MeasuredRun]) -> None:
    """Write the reference: of the committed run, and of one for each entry of ROUNDINGS.

    Raises UserError where two of them are not independent.
    """
    names = ["committed", *map(str, ROUNDINGS)]
    models = [{name: value for name, value in run.figures.items() if name.startswith(MODELS)} for run in runs]
    pairs_of_runs = combinations(zip(names, models, strict=True), 2)
    if equal := [f"{one} and {other}" for (one, a), (other, b) in pairs_of_runs if a == b]:
        raise UserError(
            f"reference runs {', '.join(equal)} have the same pretrained backbone and denoiser: on this processor they "
            f"round alike, so they count as one. Change ROUNDINGS, and remove those runs from {SCRATCH}."
        )
    right = sum(run.right for run in runs[1:])
    rows = [
        {
            "seed": seed,
            "rounding": rounding,
            "figures": run.figures | agreement(run.right, right - run.right if rounding else right),
            "verdicts": run.verdicts,
        }
        for (seed, rounding), run in zip([("committed", {}), *ROUNDINGS.items()], runs, strict=True)
    ]
    with atomic(OUTPUT / "mini.json", OUTPUT / "pairs.csv") as (file, pairs):
        write_json(file, {"counts": runs[0].counts, "runs": rows})
        right.to_csv(pairs, float_format="%g")


@stage
def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.tools.reference", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, nargs="?", default=METRICS, help="default: metrics/mini")
    parser.add_argument("--make", action="store_true", help="make the reference runs of the last commit")
    asked = parser.parse_args(arguments)
    if asked.make:
        make()
    check(asked.folder)


if __name__ == "__main__":
    main()
