"""Oracle upper bound of a mini backbone: its score if its image tower had been trained on captions with every detail.

    python -m pipeline.tools.oracle mini       after `dvc repro`; writes metrics/<profile>/oracle/<backbone>.json

The text tower stays frozen; the image tower gets twice the steps that it was made with. If this score were low,
the text tower itself would not distinguish details, and no feedback to the image tower could gain anything.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from pipeline import mmvp, zeroshot
from pipeline.benchmarks.pairs import read_mmvp_vlm
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, stage
from pipeline.evidence.results import headline
from pipeline.mini import pretrain, world
from pipeline.models.backbones import Backbone
from pipeline.sections import params
from pipeline.sections.source import MiniSource


def measure(p: params.Params, name: str, compute: torch.device) -> dict[str, Any]:
    """The headline figures, and the pairs right by the stock embedding by pattern, %. Raises UserError for others."""
    profile, entry = p.run.profile, p.backbones[name]
    source = entry.source
    if not isinstance(source, MiniSource):
        raise UserError(f"backbones.{name} was not made here, so its captions and details are unknown. Choose mini.")
    backbone = Backbone.load(Path("models", profile, "pretrained", name)).to(compute)
    image_tower, preprocessing = source.image_tower, source.preprocessing.model_dump()
    steps, tok = 2 * image_tower.steps, pretrain.tokenizer()
    pretrain.image_tower(backbone.clip, tok, preprocessing, image_tower, steps, world.any_details)
    questions = read_mmvp_vlm(Path("data", profile, "mmvp"), p.profile.mmvp_vlm.pairs_per_pattern)
    published = entry.published_pooling
    pairs, _, _ = mmvp.score(backbone, questions, published, p.profile.mmvp, compute)
    sets, _ = zeroshot.score(backbone, Path("data", profile, "zeroshot"), p.profile.zeroshot, compute)
    return {**headline(pairs, sets), "patterns": pairs["stock"]["statement_to_image"]["patterns"]}


@stage
def main() -> None:
    p, name = params.load(), sys.argv[1]
    with atomic(Path("metrics", p.run.profile, "oracle", f"{name}.json")) as (file,):
        result = measure(p, name, deterministic_device())
        write_json(file, result)
        print(f"oracle upper bound of {name}: " + ", ".join(f"{key} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
