"""The effect of training over several training seeds.

    python -m pipeline.tools.sweep --seeds 1..5         also 1,2,7 or 42,1..4

A plain loop over `dvc exp run -S seed=N`, which trains every recipe of run.recipes with its controls. Each seed that
ends is added to metrics/seeds/<profile>.csv, gains in points, and is not run again: the same command goes on after an
interruption, and seeds of another machine count once git has merged its table. At the end the report is made anew.

A row names its run: the hash of all parameters and code that decide its recipe's figures, but for the seed (`run` of
evidence/provenance.py). Rows of the run at hand are never taken away. Rows of the same backbone and recipe, but of
another run, make room for the first new row, and the command says so.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline.core.config import PARAMS_FILE
from pipeline.core.outputs import atomic
from pipeline.core.stages import UserError, stage
from pipeline.evidence import provenance
from pipeline.evidence.results import COLUMNS, CONTROLS, SEEDS, recipe_and_control, seeds_table
from pipeline.evidence.statistics import over_seeds
from pipeline.sections import params

DVC = [sys.executable, "-m", "dvc"]


Runs = dict[tuple[str, str], str]  # by backbone and recipe


def runs(p: params.Params) -> Runs:
    return {(b, recipe): provenance.run(p.run.profile, b, recipe) for b in p.run.backbones for recipe in p.run.recipes}


def seeds_to_run(p: params.Params, seeds: list[int]) -> list[int]:
    """The seeds that some backbone and weights have no row of, of the runs at hand."""
    there = set(seeds_table(p.run.profile)[["run", "weights", "seed"]].itertuples(index=False, name=None))
    trained = [(weights, recipe_and_control(weights)[0]) for weights in p.run.trained]
    wanted = [(run, weights) for (_, own), run in runs(p).items() for weights, recipe in trained if recipe == own]
    return [seed for seed in seeds if any((*row, seed) not in there for row in wanted)]


def add(p: params.Params) -> None:
    """Add what the last run here found to the table, unless it has that seed of that run already."""
    profile = p.run.profile
    report = json.loads(Path("metrics", profile, "report.json").read_text(encoding="utf-8"))
    table, rows = seeds_table(profile), []
    for (backbone, recipe), own in runs(p).items():
        rows += [
            dict(zip(SEEDS, (backbone, recipe, weights, p.seed), strict=True)) | gain | {"run": own}
            for weights, gain in report[backbone]["gain"].items()
            if recipe_and_control(weights)[0] == recipe
        ]
        stale = (table.backbone == backbone) & (table.recipe == recipe) & (table.run != own)
        if stale.any():
            print(f"removed {stale.sum()} rows of {backbone}, {recipe}: they are of other code or parameters")
            table = table[~stale]
    table = pd.DataFrame([*table.to_dict("records"), *rows], columns=table.columns)
    order = ["", *CONTROLS]
    table = table.drop_duplicates([*SEEDS, "run"]).sort_values(
        SEEDS,
        key=lambda key: key.map(lambda w: order.index(recipe_and_control(w)[1])) if key.name == "weights" else key,
    )
    with atomic(Path("metrics", "seeds", f"{profile}.csv")) as (file,):
        table.to_csv(file, index=False)


RESTORE = """
import os, pathlib, signal, sys
file = pathlib.Path(sys.argv[1])
own = file.read_bytes()
print(flush=True)
sys.stdin.read()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.killpg(0, signal.SIGTERM)
file.write_bytes(own)
"""


@contextmanager
def restored(file: Path) -> Iterator[int]:
    """Give a file its bytes back at the end, even if this process is killed. Yields a process group.

    A process of its own does it, which sees the end of this one as the end of its input. It ends what still runs in its
    group, the one yielded.
    """
    command, pipe = [sys.executable, "-c", RESTORE, str(file)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, process_group=0) as restoring:  # at its end, no input
        assert restoring.stdout
        restoring.stdout.readline()  # now it has read the file
        yield restoring.pid


def sweep(p: params.Params, seeds: list[int]) -> pd.DataFrame:
    """Run what is missing, and leave the workspace with its own seed and a new report; returns the rows of this run."""
    ahead, own = seeds_to_run(p, seeds), runs(p)
    print(f"seeds {', '.join(map(str, seeds))}: {len(seeds) - len(ahead)} are there, {len(ahead)} to run", flush=True)
    start = time.monotonic()
    with restored(PARAMS_FILE) as group:
        for i, seed in enumerate(ahead):
            left = f", about {(time.monotonic() - start) / i * (len(ahead) - i) / 60:.0f} min left" if i else ""
            print(f"--- seed {seed}, {i + 1} of {len(ahead)}{left}", flush=True)
            status = subprocess.run([*DVC, "exp", "run", "-S", f"seed={seed}"], process_group=group).returncode
            if status:
                raise UserError(
                    f"seed {seed}: `dvc exp run` ended with status {status}. The same command goes on from there."
                )
            now = params.load()
            if runs(now) != own:
                raise UserError(f"seed {seed}: code or parameters were changed while it ran. Start the sweep again.")
            add(now)
    if ahead:
        subprocess.run([*DVC, "repro", "--quiet"], check=True)  # the workspace's own seed, from DVC's memory of it
        add(p)
        subprocess.run([*DVC, "repro", "--quiet"], check=True)  # the report with the new table
    table = seeds_table(p.run.profile)
    return table[table.run.isin(own.values())]


def show(result: pd.DataFrame) -> None:
    shown_table = Table("backbone", "weights", "seeds", *COLUMNS.values(), title="Gain over seeds: mean [95 %] (s.d.)")
    for (backbone, weights), group in result.groupby(["backbone", "weights"], sort=False):
        row = [over(group[column]) for column in COLUMNS]
        shown_table.add_row(str(backbone), str(weights), ",".join(map(str, group.seed)), *row)
    Console(width=None if sys.stdout.isatty() else 160).print(shown_table)


def over(gains: pd.Series) -> str:
    """Empty where nothing of that kind was scored."""
    if gains.isna().any():
        return ""
    return f"{over_seeds(gains).text()} ({gains.std():.1f})" if len(gains) > 1 else f"{gains.mean():+.1f}"


def parse_seeds(text: str) -> list[int]:
    """'42,1..3' to [42, 1, 2, 3]; raises argparse.ArgumentTypeError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", part.strip())
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise argparse.ArgumentTypeError(f"found '{part}', wanted seeds such as 1..5 or 1,2,7")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(seeds))


@stage
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.tools.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=parse_seeds, required=True, help="e.g. 1..5 or 1,2,7")
    seeds, p = parser.parse_args().seeds, params.load()
    if not p.run.recipes:
        raise UserError("run.recipes is []: there is nothing that depends on the seed. Name a recipe there.")
    show(sweep(p, seeds))


if __name__ == "__main__":
    main()
