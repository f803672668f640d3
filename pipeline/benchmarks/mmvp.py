"""The score of image pairs: under both pooling rules, in both directions, and by the better of the two matchings."""

import pandas as pd
import torch

from pipeline.benchmarks.pairs import PROMPT, Question
from pipeline.core.compute import generator
from pipeline.core.stages import progress
from pipeline.diva.condition import draw_positions, pool
from pipeline.diva.pairs import PairScores, matching, score_pairs
from pipeline.diva.rules import STOCK, PoolingRule
from pipeline.models.backbones import Backbone
from pipeline.sections.mmvp import Mmvp

DIRECTIONS = ("statement_to_image", "image_to_statement")
SIMILARITIES = ("similarity_11", "similarity_12", "similarity_21", "similarity_22")


@torch.no_grad()
def tokens(
    backbone: Backbone, questions: list[Question], resize_mode: str | None, batch: int, compute: torch.device
) -> tuple[torch.Tensor, ...]:
    """(pooled [Q, D], patches [Q, N, D]) of the questions' images; resize_mode None: the backbone's own."""
    parts = []
    for start in progress(range(0, len(questions), batch), "images of the pairs"):
        images = [backbone.preprocess(question.image(), resize_mode) for question in questions[start : start + batch]]
        parts.append(backbone.image_tokens(torch.stack(images).to(compute)))
    return torch.cat([pooled for pooled, _ in parts]), torch.cat([patches for _, patches in parts])


@torch.no_grad()
def logits(
    backbone: Backbone, questions: list[Question], pooled: torch.Tensor, patches: torch.Tensor, rule: PoolingRule,
    seed: int, draw: int,
) -> torch.Tensor:  # fmt: skip
    """[pair, statement, image]."""
    statements = backbone.embed([PROMPT + question.statement for question in questions])
    text = torch.nn.functional.normalize(statements, dim=-1).unflatten(0, (-1, 2))
    per_statement = []
    for statement in range(2):
        drawn = statement if rule.drawn_per == "statement" else 0
        draws = [generator(seed, "read-out", draw, drawn, question.id) for question in questions]
        positions = draw_positions(rule.tokens, patches.shape[1], draws)
        images = pool(pooled, patches, rule, positions).unflatten(0, (-1, 2))
        per_statement.append(torch.einsum("pd,pid->pi", text[:, statement], images))
    return backbone.logit_scale * torch.stack(per_statement, 1)


def score(
    backbone: Backbone, questions: list[Question], published: PoolingRule, p: Mmvp, compute: torch.device
) -> tuple[dict, pd.DataFrame, torch.Tensor]:
    """(summary for the JSON file, a table of pairs, the images' stock embeddings [Q, D])."""
    stock = pooled, patches = tokens(backbone, questions, None, p.batch, compute)
    summary: dict = {"pairs": len(questions) // 2, "matching": {}}
    tables = []
    for name, rule in (("stock", STOCK), ("published", published)):
        if rule.resize_mode:
            pooled, patches = tokens(backbone, questions, rule.resize_mode, p.batch, compute)
        draws = p.draws if rule.tokens.positions(patches.shape[1]) else 1
        scores: dict[str, list[PairScores]] = {direction: [] for direction in DIRECTIONS}
        similarities, matched = [], []
        for draw in range(draws):
            asked = logits(backbone, questions, pooled, patches, rule, p.seed, draw).cpu()
            similarities.append(asked.double() / backbone.logit_scale.double().cpu())
            matched.append(matching(asked))
            scores["statement_to_image"].append(score_pairs(asked))
            scores["image_to_statement"].append(score_pairs(asked.transpose(1, 2)))
        table = pd.DataFrame({"pair": range(1, len(questions) // 2 + 1), "pattern": [q.type for q in questions[::2]]})
        table["pooling"] = name
        summary[name] = {}
        for direction, results in scores.items():
            right = torch.stack([result.right_P for result in results]).double()  # [draws, pairs]
            table[direction] = right.mean(0).numpy()
            patterns = 100 * table.groupby("pattern", sort=False)[direction].mean()
            by_draw = 100 * pd.DataFrame(right.T.numpy()).groupby(table["pattern"], sort=False).mean()
            sd = by_draw.std(axis=1, ddof=1).fillna(0)  # a single draw has no spread
            summary[name][direction] = {
                "average": round(float(patterns.mean()), 3),
                "sd_over_draws": round(float(by_draw.mean().std(ddof=1)), 3) if draws > 1 else 0.0,
                "draws": draws,
                "ties": sum(result.ties for result in results),
                "patterns": {pattern: round(float(value), 3) for pattern, value in patterns.items()},
                "patterns_sd_over_draws": {pattern: round(float(value), 3) for pattern, value in sd.items()},
            }
        table["matching"] = torch.stack(matched).double().mean(0).numpy()
        patterns = 100 * table.groupby("pattern", sort=False)["matching"].mean()
        summary["matching"][name] = {
            "average": round(float(patterns.mean()), 3),
            "patterns": {pattern: round(float(value), 3) for pattern, value in patterns.items()},
        }
        for (i, j), column in zip(((0, 0), (0, 1), (1, 0), (1, 1)), SIMILARITIES, strict=True):
            table[column] = [f"{value:.7f}" for value in torch.stack(similarities).mean(0)[:, i, j].tolist()]
        tables.append(table)
    return summary, pd.concat(tables), stock[0].cpu()
