"""Stage export@<backbone>-<weights>: the weights in the formats that people load, verified, with a model card.

models/<profile>/export/<backbone>-<weights>/         for open_clip and transformers (models/exports.py); README.md
metrics/<profile>/export/<backbone>-<weights>.json    how far each format's embeddings are from the pipeline's own
"""

import json
from pathlib import Path

import yaml

from pipeline.benchmarks.pairs import PROMPT, read_mmvp_vlm
from pipeline.core import config
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import stage
from pipeline.evidence import provenance
from pipeline.evidence.templates import fill
from pipeline.models import exports
from pipeline.models.backbones import Backbone
from pipeline.models.registry import complete
from pipeline.models.residual_head import HEAD
from pipeline.sections.backbone import BackboneEntry
from pipeline.sections.images import Images, MiniImages, PublishedImages
from pipeline.sections.source import CheckpointSource


def card(
    profile: str, name: str, weights: str, sha256: str, notes: dict | None, distances: dict,
    no_transformers: str | None, headed: bool,
) -> str:  # fmt: skip
    """The model card.

    notes: what training saved beside them, if they were trained here. no_transformers: why there is no transformers
    format, if there is none. headed: whether the model has a residual head.
    """
    scores = json.loads(Path("metrics", profile, "cards", f"{name}-{weights}.json").read_text(encoding="utf-8"))
    entry: BackboneEntry = config.read(BackboneEntry, f"backbones.{name}")
    images: MiniImages | PublishedImages = config.read(Images, f"profiles.{profile}.images")
    source = complete(name, entry.source)
    recipe = notes and {key: notes[key] for key in ("seed", "train", "recipe")}
    values = {
        "profile": profile, "backbone": name, "weights": weights,
        "base": source.weights if isinstance(source, CheckpointSource) else None,
        "architecture": source.architecture if isinstance(source.architecture, str) else None,
        "checkpoint": entry.checkpoints.get(weights),
        "images": images.shards if isinstance(images, PublishedImages) and images.kind == "shards" else images.kind,
        "recipe": yaml.safe_dump(recipe, sort_keys=False) if recipe else None,
        **scores, "distances": distances, "no_transformers": no_transformers,
        "captions": bool(notes and notes["captions"]),
        "headed": headed, "sha256": sha256, "code": notes and notes["code"],
        "made_from": provenance.hashes([f"models/{profile}/{weights}/{name}"]),
    }  # fmt: skip
    return fill("card.md.jinja", values)


@stage
def main(backbone: str, weights: str) -> None:
    profile, compute = config.profile(), deterministic_device()
    pairs: int = config.read(config.Count, f"profiles.{profile}.mmvp_vlm.pairs_per_pattern")
    original = Path("models", profile, weights, backbone)
    outputs = (
        Path("models", profile, "export", f"{backbone}-{weights}"),
        Path("metrics", profile, "export", f"{backbone}-{weights}.json"),
    )
    with atomic(*outputs) as (folder, metrics_file):
        clip = Backbone.load(original).to(compute)
        no_transformers = exports.write(clip, original, folder)
        questions = read_mmvp_vlm(Path("data", profile, "mmvp"), pairs)
        shown = [question for i, question in enumerate(questions) if i // 2 % pairs == 0]  # a pair of each pattern
        texts = [PROMPT + question.statement for question in shown]
        distances = exports.verify(clip, folder, [question.image() for question in shown], texts, compute)
        if no_transformers:
            print(f"{backbone}: exported for open_clip only. {no_transformers}")
        notes = None
        entry: BackboneEntry = config.read(BackboneEntry, f"backbones.{backbone}")
        if weights not in ("pretrained", *entry.checkpoints):
            notes = json.loads((original / "diva.json").read_text(encoding="utf-8"))
        (folder / "README.md").write_text(
            card(profile, backbone, weights, clip.sha256, notes, distances, no_transformers, (folder / HEAD).exists()),
            encoding="utf-8",
        )
        write_json(metrics_file, distances)


if __name__ == "__main__":
    main()
