"""Stage score@mmvp-<backbone>-<weights>: score the image pairs under both pooling rules and in both directions.

metrics/<profile>/scores/mmvp/<backbone>-<weights>/
  scores.json    averages and patterns in %, ties, spread over evaluation draws
  pairs.csv      one row a pair and pooling rule: share of draws that were right, by MMVP's rule in both directions
                 and by the better of the two matchings; similarity_ij of statement i to image j, mean over draws
  scoring.json   version and hash of what was asked: prompt, rules, precision, the pairs' bytes
  images.csv     one row an image: the cosine between its stock embedding and the one of the pretrained weights
"""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch.nn.functional import cosine_similarity

from pipeline.benchmarks import scoring
from pipeline.benchmarks.pairs import Question, read_mmvp_vlm
from pipeline.core import config
from pipeline.core.compute import deterministic_device, generator
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import progress, stage
from pipeline.diva.condition import draw_positions, pool
from pipeline.diva.pairs import PairScores, matching, score_pairs
from pipeline.diva.rules import STOCK, PoolingRule
from pipeline.models.backbones import Backbone
from pipeline.sections.mmvp import Mmvp

PROMPT = "a photo of "
DIRECTIONS = ("statement_to_image", "image_to_statement")
SIMILARITIES = ("similarity_11", "similarity_12", "similarity_21", "similarity_22")
VERSION = 1  # of the scoring, see benchmarks/scoring.py


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
    ids = backbone.tokenizer([PROMPT + question.statement for question in questions]).to(pooled.device)
    text = torch.nn.functional.normalize(backbone.encode_text(ids), dim=-1).unflatten(0, (-1, 2))
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


@stage
def main(backbone: str, weights: str) -> None:
    profile, compute = config.profile(), deterministic_device()
    section: Mmvp = config.read(Mmvp, f"profiles.{profile}.mmvp")
    published: PoolingRule = config.read(PoolingRule, f"backbones.{backbone}.published_pooling")
    pairs: int = config.read(config.Count, f"profiles.{profile}.mmvp_vlm.pairs_per_pattern")
    with atomic(Path("metrics", profile, "scores", "mmvp", f"{backbone}-{weights}")) as (folder,):
        questions = read_mmvp_vlm(Path("data", profile, "mmvp"), pairs)
        clip = Backbone.load(Path("models", profile, weights, backbone)).to(compute)
        summary, table, pooled = score(clip, questions, published, section, compute)
        folder.mkdir()
        scoring.write(
            folder, VERSION, prompt=PROMPT, rule="p > 0.5 of a softmax over the pair, both statements",
            precision="float32", published_pooling=asdict(published), draws=section.draws, seed=section.seed,
            preprocessing=clip.preprocessing,
            pairs=scoring.content(Path("data", profile, "mmvp"), (".csv", ".jpg")),
        )  # fmt: skip
        write_json(folder / "scores.json", {"weights_sha256": clip.sha256, **summary})
        table.to_csv(folder / "pairs.csv", index=False, float_format="%.4f")
        if weights != "pretrained":
            original = Backbone.load(Path("models", profile, "pretrained", backbone)).to(compute)
            before, _ = tokens(original, questions, None, section.batch, compute)
            cosines = cosine_similarity(before.cpu().double(), pooled.double())
            ids = [question.id for question in questions]
            pd.DataFrame({"question": ids, "cosine": cosines}).to_csv(folder / "images.csv", index=False)


if __name__ == "__main__":
    main()
