"""Outputs that are complete or absent (atomic), with one writer at a time."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from pipeline.core.stages import UserError


@contextmanager
def atomic(*outputs: Path) -> Iterator[tuple[Path, ...]]:
    """Yield temporary paths beside `outputs`; rename them to `outputs` if the block succeeds, remove them if it fails.

    So a path of `outputs` is always complete or absent, even after a kill. Raises UserError if another process is
    writing the first of them.
    """
    partial, old = (tuple(path.with_name(f".{path.name}{which}.partial") for path in outputs) for which in ("", ".old"))
    with _only_writer(outputs[0]):
        for path in (*partial, *old):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(path)
        try:
            yield partial
            for path, final in zip(partial, outputs, strict=True):
                if not path.exists():
                    raise FileNotFoundError(f"{final}: the stage ended without writing this output")
            for path, final, aside in zip(partial, outputs, old, strict=True):
                if final.exists() or final.is_symlink():
                    final.rename(aside)  # removing a folder takes time, in which a kill would leave a part of it
                path.rename(final)
                remove(aside)
        finally:
            for path in partial:
                remove(path)


@contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Hold the lock of an output; the operating system gives it back when the process ends, however it ends."""
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        if not lock_descriptor(file.fileno(), blocking=False):
            file.seek(0)
            raise UserError(
                f"{output} is being written by {file.read().strip() or 'another process'} (lock file {path}). "
                "Wait for it, or stop it, then run again."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}: {' '.join(sys.argv)}")
        file.flush()
        yield


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
