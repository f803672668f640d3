"""Sets of images in clip-benchmark's wds/ layout, and the table of answers that every scoring of a set gives."""

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pipeline.core.stages import UserError

LABELS = {"classification": "cls", "retrieval": "txt", "probe": "json"}  # a sample's file beside its image
IMAGE_ENDINGS = {"webp", "png", "jpg", "jpeg"}  # endings that clip-benchmark reads as images


def write_split(root: Path, split: str, kind: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write one split as a single shard whose bytes depend on the samples alone: keys, and contents by extension."""
    (root / split).mkdir(parents=True)
    (root / "dataset_type.txt").write_text(kind + "\n", encoding="utf-8")
    (root / split / "nshards.txt").write_text("1\n", encoding="utf-8")
    with tarfile.open(root / split / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, contents in samples:
            for extension, content in sorted(contents.items()):
                member = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid are 0
                member.size, member.mode = len(content), 0o444
                tar.addfile(member, io.BytesIO(content))


def kinds(root: Path) -> dict[str, str]:
    """The sets below `root`/wds and their kind: classification (the default), retrieval or probe.

    Raises UserError for a set of another kind, and if there is no set.
    """
    sets = sorted(path for path in (root / "wds").glob("*") if path.is_dir())
    if not sets:
        raise UserError(
            f"{root} holds no set (a folder wds/<name>/). Run `dvc repro --force pipeline/dvc.yaml:zeroshot_sets`."
        )
    found = {}
    for path in sets:
        file = path / "dataset_type.txt"
        found[path.name] = kind = (
            file.read_text(errors="replace", encoding="utf-8").strip().lower() if file.exists() else "classification"
        )
        if kind not in LABELS:
            raise UserError(f"{file} names the kind '{kind}'; known kinds: {', '.join(LABELS)}. {_without(path.name)}")
    return found


def check(root: Path) -> None:
    """Raises UserError if a set lacks a file that its scoring reads. It does not decode images."""
    for name, kind in kinds(root).items():
        folder = root / "wds" / name
        try:
            classes = _classes(folder) if kind == "classification" else 0
            for split in ("train", "test") if kind == "probe" else ("test",):
                number = (folder / split / "nshards.txt").read_text(encoding="utf-8").strip()
                if not number.isdecimal():
                    raise ValueError(f"{split}/nshards.txt says {number!r}")
                shards = [folder / split / f"{i}.tar" for i in range(int(number))]
                if not sum(_samples(shard, LABELS[kind], classes) for shard in shards):
                    raise ValueError(f"{split}/ holds no image")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} cannot be scored: {error}. {_without(name)}") from error


def _without(name: str) -> str:
    return f"Remove '{name}' from zeroshot_sets.sets in params.yaml, or name another revision of it there."


def _classes(folder: Path) -> int:
    """The number of classes, which have names and templates."""
    names = (folder / "classnames.txt").read_text(encoding="utf-8").splitlines()
    templates = (folder / "zeroshot_classification_templates.txt").read_text(encoding="utf-8").splitlines()
    if not names or not templates:
        raise ValueError("classnames.txt or zeroshot_classification_templates.txt is empty")
    for template in templates:
        if re.search(r"\{(?!c\})", template):
            raise ValueError(f"the template {template!r} has a placeholder other than {{c}}")
    return len(names)


def _samples(tar: Path, label: str, classes: int) -> int:
    """The number of images in a shard. Raises ValueError for an image without a label, or with an unknown class."""
    found: dict[str, set[str]] = {}
    try:
        with tarfile.open(tar) as file:
            for member in file:
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                found.setdefault(f"{folder}/{key}", set()).add(ending.lower())
                if classes and ending == "cls":
                    said = file.extractfile(member).read().decode(errors="replace")  # type: ignore[union-attr]
                    if not said.strip().isdecimal() or int(said) >= classes:
                        raise ValueError(f"{tar.name}: {member.name} says {said!r}, which is none of {classes} classes")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{tar.name} cannot be read ({str(error).splitlines()[0]})") from error
    images = {key for key, endings in found.items() if endings & IMAGE_ENDINGS}
    labelled = {key for key, endings in found.items() if label in endings}
    if images != labelled:
        some = min(images ^ labelled).removeprefix("/")
        raise ValueError(f"{tar.name}: {some} lacks an image ({', '.join(sorted(IMAGE_ENDINGS))}) or its .{label}")
    return len(images)


def answers(measure: str, right: ArrayLike, images: list[int] | None = None) -> pd.DataFrame:
    """A table of answers, one per row: measure, image, right. images: image number of each answer; default: its row."""
    right = np.asarray(right, dtype=bool)
    own = range(len(right)) if images is None else images
    return pd.DataFrame({"measure": measure, "image": np.array(own, np.int32), "right": right})
