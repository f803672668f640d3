"""The images stage: img2dataset's runs checked and repacked, and the stream of images that training reads."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import images
from pipeline.adapters import shards
from pipeline.adapters.shards import Shards, download
from pipeline.mini import world
from pipeline.runtime import UserError, whole, write_json

OPTIONS = {"size": 64, "shard_size": 16, "processes": 1}
COUNTS = {"00000.tar": 16, "00001.tar": 16, "00002.tar": 8}


def jpeg(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(world.picture(images.SET, index)[0]).save(buffer, "JPEG", quality=95)
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


def keys(stream, count: int | None = None) -> list[str]:
    return [key for key, _ in itertools.islice(stream, count)]


# The stream


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own(folder: Path) -> None:
    reader = Shards(folder)
    seen = keys(reader.stream(seed=7), 3 * len(reader))
    epochs = [seen[:40], seen[40:80], seen[80:]]
    everything = sorted(epochs[0])
    assert len(set(everything)) == len(reader) == 40
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != everything


def test_stream_is_a_pure_function_of_the_seed(folder: Path) -> None:
    reader, other = Shards(folder), Shards(folder)
    first = list(itertools.islice(reader.stream(7), 60))
    second = list(itertools.islice(other.stream(7), 60))
    assert [key for key, _ in first] == [key for key, _ in second]
    assert all(a.tobytes() == b.tobytes() for (_, a), (_, b) in zip(first, second, strict=True))
    assert keys(reader.stream(8), 60) != [key for key, _ in first]
    assert keys(reader.epoch(7, 1)) == keys(reader.stream(7), 80)[40:]


def test_shards_and_their_images_are_shuffled_by_seed_and_by_epoch(folder: Path) -> None:
    reader = Shards(folder)
    for draws in ([(seed, 0) for seed in range(8)], [(0, epoch) for epoch in range(8)]):
        orders = [keys(reader.epoch(*draw)) for draw in draws]
        assert len({tuple(dict.fromkeys(key[:5] for key in order)) for order in orders}) > 1  # of the shards
        for shard in ("00000", "00001", "00002"):
            assert len({tuple(key for key in order if key[:5] == shard) for order in orders}) == 8


def test_key_and_image_belong_together_and_grey_becomes_rgb(folder: Path) -> None:
    grey = io.BytesIO()
    Image.new("L", (64, 48), 128).save(grey, "JPEG")
    write_tar(folder / "00002.tar", [("0000200.jpg", grey.getvalue()), ("0000200.txt", b"")])
    write_json(folder / "shards.json", {"size": 64, "samples": 33, "shards": {**COUNTS, "00002.tar": 1}})
    found = dict(Shards(folder).epoch(0, 0))
    assert (found["0000200"].mode, found["0000200"].size) == ("RGB", (64, 48))
    for key in ("0000003", "0000115"):
        assert found[key].tobytes() == Image.open(io.BytesIO(jpeg(int(key)))).convert("RGB").tobytes()


def test_truncated_inside_a_member(folder: Path) -> None:
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[: 512 + 700])
    with pytest.raises(UserError, match=r"00001\.tar cannot be read.*--force images"):
        keys(Shards(folder).epoch(0, 0))


@pytest.mark.parametrize("member", ["0000108.jpg", "0000108.txt"])
def test_truncated_between_members(folder: Path, member: str) -> None:
    path = folder / "00001.tar"
    with tarfile.open(path) as tar:
        end = tar.getmember(member).offset
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(UserError, match=r"00001\.tar holds 8 images where shards\.json says 16.*--force images"):
        keys(Shards(folder).epoch(0, 0))


def test_damaged_header_and_missing_tar(folder: Path) -> None:
    path = folder / "00001.tar"
    with tarfile.open(path) as tar:
        start = tar.getmember("0000108.jpg").offset
    data = bytearray(path.read_bytes())
    data[start : start + 512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"00001\.tar.*--force images"):
        keys(Shards(folder).epoch(0, 0))
    path.unlink()
    with pytest.raises(UserError, match=r"00001\.tar.*--force images"):
        keys(Shards(folder).epoch(0, 0))


def test_undecodable_images_are_skipped_and_counted_up_to_the_share(folder: Path) -> None:
    spoil(folder, "0000003", "0000004")
    reader = Shards(folder, max_undecodable=2 / 16)
    assert len(keys(reader.stream(0), 76)) == 76  # two epochs of 38
    assert reader.undecodable == {"0000003", "0000004"}
    with pytest.raises(UserError, match=r"00000\.tar: 2 of its 16 images.*the last is 000000[34]"):
        keys(Shards(folder, max_undecodable=1 / 16).epoch(0, 0))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "has no shards.json"),
        ("{", "damaged"),
        ('{"size": 64}', "damaged"),
        ("[]", "damaged"),
        ('{"size": 64, "samples": 0, "shards": {}}', "do not add up"),
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
    assert [shards._repack(tmp_path / f"{x}.tar", tmp_path / f"{x}2.tar") for x in "ab"] == [5, 5]
    assert (tmp_path / "a2.tar").read_bytes() == (tmp_path / "b2.tar").read_bytes()
    with tarfile.open(tmp_path / "a2.tar") as tar:
        assert tar.getnames() == [name for name, _ in members if not name.endswith("json")]


def test_captions_name_the_object_of_their_picture_and_seldom_a_detail() -> None:
    captions = [images.caption(i) for i in range(400)]
    for i in range(20):
        assert captions[i].startswith(world.caption(world.picture(images.SET, i)[1], []))
    detailed = sum(len(text.split()) > 5 for text in captions)  # "a photo of a fish" has five words
    assert 5 <= detailed <= 40


def test_empty_list(tmp_path: Path) -> None:
    images.write_pairs(tmp_path / "pairs.parquet", "http://127.0.0.1:1", 0)
    with pytest.raises(UserError, match="lists no URL"):
        download(tmp_path / "pairs.parquet", tmp_path / "out", min_success=0.9, threads=2, **OPTIONS)
    assert not (tmp_path / "out").exists()


def stats(scratch: Path, name: str, count: int, successes: int, reasons: dict[str, int]) -> None:
    status = {"success": successes, **reasons}
    write_json(scratch / f"{name}_stats.json", {"count": count, "successes": successes, "status_dict": status})


def test_unfinished_runs_and_failed_urls_are_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("No space left on device")
    asked = {"urls": 20, "shard_size": 16, "min_success": 0.8}
    stats(tmp_path, "00000", 16, 13, {"HTTP Error 404: Not Found": 2})
    with pytest.raises(UserError, match=r"(?s)1 of 2 shards and 16 of 20 rows.*No space left"):
        shards._checked(tmp_path, log, **asked)
    stats(tmp_path, "00001", 3, 3, {})
    with pytest.raises(UserError, match="2 of 2 shards and 19 of 20 rows"):
        shards._checked(tmp_path, log, **asked)
    stats(tmp_path, "00001", 4, 3, {"timed out": 1})
    report, successes = shards._checked(tmp_path, log, **asked)
    failures = {"HTTP Error 404: Not Found": 2, "no reason given": 1, "timed out": 1}
    assert report == {"urls": 20, "downloaded": 16, "success_rate": 0.8, "failures": failures}
    assert successes == {"00000.tar": 13, "00001.tar": 3}
    with pytest.raises(UserError, match=r"(?s)16 of 20.*81\.0%.*2  HTTP Error 404.*1  timed out"):
        shards._checked(tmp_path, log, **{**asked, "min_success": 0.81})
    (tmp_path / "_tmp").mkdir()
    with pytest.raises(UserError, match="did not finish"):
        shards._checked(tmp_path, log, **asked)


@pytest.mark.slow
def test_two_downloads_give_the_same_bytes(tmp_path: Path) -> None:
    reports = []
    for name, threads in (("first", 1), ("second", 7)):
        with images.serve(40) as address:
            images.write_pairs(tmp_path / "pairs.parquet", address, 40)
            options = {**OPTIONS, "min_success": 1.0, "threads": threads}
            reports.append(download(tmp_path / "pairs.parquet", tmp_path / name, **options))
    files = [sorted((path.name, path.read_bytes()) for path in (tmp_path / x).iterdir()) for x in ("first", "second")]
    assert files[0] == files[1]
    assert [name for name, _ in files[0]] == [*COUNTS, "shards.json"]
    assert not any(b"127.0.0.1" in data for _, data in files[0])
    assert reports[0] == reports[1] == {"urls": 40, "downloaded": 40, "success_rate": 1.0, "failures": {}}
    for key, image in Shards(tmp_path / "first").epoch(0, 0):
        pixels, _ = world.picture(images.SET, int(key) // 100 * 16 + int(key) % 100)
        assert np.abs(np.asarray(image, float) - pixels).mean() < 8  # the JPEG of this very picture


@pytest.mark.slow
def test_too_many_failed_urls_leave_nothing_behind(tmp_path: Path) -> None:
    output = tmp_path / "data" / "images"
    with images.serve(15) as address:  # 5 of the 20 are not there
        images.write_pairs(tmp_path / "pairs.parquet", address, 20)
        message = r"(?s)15 of 20 images came \(75\.0%\).*5  HTTP Error 404: Not Found"
        with pytest.raises(UserError, match=message), whole(output) as (partial,):
            download(tmp_path / "pairs.parquet", partial, min_success=0.9, threads=4, **OPTIONS)
    assert [path.name for path in output.parent.iterdir()] == [".images.lock"]
