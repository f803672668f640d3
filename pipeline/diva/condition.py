"""The visual dense recap, on which the denoiser is conditioned (paper section 3.3), and the rules of pooling.

All functions are pure: token positions are drawn by `draw_positions` from generators that the caller names, and
handed in.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from pipeline.diva.rules import PoolingRule, TokenRule


def draw_positions(rule: TokenRule, patches: int, generators: list[torch.Generator]) -> torch.Tensor | None:
    """Positions int64 [B, K] among the patches, one generator an image; None where the rule draws none."""
    count = rule.positions(patches)
    if not count:
        return None
    return torch.stack([torch.randint(patches, (count,), generator=g) for g in generators])


def select(patches_BND: torch.Tensor, rule: TokenRule, positions_BK: torch.Tensor | None) -> torch.Tensor:
    """The patch tokens that a rule lets through, [B, T - 1, D]."""
    if rule.kind == "none":
        return patches_BND[:, :0]
    if rule.kind == "all":
        return patches_BND
    if rule.kind == "windows":
        size = int(rule.number)
        return patches_BND.unfold(1, size, size).mean(-1)
    assert positions_BK is not None, f"rule {rule.kind} needs drawn positions"
    return torch.take_along_dim(patches_BND, positions_BK.to(patches_BND.device)[..., None], dim=1)


def recap(
    pooled_BD: torch.Tensor, patches_BND: torch.Tensor, rule: TokenRule, positions_BK: torch.Tensor | None
) -> torch.Tensor:
    """The visual dense recap [B, T, D]: the pooled token first, then the selected ones."""
    return torch.cat([pooled_BD[:, None], select(patches_BND, rule, positions_BK)], dim=1)


def condition(
    text_1LD: torch.Tensor, projected_BTD: torch.Tensor, text_rule: Literal["sequence", "mean"]
) -> torch.Tensor:
    """Text plus projected recap, [B, T, D]: text embeddings one by one, or their mean over all L (padding included).

    Raises ValueError where the text is added one by one and the two lengths differ.
    """
    if text_rule == "mean":
        return text_1LD.mean(1, keepdim=True) + projected_BTD
    if text_1LD.shape[1] != projected_BTD.shape[1]:
        raise ValueError(
            f"text rule 'sequence' needs as many recap tokens as text tokens: {projected_BTD.shape[1]} against "
            f"{text_1LD.shape[1]}. Change the token rule, or use text rule 'mean'."
        )
    return text_1LD + projected_BTD


def pool(
    pooled_BD: torch.Tensor, patches_BND: torch.Tensor, rule: PoolingRule, positions_BK: torch.Tensor | None = None
) -> torch.Tensor:
    """One vector an image, [B, D]. Without `normalize_output` it keeps its length, and that can decide a pair."""
    tokens = select(patches_BND, rule.tokens, positions_BK)
    if rule.normalize_tokens:
        pooled_BD, tokens = F.normalize(pooled_BD, dim=-1), F.normalize(tokens, dim=-1)
    if tokens.shape[1]:
        pooled_BD = pooled_BD + tokens.mean(1)
    return F.normalize(pooled_BD, dim=-1) if rule.normalize_output else pooled_BD
