"""Sets of pictures in clip-benchmark's wds/ layout, and the table of answers that every scoring of a set gives."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pipeline.runtime import UserError


def write_split(root: Path, split: str, kind: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write one split as a single shard whose bytes depend on the samples alone: keys, and contents by extension."""
    (root / split).mkdir(parents=True)
    (root / "dataset_type.txt").write_text(kind + "\n")
    (root / split / "nshards.txt").write_text("1\n")
    with tarfile.open(root / split / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, contents in samples:
            for extension, content in sorted(contents.items()):
                member = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid are 0
                member.size, member.mode = len(content), 0o444
                tar.addfile(member, io.BytesIO(content))


def kinds(root: Path) -> dict[str, str]:
    """The sets below `root`/wds and their kind: classification (where they do not say), retrieval or probe."""
    sets = sorted(path for path in (root / "wds").glob("*") if path.is_dir())
    if not sets:
        raise UserError(f"{root}: no sets (wds/<name>/). Run `dvc repro --force pipeline/dvc.yaml:zeroshot_sets`.")
    files = {path.name: path / "dataset_type.txt" for path in sets}
    return {name: file.read_text().strip() if file.exists() else "classification" for name, file in files.items()}


def answers(measure: str, right: ArrayLike, images: list[int] | None = None) -> pd.DataFrame:
    """A table of answers; images: the number of the image that each is about, by default its own."""
    right = np.asarray(right, dtype=bool)
    own = range(len(right)) if images is None else images
    return pd.DataFrame({"measure": measure, "image": np.array(own, np.int32), "right": right})
