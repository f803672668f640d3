"""Images of a list of links: fetched by img2dataset, repacked so that their bytes never change.

The result is a folder of shards (shards.py): tars called NNNNN.tar, whose keys ascend; no two of them share one.
"""

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.compute
import pyarrow.parquet

from pipeline.core.outputs import remove
from pipeline.core.processes import end_with_parent
from pipeline.core.stages import UserError, progress
from pipeline.data.decoding import members
from pipeline.data.shards import most_frequent, write_index

STUCK = 1800  # seconds without a byte written: longer than any link may take
OPTIONS = {
    "input_format": "parquet",
    "url_col": "url",
    "caption_col": "caption",
    "save_additional_columns": ["row"],
    "output_format": "webdataset",
    "resize_mode": "keep_ratio",
    "resize_only_if_bigger": True,
    "max_aspect_ratio": 4.0,  # the size bounds the shorter edge only: a banner would become an image of 15,360 x 512
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
    distributor: str = "multiprocessing",
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
    options |= {"processes_count": processes, "thread_count": threads, "distributor": distributor}

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
        "failures": most_frequent(reasons, "other reasons"),
    }
    if not enough:
        table = "\n".join(f"{count:>10}  {reason}" for reason, count in report["failures"].items())
        raise UserError(
            f"{downloaded} of {links.num_rows} images came ({rate:.1%}), too few for min_success = "
            f"{min_success:.1%}. What went wrong:\n{table}\n"
            "Fix the cause (network? an outdated list?) and run again, or lower min_success in params.yaml."
        )
    output.mkdir(parents=True, exist_ok=True)
    for name in progress(successes, "repacking"):
        _pack(scratch, name, successes[name], output)
    write_index(output, size, {f"{name}.tar": count for name, count in successes.items()})
    return report | {"rounds": rounds} if retries else report


def _prepare(scratch: Path, links: pyarrow.Table, options: dict[str, Any]) -> None:
    """Keep what is in `scratch` if it came from the same links with the same options; else start anew."""
    digest = hashlib.sha256(json.dumps(options).encode())
    for column in ("url", "caption"):
        digest.update("\n".join(links[column].to_pylist()).encode())
    mark = scratch / "fingerprint"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != digest.hexdigest():
        remove(scratch)
        for folder in ("lists", "shards"):
            (scratch / folder).mkdir(parents=True)
        mark.write_text(digest.hexdigest(), encoding="utf-8")


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
    """Run img2dataset in a process of its own, until there are `total` shards or it ends early."""
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
    end_with_parent(lambda: os.killpg(0, signal.SIGKILL))
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else every worker looks for updates on the network at import
    os.environ.setdefault("RAY_TMPDIR", tempfile.gettempdir())  # its sockets need a short path
    os.environ["TMPDIR"] = str(log.parent)  # wandb, which it imports, leaves folders behind in every worker
    if options["distributor"] == "pyspark":  # img2dataset's own session would use this machine alone
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        importlib.import_module("pyspark.sql").SparkSession.builder.getOrCreate()
    import img2dataset

    try:
        img2dataset.download(**options)
    finally:  # its logging process would wait for ever if download() raises
        for child in multiprocessing.active_children():
            child.kill()


def _end(process: BaseProcess) -> None:
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it ended by itself, or Ctrl-C came before it had a group
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _appearing(process: BaseProcess, shards: Path) -> Iterator[Path]:
    """Yield each shard's statistics file as it appears, until the process ends.

    img2dataset waits for ever for a worker that was killed or stopped. Raises UserError where it has written nothing
    for STUCK seconds.
    """
    seen: set[Path] = set()
    running, written, since = True, set[tuple[str, int]](), time.monotonic()
    while running:
        process.join(0.2)
        if (now := {(path.name, _size(path)) for path in shards.iterdir()}) != written:
            written, since = now, time.monotonic()
        elif time.monotonic() - since > STUCK:
            raise UserError(
                f"img2dataset has written nothing into {shards} for {STUCK:.0f} s: one of its workers was stopped or "
                "killed, perhaps for lack of memory. The images so far are kept there. Run the same command again, "
                f"with fewer images.links.processes or threads if memory was short. Its log is {shards.parent}/log."
            )
        running = process.is_alive()  # asked before looking, so that the last files are seen
        new = set(shards.glob("*_stats.json")) - seen
        seen |= new
        yield from new


def _size(path: Path) -> int:
    """Bytes of a file; 0 where img2dataset has just renamed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _statistics(scratch: Path, name: str) -> dict[str, Any] | None:
    """What img2dataset writes when it has finished a shard; None where it has not."""
    try:
        return json.loads((scratch / "shards" / f"{name}_stats.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _checked(scratch: Path, names: list[str], urls: int) -> tuple[dict[str, int], Counter[str]]:
    """What img2dataset's exit status does not tell. Returns how many images each shard has, and why links failed.

    Shards without images are left out. Raises UserError where a shard was not finished, or lacks rows of the round.
    """
    stats = {name: found for name in names if (found := _statistics(scratch, name)) is not None}
    rows = sum(stat["count"] for stat in stats.values())
    if len(stats) < len(names) or rows != urls:
        last = "\n".join((scratch / "log").read_text(errors="replace", encoding="utf-8").splitlines()[-15:])
        raise UserError(
            f"img2dataset did not finish: {len(stats)} of {len(names)} shards and {rows} of {urls} rows in {scratch}. "
            f"The last lines that it printed:\n{last}\nFix the cause that they name, then run again."
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
    paths = [scratch / "shards" / f"{name}.parquet" for name in names]
    outcome = pyarrow.parquet.read_table(paths, columns=["row", "status"])
    came = outcome.filter(pyarrow.compute.equal(outcome["status"], "success"))["row"]
    return links.filter(pyarrow.compute.invert(pyarrow.compute.is_in(links["row"], value_set=came)))


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
            f"img2dataset reports {expected} images in {tar}, but the file holds {found}. Run again: the shard is made "
            "anew."
        )
    packed.replace(tar)
    try:
        target.hardlink_to(tar)
    except OSError:  # a file system without hard links
        shutil.copyfile(tar, target)


def _repack(source: Path, target: Path) -> int:
    """Copy the images and captions of a tar in ascending order, without times or owners. Returns the images' number.

    Raises tarfile.ReadError for a tar that is not whole.
    """
    with tarfile.open(source) as old, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as new:
        kept = sorted((m for m in members(old) if m.name.endswith((".jpg", ".txt"))), key=lambda m: m.name)
        for member in kept:
            clean = tarfile.TarInfo(member.name)  # mtime, uid and gid are 0
            clean.size = member.size
            new.addfile(clean, old.extractfile(member))
    return sum(member.name.endswith(".jpg") for member in kept)
