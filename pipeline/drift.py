"""Stage control@<backbone>-<recipe>-drift: the norm-matched random perturbation, a control.

models/<profile>/<recipe>-drift/<backbone>/                         the backbone's folder with the moved weights
metrics/<profile>/train/<backbone>-<recipe>-drift/metrics.json      how far they were moved: the norm of the change

Each tensor gets Gaussian noise with the norm of its change in training. What this tower gains or loses is attributable
to the size of the change alone.
"""

import math
from pathlib import Path

import torch

from pipeline.core import config
from pipeline.core.compute import generator
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import stage
from pipeline.models.backbones import PREFIX, Tensors, fresh_head, save_like, stored_tensors


def drifted(before: Tensors, after: Tensors, seed: int) -> Tensors:
    """`before` plus noise, tensor by tensor as far away as `after` is; what training left alone stays the same."""
    moved = {}
    for name, tensor in before.items():
        noise = torch.randn(tensor.shape, generator=generator(seed, "drift", name), dtype=torch.float64)
        distance = (after[name].double() - tensor.double()).norm()
        moved[name] = (tensor.double() + noise * (distance / noise.norm())).to(tensor.dtype)
    return moved


def drift(original: Path, trained: Path, seed: int, folder: Path) -> float:
    """Write the drifted model; returns the norm of its change.

    Where a head was trained, it drifts from the fresh one that training started from.
    """
    before, after = dict(stored_tensors(original)), stored_tensors(trained)
    if head := {name.removeprefix(PREFIX): tensor for name, tensor in after.items() if name.startswith(PREFIX)}:
        fresh = fresh_head(len(head["norm_pooled.weight"]), int(head["heads"]), seed).state_dict()
        before |= {PREFIX + name: tensor for name, tensor in fresh.items()}
    moved = drifted(before, after, seed)
    save_like(original, moved, folder)
    return math.sqrt(sum((moved[name].double() - before[name].double()).square().sum().item() for name in before))


@stage
def main(backbone: str, recipe: str) -> None:
    profile = config.profile()
    seed: int = config.read(config.Seed, "seed")
    models, weights = Path("models", profile), f"{recipe}-drift"
    outputs = models / weights / backbone, Path("metrics", profile, "train", f"{backbone}-{weights}")
    with atomic(*outputs) as (folder, metrics):
        distance = drift(models / "pretrained" / backbone, models / recipe / backbone, seed, folder)
        metrics.mkdir()
        write_json(metrics / "metrics.json", {"seed": seed, "norm_of_change": round(distance, 5)})


if __name__ == "__main__":
    main()
