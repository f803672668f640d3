"""The effect of training over several training seeds.

    python -m pipeline.tools.sweep --seeds 1..5         also 1,2,7 or 42,1..4

A plain loop over `dvc exp run -S seed=N`. A seed that an experiment or a commit holds already is not run again, so the
same command goes on after an interruption, and results of other machines count once their experiments or commits were
fetched. It writes metrics/seeds/<profile>.csv, gains in points, and makes the report anew.

A result is of the run at hand if all parameters of profile and backbone and all code but the report's are the
workspace's; its seed is the one that training noted, since a commit's params.yaml may be newer than its results.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline import params
from pipeline.evidence.results import COLUMNS, GAINS
from pipeline.evidence.statistics import over_seeds
from pipeline.runtime import UserError, stage, whole

DVC = [sys.executable, "-m", "dvc"]
WEIGHTS = ("diva", "shuffled", "drift")  # what depends on the training seed
KEYS = ["backbone", "recipe", "weights", "seed"]


@dataclass(frozen=True)
class Result:
    """What `dvc exp show` says of a commit, of an experiment, or of the workspace."""

    name: str
    params: dict
    metrics: dict[str, dict]
    code: dict[str, str]

    @classmethod
    def of(cls, name: str, data: dict) -> "Result":
        code = {
            path: dep["hash"]
            for path, dep in (data.get("deps") or {}).items()
            if re.fullmatch(r"pipeline/(?!report\.py|evidence/).*\.py", path)
        }
        contents = {path: found.get("data") or {} for path, found in (data.get("metrics") or {}).items()}
        return cls(name, (data.get("params") or {}).get("params.yaml", {}).get("data") or {}, contents, code)

    def run(self, profile: str, backbone: str) -> tuple:
        """All that the result of a backbone depends on, but for its seed."""
        sections = [
            self.params.get(kind, {}).get(key) for kind, key in (("profiles", profile), ("backbones", backbone))
        ]
        return *sections, self.code

    def rows(self, profile: str, backbone: str) -> Iterator[dict]:
        trained = self.metrics.get(f"metrics/{profile}/train/{backbone}-diva/metrics.json", {})
        report = self.metrics.get(f"metrics/{profile}/report.json", {}).get(backbone, {})
        recipe = self.params.get("profiles", {}).get(profile, {}).get("train", {}).get("recipe")
        for weights in WEIGHTS:
            if "seed" in trained and GAINS[weights] in report:
                gain = report[GAINS[weights]]
                keys = dict(zip(KEYS, (backbone, recipe, weights, trained["seed"]), strict=True))
                yield keys | gain | {"revision": self.name}


def shown() -> list[Result]:
    """Everything that `dvc exp show` knows, the workspace first, else the oldest commit first."""
    done = subprocess.run([*DVC, "exp", "show", "--json", "--all-commits"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"`dvc exp show` ended with status {done.returncode}: {done.stderr.strip()}")
    workspace, *commits = json.loads(done.stdout)
    found = [Result.of("workspace", workspace["data"])]
    for commit in reversed(commits):
        found += [Result.of(commit["rev"][:7], commit["data"])] if commit.get("data") else []
        for experiment in commit.get("experiments") or []:
            found += [
                Result.of(experiment.get("name") or state["rev"][:7], state["data"])
                for state in (experiment.get("revs") or [])[:1]
                if state.get("data")
            ]
    return found


def table(found: list[Result], profile: str, backbones: list[str]) -> pd.DataFrame:
    """One row a backbone, weights and seed (more, where machines disagree), each from the oldest that shows it."""
    workspace, *others = found
    rows = [
        row
        for backbone in backbones
        for result in (*others, workspace)
        if result.run(profile, backbone) == workspace.run(profile, backbone)
        for row in result.rows(profile, backbone)
    ]
    frame = pd.DataFrame(rows, columns=[*KEYS, *COLUMNS, "revision"]).drop_duplicates([*KEYS, *COLUMNS])
    order = {name: i for i, name in enumerate((*backbones, *WEIGHTS))}
    return frame.sort_values(KEYS, key=lambda column: column.map(lambda value: order.get(value, value)), kind="stable")


def missing(done: pd.DataFrame, backbones: list[str], seeds: list[int]) -> list[int]:
    """The seeds that some backbone has no result of."""
    there = {(row.backbone, row.seed) for row in done[done.weights == "diva"].itertuples()}
    return [seed for seed in seeds if any((backbone, seed) not in there for backbone in backbones)]


def sweep(profile: str, backbones: list[str], seeds: list[int]) -> pd.DataFrame:
    """Run what is missing, write the table, and leave the workspace with its own seed and a new report."""
    ahead = missing(table(shown(), profile, backbones), backbones, seeds)
    print(f"seeds {', '.join(map(str, seeds))}: {len(seeds) - len(ahead)} are there, {len(ahead)} to run", flush=True)
    own, start = params.PARAMS_FILE.read_bytes(), time.monotonic()
    try:
        for i, seed in enumerate(ahead):
            left = f", about {(time.monotonic() - start) / i * (len(ahead) - i) / 60:.0f} min left" if i else ""
            print(f"--- seed {seed}, {i + 1} of {len(ahead)}{left}", flush=True)
            status = subprocess.run([*DVC, "exp", "run", "-S", f"seed={seed}"]).returncode
            if status:
                raise UserError(
                    f"seed {seed}: `dvc exp run` ended with status {status}. The same command goes on from there."
                )
    finally:
        params.PARAMS_FILE.write_bytes(own)
    result, file = table(shown(), profile, backbones), Path("metrics", "seeds", f"{profile}.csv")
    if ahead:
        subprocess.run([*DVC, "repro", "--quiet"], check=True)  # the workspace's own seed, from DVC's memory of it
        result = table(shown(), profile, backbones)
    text = result.to_csv(index=False)
    if not file.exists() or file.read_text() != text:
        with whole(file) as (partial,):
            partial.write_text(text)
        subprocess.run([*DVC, "repro", "--quiet"], check=True)  # the report with the new table
    return result


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
    if not {"pretrained", "diva"} <= set(p.run.weights):
        raise UserError(f"run.weights is {p.run.weights}: a gain over seeds needs 'pretrained' and 'diva'. Add them.")
    show(sweep(p.run.profile, p.run.backbones, seeds))


if __name__ == "__main__":
    main()
