"""Images as WebDataset tars: their index, and reading them in any order.

A folder of shards holds tars (members KEY.jpg and KEY.txt) and `shards.json`:
`{"size": 64, "samples": 12000, "shards": {"00000.tar": 1000, ...}}`, size in pixels of the shorter edge at most, the
rest counts. links.py makes such tars of a list of links. Other people's hold images of other kinds, too, and files of
other kinds; `captioned` says how many of their images have a caption.
Tars that lie elsewhere are named by an index (data/remote.py).
"""

import bz2
import gzip
import itertools
import lzma
import re
import shutil
import tarfile
import threading
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from PIL import Image
from pydantic import Field, ValidationError, model_validator

from pipeline.core.compute import generator
from pipeline.core.config import Count, Section
from pipeline.core.outputs import write_json
from pipeline.core.stages import UserError, progress
from pipeline.data.decoding import UndecodableError, decode, members
from pipeline.data.remote import RemoteShards, ShardFile

INDEX = "shards.json"
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")  # of several with one key, the first
COMPRESSED: dict[bytes, Any] = {  # by the bytes that they begin with
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
PACKERS = "gz|gzip|bz2?|bzip2|xz|lzma|zst|zstd|lz4|br|z"  # endings after .tar; one of another kind is about the tar
WINDOW = 16  # shards whose images are mixed with each other
NAMED = 20  # reasons of failure, or endings, that are counted by name; three million URLs fail in thousands of ways
REMEDY = "Run `dvc repro --force pipeline/dvc.yaml:input@images`."
OTHER_MIRROR = "Choose another mirror, or leave this file out of images.shards in params.yaml."


def index(folder: Path, size: int) -> dict[str, Any]:
    """Make a folder of shards out of a folder of tars, by writing its index; of the tars only compressed ones change.

    `size` is what their maker promises. Returns the number of `shards`, of `images` and of those `captioned`, and of
    the `other_files` in the tars by their endings. Raises UserError where there is no tar, and for one that cannot be
    read or has no image.
    """
    tars = _unpacked(folder)
    if not tars:
        found = Counter(path.suffix for path in folder.rglob("*") if path.is_file())
        raise UserError(
            f"{folder} holds no *.tar file, but {_listed(found)}: what params.yaml names under images.shards is no "
            "folder of shards. Choose another mirror."
        )
    counts, captioned, others = {}, {}, Counter[str]()
    for tar in progress(tars, "counting images"):
        name = tar.relative_to(folder).as_posix()
        counts[name], captioned[name], other = count(tar, OTHER_MIRROR)
        if not counts[name]:
            raise UserError(
                f"{tar} has no image (members KEY.jpg; also {', '.join(IMAGES[1:])}), but {_listed(other)}. "
                f"{OTHER_MIRROR}"
            )
        others += other
    write_index(folder, size, counts, captioned)
    return {
        "shards": len(counts),
        "images": sum(counts.values()),
        "captioned": sum(captioned.values()),
        "other_files": dict(sorted(most_frequent(others, "other endings").items())),
    }


def count(tar: Path, remedy: str) -> tuple[int, int, Counter[str]]:
    """A tar's images, how many of them have a caption, and its other files, as `_members` finds them."""
    images, others = _members(tar, remedy)
    return len(images), sum(member.caption is not None for member in images), others


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(8)) or "nothing at all"


def _unpacked(folder: Path) -> list[Path]:
    """The tars in a folder. Those that are compressed are unpacked first, since images are read where they lie."""
    tars = []
    for path in sorted(folder.rglob("*")):
        stem = re.fullmatch(rf"(?i)(.+)\.(tar(\.({PACKERS}))?|tgz|tbz2?|txz|tzst)", path.name)
        if not stem or not path.is_file():
            continue
        with path.open("rb") as file:
            start = file.read(6)
        unpack = next((unpack for magic, unpack in COMPRESSED.items() if start.startswith(magic)), None)
        tar = path.with_name(f"{stem[1]}.tar")
        if tar != path and tar.exists():
            raise UserError(
                f"{tar} and {path} are the same shard twice. Leave one of them out of images.shards in params.yaml."
            )
        if unpack:
            try:
                unpacked = path.with_name(f".{path.name}.partial")
                with unpack(path) as source, unpacked.open("wb") as target:
                    shutil.copyfileobj(source, target)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise UserError(
                    f"{path} cannot be unpacked ({type(error).__name__}: {error}). {OTHER_MIRROR}"
                ) from error
            path.unlink()
            unpacked.rename(tar)
        elif start.startswith(b"\x28\xb5\x2f\xfd"):
            raise UserError(
                f"{path} is packed by zstd, which Python cannot unpack. Choose a mirror of plain tars, or packed by "
                "gzip, bzip2 or xz."
            )
        elif tar != path:
            path.rename(tar)
        tars.append(tar)
    return sorted(tars)


def most_frequent(counts: Counter[str], others: str) -> dict[str, int]:
    """The most frequent, and under `others` how many the rest are."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    found = dict(ranked[:NAMED])
    if len(ranked) > NAMED:
        found[others] = sum(count for _, count in ranked[NAMED:])
    return found


def write_index(folder: Path, size: int, counts: dict[str, int], captioned: dict[str, int] | None = None) -> None:
    index: dict[str, Any] = {"size": size, "samples": sum(counts.values()), "shards": counts}
    write_json(folder / INDEX, index | ({"captioned": captioned} if captioned else {}))


class _Member(NamedTuple):
    """An image and its caption, if it has one, in a tar: each where it starts and how many bytes it has."""

    key: str
    image: tuple[int, int]
    caption: tuple[int, int] | None


def _members(tar: Path, remedy: str = REMEDY) -> tuple[list[_Member], Counter[str]]:
    """A tar's images in its order, and how many of its files are neither these nor their captions, by their endings.

    A key that occurs several times has as many images, each with the caption in the same place among the key's
    captions; where the numbers differ, no caption is assigned. Raises UserError for a tar that cannot
    be read or is not whole.
    """
    from webdataset.tariterators import base_plus_ext  # imports torch

    try:
        with tarfile.open(tar, "r:") as file:
            listed = [member for member in members(file) if not member.isdir()]
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{tar} cannot be read ({error.__class__.__name__}: {error.args[0]}). {remedy}") from error
    found: dict[str, dict[str, list[tuple[int, int]]]] = {}
    others: Counter[str] = Counter()
    for member in listed:
        key, ending = base_plus_ext(member.name)
        ending = (ending or Path(member.name).suffix.removeprefix(".")).lower()
        ending = ending.encode(errors="backslashreplace").decode()  # of a name in another encoding than UTF-8
        if key and member.isfile() and ending in (*IMAGES, "txt"):
            found.setdefault(key, {}).setdefault(ending, []).append((member.offset_data, member.size))
        else:
            others[f".{ending}" if member.isfile() and ending else "without an ending, or no files"] += 1
    samples = []
    for key, files in found.items():
        captions = files.pop("txt", [])
        kind = next((kind for kind in IMAGES if kind in files), None)
        images = files.pop(kind) if kind else []
        paired = len(images) == len(captions)
        for i, image in enumerate(images):
            samples.append(_Member(f"{key}#{i}" if i else key, image, captions[i] if paired else None))
        others.update({f".{ending}": len(left) for ending, left in files.items()})
        others[".txt"] += 0 if paired else len(captions)
    return sorted(samples, key=lambda member: member.image), +others


class ShardIndex(Section):
    """`shards.json`; of shards that lie elsewhere (data/remote.py) with `at` and `files`."""

    size: Count
    samples: Count
    shards: dict[str, Count]
    captioned: dict[str, Annotated[int, Field(ge=0)]] | None = None
    at: Annotated[str, Field(min_length=1)] | None = None
    files: dict[str, ShardFile] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ShardIndex":
        if sum(self.shards.values()) != self.samples:
            raise ValueError("its shards do not add up to its number of samples")
        if (self.at is None) != (self.files is None):
            raise ValueError("at and files belong together, and one of them is missing")
        for key, stated in (("captioned", self.captioned), ("files", self.files)):
            if stated is not None and (missing := next((name for name in self.shards if name not in stated), None)):
                raise ValueError(f"{key} lacks {missing}")
        for name, captions in (self.captioned or {}).items():
            if captions > (images := self.shards.get(name, captions)):
                raise ValueError(f"{name} has {images} images, but {captions} with a caption")
        return self


def read_index(path: Path, remedy: str = REMEDY) -> ShardIndex:
    """Raises UserError for a file that is no index; it says what is wrong first."""
    try:
        return ShardIndex.model_validate_json(path.read_bytes())
    except ValidationError as error:
        wrong = error.errors()[0]
        where = f"{'.'.join(map(str, wrong['loc']))}: " if wrong["loc"] else ""
        raise UserError(
            f"{path} is damaged: {where}found {repr(wrong['input'])[:80]}. {wrong['msg']}. {remedy}"
        ) from None


@dataclass(frozen=True)
class Window:
    """Some shards of an epoch, whose images are mixed: `order`, and `spare` for those that cannot be decoded."""

    shards: list[str]
    ends: list[int]  # of each shard among the images of all of them
    order: list[int]
    spare: list[int]

    def candidates(self, place: int) -> Iterator[tuple[str, int]]:
        """(shard, number of the image in it) at a place of the order, then each of the spares from this place on."""
        after = (self.spare[(place + i) % len(self.spare)] for i in range(len(self.spare)))
        for image in itertools.chain((self.order[place],), after):
            shard = bisect_right(self.ends, image)
            yield self.shards[shard], image - (self.ends[shard - 1] if shard else 0)


class Sample(NamedTuple):
    """An image, and what its tar calls it. One without a caption has an empty one."""

    key: str
    image: Image.Image
    caption: str
    tar: str


class Shards:
    """The images of a folder of shards; `len()` is how many an epoch has, those that cannot be decoded included.

    Sample n of a seed is a pure function of both. An epoch has its shards in an order of its own, cut into windows of
    WINDOW shards, and in a window all images are in random order: what is read for a while lies in few files. An image
    that cannot be decoded is replaced by the next in another order of the window. Images are read one by one where
    they lie, so that memory does not grow with the size of a shard; several threads may read at once.
    """

    def __init__(
        self, folder: Path, max_undecodable: float = 0.01, validation: int = 0, captioned: bool = False,
        cache_gb: float = 100.0,
    ) -> None:  # fmt: skip
        """Bear with a share `max_undecodable` of each shard; keep the last shard's first `validation` from the order.

        captioned: pass over the images without a caption. Raises UserError where the index is missing or wrong, no
        image is left, or the last shard has no more than `validation`.
        """
        self.folder, self.max_undecodable, self.captioned = folder, max_undecodable, captioned
        path = folder / INDEX
        if not path.is_file():
            raise UserError(f"{folder} is no folder of shards: it has no {INDEX}. Run `dvc repro`.")
        index = read_index(path)
        captions = index.shards if index.captioned is None else index.captioned
        self.size = index.size
        # Images, and how many of them have a caption.
        self.found = {name: (count, captions[name]) for name, count in sorted(index.shards.items())}
        self.counts = {name: both[captioned] for name, both in self.found.items() if both[captioned]}
        self.remote = None
        if index.at is not None and index.files is not None:
            files = {name: index.files[name] for name in self.found}
            self.remote = RemoteShards(path, index.at, files, 1e9 * cache_gb, 2 * WINDOW + 1)
        if not self.counts:
            raise UserError(
                f"{folder}: none of its {len(self.found)} shards has an image with a caption (KEY.jpg, KEY.txt), but "
                "this recipe reads captions. Choose another recipe (run.recipes), or images with captions."
            )
        last = list(self.counts)[-1]
        if validation and self.counts[last] <= validation:
            raise UserError(
                f"{folder / last} has {self.counts[last]} images, of which {validation} are kept for validation: "
                "none would be left. Lower train.validation.images in params.yaml."
            )
        self.reserved = {last: validation}
        self.trained = {name: count - self.reserved.get(name, 0) for name, count in self.counts.items()}
        self.samples = sum(self.trained.values())
        self.undecodable: dict[str, set[str]] = {}  # keys of what was found not to be decodable, by shard
        self.tables, self.reading = dict[str, list[_Member]](), threading.Lock()
        self.window = lru_cache(4)(self._window)
        self.layout = lru_cache(4)(self._layout)

    def __len__(self) -> int:
        return self.samples

    def place(self, seed: int, number: int) -> tuple[Window, int]:
        """Where sample `number` of a seed, counted through all epochs, stands: a window, and a place in its order."""
        epoch, image = divmod(number, len(self))
        _, ends = self.layout(seed, epoch)
        window = bisect_right(ends, image)
        return self.window(seed, epoch, window), image - (ends[window - 1] if window else 0)

    def open(self, window: Window) -> None:
        """Read the tables of a window's shards, which takes a second or two each, before its images are wanted.

        Shards that lie elsewhere are fetched first, several at once.
        """
        if self.remote:
            self.remote.fetch_all(window.shards)
        for name in window.shards:
            self.members(name)

    def read(self, window: Window, place: int) -> Sample:
        """The sample at a place of a window.

        Raises UserError for a shard that is missing, truncated or damaged, or that has too many undecodable images.
        """
        for name, number in window.candidates(place):
            members = self.members(name)
            member = members[number + self.reserved.get(name, 0)]
            try:
                image = self._decode(name, member)
            except UndecodableError as error:
                failed = self.undecodable.setdefault(name, set())
                failed.add(member.key)
                if len(failed) > self.max_undecodable * len(members):
                    raise UserError(
                        f"{self.folder / name}: {len(failed)} of its {len(members)} images cannot be decoded, more "
                        f"than the share {self.max_undecodable:g} allowed; one is {member.key} ({error}). If they came "
                        "like this, raise train.max_undecodable in params.yaml or choose other images; else "
                        f"{self._again(name)}"
                    ) from error
                continue
            where = member.caption
            caption = self._read(name, where).decode(errors="replace") if where else ""
            return Sample(member.key, image, caption, name)
        raise UserError(
            f"{self.folder}: no image of {', '.join(window.shards)} can be decoded. {self._again(*window.shards)}"
        )

    def validation(self) -> list[Image.Image]:
        """The images that are kept from the order, those that cannot be decoded left out."""
        ((name, count),) = self.reserved.items()
        found = []
        for member in self.members(name)[:count]:
            with suppress(UndecodableError):
                found.append(self._decode(name, member))
        return found

    def _layout(self, seed: int, epoch: int) -> tuple[list[str], list[int]]:
        """The shards of an epoch in its order, and where each of its windows ends among its images."""
        shards = list(self.trained)
        names = [shards[i] for i in _permutation(len(shards), seed, "shards", epoch)]
        windows = (names[first : first + WINDOW] for first in range(0, len(names), WINDOW))
        return names, list(itertools.accumulate(sum(self.trained[name] for name in window) for window in windows))

    def _window(self, seed: int, epoch: int, number: int) -> Window:
        names = self.layout(seed, epoch)[0][number * WINDOW : (number + 1) * WINDOW]
        ends = list(itertools.accumulate(self.trained[name] for name in names))
        order, spare = (_permutation(ends[-1], seed, purpose, epoch, number) for purpose in ("images", "spare images"))
        return Window(names, ends, order, spare)

    def _read(self, name: str, where: tuple[int, int]) -> bytes:
        with self.remote.reading(name) if self.remote else (self.folder / name).open("rb") as file:
            file.seek(where[0])
            return file.read(where[1])

    def _decode(self, name: str, member: _Member) -> Image.Image:
        return decode(self._read(name, member.image), upright=True)

    def members(self, name: str) -> list[_Member]:
        """One shard's images, in the order of the tar. Read once, and kept for longer than its window."""
        found = self.tables.get(name)
        if found is None:
            if self.remote:
                self.remote.fetch(name)  # which others need not wait for
            with self.reading:
                found = self.tables[name] = self.tables.get(name) or self._members(name)
                if len(self.tables) > 3 * WINDOW:
                    del self.tables[next(iter(self.tables))]
        return found

    def _members(self, name: str) -> list[_Member]:
        if self.remote:
            with self.remote.reading(name) as file:
                members, _ = _members(Path(file.name), self._again(name))
        else:
            members, _ = _members(self.folder / name)
        captioned = [member for member in members if member.caption]
        # Another shard under this one's name can be whole: only the counts show it.
        if (len(members), len(captioned)) != (wanted := self.found[name]):
            raise UserError(
                f"{self.folder / name} holds {len(members)} images, {len(captioned)} of them with a caption, where "
                f"{INDEX} says {wanted[0]} and {wanted[1]}. {self._again(name)}"
            )
        return captioned if self.captioned else members

    def _again(self, *names: str) -> str:
        """What to do about shards that are damaged."""
        if not self.remote:
            return REMEDY
        files = ", ".join(str(self.remote.path(name)) for name in names)
        return (
            f"Remove {files}: what is missing there is fetched anew. If that does not help, write the "
            "index anew by `python -m pipeline.tools.index`."
        )


def _permutation(n: int, *purpose: str | int) -> list[int]:
    import torch

    return torch.randperm(n, generator=generator(*purpose)).tolist()
