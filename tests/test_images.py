"""The images stage: lists, img2dataset's runs checked, resumed and repacked, a mirror's shards, the stream."""

import bz2
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from shrunk import ROOT, read_yaml, run, write_yaml

from pipeline import images
from pipeline.benchmarks.sets import contents
from pipeline.core.outputs import atomic, remove, write_json
from pipeline.core.stages import UserError
from pipeline.data import links, shards
from pipeline.data.links import download
from pipeline.data.shards import Sample, Shards, Window
from pipeline.mini import images as mini_images
from pipeline.mini import world
from pipeline.sections.download import Download
from pipeline.sections.images import MiniImages
from pipeline.tools.index import index

OPTIONS = {"size": 64, "shard_size": 4, "min_success": 1.0, "retries": 0, "processes": 1, "threads": 1}
COUNTS = {"00000.tar": 16, "00001.tar": 16, "00002.tar": 8}
HANG = 1800  # seconds, which only a process that hangs will take


def table(captions: list[str], urls: list[str]) -> pyarrow.Table:
    """Links for img2dataset."""
    return pyarrow.table({"url": urls, "caption": captions})


def jpeg(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(world.image(mini_images.SET, index)[0]).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], mtime: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), mtime, "somebody"
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 16, 16 and 8 images, as download() leaves them."""
    for i, (name, count) in enumerate(COUNTS.items()):
        keys = [f"{i * 100 + j:07d}" for j in range(count)]
        members = [
            (f"{key}.{ext}", jpeg(int(key)) if ext == "jpg" else b"a fish") for key in keys for ext in ("jpg", "txt")
        ]
        write_tar(tmp_path / name, members)
    write_json(tmp_path / "shards.json", {"size": 64, "samples": 40, "shards": COUNTS})
    return tmp_path


def spoil(folder: Path, *keys: str) -> None:
    """Replace images of the first shard by bytes that are no image, or by half of one."""
    path = folder / "00000.tar"
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    for i, (name, data) in enumerate(members):
        if name.removesuffix(".jpg") in keys:
            members[i] = (name, data[: len(data) // 2] if i % 4 else b"no image")
    write_tar(path, members)


def samples_of(reader: Shards, seed: int, numbers: Iterable[int]) -> list[Sample]:
    return [reader.read(*reader.place(seed, number)) for number in numbers]


def epoch(reader: Shards, seed: int, number: int = 0) -> list[Sample]:
    """Every sample of an epoch, in its order."""
    return samples_of(reader, seed, range(number * len(reader), (number + 1) * len(reader)))


def keys(samples: Iterable[Sample], count: int | None = None) -> list[str]:
    return [sample.key for sample in itertools.islice(samples, count)]


# The order

VALIDATION = {"0000200", "0000201", "0000202"}


def test_every_epoch_holds_every_image_once_in_an_order_of_its_own(folder: Path) -> None:
    reader = Shards(folder)
    epochs = [keys(epoch(reader, 7, number)) for number in range(3)]
    everything = sorted(epochs[0])
    assert len(set(everything)) == len(reader) == 40
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != everything


def test_a_sample_is_a_pure_function_of_the_seed_and_its_number(folder: Path) -> None:
    """Whoever reads it, and in whatever order."""
    spoil(folder, "0000003")
    numbers = list(range(90))
    first = samples_of(Shards(folder, 0.1), 7, numbers)
    second = samples_of(Shards(folder, 0.1), 7, numbers[::-1])[::-1]
    assert keys(first) == keys(second)
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(first, second, strict=True))
    assert keys(samples_of(Shards(folder, 0.1), 8, numbers)) != keys(first)


def test_the_images_of_a_window_are_mixed_and_windows_are_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is read for a while lies in few files."""
    monkeypatch.setattr(shards, "WINDOW", 2)
    reader = Shards(folder)
    first = set()
    for number in range(8):
        order = [key[:5] for key in keys(epoch(reader, 7, number))]
        cut = next(i for i in range(1, 40) if not {*order[:i]} & {*order[i:]})
        windows = order[:cut], order[cut:]
        assert [len(set(window)) for window in windows] == [2, 1]
        assert len(list(itertools.groupby(windows[0]))) > 5
        first.add(windows[1][0])
    assert len(first) > 1  # the shards, too, have an order of their own


class Counting(list):
    """A list that counts how often an item is asked for."""

    asked = 0

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        return super().__getitem__(index)


def test_an_image_is_found_without_a_look_at_the_others_of_its_window() -> None:
    """A published window has some 100,000 images."""
    order, spare = Counting([3, 0, 2, 1]), Counting([1, 2, 3, 0])
    found = Window(["a", "b"], [2, 4], order, spare).candidates(0)
    assert next(found) == ("b", 1)
    assert (order.asked, spare.asked) == (1, 0)
    assert next(found) == ("a", 1)
    assert spare.asked == 1
    assert list(found) == [("b", 0), ("b", 1), ("a", 0)]


def test_a_window_is_opened_before_its_images_are_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, read = Shards(folder), list[str]()
    monkeypatch.setattr(shards, "_members", lambda tar, own=shards._members: read.append(tar.name) or own(tar))
    window, _ = reader.place(7, 0)
    reader.open(window)
    assert sorted(read) == sorted(window.shards) == list(COUNTS)
    epoch(reader, 7)
    assert len(read) == 3


def test_what_cannot_be_decoded_is_replaced_by_an_image_of_its_window(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "WINDOW", 1)
    whole = keys(epoch(Shards(folder), 7))
    spoil(folder, "0000003", "0000004")
    reader = Shards(folder, 0.2)
    found = keys(epoch(reader, 7))
    changed = {old: new for old, new in zip(whole, found, strict=True) if old != new}
    assert changed.keys() == {"0000003", "0000004"}
    assert all(new[:5] == "00000" for new in changed.values())
    assert reader.undecodable == {"00000.tar": {"0000003", "0000004"}}


def test_validation_images_are_outside_the_order(folder: Path) -> None:
    reader = Shards(folder, validation=3)
    kept = [Image.open(io.BytesIO(jpeg(i))).convert("RGB").tobytes() for i in (200, 201, 202)]
    assert [image.tobytes() for image in reader.validation()] == kept
    seen = [key for number in range(2) for key in keys(epoch(reader, 7, number))]
    assert sorted(seen) == sorted(2 * [key for key in keys(epoch(Shards(folder), 7)) if key not in VALIDATION])
    with pytest.raises(UserError, match=r"00002\.tar has 8 images, of which 8 are kept for validation"):
        Shards(folder, validation=8)


def test_key_and_image_belong_together_and_grey_becomes_rgb(folder: Path) -> None:
    grey = io.BytesIO()
    Image.new("L", (64, 48), 128).save(grey, "JPEG")
    write_tar(folder / "00002.tar", [("0000200.jpg", grey.getvalue()), ("0000200.txt", b"")])
    write_json(folder / "shards.json", {"size": 64, "samples": 33, "shards": {**COUNTS, "00002.tar": 1}})
    found = {sample.key: sample.image for sample in epoch(Shards(folder), 0)}
    assert (found["0000200"].mode, found["0000200"].size) == ("RGB", (64, 48))
    for key in ("0000003", "0000115"):
        assert found[key].tobytes() == Image.open(io.BytesIO(jpeg(int(key)))).convert("RGB").tobytes()


def test_truncated_inside_a_member(folder: Path) -> None:
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[: 512 + 700])
    with pytest.raises(UserError, match=r"00001\.tar cannot be read.*--force \S+:input@images"):
        epoch(Shards(folder), 0)


@pytest.mark.parametrize("member", ["0000108.jpg", "0000108.txt"])
def test_truncated_between_members(folder: Path, member: str) -> None:
    path = folder / "00001.tar"
    with tarfile.open(path) as tar:
        end = tar.getmember(member).offset
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(UserError, match=r"00001\.tar cannot be read.*--force \S+:input@images"):
        epoch(Shards(folder), 0)


def test_a_shard_in_the_place_of_another(folder: Path) -> None:
    shutil.copy(folder / "00002.tar", folder / "00001.tar")
    with pytest.raises(
        UserError,
        match=r"00001\.tar holds 8 images, 8 of .* where shards\.json says 16 and 16.*--force \S+:input@images",
    ):
        epoch(Shards(folder), 0)


def test_damaged_header_and_missing_tar(folder: Path) -> None:
    path = folder / "00001.tar"
    with tarfile.open(path) as tar:
        start = tar.getmember("0000108.jpg").offset
    data = bytearray(path.read_bytes())
    data[start : start + 512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"00001\.tar.*--force \S+:input@images"):
        epoch(Shards(folder), 0)
    path.unlink()
    with pytest.raises(UserError, match=r"00001\.tar.*--force \S+:input@images"):
        epoch(Shards(folder), 0)


def test_undecodable_images_are_counted_once_up_to_the_share(folder: Path) -> None:
    spoil(folder, "0000003", "0000004")
    reader = Shards(folder, max_undecodable=2 / 16)
    assert len([*epoch(reader, 0), *epoch(reader, 0, 1)]) == 80
    assert reader.undecodable == {"00000.tar": {"0000003", "0000004"}}
    with pytest.raises(UserError, match=r"00000\.tar: 2 of its 16 images cannot be decoded.*one is 000000[34]"):
        epoch(Shards(folder, max_undecodable=1 / 16), 0)


def test_a_folder_of_which_nothing_can_be_decoded_is_told_whatever_is_allowed(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.jpg", b"none"), ("1.jpg", b"none")])
    shards.index(tmp_path, 512)
    with pytest.raises(UserError, match=r"no image of 0\.tar can be decoded"):
        epoch(Shards(tmp_path, max_undecodable=1.0), 0)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "has no shards.json"),
        ("{", "damaged"),
        ('{"size": 64}', "damaged"),
        ("[]", "damaged"),
        ('{"size": 64, "samples": 0, "shards": {}}', "samples: found 0"),
        (json.dumps({"size": 64, "samples": 41, "shards": COUNTS}), "do not add up"),
    ],
)
def test_missing_or_damaged_index(folder: Path, index: str | None, message: str) -> None:
    path = folder / "shards.json"
    path.unlink() if index is None else path.write_text(index)
    with pytest.raises(UserError, match=message):
        Shards(folder)


# The download


def test_repacked_bytes_depend_on_the_members_alone(tmp_path: Path) -> None:
    members = [(f"{i:07d}.{ext}", f"{i} {ext}".encode()) for i in range(5) for ext in ("jpg", "txt", "json")]
    write_tar(tmp_path / "a.tar", members, mtime=1)
    shuffled = [(name, b"other" if name.endswith("json") else data) for name, data in reversed(members)]
    write_tar(tmp_path / "b.tar", shuffled, mtime=2)
    assert [links._repack(tmp_path / f"{x}.tar", tmp_path / f"{x}2.tar") for x in "ab"] == [5, 5]
    assert (tmp_path / "a2.tar").read_bytes() == (tmp_path / "b2.tar").read_bytes()
    with tarfile.open(tmp_path / "a2.tar") as tar:
        assert tar.getnames() == [name for name, _ in members if not name.endswith("json")]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_name_the_object_of_their_image_and_in_a_share_of_them_details(share: float) -> None:
    captions = [mini_images.caption(i, share) for i in range(400)]
    for i in range(20):
        assert captions[i].startswith(world.caption(world.image(mini_images.SET, i)[1], ()))
    detailed = sum(len(text.split()) > 5 for text in captions)  # "a photo of a fish" has five words
    assert detailed / 400 == pytest.approx(0.9 * share, abs=0.06)  # one number of details in ten is 0


def stats(scratch: Path, name: str, count: int, successes: int, reasons: dict[str, int]) -> None:
    status = {"success": successes, **reasons}
    path = scratch / "shards" / f"{name}_stats.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"count": count, "successes": successes, "status_dict": status})


def test_unfinished_runs_are_told(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("No space left on device")
    names = ["00000", "00001"]
    stats(tmp_path, "00000", 16, 13, {"HTTP Error 404: Not Found": 2})
    with pytest.raises(UserError, match=r"(?s)1 of 2 shards and 16 of 20 rows.*No space left"):
        links._checked(tmp_path, names, 20)
    (tmp_path / "shards" / "00001_stats.json").write_text('{"count": 4')  # img2dataset was killed while it wrote
    with pytest.raises(UserError, match="1 of 2 shards and 16 of 20 rows"):
        links._checked(tmp_path, names, 20)
    stats(tmp_path, "00001", 3, 0, {})
    with pytest.raises(UserError, match="2 of 2 shards and 19 of 20 rows"):
        links._checked(tmp_path, names, 20)
    stats(tmp_path, "00001", 4, 0, {"timed out": 4})
    successes, reasons = links._checked(tmp_path, names, 20)
    assert successes == {"00000": 13}
    assert reasons == {"HTTP Error 404: Not Found": 2, "no reason given": 1, "timed out": 4}


def test_rare_reasons_are_put_together() -> None:
    reasons = Counter({f"reason {i:02d}": 30 - i for i in range(24)})
    found = shards.most_frequent(reasons, "other reasons")
    assert list(found) == [f"reason {i:02d}" for i in range(20)] + ["other reasons"]
    assert found["other reasons"] == 10 + 9 + 8 + 7
    assert shards.most_frequent(Counter(b=1, a=1), "others") == {"a": 1, "b": 1}


class Web:
    """Stands for img2dataset and the web in one: `down` are the URLs that fail, `asked` those that were asked for.

    Of those in `lost` img2dataset's own code fails, after which it has neither a row nor a reason for them.
    """

    def __init__(self) -> None:
        self.down: set[str] = set()
        self.lost: set[str] = set()
        self.asked: list[str] = []

    def run(self, options: dict, log: Path, total: int) -> None:
        self.workers = options["processes_count"], options["thread_count"]
        folder, size, number = Path(options["output_folder"]), options["number_sample_per_shard"], 0
        for path in sorted(Path(options["url_list"]).iterdir()):
            rows = pyarrow.parquet.read_table(path).to_pylist()
            for start in range(0, len(rows), size):
                name, number = f"{number:05d}", number + 1
                if not (folder / f"{name}_stats.json").exists():
                    self.make(folder, name, rows[start : start + size])
        assert number == total

    def make(self, folder: Path, name: str, rows: list[dict]) -> None:
        self.asked += [row["url"] for row in rows]
        members, outcome = [], {"row": [], "status": []}
        for i, row in enumerate(rows):
            if row["url"] in self.lost:
                continue
            outcome["row"].append(row["row"])
            outcome["status"].append("failed_to_download" if row["url"] in self.down else "success")
            if row["url"] not in self.down:
                content = {"jpg": row["url"], "txt": row["caption"], "json": "{}"}
                members += [(f"{name}{i}.{ext}", text.encode()) for ext, text in content.items()]
        write_tar(folder / f"{name}.tar", members, mtime=1)
        pyarrow.parquet.write_table(pyarrow.table(outcome), folder / f"{name}.parquet")
        failed = outcome["status"].count("failed_to_download")
        stats(folder.parent, name, len(rows), len(members) // 3, {"gone": failed})


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Web:
    web = Web()
    monkeypatch.setattr(links, "_run", web.run)
    return web


def fetch(folder: Path, count: int = 10, **options) -> tuple[dict, dict[str, str]]:
    """download() of URLs 0..count-1, four to a shard. Returns its report, and the tar of each URL that came."""
    remove(folder / "out")
    urls = [str(i) for i in range(count)]
    wanted = table([f"image {i}" for i in urls], urls)
    report = download(wanted, folder / "out", folder / "scratch", **(OPTIONS | options))
    found, seen = {}, []
    for name in Shards(folder / "out").counts:
        for key, (offset, size), _ in Shards(folder / "out")._members(name):
            url = (folder / "out" / name).read_bytes()[offset : offset + size]
            found[url.decode()] = name
            seen.append(key)
        with tarfile.open(folder / "out" / name) as tar:
            assert not any(member.mtime or member.name.endswith("json") for member in tar)
    assert len(seen) == len(set(seen)) == report["downloaded"]
    return report, found


def test_rounds_ask_for_what_failed_and_number_on(web: Web, tmp_path: Path) -> None:
    web.down = {"1", "5", "6", "7", "8", "9"}
    with pytest.raises(UserError, match=r"(?s)4 of 10 images came \(40\.0%\).*min_success = 50\.0%.*6  gone"):
        fetch(tmp_path, min_success=0.5)
    assert web.asked == [str(i) for i in range(10)]
    assert not (tmp_path / "out").exists()

    web.down -= {"6"}
    report, found = fetch(tmp_path, min_success=0.5)  # too little had come, so what failed is asked for once more
    assert web.asked[10:] == ["1", "5", "6", "7", "8", "9"]
    assert report == {"urls": 10, "downloaded": 5, "success_rate": 0.5, "failures": {"gone": 5}}
    assert found == {"0": "00000.tar", "2": "00000.tar", "3": "00000.tar", "4": "00001.tar", "6": "00003.tar"}

    web.down -= {"9"}
    report, found = fetch(tmp_path, min_success=0.5, retries=3)
    assert web.asked[16:] == ["1", "5", "7", "8", "9", "1", "5", "7", "8"]
    rounds = [(10, 4), (6, 1), (5, 1), (4, 0)]
    assert report["rounds"] == [{"urls": urls, "downloaded": downloaded} for urls, downloaded in rounds]
    assert (report["downloaded"], report["failures"]) == (6, {"gone": 4})
    assert found["9"] == "00006.tar"

    web.down, everything = set(), list(web.asked)
    assert fetch(tmp_path, min_success=0.5, retries=3)[0] == report  # all is there
    assert fetch(tmp_path, min_success=0.2)[0]["downloaded"] == 4
    assert web.asked == everything
    report, _ = fetch(tmp_path, min_success=1.0, retries=9)
    assert web.asked[len(everything) :] == ["1", "5", "7", "8"]  # and no round once all have come
    assert (report["success_rate"], report["failures"], len(report["rounds"])) == (1.0, {}, 5)


def test_nothing_is_never_enough(web: Web, tmp_path: Path) -> None:
    web.down = {str(i) for i in range(10)}
    with pytest.raises(UserError, match="0 of 10 images came"):
        fetch(tmp_path, min_success=0.0)


@pytest.mark.slow
def test_other_links_or_options_start_anew(web: Web, tmp_path: Path) -> None:
    fetch(tmp_path)
    assert web.workers == (1, 1)
    for count, options in ((10, {"size": 65}), (10, {"size": 65, "shard_size": 3}), (9, {})):
        web.asked.clear()
        fetch(tmp_path, count, **options, processes=2, threads=3)
        assert web.asked == [str(i) for i in range(count)]
        fetch(tmp_path, count, **options, retries=1)
        assert len(web.asked) == count
    assert web.workers == (2, 3)
    for captions, urls in (("abc", "123"), ("abd", "123"), ("abd", "124")):
        web.asked.clear()
        shutil.rmtree(tmp_path / "out")
        download(table(list(captions), list(urls)), tmp_path / "out", tmp_path / "scratch", **OPTIONS)
        assert web.asked == list(urls)


@pytest.mark.parametrize("damage", ["a member is missing", "cut", "no tar"])
def test_a_damaged_shard_is_made_anew_and_what_followed_it(web: Web, tmp_path: Path, damage: str) -> None:
    web.down = {"3", "9"}
    fetch(tmp_path, retries=1, min_success=0.5)
    tar = tmp_path / "scratch" / "shards" / "00001.tar"
    content = tar.read_bytes()
    tar.unlink()  # it shares its bytes with the output
    if damage == "a member is missing":
        write_tar(tar, [("000010.jpg", b"4"), ("000010.txt", b"")])
    else:
        tar.write_bytes(content[:700] if damage == "cut" else b"")
    web.asked.clear()
    with pytest.raises(UserError, match=r"reports 4 images in .*00001\.tar, but the file holds \d\. Run again"):
        fetch(tmp_path, retries=1, min_success=0.5)
    assert web.asked == []
    web.down = {"5", "9"}
    report, found = fetch(tmp_path, retries=1, min_success=0.5)
    assert web.asked == ["4", "5", "6", "7", "3", "5", "9"]
    assert report["rounds"] == [{"urls": 10, "downloaded": 7}, {"urls": 3, "downloaded": 1}]
    assert (len(found), found["3"]) == (8, "00003.tar")


def test_links_that_img2dataset_lost_sight_of_are_asked_for_again(web: Web, tmp_path: Path) -> None:
    web.lost = {"2"}
    with pytest.raises(UserError, match=r"9 of 10 images came .*\n +1  no reason given"):
        fetch(tmp_path)
    web.lost = set()
    assert fetch(tmp_path)[0]["downloaded"] == 10
    assert web.asked[10:] == ["2"]


def test_where_the_file_system_has_no_hard_links_shards_are_copied(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(tmp_path)
    linked = (tmp_path / "out" / "00000.tar").read_bytes()
    assert (tmp_path / "out" / "00000.tar").stat().st_nlink == 2

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    fetch(tmp_path)
    assert (tmp_path / "out" / "00000.tar").stat().st_nlink == 1
    assert (tmp_path / "out" / "00000.tar").read_bytes() == linked


# The list


LINES = {  # caption -> URL's path
    "a fish": "jpeg",
    '"a quotation begins': "grey",
    'a fish 5" long': "cmyk",
    "NA": "rgba",
    "null": "big",
    "naïve 雪, and a comma": "tiny",
    "": "missing",
    "a page": "html",
    "a banner": "banner",
    "patience": "flaky",
}


def write_tsv(path: Path, address: str = "http://host") -> None:
    path.write_text("".join(f"{caption}\t{address}/{url}\n" for caption, url in LINES.items()), encoding="utf-8")


def test_the_list_is_read_as_it_is(tmp_path: Path) -> None:
    tsv = tmp_path / "list.tsv"
    write_tsv(tsv)
    table = images.read_links(tsv, len(LINES))
    assert table["caption"].to_pylist() == list(LINES)
    assert table["url"].to_pylist() == [f"http://host/{url}" for url in LINES.values()]
    tsv.write_bytes(tsv.read_bytes().replace(b"\n", b"\r\n"))
    assert images.read_links(tsv, len(LINES)) == table
    tsv.write_bytes(b"\xef\xbb\xbf" + tsv.read_bytes())
    assert images.read_links(tsv, len(LINES)) == table


def test_a_missing_list_and_another_number_of_lines(tmp_path: Path) -> None:
    tsv = tmp_path / "list.tsv"
    with pytest.raises(UserError, match=r"list\.tsv: no such file.*consent.*ai\.google\.com/research/Conc.*links\.tsv"):
        images.read_links(tsv, 10)
    write_tsv(tsv)
    with pytest.raises(UserError, match=r"found 10 lines, wanted images\.links\.rows = 11\..*set rows to 10"):
        images.read_links(tsv, 11)


@pytest.mark.parametrize("line", [b"a\tb\thttp://host/c", b"http://host/c", b"", b"caf\xe9\thttp://host/c"])
def test_a_line_of_another_form(tmp_path: Path, line: bytes) -> None:
    tsv = tmp_path / "list.tsv"
    tsv.write_bytes(b"a fish\thttp://host/a\n" * 4 + line + b"\n" + b"a fish\thttp://host/a\n" * 4)
    found = re.escape(repr(line + b"\n"))
    with pytest.raises(UserError, match=rf"list\.tsv, line 5: found {found}, wanted a caption"):
        images.read_links(tsv, 9)


# Shards that somebody else made


def write_mirror(folder: Path) -> None:
    """Two tars as the mirror has them, in two folders, with keys of their own."""
    for i, name in enumerate(("train-0000.tar", "more/train-0001.tar")):
        members = [
            (f"{j:09d}.{ext}", jpeg(10 * i + j) if ext == "jpg" else b"{}")
            for j in range(3 + i) for ext in ("jpg", "json", "txt")
        ]  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(
            folder / name, [*members, ("000000900.jpg", jpeg(0)), ("000000901.txt", b"an image or a caption lacks")]
        )


def test_a_mirrors_shards_are_counted_and_left_as_they_are(tmp_path: Path) -> None:
    write_mirror(tmp_path)
    before = [path.read_bytes() for path in sorted(tmp_path.rglob("*.tar"))]
    counts = {"shards": 2, "images": 9, "captioned": 7, "other_files": {".json": 7, ".txt": 2}}
    assert shards.index(tmp_path, 512) == counts
    assert [path.read_bytes() for path in sorted(tmp_path.rglob("*.tar"))] == before
    for captioned, (first, second), own in ((False, (5, 4), [0, 0]), (True, (4, 3), [])):
        reader = Shards(tmp_path, captioned=captioned)
        assert (reader.size, reader.counts) == (512, {"more/train-0001.tar": first, "train-0000.tar": second})
        found = sorted(sample.image.tobytes() for sample in epoch(reader, 0))
        wanted = [jpeg(i) for i in (0, 1, 2, 10, 11, 12, 13, *own)]
        assert found == sorted(Image.open(io.BytesIO(data)).convert("RGB").tobytes() for data in wanted)


def index_of(folder: Path, members: list[tuple[str, bytes]]) -> tuple[dict, list[Sample]]:
    """What the index counts of a tar, and its samples in the order of their keys."""
    folder.mkdir()
    write_tar(folder / "0.tar", members)
    counts = shards.index(folder, 512)
    assert counts.pop("shards") == 1
    return counts, sorted(epoch(Shards(folder), 0), key=lambda sample: sample.key)


@pytest.mark.parametrize(
    "endings", [["jpg", "JPG", "JPG"], ["jpg", "jpeg", "png"], ["JPG"] * 3, ["webp", "PNG", "Jpeg"]]
)
def test_images_are_images_however_their_tools_name_them(tmp_path: Path, endings: list[str]) -> None:
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
    encoded = [encode("RGB", (64, 64), (80 * i, 0, 0), kinds[ending.lower()]) for i, ending in enumerate(endings)]
    members = [
        member for i, ending in enumerate(endings)
        for member in ((f"a.b/{i}.{ending}", encoded[i]), (f"a.b/{i}.TXT", b"%d" % i), (f"a.b/._{i}.{ending}", b"Mac"))
    ]  # fmt: skip
    counts, samples = index_of(tmp_path / "shards", members)
    assert (counts["images"], counts["captioned"]) == (3, 3)
    assert sum(counts["other_files"].values()) == 3
    assert [(sample.key, sample.caption) for sample in samples] == [(f"a.b/{i}", str(i)) for i in range(3)]
    assert [abs(sample.image.getpixel((5, 5))[0] - 80 * i) < 8 for i, sample in enumerate(samples)] == [True] * 3


def test_what_is_no_image_that_is_known_is_counted_by_its_ending(tmp_path: Path) -> None:
    files = ("1.jpg", "1.seg.png", "1.png", "1.txt", "2.heic", "2.txt", "3.jpg", "3.json", "README")
    counts, samples = index_of(tmp_path / "shards", [(name, jpeg(0)) for name in files])
    others = {".seg.png": 1, ".png": 1, ".heic": 1, ".txt": 1, ".json": 1, "without an ending, or no files": 1}
    assert counts == {"images": 2, "captioned": 1, "other_files": dict(sorted(others.items()))}
    assert [(sample.key, bool(sample.caption)) for sample in samples] == [("1", True), ("3", False)]


def test_a_mirrors_endings_are_told_in_letters_and_few_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names may be in any encoding, and have a number after each dot."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name in ("1.jpg", "1.caf\xe9", *(f"{i}.v{i}.json" for i in range(100))):
            tar.addfile(tarfile.TarInfo(name))
    monkeypatch.setattr(images.downloads, "fetch", lambda source, folder: {})
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    others = images.mirror(Download(at=["https://host"], licence="MIT", files={"a.tar": None}), tmp_path)["other_files"]
    stdout.flush()
    assert len(others) == 21
    assert others[".caf\\udce9"] == 1
    assert others["other endings"] == 81
    assert b".caf\\udce9, " in stdout.buffer.getvalue()


def test_a_key_that_occurs_twice_has_two_images(tmp_path: Path) -> None:
    members = [
        ("a.jpg", jpeg(0)),
        ("a.txt", b"0"),
        ("b.jpg", jpeg(1)),
        ("b.txt", b"1"),
        ("a.jpg", jpeg(2)),
        ("a.txt", b"2"),
    ]
    counts, samples = index_of(tmp_path / "shards", members)
    assert counts == {"images": 3, "captioned": 3, "other_files": {}}
    assert [(sample.key, sample.caption) for sample in samples] == [("a", "0"), ("a#1", "2"), ("b", "1")]
    for sample in samples:
        assert sample.image.tobytes() == Image.open(io.BytesIO(jpeg(int(sample.caption)))).tobytes()
    counts, samples = index_of(tmp_path / "one caption", [*members[:5]])
    assert counts == {"images": 3, "captioned": 1, "other_files": {".txt": 1}}  # whose is it?
    assert [(sample.key, sample.caption) for sample in samples] == [("a", ""), ("a#1", ""), ("b", "1")]


@pytest.mark.parametrize(
    ("name", "pack"),
    [("0.tar.gz", gzip.compress), ("0.tgz", gzip.compress), ("0.tar", gzip.compress), ("0.tar.bz2", bz2.compress),
     ("0.tar.xz", lzma.compress), ("0.tar.gz", bytes), ("0.TAR", bytes), ("0.tar.GZ", gzip.compress),
     ("0.tbz2", bz2.compress)],
)  # fmt: skip
def test_compressed_tars_are_unpacked(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    write_mirror(tmp_path)
    counts, tar = shards.index(tmp_path, 512), tmp_path / "train-0000.tar"
    plain = tar.read_bytes()
    tar.unlink()
    (tmp_path / name).write_bytes(pack(plain))
    assert shards.index(tmp_path, 512) == counts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "more", "shards.json"]
    assert (tmp_path / "0.tar").read_bytes() == plain
    assert len(epoch(Shards(tmp_path), 0)) == 9


@pytest.mark.parametrize("ending", ["md5", "sha256", "sha512sum", "json", "idx", "asc"])
def test_what_is_about_a_tar_is_none(tmp_path: Path, ending: str) -> None:
    write_mirror(tmp_path)
    (tmp_path / f"train-0000.tar.{ending}").write_text("0" * 32)
    assert shards.index(tmp_path, 512)["shards"] == 2
    assert (tmp_path / f"train-0000.tar.{ending}").is_file()


def test_compressed_tars_that_cannot_be_unpacked_are_told(tmp_path: Path) -> None:
    write_mirror(tmp_path)
    packed = gzip.compress((tmp_path / "train-0000.tar").read_bytes())
    for name, content, message in (
        ("0.tar.gz", packed[:2000], r"0\.tar\.gz cannot be unpacked \(EOFError.*another mirror"),
        ("0.tar.gz", b"\x1f\x8b" + bytes(50), r"0\.tar\.gz cannot be unpacked \(BadGzipFile.*another mirror"),
        ("0.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(50), r"0\.tar\.zst is packed by zstd.*plain tars"),
        ("train-0000.tar.gz", packed, r"train-0000\.tar and .*gz are the same shard twice\. Leave one of them out"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            shards.index(tmp_path, 512)
        (tmp_path / name).unlink()


def test_a_recipe_that_reads_captions_needs_some(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1))])
    assert shards.index(tmp_path, 512)["captioned"] == 0
    assert [sample.caption for sample in epoch(Shards(tmp_path), 0)] == ["", ""]
    with pytest.raises(UserError, match=r"none of its 1 shards has an image with a caption.*run\.recipes"):
        Shards(tmp_path, captioned=True)


def test_an_image_that_claims_ten_thousand_million_pixels_is_passed_over(tmp_path: Path) -> None:
    members = [(f"{i}.jpg", b"P6 100000 100000 255\n" if i == 5 else jpeg(i)) for i in range(100)]
    index_of(tmp_path / "shards", members)
    reader = Shards(tmp_path / "shards")
    assert "5" not in keys(epoch(reader, 0))
    assert reader.undecodable == {"0.tar": {"5"}}


def test_images_on_their_side_are_put_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = io.BytesIO()
    Image.new("RGB", (64, 48)).save(lying, "JPEG", exif=exif)
    _, (sample,) = index_of(tmp_path / "shards", [("0.jpg", lying.getvalue())])
    assert sample.image.size == (48, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no \*\.tar file, but nothing at all"),
        (b"<html>Sign in</html>", r"b\.tar cannot be read .*\. Choose another mirror"),
        (b"", r"b\.tar cannot be read .*\. Choose another mirror"),
        ([("1.heic", b""), ("1.txt", b"")], r"b\.tar has no image .*, but 1 \.heic, 1 \.txt\. Choose another mirror"),
    ],
)
def test_what_is_no_folder_of_shards(tmp_path: Path, content, message: str) -> None:
    if content is not None:
        write_tar(tmp_path / "a.tar", [("1.jpg", b""), ("1.txt", b"")])
    if isinstance(content, list):
        write_tar(tmp_path / "b.tar", content)
    elif content is not None:
        (tmp_path / "b.tar").write_bytes(content)
    with pytest.raises(UserError, match=message):
        shards.index(tmp_path, 512)
    assert not (tmp_path / "shards.json").exists()


NOT_WHOLE = {  # what is left of a tar; start and end: of its second member, and of its last; what is said of it
    "cut between members": (lambda tar, start, end: tar[:start], "cut or damaged"),
    "cut in a header": (lambda tar, start, end: tar[: start + 100], "cut or damaged"),
    "cut in a member": (lambda tar, start, end: tar[: start + 1000], "unexpected end of data"),
    "cut at the end": (lambda tar, start, end: tar[:end], "cut or damaged"),
    "cut in the end": (lambda tar, start, end: tar[: end + 512], "cut or damaged"),
    "a damaged header": (lambda tar, start, end: tar[:start] + b"\xff" * 512 + tar[start + 512 :], "cut or damaged"),
    "a zeroed header": (lambda tar, start, end: tar[:start] + bytes(512) + tar[start + 512 :], "more follows its end"),
    "zeros after a member": (lambda tar, start, end: tar[:start] + bytes(len(tar) - start), "was not finished"),
    "two in one file": (lambda tar, start, end: tar + tar, "more follows its end at byte"),
    "a letter at its end": (lambda tar, start, end: tar + b"x", "more follows its end at byte"),
}


def tar_in_three(path: Path) -> tuple[bytes, int, int]:
    """A tar, and where its second member starts and its last one ends."""
    write_tar(path, [(f"{i}.jpg", bytes(9000)) for i in range(3)])
    with tarfile.open(path) as tar:
        return path.read_bytes(), tar.getmembers()[1].offset, tar.offset


@pytest.mark.parametrize("damage", NOT_WHOLE)
def test_a_tar_that_is_not_whole_is_no_shorter_one(tmp_path: Path, damage: str) -> None:
    """Where a mirror's shards, those of an index, or a set come in."""
    tar = tmp_path / "a.tar"
    change, said = NOT_WHOLE[damage]
    tar.write_bytes(change(*tar_in_three(tar)))
    with pytest.raises(UserError, match=rf"a\.tar cannot be read \(ReadError: .*{said}.*Choose another mirror"):
        shards.index(tmp_path, 512)
    with pytest.raises(UserError, match=rf"a\.tar cannot be read \(ReadError: .*{said}.*move it out of"):
        index(tmp_path, "s3://bucket", 512)
    with pytest.raises(ValueError, match=rf"a\.tar cannot be read \(.*{said}"):
        contents(tar)
    with pytest.raises(tarfile.ReadError, match=said):
        links._repack(tar, tmp_path / "repacked.tar")
    tar.rename(tmp_path / "packed")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "packed").read_bytes()))
    with pytest.raises(UserError, match=rf"a\.tar cannot be read \(ReadError: .*{said}.*Choose another mirror"):
        shards.index(tmp_path, 512)


@pytest.mark.parametrize("zeros", [1024, 1536, 10240, 10752])
def test_a_tar_may_end_in_a_record_of_zeros(tmp_path: Path, zeros: int) -> None:
    tar = tmp_path / "a.tar"
    content, _, end = tar_in_three(tar)
    tar.write_bytes(content[:end] + bytes(zeros))
    assert list(contents(tar)) == ["0", "1", "2"]
    assert index(tmp_path, "s3://bucket", 512)["samples"] == shards.index(tmp_path, 512)["images"] == 3


# The stage


class Server(ThreadingHTTPServer):
    """Serves `answers`, path -> bytes, and counts requests. flaky fails once; held... waits for `release`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.release = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.removeprefix("/")
        self.server.asked[path] += 1
        if path.startswith("held"):
            self.server.release.wait()
        body = self.server.answers.get(path)
        if body is None or (path == "flaky" and self.server.asked[path] < 2):
            self.send_error(404 if body is None else 503)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # whoever asked was killed
            self.wfile.write(b"" if self.command == "HEAD" else body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.release.set()
        server.shutdown()


def write_params(folder: Path, kind: str, **section) -> None:
    """params.yaml of the paper profile, with another section images.<kind>."""
    content = read_yaml(ROOT / "params.yaml")
    content["run"] |= {"profile": "paper", "backbones": ["openai_224"]}
    content["profiles"]["paper"]["images"] |= {"kind": kind, kind: section}
    write_yaml(folder / "params.yaml", content)


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_stage_takes_a_mirrors_shards(server: Server, working: Path) -> None:
    write_mirror(working / "mirror")
    names = ["train-0000.tar", "more/train-0001.tar"]
    server.answers = {name: (working / "mirror" / name).read_bytes() for name in names}
    write_params(working, "shards", at=[server.address], licence="none", files=dict.fromkeys(names))
    run(images)
    output = Path("data/paper/images")
    assert {name: (output / name).read_bytes() for name in names} == server.answers
    assert json.loads((output / "shards.json").read_text())["size"] == 512
    assert len(epoch(Shards(output), 0)) == 9
    report = json.loads(Path("metrics/paper/images.json").read_text())
    assert (report["shards"], report["images"], report["captioned"]) == (2, 9, 7)
    assert (report["source"]["address"], report["source"]["licence"]) == (server.address, "none")
    assert sorted(path.name for path in output.iterdir()) == ["more", "shards.json", "train-0000.tar"]


def write_list(folder: Path, server: Server, lines: dict[str, str], **section) -> None:
    text = "".join(f"{caption}\t{server.address}/{path}\n" for caption, path in lines.items())
    (folder / "list.tsv").write_text(text, encoding="utf-8")
    options = {"size": 64, "shard_size": 4, "min_success": 0.5, "retries": 0, "processes": 1, "threads": 4}
    write_params(folder, "links", tsv="list.tsv", rows=len(lines), **(options | section))


def encode(mode: str, size: tuple[int, int], color, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.slow
def test_the_stage_follows_a_list_with_everything_that_the_web_returns(
    server: Server, working: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = {
        "jpeg": encode("RGB", (80, 64), (0, 0, 255)),
        "grey": encode("L", (64, 70), 128),
        "cmyk": encode("CMYK", (64, 64), (0, 255, 255, 0)),  # red
        "rgba": encode("RGBA", (64, 64), (0, 0, 0, 0), "PNG"),  # nothing to be seen, on white
        "big": encode("RGB", (300, 200), (0, 255, 0)),
        "tiny": encode("RGB", (20, 10), (0, 0, 0)),
        "html": b"<html><body>This image has moved.</body></html>",
        "banner": encode("RGB", (900, 100), (0, 0, 0)),
        "flaky": encode("RGB", (64, 64), (255, 255, 0)),
    }
    write_list(working, server, LINES, min_success=1.0, retries=1)
    with pytest.raises(SystemExit) as ended:
        run(images)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    table = r"1  HTTP Error 404: Not Found\n +1  Image decoding error\n +1  aspect ratio too large\n"
    assert re.search(rf"7 of 10 images came \(70\.0%\), too few for min_success = 100\.0%.*\n +{table}", said), said
    asked = {path: 2 if path in ("missing", "html", "banner", "flaky") else 1 for path in LINES.values()}
    assert server.asked == asked

    write_list(working, server, LINES, min_success=0.7, retries=1)
    run(images)
    assert server.asked == asked  # of what had come nothing was lost, and enough had come
    assert json.loads(Path("metrics/paper/images.json").read_text()) == {
        "urls": 10,
        "downloaded": 7,
        "success_rate": 0.7,
        "failures": {"HTTP Error 404: Not Found": 1, "Image decoding error": 1, "aspect ratio too large": 1},
        "rounds": [{"urls": 10, "downloaded": 6}, {"urls": 4, "downloaded": 1}],
        "source": {"list": "list.tsv", "sha256": hashlib.sha256(Path("list.tsv").read_bytes()).hexdigest()},
    }
    folder = Path("data/paper/images")
    assert [path.name for path in sorted(folder.parent.iterdir())] == [".images.lock", "images"]

    reader = Shards(folder)
    assert reader.counts == {"00000.tar": 4, "00001.tar": 2, "00003.tar": 1}
    found = {LINES[sample.caption]: sample.image for sample in epoch(reader, 0)}
    sizes = {"jpeg": (80, 64), "grey": (64, 70), "cmyk": (64, 64), "rgba": (64, 64), "big": (96, 64), "tiny": (20, 10)}
    assert {name: image.size for name, image in found.items()} == {**sizes, "flaky": (64, 64)}
    colors = {"jpeg": (0, 0, 255), "grey": (128,) * 3, "cmyk": (255, 0, 0), "rgba": (255,) * 3, "big": (0, 255, 0)}
    for name, color in colors.items():
        assert np.abs(np.asarray(found[name], float) - color).max() < 10, name


@pytest.mark.exhaustive
@pytest.mark.parametrize("distributor", ["pyspark", "ray"])
def test_other_distributors_make_the_same_shards(server: Server, working: Path, distributor: str) -> None:
    """On this machine; links that failed are tried again there, too."""
    if not importlib.util.find_spec(distributor) or (distributor == "pyspark" and not shutil.which("java")):
        pytest.skip(f"{distributor} is not installed here (pip install {distributor}; Spark needs a Java, too)")
    paths = [f"held/{i}" for i in range(9)] + ["flaky", "missing"]
    server.answers = {path: encode("RGB", (70, 64), (9 * i, 0, 0)) for i, path in enumerate(paths[:-1])}
    server.release.set()
    made = {}
    for name in ("multiprocessing", distributor):
        server.asked.clear()
        write_list(working, server, {path: path for path in paths}, retries=1, processes=2, distributor=name)
        run(images)
        assert server.asked == {path: 2 if path in ("flaky", "missing") else 1 for path in paths}
        report = json.loads(Path("metrics/paper/images.json").read_text())
        assert report["rounds"] == [{"urls": 11, "downloaded": 9}, {"urls": 2, "downloaded": 1}]
        made[name] = {path.name: path.read_bytes() for path in Path("data/paper/images").iterdir()}
        shutil.rmtree("data/paper/images")
    assert list(made[distributor]) != []
    assert made[distributor] == made["multiprocessing"]


def test_a_distributor_that_is_not_installed_is_refused(
    server: Server, working: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """img2dataset's function for ray would fetch nothing and return."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    write_list(working, server, {"a fish": "jpeg"}, distributor="ray")
    with pytest.raises(SystemExit):
        run(images)
    assert "images.links.distributor is 'ray', but this environment has no such package" in capsys.readouterr().err


def start(folder: Path, *packages: Path) -> subprocess.Popen[str]:
    """Start the stage in a process of its own, which finds packages in these folders first."""
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, (*packages, ROOT)))}
    command = [sys.executable, "-m", "pipeline.images"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


ENDLESS = """
import os, subprocess, time
from pathlib import Path

def download(output_folder, **options):
    worker = subprocess.Popen(["sleep", "infinity"])
    Path(output_folder, "made").write_text(f"{os.getpid()} {worker.pid}")
    Path(output_folder, "made").rename(Path(output_folder, "started"))
    worker.wait()
"""


@pytest.mark.slow
def test_an_img2dataset_that_writes_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a worker of its pool was killed or stopped, for which it waits for ever."""
    monkeypatch.setattr(links, "STUCK", 0.5)
    (tmp_path / "00000_stats.json").touch()
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    process.start()
    try:
        appearing = links._appearing(process, tmp_path)
        assert next(appearing).name == "00000_stats.json"
        with pytest.raises(UserError, match=r"written nothing.*fewer images\.links\.processes"):
            next(appearing)
    finally:
        process.kill()


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_of_img2dataset_that_is_killed_or_stopped_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    """The real one, which would wait for it for ever. The next run goes on after the shards that were finished."""
    paths = ["0", "1", "2", "3", "4", "held"]
    server.answers = dict.fromkeys(paths, encode("RGB", (64, 64), (0, 0, 255)))
    wanted = table(paths, [f"{server.address}/{path}" for path in paths])

    def strike() -> None:
        while not server.asked["held"]:
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            if any(to.raddr and to.raddr.port == server.server_port for to in process.net_connections()):
                process.send_signal(how)
        monkeypatch.setattr(links, "STUCK", 1)

    threading.Thread(target=strike, daemon=True).start()
    with pytest.raises(UserError, match=r"written nothing .*fewer images\.links\.processes"):
        download(wanted, tmp_path / "out", tmp_path / "scratch", **OPTIONS)
    monkeypatch.setattr(links, "STUCK", HANG)
    server.release.set()
    assert download(wanted, tmp_path / "out", tmp_path / "scratch", **OPTIONS)["downloaded"] == 6
    assert server.asked == {**dict.fromkeys(paths[:4], 1), "4": 2, "held": 2}


@pytest.mark.slow
def test_a_killed_stage_takes_img2dataset_and_its_workers_along(server: Server, tmp_path: Path) -> None:
    """Else two runs would write into one folder. An img2dataset that never ends stands for the real one."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/img2dataset.py").write_text(ENDLESS)
    write_list(tmp_path, server, LINES)
    stage = start(tmp_path, tmp_path / "packages")
    started = tmp_path / "data/paper/.images.scratch/shards/started"
    while not started.exists():
        assert stage.poll() is None, stage.communicate()[0]
        time.sleep(0.01)
    processes = [psutil.Process(int(number)) for number in started.read_text().split()]
    stage.kill()
    stage.communicate()
    assert psutil.wait_procs(processes, timeout=HANG)[1] == []


@pytest.mark.exhaustive
def test_a_killed_stage_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    lines = {f"fish {i}": f"held{i}" if i >= 8 else str(i) for i in range(12)}
    server.answers = dict.fromkeys(lines.values(), encode("RGB", (64, 64), (0, 0, 255)))
    write_list(tmp_path, server, lines, min_success=1.0)
    made = tmp_path / "data/paper/.images.scratch/shards"
    stage = start(tmp_path)
    while not (len(list(made.glob("*_stats.json"))) == 2 and server.asked.total() == 12):
        assert stage.poll() is None, stage.communicate()[0]
        time.sleep(0.05)
    stage.kill()
    stage.communicate()
    (made / "00002_stats.json").write_text('{\n    "count": 4')  # as if it had been writing this
    server.release.set()
    stage = start(tmp_path)
    output, _ = stage.communicate(timeout=HANG)
    assert stage.returncode == 0, output
    assert server.asked == {path: 2 if path.startswith("held") else 1 for path in lines.values()}
    assert Shards(tmp_path / "data/paper/images").counts == {"00000.tar": 4, "00001.tar": 4, "00002.tar": 4}
    assert not made.exists()


def mini(count: int, threads: int, min_success: float = 1.0) -> MiniImages:
    options = {"size": 64, "shard_size": 16, "min_success": min_success, "processes": 1, "threads": threads}
    return MiniImages(kind="mini", count=count, detail_share=0.3, **options)


@pytest.fixture
def five_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = mini_images.draw
    monkeypatch.setattr(mini_images, "draw", lambda count, to: [*draw(count - 5, to), *["file:///gone.png"] * 5])


@pytest.mark.exhaustive  # `make repro` goes this way, too
@pytest.mark.usefixtures("five_are_missing")
def test_the_mini_profile_s_images_go_the_way_of_links(tmp_path: Path) -> None:
    assert mini_images.make(mini(40, threads=7, min_success=0.8), tmp_path) == {
        "urls": 40, "downloaded": 35, "success_rate": 0.875,
        "failures": {"<urlopen error [Errno 2] No such file or directory: '/gone.png'>": 5},
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [*COUNTS, "shards.json"]
    reader = Shards(tmp_path)
    assert reader.counts == COUNTS | {"00002.tar": 3}
    for sample in epoch(reader, 0):
        index = int(sample.key) // 100 * 16 + int(sample.key) % 100
        pixels, _ = world.image(mini_images.SET, index)
        assert np.abs(np.asarray(sample.image, float) - pixels).mean() < 8  # the JPEG of this very image
        assert sample.caption == mini_images.caption(index, 0.3)


@pytest.mark.exhaustive
def test_two_downloads_give_the_same_bytes(tmp_path: Path) -> None:
    reports = [mini_images.make(mini(40, threads), tmp_path / name) for name, threads in (("first", 1), ("second", 7))]
    files = [sorted((path.name, path.read_bytes()) for path in (tmp_path / x).iterdir()) for x in ("first", "second")]
    assert files[0] == files[1]
    assert not any(b"file://" in data for _, data in files[0])
    assert reports[0] == reports[1] == {"urls": 40, "downloaded": 40, "success_rate": 1.0, "failures": {}}


@pytest.mark.exhaustive
@pytest.mark.usefixtures("five_are_missing")
def test_too_many_failed_urls_leave_nothing_behind(tmp_path: Path) -> None:
    output = tmp_path / "data" / "images"
    message = r"(?s)15 of 20 images came \(75\.0%\).*5  .*No such file or directory: '/gone\.png'"
    with pytest.raises(UserError, match=message), atomic(output) as (partial,):
        mini_images.make(mini(20, threads=4), partial)
    assert [path.name for path in output.parent.iterdir()] == [".images.lock"]
