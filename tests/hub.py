"""A server on 127.0.0.1 that speaks the hub's protocol and serves plain files, with faults to order.

    with Hub() as hub:
        hub.add_repo("owner/name", {"weights.bin": b"..."}, lfs=100)
        hub.add_files("/folder", {"weights.bin": b"..."})
        hub.cut("weights.bin", after_bytes=50)
        hub.stand_in(monkeypatch)
        ...  # of another process HF_ENDPOINT is hub.endpoint; plain files are below f"{hub.endpoint}/folder"

Folders are served from the disk, piece by piece, so files may be large. Faults are found by the end of a URL's path.
"""

import hashlib
import io
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

CHUNK = 1 << 20
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INVERTED = bytes(255 - byte for byte in range(256))


class Request(NamedTuple):
    """What a client asked for; `range` is the header, e.g. "bytes=100-"."""

    method: str
    path: str
    range: str | None
    has_authorization: bool


@dataclass
class File:
    """A file's content, with the hashes that a hub states about it; `lfs` is whether it is stored as a large file."""

    content: bytes | Path
    lfs: bool = False

    def open(self) -> io.BufferedIOBase:
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")

    @cached_property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds in place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def blob(self) -> str:
        """Git's id: of the content, or of a large file's pointer."""
        with io.BytesIO(self.pointer) if self.lfs else self.open() as file:
            size = len(self.pointer) if self.lfs else self.size
            return hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % size)).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob

    def entry(self, path: str) -> dict[str, Any]:
        """As the hub lists it."""
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.blob}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return entry


@dataclass
class Repo:
    name: str
    commit: str
    files: dict[str, File]

    def has(self, revision: str) -> bool:
        return revision == "main" or (len(revision) >= 7 and self.commit.startswith(revision))

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in sorted(self.files)]
        return {"id": self.name, "sha": self.commit, "private": False, "gated": False, "siblings": siblings, "tags": []}

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Entries below a folder ("" is the top), its subfolders' too if `recursive`."""
        prefix = f"{folder}/" if folder else ""
        below = {path: file for path, file in sorted(self.files.items()) if path.startswith(prefix)}
        folders = {str(parent) for path in below for parent in Path(path).parents if str(parent).startswith(prefix)}
        entries = [self.directory(path) for path in sorted(folders - {".", folder})]
        entries += [file.entry(path) for path, file in below.items()]
        return [entry for entry in entries if recursive or "/" not in entry["path"][len(prefix) :]]

    def paths_info(self, paths: list[str]) -> list[dict[str, Any]]:
        """Entries of those paths that there are."""
        folders = {str(parent) for path in self.files for parent in Path(path).parents} - {"."}
        return [
            self.files[path].entry(path) if path in self.files else self.directory(path)
            for path in paths
            if path in self.files or path in folders
        ]

    def directory(self, path: str) -> dict[str, Any]:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


@dataclass
class Fault:
    suffix: str
    kind: str  # status, cut or corrupt
    value: int = 0  # the status, or after how many bytes
    times: float = float("inf")  # how often still
    reset: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Hub:
    requests: list[Request] = field(default_factory=list)
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)  # by "models" or "datasets", and name
    plain: dict[str, File] = field(default_factory=dict)  # by path
    faults: list[Fault] = field(default_factory=list)

    def start(self) -> "Hub":
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def __enter__(self) -> "Hub":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be the hub that this process asks: its client reads HF_ENDPOINT only once, at import."""
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Else the first request of a process is another one, about coding agents, without a token.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)

    def add_repo(
        self,
        name: str,
        content: Path | Mapping[str, bytes | Path],
        kind: str = "model",
        revision: str = COMMIT,
        lfs: Callable[[str, int], bool] | int = 10 * CHUNK,
    ) -> None:
        """Serve a folder, or bytes by path, as a repository whose only commit is `revision` (40 hex digits).

        Large files are those of at least `lfs` bytes, or those for which lfs(path, size) holds.
        """
        files = _files(content)
        for path, file in files.items():
            file.lfs = lfs(path, file.size) if callable(lfs) else file.size >= lfs
        self.repos[f"{kind}s", name] = Repo(name, revision, files)

    def add_files(self, prefix: str, content: Path | Mapping[str, bytes | Path]) -> None:
        """Serve a folder, or bytes by path, below the path `prefix`."""
        self.plain |= {f"{prefix}/{path}": file for path, file in _files(content).items()}

    def fail(
        self, suffix: str, status: int = 500, times: float = float("inf"), body: bytes = b"", **headers: str
    ) -> None:
        """Answer with an error. A header's name is written with underscores; none is sent but those given."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if not (named or body):
            named = {"X-Error-Message": "a fault to order"} | (
                {"X-Error-Code": "EntryNotFound"} if status == 404 else {}
            )
        self.faults.append(Fault(suffix, "status", status, times, headers=named, body=body))

    def missing(self, suffix: str) -> None:
        """Answer that the file is not there, although listings name it."""
        self.fail(suffix, 404)

    def cut(self, suffix: str, after_bytes: int, times: float = 1, reset: bool = False) -> None:
        """Close the connection in the middle of a body; with `reset` rudely, so that the client's read fails."""
        self.faults.append(Fault(suffix, "cut", after_bytes, times, reset))

    def corrupt(self, suffix: str) -> None:
        """Serve wrong bytes, as many as stated; what is stated about them stays right."""
        self.faults.append(Fault(suffix, "corrupt"))

    def heal(self) -> None:
        self.faults.clear()

    def fault(self, path: str, *kinds: str) -> Fault | None:
        """The first fault of this path that is not used up; counts it."""
        with self.lock:
            for fault in self.faults:
                if fault.kind in kinds and path.endswith(fault.suffix) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


def _files(content: Path | Mapping[str, bytes | Path]) -> dict[str, File]:
    if isinstance(content, Path):
        return {path.relative_to(content).as_posix(): File(path) for path in content.rglob("*") if path.is_file()}
    return {path: File(data) for path, data in content.items()}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its headers

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client went away
            self.close_connection = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, path, self.headers["Range"], "Authorization" in self.headers)
        self.hub.requests.append(request)
        if fault := self.hub.fault(path, "status"):
            if fault.headers or fault.body:
                self.respond(fault.value, fault.headers, fault.body)
            else:
                self.refuse(fault.value, "EntryNotFound" if fault.value == 404 else "", "a fault to order")
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path):
            kind, name, what, rest = match.groups()
            revision, _, folder = (rest or "main").partition("/")
            if repo := self.repo(kind, name, revision):
                if what == "tree":
                    recursive = parse_qs(url.query).get("recursive", [""])[0].lower() == "true"
                    self.reply(repo.tree(folder, recursive))
                elif what == "paths-info":
                    self.reply(repo.paths_info(parse_qs(asked.decode())["paths"]))
                else:
                    self.reply(repo.info())
        elif match := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = match.groups()
            if repo := self.repo(kind or "models", name, revision):
                if file in repo.files:
                    self.serve(path, repo.files[file], repo.commit)
                else:
                    self.refuse(404, "EntryNotFound", "Entry not found")
        elif path in self.hub.plain:
            self.serve(path, self.hub.plain[path])
        else:
            self.refuse(404, "", "no such file")

    do_HEAD = do_POST = do_GET

    def repo(self, kind: str, name: str, revision: str) -> Repo | None:
        """Find a repository, or refuse."""
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif not repo.has(revision):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo

    def reply(self, value: Any) -> None:
        self.respond(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def refuse(self, status: int, code: str, message: str) -> None:
        named = {"X-Error-Code": code} if code else {}
        self.respond(status, {**named, "X-Error-Message": message}, b"")

    def respond(self, status: int, headers: dict[str, str], body: bytes) -> None:
        (self.send_response_only if "Date" in headers else self.send_response)(status)  # the latter adds a date
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self, path: str, file: File, commit: str | None = None) -> None:
        """Send a file, or the range of it that was asked for; with the hub's headers if it is of a commit."""
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if commit:
            headers |= {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
            if file.lfs:
                headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.etag}"'}
        start, end = 0, file.size
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            start, end = int(match[1]), min(int(match[2]) + 1, file.size) if match[2] else file.size
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
            if start >= file.size:
                self.respond(416, {"Content-Range": f"bytes */{file.size}"}, b"")
                return
        self.send_response(206 if match else 200)
        for name, value in {**headers, "Content-Length": str(end - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.send_body(path, file, start, end)

    def send_body(self, path: str, file: File, start: int, end: int) -> None:
        corrupt, cut = self.hub.fault(path, "corrupt"), self.hub.fault(path, "cut")
        stop = min(start + cut.value, end) if cut else end
        with file.open() as source:
            source.seek(start)
            while start < stop:
                data = source.read(min(CHUNK, stop - start))
                self.wfile.write(data.translate(INVERTED) if corrupt else data)
                start += len(data)
        if cut:
            self.close_connection = True
            if cut.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass
