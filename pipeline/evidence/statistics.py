"""Intervals, exact tests, power, and the rule by which a verdict is given (metrics/README.md)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.80
RESAMPLES = 5000
ZERO_SHOT_MARGIN = 1.0  # points of accuracy; the losses that the paper and later ones report are at most 0.2


class Interval(NamedTuple):
    """An estimate and its 95 % interval, all in the units of what was given."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        """E.g. '+1.9 [-0.3, +4.1]'."""
        value, low, high = (f"{round(part, 1) + 0.0:+.1f}" for part in self)
        return f"{value} [{low}, {high}]"


def stratified(strata: Sequence[np.ndarray]) -> Interval:
    """The mean of the strata's means, and its percentile bootstrap interval; each stratum is resampled alone.

    A resample of n answers varies by (n - 1)/n too little, which shows where a pattern has 15 pairs; so every answer's
    distance from its stratum's mean is first widened by sqrt(n / (n - 1)). A single answer says nothing of its spread
    and is taken as exact. The same answers give the same interval.

    Raises ValueError for an empty stratum and for answers that are not finite.
    """
    if not strata or any(len(answers) == 0 or not np.isfinite(answers).all() for answers in strata):
        raise ValueError("a stratum is empty, or an answer is not finite")
    widened = []
    for answers in strata:
        mean, n = answers.mean(), len(answers)
        widened.append(mean + (answers - mean) * math.sqrt(n / (n - 1)) if n > 1 else np.repeat(answers, 2))

    def mean_of_means(*samples: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)

    longest = max(map(len, strata))
    result = stats.bootstrap(
        widened, mean_of_means, n_resamples=RESAMPLES, batch=max(1, 5_000_000 // longest), confidence_level=CONFIDENCE,
        method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    low, high = result.confidence_interval
    return Interval(float(np.mean([answers.mean() for answers in strata])), float(low), float(high))


def mean_iou(pixels: np.ndarray) -> np.ndarray:
    """Mean IoU in % of pixels [..., classes, 3] (right, predicted, labelled), over the classes that occur."""
    right, predicted, labelled = np.moveaxis(np.asarray(pixels, dtype=float), -1, 0)
    union = predicted + labelled - right
    iou = np.divide(100 * right, union, out=np.full_like(union, np.nan), where=union > 0)
    return np.nanmean(iou, axis=-1)


def iou_change(before: np.ndarray, after: np.ndarray) -> Interval:
    """The change of mean IoU, in points, and its percentile bootstrap interval, paired: images are resampled.

    before, after: pixels [images, classes, 3] as for `mean_iou`. IoU is a ratio of sums over images, so single images
    have no score of their own.
    """
    images, rng = len(before), np.random.default_rng(0)
    chosen = rng.multinomial(images, np.full(images, 1 / images), RESAMPLES).astype(float)
    sums = [np.tensordot(chosen, pixels, 1) for pixels in (before, after)]
    changes = mean_iou(sums[1]) - mean_iou(sums[0])
    low, high = (float(np.percentile(changes, 50 * (1 + side * CONFIDENCE))) for side in (-1, 1))
    return Interval(float(mean_iou(after.sum(0)) - mean_iou(before.sum(0))), low, high)


def over_seeds_and_answers(changes: np.ndarray) -> Interval:
    """The mean of changes [seeds, answers] and a t interval for new seeds and new answers.

    Its variance is that of the seeds' means plus that of the answers' means, each over its number. What is particular
    to an answer under a seed is in both, so the interval is a little too wide. Degrees of freedom: Satterthwaite's.
    Raises ValueError for fewer than two seeds or answers.
    """
    if min(changes.shape) < 2:
        raise ValueError(f"found {changes.shape[0]} seeds and {changes.shape[1]} answers, wanted two at least of each")
    means = [changes.mean(axis) for axis in (1, 0)]
    return interval(float(changes.mean()), [(float(np.var(each, ddof=1)) / len(each), len(each) - 1) for each in means])


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean over training seeds and its t interval. Raises ValueError for fewer than two."""
    if len(values) < 2:
        raise ValueError(f"found {len(values)} seeds, wanted two at least")
    return interval(float(np.mean(values)), [(float(np.var(values, ddof=1)) / len(values), len(values) - 1)])


def interval(value: float, parts: Sequence[tuple[float, int]], level: float = CONFIDENCE) -> Interval:
    """The t interval around a mean whose variance is the sum of parts (variance, degrees of freedom)."""
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / max(sum(part**2 / n for part, n in parts), 1e-300)
    half = float(stats.t.ppf((1 + level) / 2, max(freedom, 1)) * math.sqrt(variance))
    return Interval(value, value - half, value + half)


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p of the pairs won and lost, if a changed pair were equally likely to be won or lost."""
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p values for their number, each at most 1, in their order."""
    order, corrected, highest = sorted(range(len(ps)), key=lambda i: ps[i]), [1.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = highest
    return corrected


def smallest_gain(pairs: int, changed: int) -> float:
    """The smallest gain (won minus lost, as a share of the pairs) that is detected with probability POWER.

    Detected: by the exact McNemar test at 5 %. changed: how many pairs change; more of them, if the gain requires more.
    NaN if not even a gain of all pairs would be detected.
    """
    number = np.arange(pairs + 1)
    lost_at_most = stats.binom.ppf((1 - CONFIDENCE) / 2, number, 0.5)  # so few lost, or fewer, have p <= 5 %
    lost_at_most -= stats.binom.cdf(lost_at_most, number, 0.5) > (1 - CONFIDENCE) / 2

    def power(gain: float) -> float:
        share = max(changed / pairs, gain)
        losing = (1 - gain / share) / 2  # of the pairs that change
        return float((stats.binom.pmf(number, pairs, share) * stats.binom.cdf(lost_at_most, number, losing)).sum())

    if power(1.0) < POWER:
        return math.nan
    return float(optimize.brentq(lambda gain: power(gain) - POWER, 1e-9, 1.0))


def gain_verdict(gain: Interval, published: float | None) -> str:
    """Against a published gain: 'reproduced' if the interval lies above 0 and reaches it, 'not reproduced' if it ends
    below it, else 'not distinguishable'. Where none is published: 'gained', 'lost' or 'not distinguishable' from 0.
    """
    if published is None:
        return "gained" if gain.low > 0 else "lost" if gain.high < 0 else "not distinguishable"
    if gain.high < published:
        return "not reproduced"
    return "reproduced" if gain.low > 0 else "not distinguishable"


def preserved_verdict(change: Interval) -> str:
    """'preserved' where the interval lies above -ZERO_SHOT_MARGIN, 'lost' where below, else 'not distinguishable'."""
    if change.low > -ZERO_SHOT_MARGIN:
        return "preserved"
    return "lost" if change.high < -ZERO_SHOT_MARGIN else "not distinguishable"
