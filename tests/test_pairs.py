"""The scoring rule on pairs made by hand."""

import math

import pytest
import torch

from pipeline.diva.pairs import score_pairs

RIGHT, SWAPPED = [[2.0, 1.0], [1.0, 2.0]], [[1.0, 2.0], [2.0, 1.0]]
ALWAYS_FIRST, ALWAYS_SECOND = [[2.0, 1.0], [2.0, 1.0]], [[1.0, 2.0], [1.0, 2.0]]


def score(*pairs: list[list[float]]) -> tuple[list[bool], int]:
    scores = score_pairs(torch.tensor(pairs))
    return scores.right_P.tolist(), scores.ties


def test_a_pair_is_right_iff_both_queries_are() -> None:
    assert score(RIGHT, SWAPPED, ALWAYS_FIRST, ALWAYS_SECOND) == ([True, False, False, False], 0)


def test_a_tie_counts_as_the_second_candidate() -> None:
    first_tied, second_tied = [[1.0, 1.0], [1.0, 2.0]], [[2.0, 1.0], [1.0, 1.0]]
    assert score(first_tied) == ([False], 1)  # wrong for the first query
    assert score(second_tied) == ([True], 1)  # right for the second


def test_a_blind_model_scores_nothing() -> None:
    blind = torch.randn(50, 2, 1, generator=torch.Generator().manual_seed(0)).expand(50, 2, 2)
    scores = score_pairs(blind)
    assert not scores.right_P.any()
    assert scores.ties == 100


def test_logits_a_hair_apart_are_no_tie() -> None:
    assert score([[1.001, 1.0], [1.0, 1.001]]) == ([True], 0)


def test_scale_and_shift_of_a_query_change_nothing() -> None:
    assert score([[200.0 + 7, 100.0 + 7], [100.0, 200.0]]) == score(RIGHT)


def test_the_other_direction_asks_by_columns() -> None:
    logits = torch.tensor([[[2.0, 1.0], [9.0, 10.0]]])  # every statement finds its image; image 1 prefers statement 2
    assert score_pairs(logits).right_P.tolist() == [True]
    assert score_pairs(logits.transpose(1, 2)).right_P.tolist() == [False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"pair 2\b.*not finite"):
        score(RIGHT, [[1.0, 2.0], [bad, 1.0]], RIGHT)
