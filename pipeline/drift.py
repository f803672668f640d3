"""Stage drift@<backbone>: a control, the tower moved as far as training moved it, but in random directions.

models/<profile>/drift/<backbone>/              the backbone's folder with the moved weights

Each tensor gets Gaussian noise of the norm that its change by training has. What such a tower gains or loses is owed to
the distance alone.
"""

import sys
from pathlib import Path

import torch

from pipeline.core import params
from pipeline.core.compute import generator
from pipeline.core.outputs import whole
from pipeline.core.stages import stage
from pipeline.models.backbones import PREFIX, Tensors, fresh_head, save_like, state


def drifted(before: Tensors, after: Tensors, seed: int) -> Tensors:
    """`before` plus noise, tensor by tensor as far away as `after` is; what training left alone stays the same."""
    moved = {}
    for name, tensor in before.items():
        noise = torch.randn(tensor.shape, generator=generator(seed, "drift", name), dtype=torch.float64)
        distance = (after[name].double() - tensor.double()).norm()
        moved[name] = (tensor.double() + noise * (distance / noise.norm())).to(tensor.dtype)
    return moved


def drift(original: Path, trained: Path, seed: int, folder: Path) -> None:
    """Write the drifted model; where a head was trained, it drifts from the fresh one that training started from."""
    before, after = dict(state(original)), state(trained)
    if head := {name.removeprefix(PREFIX): tensor for name, tensor in after.items() if name.startswith(PREFIX)}:
        fresh = fresh_head(len(head["norm_pooled.weight"]), int(head["heads"]), seed).state_dict()
        before |= {PREFIX + name: tensor for name, tensor in fresh.items()}
    save_like(original, drifted(before, after, seed), folder)


@stage
def main() -> None:
    p, name = params.load(), sys.argv[1]
    models = Path("models", p.run.profile)
    with whole(models / "drift" / name) as (folder,):
        drift(models / "pretrained" / name, models / "diva" / name, p.seed, folder)


if __name__ == "__main__":
    main()
