"""Images as WebDataset tars: fetched by img2dataset, repacked so that their bytes never change, read back in any order.

A folder of shards holds `NNNNN.tar` (members KEY.jpg and KEY.txt, keys ascending) and `shards.json`:
`{"size": 64, "samples": 12000, "shards": {"00000.tar": 1000, ...}}`, size in pixels of the shorter edge at most, the
rest counts.
"""

import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet
from PIL import Image

from pipeline.runtime import UserError, generator, progress, remove, write_json

INDEX = "shards.json"
MAX_ASPECT_RATIO = 4.0  # img2dataset bounds the shorter edge only: a banner would become a picture of 15,360 x 512
REASONS = 20  # how many reasons of failure are told apart; three million URLs fail in thousands of ways
MEND = "Run `dvc repro --force images`."


def download(
    pairs: Path, output: Path, *, size: int, shard_size: int, min_success: float, processes: int, threads: int
) -> dict[str, Any]:
    """Fetch the images of a parquet list (columns `url`, `caption`) into a new folder of shards, `output`.

    The shorter edge is at most `size` pixels (nothing is enlarged), a shard holds the images of `shard_size` rows.
    Returns counts and the success rate: `urls`, `downloaded`, `success_rate`, `failures` (reason -> count).
    Raises UserError for an empty list, for a run that img2dataset did not finish, and where fewer than the share
    `min_success` of the images came.
    """
    urls = pyarrow.parquet.read_metadata(pairs).num_rows
    if urls == 0:
        raise UserError(f"{pairs} lists no URL: nothing to fetch. Give a list with at least one row.")
    output.mkdir(parents=True)
    scratch, log = output / "scratch", output / "img2dataset.log"  # in `output`, to go wherever a failed one goes
    options = {
        "url_list": str(pairs), "input_format": "parquet", "url_col": "url", "caption_col": "caption",
        "output_folder": str(scratch), "output_format": "webdataset", "number_sample_per_shard": shard_size,
        "image_size": size, "resize_mode": "keep_ratio", "resize_only_if_bigger": True,
        "max_aspect_ratio": MAX_ASPECT_RATIO, "encode_format": "jpg", "encode_quality": 95,
        "extract_exif": False, "compute_hash": None, "processes_count": processes, "thread_count": threads,
    }  # fmt: skip
    process = multiprocessing.get_context("spawn").Process(target=_img2dataset, args=(options, log))
    process.start()
    try:
        for _ in progress(_finished(process, scratch), "shards of images", math.ceil(urls / shard_size)):
            pass
    finally:
        _end(process)

    report, successes = _checked(scratch, log, urls=urls, shard_size=shard_size, min_success=min_success)
    shards = {}
    for name, expected in successes.items():
        if _repack(scratch / name, output / name) != expected:
            raise UserError(f"img2dataset reports {expected} images in {name} but wrote another number. {MEND}")
        shards[name] = expected
    write_json(output / INDEX, {"size": size, "samples": report["downloaded"], "shards": shards})
    remove(scratch)
    remove(log)
    return report


def _img2dataset(options: dict[str, Any], log: Path) -> None:
    """Body of the process that runs img2dataset; its workers and all that they print stay within."""
    # A session of its own: Ctrl-C reaches our process alone, for img2dataset's handler would end as if all were done.
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else every worker asks the network for news at import
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


def _finished(process: BaseProcess, scratch: Path) -> Iterator[Path]:
    """Yield each shard's statistics file as it appears, until the process ends."""
    seen: set[Path] = set()
    running = True
    while running:
        process.join(0.2)
        running = process.is_alive()  # asked before looking, so that the last files are seen
        new = set(scratch.glob("*_stats.json")) - seen
        seen |= new
        yield from new


def _checked(
    scratch: Path, log: Path, *, urls: int, shard_size: int, min_success: float
) -> tuple[dict[str, Any], dict[str, int]]:
    """What img2dataset's exit status does not tell. Returns the report, and how many images each tar should hold."""
    names = [f"{i:05d}" for i in range(math.ceil(urls / shard_size))]
    found = {name: scratch / f"{name}_stats.json" for name in names if (scratch / f"{name}_stats.json").exists()}
    stats = {name: json.loads(path.read_text()) for name, path in found.items()}
    rows = sum(stat["count"] for stat in stats.values())
    if len(stats) < len(names) or rows != urls or (scratch / "_tmp").exists():
        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise UserError(
            f"img2dataset did not finish: {len(stats)} of {len(names)} shards and {rows} of {urls} rows in {scratch}. "
            f"The last lines that it printed:\n{last}\nMend what they name, then run again."
        )

    successes = {f"{name}.tar": stat["successes"] for name, stat in stats.items() if stat["successes"]}
    downloaded = sum(successes.values())
    reasons: Counter[str] = Counter()
    for stat in stats.values():
        reasons.update(stat["status_dict"])
    del reasons["success"]
    reasons["no reason given"] = urls - downloaded - reasons.total()
    ranked = sorted((item for item in reasons.items() if item[1]), key=lambda item: (-item[1], item[0]))
    failures = dict(ranked[:REASONS])
    if len(ranked) > REASONS:
        failures["other reasons"] = sum(count for _, count in ranked[REASONS:])
    rate = downloaded / urls
    if rate < min_success or downloaded == 0:
        table = "\n".join(f"{count:>10}  {reason}" for reason, count in failures.items())
        raise UserError(
            f"{downloaded} of {urls} images came ({rate:.1%}), fewer than min_success = {min_success:.1%}. "
            f"What went wrong:\n{table}\n"
            "Mend the cause (network? an outdated list?) and run again, or lower images.min_success in params.yaml."
        )
    return {"urls": urls, "downloaded": downloaded, "success_rate": rate, "failures": failures}, successes


def _repack(source: Path, target: Path) -> int:
    """Copy the images and captions of a tar in ascending order, without times or owners. Returns the images' number."""
    with tarfile.open(source) as old, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as new:
        members = sorted((m for m in old if m.name.endswith((".jpg", ".txt"))), key=lambda m: m.name)
        for member in members:
            clean = tarfile.TarInfo(member.name)  # mtime, uid and gid are 0
            clean.size = member.size
            new.addfile(clean, old.extractfile(member))
    return sum(member.name.endswith(".jpg") for member in members)


class Shards:
    """The images of a folder of shards; `len()` is their number, those that cannot be decoded included.

    Keys of images that could not be decoded gather in `undecodable`. Memory: one shard's compressed bytes.
    """

    def __init__(self, folder: Path, max_undecodable: float = 0.01) -> None:
        """Bear with a share `max_undecodable` of each shard. Raises UserError where the index is missing or wrong."""
        self.folder, self.max_undecodable = folder, max_undecodable
        self.undecodable: set[str] = set()
        path = folder / INDEX
        if not path.is_file():
            raise UserError(f"{folder} is no folder of shards: it has no {INDEX}. Run `dvc repro images`.")
        try:
            index = json.loads(path.read_text())
            self.size: int = index["size"]
            self.counts: dict[str, int] = dict(sorted(index["shards"].items()))
            whole = sum(self.counts.values()) == index["samples"] > 0
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error!r}). {MEND}") from error
        if not whole:
            raise UserError(f"{path} is damaged: its shards do not add up to its number of samples. {MEND}")

    def __len__(self) -> int:
        return sum(self.counts.values())

    def stream(self, seed: int) -> Iterator[tuple[str, Image.Image]]:
        """Yield (key, RGB image) without end, epoch after epoch: a pure function of the seed.

        Raises UserError for a shard that is missing, truncated or damaged, or that has too many undecodable images.
        """
        for epoch in itertools.count():
            yield from self.epoch(seed, epoch)

    def epoch(self, seed: int, epoch: int) -> Iterator[tuple[str, Image.Image]]:
        """Every image once: shards in random order, and each shard's images in random order."""
        names = list(self.counts)
        for i in _permutation(len(names), seed, "order", epoch):
            samples = self._read(names[i])
            failed = 0
            for j in _permutation(len(samples), seed, "order", epoch, names[i]):
                key, encoded = samples[j]
                try:
                    image = Image.open(io.BytesIO(encoded)).convert("RGB")  # convert() decodes to the end
                except (OSError, SyntaxError, ValueError) as error:
                    self.undecodable.add(key)
                    failed += 1
                    if failed > self.max_undecodable * len(samples):
                        raise UserError(
                            f"{self.folder / names[i]}: {failed} of its {len(samples)} images cannot be decoded, more "
                            f"than the share {self.max_undecodable:g} allowed; the last is {key} ({error}). {MEND}"
                        ) from error
                    continue
                yield key, image

    def _read(self, name: str) -> list[tuple[str, bytes]]:
        """The (key, JPEG bytes) of one shard, in the order of the tar."""
        from webdataset.tariterators import group_by_keys, tar_file_expander  # imports torch

        path = self.folder / name
        try:
            with path.open("rb") as file:
                samples = list(group_by_keys(tar_file_expander([{"url": name, "stream": file}])))
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error.__class__.__name__}: {error.args[0]}). {MEND}") from error
        # A tar cut between two members, or in a header, reads like a shorter tar: only the count tells.
        pairs = [(sample["__key__"], sample["jpg"]) for sample in samples if "jpg" in sample and "txt" in sample]
        if len(pairs) != self.counts[name]:
            raise UserError(f"{path} holds {len(pairs)} images where {INDEX} says {self.counts[name]}. {MEND}")
        return pairs


def _permutation(n: int, *purpose: str | int) -> list[int]:
    import torch

    return torch.randperm(n, generator=generator(*purpose)).tolist()
