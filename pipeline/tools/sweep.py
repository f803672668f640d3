"""The effect of training over several training seeds.

    python -m pipeline.tools.sweep --seeds 1..5                 also 1,2,7 or 42,1..4
    python -m pipeline.tools.sweep --seeds 1..8 --at-once 4     by default as many as there are GPUs, each on its own
    python -m pipeline.tools.sweep --seeds 1..50 --slurm        print a SLURM array that runs what is missing

One at a time, it is a plain loop over `dvc exp run report -S seed=N`, which trains every recipe of run.recipes with its
controls. Several at once, each is a `dvc exp run --temp` in a folder of its own, under a name that tells run and seed;
what it found is read from its commit. Each seed that ends is added to metrics/seeds/<profile>.csv, gains in points, and
is not run again: the same command goes on after an interruption, takes up what a SLURM array has made, and seeds of
another machine count once git has merged its table. At the end the report is made anew.

A row names its run: the hash of all parameters and code that decide its recipe's figures, but for the seed (`run` of
evidence/provenance.py). Rows of the run at hand are never taken away. Rows of the same backbone and recipe, but of
another run, make room for the first new row, and the command says so.
"""

import argparse
import hashlib
import json
import os
import queue
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline.core.config import PARAMS_FILE
from pipeline.core.outputs import atomic
from pipeline.core.stages import UserError, stage
from pipeline.evidence import provenance
from pipeline.evidence.results import COLUMNS, CONTROLS, KINDS, PAIRS, SEEDS, recipe_and_control, seeds_table
from pipeline.evidence.statistics import over_seeds
from pipeline.sections import params

DVC = [sys.executable, "-m", "dvc"]
LOGS = Path(".dvc", "tmp", "sweep")
BUSY = "Unable to acquire lock"  # of DVC, which waits for three seconds where another holds it at its start or its end
TRIES = 50  # again costs little: what a stage has made is in DVC's memory


SCORED: dict[str, Iterable[str]] = {"mmvp": PAIRS, "zeroshot": KINDS}  # a benchmark's columns of the table
Runs = dict[tuple[str, str], str]  # by backbone and recipe


def runs(p: params.Params) -> Runs:
    return {(b, recipe): provenance.run(p.run.profile, b, recipe) for b in p.run.backbones for recipe in p.run.recipes}


def seeds_to_run(p: params.Params, seeds: list[int]) -> list[int]:
    """The seeds for which some backbone and weights have no row, of this code and these parameters, with a figure of
    every benchmark of the run."""
    table = seeds_table(p.run.profile)
    for columns in (figures for benchmark, figures in SCORED.items() if benchmark in p.run.benchmarks):
        table = table[table[[*columns]].notna().any(axis=1)]
    there = set(table[["run", "weights", "seed"]].itertuples(index=False, name=None))
    trained = [(weights, recipe_and_control(weights)[0]) for weights in p.run.trained]
    wanted = [(run, weights) for (_, own), run in runs(p).items() for weights, recipe in trained if recipe == own]
    return [seed for seed in seeds if any((*row, seed) not in there for row in wanted)]


def add(p: params.Params, text: str) -> None:
    """Add the gains of a run's report.json to the table; what it has of that seed of that run already stays."""
    profile, report = p.run.profile, json.loads(text)
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
    whole = table.groupby([*SEEDS, "run"], sort=False, as_index=False, dropna=False).first()[table.columns]
    table = whole.sort_values(
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
    """Restore a file's bytes at the end, even if this process is killed. Yields the id of a process group.

    A second process does it: it sees the end of this process as the end of its input, ends the processes of its group,
    and writes the file.
    """
    command, pipe = [sys.executable, "-c", RESTORE, str(file)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, process_group=0) as restoring:  # at its end, no input
        assert restoring.stdout
        restoring.stdout.readline()  # now it has read the file
        yield restoring.pid


def report_of(p: params.Params) -> Path:
    return Path("metrics", p.run.profile, "report.json")


def name_of(p: params.Params, own: Runs, seed: int | str) -> str:
    """The name of the experiment that has this seed of these runs, with their controls, on their benchmarks."""
    what = repr((sorted(own.items()), sorted(p.run.trained), sorted(p.run.benchmarks)))
    return f"sweep-{hashlib.sha256(what.encode()).hexdigest()[:10]}-{seed}"


def command(p: params.Params, own: Runs, seed: int | str) -> list[str]:
    return ["exp", "run", "report", "--temp", "--name", name_of(p, own, seed), "-S", f"seed={seed}"]


def collect(p: params.Params, own: Runs, seed: int) -> bool:
    """Add the report in an experiment's commit to the table; False if there is no such experiment."""
    refs = ["git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name_of(p, own, seed)}"]
    found = subprocess.run(refs, check=True, capture_output=True, text=True).stdout.split()
    if not found:
        return False
    show = ["git", "show", f"{found[0]}:{report_of(p).as_posix()}"]
    add(p.model_copy(update={"seed": seed}), subprocess.run(show, check=True, capture_output=True, text=True).stdout)
    return True


def gpus() -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return given if given != [""] else [str(i) for i in range(torch.cuda.device_count())]


def one_by_one(p: params.Params, own: Runs, ahead: list[int], group: int) -> None:
    start = time.monotonic()
    for i, seed in enumerate(ahead):
        left = f", about {(time.monotonic() - start) / i * (len(ahead) - i) / 60:.0f} min left" if i else ""
        print(f"--- seed {seed}, {i + 1} of {len(ahead)}{left}", flush=True)
        status = subprocess.run([*DVC, "exp", "run", "report", "-S", f"seed={seed}"], process_group=group).returncode
        if status:
            raise UserError(
                f"seed {seed}: `dvc exp run` ended with status {status}; the lines above say why. Correct that and run "
                "the same command again: seeds that are done stay done."
            )
        now = params.load()
        if runs(now) != own:
            raise UserError(f"seed {seed}: code or parameters were changed while it ran. Start the sweep again.")
        add(now, report_of(now).read_text(encoding="utf-8"))


def side_by_side(p: params.Params, own: Runs, ahead: list[int], group: int, at_once: int) -> None:
    """Run `at_once` seeds at a time, each on its own GPU if there are any; their output goes to LOGS.

    Raises UserError once all have ended, if some of them failed.
    """
    free, failed = queue.SimpleQueue[str](), dict[int, int]()
    for place in islice(cycle(gpus() or [""]), at_once):
        free.put(place)
    LOGS.mkdir(parents=True, exist_ok=True)

    def run(seed: int) -> tuple[int, int]:
        gpu, log = free.get(), LOGS / f"{seed}.log"
        for _ in range(TRIES):
            with log.open("w", encoding="utf-8") as file:
                status = subprocess.run(
                    [*DVC, *command(p, own, seed)], process_group=group, stdout=file, stderr=subprocess.STDOUT,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
                ).returncode  # fmt: skip
            if not status or BUSY not in log.read_text(encoding="utf-8"):
                break
            time.sleep(random.uniform(1, 5))
        free.put(gpu)
        return seed, status

    with ThreadPoolExecutor(at_once) as pool:
        for future in as_completed([pool.submit(run, seed) for seed in ahead]):
            seed, status = future.result()
            if status:
                failed[seed] = status
            elif runs(params.load()) != own or not collect(p, own, seed):
                raise UserError(f"seed {seed}: code or parameters were changed while it ran. Start the sweep again.")
            print(f"--- seed {seed} ended with status {status}", flush=True)
    if failed:
        listed = ", ".join(f"{seed} with status {status} ({LOGS}/{seed}.log)" for seed, status in failed.items())
        raise UserError(
            f"`dvc exp run` failed for seed {listed}. Correct the cause; the same command runs only these again."
        )


def array(p: params.Params, seeds: list[int]) -> str:
    """A SLURM script that runs the missing seeds, one a task. Raises UserError if none is missing."""
    ahead, own = seeds_to_run(p, seeds), runs(p)
    if not ahead:
        raise UserError(f"seeds {', '.join(map(str, seeds))} are all there: no task is left for an array.")
    return f"""#!/bin/bash
# Submit it from here, at this commit, with `sbatch`; then the sweep's own command collects what the tasks have found.
#SBATCH --job-name diva-seeds
#SBATCH --array {",".join(map(str, ahead))}
#SBATCH --gpus 1
#SBATCH --requeue
mkdir -p {LOGS}
log={LOGS}/$SLURM_ARRAY_TASK_ID.log
for try in $(seq {TRIES}); do
    dvc {" ".join(command(p, own, "$SLURM_ARRAY_TASK_ID"))} >"$log" 2>&1 && exit 0
    grep -q "{BUSY}" "$log" || exit 1
    sleep $((1 + RANDOM % 10))
done
exit 1
"""


def sweep(p: params.Params, seeds: list[int], at_once: int = 1) -> pd.DataFrame:
    """Run what is missing, and leave the workspace with its own seed and a new report; returns the rows of this run."""
    ahead, own = seeds_to_run(p, seeds), runs(p)
    new = len(ahead)
    print(f"seeds {', '.join(map(str, seeds))}: {len(seeds) - new} are there, {new} to run", flush=True)
    if made := [seed for seed in ahead if collect(p, own, seed)]:
        print(f"seeds {', '.join(map(str, made))}: taken up from experiments that have run", flush=True)
        ahead = [seed for seed in ahead if seed not in made]
    with restored(PARAMS_FILE) as group:
        if at_once > 1:
            side_by_side(p, own, ahead, group, at_once)
        else:
            one_by_one(p, own, ahead, group)
    if new:
        again = [*DVC, "repro", "report", "--quiet"]
        subprocess.run(again, check=True)  # the workspace's own seed, from DVC's memory of it
        add(p, report_of(p).read_text(encoding="utf-8"))
        subprocess.run(again, check=True)  # the report with the new table
    table = seeds_table(p.run.profile)
    return table[table.run.isin(own.values())]


def show(result: pd.DataFrame) -> None:
    shown_table = Table("backbone", "weights", "seeds", *COLUMNS.values(), title="Gain over seeds: mean [95 %] (s.d.)")
    for (backbone, weights), group in result.groupby(["backbone", "weights"], sort=False):
        row = [over(group[column]) for column in COLUMNS]
        shown_table.add_row(str(backbone), str(weights), ",".join(map(str, group.seed)), *row)
    Console(width=None if sys.stdout.isatty() else 160).print(shown_table)


def over(gains: pd.Series) -> str:
    """Mean, interval and s.d. over the seeds; empty if nothing of that kind was scored."""
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
def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.tools.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=parse_seeds, required=True, help="e.g. 1..5 or 1,2,7")
    at_once = parser.add_mutually_exclusive_group()
    at_once.add_argument("--at-once", type=int, choices=range(1, 1000), metavar="N", help="by default as many as GPUs")
    at_once.add_argument("--slurm", action="store_true", help="run nothing: print a SLURM array of what is missing")
    asked, p = parser.parse_args(arguments), params.load()
    if not p.run.recipes:
        raise UserError("run.recipes is [], so nothing depends on the seed. Name a recipe there.")
    if asked.slurm:
        print(array(p, asked.seeds), end="")
    else:
        show(sweep(p, asked.seeds, asked.at_once or len(gpus()) or 1))


if __name__ == "__main__":
    main()
