"""Stage encoder@<recipe>: the frozen image encoder that the recipe's losses read, in timm's format on the hub.

data/<profile>/encoder/<recipe>/            config.json and model.safetensors; or none.json alone, where they read none
metrics/<profile>/encoder/<recipe>.json     parameters; its source or, if it was trained here, losses, and how often a
                                            linear classifier on its embedding is right, by attribute, on other images

Every recipe has a folder of its own, because a dependency of DVC cannot be optional.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, stage
from pipeline.data import downloads
from pipeline.sections.encoder import NO_ENCODER, EncoderSource, MiniEncoder, PublishedEncoder


def make(p: MiniEncoder, folder: Path) -> dict[str, Any]:
    """Train the mini encoder and save it; return its metrics."""
    import numpy as np  # not above, like what follows: most recipes read no encoder, and need not wait for torch

    from pipeline.benchmarks.linear import is_right
    from pipeline.core.compute import deterministic_device
    from pipeline.mini import pretrain, world

    compute = deterministic_device()
    count = p.images + p.probe_train + p.probe_test
    pixels, scenes = pretrain.images("encoder", count, "images of the encoder")
    encoder, losses = pretrain.encoder(pixels[: p.images], p, compute)
    parts = [encoder(part.to(compute)).cpu().double().numpy() for part in pixels[p.images :].split(1000)]
    train_x, test_x = np.split(np.concatenate(parts), [p.probe_train])
    train_y, test_y = np.split(scenes[p.images :, 1:], [p.probe_train])
    probe = {
        name: round(100 * float(is_right(train_x, train_y[:, i], test_x, test_y[:, i]).mean()), 3)
        for i, name in enumerate(world.PATTERNS)
    }
    encoder.save(folder)
    return {
        "training_loss": {"first": round(losses[0], 5), "last_50": round(float(np.mean(losses[-50:])), 5)},
        "probe": {"average": round(float(np.mean([*probe.values()])), 3), **probe},
    }


def fetch(section: PublishedEncoder, folder: Path) -> dict[str, Any]:
    """Fetch a published encoder; returns its source."""
    return {"origin": downloads.fetch(section.download, folder)}


def found(folder: Path, section: MiniEncoder | PublishedEncoder, key: str) -> dict[str, Any]:
    """The encoder's architecture and sizes. Raises UserError for one that cannot be loaded, or is none of `key`'s."""
    from pipeline.models.frozen_encoder import FrozenEncoder

    encoder = FrozenEncoder.load(folder)
    if encoder.architecture != section.architecture:
        raise UserError(
            f"the encoder is a {encoder.architecture}, but {key}.architecture is {section.architecture}, by which "
            "stage plan tried the GPU's memory. Correct it in params.yaml."
        )
    return {"parameters": sum(q.numel() for q in encoder.parameters())}


@stage
def main(recipe: str) -> None:
    profile = config.profile()
    planned = Path("data", profile, "planned", f"encoder-{recipe}.json")
    if not planned.is_file():
        raise UserError(
            f"{planned}: no such file. Stage plan writes it for every name in run.recipes: add '{recipe}' there, and "
            "run `dvc repro`."
        )
    outputs = Path("data", profile, "encoder", recipe), Path("metrics", profile, "encoder", f"{recipe}.json")
    with atomic(*outputs) as (folder, metrics_file):
        folder.mkdir()
        if json.loads(planned.read_text(encoding="utf-8")) == NO_ENCODER:
            write_json(folder / "none.json", NO_ENCODER)
            write_json(metrics_file, NO_ENCODER)
            return
        key = f"profiles.{profile}.encoder"
        section: MiniEncoder | PublishedEncoder = config.read(EncoderSource, key)
        metrics = make(section, folder) if isinstance(section, MiniEncoder) else fetch(section, folder)
        write_json(metrics_file, found(folder, section, key) | metrics)


if __name__ == "__main__":
    main()
