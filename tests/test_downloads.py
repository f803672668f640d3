"""Downloads against a hub of our own: what is asked for, what is refused, what is left after every kind of failure."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import huggingface_hub
import pytest
from hub import COMMIT, Hub

from pipeline.core.stages import UserError
from pipeline.data import downloads
from pipeline.data.downloads import fetch, fetch_all, locate
from pipeline.sections.checkpoint import LocalFiles
from pipeline.sections.download import Download

BODY = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(320))  # 10,240 bytes without a pattern
CONFIG = b'{"layers": 12}\n'
MODEL = {"unet/weights.bin": BODY, "unet/config.json": CONFIG, "README.md": b"read me\n"}
WEIGHTS = "unet/weights.bin"
AT = "hf://owner/model@main"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model, in a folder of its own, with short waits and small pieces."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(downloads, "WAIT", 0.001)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Hub() as hub:
        hub.stand_in(monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)
        hub.add_repo("owner/model", MODEL, lfs=1000)
        yield hub


def wanted(*names: str, at: str | list[str] = AT, **pinned: str) -> Download:
    files = {name: None for name in names} | pinned
    return Download(at=[at] if isinstance(at, str) else at, licence="MIT", files=files)


def test_what_was_gathered_outlives_the_failure_of_another_download(hub: Hub) -> None:
    hub.add_repo("owner/other", {"other.bin": BODY}, lfs=1000)
    both = {Path("out/a"): wanted(WEIGHTS), Path("out/b"): wanted("other.bin", at="hf://owner/other@main")}
    hub.missing("other.bin")
    with pytest.raises(UserError, match=r"other\.bin could not be fetched"):
        fetch_all(both)
    assert not Path("out").exists()
    hub.heal()
    records = fetch_all(both)
    assert files(Path("out")) == {f"a/{WEIGHTS}": BODY, "b/other.bin": BODY}
    assert [list(records[folder]["files"]) for folder in both] == [[WEIGHTS], ["other.bin"]]
    assert len(gets(hub, WEIGHTS)) == 1
    assert not downloads.SCRATCH.exists()


def test_the_same_download_for_two_folders_comes_once(hub: Hub) -> None:
    records = fetch_all(dict.fromkeys([Path("out/a"), Path("out/b")], wanted(WEIGHTS)))
    assert files(Path("out")) == {f"a/{WEIGHTS}": BODY, f"b/{WEIGHTS}": BODY}
    assert records[Path("out/a")] == records[Path("out/b")]
    assert len(gets(hub, WEIGHTS)) == 1
    assert not downloads.SCRATCH.exists()


def matching(*patterns: str, at: str = AT) -> Download:
    return Download(at=[at], licence="MIT", match=list(patterns))


def pinned(at: str, name: str, data: bytes) -> Download:
    return Download(at=[at], licence="MIT", files={name: sha256(data)})


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def gets(hub: Hub, name: str) -> list[str | None]:
    """Ranges that a file was asked for with."""
    return [request.range for request in hub.requests if request.method == "GET" and request.path.endswith(f"/{name}")]


def refused(download: Download, *parts: str) -> str:
    """The message of a fetch that must fail, and must leave nothing where the files belong."""
    with pytest.raises(UserError) as error:
        fetch(download, Path("out"))
    assert not Path("out").exists()
    for part in parts:
        assert part in str(error.value), str(error.value)
    return str(error.value)


def test_eight_files_come_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    together, http_get = threading.Barrier(8, timeout=60), downloads.http_get

    def get(*args: Any, **options: Any) -> None:
        together.wait()
        http_get(*args, **options)

    monkeypatch.setattr(downloads, "http_get", get)
    content = {f"{i}.bin": BODY[i:] for i in range(16)}
    hub.add_repo("owner/many", content)
    fetch(matching("*.bin", at="hf://owner/many@main"), Path("out"))
    assert files(Path("out")) == content


def test_after_a_failure_no_other_file_is_begun(hub: Hub) -> None:
    hub.add_repo("owner/many", {f"{i}.bin": BODY for i in range(30)})
    hub.missing(".bin")
    refused(matching("*.bin", at="hf://owner/many@main"), "HTTP 404")
    assert len([request for request in hub.requests if request.path.endswith(".bin")]) <= 8


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_no_file(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    noticed = threading.Event()

    def get(*args: Any, **options: Any) -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        noticed.wait(60)
        sys.exit()

    monkeypatch.setattr(downloads, "http_get", get)
    with pytest.raises(KeyboardInterrupt):
        fetch(wanted(WEIGHTS), Path("out"))
    noticed.set()
    assert not Path("out").exists()


# What there is


def test_a_listing_states_what_the_hub_states(hub: Hub) -> None:
    listing = locate(wanted(WEIGHTS, "unet/config.json", at="hf://owner/model@0123456"))
    assert (listing.address, listing.revision) == ("hf://owner/model@0123456", COMMIT)
    config, weights = listing.files
    assert (config.name, config.size, config.sha256) == ("unet/config.json", len(CONFIG), None)
    assert config.blob == hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()
    assert (weights.name, weights.size, weights.sha256, weights.blob) == (WEIGHTS, len(BODY), sha256(BODY), None)
    assert weights.url == f"{hub.endpoint}/owner/model/resolve/{COMMIT}/{WEIGHTS}"
    assert listing.size == len(BODY) + len(CONFIG)
    assert [request for request in hub.requests if "resolve" in request.path] == []


def test_files_of_a_hub(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    record = fetch(wanted(WEIGHTS, "unet/config.json"), Path("out"))
    assert files(Path("out")) == {name: MODEL[name] for name in (WEIGHTS, "unet/config.json")}
    assert record == {
        "address": AT,
        "revision": COMMIT,
        "licence": "MIT",
        "files": {
            "unet/config.json": {"bytes": len(CONFIG), "sha256": sha256(CONFIG), "verified": "hub"},
            WEIGHTS: {"bytes": len(BODY), "sha256": sha256(BODY), "verified": "hub"},
        },
    }
    later = [request.path for request in hub.requests if "/revision/" not in request.path]
    assert len(later) == 3  # the tree and two files
    assert all(COMMIT in path for path in later)  # main may move meanwhile
    assert not Path("data").exists()
    out, err = capfd.readouterr()
    assert out == f"fetching 2 files, 0.000 GB, from {AT}, commit {COMMIT}\ntheir licence: MIT\n"
    assert "100%" in err


def test_patterns_choose_among_the_paths_of_a_dataset(hub: Hub) -> None:
    content = {f"test/{i}.tar": f"tar {i}".encode() for i in range(3)}
    content |= {"test/deep/3.tar": b"tar 3", "train/0.tar": b"no"}
    content |= {"classnames.txt": b"fish\n", "empty.txt": b"", "a b#é.txt": b"an odd name"}
    hub.add_repo("owner/set", content, kind="dataset", revision="f" * 40)
    record = fetch(matching("test/*", "*.txt", at="hf://datasets/owner/set@fffffff"), Path("out"))
    assert files(Path("out")) == {name: data for name, data in content.items() if name != "train/0.tar"}
    assert list(record["files"]) == sorted(record["files"])
    assert record["revision"] == "f" * 40


@pytest.mark.slow
def test_the_record_of_many_files_is_small(hub: Hub) -> None:
    for count in (50, 51):
        content = {f"{i:03d}.tar": str(i).encode() for i in range(count)}
        hub.add_repo(f"owner/set{count}", content, kind="dataset")
    few, many = (fetch(matching("*.tar", at=f"hf://datasets/owner/set{n}@main"), Path(f"out{n}")) for n in (50, 51))
    assert few["files"]["049.tar"] == {"bytes": 2, "sha256": sha256(b"49"), "verified": "hub"}
    lines = "".join(f"{i:03d}.tar {sha256(str(i).encode())}\n" for i in range(51))
    assert many["files"] == {"count": 51, "bytes": 92, "sha256": sha256(lines.encode())}
    assert len(files(Path("out51"))) == 51
    named = fetch(wanted(*content, at="hf://datasets/owner/set51@main"), Path("out"))
    assert named["files"].keys() == content.keys()


def test_plain_files_are_not_verified_unless_pinned(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.add_files("/folder/a b", {"pinned.pt": BODY, "sub/free #1.pt": CONFIG})
    at = f"{hub.endpoint}/folder/a%20b/"
    record = fetch(wanted("sub/free #1.pt", at=at, **{"pinned.pt": sha256(BODY)}), Path("out"))
    assert files(Path("out")) == {"pinned.pt": BODY, "sub/free #1.pt": CONFIG}
    assert record["revision"] is None
    assert {name: facts["verified"] for name, facts in record["files"].items()} == {
        "pinned.pt": "params",
        "sub/free #1.pt": "nothing",
    }
    err = capfd.readouterr().err
    assert (
        "not verified, because neither params.yaml nor the server gives its hash. To pin the bytes that came, write"
        in err
    )
    assert f"sub/free #1.pt: {sha256(CONFIG)}\n" in err
    assert "pinned.pt" not in err


def test_the_token_goes_to_the_hub_alone(hub: Hub) -> None:
    hub.add_files("/folder", {"weights.pt": BODY})
    fetch(pinned(f"{hub.endpoint}/folder", "weights.pt", BODY), Path("out"))
    assert {request.method for request in hub.requests} == {"HEAD", "GET"}
    assert not any(request.has_authorization for request in hub.requests)
    hub.requests.clear()
    fetch(wanted(WEIGHTS), Path("out"))
    assert len(hub.requests) >= 3
    assert all(request.has_authorization for request in hub.requests)


# What is not there, or is another thing


def test_names_and_patterns_that_fit_nothing(hub: Hub) -> None:
    refused(wanted(WEIGHTS, "unet/wrong.bin"), AT, "unet/wrong.bin", "README.md, unet/config.json, unet/weights.bin")
    refused(matching("unet/*", "*.tar"), AT, "*.tar", "README.md, unet/config.json, unet/weights.bin")
    assert not Path("data").exists()


def test_a_hub_cannot_name_files_outside_the_folder(hub: Hub) -> None:
    hub.add_repo("owner/evil", {"../evil.tar": BODY})
    refused(matching("*.tar", at="hf://owner/evil@main"), "'../evil.tar'", "outside its folder")


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("hf://owner/model@1234567", "Invalid rev id: 1234567"),
        ("hf://owner/nothing@main", "Repository not found"),
        ("hf://own..er/model@main", "HFValidationError"),
    ],
)
def test_an_unknown_repository_or_revision(hub: Hub, at: str, said: str) -> None:
    message = refused(wanted(WEIGHTS, at=at), at, said, "another address under `at` in params.yaml")
    assert len(message.splitlines()) == 3


def test_a_plain_file_that_is_not_there(hub: Hub) -> None:
    refused(wanted("a.pt", at=f"{hub.endpoint}/folder"), f"HTTP 404 for {hub.endpoint}/folder/a.pt")
    assert len(hub.requests) == 1  # such an answer will not change


def test_a_server_that_does_not_state_a_size(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_head", lambda url: downloads.httpx2.Response(200))
    refused(wanted("a.pt", at=f"{hub.endpoint}/folder"), f"{hub.endpoint}/folder/a.pt does not state its size")


def test_a_server_that_states_no_bytes_of_a_file_without_a_hash(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some answer so to every question for a size."""
    none = downloads.httpx2.Response(200, headers={"content-length": "0"})
    monkeypatch.setattr(downloads, "_head", lambda url: none)
    refused(wanted("a.pt", at=f"{hub.endpoint}/folder"), f"{hub.endpoint}/folder/a.pt does not state its size")
    record = fetch(wanted(at=f"{hub.endpoint}/folder", **{"a.pt": sha256(b"")}), Path("out"))
    assert record["files"]["a.pt"]["bytes"] == 0


def test_a_checkpoint_here_is_one_file_or_the_files_of_a_folder(tmp_path: Path) -> None:
    def found(path: Path) -> dict[str, Any]:
        return downloads.found_here(LocalFiles(path=str(path), origin="elsewhere", licence="MIT"))

    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"^{tmp_path}/folder: no file in this folder"):
        found(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=rf"^{tmp_path}/pipe: neither a file nor a folder"):
        found(tmp_path / "pipe")
    for path in (tmp_path / "absent", tmp_path / "a\0b", tmp_path / ("a" * 5000)):
        with pytest.raises(
            UserError, match=r"no such file or folder\. It is not fetched by itself: get it from elsewhere"
        ):
            found(path)
    name = b"\xff.bin"  # no UTF-8
    Path(os.fsdecode(bytes(tmp_path / "folder") + b"/" + name)).write_bytes(b"weights")
    assert found(tmp_path / "folder")["sha256"] == sha256(name + b" " + sha256(b"weights").encode() + b"\n")


@pytest.mark.parametrize("status", [401, 403])
def test_consent_is_asked_for(hub: Hub, status: int) -> None:
    hub.fail(f"resolve/{COMMIT}/{WEIGHTS}", status)  # the hub lists the files of such a repository to everybody
    refused(wanted(WEIGHTS), WEIGHTS, f"HTTP {status}", "consent or a token", "HF_TOKEN")
    assert len(gets(hub, WEIGHTS)) == 1


def test_a_listed_file_that_cannot_be_had(hub: Hub) -> None:
    hub.missing(WEIGHTS)
    refused(wanted(WEIGHTS), WEIGHTS, "HTTP 404", "another address under `at`")
    assert len(gets(hub, WEIGHTS)) == 1


def test_another_sha256_than_the_hub_states(hub: Hub) -> None:
    refused(pinned(AT, WEIGHTS, CONFIG), AT, WEIGHTS, sha256(CONFIG), sha256(BODY))
    assert gets(hub, WEIGHTS) == []
    record = fetch(pinned(AT, WEIGHTS, BODY), Path("out"))
    assert record["files"][WEIGHTS]["verified"] == "params"


def test_a_pinned_small_file_is_checked_against_its_pin(hub: Hub) -> None:
    refused(pinned(AT, "unet/config.json", BODY), f"sha256 {sha256(BODY)}, found {sha256(CONFIG)}")


@pytest.mark.parametrize("name", [WEIGHTS, "unet/config.json"])
def test_wrong_bytes_of_the_right_size(hub: Hub, name: str) -> None:
    hub.corrupt(name)
    wrong = bytes(255 - byte for byte in MODEL[name])
    blob = [hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() for data in (MODEL[name], wrong)]
    expected, found = (sha256(BODY), sha256(wrong)) if name == WEIGHTS else blob
    refused(wanted(name), f"/{name} came with other bytes", f"{expected}, found {found}")
    assert not Path("data").exists()
    hub.heal()
    fetch(wanted(name), Path("out"))
    assert files(Path("out")) == {name: MODEL[name]}


def test_wrong_bytes_of_a_pinned_plain_file(hub: Hub) -> None:
    hub.add_files("/folder", {"weights.pt": BODY})
    refused(pinned(f"{hub.endpoint}/folder", "weights.pt", CONFIG), f"{sha256(CONFIG)}, found {sha256(BODY)}")
    assert not Path("data").exists()


def test_one_bad_file_spares_those_that_came_well(hub: Hub) -> None:
    hub.corrupt(WEIGHTS)
    refused(wanted(WEIGHTS, "README.md"), WEIGHTS)
    assert [path.name for path in Path("data").rglob("*") if path.is_file()] == ["README.md"]
    hub.heal()
    fetch(wanted(WEIGHTS, "README.md"), Path("out"))
    assert files(Path("out")).keys() == {WEIGHTS, "README.md"}
    assert len(gets(hub, "README.md")) == 1
    assert not Path("data").exists()


@pytest.mark.parametrize("served", [BODY[:-1000], BODY + b"more", b"<html>log in</html>"])
def test_another_size_than_stated(hub: Hub, monkeypatch: pytest.MonkeyPatch, served: bytes) -> None:
    hub.add_files("/folder", {"weights.pt": BODY})
    download = pinned(f"{hub.endpoint}/folder", "weights.pt", BODY)
    listing = locate(download)
    monkeypatch.setattr(downloads, "locate", lambda _: listing)
    hub.add_files("/folder", {"weights.pt": served})
    refused(download, "weights.pt", str(len(served)), str(len(BODY)))
    hub.add_files("/folder", {"weights.pt": BODY})
    fetch(download, Path("out"))
    assert files(Path("out")) == {"weights.pt": BODY}


# Mirrors


def test_the_first_address_that_answers_is_used(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.add_files("/mirror", {WEIGHTS: BODY})
    dead, gone, there = "http://127.0.0.1:9", "hf://owner/nothing@main", f"{hub.endpoint}/mirror"
    record = fetch(wanted(WEIGHTS, at=[dead, gone, there, AT]), Path("out"))
    assert record["address"] == there
    assert files(Path("out")) == {WEIGHTS: BODY}
    told = [line for line in capfd.readouterr().err.splitlines() if line.endswith("; trying the next address")]
    assert [line.split(": ")[0] for line in told] == [dead, gone]
    assert "ConnectError" in told[0]


def test_every_address_is_named_with_its_reason(hub: Hub) -> None:
    hub.fail("/revision/main", 503)
    message = refused(wanted(WEIGHTS, at=["http://127.0.0.1:9", AT, "hf://owner/nothing@1234567"]))
    _, *lines, advice = message.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "  http://127.0.0.1:9",
        f"  {AT}",
        "  hf://owner/nothing@1234567",
    ]
    assert ["ConnectError" in lines[0], "HTTP 503" in lines[1], "HTTP 404" in lines[2]] == [True] * 3
    assert "`at` in params.yaml" in advice
    assert len([request for request in hub.requests if request.path.endswith("/revision/main")]) == downloads.TRIES


# Trouble on the way


def test_errors_of_the_server_pass(hub: Hub) -> None:
    hub.add_files("/folder", {"weights.pt": BODY})
    hub.fail("/revision/main", 502, times=2)
    hub.fail(f"resolve/{COMMIT}/{WEIGHTS}", 500, times=2)
    hub.fail("weights.pt", 503, times=4)
    fetch(wanted(WEIGHTS), Path("out"))
    assert gets(hub, WEIGHTS) == [None] * 3
    fetch(pinned(f"{hub.endpoint}/folder", "weights.pt", BODY), Path("out"))
    assert files(Path("out")) == {WEIGHTS: BODY, "weights.pt": BODY}


def test_errors_of_the_server_that_stay(hub: Hub) -> None:
    hub.fail(f"resolve/{COMMIT}/{WEIGHTS}", 500)
    refused(wanted(WEIGHTS), WEIGHTS, "HTTP 500", f"0 of its {len(BODY)} bytes")
    assert len(gets(hub, WEIGHTS)) == downloads.TRIES


def test_waits_grow_and_start_below_a_second(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    waits: list[float] = []
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    error = downloads.httpx2.ReadError("cut")
    assert [downloads._try_again(error, tries) for tries in range(1, 6)] == [True] * 4 + [False]
    assert waits == sorted(set(waits))
    assert 0 < waits[0] < 1
    assert sum(waits) < 60


# A server that is busy

PLACES = {"the commit": "/revision/main", "the listing": f"/tree/{COMMIT}", "a file": f"resolve/{COMMIT}/{WEIGHTS}"}


@pytest.fixture
def waits(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of a second and more, which are not waited for."""
    waits: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds) if seconds >= 1 else sleep(seconds))
    return waits


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry_After": "2"}, 2),
        (429, {"Retry_After": "Wed, 21 Oct 2015 07:28:30 GMT", "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30),
        (429, {"RateLimit": '"api";r=0;t=55', "RateLimit_Policy": '"fixed window";"api";q=500;w=300'}, 55),
        (429, {"RateLimit": '"resolvers";r=3;t=200, "api" ; t=7 ; r=0'}, 7),
        (429, {"Retry_After": "soon", "RateLimit": '"api";r=0;t=5'}, 5),
        (408, {"Retry_After": "3"}, 3),
        (425, {"Retry_After": "1"}, 1),
        (503, {"Retry_After": "120"}, 120),
        (503, {"Retry_After": "4.0"}, 4),
    ],
)
def test_a_busy_server_is_asked_again_when_it_says(
    hub: Hub,
    waits: list[float],
    capfd: pytest.CaptureFixture[str],
    place: str,
    status: int,
    headers: dict,
    seconds: int,
) -> None:
    hub.fail(PLACES[place], status, times=1, X_Error_Message="slow down, please", **headers)
    record = fetch(wanted(WEIGHTS, at=[AT, "hf://owner/mirror@main"]), Path("out"))
    assert files(Path("out")) == {WEIGHTS: BODY}
    assert record["address"] == AT
    assert waits == [seconds]
    said = capfd.readouterr().err
    assert re.search(rf"HTTP {status} for http\S+: slow down, please; asking again in {seconds} s", said), said


@pytest.mark.parametrize("status", [408, 425, 429])
@pytest.mark.parametrize("place", PLACES)
def test_a_busy_server_that_does_not_say_when_is_asked_again(hub: Hub, place: str, status: int) -> None:
    hub.fail(PLACES[place], status, times=3)
    fetch(wanted(WEIGHTS), Path("out"))
    assert files(Path("out")) == {WEIGHTS: BODY}


@pytest.mark.parametrize(
    "body",
    [
        b"come back tomorrow",
        b"<html><style>b {}</style><b>come back</b> tomorrow</html>",
        b'{"error": "come back tomorrow"}',
        b'{"message": "come back tomorrow"}',
    ],
)
def test_a_server_that_is_busy_for_long_is_not_replaced_by_a_mirror(hub: Hub, waits: list[float], body: bytes) -> None:
    hub.add_repo("owner/mirror", MODEL, lfs=1000)
    hub.fail("model/revision/main", 429, body=body, Retry_After="86400")
    download = wanted(WEIGHTS, at=[AT, "hf://owner/mirror@main"])
    said = refused(download, "HTTP 429", "/owner/model/revision/main: come back tomorrow. The server is busy and wants")
    assert all(part in said for part in ("in 86400 s", "waits 900 s at most", "HF_TOKEN"))
    assert [request for request in hub.requests if "mirror" in request.path] == waits == []


@pytest.mark.slow
def test_waiting_for_a_busy_server_has_an_end(hub: Hub, waits: list[float]) -> None:
    hub.fail(WEIGHTS, 429, Retry_After="200")
    hub.add_files("/folder", {"weights.pt": BODY})
    hub.fail("weights.pt", 429, Retry_After="0")
    said = refused(
        wanted(WEIGHTS), "unet/weights.bin could not be fetched: HTTP 429", "this run has waited 800 s", "are kept in"
    )
    assert f"0 of its {len(BODY)} bytes" in said
    assert waits == [200] * 4
    refused(wanted("weights.pt", at=f"{hub.endpoint}/folder"), "this run has waited")  # it says at once, every time
    assert sum(waits[4:]) <= downloads.PATIENCE


def test_a_server_of_plain_files_is_waited_for_as_well(hub: Hub, waits: list[float]) -> None:
    hub.add_files("/folder", {"weights.pt": BODY})
    hub.fail("weights.pt", 429, times=2, Retry_After="4")
    fetch(pinned(f"{hub.endpoint}/folder", "weights.pt", BODY), Path("out"))
    assert waits == [4, 4]


def test_a_refusal_has_the_server_s_own_words(hub: Hub) -> None:
    hub.fail("/revision/main", 403, body=b'{"error": "your address is blocked"}')
    assert "your address is blocked. The repository asks for consent" in refused(wanted(WEIGHTS))
    hub.heal()
    hub.fail("/revision/main", 404, body=b'"no object"')
    assert "HTTP 404" in refused(wanted(WEIGHTS), '"no object"')


# Mirrors that call a file otherwise


def test_a_hub_may_call_a_file_of_known_hash_otherwise(hub: Hub) -> None:
    hub.add_repo("owner/mirror", {"clip/vit.pt": BODY, "README.md": b"read me\n"}, lfs=1000)
    at = "hf://owner/mirror@main"
    record = fetch(Download(at=[at], licence="MIT", files={"ViT-L-14.pt": sha256(BODY)}), Path("out"))
    assert files(Path("out")) == {"ViT-L-14.pt": BODY}
    assert record["files"]["ViT-L-14.pt"]["verified"] == "params"
    shutil.rmtree("out")
    refused(
        wanted("ViT-L-14.pt", at=at),
        "found no file ViT-L-14.pt there; it has for instance README.md, clip/vit.pt",
    )


def test_an_address_may_be_the_file_s_own(hub: Hub) -> None:
    hub.add_files("/clip", {"vit.pt": BODY, "other.pt": BODY[:-1]})
    fetch(pinned(f"{hub.endpoint}/clip/vit.pt", "ViT-L-14.pt", BODY), Path("out"))
    assert files(Path("out")) == {"ViT-L-14.pt": BODY}
    shutil.rmtree("out")
    refused(pinned(f"{hub.endpoint}/clip/other.pt", "ViT-L-14.pt", BODY), "other bytes than stated")
    refused(
        wanted("ViT-L-14.pt", at=f"{hub.endpoint}/clip/vit.pt"), "vit.pt/ViT-L-14.pt: "
    )  # nothing would vouch for it


# What the client reads by itself


ASK = """
import time
time.sleep = lambda seconds: None  # between the tries
from pathlib import Path
from pipeline.data.downloads import fetch
from pipeline.sections.download import Download
from pipeline.core.stages import UserError
try:
    fetch(Download(at=["hf://owner/model@main", "hf://owner/model@main"], licence="MIT", match=["unet/*"]), Path("out"))
    print("came")
except UserError as error:
    print(error)
"""


def asked_with(hub: Hub, folder: Path, **settings: str) -> str:
    """What a process says that fetches with these settings."""
    names = {name.upper() for name in downloads.SETTINGS} | {"NO_PROXY"}
    env = {name: value for name, value in os.environ.items() if name.upper() not in names}
    env |= {"HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, env=env | settings, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"ALL_PROXY": "socks5://user:secret@127.0.0.1:1080"},
        {"HTTPS_PROXY": "http://proxy:port"},
        {"https_proxy": "ftp://proxy:80"},
        {"SSL_CERT_FILE": "/nowhere/ca.pem"},
        {"SSL_CERT_FILE": "/etc/hostname"},
    ],
)  # fmt: skip
def test_settings_that_make_no_client_are_named(hub: Hub, tmp_path: Path, settings: dict[str, str]) -> None:
    ((name, value),) = settings.items()
    said = asked_with(hub, tmp_path, **settings)
    assert f"nothing can be fetched with these settings: {name}={value.replace('user:secret', '…')} (" in said
    assert "socksio" in said
    assert "Correct or unset them." in said


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["netrc", "REQUESTS_CA_BUNDLE", "NO_PROXY"])
def test_settings_that_are_none_of_ours_do_no_harm(hub: Hub, tmp_path: Path, settings: str) -> None:
    (tmp_path / ".netrc").write_text("nonsense here\nmachine")
    given = {
        "netrc": {"HOME": str(tmp_path), "NETRC": str(tmp_path / ".netrc")},
        "REQUESTS_CA_BUNDLE": {"REQUESTS_CA_BUNDLE": "/nowhere", "CURL_CA_BUNDLE": "/nowhere"},
        "NO_PROXY": {"NO_PROXY": "[::1,*,", "ALL_PROXY": "http://127.0.0.1:9"},
    }[settings]
    assert asked_with(hub, tmp_path, **given).endswith("came\n")


@pytest.mark.slow
def test_a_proxy_that_does_not_answer_is_named_without_its_password(hub: Hub, tmp_path: Path) -> None:
    said = asked_with(hub, tmp_path, HTTP_PROXY="http://user:secret@127.0.0.1:9")
    assert re.search(r"ConnectError: .* \(with HTTP_PROXY=http://…@127\.0\.0\.1:9\)", said), said
    assert "secret" not in said


# Bodies that break


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_cut_body_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch, reset: bool) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # http_get's own, of a second
    hub.cut(WEIGHTS, after_bytes=5000, reset=reset)
    fetch(wanted(WEIGHTS), Path("out"))
    assert files(Path("out")) == {WEIGHTS: BODY}
    first, second = gets(hub, WEIGHTS)
    assert first is None
    if not reset:  # what is on the way is lost with a reset connection, more or less of it
        assert second == "bytes=4096-"  # whole pieces are written


def test_a_body_that_never_comes(hub: Hub) -> None:
    hub.cut(WEIGHTS, after_bytes=0, times=1000)
    refused(wanted(WEIGHTS), "RemoteProtocolError", f"0 of its {len(BODY)} bytes")
    assert len(gets(hub, WEIGHTS)) == downloads.TRIES  # not times those of http_get


@pytest.mark.parametrize(("piece", "comes"), [(1024, True), (0, False)])
def test_a_bad_connection_is_tried_on_as_long_as_it_makes_progress(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, piece: int, comes: bool
) -> None:
    asked = []

    def http_get(url: str, file: BinaryIO, *, resume_size: int, **_: object) -> None:
        asked.append(resume_size)
        file.write(BODY[resume_size : resume_size + piece])
        raise downloads.httpx2.ReadError("reset")

    monkeypatch.setattr(downloads, "http_get", http_get)
    if comes:
        fetch(wanted(WEIGHTS), Path("out"))
        assert files(Path("out")) == {WEIGHTS: BODY}
        assert asked == list(range(0, len(BODY), 1024))
    else:
        refused(wanted(WEIGHTS), "ReadError: reset")
        assert len(asked) == downloads.TRIES


def test_the_bar_takes_back_what_is_thrown_away(hub: Hub) -> None:
    hub.add_files("/folder", {"weights.pt": BODY[:5000]})
    remote = downloads.Remote("weights.pt", f"{hub.endpoint}/folder/weights.pt", len(BODY), None, None)
    steps: list[int] = []
    with pytest.raises(UserError, match="the body has 5000 bytes where 10240 were stated"):
        downloads._get(remote, Path("partial"), {}, SimpleNamespace(update=steps.append))
    assert steps.count(-5000) == downloads.TRIES
    assert sum(steps) == Path("partial").stat().st_size == 0


def test_an_interrupted_fetch_goes_on_where_it_stopped(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    download = wanted("README.md", WEIGHTS)
    hub.cut(WEIGHTS, after_bytes=6000)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(download, Path("out"))
    assert not Path("out").exists()
    (scratch,) = downloads.SCRATCH.iterdir()
    assert files(scratch) == {"README.md": MODEL["README.md"], f"{WEIGHTS}.incomplete": BODY[: 5 * 1024]}

    capfd.readouterr()
    record = fetch(download, Path("out"))
    first, *_, last = capfd.readouterr().err.replace("\r", "\n").strip().split("\n")
    assert ("50%" in first, "100%" in last) == (True, True)
    assert files(Path("out")) == {name: MODEL[name] for name in ("README.md", WEIGHTS)}
    assert gets(hub, "README.md") == [None]
    assert gets(hub, WEIGHTS) == [None, "bytes=5120-"]
    assert record["files"]["README.md"]["sha256"] == sha256(MODEL["README.md"])
    assert not Path("data").exists()


def test_a_revision_that_moved_starts_anew(hub: Hub) -> None:
    hub.fail(f"resolve/{COMMIT}/{WEIGHTS}", 404)
    refused(wanted("README.md", WEIGHTS), "HTTP 404")  # README.md came
    hub.add_repo("owner/model", {**MODEL, "README.md": b"read it\n"}, revision="a" * 40, lfs=1000)
    fetch(wanted("README.md", WEIGHTS), Path("out"))
    assert files(Path("out")) == {"README.md": b"read it\n", WEIGHTS: BODY}


def test_a_wrong_beginning_is_found_and_the_next_run_is_well(hub: Hub) -> None:
    hub.missing(WEIGHTS)
    refused(wanted(WEIGHTS), "HTTP 404")
    (partial,) = Path("data").rglob("*.incomplete")
    partial.write_bytes(bytes(3000))
    hub.heal()
    refused(wanted(WEIGHTS), "other bytes than stated")
    fetch(wanted(WEIGHTS), Path("out"))
    assert files(Path("out")) == {WEIGHTS: BODY}
    assert gets(hub, WEIGHTS) == [None, "bytes=3000-", None]


# The disk


def test_too_little_space_is_told_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, len(BODY) - 1))
    refused(wanted(WEIGHTS), "0.000 GB are still to be fetched", "free", "Make room")
    assert gets(hub, WEIGHTS) == []
    assert not Path("data").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, len(BODY)))
    fetch(wanted(WEIGHTS), Path("out"))


def test_only_what_is_still_to_come_needs_space(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.missing(WEIGHTS)
    refused(wanted(WEIGHTS, "README.md"))
    hub.heal()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, len(BODY)))
    fetch(wanted(WEIGHTS, "README.md"), Path("out"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk(hub: Hub) -> None:
    hub.missing(WEIGHTS)
    refused(wanted(WEIGHTS, "README.md"))
    (partial,) = Path("data").rglob("*.incomplete")
    partial.unlink()
    partial.symlink_to("/dev/full")
    hub.heal()
    refused(wanted(WEIGHTS, "README.md"), str(partial), "No space left on device", "It takes 0.000 GB", "free there")
    assert [path.name for path in Path("data").rglob("*") if not path.is_dir()] == ["README.md"]
    assert Path("/dev/full").is_char_device()
    fetch(wanted(WEIGHTS, "README.md"), Path("out"))
    assert files(Path("out")) == {name: MODEL[name] for name in ("README.md", WEIGHTS)}


def test_a_limit_of_the_file_size(hub: Hub) -> None:
    data = BODY * 200  # 2 MB, more than any other file that this process writes now
    hub.add_files("/folder", {"weights.pt": data})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        refused(pinned(f"{hub.endpoint}/folder", "weights.pt", data), "weights.pt.incomplete", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not Path("data").exists()


def test_a_failure_to_move_leaves_no_part(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", move)
        refused(wanted(WEIGHTS), "out/unet/weights.bin", "No space left on device")
    fetch(wanted(WEIGHTS), Path("out"))
    assert gets(hub, WEIGHTS) == [None]  # it had been kept


# A process of its own, and the test's hub itself


@pytest.mark.slow
def test_hf_endpoint_is_honoured_and_a_log_file_gets_few_lines(hub: Hub, tmp_path: Path) -> None:
    code = """if True:
        import json
        from pathlib import Path
        from pipeline.data.downloads import fetch
        from pipeline.sections.download import Download
        download = Download(at=["hf://owner/model@main"], licence="MIT", match=["unet/*"])
        print(json.dumps(fetch(download, Path("out"))))
    """
    root = Path(__file__).parents[1]
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert record["files"].keys() == files(tmp_path / "out").keys() == {WEIGHTS, "unet/config.json"}
    assert len(done.stderr.replace("\r", "\n").split("\n")) < 6
    assert "100%" in done.stderr


def test_the_hub_serves_its_own_client(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("owner/set", MODEL, kind="dataset", lfs=lambda path, size: path == WEIGHTS)
    options: dict[str, Any] = {"repo_type": "dataset", "revision": COMMIT[:7]}
    snapshot = huggingface_hub.snapshot_download("owner/set", cache_dir=tmp_path / "cache", **options)
    assert files(Path(snapshot)) == MODEL
    api = huggingface_hub.HfApi()
    (weights, folder) = api.get_paths_info("owner/set", [WEIGHTS, "unet", "no"], **options)
    assert weights.lfs.sha256 == sha256(BODY)
    assert [entry.path for entry in api.list_repo_tree("owner/set", **options)] == ["unet", "README.md"]
    below = api.list_repo_tree("owner/set", folder.path, **options)
    assert [entry.path for entry in below] == ["unet/config.json", WEIGHTS]
