"""From the files of the scoring stages to figures, paired answers, and the evidence drawn from them.

A column is a figure of the headline table. Its answers come in strata that weigh equally: the patterns of the pairs,
the sets of zero-shot ability; an answer is a share of right ones (in %) about one pair or one image.
"""

import io
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pipeline.core.stages import UserError
from pipeline.evidence import statistics
from pipeline.evidence.statistics import Interval

POOLINGS = ("stock", "published")
PAIRS = {
    f"{task}_{pooling}": (pooling, direction)
    for task, direction in (("pairs", "statement_to_image"), ("image_to_statement", "image_to_statement"))
    for pooling in POOLINGS
}
KINDS = {"zeroshot": "classification", "retrieval": "retrieval", "probe": "probe"}
COLUMNS = {
    "pairs_stock": "pairs, stock embedding",
    "pairs_published": "pairs, published pooling",
    "image_to_statement_stock": "image to statement, stock",
    "image_to_statement_published": "image to statement, published",
    "zeroshot": "zero-shot classification",
    "retrieval": "retrieval, recall@k",
    "probe": "detail probe",
}
NOT_MEASURED = "not measured"
CONTROLS = {"shuffled": "mismatched images", "drift": "random perturbation"}

Read = Callable[[Path], bytes]


class Claim(NamedTuple):
    """The published figures of tuned weights: pairs right before and after, in %; pooling: the rule of the second."""

    before: float
    after: float
    pooling: str

    @property
    def gain(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Scores:
    """All scores of one backbone with one set of weights; empty for a benchmark that was not run.

    cosines: between the stock embeddings of the pairs' images and those of the pretrained weights, which have none
    themselves. scoring: the record of how the scores were made, by benchmark.
    """

    mmvp: dict
    pairs: pd.DataFrame
    zeroshot: dict
    answers: pd.DataFrame
    cosines: np.ndarray = field(default_factory=lambda: np.empty(0))
    scoring: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def read(
        cls, profile: str, backbone: str, weights: str, benchmarks: Iterable[str], read: Read = Path.read_bytes
    ) -> "Scores":
        """`read` gives the bytes of a path, of this folder or of another commit."""
        root = Path("metrics", profile, "scores")
        records = [root / b / f"{backbone}-{weights}" / "scoring.json" for b in ("mmvp", "zeroshot") if b in benchmarks]
        scoring = {record.parts[-3]: json.loads(read(record)) for record in records}
        found = cls({}, pd.DataFrame(), {}, pd.DataFrame(), scoring=scoring)
        if "mmvp" in benchmarks:
            folder = root / "mmvp" / f"{backbone}-{weights}"
            mmvp = json.loads(read(folder / "scores.json"))
            found = replace(found, mmvp=mmvp, pairs=pd.read_csv(io.BytesIO(read(folder / "pairs.csv"))))
            if weights != "pretrained":
                images = pd.read_csv(io.BytesIO(read(folder / "images.csv")))
                found = replace(found, cosines=images.cosine.to_numpy())
        if "zeroshot" in benchmarks:
            folder = root / "zeroshot" / f"{backbone}-{weights}"
            zeroshot = json.loads(read(folder / "scores.json"))
            answers = pd.read_parquet(io.BytesIO(read(folder / "answers.parquet")))
            found = replace(found, zeroshot=zeroshot, answers=answers)
        return found

    def headline(self) -> dict[str, float]:
        """The figures of COLUMNS that there are, in %."""
        return headline(self.mmvp, self.zeroshot)

    def sets(self) -> dict[str, list[str]]:
        """The sets that a column of zero-shot ability is the mean of, by column."""
        names = {c: [n for n, scores in self.zeroshot.items() if scores["kind"] == kind] for c, kind in KINDS.items()}
        return {column: found for column, found in names.items() if found}

    def strata(self, column: str) -> dict[str, np.ndarray]:
        """The answers of a column in %, by stratum; none where nothing of that kind was scored."""
        if column in PAIRS:
            return self.answers_of_pairs(*PAIRS[column])
        asked = self.answers[self.answers.set.isin(self.sets().get(column, []))]
        by_measure = asked.groupby(["set", "image", "measure"], sort=False).right.mean()
        by_image = by_measure.groupby(["set", "image"], sort=False).mean()  # an image with all its texts is one sample
        return {name: 100 * group.to_numpy() for name, group in by_image.groupby("set", sort=False)}

    def answers_of_pairs(self, pooling: str, column: str) -> dict[str, np.ndarray]:
        """A column of the pairs' table under one pooling rule, in %, by pattern."""
        asked = self.pairs[self.pairs.pooling == pooling]
        return {name: 100 * group.to_numpy() for name, group in asked.groupby("pattern", sort=False)[column]}

    def right(self, pooling: str) -> pd.Series:
        """Whether a pair is right in most draws, statement to image, by the pair's number."""
        asked = self.pairs[self.pairs.pooling == pooling].set_index("pair")
        return asked.statement_to_image > 0.5


def headline(mmvp: dict, zeroshot: dict) -> dict[str, float]:
    """The figures of COLUMNS that there are, in %, of the summaries that the scorings write."""
    of_pairs = PAIRS if mmvp else {}
    values = {column: mmvp[pooling][direction]["average"] for column, (pooling, direction) in of_pairs.items()}
    for column, kind in KINDS.items():
        averages = [scores["average"] for scores in zeroshot.values() if scores["kind"] == kind]
        if averages:
            values[column] = sum(averages) / len(averages)
    return {column: round(value, 2) for column, value in values.items()}


def change(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> Interval:
    """After minus before, in points, answer by answer. Raises UserError where the questions are not the same."""
    asked = [{name: len(answers) for name, answers in strata.items()} for strata in (before, after)]
    if asked[0] != asked[1]:
        raise UserError(
            f"before and after were scored on different questions ({asked[0]}, {asked[1]}), so their difference means "
            "nothing. Run `dvc repro` to score both on the same ones."
        )
    return statistics.stratified([after[name] - before[name] for name in before])


def gains(before: Scores, after: Scores, columns: Iterable[str] = COLUMNS) -> dict[str, Interval]:
    """The change of every one of these columns that both have. Raises UserError where they were scored differently."""
    for benchmark in before.scoring.keys() & after.scoring.keys():
        if other := differences(before.scoring[benchmark], after.scoring[benchmark]):
            raise UserError(
                f"the {benchmark} scores before and after were made in different ways, so their difference means "
                f"nothing: {'; '.join(other)}. Run `dvc repro` to score both in the same way."
            )
    there = before.headline().keys() & after.headline().keys()
    return {column: change(before.strata(column), after.strata(column)) for column in columns if column in there}


def differences(was: dict, now: dict, key: str = "") -> list[str]:
    """What two records of a scoring differ in, each by its dotted key; their hash only says that they do."""
    other = []
    for name in {**was, **now}:
        first, second = (record.get(name, "nothing") for record in (was, now))
        if isinstance(first, dict) and isinstance(second, dict):
            other += differences(first, second, f"{key}{name}.")
        elif first != second and name != "sha256":
            other.append(f"{key}{name}: {first} and {second}")
    return other


def changed_pairs(before: Scores, after: Scores, pooling: str) -> dict[str, list[int]]:
    """The numbers of the pairs that were won and of those that were lost, statement to image."""
    was, now = before.right(pooling), after.right(pooling)
    return {"won": [int(pair) for pair in was.index[~was & now]], "lost": [int(pair) for pair in was.index[was & ~now]]}


def won_and_lost(before: Scores, after: Scores, pooling: str) -> dict:
    """How many pairs were won and lost, the exact McNemar test, and the smallest gain that it detects, in points."""
    changed, pairs = changed_pairs(before, after, pooling), len(before.right(pooling))
    won, lost = len(changed["won"]), len(changed["lost"])
    smallest = 100 * statistics.smallest_gain(pairs, won + lost)  # NaN if no gain of so few pairs could be detected
    return {
        "won": won,
        "lost": lost,
        "pairs": pairs,
        "p": float(f"{statistics.mcnemar(won, lost):.2g}"),
        "smallest_gain": None if math.isnan(smallest) else round(smallest, 1),
    }


def recipe_and_control(weights: str) -> tuple[str, str]:
    """The recipe and the control in the name of trained weights; the control is '' for the recipe itself."""
    recipe, _, control = weights.partition("-")
    return recipe, control


def label(weights: str) -> str:
    """E.g. 'diva, mismatched images' for a control."""
    recipe, control = recipe_and_control(weights)
    return f"{recipe}, {CONTROLS[control]}" if control else weights


def without_controls(scores: Iterable[str]) -> list[str]:
    return [weights for weights in scores if not recipe_and_control(weights)[1]]


def evidence(scores: dict[str, Scores], claims: dict[str, Claim], known: dict[str, float] | None = None) -> dict:
    """Everything that follows from one backbone's scores; intervals as [value, low, high].

    weights, by weights: gain: over pretrained, each column. as_published: stock embedding before, and after the pooling
    rule of the published figure. published: the gain that was published, and that rule. pairs: won, lost, McNemar's p,
    smallest gain. cosine: of the pairs' images' stock embeddings to the original ones. verdict: by the rule of
    metrics/README.md. Without pairs there is nothing of theirs, and a verdict on what was not scored is "not measured".
    pooling: what the published pooling rule alone gives. effect, by control's weights: the recipe's gain minus the
    control's (difference in differences). difference, by two tuned weights: the first's gain minus the second's.
    sets: names of the zero-shot sets by column. comparison and baseline: see the functions.

    claims: what was published, by weights. known: published figures of the pretrained weights, see `baseline`.
    """
    before, found = scores["pretrained"], dict[str, dict[str, Any]]()
    for weights, after in scores.items():
        if weights == "pretrained":
            continue
        gain, verdict = gains(before, after), {"pairs": NOT_MEASURED, "zeroshot": NOT_MEASURED}
        found[weights] = {"gain": _rounded(gain)}
        if "pairs_stock" in gain:
            claim = claims.get(weights)
            pooling = claim.pooling if claim else "published"
            as_published = change(before.strata("pairs_stock"), after.strata(f"pairs_{pooling}"))
            judged = (as_published, claim.gain) if claim else (gain["pairs_stock"], None)
            verdict["pairs"] = statistics.gain_verdict(*judged)
            if claim:
                found[weights] |= {"published": {"gain": round(claim.gain, 2), "pooling": pooling}}
            found[weights] |= {
                **_rounded({"as_published": as_published}),
                "pairs": {pooling: won_and_lost(before, after, pooling) for pooling in POOLINGS},
                **_rounded({"cosine": statistics.stratified([after.cosines])}, 4),
            }
        if "zeroshot" in gain:
            verdict["zeroshot"] = statistics.preserved_verdict(gain["zeroshot"])
        found[weights]["verdict"] = verdict
    tuned = without_controls(found)
    controls = {weights: recipe_and_control(weights)[0] for weights in found.keys() - {*tuned}}
    pools = {"pooling": change(before.strata("pairs_stock"), before.strata("pairs_published"))} if before.mmvp else {}
    return {
        "weights": found,
        "sets": before.sets(),
        **_rounded(pools),
        "baseline": baseline(before, known or {}),
        "effect": {w: _rounded(gains(scores[w], scores[controls[w]])) for w in scores if w in controls},
        "difference": {
            f"{second} minus {first}": _rounded(gains(scores[first], scores[second], ("pairs_stock", "zeroshot")))
            for first, second in itertools.combinations(tuned, 2)
        },
        "comparison": comparison({weights: scores[weights] for weights in ("pretrained", *tuned)})
        if before.mmvp
        else {},
    }


def comparison(scores: dict[str, Scores]) -> dict[str, dict]:
    """Every two of these weights by the pairs (stock embedding): won and lost by the second, McNemar's exact p, and the
    same corrected by Holm for all of these comparisons.
    """
    found = {
        f"{second} minus {first}": won_and_lost(scores[first], scores[second], "stock")
        for first, second in itertools.combinations(scores, 2)
    }
    corrected = statistics.holm([statistics.mcnemar(tests["won"], tests["lost"]) for tests in found.values()])
    return {name: {**found[name], "p_holm": float(f"{p:.2g}")} for name, p in zip(found, corrected, strict=True)}


def baseline(before: Scores, known: dict[str, float]) -> dict[str, dict]:
    """The pretrained weights' figures beside the published ones; a difference tells of another revision, tokenizer or
    preprocessing.

    known: published figures in %: `pairs` (MMVP-VLM, stock embedding), and zero-shot accuracies by the name of the set.
    Returns by name published, found, and `away`: whole pairs, or points of a set.
    """
    compared = {}
    for name, published in known.items():
        if name == "pairs" and before.mmvp:
            found, pairs = before.headline()["pairs_stock"], len(before.right("stock"))
            away = float(round(found * pairs / 100) - round(published * pairs / 100))
        elif name in before.zeroshot:
            found = before.zeroshot[name]["average"]
            away = round(found - published, 1)
        else:
            continue
        compared[name] = {"published": published, "found": found, "away": away}
    return compared


def failures(evidence: dict) -> list[str]:
    """Why a check fails: weights that gain no pairs, or whose zero-shot classification is not preserved.

    A benchmark that was not run fails no check; weights without any benchmark do.
    """
    failed = []
    for backbone, found in evidence.items():
        for weights in without_controls(found["weights"]):
            verdicts = found["weights"][weights]["verdict"]
            good = {"reproduced", "gained", "preserved"}
            if {*verdicts.values()} != {NOT_MEASURED}:
                good.add(NOT_MEASURED)
            failed += [f"{backbone}, {weights}: {what} {said}" for what, said in verdicts.items() if said not in good]
    return failed


def _rounded(intervals: dict[str, Interval], digits: int = 2) -> dict[str, list[float]]:
    """+ 0.0: no minus zero."""
    return {name: [round(float(value), digits) + 0.0 for value in interval] for name, interval in intervals.items()}


SEEDS = ["backbone", "recipe", "weights", "seed"]


def seeds_table(profile: str) -> pd.DataFrame:
    """The table of tools/sweep.py: gains in points, one row for each backbone, set of weights and training seed.

    run: the hash that evidence/provenance.py gives to code and parameters. If git merged two rows of the same seed from
    two machines, the first one counts.
    """
    file = Path("metrics", "seeds", f"{profile}.csv")
    table = pd.read_csv(file, dtype={"run": str}) if file.exists() else pd.DataFrame()
    return table.reindex(columns=[*SEEDS, *COLUMNS, "run"]).drop_duplicates([*SEEDS, "run"])
