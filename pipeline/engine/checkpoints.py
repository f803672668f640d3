"""One file that a long computation can go on from: tensors by name and a state that JSON can hold."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipeline.core.outputs import remove


def save(path: Path, tensors: Mapping[str, torch.Tensor], state: Any) -> None:
    """Replace the checkpoint at `path`; the old one stays until the new one is on the disk.

    Raises OSError or SafetensorError if it cannot be written, for instance to a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"state": json.dumps(state)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        remove(partial)


def read_state(path: Path) -> Any | None:
    """The state alone; None if there is no checkpoint or it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["state"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)
