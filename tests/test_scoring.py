"""Zero-shot scoring as clip_benchmark has it, to the bit, by threads and processes; and what is refused."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import psutil
import pytest
import torch
from accelerate import PartialState
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from safetensors.torch import load_file, save_file
from shrunk import DATA, METRICS, MODELS, ROOT, run, write_params
from test_stages import cut
from torch.utils.data import DataLoader

from pipeline import zeroshot
from pipeline.benchmarks import clip_sets, mmvp
from pipeline.benchmarks import zeroshot as benchmark
from pipeline.benchmarks.encoder import AHEAD, Encoder
from pipeline.benchmarks.pairs import read_mmvp_vlm
from pipeline.benchmarks.sets import BenchmarkSet, SetImage, read
from pipeline.core.stages import UserError
from pipeline.diva.rules import STOCK
from pipeline.models import exports
from pipeline.models.backbones import CONFIG, WEIGHTS, Backbone, text_sha256
from pipeline.sections.mmvp import Mmvp
from pipeline.sections.zeroshot import Zeroshot
from pipeline.tools import bench

SCORES = METRICS / "scores/zeroshot/mini-pretrained"
CLASSES, TEMPLATES = ["fish", "car", "boat", "bird"], ["a photo of a {c}", "a {c} of a photo", "a {c}"]
FORMATS = [  # mode, file format, ending
    ("RGB", "JPEG", "jpg"), ("L", "PNG", "png"), ("P", "PNG", "PNG"), ("RGBA", "PNG", "png"), ("RGB", "WEBP", "webp"),
    ("CMYK", "JPEG", "jpeg"), ("LA", "PNG", "png"), ("1", "PNG", "png"),
]  # fmt: skip


def image_file(number: int) -> tuple[str, bytes]:
    """Of many sizes, shapes and formats: its ending and the file."""
    draws, (mode, kind, ending) = np.random.default_rng(number), FORMATS[number % len(FORMATS)]
    size = (int(draws.integers(20, 150)), int(draws.integers(20, 150)))
    coarse = Image.fromarray(draws.integers(0, 256, (5, 7, 4), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    (coarse if mode in ("RGBA", "LA") else coarse.convert("RGB")).convert(mode).save(file, kind)
    return ending, file.getvalue()


def write(root: Path, name: str, kind: str, count: int, shards: int = 4) -> Path:
    """A set in clip-benchmark's layout, in several shards."""
    folder = root / "wds" / name
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text(kind)
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    (folder / "test/nshards.txt").write_text(str(shards))
    for shard in range(shards):
        with tarfile.open(folder / f"test/{shard}.tar", "w") as tar:
            for i in range(shard * count // shards, (shard + 1) * count // shards):
                ending, content = image_file(i)
                captions = "\n".join(f"a photo of a {CLASSES[(i + k) % 4]} {i}" for k in range(1 + i % 3))
                label = {"cls": b"%d" % (i % 4)} if kind == "classification" else {"txt": captions.encode()}
                for own, data in {ending: content, **label}.items():
                    member = tarfile.TarInfo(f"s{i:05d}.{own}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture
def backbone(finished: Path) -> Backbone:
    return Backbone.load(finished / MODELS / "pretrained/mini")


def encoder(backbone: Backbone, batch: int, precision: str = "float32", texts: Path | None = None) -> Encoder:
    return Encoder(backbone, PartialState(cpu=True), batch, precision, texts)


def plain(backbone: Backbone, root: Path, name: str, task: str, batch: int) -> tuple[object, DataLoader]:
    """As clip_benchmark reads a set, in this process and thread."""
    dataset = build_dataset(f"wds/{name}", root=str(root / "wds" / name), transform=backbone.preprocess, task=task)
    return dataset, DataLoader(dataset.batched(batch), batch_size=None)


# ----------------------------------------------------------------------------------------------- the same figures


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_transform_in_two_halves_is_open_clips(backbone: Backbone, mode: str, interpolation: str) -> None:
    """To the bit: one half in threads, the other for a whole batch."""
    backbone.preprocessing |= {"resize_mode": mode, "interpolation": interpolation}
    own = open_clip.transform.PreprocessCfg(**backbone.preprocessing)
    whole = open_clip.transform.image_transform_v2(own, is_train=False)
    images = [Image.open(io.BytesIO(image_file(i)[1])).convert("RGB") for i in range(8)]
    halves = backbone.normalize(torch.from_numpy(np.stack([backbone.resize(image) for image in images])))
    assert halves.is_contiguous()
    assert torch.equal(halves, torch.stack([whole(image) for image in images]))
    assert torch.equal(backbone.preprocess(images[0]), whole(images[0]))
    assert not torch.equal(backbone.preprocess(images[1], "longest"), whole(images[1]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:WebDataset")
@torch.no_grad()
def test_threads_score_as_clip_benchmarks_functions_do(backbone: Backbone, tmp_path: Path) -> None:
    """Bit by bit and answer by answer, over shards, formats and a last batch that is not full."""
    write(tmp_path, "objects", "classification", 45)
    write(tmp_path, "captions", "retrieval", 21)
    captions, objects = read(tmp_path)
    dataset, loader = plain(backbone, tmp_path, "objects", "zeroshot_classification", 7)
    pixels = [batch for batch, _ in loader]
    own = list(encoder(backbone, 7).images(objects))
    assert [number for number, _, _ in own] == list(range(7))
    for batch, (_, _, images_BD) in zip(pixels, own, strict=True):
        assert torch.equal(torch.nn.functional.normalize(backbone.encode_image(batch), dim=-1), images_BD)
    classifier = zeroshot_classification.zero_shot_classifier(
        backbone, backbone.tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
    )
    assert torch.equal(encoder(backbone, 7).classifier(objects), classifier)
    logits, labels = zeroshot_classification.run_classification(backbone, classifier, loader, "cpu", amp=False)
    found = clip_sets.classification(encoder(backbone, 7), objects)
    assert found.right.tolist() == (logits.argmax(1) == labels).tolist()
    assert 0 < found.right.mean() < 1

    _, loader = plain(backbone, tmp_path, "captions", "zeroshot_retrieval", 7)
    expected = zeroshot_retrieval.evaluate(backbone, loader, backbone.tokenizer, "cpu", amp=False, recall_k_list=[3])
    recall = clip_sets.retrieval(encoder(backbone, 7), captions, 3).groupby("measure").right.mean()
    assert recall["text_to_image"] == pytest.approx(expected["image_retrieval_recall@3"])
    assert recall["image_to_text"] == pytest.approx(expected["text_retrieval_recall@3"])


def test_no_more_is_decoded_ahead_than_said(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "objects", "classification", 40)
    (objects,) = read(tmp_path)
    seen, whole = [], SetImage.read
    monkeypatch.setattr(SetImage, "read", lambda sample: seen.append(sample.key) or whole(sample))
    batches = encoder(backbone, 4).images(objects)
    for _ in range(3):
        next(batches)
    batches.close()  # waits for the threads
    assert len(seen) == 4 * (3 + AHEAD)


def test_half_precision_is_of_the_towers_alone(backbone: Backbone, tmp_path: Path) -> None:
    write(tmp_path, "objects", "classification", 8)
    (objects,) = read(tmp_path)
    both = [encoder(backbone, 8, precision) for precision in ("float32", "bfloat16")]
    ((_, _, full), *_), ((_, _, half), *_) = (list(own.images(objects)) for own in both)
    for one, other in ((full, half), [own.classifier(objects) for own in both]):
        assert (one.dtype, other.dtype) == (torch.float32, torch.float32)
        assert 0 < (one - other).abs().max() < 0.02


def test_a_machine_with_several_gpus_uses_them_all(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: became.append(arguments))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("STARTED_BY", "set, so that it is put back")
    monkeypatch.delenv("STARTED_BY")
    monkeypatch.setattr(PartialState, "__init__", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(pytest.fail.Exception):  # a process that became another would not be here
        run(zeroshot, "mini", "pretrained")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    assert became == [[sys.executable, *torchrun, "-m", "pipeline.zeroshot", "mini", "pretrained"]]


def score_on_two() -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "pipeline.zeroshot", "mini", "pretrained"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.exhaustive
def test_two_processes_of_torchrun_give_the_same_bytes(here: Path) -> None:
    write_params(**{"profiles.mini.zeroshot.batch": 5})
    run(zeroshot, "mini", "pretrained")
    wanted = {file.name: file.read_bytes() for file in SCORES.iterdir()}
    shutil.rmtree(SCORES)
    process = score_on_two()
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert {file.name: file.read_bytes() for file in SCORES.iterdir()} == wanted


# ----------------------------------------------------------------------------------------------- classifiers kept


@pytest.mark.slow
def test_classifiers_are_computed_once_for_all_weights(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second weights' scores come without a prompt computed, and are those that they have without what was kept."""
    computed, embed = [], Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda self, texts: computed.extend(texts) or embed(self, texts))
    prompts = len((DATA / "zeroshot/wds/objects/classnames.txt").read_text().splitlines())
    captions = 6  # embedded anew
    (own, *more) = sorted((DATA / ".texts").iterdir())
    assert not more
    assert own.name == text_sha256(MODELS / "pretrained/mini")
    scores = SCORES / "answers.parquet"
    wanted = scores.read_bytes()
    run(zeroshot, "mini", "pretrained")
    assert len(computed) == captions
    assert scores.read_bytes() == wanted
    for file in own.iterdir():
        file.unlink()
    run(zeroshot, "mini", "pretrained")
    assert len(computed) == 2 * captions + prompts
    assert scores.read_bytes() == wanted
    assert len(list(own.iterdir())) == 1


@pytest.mark.parametrize("change", ["precision", "templates", "classes"])
def test_a_classifier_of_other_prompts_is_another(backbone: Backbone, tmp_path: Path, change: str) -> None:
    found = BenchmarkSet("dots", "classification", ["fish", "car"], ["a {c}"], {})
    kept = encoder(backbone, 4, texts=tmp_path)
    first = kept.classifier(found)
    others = {
        "precision": (found, "bfloat16"),
        "templates": (BenchmarkSet("dots", "classification", ["fish", "car"], ["a photo of a {c}"], {}), "float32"),
        "classes": (BenchmarkSet("dots", "classification", ["fish", "boat"], ["a {c}"], {}), "float32"),
    }
    changed, precision = others[change]
    assert not torch.equal(encoder(backbone, 4, precision, tmp_path).classifier(changed), first)
    assert torch.equal(kept.classifier(found), first)
    assert len(list(tmp_path.iterdir())) == 2


def test_only_what_texts_depend_on_makes_another_text_tower(finished: Path, tmp_path: Path) -> None:
    original = finished / MODELS / "pretrained/mini"
    first = text_sha256(original)
    assert text_sha256(finished / MODELS / "diva/mini") == first

    def changed(file: str, change: Callable[[Path], object]) -> str:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for path in original.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        change(folder / file)
        return text_sha256(folder)

    def weight(name: str) -> Callable[[Path], object]:
        def change(path: Path) -> None:
            tensors = load_file(path)
            tensors[name] = tensors[name] + 1
            save_file(tensors, path)

        return change

    def config(part: str, key: str) -> Callable[[Path], object]:
        def change(path: Path) -> None:
            content = json.loads(path.read_text())
            content["model_cfg"][part][key] = content["model_cfg"][part][key] * 2
            path.write_text(json.dumps(content))

        return change

    assert changed(WEIGHTS, weight("visual.conv1.weight")) == first
    assert changed(WEIGHTS, weight("logit_scale")) == first
    assert changed(CONFIG, config("vision_cfg", "width")) == first
    others = [
        changed(WEIGHTS, weight("token_embedding.weight")),
        changed(CONFIG, config("text_cfg", "heads")),
        changed("tokenizer.json", lambda path: path.write_text(path.read_text() + "\n")),
    ]
    assert len({first, *others}) == 4


# ----------------------------------------------------------------------------------------------- what is refused


def spoil(tar: Path, keys: set[str]) -> None:
    """Overwrite these images with nothing."""
    with tarfile.open(tar) as file:
        places = [(m.offset_data, m.size) for m in file if m.name.partition(".")[0] in keys and m.name[-3:] != "cls"]
    content = bytearray(tar.read_bytes())
    for offset, size in places:
        content[offset : offset + size] = bytes(size)
    tar.write_bytes(content)


def test_broken_images_are_counted_and_refused(backbone: Backbone, tmp_path: Path) -> None:
    folder = write(tmp_path, "objects", "classification", 20)
    spoil(folder / "test/0.tar", {"s00003"})
    spoil(folder / "test/2.tar", {"s00011", "s00012"})
    said = r"3 of the 20 images of set objects \(test\) cannot be decoded: 0\.tar: s00003 .*2\.tar: s00011 .*'objects'"
    with pytest.raises(UserError, match=said):
        clip_sets.classification(encoder(backbone, 4), *read(tmp_path))


def test_a_stage_refuses_a_broken_image_and_leaves_what_there_was(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = SCORES / "scores.json"
    before = scores.read_bytes()
    spoil(DATA / "zeroshot/wds/captions/test/0.tar", {"000002"})
    with pytest.raises(SystemExit):
        run(zeroshot, "mini", "pretrained")
    assert "1 of the 6 images of set captions (test) cannot be decoded: 0.tar: 000002" in capsys.readouterr().err
    assert scores.read_bytes() == before
    assert not list(SCORES.parent.glob(".*.partial"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda sets: (sets / "wds").rename(sets / "elsewhere"),
            r"holds no set \(a folder wds/<name>/\)\. Run `dvc repro --force",
        ),
        (lambda sets: (sets / "wds/details/train/0.tar").unlink(), r"details cannot be scored: .*No such file"),
        (lambda sets: cut(sets / "wds/objects/test/0.tar", 5000), r"objects cannot be scored: 0\.tar cannot be read"),
    ],
)
def test_a_set_that_is_not_there_is_refused_before_anything_is_computed(
    here: Path, damage: Callable[[Path], object], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(DATA / "zeroshot")
    monkeypatch.setattr(Encoder, "images", lambda *_: pytest.fail("computed"))
    with pytest.raises(SystemExit):
        run(zeroshot, "mini", "pretrained")
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.exhaustive
def test_a_process_that_dies_takes_the_others_with_it(here: Path) -> None:
    """torchrun sees it; nothing is written, and what there was stays."""
    scores = SCORES / "scores.json"
    before = scores.read_bytes()
    process = score_on_two()
    workers: list[psutil.Process] = []
    while len(workers) < 2 and process.poll() is None:
        time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
    workers[1].send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=600)
    assert process.returncode != 0, said
    assert "SIGKILL" in said
    assert not any(worker.is_running() for worker in workers)
    assert scores.read_bytes() == before


# ----------------------------------------------------------------------------------------------- agreement


@pytest.mark.exhaustive
def test_clip_benchmarks_program_gives_the_same_scores_of_our_exports(finished: Path, tmp_path: Path) -> None:
    """Its command line with four workers, its own batches and the export as it is handed over."""
    original, folder, (count, of_captions) = finished / MODELS / "pretrained/mini", tmp_path / "export", (200, 60)
    exports.write(Backbone.load(original), original, folder)
    write(tmp_path, "objects", "classification", count)
    write(tmp_path, "captions", "retrieval", of_captions)
    tasks = {"objects": "zeroshot_classification", "captions": "zeroshot_retrieval"}
    found = {}
    for name, task in tasks.items():
        arguments = {
            "dataset": f"wds/{name}", "dataset_root": tmp_path / "wds" / name, "task": task, "pretrained": "",
            "model": f"local-dir:{folder}", "recall_k": 3, "output": tmp_path / f"{name}.json",
        }  # fmt: skip
        options = [str(part) for key, value in arguments.items() for part in (f"--{key}", value)]
        subprocess.run(["clip_benchmark", "eval", *options, "--no_amp"], check=True, timeout=600)
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["metrics"]
    section = Zeroshot(batch=256, recall=3, precision="float32")
    ours, _ = benchmark.score(Backbone.load(folder), tmp_path, section, torch.device("cpu"))
    assert ours["objects"]["accuracy"] == pytest.approx(100 * found["objects"]["acc1"], abs=1e-3)
    assert ours["captions"]["text_to_image"] == pytest.approx(
        100 * found["captions"]["image_retrieval_recall@3"], abs=1e-3
    )
    assert ours["captions"]["image_to_text"] == pytest.approx(
        100 * found["captions"]["text_retrieval_recall@3"], abs=1e-3
    )


@torch.no_grad()
def test_mmvps_published_rule_through_stock_open_clip_gives_the_same_pairs(finished: Path, tmp_path: Path) -> None:
    """The loop of MMVP's evaluate_vlm.py, with the model as open_clip loads the export."""
    original, folder, pairs = finished / MODELS / "pretrained/mini", tmp_path / "export", finished / DATA / "mmvp"
    backbone = Backbone.load(original)
    exports.write(backbone, original, folder)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    table = pd.read_csv(pairs / "Questions.csv")
    right = []
    for i in range(0, len(table), 2):
        (id1, kind, text1), (id2, _, text2) = table.iloc[i], table.iloc[i + 1]
        files = [next(pairs.glob(f"*/{kind}/{number}.jpg")) for number in (id1, id2)]
        images = torch.stack([preprocess(Image.open(file)) for file in files])
        chosen = []
        for text in (text1, text2):
            _, _, scale = found = model.eval()(images, tokenizer(["a photo of " + text]))
            per_text = scale * found[1] @ found[0].T
            chosen.append("img1" if per_text.softmax(-1)[0][0] > 0.5 else "img2")
        right.append(chosen == ["img1" if id1 % 2 == 1 else "img2", "img1" if id2 % 2 == 1 else "img2"])
    section = Mmvp(seed=0, draws=1, batch=64)
    questions = read_mmvp_vlm(pairs, 2)
    _, ours, _ = mmvp.score(backbone, questions, STOCK, section, torch.device("cpu"))
    stock = ours[ours.pooling == "stock"]
    assert (stock.statement_to_image == 1).tolist() == right
    assert 0 < sum(right) < len(right)


# ----------------------------------------------------------------------------------------------- the bench


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("100%|##| 10/10 [00:01, 9.5it/s]\n\r0it [00:00, ?it/s]\r4it [00:02,  1.99it/s]\n", 4 / 1.99),
     ("\r1it [00:03,  3.10s/it]\r4it [00:10,  2.50s/it]\n", 10.0)],
)  # fmt: skip
def test_a_bar_of_clip_benchmark_tells_its_seconds(said: str, seconds: float) -> None:
    assert bench.bar_seconds(said) == pytest.approx(seconds)
    with pytest.raises(UserError, match="bar of batches is not in what it said"):
        bench.bar_seconds("0it [00:00, ?it/s]")


@pytest.mark.exhaustive
def test_the_bench_scores_beside_clip_benchmarks_program(here: Path) -> None:
    run(bench, "scoring", "--images", "200", "--rounds", "1")
    (written,) = Path("metrics/bench").glob("scoring-*.json")
    found = json.loads(written.read_text())["images_per_second"]
    assert [way.partition(",")[0] for way in found] == ["decoding alone", *["ours"] * 2, *["clip_benchmark"] * 2]
    assert all(rate > 0 for rates in found.values() for rate in rates)
    assert not bench.SCRATCH.exists()
