"""Sets of images in clip-benchmark's wds/ layout, and the table of answers that every scoring of a set gives."""

import io
import json
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from PIL import Image

from pipeline.core.stages import UserError
from pipeline.data.decoding import members

LABELS = {"classification": "cls", "retrieval": "txt", "probe": "json"}  # a sample's file beside its image
IMAGE_ENDINGS = ("webp", "png", "jpg", "jpeg")  # that clip-benchmark reads as images; of several, the first
Samples = Iterable[tuple[str, dict[str, bytes]]]  # each sample's key, and its files by their extensions


def write_split(root: Path, split: str, kind: str, samples: Samples) -> None:
    """Write one split as one shard. Its bytes depend on the samples alone: keys, and contents by extension."""
    (root / split).mkdir(parents=True)
    (root / "dataset_type.txt").write_text(kind + "\n", encoding="utf-8")
    (root / split / "nshards.txt").write_text("1\n", encoding="utf-8")
    with tarfile.open(root / split / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, contents in samples:
            for extension, content in sorted(contents.items()):
                member = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid are 0
                member.size, member.mode = len(content), 0o444
                tar.addfile(member, io.BytesIO(content))


def png(pixels_HWC: np.ndarray) -> bytes:
    """An image file of these pixels, uint8, in colour [H, W, 3] or of a mask [H, W]."""
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "png")
    return file.getvalue()


class Stored(NamedTuple):
    """A file in a tar, and where it stands there: offset and length in bytes."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class SetImage(NamedTuple):
    """An image of a set. label: the number of its class; its captions; or the values of its attributes, by name."""

    key: str
    file: Stored
    label: Any

    def read(self) -> bytes:
        return self.file.read()


@dataclass(frozen=True)
class BenchmarkSet:
    """A set and its samples by split: test, and train if a probe is fitted. classes, templates: empty if it has none.

    kind: classification, retrieval or probe.
    """

    name: str
    kind: str
    classes: list[str]
    templates: list[str]
    splits: dict[str, list[SetImage]]


def read(root: Path) -> list[BenchmarkSet]:
    """The sets below `root`/wds by name, with all that their scoring needs. Images are not decoded.

    Raises UserError if there is no set, for a set of another kind, and for one that lacks a file or cannot be read.
    """
    folders = sorted(path for path in (root / "wds").glob("*") if path.is_dir())
    if not folders:
        raise UserError(
            f"{root} holds no set (a folder wds/<name>/). Run `dvc repro --force pipeline/dvc.yaml:zeroshot_sets`."
        )
    return [_read_set(folder) for folder in folders]


def _read_set(folder: Path) -> BenchmarkSet:
    without = f"Remove '{folder.name}' from zeroshot_sets.sets in params.yaml, or name another revision of it there."
    file, kind = folder / "dataset_type.txt", "classification"  # what a set without that file is
    if file.exists():
        kind = file.read_text(errors="replace", encoding="utf-8-sig").strip().lower()
    if kind not in LABELS:
        raise UserError(f"{file} names the kind '{kind}'; known kinds: {', '.join(LABELS)}. {without}")
    try:
        classes, templates = _classes(folder) if kind == "classification" else ([], [])
        splits = {}
        for split in ("train", "test") if kind == "probe" else ("test",):
            number = (folder / split / "nshards.txt").read_text(encoding="utf-8").strip()
            if not number.isdecimal():
                raise ValueError(f"{split}/nshards.txt says {number!r}")
            tars = [folder / split / f"{i}.tar" for i in range(int(number))]
            splits[split] = [sample for tar in tars for sample in _samples(tar, kind, len(classes))]
            if not splits[split]:
                raise ValueError(f"{split}/ holds no image")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be scored: {error}. {without}") from error
    return BenchmarkSet(folder.name, kind, classes, templates, splits)


def _classes(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the classes, and the templates."""
    names, templates = (
        [line.strip() for line in (folder / file).read_text(encoding="utf-8-sig").rstrip().splitlines()]
        for file in ("classnames.txt", "zeroshot_classification_templates.txt")
    )
    if not names or not templates:
        raise ValueError("classnames.txt or zeroshot_classification_templates.txt is empty")
    if "" in names:
        raise ValueError(f"line {names.index('') + 1} of classnames.txt is empty")
    for template in templates:
        if "{c}" not in template or re.search("[{}]", template.replace("{c}", "")):
            raise ValueError(f"the template {template!r} must have {{c}}, and no other brace")
    return names, templates


def _samples(tar: Path, kind: str, classes: int) -> list[SetImage]:
    """A tar's samples in its order. Raises ValueError for one without an image or a label, or with an unknown class."""
    samples = []
    for key, files in contents(tar).items():
        image = next((files[ending] for ending in IMAGE_ENDINGS if ending in files), None)
        label = files.get(LABELS[kind])
        if (image is None) != (label is None):
            raise ValueError(f"{tar.name}: {key} lacks an image ({', '.join(IMAGE_ENDINGS)}) or its .{LABELS[kind]}")
        if image and label:
            samples.append(SetImage(key, image, _label(f"{tar.name}: {key}", kind, label.read(), classes)))
    return samples


def contents(tar: Path) -> dict[str, dict[str, Stored]]:
    """The files of a tar in its order, by their key and ending; files of one key differ in what follows the first dot.

    Raises ValueError for a tar that cannot be read or is not whole, and for a file that it holds twice.
    """
    found: dict[str, dict[str, Stored]] = {}
    try:
        with tarfile.open(tar, "r:") as file:
            for member in members(file):
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                files = found.setdefault(f"{folder}/{key}".removeprefix("/"), {})
                if ending.lower() in files:
                    raise ValueError(f"{tar.name} holds {member.name} twice")
                if member.isfile():
                    files[ending.lower()] = Stored(tar, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{tar.name} cannot be read ({str(error).splitlines()[0]})") from error
    return found


def _label(of: str, kind: str, content: bytes, classes: int) -> Any:
    if kind == "probe":
        return json.loads(content)
    if kind == "retrieval":
        if captions := content.decode("utf-8").splitlines():
            return captions
        raise ValueError(f"{of}.txt holds no caption")
    said = content.decode(errors="replace")
    if not said.strip().isdecimal() or int(said) >= classes:
        raise ValueError(f"{of}.cls says {said!r}, which is none of {classes} classes")
    return int(said)


def answers(measure: str, right: ArrayLike, images: list[int] | None = None) -> pd.DataFrame:
    """A table of answers, one per row: measure, image, right. images: image number of each answer; default: its row."""
    right = np.asarray(right, dtype=bool)
    own = range(len(right)) if images is None else images
    return pd.DataFrame({"measure": measure, "image": np.array(own, np.int32), "right": right})
