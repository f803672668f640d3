"""The scratch file from which a killed computation goes on: tensors by name and a state that JSON can hold."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.core.outputs import remove


class Scratch:
    """The file of one computation by `processes`, of which the main one writes and reads it. With `minutes` 0 it is due
    after every step, without `path` never."""

    def __init__(
        self, path: Path | None, fingerprint: dict[str, Any], minutes: float, processes: Accelerator | PartialState
    ) -> None:
        """fingerprint: all that the numbers of the computation depend on, as JSON holds it."""
        self.path, self.fingerprint, self.minutes, self.processes = path, fingerprint, minutes, processes
        self.saved = time.monotonic()

    def state(self) -> dict[str, Any] | None:
        """In all processes, what `write` was given beside the tensors. None if there is nothing, or if it is of another
        fingerprint; then it prints what differs."""
        found = read_state(self.path) if self.path and self.processes.is_main_process else None
        if found and (changed := changes(found["fingerprint"], self.fingerprint)):
            differs = f"is of another run, which differs in {', '.join(changed)}"
            print(f"{self.path} {differs}: training starts anew", flush=True)
            found = None
        (state,) = broadcast_object_list([found])
        return state

    def due(self) -> bool:
        """Whether it is time to write; only the main process decides."""
        return self.processes.is_main_process and time.monotonic() - self.saved >= 60 * self.minutes

    def write(self, tensors: Mapping[str, torch.Tensor], **state: Any) -> None:
        """Replace the file. If the disk is full, print a warning and keep the previous one."""
        if self.path and self.processes.is_main_process:
            try:
                save(self.path, tensors, {"fingerprint": self.fingerprint, **state})
            except (OSError, SafetensorError) as error:
                print(f"warning: no checkpoint written to {self.path} ({error}); make room there", file=sys.stderr)
        self.saved = time.monotonic()


def save(path: Path, tensors: Mapping[str, torch.Tensor], state: Any) -> None:
    """Replace the file at `path`; the old one stays until the new one is on the disk.

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
    """The state alone; None if there is no file or it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["state"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def digest_together(files: list[Path]) -> str:
    """sha256 of the sha256 of each file."""
    together = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            together.update(hashlib.file_digest(file, "sha256").digest())
    return together.hexdigest()


def changes(old: Mapping[str, Any], new: Mapping[str, Any], word: str = "now") -> list[str]:
    """What differs, e.g. 'recipe.lr (0.01, now 0.02)'; long values such as hashes are not spelled out."""
    found = []
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += [f"{key}.{inner}" for inner in changes(before, after, word)]
        elif before != after:
            short = max(len(str(before)), len(str(after))) < 40
            found.append(f"{key} ({before}, {word} {after})" if short else key)
    return found
