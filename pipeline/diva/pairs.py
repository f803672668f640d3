"""The rule by which a pair of images and its two statements is right or wrong (MMVP-VLM's published scoring)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PairScores:
    """right: bool [P]; ties: how many of the 2 P decisions were exactly even."""

    right_P: torch.Tensor
    ties: int


def score_pairs(logits_P22: torch.Tensor) -> PairScores:
    """logits [pair, query, candidate], candidate i belonging to query i. A pair is right iff both queries are.

    For every query a softmax over the two candidates; candidate 1 is chosen iff p > 0.5. A tie therefore counts as
    candidate 2: wrong for the first query, right for the second. With statements as queries and images as candidates
    this is the published rule; transpose the last two dimensions to ask the other way round, image to statement.

    Raises ValueError on a logit that is not finite; else a model that returns NaN would be scored by that rule.
    """
    if not torch.isfinite(logits_P22).all():
        bad = int((~torch.isfinite(logits_P22)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"pair {bad + 1}: a logit is not finite. The model or its embedding is broken.")
    first = logits_P22.float().softmax(-1)[..., 0]
    chosen_first = first > 0.5
    return PairScores(right_P=chosen_first[:, 0] & ~chosen_first[:, 1], ties=int((first == 0.5).sum()))


def matching(logits_P22: torch.Tensor) -> torch.Tensor:
    """Whether the right matching of two statements to two images is the better one, bool [P]: s11 + s22 > s12 + s21.

    Chance is 50 %. Unlike the rule above it forgives an image that both statements like. Source: Test-Time Matching,
    ICLR 2026.
    """
    s = logits_P22.double()
    return s[:, 0, 0] + s[:, 1, 1] > s[:, 0, 1] + s[:, 1, 0]
