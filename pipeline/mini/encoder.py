"""The mini encoder: a frozen image encoder that sees details, made of images alone."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.benchmarks.linear import is_right
from pipeline.core.compute import deterministic_device
from pipeline.mini import pretrain, world
from pipeline.sections.encoder import MiniEncoder


def make(p: MiniEncoder, folder: Path) -> dict[str, Any]:
    """Train the mini encoder and save it; return its metrics."""
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
