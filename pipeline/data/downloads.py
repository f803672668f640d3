"""Files from elsewhere: listed first, fetched with resume, checked before anything opens them.

A download's files are gathered in a folder of scratch below `data/.downloads`, eight at a time: each under
NAME.incomplete until its bytes were checked, under its name from then on. So a fetch that was stopped, by whatever
means, goes on where it stopped. When all are there, they move to their place.

huggingface_hub lists a repository's files (`HfApi`) and fetches a part of a file (`http_get`). Its `snapshot_download`
was tried: plain https servers need the code below all the same, and of a hub's files it asks twice for each (hubs count
the questions), gives up at the first 500, 408 or reset connection, names a file before its bytes are checked, and
leaves metadata beside it. A dry run states no hash; `verify_repo_checksums` lists anew and knows no pins.
"""

import fnmatch
import hashlib
import itertools
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, set_client_factory
from huggingface_hub.utils._http import hf_request_event_hook
from tqdm import tqdm

from pipeline.core.outputs import remove
from pipeline.core.stages import UserError, progress
from pipeline.sections.checkpoint import LocalFiles
from pipeline.sections.download import Download

T = TypeVar("T")

SCRATCH = Path("data/.downloads")
AT_ONCE = 8  # files
TRIES = 5  # in a row without a byte of progress
WAIT = 0.5  # seconds before the second try; doubles from try to try
PATIENCE = 900  # seconds that one question waits in all for a server that is busy; hubs count in windows of 300
NAMED = 50  # a record names the files that patterns found one by one up to this many
TOO_MANY = 429
AS_IT_IS = {"accept-encoding": "identity"}  # a compressed body has another length and cannot be resumed
SETTINGS = (  # what the client reads by itself
    *("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR"),
)


_FOLDERS = threading.Lock()  # while folders of scratch are made or removed


class FinalError(UserError):
    """A failure that no other address would fix."""


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
        return sum(remote.size for remote in self.files)


def locate(download: Download) -> Listing:
    """List the files at the first of the addresses that has all of them; only metadata is asked for.

    Raises UserError with the reason of every address where none has them, or where a hub states another sha256 than
    params.yaml; FinalError for an address that is too busy, and for settings of this machine that cannot be used.
    """
    reasons = []
    for address in download.at:
        try:
            if address.startswith("hf://"):
                return _hub(address, download)
            return _folder(address, download)
        except FinalError:
            raise
        # ValueError: an answer that is no hub's
        except (UserError, httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            reasons.append(f"{address}: {_why(error)}")
            if address != download.at[-1]:
                print(f"{reasons[-1]}; trying the next address", file=sys.stderr)
    raise UserError(
        "\n  ".join(["The files could not be located:", *reasons])
        + "\nFix the causes above, or give another address under `at` in params.yaml."
    )


def fetch(download: Download, folder: Path, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    """Fetch the files into `folder`; see `fetch_all`."""
    return fetch_all({folder: download}, recorded={folder: recorded})[folder]


def found_here(local: LocalFiles) -> dict[str, Any]:
    """The record of a checkpoint that lies here: `path`, `origin`, `licence`, `bytes`, `sha256` as found.

    Raises UserError where there is none, and where params.yaml has another hash.
    """
    path = Path(local.path)
    if not os.path.exists(path):  # noqa: PTH110 - of too long a name Path raises an error
        raise UserError(
            f"{path}: no such file or folder. It is not fetched by itself: get it from {local.origin} (licence: "
            f"{local.licence}), put it there, or give another path in params.yaml."
        )
    files = sorted(each for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file())
    if not files:  # a pipe would never end
        what = "no file in this folder" if path.is_dir() else "neither a file nor a folder"
        raise UserError(f"{path}: {what}. Get it from {local.origin}, or give another path in params.yaml.")
    hashes = {str(each.relative_to(path)): digest(each) for each in files}
    lines = "".join(f"{name} {found}\n" for name, found in hashes.items())
    listed = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()  # a name's bytes, UTF-8 or not
    found = listed if path.is_dir() else next(iter(hashes.values()))
    if local.sha256 and found != local.sha256:
        raise UserError(f"{path}: other bytes than params.yaml states: expected sha256 {local.sha256}, found {found}.")
    size = sum(each.stat().st_size for each in files)
    return {"path": str(path), "origin": local.origin, "licence": local.licence, "bytes": size, "sha256": found}


def digest(path: Path, begun: "Callable[[], hashlib._Hash]" = hashlib.sha256) -> str:
    """Of a file's bytes, in hexadecimal digits; begun: makes the hash that they are added to."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, begun).hexdigest()


def fetch_all(
    downloads: dict[Path, Download],
    earlier: dict[Path, Path] | None = None,
    recorded: dict[Path, dict[str, Any] | None] | None = None,
) -> dict[Path, dict[str, Any]]:
    """Fetch the files into their folders, each checked against the sha256 of params.yaml or else the hub's hashes.

    earlier: by folder, where an earlier fetch left its files: those that have the stated bytes are not fetched again.
    recorded: by folder, what an earlier fetch returned: an address that is no commit must have the same bytes still.

    Returns for each folder where its files came from: `address`, `revision`, `licence`, and `files`: name -> `bytes`,
    `sha256` (as found) and `verified` (by "params", "hub" or "nothing"). Where patterns found more than 50 files,
    `files` is their `count`, `bytes` and the `sha256` of the lines "NAME SHA256\\n" in order of the names.

    Raises UserError for files that cannot be located or fetched, that came with other bytes than stated or recorded,
    and for a lack of disk space. Nothing is moved before all is there: files that came well are kept in scratch for the
    next run.
    """
    gathered = {folder: _gather(download, (earlier or {}).get(folder)) for folder, download in downloads.items()}
    for folder, (_, _, record) in gathered.items():
        _as_recorded(record, (recorded or {}).get(folder))
    wanting = Counter(scratch for _, scratch, _ in gathered.values())  # the same files may be for several folders
    for folder, (listing, scratch, _) in gathered.items():
        wanting[scratch] -= 1
        for remote in listing.files:
            target = folder / remote.name
            with _writing(target, remote.size):
                target.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copyfile if wanting[scratch] else shutil.move)(scratch / remote.name, target)
        if not wanting[scratch]:
            _clear(scratch)
    return {folder: record for folder, (_, _, record) in gathered.items()}


def _gather(download: Download, earlier: Path | None = None) -> tuple[Listing, Path, dict[str, Any]]:
    """The listing, the folder of scratch that holds all its files now, and the record of where they came from."""
    listing = locate(download)
    scratch = SCRATCH / hashlib.blake2b(repr(listing).encode(), digest_size=8).hexdigest()
    if earlier:
        for remote in listing.files:
            _reuse(remote, earlier / remote.name, scratch / remote.name)
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
    with progress(None, "fetching", listing.size, initial=here, unit="B", unit_scale=True) as bar:
        found = _fetch_files(listing, scratch, headers, bar)

    record = {
        "address": listing.address,
        "revision": listing.revision,
        "licence": download.licence,
        "files": _record(download, listing, found),
    }
    return listing, scratch, record


def _reuse(remote: Remote, file: Path, path: Path) -> None:
    """Link a file of an earlier fetch into scratch if it is the one that is stated by its hash."""
    if path.exists() or not file.is_file() or file.stat().st_size != remote.size or not (remote.sha256 or remote.blob):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.hardlink_to(file.resolve())
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, path)
    if _difference(remote, path):
        path.unlink()


# Listing


def _hub(address: str, download: Download) -> Listing:
    match = re.fullmatch(r"hf://(datasets/)?(.+)@(.+)", address)
    assert match is not None
    api, repo, kind = HfApi(), match[2], "dataset" if match[1] else "model"
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    commit = _ask(api.repo_info, repo, revision=match[3], repo_type=kind, timeout=timeout).sha
    entries = _ask(lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind)))
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    remotes = []
    for name, path in _chosen(download, there).items():
        entry, pinned = there[path], download.files.get(name)
        stated = entry.lfs.sha256 if entry.lfs else None
        if pinned and stated and pinned != stated:
            raise UserError(
                f"params.yaml gives {name} the sha256 {pinned}, but the hub states {stated}. If you want the hub's "
                "file, correct the sha256 under `files`"
            )
        url = hf_hub_url(repo, path, repo_type=kind, revision=commit)
        blob = None if entry.lfs else entry.blob_id  # of a large file git knows a pointer only
        remotes.append(Remote(name, url, entry.size, pinned or stated, blob))
    return Listing(address, commit, tuple(remotes))


def _chosen(download: Download, there: dict[str, RepoFile]) -> dict[str, str]:
    """The files that are asked for, in order of their names, and what the hub calls them.

    A mirror may name a file differently if its sha256 is given. Raises UserError for a name or pattern without a file.
    """
    by_hash = {entry.lfs.sha256: path for path, entry in there.items() if entry.lfs}
    chosen: dict[str, str] = {}
    for what, pinned in {**download.files, **dict.fromkeys(download.match)}.items():
        fitting = [path for path in there if path == what or (download.match and fnmatch.fnmatchcase(path, what))]
        found = {path: path for path in fitting} or ({what: by_hash[pinned]} if pinned in by_hash else {})
        if not found:
            some = ", ".join(sorted(there)[:5]) or "no file at all"
            raise UserError(f"found no file {what} there; it has for instance {some}")
        chosen |= found
    for name in chosen:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"the hub lists '{name}', which would be written outside its folder")
    return dict(sorted(chosen.items()))


def _folder(address: str, download: Download) -> Listing:
    remotes = []
    for name, pinned in sorted(download.files.items()):
        own = pinned and len(download.files) == 1 and PurePosixPath(address).suffix == PurePosixPath(name).suffix
        url = address if own else f"{address.rstrip('/')}/{quote(name)}"
        length = _ask(_head, url).headers.get("content-length")
        if length is None or (length == "0" and not pinned):  # some servers say 0 for want of a size
            raise UserError(f"{url} does not state its size")
        remotes.append(Remote(name, url, int(length), pinned, None))
    return Listing(address, None, tuple(remotes))


def _head(url: str) -> httpx2.Response:
    return get_session().head(url, headers=AS_IT_IS, timeout=constants.HF_HUB_ETAG_TIMEOUT)


# Asking, and asking again


class _Client(httpx2.Client):
    """Asks again where a server says that it is busy; for any other refusal raises an error, which has its words.

    Whatever is asked here may be asked twice.
    """

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        waited = 0.0
        for tries in itertools.count():
            response = super().send(request, **options)
            if response.status_code < 400:
                return response
            response.read()
            wait = _wait(response, tries)
            refused = f"HTTP {response.status_code} for {_url(response)}: {_words(response)}"
            if wait is not None and waited + wait <= PATIENCE:
                print(f"{refused}; asking again in {wait:.0f} s", file=sys.stderr, flush=True)
                time.sleep(wait)
                waited += wait
            elif response.status_code == TOO_MANY:
                raise FinalError(
                    f"{refused}. The server is busy and wants the next request in {wait:.0f} s; this run has waited "
                    f"{waited:.0f} s and waits {PATIENCE} s at most. It exists, so no other address is tried. "
                    "Run again later: the files so far are kept. A hub answers more often if HF_TOKEN is set."
                )
            else:
                raise httpx2.HTTPStatusError(_words(response), request=request, response=response)
        raise AssertionError("unreachable")


def _client() -> httpx2.Client:
    """Raises FinalError where the settings of this machine do not make a client."""
    try:
        return _Client(event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True, timeout=None)
    except (ImportError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise FinalError(
            f"nothing can be fetched with these settings: {_settings()} ({type(error).__name__}: {error}). A proxy is "
            "written http://host:port; socks5:// needs `pip install socksio`. SSL_CERT_FILE is a file of "
            "certificates, SSL_CERT_DIR a folder of them. Correct or unset them."
        ) from error


set_client_factory(_client)  # of all that huggingface_hub asks, too


def _settings() -> str:
    """Those that are set, without passwords."""
    given = {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}
    return ", ".join(f"{name}={re.sub('//[^/]*@', '//…@', value)}" for name, value in given.items())


def _wait(response: httpx2.Response, tries: int) -> float | None:
    """Seconds until a server that refused may be asked again; None where it does not say that it would answer then."""
    status, headers, asked = response.status_code, response.headers, None
    later = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", later, re.ASCII):
        asked = float(later)
    elif later:
        with suppress(ValueError, TypeError):  # by the server's own clock, if it sends its time
            now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
            asked = (parsedate_to_datetime(later) - now).total_seconds()
    if asked is None and status == TOO_MANY:  # RateLimit: "api";r=0;t=55, of which r is what remains until t
        limits = [dict(re.findall(r"\b([rt])=(\d+)", limit)) for limit in headers.get("ratelimit", "").split(",")]
        asked = max((float(limit["t"]) for limit in limits if limit.get("r") == "0" and "t" in limit), default=0.0)
    if asked is None or not (status in (408, 425, TOO_MANY) or status >= 500):
        return None
    return max(asked, WAIT * 2**tries)


def _ask(question: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    for tries in itertools.count(1):
        try:
            return question(*args, **kwargs)
        except httpx2.HTTPError as error:
            if not _try_again(error, tries):
                raise
    raise AssertionError("unreachable")


def _try_again(error: Exception, tries: int) -> bool:
    """Whether this failure, after so many tries in a row, may pass with another one; waits before it says yes."""
    status = error.response.status_code if isinstance(error, httpx2.HTTPStatusError) else None
    passes = isinstance(error, httpx2.TransportError) or (status and (status >= 500 or status in (408, 425)))
    if tries >= TRIES or not passes:
        return False
    time.sleep(WAIT * 2 ** max(tries - 1, 0))
    return True


def _url(response: httpx2.Response) -> httpx2.URL:
    return response.url.copy_with(query=None)  # a query may be a signature


def _words(response: httpx2.Response) -> str:
    """What the server says, in one line: a hub's message, else the body, else the name of the status."""
    said = response.headers.get("x-error-message")
    with suppress(ValueError, AttributeError):  # no JSON, or no object
        said = said or response.json().get("error") or response.json().get("message")
    said = said or re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", response.text)
    return " ".join(str(said).split())[:300] or response.reason_phrase


def _why(error: Exception) -> str:
    """An error in one line, and what it means."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, httpx2.HTTPStatusError):
        said = f"HTTP {error.response.status_code} for {_url(error.response)}: {error}"
        if error.response.status_code in (401, 403):
            said += (
                ". The repository asks for consent or a token: on a hub, accept its terms on its page and set "
                "HF_TOKEN; a repository that does not exist is refused in the same way"
            )
        return said
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, httpx2.TransportError) and _settings():
        said += f" (with {_settings()})"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        said += (
            ". If a proxy of yours signs what passes, SSL_CERT_FILE must name its certificate: no other setting is read"
        )
    return said


# Fetching


def _incomplete(path: Path) -> Path:
    return path.with_name(f"{path.name}.incomplete")


def _held(path: Path) -> int:
    """Bytes of a file of scratch that are there already, complete or not."""
    return next((p.stat().st_size for p in (path, _incomplete(path)) if p.exists()), 0)


def _fetch_files(listing: Listing, scratch: Path, headers: dict[str, str], bar: tqdm) -> dict[str, str]:
    """Fetch and check all files of scratch; returns their sha256 by name.

    If one fails, those under way are finished and no other is begun. Ctrl-C waits for none.
    """
    ahead, found, failed = iter(listing.files), dict[str, str](), list[BaseException]()

    def work() -> None:
        try:
            for remote in ahead:  # which all workers share
                found[remote.name] = _fetch_one(remote, scratch / remote.name, headers, bar)
        except BaseException as error:
            failed.append(error)
            tuple(ahead)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(AT_ONCE)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
    return found


def _fetch_one(remote: Remote, path: Path, headers: dict[str, str], bar: tqdm) -> str:
    """Fetch and check a file of scratch, unless it is there already. Returns its sha256."""
    if not path.exists():
        partial = _incomplete(path)
        with _writing(partial, remote.size):
            _get(remote, partial, headers, bar)
            if other := _difference(remote, partial):
                _clear(partial)
                raise UserError(
                    f"{remote.url} came with other bytes than stated: expected {other}. They were removed from "
                    f"{partial}. Run again; if that does not help, correct the sha256 under `files` in params.yaml or "
                    "give another address under `at`."
                )
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # else a power cut could leave the name without the bytes
            partial.rename(path)
    return remote.sha256 or digest(path)


def _get(remote: Remote, partial: Path, headers: dict[str, str], bar: tqdm) -> None:
    """Append to `partial` until it is as long as stated. Raises UserError where that cannot be had; what came stays."""
    with _FOLDERS:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    tries, best = 0, partial.stat().st_size
    while (done := partial.stat().st_size) < remote.size:
        tries += 1
        try:
            # No retries of its own, at least until the first bytes came: it waits long and knows some failures only.
            with partial.open("ab") as file:
                http_get(remote.url, file, resume_size=done, headers=headers, _tqdm_bar=bar, _nb_retries=0)
            if (done := partial.stat().st_size) < remote.size:
                os.truncate(partial, 0)  # a complete body that is too short is not the file, but perhaps a proxy's page
                bar.update(-done)
                raise httpx2.RemoteProtocolError(f"the body has {done} bytes where {remote.size} were stated")
        except (httpx2.HTTPError, FinalError) as error:
            done = partial.stat().st_size
            if done > best:  # a bad connection that still makes progress gets all its tries again
                tries, best = 0, done
            if not _try_again(error, tries):
                raise UserError(
                    f"{remote.name} could not be fetched: {_why(error)}. {done} of its {remote.size} bytes are kept in "
                    f"{partial}; run again to go on from there, or give another address under `at` in params.yaml."
                ) from error


def _difference(remote: Remote, path: Path) -> str:
    """How a file differs from what is stated, e.g. 'sha256 X, found Y'; empty if it does not."""
    fact, stated, found = "size", str(remote.size), str(path.stat().st_size)
    if stated == found and remote.sha256:
        fact, stated, found = "sha256", remote.sha256, digest(path)
    elif stated == found and remote.blob:
        blob = hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False)
        fact, stated, found = "git blob id", remote.blob, digest(path, lambda: blob)
    return f"{fact} {stated}, found {found}" if stated != found else ""


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
            "Make room or fix the cause that is named, then run again: complete files are kept."
        ) from error


def _clear(path: Path) -> None:
    """Remove a file or a folder, and the folders above it as far as they are empty."""
    with _FOLDERS:
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
    """`files` of the record; prints on stderr the files that no hash verified."""
    files = {}
    for remote in listing.files:
        sha256 = found[remote.name]
        verified = "params" if download.files.get(remote.name) else "hub" if remote.sha256 or remote.blob else "nothing"
        files[remote.name] = {"bytes": remote.size, "sha256": sha256, "verified": verified}
        if verified == "nothing":
            print(
                f"{remote.url}: not verified, because neither params.yaml nor the server gives its hash. To pin the "
                f"bytes that came, write under `files` in params.yaml: {remote.name}: {sha256}",
                file=sys.stderr,
            )
    if download.match and len(files) > NAMED:
        lines = "".join(f"{name} {sha256}\n" for name, sha256 in sorted(found.items()))
        return {"count": len(files), "bytes": listing.size, "sha256": hashlib.sha256(lines.encode()).hexdigest()}
    return files


def _as_recorded(record: dict[str, Any], earlier: dict[str, Any] | None) -> None:
    """Raises UserError where an address has other files, by name or sha256, than an earlier record of it."""
    if not earlier or earlier.get("address") != record["address"]:
        return
    was, now = (_sums(found["files"]) for found in (earlier, record))
    if other := [name for name in {**was, **now} if was.get(name) != now.get(name)]:
        raise UserError(
            f"{record['address']} has other bytes now (commit {record['revision']}) than an earlier fetch recorded "
            f"(commit {earlier['revision']}), first of {len(other)}: {other[0]}, sha256 {now.get(other[0])}, not "
            f"{was.get(other[0])}. For the earlier ones write its commit after @ in params.yaml; for these remove the "
            "record below metrics/."
        )


def _sums(files: dict[str, Any]) -> dict[str, str]:
    """sha256 by name of a record's files; of many there is one sum."""
    return {"all": files["sha256"]} if "count" in files else {name: file["sha256"] for name, file in files.items()}
