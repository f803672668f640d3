"""Statistics on made-up tables with known answers, and by simulation: do the intervals and verdicts keep their word?"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from pipeline.evidence import statistics
from pipeline.evidence.statistics import (
    Interval,
    gain_verdict,
    mcnemar,
    over_seeds,
    preserved_verdict,
    smallest_gain,
    stratified,
)

Draws = np.random.Generator


def test_strata_weigh_equally() -> None:
    assert stratified([np.array([100.0, 0, 0, 0]), np.array([100.0])]).value == 62.5


def test_the_interval_is_the_bootstraps() -> None:
    """Of two answers 0 and 1, a resample's mean is, once widened, 1/2 or, a quarter each, 1/2 -+ 1/sqrt 2."""
    value, low, high = stratified([np.array([0.0, 1.0])])
    assert (value, low, high) == pytest.approx((0.5, 0.5 - math.sqrt(0.5), 0.5 + math.sqrt(0.5)))


def test_equal_answers_leave_no_doubt() -> None:
    assert stratified([np.full(15, -100.0), np.full(10, 50.0)]) == (-25, -25, -25)
    assert stratified([np.zeros(1)]) == (0, 0, 0)


def test_the_same_answers_give_the_same_interval() -> None:
    answers = [np.random.default_rng(0).choice([-100.0, 0, 100], 15) for _ in range(9)]
    assert stratified(answers) == stratified(answers)
    low, high = stratified([-stratum for stratum in answers])[1:]
    assert (-high, -low) == pytest.approx(stratified(answers)[1:], abs=2)


@pytest.mark.parametrize("strata", [[], [np.array([])], [np.zeros(3), np.array([0, math.nan])]])
def test_answers_that_are_none_are_refused(strata: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="empty, or an answer is not finite"):
        stratified(strata)


def test_mcnemar_is_a_sum_of_binomials() -> None:
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1
    assert mcnemar(9, 1) == mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    by_hand = 2 * sum(math.comb(149, k) for k in range(46)) / 2**149
    assert mcnemar(45, 104) == pytest.approx(by_hand)


def test_over_seeds_is_a_t_interval() -> None:
    assert over_seeds([1, 2, 3, 4, 5]) == pytest.approx(
        (3, 3 - 2.776445 * math.sqrt(0.5), 3 + 2.776445 * math.sqrt(0.5))
    )
    with pytest.raises(ValueError, match="found 1 seeds"):
        over_seeds([1.0])


@pytest.mark.parametrize(
    ("gain", "published", "verdict"),
    [
        ((5, 1, 9), 6.6, "reproduced"),
        ((9, 7, 11), 6.6, "reproduced"),
        ((3, 1, 5), 6.6, "not reproduced"),
        ((-3, -5, -1), 6.6, "not reproduced"),
        ((3, -1, 7), 6.6, "not distinguishable"),
        ((3, 0, 6.6), 6.6, "not distinguishable"),
        ((3, 1, 5), None, "gained"),
        ((-3, -5, -1), None, "lost"),
        ((0, -1, 1), None, "not distinguishable"),
    ],
)
def test_the_verdict_on_a_gain(gain: tuple[float, float, float], published: float | None, verdict: str) -> None:
    assert gain_verdict(Interval(*gain), published) == verdict


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ((0, -0.9, 0.9), "preserved"),
        ((-0.5, -0.7, -0.3), "preserved"),
        ((-2, -3, -1.1), "lost"),
        ((-1, -2, 0), "not distinguishable"),
        ((-0.5, -1.0, 0), "not distinguishable"),
    ],
)
def test_the_verdict_on_zero_shot(change: tuple[float, float, float], verdict: str) -> None:
    assert preserved_verdict(Interval(*change)) == verdict


def test_an_interval_reads_well() -> None:
    assert Interval(1.94, -0.04, 4.06).text() == "+1.9 [+0.0, +4.1]"


# --------------------------------------------------------------------------------------------------------------- power


def test_more_pairs_and_fewer_changes_show_smaller_gains() -> None:
    found = [smallest_gain(pairs, pairs * share // 100) for pairs, share in ((135, 20), (900, 20), (900, 5))]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(2.8 * math.sqrt(0.2 / 135), rel=0.1)  # the usual normal approximation
    assert math.isnan(smallest_gain(4, 2))
    assert smallest_gain(135, 0) == pytest.approx(8 / 135, abs=0.02)  # six wins and no loss have p = 3 %


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "changed"), [(135, 27), (900, 150)])
def test_the_smallest_gain_is_shown_in_80_of_100_experiments(pairs: int, changed: int) -> None:
    gain, share, draws = smallest_gain(pairs, changed), changed / pairs, np.random.default_rng(1)
    outcomes = draws.multinomial(pairs, [(share + gain) / 2, (share - gain) / 2, 1 - share], size=4000)
    p = cache(mcnemar)
    shown = np.mean([p(int(won), int(lost)) <= 0.05 for won, lost, _ in outcomes])
    assert shown == pytest.approx(0.8, abs=0.03)


# ---------------------------------------------------------------------------------------------------------- simulation


def pairs(size: int, won: float, lost: float) -> Callable[[Draws], list[np.ndarray]]:
    """Nine patterns, some easier to win than others; the mean shares won and lost are those given."""
    tilt = np.linspace(0.2, 1.8, 9)

    def experiment(draws: Draws) -> list[np.ndarray]:
        shares = [(won * t, lost, 1 - won * t - lost) for t in tilt]
        return [draws.choice([100.0, -100.0, 0.0], size, p=p) for p in shares]

    return experiment


def one_set(size: int, lost: float) -> Callable[[Draws], list[np.ndarray]]:
    """A zero-shot set of which one answer in a hundred is won."""
    return lambda draws: [draws.choice([100.0, -100.0, 0.0], size, p=[0.01, lost, 0.99 - lost])]


def drawn_tokens(draws: Draws) -> list[np.ndarray]:
    """Shares of 16 draws before and after, on nine patterns of 15 pairs; the mean gain is five points."""
    return [
        100 * (draws.binomial(16, easy + 0.05) - draws.binomial(16, easy)) / 16
        for easy in draws.beta(1, 3, (9, 15)) * 0.9
    ]


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(
    ("experiment", "truth"),
    [
        pytest.param(pairs(15, 0.12, 0.07), 5.0, id="135 pairs"),
        pytest.param(drawn_tokens, 5.0, id="drawn tokens"),
        pytest.param(one_set(300, 0.03), -2.0, id="a small zero-shot set"),
        pytest.param(pairs(100, 0.03, 0.03), 0.0, marks=pytest.mark.exhaustive, id="900 pairs, few change"),
        pytest.param(one_set(1000, 0.03), -2.0, marks=pytest.mark.exhaustive, id="a zero-shot set"),
    ],
)
def test_intervals_cover_the_truth_in_95_of_100_experiments(experiment, truth: float) -> None:
    draws = np.random.default_rng(2)
    intervals = [stratified(experiment(draws)) for _ in range(1000)]
    assert np.mean([i.value for i in intervals]) == pytest.approx(truth, abs=0.5)
    assert np.mean([i.low <= truth <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(
    ("won", "lost", "wrong"), [(0.10, 0.10, "reproduced"), (0.13, 0.07, "not reproduced")], ids=["no gain", "that gain"]
)
def test_a_verdict_is_wrong_as_seldom_as_it_claims(won: float, lost: float, wrong: str) -> None:
    """Each wrong verdict at 2.5 %; of 1,000 experiments, by chance alone, at most 3.9 % (three standard errors)."""
    draws = np.random.default_rng(3)
    verdicts = [gain_verdict(stratified(pairs(15, won, lost)(draws)), published=6.0) for _ in range(1000)]
    assert verdicts.count(wrong) <= 39
    assert len(set(verdicts)) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(
    ("answers", "experiments", "most"), [(400, 500, 23), pytest.param(1000, 1000, 39, marks=pytest.mark.exhaustive)]
)
def test_a_loss_of_the_margin_is_seldom_called_preserved(answers: int, experiments: int, most: int) -> None:
    """Either verdict at 2.5 %; by chance alone at most three standard errors more."""
    draws, experiment = np.random.default_rng(4), one_set(answers, 0.02)
    verdicts = [preserved_verdict(stratified(experiment(draws))) for _ in range(experiments)]
    assert 0 < verdicts.count("preserved") <= most
    assert 0 < verdicts.count("lost") <= most


def test_holm_s_correction() -> None:
    """The smallest times their number, the next times one less, and never falling."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []
