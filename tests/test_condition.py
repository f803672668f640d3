"""Token rules, pooling rules and the drawing of positions, against naive loops over the eight published backbones."""

from dataclasses import dataclass

import pytest
import torch

from pipeline.core.compute import generator
from pipeline.diva.condition import condition, draw_positions, pool, recap
from pipeline.diva.rules import STOCK, PoolingRule, TokenRule

NONE, ALL = TokenRule("none"), TokenRule("all")
CLS_AND_76, HALF = TokenRule("random", 76), TokenRule("random_fraction", 0.5)


@dataclass(frozen=True)
class Published:
    """One published backbone: its patches, how many tokens its condition has, its rules."""

    patches: int
    tokens: int
    rule: TokenRule
    pooling: PoolingRule


BACKBONES = {
    "openai_224": Published(256, 77, CLS_AND_76, PoolingRule(CLS_AND_76)),
    "openai_336": Published(576, 77, CLS_AND_76, PoolingRule(CLS_AND_76)),
    "metaclip_l14": Published(256, 257, ALL, PoolingRule(ALL, normalize_tokens=True)),
    "metaclip_h14": Published(256, 257, ALL, PoolingRule(ALL, normalize_tokens=True)),
    "dfn_224": Published(256, 257, ALL, STOCK),
    "dfn_378": Published(729, 365, HALF, PoolingRule(HALF, normalize_tokens=True, normalize_output=False)),
    "siglip_224": Published(256, 43, TokenRule("windows", 6), STOCK),
    "siglip_384": Published(729, 73, TokenRule("windows", 10), STOCK),
}


def generators(*images: int) -> list[torch.Generator]:
    return [generator("test", image) for image in images]


def tokens(patches: int, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled [2, D], patches [2, N, D]) of two made-up images."""
    noise = torch.randn(2, patches + 1, width, generator=generator("test", "tokens"), dtype=torch.float64)
    return noise[:, 0], noise[:, 1:]


def naive_selection(patches: torch.Tensor, rule: TokenRule, positions: torch.Tensor | None) -> list[torch.Tensor]:
    """The selected tokens of one image."""
    if rule.kind == "none":
        return []
    if rule.kind == "all":
        return [patches[i] for i in range(len(patches))]
    if rule.kind == "windows":
        size, means = int(rule.number), []
        for start in range(0, len(patches), size):
            window = [patches[i] for i in range(start, min(start + size, len(patches)))]
            if len(window) == size:
                means.append(sum(window) / size)
        return means
    assert positions is not None
    return [patches[i] for i in positions.tolist()]


def naive_read_out(
    pooled: torch.Tensor, patches: torch.Tensor, rule: PoolingRule, positions: torch.Tensor | None
) -> torch.Tensor:
    """The vector of one image."""
    selected = naive_selection(patches, rule.tokens, positions)
    if rule.normalize_tokens:
        pooled, selected = pooled / pooled.norm(), [token / token.norm() for token in selected]
    total = pooled + sum(selected) / len(selected) if selected else pooled
    return total / total.norm() if rule.normalize_output else total


@pytest.mark.parametrize("key", BACKBONES)
def test_recap_of_every_published_backbone(key: str) -> None:
    published = BACKBONES[key]
    pooled, patches = tokens(published.patches)
    positions = draw_positions(published.rule, published.patches, generators(0, 1))
    found = recap(pooled, patches, published.rule, positions)
    assert found.shape == (2, published.tokens, 3)
    for image in range(2):
        drawn = None if positions is None else positions[image]
        naive = [pooled[image], *naive_selection(patches[image], published.rule, drawn)]
        torch.testing.assert_close(found[image], torch.stack(naive))


@pytest.mark.parametrize("key", BACKBONES)
def test_read_outs_of_every_published_backbone(key: str) -> None:
    published = BACKBONES[key]
    pooled, patches = tokens(published.patches)
    for rule in (STOCK, published.pooling):
        positions = draw_positions(rule.tokens, published.patches, generators(0, 1))
        found = pool(pooled, patches, rule, positions)
        for image in range(2):
            drawn = None if positions is None else positions[image]
            torch.testing.assert_close(found[image], naive_read_out(pooled[image], patches[image], rule, drawn))


def test_recap_without_tokens_is_the_pooled_one() -> None:
    pooled, patches = tokens(4)
    assert recap(pooled, patches, NONE, None).equal(pooled[:, None])


@pytest.mark.parametrize(
    ("rule", "patches", "count"),
    [
        (NONE, 9, 0),
        (ALL, 9, 0),
        (TokenRule("windows", 2), 9, 0),
        (CLS_AND_76, 9, 76),
        (HALF, 9, 4),
        (HALF, 7, 3),
        (HALF, 729, 364),
    ],
)
def test_number_of_drawn_positions(rule: TokenRule, patches: int, count: int) -> None:
    assert rule.positions(patches) == count
    drawn = draw_positions(rule, patches, generators(0))
    assert drawn is None if count == 0 else drawn.shape == (1, count)


def test_positions_are_determined_by_the_image_alone() -> None:
    alone, together, again = (draw_positions(CLS_AND_76, 256, generators(*images)) for images in ([7], [3, 7], [3, 7]))
    assert together.equal(again)
    assert together[1].equal(alone[0])
    assert not together[0].equal(together[1])


def test_positions_are_drawn_with_replacement_among_the_patches_only() -> None:
    drawn = draw_positions(TokenRule("random", 200), 5, generators(*range(20)))
    assert drawn.unique().tolist() == [0, 1, 2, 3, 4]
    assert draw_positions(CLS_AND_76, 256, generators(0)).unique().numel() < 76
    pooled, patches = torch.full((1, 1), -1.0), torch.arange(5.0)[None, :, None]
    found = recap(pooled, patches, TokenRule("random", 200), drawn[:1])[0, :, 0].tolist()
    assert found.count(-1.0) == 1  # the class token is there once, whatever is drawn


def test_text_one_by_one_or_its_mean() -> None:
    text, projected = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[10.0], [20.0]], [[30.0], [40.0]]])
    assert condition(text, projected, "sequence").flatten().tolist() == [11, 23, 31, 43]
    assert condition(text, projected, "mean").flatten().tolist() == [12, 22, 32, 42]


@pytest.mark.parametrize("count", [1, 76, 78])
def test_text_one_by_one_needs_as_many_tokens(count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} against 77"):
        condition(torch.zeros(1, 77, 2), torch.zeros(3, count, 2), "sequence")
