"""Oracle upper bound of a mini backbone: its score if its image tower had been trained on captions with every detail.

    python -m pipeline.tools.oracle mini       after `dvc repro`; writes metrics/<profile>/oracle/<backbone>.json
    python -m pipeline.tools.oracle mini segmentation mllm      writes <backbone>-<benchmark>.json there for each: the
                                               pretrained tower, the oracle's, and the gain with its interval

The text tower stays frozen; the image tower gets twice the steps that it was made with. If this score were low,
the text tower itself would not distinguish details, and no feedback to the image tower could gain anything.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pipeline.benchmarks import mllm_score, mmvp, segmentation, zeroshot
from pipeline.benchmarks.pairs import read_mmvp_vlm
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, stage
from pipeline.evidence import downstream
from pipeline.evidence.results import headline
from pipeline.mini import pretrain, world
from pipeline.models.backbones import Backbone
from pipeline.sections import params
from pipeline.sections.source import MiniSource

SCORE: dict[str, Callable[..., tuple[dict, pd.DataFrame]]] = {
    "segmentation": segmentation.score,
    "mllm": mllm_score.score,
}


def trained(p: params.Params, name: str, compute: torch.device) -> Backbone:
    """The pretrained backbone with its image tower trained further. Raises UserError for a published backbone."""
    profile, source = p.run.profile, p.backbone(name).source
    if not isinstance(source, MiniSource):
        raise UserError(
            f"backbone '{name}' is a published one: no captions name every detail of its images. Choose 'mini'."
        )
    backbone = Backbone.load(Path("models", profile, "pretrained", name)).to(compute)
    image_tower, preprocessing = source.image_tower, source.preprocessing.model_dump()
    steps, tok = 2 * image_tower.steps, pretrain.tokenizer()
    pretrain.image_tower(backbone.clip, tok, preprocessing, image_tower, steps, world.any_details)
    return backbone


def measure(p: params.Params, name: str, backbone: Backbone, compute: torch.device) -> dict[str, Any]:
    """The headline figures, and the pairs right by the stock embedding for each pattern, in %."""
    profile, entry = p.run.profile, p.backbones[name]
    questions = read_mmvp_vlm(Path("data", profile, "mmvp"), p.profile.mmvp_vlm.pairs_per_pattern)
    published = entry.published_pooling
    pairs, _, _ = mmvp.score(backbone, questions, published, p.profile.mmvp, compute)
    sets, _ = zeroshot.score(backbone, Path("data", profile, "zeroshot"), p.profile.zeroshot, compute)
    return {**headline(pairs, sets), "patterns": pairs["stock"]["statement_to_image"]["patterns"]}


def compare(p: params.Params, name: str, benchmark: str, backbone: Backbone, compute: torch.device) -> dict[str, Any]:
    """The gain of the oracle's tower over the pretrained one on a benchmark, by evidence/downstream.py's columns."""
    pretrained = Backbone.load(Path("models", p.run.profile, "pretrained", name)).to(compute)
    data, section = Path("data", p.run.profile, benchmark), getattr(p.profile, benchmark)
    scored = {
        weights: downstream.OF[benchmark](*SCORE[benchmark](each, data, section, compute), {})
        for weights, each in (("pretrained", pretrained), ("oracle", backbone))
    }
    return downstream.evidence(scored)


@stage
def main(backbone: str, *benchmarks: str) -> None:
    p, compute = params.load(), deterministic_device()
    folder, others = Path("metrics", p.run.profile, "oracle"), {*benchmarks} - SCORE.keys()
    if others:
        raise UserError(f"'{min(others)}' is no benchmark of the oracle. Name {' or '.join(SCORE)}, or no benchmark.")
    clip = trained(p, backbone, compute)
    for benchmark in benchmarks:
        with atomic(folder / f"{backbone}-{benchmark}.json") as (file,):
            found = compare(p, backbone, benchmark, clip, compute)
            write_json(file, found)
            for column, result in found.items():
                print(f"{column}: {result.get('undefined') or [result['score'], result['gain']]}")
    if benchmarks:
        return
    with atomic(folder / f"{backbone}.json") as (file,):
        result = measure(p, backbone, clip, compute)
        write_json(file, result)
        print(f"oracle upper bound of {backbone}: " + ", ".join(f"{key} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
