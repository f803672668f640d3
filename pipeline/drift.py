"""Stage drift@<backbone>: a control, the tower moved as far as training moved it, but in random directions.

models/<profile>/drift/<backbone>/              the backbone's folder with the moved weights

Each tensor gets Gaussian noise of the norm that its change by training has. What such a tower gains or loses is owed to
the distance alone.
"""

import sys
from pathlib import Path

import torch

from pipeline import params
from pipeline.adapters.backbones import WEIGHTS, Tensors, read_checkpoint, save_like
from pipeline.runtime import generator, stage, whole


def drifted(before: Tensors, after: Tensors, seed: int) -> Tensors:
    """`before` plus noise, tensor by tensor as far away as `after` is; what training left alone stays the same."""
    moved = {}
    for name, tensor in before.items():
        noise = torch.randn(tensor.shape, generator=generator(seed, "drift", name), dtype=torch.float64)
        distance = (after[name].double() - tensor.double()).norm()
        moved[name] = (tensor.double() + noise * (distance / noise.norm())).to(tensor.dtype)
    return moved


@stage
def main() -> None:
    p, name = params.load(), sys.argv[1]
    models = Path("models", p.run.profile)
    original, trained = models / "pretrained" / name, models / "diva" / name
    with whole(models / "drift" / name) as (folder,):
        moved = drifted(read_checkpoint(original / WEIGHTS), read_checkpoint(trained / WEIGHTS), p.seed)
        save_like(original, moved, folder)


if __name__ == "__main__":
    main()
