"""Images as WebDataset tars: fetched by img2dataset, repacked so that their bytes never change, read back in any order.

A folder of shards holds tars (members KEY.jpg and KEY.txt; a mirror's have KEY.json, too) and `shards.json`:
`{"size": 64, "samples": 12000, "shards": {"00000.tar": 1000, ...}}`, size in pixels of the shorter edge at most, the
rest counts. Tars made here are called NNNNN.tar; their keys ascend, and no two of them share one.
"""

import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow.compute
import pyarrow.parquet
from PIL import Image

from pipeline.runtime import UserError, generator, progress, remove, write_json

INDEX = "shards.json"
REASONS = 20  # how many reasons of failure are told apart; three million URLs fail in thousands of ways
MEND = "Run `dvc repro --force pipeline/dvc.yaml:images`."
OPTIONS = {
    "input_format": "parquet",
    "url_col": "url",
    "caption_col": "caption",
    "save_additional_columns": ["row"],
    "output_format": "webdataset",
    "resize_mode": "keep_ratio",
    "resize_only_if_bigger": True,
    "max_aspect_ratio": 4.0,  # the size bounds the shorter edge only: a banner would become a picture of 15,360 x 512
    "encode_format": "jpg",
    "encode_quality": 95,
    "extract_exif": False,
    "compute_hash": None,
    "timeout": 10,  # seconds that a server may keep us waiting for its next bytes
}


def download(
    links: pyarrow.Table,
    output: Path,
    scratch: Path,
    *,
    size: int,
    shard_size: int,
    min_success: float,
    retries: int,
    processes: int,
    threads: int,
) -> dict[str, Any]:
    """Fetch the images of a table of links (columns `url`, `caption`) into a folder of shards, `output`.

    The shorter edge is at most `size` pixels (nothing is enlarged), a shard holds the images of `shard_size` links.
    `retries` further rounds ask again for the links that failed so far; their images make shards of their own.

    What comes is kept in `scratch`, which the caller removes once `output` is safe: a call with the same links, size
    and shard size goes on from there, one with others starts anew. Where all rounds had been made and too little had
    come, one more is made.

    Returns counts and the success rate: `urls`, `downloaded`, `success_rate`, `failures` (reason -> count, of what
    never came) and, with retries, `rounds`: the `urls` and `downloaded` of each.
    Raises UserError for a run that img2dataset did not finish, and where fewer than the share `min_success` came.
    """
    options = OPTIONS | {"image_size": size, "number_sample_per_shard": shard_size}
    _prepare(scratch, links, options)
    options |= {"processes_count": processes, "thread_count": threads}

    left = links.append_column("row", pyarrow.array(range(links.num_rows)))
    rounds: list[dict[str, int]] = []
    successes: dict[str, int] = {}  # shard -> images
    shards = 0
    while True:
        names = [f"{shards + i:05d}" for i in range(math.ceil(left.num_rows / shard_size))]
        shards += len(names)
        asked = _complete(scratch, len(rounds), left, names, options)
        came, reasons = _checked(scratch, names, left.num_rows)
        rounds.append({"urls": left.num_rows, "downloaded": sum(came.values())})
        successes |= came
        left = _failed(left, scratch, names)
        downloaded = sum(successes.values())
        rate = downloaded / links.num_rows
        enough = rate > 0 and rate >= min_success
        if not left.num_rows or (len(rounds) > retries and (asked or enough)):
            break

    report: dict[str, Any] = {
        "urls": links.num_rows,
        "downloaded": downloaded,
        "success_rate": rate,
        "failures": _most_frequent(reasons),
    }
    if not enough:
        table = "\n".join(f"{count:>10}  {reason}" for reason, count in report["failures"].items())
        raise UserError(
            f"{downloaded} of {links.num_rows} images came ({rate:.1%}), too few for min_success = "
            f"{min_success:.1%}. What went wrong:\n{table}\n"
            "Mend the cause (network? an outdated list?) and run again, or lower min_success in params.yaml."
        )
    output.mkdir(parents=True, exist_ok=True)
    for name in progress(successes, "repacking"):
        _pack(scratch, name, successes[name], output)
    _write_index(output, size, {f"{name}.tar": count for name, count in successes.items()})
    return report | {"rounds": rounds} if retries else report


def _prepare(scratch: Path, links: pyarrow.Table, options: dict[str, Any]) -> None:
    """Keep what is in `scratch` if it came from the same links with the same options; begin anew otherwise."""
    digest = hashlib.sha256(json.dumps(options).encode())
    for column in ("url", "caption"):
        digest.update("\n".join(links[column].to_pylist()).encode())
    mark = scratch / "fingerprint"
    if not mark.is_file() or mark.read_text() != digest.hexdigest():
        remove(scratch)
        for folder in ("lists", "shards"):
            (scratch / folder).mkdir(parents=True)
        mark.write_text(digest.hexdigest())


def _complete(scratch: Path, number: int, links: pyarrow.Table, names: list[str], options: dict[str, Any]) -> bool:
    """Let img2dataset make the shards of a round that are not there. Returns whether there was one to make.

    Then all later rounds are unmade, too.
    """
    lists, shards = scratch / "lists", scratch / "shards"
    # It numbers the shards of all lists in a folder through, and passes over every shard that has its statistics.
    pyarrow.parquet.write_table(links, lists / f"{number:05d}.parquet")
    unfinished = [name for name in names if _statistics(scratch, name) is None]
    if not unfinished:
        return False
    for name in unfinished:
        (shards / f"{name}_stats.json").unlink(missing_ok=True)  # a kill may have left the beginning of one
    for folder, last in ((lists, f"{number:05d}"), (shards, names[-1])):
        for path in folder.iterdir():
            if path.name[:5] > last:  # made for what another end of this round had left; or _tmp
                remove(path)
    _run(options | {"url_list": str(lists), "output_folder": str(shards)}, scratch / "log", int(names[-1]) + 1)
    return True


def _run(options: dict[str, Any], log: Path, total: int) -> None:
    """Run img2dataset in a process of its own, until there are `total` shards or it ends otherwise."""
    process = multiprocessing.get_context("spawn").Process(target=_img2dataset, args=(options, log))
    process.start()
    try:
        for _ in progress(_appearing(process, Path(options["output_folder"])), "shards of images", total):
            pass
    finally:
        _end(process)


def _img2dataset(options: dict[str, Any], log: Path) -> None:
    """Body of the process that runs img2dataset; its workers and all that they print stay within."""
    # A session of its own: Ctrl-C reaches our process alone, for img2dataset's handler would end as if all were done.
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else every worker asks the network for news at import
    os.environ["TMPDIR"] = str(log.parent)  # wandb, which it imports, leaves folders behind in every worker
    import img2dataset

    try:
        img2dataset.download(**options)
    finally:  # its logging process waits for a word that never comes when download() raises
        for child in multiprocessing.active_children():
            child.kill()


def _end_with_parent() -> None:
    """Kill this process's group when its parent is gone, however the parent ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _end(process: BaseProcess) -> None:
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it ended by itself, or Ctrl-C came before it had a group
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _appearing(process: BaseProcess, shards: Path) -> Iterator[Path]:
    """Yield each shard's statistics file as it appears, until the process ends."""
    seen: set[Path] = set()
    running = True
    while running:
        process.join(0.2)
        running = process.is_alive()  # asked before looking, so that the last files are seen
        new = set(shards.glob("*_stats.json")) - seen
        seen |= new
        yield from new


def _statistics(scratch: Path, name: str) -> dict[str, Any] | None:
    """What img2dataset writes when it has finished a shard; None where it has not."""
    try:
        return json.loads((scratch / "shards" / f"{name}_stats.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _checked(scratch: Path, names: list[str], urls: int) -> tuple[dict[str, int], Counter[str]]:
    """What img2dataset's exit status does not tell. Returns how many images each shard has, and why links failed.

    Shards without images are left out. Raises UserError where a shard was not finished, or lacks rows of the round.
    """
    stats = {name: found for name in names if (found := _statistics(scratch, name)) is not None}
    rows = sum(stat["count"] for stat in stats.values())
    if len(stats) < len(names) or rows != urls:
        last = "\n".join((scratch / "log").read_text(errors="replace").splitlines()[-15:])
        raise UserError(
            f"img2dataset did not finish: {len(stats)} of {len(names)} shards and {rows} of {urls} rows in {scratch}. "
            f"The last lines that it printed:\n{last}\nMend what they name, then run again."
        )
    reasons: Counter[str] = Counter()
    for stat in stats.values():
        reasons.update(stat["status_dict"])
    successes = {name: stat["successes"] for name, stat in stats.items() if stat["successes"]}
    del reasons["success"]
    reasons["no reason given"] = urls - sum(successes.values()) - reasons.total()
    return successes, +reasons


def _failed(links: pyarrow.Table, scratch: Path, names: list[str]) -> pyarrow.Table:
    """The links of a round that did not come, those among them that img2dataset lost sight of."""
    tables = [
        pyarrow.parquet.read_table(scratch / "shards" / f"{name}.parquet", columns=["row", "status"]) for name in names
    ]
    outcome = pyarrow.concat_tables(tables)
    came = outcome.filter(pyarrow.compute.equal(outcome["status"], "success"))["row"]
    return links.filter(pyarrow.compute.invert(pyarrow.compute.is_in(links["row"], value_set=came)))


def _most_frequent(reasons: Counter[str]) -> dict[str, int]:
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    failures = dict(ranked[:REASONS])
    if len(ranked) > REASONS:
        failures["other reasons"] = sum(count for _, count in ranked[REASONS:])
    return failures


def _pack(scratch: Path, name: str, expected: int, output: Path) -> None:
    """Repack a shard in its place, since the disk may not hold all of them twice, and name it in `output`, too."""
    tar, packed, target = scratch / "shards" / f"{name}.tar", scratch / "packed.tar", output / f"{name}.tar"
    try:
        found = _repack(tar, packed)
    except tarfile.TarError:
        found = 0
    if found != expected:
        (scratch / "shards" / f"{name}_stats.json").unlink()
        raise UserError(
            f"img2dataset reports {expected} images in {tar}, but it holds {found}. Run again: this shard is made anew."
        )
    packed.replace(tar)
    try:
        target.hardlink_to(tar)
    except OSError:  # a file system without hard links
        shutil.copyfile(tar, target)


def _repack(source: Path, target: Path) -> int:
    """Copy the images and captions of a tar in ascending order, without times or owners. Returns the images' number."""
    with tarfile.open(source) as old, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as new:
        members = sorted((m for m in old if m.name.endswith((".jpg", ".txt"))), key=lambda m: m.name)
        for member in members:
            clean = tarfile.TarInfo(member.name)  # mtime, uid and gid are 0
            clean.size = member.size
            new.addfile(clean, old.extractfile(member))
    return sum(member.name.endswith(".jpg") for member in members)


def index(folder: Path, size: int) -> dict[str, int]:
    """Make a folder of shards out of a folder of tars, by writing its index; the tars stay as they are.

    `size` is what their maker promises. Returns the number of `shards` and of `images`. Raises UserError where there is
    no tar, and for one that cannot be read or has no image with a caption.
    """
    tars = sorted(folder.rglob("*.tar"))
    if not tars:
        raise UserError(f"{folder} has no file *.tar: the download that params.yaml describes is no folder of shards.")
    counts = {}
    for tar in progress(tars, "counting images"):
        counts[tar.relative_to(folder).as_posix()] = count = len(_members(tar))
        if not count:
            raise UserError(f"{tar} has no image with a caption (members KEY.jpg, KEY.txt). Choose another mirror.")
    _write_index(folder, size, counts)
    return {"shards": len(counts), "images": sum(counts.values())}


def _write_index(folder: Path, size: int, counts: dict[str, int]) -> None:
    write_json(folder / INDEX, {"size": size, "samples": sum(counts.values()), "shards": counts})


class _Member(NamedTuple):
    """An image and its caption in a tar, each where it starts and how many bytes it has."""

    key: str
    image: tuple[int, int]
    caption: tuple[int, int]


def _members(tar: Path) -> list[_Member]:
    """A tar's images that have a caption, in the order of the tar. Raises UserError for one that cannot be read."""
    from webdataset.tariterators import base_plus_ext  # imports torch

    try:
        with tarfile.open(tar) as file:
            members = [(*base_plus_ext(member.name), member) for member in file if member.isfile()]
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{tar} cannot be read ({error.__class__.__name__}: {error.args[0]}). {MEND}") from error
    captions = {key: (m.offset_data, m.size) for key, extension, m in members if extension == "txt"}
    return [
        _Member(key, (m.offset_data, m.size), captions[key])
        for key, extension, m in members
        if extension == "jpg" and key in captions
    ]


class Sample(NamedTuple):
    """image: None where it cannot be decoded; after: where its stream goes on, for `Shards.stream(start=...)`."""

    key: str
    image: Image.Image | None
    caption: str
    after: tuple[int, int]


class Shards:
    """The images of a folder of shards; `len()` is their number, those that cannot be decoded included.

    Images are read one by one where they lie, so that memory does not grow with the size of a shard.
    """

    def __init__(self, folder: Path, max_undecodable: float = 0.01, held_out: int = 0) -> None:
        """Bear with a share `max_undecodable` of each shard; keep the last shard's first `held_out` from the streams.

        Raises UserError where the index is missing or wrong, or the last shard has no more than `held_out`.
        """
        self.folder, self.max_undecodable = folder, max_undecodable
        path = folder / INDEX
        if not path.is_file():
            raise UserError(f"{folder} is no folder of shards: it has no {INDEX}. Run `dvc repro`.")
        try:
            index = json.loads(path.read_text())
            self.size: int = index["size"]
            self.counts: dict[str, int] = dict(sorted(index["shards"].items()))
            whole = sum(self.counts.values()) == index["samples"] > 0
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error!r}). {MEND}") from error
        if not whole:
            raise UserError(f"{path} is damaged: its shards do not add up to its number of samples. {MEND}")
        self.names = list(self.counts)
        last = self.names[-1]
        self.reserved = {last: held_out}
        if held_out and self.counts[last] <= held_out:
            raise UserError(
                f"{folder / last} has {self.counts[last]} images, of which {held_out} are to be held out of training: "
                "none would be left. Lower train.held_out.images in params.yaml."
            )

    def __len__(self) -> int:
        return sum(self.counts.values())

    def stream(self, seed: int, number: int = 0, of: int = 1, start: tuple[int, int] | None = None) -> Iterator[Sample]:
        """Samples without end: stream `number` of `of`, which share the shards, a pure function of these and the seed.

        The shards of all epochs, each epoch in an order of its own, make one endless row, of which a stream takes every
        `of`-th: in an epoch no shard is read by two streams. `start` is the `after` of an earlier sample.
        Raises UserError for a shard that is missing, truncated or damaged, or that has too many undecodable images.
        """
        first, image = start or (number, 0)
        for shard in itertools.count(first, of):
            yield from self._shuffled(shard, seed, image)
            image = 0

    def held_out(self) -> list[Image.Image]:
        """The images that are kept from the streams, those that cannot be decoded left out."""
        ((name, count),) = self.reserved.items()
        with (self.folder / name).open("rb") as file:
            found = [self._decode(file, member.image)[0] for member in self._members(name)[:count]]
        return [image for image in found if image]

    def _shuffled(self, shard: int, seed: int, first: int) -> Iterator[Sample]:
        """The images of a shard of the endless row in random order, from the `first` on."""
        epoch, i = divmod(shard, len(self.names))
        name = self.names[_permutation(len(self.names), seed, "order", epoch)[i]]
        members = self._members(name)
        failed = 0
        with (self.folder / name).open("rb") as file:
            for after, j in enumerate(_permutation(len(members), seed, "order", epoch, name)[first:], first + 1):
                if j < self.reserved.get(name, 0):
                    continue
                key = members[j].key
                image, error = self._decode(file, members[j].image)
                if error:
                    failed += 1
                    if failed > self.max_undecodable * len(members):
                        raise UserError(
                            f"{self.folder / name}: {failed} of its {len(members)} images cannot be decoded, more than "
                            f"the share {self.max_undecodable:g} allowed; the last is {key} ({error}). {MEND}"
                        )
                caption = self._read(file, members[j].caption).decode(errors="replace")
                yield Sample(key, image, caption, (shard, after))

    @staticmethod
    def _read(file: BinaryIO, where: tuple[int, int]) -> bytes:
        file.seek(where[0])
        return file.read(where[1])

    @classmethod
    def _decode(cls, file: BinaryIO, where: tuple[int, int]) -> tuple[Image.Image | None, Exception | None]:
        try:
            return Image.open(io.BytesIO(cls._read(file, where))).convert("RGB"), None  # convert() decodes to the end
        except (OSError, SyntaxError, ValueError) as error:
            return None, error

    def _members(self, name: str) -> list[_Member]:
        """One shard's images, in the order of the tar."""
        members = _members(self.folder / name)
        # A tar cut between two members, or in a header, reads like a shorter tar: only the count tells.
        if len(members) != self.counts[name]:
            path = self.folder / name
            raise UserError(f"{path} holds {len(members)} images where {INDEX} says {self.counts[name]}. {MEND}")
        return members


def _permutation(n: int, *purpose: str | int) -> list[int]:
    import torch

    return torch.randperm(n, generator=generator(*purpose)).tolist()
