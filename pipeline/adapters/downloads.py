"""Files from elsewhere: listed first, fetched with resume, checked before anything opens them.

A download's files are gathered in a folder of scratch below `data/.downloads`, one at a time: under NAME.incomplete
until its bytes were checked, under its name from then on. So a fetch that was stopped, by whatever means, goes on where
it stopped. When all are there, they move to their place.
"""

import fnmatch
import hashlib
import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

from pipeline.params import Download
from pipeline.runtime import UserError, remove

T = TypeVar("T")

SCRATCH = Path("data/.downloads")
TRIES = 5  # in a row without a byte of progress
WAIT = 0.5  # seconds before the second try; doubles from try to try
NAMED = 50  # a record names the files that patterns found one by one up to this many
AS_IT_IS = {"accept-encoding": "identity"}  # a compressed body has another length and cannot be resumed


@dataclass(frozen=True)
class Remote:
    """One file: its path below the output folder, its size in bytes, and what is stated about its content, if anything.

    `sha256` comes from params.yaml, else from the hub, which states it for large files. `blob` is the sha1 that git
    knows the content by, as the hub states it for small files.
    """

    name: str
    url: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Listing:
    """The files of a download, by name, at the address that answered; `revision` is a hub's full commit, else None."""

    address: str
    revision: str | None
    files: tuple[Remote, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(remote.size for remote in self.files)


def locate(download: Download) -> Listing:
    """List the files at the first of the addresses that has all of them; only metadata is asked for.

    Raises UserError with the reason of every address where none has them, or where a hub states another sha256 than
    params.yaml.
    """
    reasons = []
    for address in download.at:
        try:
            if address.startswith("hf://"):
                return _hub(address, download)
            return _folder(address, download)
        except (UserError, httpx2.HTTPError, OSError, ValueError) as error:  # ValueError: an answer that is no hub's
            reasons.append(f"{address}: {_why(error)}")
            if address != download.at[-1]:
                print(f"{reasons[-1]}; trying the next address", file=sys.stderr)
    raise UserError(
        "\n  ".join(["The files could not be located:", *reasons])
        + "\nMend what is named, or give another address under `at` in params.yaml."
    )


def fetch(download: Download, folder: Path) -> dict[str, Any]:
    """Bring the files into `folder`; see `fetch_all`."""
    return fetch_all({folder: download})[folder]


def fetch_all(downloads: dict[Path, Download]) -> dict[Path, dict[str, Any]]:
    """Bring the files into their folders, each checked against the sha256 of params.yaml or else the hub's hashes.

    Returns for each folder where its files came from: `address`, `revision`, `licence`, and `files`: name -> `bytes`,
    `sha256` (as found) and `verified` (by "params", "hub" or "nothing"). Where patterns found more than 50 files,
    `files` is their `count`, `bytes` and the `sha256` of the lines "NAME SHA256\\n" in order of the names.

    Raises UserError for files that cannot be located or fetched, that came with other bytes than stated, and for a
    lack of disk space. Nothing is moved before all is there: files that came well are kept in scratch for the next run.
    """
    gathered = {folder: _gather(download) for folder, download in downloads.items()}
    for folder, (listing, scratch, _) in gathered.items():
        for remote in listing.files:
            target = folder / remote.name
            with _writing(target, remote.size):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(scratch / remote.name, target)
        _clear(scratch)
    return {folder: record for folder, (_, _, record) in gathered.items()}


def _gather(download: Download) -> tuple[Listing, Path, dict[str, Any]]:
    """The listing, the folder of scratch that holds all its files now, and the record of where they came from."""
    listing = locate(download)
    scratch = SCRATCH / hashlib.blake2b(repr(listing).encode(), digest_size=8).hexdigest()
    here = sum(_held(scratch / remote.name) for remote in listing.files)
    origin = f"{listing.address}, commit {listing.revision}" if listing.revision else listing.address
    print(f"fetching {len(listing.files)} files, {_gb(listing.size)}, from {origin}", flush=True)
    print(f"their licence: {download.licence}", flush=True)
    if (free := _free(scratch)) < listing.size - here:
        raise UserError(
            f"{scratch}: {_gb(listing.size - here)} are still to be fetched, but {_gb(free)} are free there. "
            "Make room, then run again."
        )

    # The user's token goes to the hub alone.
    headers = build_hf_headers(headers=AS_IT_IS) if listing.revision else AS_IT_IS
    interval = 0.1 if sys.stderr.isatty() else 10  # as in runtime.progress
    with tqdm(
        desc="fetching", total=listing.size, initial=here, unit="B", unit_scale=True,
        mininterval=interval, maxinterval=interval, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        found = {remote.name: _bring(remote, scratch / remote.name, headers, bar) for remote in listing.files}

    record = {
        "address": listing.address,
        "revision": listing.revision,
        "licence": download.licence,
        "files": _record(download, listing, found),
    }
    return listing, scratch, record


# Listing


def _hub(address: str, download: Download) -> Listing:
    match = re.fullmatch(r"hf://(datasets/)?(.+)@(.+)", address)
    assert match is not None
    api, repo, kind = HfApi(), match[2], "dataset" if match[1] else "model"
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    commit = _ask(api.repo_info, repo, revision=match[3], repo_type=kind, timeout=timeout).sha
    entries = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind)
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    remotes = []
    for name in _chosen(download, there):
        entry, pinned = there[name], download.files.get(name)
        stated = entry.lfs.sha256 if entry.lfs else None
        if pinned and stated and pinned != stated:
            raise UserError(
                f"params.yaml gives {name} the sha256 {pinned}, but the hub states {stated}. Correct the one under "
                "`files`, if it is the hub's file that you want"
            )
        url = hf_hub_url(repo, name, repo_type=kind, revision=commit)
        blob = None if entry.lfs else entry.blob_id  # of a large file git knows a pointer only
        remotes.append(Remote(name, url, entry.size, pinned or stated, blob))
    return Listing(address, commit, tuple(remotes))


def _chosen(download: Download, there: Iterable[str]) -> list[str]:
    """Sorted names of a hub's files that are asked for. Raises UserError for a name or a pattern that none fits."""
    wanted = {name: {name} & set(there) for name in download.files}
    wanted |= {pattern: {name for name in there if fnmatch.fnmatchcase(name, pattern)} for pattern in download.match}
    for what, names in wanted.items():
        if not names:
            some = ", ".join(sorted(there)[:5]) or "no file at all"
            raise UserError(f"found nothing named {what} there; there are for instance {some}")
    chosen = sorted(set().union(*wanted.values()))
    for name in chosen:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"the hub lists '{name}', which would be written outside its folder")
    return chosen


def _folder(address: str, download: Download) -> Listing:
    remotes = []
    for name, pinned in sorted(download.files.items()):
        url = f"{address.rstrip('/')}/{quote(name)}"
        length = _ask(_head, url).headers.get("content-length")
        if length is None:
            raise UserError(f"{url} does not state its size")
        remotes.append(Remote(name, url, int(length), pinned, None))
    return Listing(address, None, tuple(remotes))


def _head(url: str) -> httpx2.Response:
    response = get_session().head(url, headers=AS_IT_IS, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    hf_raise_for_status(response)
    return response


# Asking again


def _ask(question: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    for tries in itertools.count(1):
        try:
            return question(*args, **kwargs)
        except httpx2.HTTPError as error:
            if not _try_again(error, tries):
                raise
    raise AssertionError("unreachable")


def _try_again(error: httpx2.HTTPError, tries: int) -> bool:
    """Whether this failure, after so many tries in a row, may pass with another one; waits before it says yes."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if tries >= TRIES or not (isinstance(error, httpx2.TransportError) or (status and status >= 500)):
        return False
    time.sleep(WAIT * 2 ** max(tries - 1, 0))
    return True


def _why(error: Exception) -> str:
    """An error in one line, and what it means."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, HfHubHTTPError):
        return f"{type(error).__name__}: {error}"
    status, url = error.response.status_code, error.response.url.copy_with(query=None)  # a query may be a signature
    if status in (401, 403):
        return (
            f"HTTP {status} for {url}: the repository asks for consent or a token. On a hub, accept its terms on its "
            "page and set HF_TOKEN; a repository that does not exist is refused in the same way"
        )
    said = " ".join((error.server_message or error.response.reason_phrase).split())[:200]
    return f"HTTP {status} for {url}: {said}"


# Fetching


def _incomplete(path: Path) -> Path:
    return path.with_name(f"{path.name}.incomplete")


def _held(path: Path) -> int:
    """Bytes of a file of scratch that are there already, be it whole or not."""
    return next((p.stat().st_size for p in (path, _incomplete(path)) if p.exists()), 0)


def _bring(remote: Remote, path: Path, headers: dict[str, str], bar: tqdm) -> str:
    """Fetch and check a file of scratch, unless it is there already. Returns its sha256."""
    if not path.exists():
        partial = _incomplete(path)
        with _writing(partial, remote.size):
            partial.parent.mkdir(parents=True, exist_ok=True)
            _get(remote, partial, headers, bar)
            _check(remote, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # else a power cut could leave the name without the bytes
            partial.rename(path)
    return remote.sha256 or _digest(path, hashlib.sha256())


def _get(remote: Remote, partial: Path, headers: dict[str, str], bar: tqdm) -> None:
    """Append to `partial` until it is as long as stated. Raises UserError where that cannot be had; what came stays."""
    partial.touch()
    tries, best = 0, partial.stat().st_size
    while (done := partial.stat().st_size) < remote.size:
        tries += 1
        try:
            # No retries of its own, at least until the first bytes came: it waits long and knows some failures only.
            with partial.open("ab") as file:
                http_get(remote.url, file, resume_size=done, headers=headers, _tqdm_bar=bar, _nb_retries=0)
            if (done := partial.stat().st_size) < remote.size:
                os.truncate(partial, 0)  # a body that is whole and too short is another one, some proxy's page maybe
                bar.update(-done)
                raise httpx2.RemoteProtocolError(f"the body has {done} bytes where {remote.size} were stated")
        except httpx2.HTTPError as error:
            done = partial.stat().st_size
            if done > best:  # a bad line that still brings bytes is borne with
                tries, best = 0, done
            if not _try_again(error, tries):
                raise UserError(
                    f"{remote.name} could not be fetched: {_why(error)}. {done} of its {remote.size} bytes are kept in "
                    f"{partial}; run again to go on from there, or give another address under `at` in params.yaml."
                ) from error


def _check(remote: Remote, path: Path) -> None:
    """Compare with all that is stated. Raises UserError where the bytes are others; the file is removed then."""
    size = path.stat().st_size
    facts = [("size", str(remote.size), str(size))]
    if remote.sha256:
        facts.append(("sha256", remote.sha256, _digest(path, hashlib.sha256())))
    elif remote.blob:
        begun = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        facts.append(("git blob id", remote.blob, _digest(path, begun)))
    for fact, expected, found in facts:
        if found != expected:
            _clear(path)
            raise UserError(
                f"{remote.url} came with other bytes than stated: expected {fact} {expected}, found {found}. They were "
                f"removed from {path}. Run again; if that does not help, correct the sha256 under `files` in "
                "params.yaml or give another address under `at`."
            )


def _digest(path: Path, begun: "hashlib._Hash") -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: begun).hexdigest()


# The disk


@contextmanager
def _writing(path: Path, size: int) -> Iterator[None]:
    """Turn a failure to write `path`, of `size` bytes in the end, into a UserError; nothing unfinished stays there."""
    try:
        yield
    except OSError as error:
        free = _free(path.parent)
        _clear(path)
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. It takes {_gb(size)}; {_gb(free)} were free there. "
            "Make room or mend what is named, then run again: files that are whole are kept."
        ) from error


def _clear(path: Path) -> None:
    """Remove a file or a folder, and the folders above it as far as they are empty."""
    remove(path)
    with suppress(OSError):
        os.removedirs(path.parent)


def _free(path: Path) -> int:
    """Free bytes where `path` is or would be."""
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f} GB"


# The record


def _record(download: Download, listing: Listing, found: dict[str, str]) -> dict[str, Any]:
    """`files` of the record; says on stderr what nothing vouches for."""
    files = {}
    for remote in listing.files:
        sha256 = found[remote.name]
        verified = "params" if download.files.get(remote.name) else "hub" if remote.sha256 or remote.blob else "nothing"
        files[remote.name] = {"bytes": remote.size, "sha256": sha256, "verified": verified}
        if verified == "nothing":
            print(
                f"{remote.url}: unverified, for nothing states what its bytes should be. To pin those that came, write "
                f"under `files` in params.yaml: {remote.name}: {sha256}",
                file=sys.stderr,
            )
    if download.match and len(files) > NAMED:
        lines = "".join(f"{name} {sha256}\n" for name, sha256 in sorted(found.items()))
        return {"count": len(files), "bytes": listing.size, "sha256": hashlib.sha256(lines.encode()).hexdigest()}
    return files
