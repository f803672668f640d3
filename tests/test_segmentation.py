"""Segmentation: exact masks, the readings against naive ones, what is refused, and the stages on a shrunken world."""

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from shrunk import METRICS, MODELS, ROOT, run, run_of, write_params
from sklearn.metrics import accuracy_score, jaccard_score
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torch.nn import functional as F

from pipeline import report, segmentation, segmentation_sets
from pipeline.benchmarks import segmentation as benchmark
from pipeline.benchmarks.masks import UNLABELLED, SegmentationSet, check_mask
from pipeline.benchmarks.sets import write_split
from pipeline.core import config
from pipeline.core.compute import generator
from pipeline.core.stages import UserError
from pipeline.evidence import downstream, statistics
from pipeline.mini import world
from pipeline.models.backbones import Backbone, fresh_head, save_like
from pipeline.models.residual_head import HEAD
from pipeline.sections.segmentation_sets import LocalSegmentationSets
from pipeline.tools import oracle

CPU = torch.device("cpu")


@pytest.fixture
def made(here: Path) -> Path:
    """The finished world with its set of masks."""
    run(segmentation_sets)
    return here


# The masks


@pytest.mark.parametrize(("pattern", "segment"), [(1, "hat"), (3, "balls"), (4, "star"), (7, "letter")])
def test_a_mask_covers_what_changes_with_the_detail(pattern: int, segment: str) -> None:
    """But for edges: a pixel with less than half of a segment changes, and is not of it."""
    value = world.SEGMENTS.index(segment)
    for i in range(10):
        first = world.draw_scene(np.random.default_rng(i))
        first[1 + pattern], second = 0, first.copy()
        second[1 + pattern] = 1
        nuisance = world.Nuisance.sample(np.random.default_rng(i))
        images = [world.render(scene, nuisance, np.random.default_rng(i)) for scene in (first, second)]
        before, after = (world.mask(scene, nuisance) == value for scene in (first, second))
        changed = (images[0] != images[1]).any(-1)
        assert after.any()
        near = F.max_pool2d(torch.tensor(before | after)[None].float(), 3, 1, 1)[0].bool().numpy()
        assert not (changed & ~near).any()
        if segment != "letter":  # whose card does not change
            assert changed[before ^ after].all()


def test_a_broken_object_shows_the_background_in_its_gap() -> None:
    scene, nuisance = np.array([0, 1, 0, 0, 0, 2, 0, 0, 0, 0]), world.Nuisance.sample(np.random.default_rng(0))
    broken = scene.copy()
    broken[3] = 1
    masks = [world.mask(s, nuisance) for s in (scene, broken)]
    assert {(int(a), int(b)) for a, b in zip(*(m[masks[0] != masks[1]] for m in masks), strict=True)} == {(1, 0)}
    plain = world.render(scene, nuisance, np.random.default_rng(0))[masks[0] == 1]
    assert (plain[:, 0].astype(int) > plain[:, 2].astype(int) + 40).mean() > 0.9  # red, but for its eye


# Windows


def test_windows_cover_the_image_and_constant_logits_stay() -> None:
    pixels = torch.arange(3 * 10 * 13.0).reshape(3, 10, 13)
    found, places = benchmark.windows(pixels, 4, 3)
    assert {top for top, _ in places} == {0, 3, 6}
    assert {left for _, left in places} == {0, 3, 6, 9}
    for window, (top, left) in zip(found, places, strict=True):
        assert window.equal(pixels[:, top : top + 4, left : left + 4])
    logits = torch.tensor([1.0, -2.0])[None, :, None, None].expand(len(places), 2, 2, 2)
    stitched = benchmark.stitch(logits, places, 4, 10, 13)
    torch.testing.assert_close(stitched, torch.tensor([1.0, -2.0])[:, None, None].expand(2, 10, 13))
    with pytest.raises(ValueError, match="an image of 13 x 3 px is smaller than a window of 4 px"):
        benchmark.windows(pixels[:, :3], 4, 3)


def test_overlapping_windows_are_averaged() -> None:
    logits = torch.randn(
        2, 1, 4, 4, generator=generator("test", "windows")
    )  # a grid as fine as the window: nothing to upsample
    stitched = benchmark.stitch(logits, [(0, 0), (0, 2)], 4, 4, 6)
    expected = torch.cat([logits[0, 0, :, :2], (logits[0, 0, :, 2:] + logits[1, 0, :, :2]) / 2, logits[1, 0, :, 2:]], 1)
    torch.testing.assert_close(stitched[0], expected)


# Tokens in text space


@pytest.fixture(scope="module")
def visual() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(
            embed_dim=12,
            vision_cfg={"image_size": 24, "patch_size": 8, "layers": 3, "width": 32, "head_width": 8},
            text_cfg={"width": 16, "heads": 2, "layers": 1, "vocab_size": 10, "context_length": 5},
        ).visual.eval()  # fmt: skip


def naive_tokens(visual: nn.Module, pixels: torch.Tensor, attention: str, deviation: float) -> torch.Tensor:
    """An image, a head and a token at a time."""
    blocks = list(visual.transformer.resblocks)
    x = visual._embeds(pixels[None])
    for block in blocks[:-1]:
        x = block(x)
    x, last, grid = x[0], blocks[-1], visual.grid_size[1]
    weight, bias = last.attn.in_proj_weight, last.attn.in_proj_bias
    width, heads = x.shape[1], last.attn.num_heads
    rows = [slice(i * width, (i + 1) * width) for i in range(3)]
    query, key, value = (last.ln_1(x) @ weight[row].T + bias[row] for row in rows)
    result, size = torch.zeros_like(x), width // heads
    for head in range(heads):
        q, k, v = (part[:, head * size : (head + 1) * size] for part in (query, key, value))
        for t in range(len(x)):
            like_key = torch.stack([k[t] @ k[s] / math.sqrt(size) for s in range(len(x))])
            like_query = torch.stack([q[t] @ q[s] / math.sqrt(size) for s in range(len(x))])
            if attention == "key_key" and t > 0:
                for s in range(1, len(x)):
                    down, across = (t - 1) // grid - (s - 1) // grid, (t - 1) % grid - (s - 1) % grid
                    like_key[s] += math.exp(-(down**2 + across**2) / (2 * deviation**2))
            weights = like_key.softmax(0)
            if attention == "query_query_key_key":
                weights = weights + like_query.softmax(0)
            mixed = v[t] if attention == "value" else sum(w * v[s] for s, w in enumerate(weights))
            result[t, head * size : (head + 1) * size] = mixed
    result = last.attn.out_proj(result)
    if attention == "query_query_key_key":
        result = x + result
        result = result + last.mlp(last.ln_2(result))
    return visual.ln_post(result[1:]) @ visual.proj


@torch.no_grad()
@pytest.mark.parametrize("attention", ["key_key", "value", "query_query_key_key"])
def test_text_space_tokens_as_a_naive_loop_has_them(visual: nn.Module, attention: benchmark.Attention) -> None:
    pixels = torch.randn(2, 3, 24, 24, generator=generator("test", "pixels"))
    found = benchmark.text_space_tokens(visual, pixels, attention, 1.5)
    expected = torch.stack([naive_tokens(visual, image, attention, 1.5) for image in pixels])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_tower_that_pools_by_attention_has_no_tokens_in_text_space() -> None:
    siglip = open_clip.timm_model.TimmModel.__new__(open_clip.timm_model.TimmModel)
    nn.Module.__init__(siglip)
    siglip.trunk = TimmViT(
        img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, global_pool="map", num_classes=0
    )
    with pytest.raises(benchmark.NotInTextSpaceError, match="VisionTransformer"):
        benchmark.text_space_tokens(siglip, torch.zeros(1, 3, 16, 16), "key_key", 1.0)


def test_the_nearest_name_of_a_class_counts_and_a_nameless_class_never(tmp_path: Path) -> None:
    texts = {"a cat": [1.0, 0, 0], "the cat": [0, 2.0, 0], "a tom": [0, 0, 3.0], "the tom": [0, 0, 1.0]}
    texts |= {"a dog": [-1.0, 0, 0], "the dog": [-4.0, 0, 0]}

    class Told:
        def embed(self, asked: list[str]) -> torch.Tensor:
            return torch.tensor([texts[text] for text in asked])

    classes = {"sky": [], "cat": ["cat", "tom"], "dog": ["dog"]}
    classify = benchmark.text_classifier(Told(), SegmentationSet(tmp_path, classes, ["a {c}", "the {c}"]))
    tokens = torch.tensor([[5.0, 0, 0], [0, 0, 2.0], [-1.0, 0, 0], [0.0, 1.0, 1.0]])
    found = classify(tokens[None])[0].flatten(1).T
    half = math.sqrt(0.5)
    wanted = [[-2, half, -1], [-2, 1, 0], [-2, 0, 1], [-2, half, 0]]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32), atol=1e-6, rtol=0)


# The probe


def test_cells_are_counted_pixel_by_pixel_and_go_back_to_their_place() -> None:
    draws, places, size, grid, cells, classes = np.random.default_rng(0), [(0, 0), (2, 4)], 8, 2, 2, 3
    mask = draws.choice([0, 1, 2, UNLABELLED], (10, 12)).astype(np.uint8)
    found = benchmark.cell_counts(mask, places, size, grid, cells, classes)
    assert found.shape == (2 * grid * grid, classes, cells**2)
    expected = torch.zeros_like(found)
    for w, (top, left) in enumerate(places):
        for y in range(size):
            for x in range(size):
                value = int(mask[top + y, left + x])
                if value != UNLABELLED:
                    token = (w * grid + y // 4) * grid + x // 4
                    expected[token, value, (y % 4 // 2) * cells + x % 4 // 2] += 1
    torch.testing.assert_close(found, expected)

    class Same(benchmark.PatchProbe):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(1, (classes, -1))

    grids = Same(1, classes, cells).grids(found.flatten(1).unflatten(0, (2, -1)))
    for window, (top, left) in zip(grids, places, strict=True):
        for value in range(classes):
            pooled = torch.tensor(mask[top : top + size, left : left + size] == value)[None].float()
            torch.testing.assert_close(window[value], 4 * F.avg_pool2d(pooled, 2)[0])


def test_the_loss_of_counts_is_that_of_pixels() -> None:
    mask = np.random.default_rng(1).choice([0, 1, 2, UNLABELLED], (8, 8)).astype(np.uint8)
    logits = torch.randn(4, 3, 4, generator=generator("test", "logits"))
    found = benchmark.pixel_loss(logits, benchmark.cell_counts(mask, [(0, 0)], 8, 2, 2, 3))
    grids = F.pixel_shuffle(logits.flatten(1).T.reshape(1, 12, 2, 2), 2)
    pixels = F.interpolate(grids, (8, 8), mode="nearest")
    expected = F.cross_entropy(pixels, torch.tensor(mask)[None].long(), ignore_index=UNLABELLED)
    torch.testing.assert_close(found, expected)


def test_a_probe_reads_what_the_tokens_hold_and_nothing_else() -> None:
    draws = np.random.default_rng(0)
    shown, hidden = draws.integers(2, size=(2, 600))
    tokens = np.stack([100 + 3 * shown, draws.normal(size=600)], 1).astype(np.float16)
    scores = []
    for labels in (shown, hidden):
        counts = np.eye(2, dtype=np.float16)[labels][:, :, None]
        probe = benchmark.fit_probe(tokens[:400], counts[:400], 100, 64, 0.1, CPU)
        predicted = probe(torch.tensor(tokens[400:]).float()).argmax(1)[:, 0].numpy()
        scores.append((predicted == labels[400:]).mean())
    assert scores[0] == 1
    assert scores[1] == pytest.approx(0.5, abs=0.1)


# What was right


def test_scores_are_those_of_scikit_learn(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    masks = [draws.choice([0, 1, 2, UNLABELLED], (9, 7)).astype(np.uint8) for _ in range(4)]
    guesses = [np.where(draws.random(mask.shape) < 0.5, mask % 3, draws.integers(3, size=mask.shape)) for mask in masks]
    for classes in ([0, 1, 2], [1, 2]):
        pixels = np.stack([benchmark.confusion(g, m, classes) for g, m in zip(guesses, masks, strict=True)])
        truth, said = np.concatenate([m.ravel() for m in masks]), np.concatenate([g.ravel() for g in guesses])
        asked = np.isin(truth, classes)
        jaccard = jaccard_score(truth[asked], said[asked], labels=classes, average=None)
        assert statistics.mean_iou(pixels.sum(0)) == pytest.approx(100 * jaccard.mean())
        rows = [pd.DataFrame(p, columns=benchmark.COLUMNS).assign(image=i, label=classes) for i, p in enumerate(pixels)]
        found = SegmentationSet(tmp_path, {"a": ["a"], "b": ["b"], "c": ["c"]}, ["{c}"])
        summary = benchmark._summary(pd.concat(rows), found)
        assert summary["mean_iou"] == pytest.approx(100 * jaccard.mean(), abs=1e-3)
        assert summary["pixel_accuracy"] == pytest.approx(100 * accuracy_score(truth[asked], said[asked]), abs=1e-3)
        assert list(summary["classes"]) == ["abc"[c] for c in classes]


@pytest.mark.slow
def test_the_interval_of_mean_iou_resamples_images_of_both_alike() -> None:
    draws = np.random.default_rng(3)
    labelled = draws.integers(1, 50, (40, 3))
    before, after = (
        np.stack([labelled - draws.integers(0, labelled + 1) // k, labelled, labelled], -1) for k in (1, 3)
    )
    found = statistics.iou_change(before, after)
    rows = [draws.integers(40, size=40) for _ in range(2000)]
    naive = [statistics.mean_iou(after[r].sum(0)) - statistics.mean_iou(before[r].sum(0)) for r in rows]
    assert found.value == pytest.approx(float(statistics.mean_iou(after.sum(0)) - statistics.mean_iou(before.sum(0))))
    assert found[1:] == pytest.approx(np.percentile(naive, [2.5, 97.5]).tolist(), abs=0.6)
    assert statistics.iou_change(before, before) == (0, 0, 0)
    absent = np.zeros((40, 1, 3), int)  # a class that no image shows and no prediction names
    assert statistics.iou_change(*(np.concatenate([p, absent], 1) for p in (before, after))) == found


# What is refused


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (png(np.zeros((4, 5), np.uint8)), "the mask is 5 x 4 px, the image 4 x 4"),
        (png(np.full((4, 4), 7, np.uint8)), r"values \[7\], but the set's classes are 0..2 \(255"),
        (png(np.zeros((4, 4, 3), np.uint8)), "wanted one channel of 8 bits"),
        (b"no image", "cannot be decoded"),
        (b"P5 100000 100000 255\n", "cannot be decoded"),
        (png(np.zeros((40, 40), np.uint8))[:50], "cannot be decoded"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: bytes, said: str) -> None:
    with pytest.raises(UserError, match=f"here.*{said}"):
        check_mask(png(np.zeros((4, 4, 3), np.uint8)), mask, 3, "here")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "lacks classes with names"),
        ({"classes": ["a", "b"], "templates": ["{c}"]}, "lacks classes with names"),
        ({"classes": {"a": ["a"]}, "templates": ["{c}"]}, "1 classes, wanted 2"),
        ({"classes": {"a": [], "b": []}, "templates": ["{c}"]}, "with names"),
        ({"classes": {"a": ["a"], "b": []}, "templates": ["a photo"]}, "each with {c}"),
    ],
)
def test_a_set_without_classes_or_templates_is_refused(content: dict | None, said: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "classes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        SegmentationSet.read(tmp_path)


def test_an_image_without_its_mask_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "test", "segmentation", [("0", {"png": png(np.zeros((4, 4, 3), np.uint8))})])
    with pytest.raises(UserError, match=r"0 has \['png'\], wanted an image and mask.png"):
        list(SegmentationSet(tmp_path, {"a": ["a"], "b": []}, ["{c}"]).samples("test"))


# Sets that were fetched by hand


def local(**changes: object) -> LocalSegmentationSets:
    voc = {
        "at": "voc", "images": "JPEGImages/{id}.jpg", "masks": "SegmentationClass/{id}.png", "ids": "sets/{split}.txt",
        "train": "train", "test": "val", "classes": ["cat", "dog, hound"], **changes,
    }  # fmt: skip
    section = {"kind": "local", "train": 2, "templates": ["a {c}"], "sets": {"voc": voc}}
    return config.checked(LocalSegmentationSets, section)


@pytest.fixture
def by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder in ("JPEGImages", "SegmentationClass", "sets", "masks/val", "masks/train"):
        Path("voc", folder).mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (4, 4), (50 * i,) * 3).save(f"voc/JPEGImages/{i}.jpg")
        mask = png(np.array([[0, 1, 2, UNLABELLED]] * 4, np.uint8))
        Path(f"voc/SegmentationClass/{i}.png").write_bytes(mask)
        Path("voc/masks", "train" if i < 3 else "val", f"{i}.png").write_bytes(mask)
    Path("voc/sets/train.txt").write_text("0\n1\n2\n")
    Path("voc/sets/val.txt").write_text("3\n4\n")
    return tmp_path


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("changes", [{}, {"masks": "masks/{split}/{id}.png", "ids": None}])
def test_sets_fetched_by_hand_are_packed_with_value_0_unlabelled(changes: dict) -> None:
    segmentation_sets.pack(Path("packed"), local(**changes))
    found = SegmentationSet.read(Path("packed/voc"))
    assert found.classes == {"cat": ["cat"], "dog": ["dog", "hound"]}
    reds = {
        split: [round(image.getpixel((0, 0))[0] / 50) for image, _ in found.samples(split)]
        for split in ("train", "test")
    }
    assert reds == {"train": [0, 1], "test": [3, 4]}  # of three images for the probe, two were asked for
    assert all(mask[0].tolist() == [UNLABELLED, 0, 1, UNLABELLED] for _, mask in found.samples("test"))


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize(
    ("key", "ending"), [("2007.000032", "jpeg"), ("a b", "webp"), ("ü" * 60, "bmp"), ("part/0", "png"), ("[1]", "jpg")]
)
@pytest.mark.parametrize("listed", [True, False])
def test_whatever_an_image_is_called_its_set_can_be_read(key: str, ending: str, listed: bool) -> None:
    """From a list with a byte order mark and DOS's line ends, too; else by the masks that are there."""
    images, masks = f"./JPEGImages/{{id}}.{ending}", "./new//{split}/a.{id}.png"
    if not listed and "/" in key:
        images, masks, key = f"JPEGImages/{{id}}/0.{ending}", "new/{split}/{id}/a.png", "part"
    for split in ("train", "val"):
        files = [Path("voc", each.replace("{id}", key).replace("{split}", split)) for each in (images, masks)]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(files[0])
        files[1].write_bytes(png(np.zeros((4, 4), np.uint8)))
        Path(f"voc/sets/{split}.txt").write_bytes(f"\ufeff{key}\r\n\r\n".encode())
    values = {"images": images, "masks": masks} | ({} if listed else {"ids": None})
    segmentation_sets.pack(Path("packed"), local(**values))
    assert len(list(SegmentationSet.read(Path("packed/voc")).samples("test"))) == 1


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (b"3\n4\n3\n", "sets/val.txt lists '3' 2 times"),
        ("3\n4\n".encode("utf-16"), "sets/val.txt is no list in UTF-8"),
        (b"\n", "has no masks of split 'val'"),
        (b"../JPEGImages/3\n", r"sets/val.txt lists '../JPEGImages/3', which lies outside the set's folders"),
        (b"/etc/3\n", "sets/val.txt lists '/etc/3', which lies outside"),
        (b"3" * 300, "3.jpg cannot be read"),
    ],
)
def test_a_list_of_ids_that_is_none_is_refused(ids: bytes, said: str) -> None:
    Path("voc/sets/val.txt").write_bytes(ids)
    with pytest.raises(UserError, match=said):
        segmentation_sets.pack(Path("packed"), local())


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"at": "elsewhere"}, r"elsewhere/sets/train.txt: no such file. Fetch the set by hand"),
        ({"masks": "nowhere/{split}/{id}.png", "ids": None}, "has no masks of split 'train'"),
        ({"masks": "masks/{id}.png", "ids": None}, "sets.voc: masks is 'masks/{id}.png', .* the same images"),
        ({"ids": "sets/all.txt"}, "sets.voc: ids is 'sets/all.txt', .* both would be the same images"),
        ({"test": "train"}, "train 'train' and test 'train', so both would be the same images"),
        ({"images": "JPEGImages/{id}.png"}, r"0.png: no such file"),
        ({"classes": ["cat", "cat"]}, "sets.voc.classes: found 'cat' 2 times, wanted each class once"),
        ({"classes": ["cat", "dog, "]}, "sets.voc.classes: found 'dog, ', wanted a name before and after"),
        ({"classes": ["cat", ""]}, "sets.voc.classes: found '', wanted a name"),
        (
            {"masks": "/ma/{split}/{id}.png", "ids": None},
            "sets.voc.masks: found '/ma/{split}/{id}.png', wanted a path below `at`",
        ),
    ],
)
def test_sets_that_are_not_there_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        segmentation_sets.pack(Path("packed"), local(**changes))


@pytest.mark.usefixtures("by_hand")
def test_a_class_that_the_set_has_not_is_refused() -> None:
    Path("voc/SegmentationClass/4.png").write_bytes(png(np.full((4, 4), 3, np.uint8)))
    with pytest.raises(UserError, match=r"SegmentationClass/4.png: the mask has values \[3\]"):
        segmentation_sets.pack(Path("packed"), local())


# The stage


@pytest.mark.slow
def test_the_stage_scores_and_repeats_itself(made: Path) -> None:
    folder = METRICS / "scores/segmentation/mini-pretrained"
    run(segmentation, "mini", "pretrained")
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert first.keys() == {"scores.json", "pixels.parquet", "scoring.json"}
    scoring, section = json.loads(first["scoring.json"]), config.read(dict, "profiles.mini.segmentation")
    assert {key: scoring[key] for key in section} == section
    assert {"version", "sets", "preprocessing", "precision", "sha256"} <= scoring.keys()
    scores, table = json.loads(first["scores.json"]), pd.read_parquet(folder / "pixels.parquet")
    assert scores["sets"].keys() == {"segments"}
    sizes = config.read(dict, "profiles.mini.segmentation_sets")
    for reading, classes in (("probe", 6), ("training_free", 5)):
        rows = table[table.reading == reading]
        assert len(rows) == classes * sizes["test"]
        assert 0 < scores["sets"]["segments"][reading]["mean_iou"] < 100
    assert table[table.reading == "probe"].groupby("image").labelled.sum().eq(64 * 64).all()
    run(segmentation, "mini", "pretrained")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first


@pytest.mark.slow
@pytest.mark.usefixtures("made")
def test_the_oracle_is_compared_with_the_pretrained_tower() -> None:
    run(oracle, "mini", "segmentation")
    found = json.loads((METRICS / "oracle/mini-segmentation.json").read_text())
    assert len(found) == 2
    for column in found.values():
        before, after = (column["score"][weights][0] for weights in ("pretrained", "oracle"))
        assert column["gain"]["oracle"][0] == pytest.approx(after - before, abs=0.02)
    with pytest.raises(SystemExit):
        run(oracle, "mini", "retrieval")


@pytest.mark.slow
def test_a_residual_head_changes_no_patch_token_and_the_report_says_so(made: Path) -> None:
    """A recipe that trains a head behind the tower cannot gain: there is nothing to be measured, not a zero."""
    head = fresh_head(16, 2, 0)
    nn.init.normal_(head.mlp[2].weight)
    folder = MODELS / "text_anchored/mini"
    folder.mkdir(parents=True)
    for file in (MODELS / "pretrained/mini").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(head.state_dict(), folder / HEAD)
    for weights in ("pretrained", "text_anchored", "text_anchored-drift"):
        if weights == "text_anchored-drift":
            drifted(folder.parents[1] / weights / "mini")
        run(segmentation, "mini", weights)
    readings = {
        w: downstream.read("mini", "mini", w, ["segmentation"])
        for w in ("pretrained", "text_anchored", "text_anchored-drift")
    }
    found = downstream.evidence(readings)
    assert list(found) == [f"segments, {way}: mean IoU (pixel accuracy)" for way in ("linear probe", "training-free")]
    for of_column in found.values():
        assert of_column["gain"]["text_anchored"] == downstream.CANNOT_CHANGE
        assert len(of_column["gain"]["text_anchored-drift"]) == 3
    rows = {row[0]: row[1:] for row in downstream.table(found)}
    assert rows["gain: text_anchored"] == [downstream.CANNOT_CHANGE] * 2
    assert rows["gain: text_anchored, random perturbation"][0].count("[") == 1
    for path in METRICS.glob("scores/*/mini-diva*"):  # mmvp and zeroshot, as if they had scored these weights
        if not (own := path.with_name(path.name.replace("diva", "text_anchored"))).exists():
            shutil.copytree(path, own)
    benchmarks = {"run.benchmarks": ["mmvp", "zeroshot", "segmentation"], "run.benchmark_sets": ["segmentation"]}
    write_params(**run_of(["text_anchored", "text_anchored-drift"]) | benchmarks)
    run(report)
    written = (METRICS / "report.md").read_text()
    assert downstream.CANNOT_CHANGE in written
    assert rows["gain: text_anchored, random perturbation"][0] in written


def drifted(folder: Path) -> None:
    original = MODELS / "pretrained/mini"
    backbone = Backbone.load(original)
    with torch.no_grad():
        backbone.clip.visual.conv1.weight.mul_(1.5)
    save_like(original, backbone.clip.state_dict(), folder)


def test_undefined_readings_and_effects_over_controls_are_told() -> None:
    def of(reads: str, right: int, other_masks: int = 0, **scoring: str) -> dict[str, downstream.Reading]:
        table = pd.DataFrame(
            [(image, c, right, 10, 10 + other_masks) for image in range(5) for c in (0, 1)],
            columns=["image", "label", *downstream.PIXELS],
        ).assign(set="x", reading="probe")
        sets = {"x": {"probe": {"mean_iou": 1.0, "pixel_accuracy": 2.0}, "training_free": {"undefined": "why"}}}
        return downstream.of_segmentation({"reads_sha256": reads, "sets": sets}, table, scoring)

    found = downstream.evidence({"pretrained": of("a", 5), "diva": of("b", 8), "diva-shuffled": of("c", 5)})
    column = found["x, linear probe: mean IoU (pixel accuracy)"]
    gain = 100 * (8 / 12 - 5 / 15)
    assert column["gain"]["diva"] == pytest.approx([gain] * 3, abs=0.01)
    assert column["gain"]["diva-shuffled"] == [0, 0, 0]
    assert column["effect"]["diva-shuffled"] == column["gain"]["diva"]
    rows = downstream.table(found)
    assert [row[0] for row in rows[1:]] == [
        "pretrained", "diva", "diva, mismatched images", "gain: diva", "gain: diva, mismatched images",
        "effect: diva over mismatched images",
    ]  # fmt: skip
    assert rows[1][1] == "1.0 (2.0)"
    assert all(row[2] == "undefined: why" for row in rows[1:])
    assert downstream.table({}) == []
    for second, said in (
        (of("d", 5, other_masks=1), "masks: "),
        (of("d", 5, attention="value"), "attention: nothing and value"),
    ):
        with pytest.raises(UserError, match=f"in different ways.*{said}"):
            downstream.evidence({"pretrained": of("a", 5), "diva": second})


def test_the_committed_oracle_shows_that_segmentation_sees_a_gain() -> None:
    found = json.loads((ROOT / METRICS / "oracle/mini-segmentation.json").read_text())
    gain = {column: result["gain"]["oracle"] for column, result in found.items()}
    assert gain["segments, training-free: mean IoU (pixel accuracy)"][1] > 5
