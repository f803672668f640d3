"""Shards that lie elsewhere: the same images as from local tars, every fault told, a cache that stays bounded."""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from filelock import lock_descriptor
from shrunk import ROOT, read_yaml, run, write_shards, write_yaml

from pipeline import images
from pipeline.core.stages import UserError
from pipeline.data import remote
from pipeline.data.shards import Shards
from pipeline.engine.pins import pins
from pipeline.sections import params
from pipeline.tools import index


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; `faults` are what the next answers do instead, `asked` the files that were fetched."""

    faults: ClassVar[list[str]] = []
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        fault = self.faults.pop(0) if self.faults else ""
        self.asked.append(self.path)
        if fault == "slow":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
            self.wfile.flush()
            time.sleep(1)
        elif fault == "silent":
            time.sleep(1)
        elif fault == "busy":
            self.send_error(503)
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
            self.close_connection = True
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        """A server that is busy or silent is so whatever it is asked."""
        if self.faults:
            self.do_GET()
        else:
            super().do_HEAD()

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four shards of eight to eleven images, in the place of img2dataset's output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "WAIT", 0.0)
    folder = tmp_path / "bucket"
    folder.mkdir()
    counts = {}
    for i in range(4):
        write_shards(tmp_path / str(i), 8 + i)
        (tmp_path / str(i) / "00000.tar").rename(folder / f"{i:05d}.tar")
        counts[f"{i:05d}.tar"] = 8 + i
    (folder / "00000_stats.json").write_text("{}")
    (folder / "shards.json").write_text(json.dumps({"size": 64, "samples": 38, "shards": counts}))
    return folder


@pytest.fixture
def address(local: Path) -> Iterator[str]:
    handler = partial(Handler, directory=str(local))
    Handler.faults, Handler.asked = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def indexed(local: Path, at: str, **changes: Any) -> Path:
    """Where stage images puts the index."""
    folder = Path("data/images")
    folder.mkdir(parents=True, exist_ok=True)
    found = index.index(local, at, 64)
    for name, change in changes.items():
        found["files"]["00002.tar"][name] = change
    (folder / "shards.json").write_text(json.dumps(found))
    return folder


BAD = {  # what is wrong with an index: how it comes to be, and what is said of it
    "a shard without sha256": (lambda found: found["files"]["00002.tar"].pop("sha256"), r"files\.00002\.tar\.sha256"),
    "a sha256 that is null": (lambda found: found["files"]["00002.tar"].update(sha256=None), r"sha256: found None"),
    "a sha256 that leaves the cache": (
        lambda found: found["files"]["00002.tar"].update(sha256="../../evil/evil"), r"sha256: found '\.\./\.\./evil/",
    ),
    "no bytes": (lambda found: found["files"]["00002.tar"].update(bytes=0), r"bytes: found 0\. .*greater than 0"),
    "fewer than no bytes": (lambda found: found["files"]["00002.tar"].update(bytes=-1), r"bytes: found -1"),
    "a part of a byte": (lambda found: found["files"]["00002.tar"].update(bytes=1.5), r"bytes: found 1\.5"),
    "an unknown key of a shard": (lambda found: found["files"]["00002.tar"].update(md5="0"), r"00002\.tar\.md5"),
    "a shard that is not listed": (lambda found: found["files"].pop("00002.tar"), "files lacks 00002.tar"),
    "captions that are not counted": (lambda found: found["captioned"].pop("00002.tar"), "captioned lacks 00002.tar"),
    "more captions than images": (
        lambda found: found["captioned"].update({"00002.tar": 11}), "00002.tar has 10 images, but 11 with a caption",
    ),
    "a count that is no integer": (lambda found: found["shards"].update({"00002.tar": 10.0}), r"tar: found 10\.0"),
    "a count below zero": (lambda found: found["shards"].update({"00002.tar": -10}), r"tar: found -10"),
    "a size in words": (lambda found: found.update(size="64"), r"size: found '64'"),
    "an unknown key": (lambda found: found.update(ad="s3://bucket"), "ad: found 's3://bucket'"),
    "no list of files": (lambda found: found.pop("files"), "at and files belong together"),
    "no counts": (lambda found: found.pop("shards"), "shards: found"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_an_index_is_checked_where_it_comes_in(local: Path, what: str) -> None:
    """By the name that its owner knows it by; and again where it is read, by any other process."""
    change, said = BAD[what]
    found = index.index(local, str(local), 64)
    change(found)
    refused(json.dumps(found), said)


@pytest.mark.parametrize(
    ("content", "said"),
    [("\ufeff{}", "Invalid JSON"), ('{"size": 64', "Invalid JSON: EOF"), ("[]", "found"), ("", "EOF")],
)
def test_an_index_that_is_no_json_is_told_by_its_name(local: Path, content: str, said: str) -> None:
    refused(content, said)


def refused(content: str, said: str) -> None:
    file, folder = Path("data/index.json"), Path("data/images")
    folder.mkdir(parents=True)
    for path in (file, folder / "shards.json"):
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"^data/index\.json is damaged: .*{said}.*python -m pipeline\.tools\.index"):
        images.indexed(file, Path("data/new"))
    with pytest.raises(UserError, match=rf"^data/images/shards\.json is damaged: .*{said}.*dvc repro --force"):
        Shards(folder)


def test_an_index_that_does_not_say_where_its_shards_are(local: Path) -> None:
    with pytest.raises(UserError, match=r"shards\.json does not say where its shards are"):
        images.indexed(local / "shards.json", Path("data/new"))


def test_a_damaged_file_of_the_cache_is_named(local: Path) -> None:
    """No stage makes it."""
    folder = indexed(local, str(local))
    shards = Shards(folder)
    window, _ = shards.place(7, 0)
    shards.open(window)
    paths = sorted(remote.CACHE.glob("*.tar"))
    for path in paths:
        path.write_bytes(path.read_bytes()[:8192])
    with pytest.raises(
        UserError, match=r"data/\.shards/\w{64}\.tar cannot be read .*Remove data/\.shards/\w{64}\.tar:"
    ):
        epoch(Shards(folder))
    for path in paths:
        shutil.copy(local / "00000.tar", path)
    with pytest.raises(UserError, match=r"holds 8 images.*shards\.json says .*Remove data/\.shards/\w{64}\.tar: "):
        epoch(Shards(folder))
    for path in paths:
        path.unlink()
    assert epoch(Shards(folder)) == epoch(Shards(local))


@pytest.mark.parametrize("what", ["a file", "a link to nothing"])
def test_a_cache_that_is_no_folder_is_told(local: Path, what: str) -> None:
    folder = indexed(local, str(local))
    if what == "a file":
        remote.CACHE.write_text("")
    else:
        remote.CACHE.symlink_to("nowhere")
    with pytest.raises(
        UserError, match=r"data/\.shards is no folder, .*Remove it, or make the folder that it links to"
    ):
        epoch(Shards(folder))


def test_who_waits_long_for_another_process_says_so(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, told, said = Shards(indexed(local, str(local))), threading.Event(), list[str]()
    assert shards.remote
    path = shards.remote.path("00000.tar").with_suffix(".partial")
    path.parent.mkdir()
    other = os.open(path, os.O_RDWR | os.O_CREAT)
    assert lock_descriptor(other, blocking=False)

    def tell(message: str, **options: Any) -> None:
        monkeypatch.setattr(remote, "PATIENCE", 60.0)
        said.append(message)
        told.set()

    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    monkeypatch.setattr(remote, "print", tell, raising=False)
    waiting = threading.Thread(target=shards.remote.fetch, args=["00000.tar"], daemon=True)
    waiting.start()
    assert told.wait(60)
    os.close(other)
    waiting.join()
    assert len(said) == 1
    assert said[0].startswith(f"{path}: another process has had it for")
    assert shards.remote.path("00000.tar").is_file()


def epoch(shards: Shards) -> list[tuple[str, bytes, str]]:
    samples = [shards.read(*shards.place(7, number)) for number in range(len(shards))]
    return [(sample.tar, sample.image.tobytes(), sample.caption) for sample in samples]


@pytest.mark.slow
def test_the_same_images_in_the_same_order_from_anywhere(local: Path, address: str) -> None:
    wanted = epoch(Shards(local))
    assert epoch(Shards(indexed(local, address))) == wanted
    assert len(Handler.asked) == 4  # each once
    assert epoch(Shards(indexed(local, address))) == wanted
    assert len(Handler.asked) == 4  # what is there was checked when it came
    shutil.rmtree(remote.CACHE)
    assert epoch(Shards(indexed(local, str(local)))) == wanted
    assert len(Handler.asked) == 4


def test_the_place_of_a_sample_is_found_without_a_look_at_every_shard(local: Path) -> None:
    """400 million images are 80,000 shards."""
    looks = []

    class Shown(dict[str, int]):
        def __iter__(self) -> Iterator[str]:
            looks.append("names")
            return super().__iter__()

        def values(self) -> Any:
            looks.append("values")
            return super().values()

    shards = Shards(local)
    shards.trained = Shown(shards.trained)
    for number in range(len(shards)):
        shards.place(7, number)
    assert looks == ["names"]  # for the order of the epoch


@pytest.mark.slow
def test_several_threads_fetch_a_shard_once(local: Path, address: str) -> None:
    shards = Shards(indexed(local, address))
    window, _ = shards.place(7, 0)
    threads = [threading.Thread(target=shards.open, args=(window,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(Handler.asked) == [f"/{i:05d}.tar" for i in range(4)]
    assert sorted(path.suffix for path in remote.CACHE.iterdir() if path.name != ".lock") == [".tar"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["busy", "cut", "slow", "silent"])
def test_a_fault_that_passes_is_told_and_costs_nothing(
    local: Path, address: str, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    Handler.faults[:] = [fault, fault]
    assert epoch(Shards(indexed(local, address))) == epoch(Shards(local))
    told = capsys.readouterr().err
    assert "try 2 of 5" in told
    assert "try 3 of 5" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sha256": "0" * 64},
            r"00002.tar could not be fetched in 5 tries \(OSError: its sha256 is .*, but the index",
        ),
        ({"bytes": 1_000_000}, r"could not be fetched in 5 tries \(OSError: received \d+ bytes, but the index"),
        ({"bytes": 100}, r"00002.tar could not be fetched in 5 tries \(OSError: received \d+ bytes, but the index"),
    ],
)
def test_other_bytes_are_refused(local: Path, address: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        epoch(Shards(indexed(local, address, **changes)))
    assert not list(remote.CACHE.glob("*.partial"))


@pytest.mark.slow
def test_a_shard_that_is_gone_is_refused_at_once(local: Path, address: str) -> None:
    folder = indexed(local, address)
    (local / "00002.tar").unlink()
    with pytest.raises(UserError, match=r"00002\.tar does not exist .* no shard is skipped"):
        epoch(Shards(folder))
    assert Handler.asked.count("/00002.tar") <= 1


@pytest.mark.parametrize(("at", "said"), [("s4://bucket", "with the packages installed here"), ("s3://bucket", "s3fs")])
def test_an_address_without_a_driver_is_refused(local: Path, at: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        epoch(Shards(indexed(local, at)))


@pytest.mark.slow
def test_a_full_disk_is_told(local: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote.os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"No space left on device, http.*Free space there or lower launch.cache_gb"):
        epoch(Shards(indexed(local, address)))
    assert Handler.asked == []


@pytest.mark.slow
def test_a_system_without_fallocate_fetches_and_tells_of_a_full_disk(
    local: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS."""
    monkeypatch.delattr(remote.os, "posix_fallocate")
    wanted = epoch(Shards(local))
    assert epoch(Shards(indexed(local, address))) == wanted
    shutil.rmtree(remote.CACHE)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"No space left on device, http.*Free space there"):
        epoch(Shards(indexed(local, address)))


@pytest.mark.slow
def test_the_cache_stays_bounded(local: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.shards.WINDOW", 1)
    monkeypatch.setattr("pipeline.data.remote.STREAMS", 1)
    size = max(path.stat().st_size for path in local.glob("*.tar"))
    with pytest.raises(UserError, match=r"launch.cache_gb is .* but the 3 shards .* in use at once take .* GB"):
        Shards(indexed(local, address), cache_gb=2 * size / 1e9)
    shards, most = Shards(indexed(local, address), cache_gb=(3 * size + 1) / 1e9), 0
    for number in range(2 * len(shards)):
        shards.read(*shards.place(7, number))
        most = max(most, sum(path.stat().st_size for path in remote.CACHE.glob("*.tar")))
    assert size < most <= 3 * size
    assert len(Handler.asked) > 4  # some came twice


@pytest.mark.slow
def test_the_stage_keeps_the_index_alone_and_depends_on_its_bytes(local: Path) -> None:
    content = read_yaml(ROOT / "params.yaml")
    content["run"] |= {"profile": "paper", "backbones": ["openai_224"]}
    content["profiles"]["paper"]["images"]["kind"] = "index"
    write_yaml(Path("params.yaml"), content)
    with pytest.raises(UserError, match=r"data/index.json: no such file"):
        images.indexed(Path("data/index.json"), Path("x"))
    Path("data").mkdir()
    Path("data/index.json").write_text(json.dumps(index.index(local, "s3://bucket", 64)))
    before = pins(params.load())["images"]
    run(images)
    assert [path.name for path in Path("data/paper/images").iterdir()] == ["shards.json"]
    report = json.loads(Path("metrics/paper/images.json").read_text())
    assert (report["shards"], report["images"], report["source"]["at"]) == (4, 38, "s3://bucket")
    Path("data/index.json").write_text(json.dumps(index.index(local, "gs://bucket", 64)))
    assert pins(params.load())["images"] != before
