"""The record of how scores were made, kept beside them: scores made in different ways are not compared."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.core.outputs import write_json


def write(folder: Path, version: int, **of: Any) -> None:
    """Write the record of a scoring: its version, prompts, rules, precision, data, and the sha256 of all of these.

    version: raise it when the code gives other figures for the same record.
    """
    record = {"version": version, **of}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    write_json(folder / "scoring.json", {**record, "sha256": digest})


def content(folder: Path, small: tuple[str, ...]) -> str:
    """A hash of a folder: names and sizes of its files, and the bytes of those whose names end in one of `small`."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        if path.name.endswith(small):
            digest.update(path.read_bytes())
    return digest.hexdigest()
