"""Stage score@mllm-<backbone>-<weights>: questions on images, answered by a small LLaVA on the frozen image tower.

metrics/<profile>/scores/mllm/<backbone>-<weights>/
  scores.json    pairs and questions answered right in %, by training seed of the language model and by pattern;
                 a hash of the tensors that it reads
  pairs.parquet  whether both questions of a pair were answered right: one row a pair and seed

Projector and language model are trained anew for every tower, in the same way, with several seeds (benchmarks/mllm.py).
"""

import hashlib
from pathlib import Path

import pandas as pd
import torch

from pipeline.benchmarks import mllm as benchmark
from pipeline.benchmarks import questions as sets
from pipeline.core import config
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, stage
from pipeline.models.backbones import Backbone
from pipeline.models.exports import OpenClipOnly, tokenizer, transformers_model
from pipeline.models.residual_head import WithHead
from pipeline.sections.mllm import Mllm


def vision_tower(backbone: Backbone):
    """The image tower as a model of transformers. Raises UserError if transformers has no class for it.

    A residual head is left out: it stands behind the tower, and the language model reads patch tokens.
    """
    clip = backbone.clip
    if isinstance(clip.visual, WithHead):
        clip.visual = clip.visual.visual
    try:
        return transformers_model(clip, tokenizer(backbone)).vision_model
    except OpenClipOnly as error:
        raise UserError(f"mllm: {error}. Take 'mllm' out of run.benchmarks for this backbone.") from error


def reads(vision) -> str:
    """sha256 of the tensors that the language model's input depends on: all before the last block."""
    last = f"encoder.layers.{vision.config.num_hidden_layers - 1}."
    digest = hashlib.sha256()
    for name, tensor in sorted(vision.state_dict().items()):
        if not (name.startswith((last, "post_layernorm", "head."))):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def score(backbone: Backbone, root: Path, p: Mllm, compute: torch.device) -> tuple[dict, pd.DataFrame]:
    """(scores.json, the table of pairs)."""
    vision, (images, asked), (tested, tests) = vision_tower(backbone), sets.read(root, "train"), sets.read(root, "test")
    tok, tables, by_seed = benchmark.tokenizer(asked), [], {}
    first = benchmark.new(vision, p.language, tok, 0)
    tokens, test_tokens = (
        benchmark.patch_tokens(first, torch.stack([backbone.preprocess(image) for image in part]), p.batch, compute)
        for part in (images, tested)
    )
    for seed in range(p.seeds):
        model = benchmark.new(vision, p.language, tok, seed).to(compute)
        losses = benchmark.fit(model, tok, tokens, asked, p.steps, p.batch, p.lr, p.context, seed)
        right = benchmark.answers(model, tok, test_tokens, tests, p.batch, p.context)
        table = pd.DataFrame({"seed": seed, "pattern": [q.pattern for q in tests[::2]]})
        table["pair"], table["right"] = (
            range(len(table)),
            [a and b for a, b in zip(right[::2], right[1::2], strict=True)],
        )
        tables.append(table)
        by_seed[str(seed)] = {
            "pairs": round(100 * float(table.right.mean()), 3),
            "questions": round(100 * sum(right) / len(right), 3),
            "loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        }
    pairs = pd.concat(tables, ignore_index=True)
    patterns = 100 * pairs.groupby("pattern", sort=False).right.mean()
    summary = {
        "reads_sha256": reads(vision),
        "pairs": round(100 * float(pairs.right.mean()), 3),
        "patterns": {pattern: round(float(value), 3) for pattern, value in patterns.items()},
        "seeds": by_seed,
    }
    return summary, pairs


@stage
def main(backbone: str, weights: str) -> None:
    profile, compute = config.profile(), deterministic_device()
    section: Mllm = config.read(Mllm, f"profiles.{profile}.mllm")
    with atomic(Path("metrics", profile, "scores", "mllm", f"{backbone}-{weights}")) as (folder,):
        clip = Backbone.load(Path("models", profile, weights, backbone))
        summary, pairs = score(clip, Path("data", profile, "mllm"), section, compute)
        folder.mkdir()
        write_json(folder / "scores.json", summary)
        pairs.to_parquet(folder / "pairs.parquet", index=False)


if __name__ == "__main__":
    main()
