"""Shards on another machine, named by an index: read through fsspec, checked once, kept in a bounded cache.

The index is a `shards.json` (data/shards.py) with two keys more: `at`, the address of the folder that holds the shards
(s3://, gs://, https:// or a local folder), and `files`: name -> `bytes` and `sha256`. All processes of a host share the
cache, data/.shards, whose files are named by their sha256: what is there was checked when it came.
"""

import errno
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import aiohttp
import fsspec
from filelock import lock_descriptor

from pipeline.core.config import Count, Sha256
from pipeline.core.stages import NO_ROOM, UserError

CACHE = Path("data/.shards")
TRIES = 5
WAIT = 1.0  # seconds before the second try; doubles from try to try
PATIENCE = 60.0  # seconds without a byte, and before a rate is judged
SLOWEST = 100e3  # bytes a second; a server that is slower on average is asked anew
CHUNK = 1 << 22
STREAMS = 8  # shards of a window that come at once
HTTP = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class ShardFile:
    """What an index says of a shard."""

    bytes: Count
    sha256: Sha256  # it names a file of the cache


class RemoteShards:
    """The shards of an index. Threads and processes may call `reading` and `fetch` at the same time."""

    def __init__(self, index: Path, at: str, files: dict[str, ShardFile], limit: float, at_once: int) -> None:
        """limit: bytes of the cache. at_once: shards that it must hold. Raises UserError if these do not fit."""
        self.index, self.at, self.files, self.limit = index, at.rstrip("/"), files, limit
        needed = sum(sorted((file.bytes for file in files.values()), reverse=True)[:at_once])
        if needed > limit:
            raise UserError(
                f"launch.cache_gb is {limit / 1e9:g}, but the {at_once} shards of {index} that are in use at once take "
                f"{needed / 1e9:.3g} GB. Raise launch.cache_gb, or make smaller shards."
            )

    def path(self, name: str) -> Path:
        """Where a shard lies in the cache, once it is there."""
        return CACHE / f"{self.files[name].sha256}.tar"

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """An open shard; it is fetched first if it is not in the cache."""
        while True:
            try:
                file = self.fetch(name).open("rb")
            except FileNotFoundError:  # it has just made room for another
                continue
            with file:
                yield file
            return

    def fetch_all(self, names: list[str]) -> None:
        with ThreadPoolExecutor(STREAMS) as pool:
            for path in pool.map(self.fetch, names):
                with suppress(FileNotFoundError):
                    os.utime(path)  # the last to make room

    def fetch(self, name: str) -> Path:
        """The shard's file in the cache. Raises UserError if the bytes that the index describes cannot be fetched."""
        path = self.path(name)
        if path.exists():
            return path
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{CACHE} is no folder, and cannot become one ({_words(error)}). Remove it, or make the folder that it "
                "links to."
            ) from error
        partial = path.with_suffix(".partial")
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT), "r+b") as target:
            _lock(target.fileno(), partial)
            if path.exists():  # another process has fetched it meanwhile
                if os.fstat(target.fileno()).st_size == 0:  # made by this one, after the other's had its name
                    partial.unlink(missing_ok=True)
                return path
            try:
                self._fetch(name, target)
                partial.rename(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        return path

    def _fetch(self, name: str, target: BinaryIO) -> None:
        url, size = f"{self.at}/{name}", self.files[name].bytes
        for number in range(1, TRIES + 1):
            try:
                self._make_room(size, target)
                target.seek(0)
                target.truncate()
                _reserve(target, size)  # a full disk is told before anything is fetched
                self._copy(url, target, self.files[name])
                return
            except FileNotFoundError as error:
                raise self._refused(url, "does not exist", error) from error
            except (ImportError, ValueError) as error:  # no driver for this kind of address
                raise self._refused(url, "cannot be read with the packages installed here", error) from error
            except Exception as error:  # drivers raise a dozen kinds
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise UserError(
                        f"{CACHE}: {error.strerror}, {url} needs {size / 1e9:.3g} GB. Free space there or lower "
                        "launch.cache_gb, then run again."
                    ) from error
                if number == TRIES:
                    raise self._refused(url, f"could not be fetched in {TRIES} tries", error) from error
                print(
                    f"{url}: {_words(error)}. Fetching it again, try {number + 1} of {TRIES}",
                    file=sys.stderr,
                    flush=True,
                )
                time.sleep(WAIT * 2 ** (number - 1))

    def _refused(self, url: str, what: str, error: Exception) -> UserError:
        return UserError(
            f"{url} {what} ({_words(error)}). The index {self.index} names this shard, and no shard is skipped. Put "
            "the shard back, name another index in params.yaml (images.index.file), or run again later."
        )

    def _copy(self, url: str, target: BinaryIO, stated: ShardFile) -> None:
        """Copy a shard. Raises OSError for other bytes than the index states, and for a server that is too slow."""
        found, start, done = hashlib.sha256(), time.monotonic(), 0
        with _open(url, stated.bytes) as source:
            while chunk := source.read(CHUNK):
                target.write(chunk)
                found.update(chunk)
                done += len(chunk)
                if done > stated.bytes:
                    break
                seconds = time.monotonic() - start
                if seconds > PATIENCE and done < SLOWEST * seconds:
                    raise TimeoutError(f"received only {done} of {stated.bytes} bytes in {seconds:.0f} s")
        if done != stated.bytes:
            raise OSError(f"received {done} bytes, but the index says {stated.bytes}")
        if found.hexdigest() != stated.sha256:
            raise OSError(f"its sha256 is {found.hexdigest()}, but the index says {stated.sha256}")
        target.flush()
        os.fsync(target.fileno())

    def _make_room(self, size: int, own: BinaryIO) -> None:
        """Remove what was used longest ago, until `size` bytes more fit."""
        with (CACHE / ".lock").open("ab") as lock:
            _lock(lock.fileno(), CACHE / ".lock")
            there = {}
            for path in CACHE.iterdir():
                with suppress(FileNotFoundError):
                    if path.suffix in (".tar", ".partial") and path.stat().st_ino != os.fstat(own.fileno()).st_ino:
                        there[path] = path.stat()
            total = sum(stat.st_size for stat in there.values())
            for path, stat in sorted(there.items(), key=lambda item: item[1].st_mtime):
                if total + size <= self.limit:
                    return
                if path.suffix == ".tar" or _abandoned(path):
                    path.unlink(missing_ok=True)
                    total -= stat.st_size


def _lock(descriptor: int, path: Path) -> None:
    """Wait for a file's lock. A wait that is longer than a fetch may be silent is told, once."""
    if lock_descriptor(descriptor, blocking=False):
        return
    said = f"{path}: another process has had it for {PATIENCE:.0f} s. Waiting for that (on Linux, `lslocks` names it)"
    long = threading.Timer(PATIENCE, lambda: print(said, file=sys.stderr, flush=True))
    long.daemon = True
    long.start()
    try:
        lock_descriptor(descriptor)
    finally:
        long.cancel()


def _reserve(target: BinaryIO, size: int) -> None:
    """Raises OSError where the disk has no room for `size` bytes."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(target.fileno(), 0, size)
    elif shutil.disk_usage(CACHE).free < size:  # macOS
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _abandoned(partial: Path) -> bool:
    """Whether no process is fetching this file."""
    with suppress(FileNotFoundError), partial.open("rb") as file:
        return lock_descriptor(file.fileno(), blocking=False)
    return False


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _open(url: str, size: int) -> BinaryIO:
    """Raises FileNotFoundError only for a file that is missing."""
    files, path = fsspec.url_to_fs(url, **_options(url))
    # Without a size, fsspec's https asks the server for it, and raises FileNotFoundError if that fails for any reason.
    return files.open(path, "rb", **({"size": size} if url.startswith(HTTP) else {}))


def _options(url: str) -> dict[str, Any]:
    """Timeouts for the driver of this kind of address."""
    if url.startswith(HTTP):
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}, "block_size": 0}
    if url.startswith("s3://"):
        # s3fs asks five times by itself; botocore would multiply that by five, and print nothing meanwhile.
        once = {"total_max_attempts": 1}
        return {"config_kwargs": {"connect_timeout": PATIENCE, "read_timeout": PATIENCE, "retries": once}}
    return {}
