"""The norm-matched random perturbation: a model moved as far as training moved it, in a random direction."""

import math
from pathlib import Path

import torch

from pipeline.core.compute import generator
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
