"""The paper profile: the eight published backbones as data; its stages on checkpoints served by a hub of our own."""

import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpoints
import clip as openai_clip
import open_clip
import pytest
import torch
from clones import Clone, stages_run
from hub import COMMIT, Hub, Request
from noting import idle, taken
from safetensors.torch import load_file, save_file
from shrunk import read_yaml, run, run_of, write_yaml
from torch.nn import functional as F

from pipeline import backbone as backbone_stage
from pipeline import (
    checkpoint,
    drift,
    encoder,
    export,
    images,
    mmvp,
    mmvp_vlm,
    plan,
    report,
    shuffled,
    train,
    zeroshot,
    zeroshot_sets,
)
from pipeline import denoiser as denoiser_stage
from pipeline.core.stages import UserError
from pipeline.data import downloads
from pipeline.diva.rules import STOCK, PoolingRule, TokenRule
from pipeline.engine import trial
from pipeline.models import backbones, exports, imports
from pipeline.models.backbones import Backbone
from pipeline.models.registry import complete
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import params

ROOT = Path(__file__).parents[1]
PAPER = {name: checkpoints.COMMITTED.backbones[name] for name in checkpoints.SOURCES}
CLS_AND_76, HALF, ALL = TokenRule("random", 76), TokenRule("random_fraction", 0.5), TokenRule("all")
RULES = {  # patches, tokens of the condition, its rule, its text, the pooling rule of the published scores
    "openai_224": (256, 77, CLS_AND_76, "sequence", PoolingRule(CLS_AND_76)),
    "openai_336": (576, 77, CLS_AND_76, "sequence", PoolingRule(CLS_AND_76)),
    "metaclip_l14": (256, 257, ALL, "mean", PoolingRule(ALL, normalize_tokens=True)),
    "metaclip_h14": (256, 257, ALL, "mean", PoolingRule(ALL, normalize_tokens=True)),
    "dfn_224": (256, 257, ALL, "mean", PoolingRule(TokenRule("none"), resize_mode="shortest")),
    "dfn_378": (729, 365, HALF, "mean", PoolingRule(HALF, True, False, drawn_per="pair", resize_mode="shortest")),
    "siglip_224": (256, 43, TokenRule("windows", 6), "mean", STOCK),
    "siglip_384": (729, 73, TokenRule("windows", 10), "mean", STOCK),
}


# Backbones are data


def test_the_eight_published_backbones_are_there() -> None:
    assert PAPER.keys() == RULES.keys()


@pytest.mark.parametrize("name", RULES)
def test_parameters_are_those_of_the_published_table(name: str, tmp_path: Path) -> None:
    entry, source = PAPER[name], checkpoints.SOURCES[name]
    backbones.write_config(source.architecture, source.preprocessing.model_dump(), tmp_path)
    found = sum(parameter.numel() for parameter in backbones.empty(tmp_path).parameters()) / 1e6
    assert found == pytest.approx(entry.published.parameters, abs=0.05)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "ViT-L-14-CLIPA"])
def test_a_model_is_of_the_class_that_open_clip_makes(name: str) -> None:
    """Random weights, of which stage plan tries a step, among them."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        made = [backbones.on_meta(config), trial.random_clip(config, {"mean": [0.5], "std": [0.5]}).clip]
        wanted = type(open_clip.create_model(name, load_weights=False, device="meta"))
    assert [type(model) for model in made] == [wanted, wanted]


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_rules_are_the_published_ones(name: str, tmp_path: Path) -> None:
    """On towers of the true shape, which have names and shapes but no numbers."""
    entry, source = PAPER[name], checkpoints.SOURCES[name]
    patches, tokens, rule, text, pooling = RULES[name]
    backbones.write_config(source.architecture, source.preprocessing.model_dump(), tmp_path)
    tower, size = backbones.empty(tmp_path).visual, open_clip.get_model_config(source.architecture)["vision_cfg"]
    with torch.device("meta"):
        pooled, found = backbones.image_tokens(tower, torch.empty(1, 3, size["image_size"], size["image_size"]))
    assert found.shape == (1, patches, pooled.shape[1])
    assert entry.condition.tokens == rule
    assert entry.condition.text == text
    drawn = rule.positions(patches) or (patches // int(rule.number) if rule.kind == "windows" else patches)
    assert 1 + drawn == tokens
    assert entry.published_pooling == pooling


@pytest.mark.parametrize("name", RULES)
def test_published_patterns_sum_up_to_the_published_averages(name: str) -> None:
    published = PAPER[name].published
    for average, patterns in (
        (published.before, published.before_patterns),
        (published.after, published.after_patterns),
    ):
        if patterns is not None:
            assert sum(patterns) / 9 == pytest.approx(average, abs=0.07)  # each pattern is rounded


@pytest.mark.parametrize("name", ["openai_224", "openai_336"])
def test_openai_s_checkpoints_have_two_addresses_which_name_the_hash(name: str) -> None:
    weights = checkpoints.SOURCES[name].weights
    ((_, sha256),) = weights.files.items()
    hosts = ("openaipublic.azureedge.net", "openaipublic.blob.core.windows.net")
    assert weights.at == [f"https://{host}/clip/models/{sha256}" for host in hosts]


def test_the_text_towers_take_clip_s_own_tokenizer_or_have_theirs() -> None:
    for name, source in checkpoints.SOURCES.items():
        text = open_clip.get_model_config(source.architecture)["text_cfg"]
        assert (source.tokenizer is not None) == ("hf_tokenizer_name" in text) == name.startswith("siglip")


PINS = {  # sha256 of what `plan` writes, on which fetching depends: another one fetches gigabytes again
    "openai_224": "2f883533b46e0a60", "openai_336": "c6a71de3d435f438", "metaclip_l14": "a2a51da12ecaa544",
    "metaclip_h14": "78797270d22bc955", "siglip_224": "a1d2605f12efeaaf", "siglip_384": "eb229404c773adc5",
    "dfn_224": "b8b1c0dbf606e20b", "dfn_378": "cb90f260abc206d3",
}  # fmt: skip


@pytest.mark.parametrize("name", PINS)
def test_what_is_fetched_of_a_backbone_is_what_was_fetched_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However params.yaml spells it, and without a network."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked a server"))
    p = params.load(ROOT / "params.yaml")
    run = p.run.model_copy(update={"profile": "paper", "backbones": [name], "benchmarks": []})
    pinned = plan.pins(p.model_copy(update={"run": run}))[f"pretrained-{name}"]
    assert hashlib.sha256(json.dumps(pinned, indent=2).encode()).hexdigest().startswith(PINS[name])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "ViT-L-15"}, "model: open_clip's registry has no weights of 'ViT-L-15'. Correct the name"),
        ({"tag": "webly"}, "tag: open_clip's registry has no 'webly' of ViT-SO400M-14-SigLIP. Name one of: webli"),
        ({"revision": None}, "revision is None, but open_clip's registry has only a repository on the hub. Name a"),
        ({"revision": "refs/pr/1"}, "revision: found 'hf://timm/ViT-SO400M-14-SigLIP@refs/pr/1'. String should match"),
        ({"mirrors": [], "files": {"../a.pt": None}}, "files: files names '../a.pt', which would be written outside"),
        ({"tokenizer": {"/t.json": None}}, "tokenizer: files names '/t.json', which would be written outside its"),
    ],
)
def test_what_the_registry_does_not_have_is_named(changes: dict[str, Any], said: str) -> None:
    source = PAPER["siglip_224"].source.model_copy(update=changes)
    with pytest.raises(UserError, match=rf"^(params.yaml:\n  )?backbones\.siglip_224\.source\.{re.escape(said)}"):
        complete("siglip_224", source)


def test_every_entry_of_the_registry_has_an_address() -> None:
    source, addresses = PAPER["siglip_224"].source, set()
    for model, tag in open_clip.list_pretrained():
        known = open_clip.get_pretrained_cfg(model, tag)
        for revision in [*(["main"] if known.get("hf_hub") else []), *([None] if known.get("url") else [])]:
            changes = {"model": model, "tag": tag, "revision": revision, "tokenizer": {}}
            addresses |= {*complete("own", source.model_copy(update=changes)).weights.at}
    assert {"hf://jienengchen/ViTamin-S@main", "hf://timm/ViT-SO400M-14-SigLIP@main"} <= addresses


# Checkpoints in every format


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, Path, torch.nn.Module]]:
    """By format: architecture, file, and a model of the stock library with the file's weights."""
    folder = tmp_path_factory.mktemp("formats")
    archive = folder / "ViT-T-7.pt"
    checkpoints.openai_archive(archive, 1, checkpoints.TINY_OPENAI)
    openai, _ = openai_clip.load(str(archive), device="cpu")
    clip, siglip = checkpoints.build(checkpoints.OPENCLIP, 2), checkpoints.build(checkpoints.SIGLIP, 3)
    (folder / "metaclip.pt").write_bytes(checkpoints.metaclip_file(clip))
    (folder / "open_clip_pytorch_model.bin").write_bytes(checkpoints.torch_file(clip.state_dict()))
    (folder / "authors.pth").write_bytes(checkpoints.torch_file(openai.state_dict()))
    checkpoints.safetensors_folder(folder / "siglip", siglip)
    return {
        "OpenAI's archive": (checkpoints.OPENAI, archive, openai),
        "MetaCLIP's .pt": (checkpoints.OPENCLIP, folder / "metaclip.pt", clip),
        "open_clip's .bin": (checkpoints.OPENCLIP, folder / "open_clip_pytorch_model.bin", clip),
        "open_clip's .safetensors": (checkpoints.SIGLIP, folder / "siglip/open_clip_model.safetensors", siglip),
        "the authors' .pth": (checkpoints.OPENAI, folder / "authors.pth", openai),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["OpenAI's archive", "MetaCLIP's .pt", "open_clip's .bin", "open_clip's .safetensors", "the authors' .pth"]
)
def test_a_checkpoint_of_every_format_embeds_as_its_own_library_does(formats: dict, name: str, tmp_path: Path) -> None:
    architecture, path, stock = formats[name]
    preprocessing = checkpoints.SOURCES["openai_224"].preprocessing.model_dump()
    folder = tmp_path / "model"
    backbones.write_config(architecture, preprocessing, folder)
    if architecture is checkpoints.SIGLIP:
        for file in path.parent.glob("*.json"):
            shutil.copy(file, folder)
    backbones.save_weights(imports.fitting(imports.read_checkpoint(path), folder, path), folder)
    backbone = Backbone.load(folder)
    pixels = torch.randn(2, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(0))
    ids = backbone.tokenizer(["a photo of 12 dots", "a thing"])
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode_image(pixels), stock.encode_image(pixels), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(backbone.encode_text(ids), stock.encode_text(ids), rtol=1e-4, atol=1e-5)
        pooled, _ = backbone.image_tokens(pixels)
    torch.testing.assert_close(pooled, stock.encode_image(pixels), rtol=1e-4, atol=1e-5)
    assert backbone.logit_scale.item() == pytest.approx(stock.logit_scale.exp().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_comes_in_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    backbones.write_config(
        checkpoints.OPENCLIP, checkpoints.SOURCES["metaclip_l14"].preprocessing.model_dump(), tmp_path
    )
    model = checkpoints.build(checkpoints.OPENCLIP, 2)
    stored = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    path = tmp_path / "open_clip_pytorch_model.bin"
    path.write_bytes(checkpoints.torch_file(stored))
    backbones.save_weights(imports.fitting(imports.read_checkpoint(path), tmp_path, path), tmp_path)
    written = load_file(tmp_path / backbones.WEIGHTS)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in written.items())


@pytest.mark.slow
def test_a_denoiser_stored_in_half_precision_computes_in_float32(tmp_path: Path) -> None:
    checkpoints.stable_diffusion(tmp_path)
    for part in ("vae", "unet", "text_encoder"):
        (file,) = (tmp_path / part).glob("*.safetensors")
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    config = tmp_path / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    assert {parameter.dtype for parameter in Denoiser.load(tmp_path).parameters()} == {torch.float32}


def test_a_checkpoint_of_another_architecture_is_refused(formats: dict, tmp_path: Path) -> None:
    _, path, _ = formats["open_clip's .bin"]
    backbones.write_config(checkpoints.OPENAI, checkpoints.SOURCES["openai_224"].preprocessing.model_dump(), tmp_path)
    with pytest.raises(UserError, match=r"open_clip_pytorch_model.bin does not fit .*\n.*wanted"):
        imports.fitting(imports.read_checkpoint(path), tmp_path, path)
    tensors = dict(imports.read_checkpoint(formats["OpenAI's archive"][1]))
    tensors["left"] = tensors.pop("logit_scale")
    with pytest.raises(UserError, match=r"left over: left\n  missing: logit_scale"):
        imports.fitting(tensors, tmp_path, path)


class Trap:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch trapped",)


def state_in(content: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def of_another_model() -> bytes:
    """A TorchScript archive that is none of OpenAI's."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


def text(word: str) -> bytes:
    """A string in a pickle."""
    return b"X" + struct.pack("<I", len(word)) + word.encode()


ZIP, LEGACY = (state_in({"a": torch.zeros(1000)}, zipped) for zipped in (True, False))
# What torch cannot set raises a TypeError, after which open_clip's reader reads again and lets torch run what follows.
TRAP_IN_LEGACY = b"\x80\x02ccollections\nOrderedDict\n)R(N}" + text("x") + b"K\x01stb0cposix\nsystem\n("
TRAP_IN_LEGACY += text("touch trapped") + b"tR."
NO_CHECKPOINTS = {
    "words": b"not a checkpoint",
    "a word that begins as a pickle": b"hello",
    "nothing": b"",
    "code": state_in({"a": Trap()}),
    "code after a wrong state": TRAP_IN_LEGACY,
    "a zip cut by a byte": ZIP[:-1],
    "a zip cut in its directory": ZIP[:-30],
    "a zip with a damaged directory": ZIP.replace(b"PK\x01\x02", b"PK\x09\x09"),
    **{f"{end} bytes of an older file": LEGACY[:end] for end in (10, 30, 100, 200)},
    "an older file that lacks its end": LEGACY[:-100],  # its length is no part of a name: it differs between processes
    "an archive of another model": of_another_model(),
    "a cut archive": of_another_model()[:-30],
    "a list": state_in([torch.zeros(2)]),
    "a number": state_in(3),
    "an empty state": state_in({}),
    "a state that is none": state_in({"state_dict": None}),
    "a number among tensors": state_in({"a": torch.zeros(2), "epoch": 3}),
    "a name that is a number": state_in({"a": torch.zeros(2), 1: torch.zeros(2)}),
    "a sparse tensor": state_in({"a": torch.zeros(2).to_sparse()}),
    "a tensor without numbers": state_in({"a": torch.zeros(2, device="meta")}),
}


@pytest.mark.parametrize(
    ("what", "name"), [*((what, "model.pt") for what in NO_CHECKPOINTS), ("words", "model.safetensors")]
)
def test_what_is_no_checkpoint_is_refused_and_runs_nothing(
    what: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torch is told to run code unless it is asked not to; nor does the message say how to run it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    Path(name).write_bytes(NO_CHECKPOINTS[what])
    with pytest.raises(UserError, match=rf"^{name} cannot be read as a checkpoint \(\w+\)") as caught:
        imports.read_checkpoint(Path(name))
    assert "weights_only" not in str(caught.value)
    assert [path.name for path in Path().iterdir()] == [name]


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UserError, match=r"'ViT-B-17': open_clip has no such model. Similar names.*"):
        backbones.model_config("ViT-B-17")


# The stages


@pytest.fixture(scope="module")
def hub(formats: dict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Everything that the paper profile fetches, tiny."""
    with Hub() as hub:
        hub.add_files("/clip", {"ViT-L-14.pt": formats["OpenAI's archive"][1].read_bytes()})
        hub.add_files("/metaclip", {"l14_fullcc2.5b.pt": formats["MetaCLIP's .pt"][1].read_bytes()})
        encoder_folder = checkpoints.vision_transformer(tmp_path_factory.mktemp("encoder") / "published")
        hub.add_repo("timm/tiny", encoder_folder, lfs=lambda path, _: path.endswith(".safetensors"))
        hub.add_repo("timm/SigLIP", formats["open_clip's .safetensors"][1].parent, lfs=100_000)
        hub.add_repo(
            "apple/DFN", {"open_clip_pytorch_model.bin": formats["open_clip's .bin"][1].read_bytes()}, lfs=1000
        )
        tuned = {key: formats[key][1].read_bytes() for key in ("the authors' .pth", "open_clip's .bin")}
        siglip = io.BytesIO()
        torch.save(checkpoints.build(checkpoints.SIGLIP, 4).state_dict(), siglip)
        hub.add_repo(
            "BAAI/DIVA",
            {
                "openai.pth": tuned["the authors' .pth"],
                "dfn.pth": tuned["open_clip's .bin"],
                "siglip.pth": siglip.getvalue(),
            },
            lfs=1000,
        )
        hub.add_repo("MMVP/MMVP_VLM", checkpoints.mmvp_vlm(1), kind="dataset")
        shards = {f"cc3m-train-{i:04d}.tar": checkpoints.shard(10 * i, 6) for i in range(2)}
        hub.add_repo("pixparse/cc3m-wds", shards | {"cc3m-validation-0000.tar": b"-"}, kind="dataset", lfs=1000)
        hub.add_repo("clip-benchmark/wds_dots", checkpoints.classification_set(3, 12), kind="dataset", lfs=1000)
        hub.add_repo("clip-benchmark/wds_captions", checkpoints.retrieval_set(6), kind="dataset", lfs=1000)
        yield hub


@pytest.fixture(scope="module")
def denoiser(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("denoiser")
    checkpoints.stable_diffusion(folder)
    hub.add_repo("sd2-community/sd", folder, lfs=10_000)
    return folder


def smaller(content: dict[str, Any], endpoint: str) -> dict[str, Any]:
    """params.yaml with the addresses and the sizes of what the test's hub serves."""
    paper, entries = content["profiles"]["paper"], content["backbones"]
    paper["images"]["shards"]["at"] = [f"hf://datasets/pixparse/cc3m-wds@{COMMIT}"]
    paper["mmvp_vlm"]["pairs_per_pattern"] = 1
    paper["mmvp_vlm"]["download"]["at"] = ["hf://datasets/MMVP/MMVP_VLM@main"]
    paper["zeroshot_sets"]["sets"] = {"dots": COMMIT[:7], "captions": "main", "birdsnap": None}
    paper["denoiser"]["download"] |= {
        "at": ["hf://gone/sd@main", "hf://sd2-community/sd@main"],
        "files": dict.fromkeys(paper["denoiser"]["download"]["files"]),
    }
    paper["train"] |= {"size": 64, "micro_batch": 2, "precision": "float32"}
    paper["recipes"]["diva"] |= {"batch": 4, "steps": 2}
    anchored = paper["recipes"]["text_anchored"]
    anchored |= {
        "batch": 4,
        "steps": 2,
        "gap_correction": {"components": 3, "images": 6},
        "trained": {"kind": "head", "heads": 2},
    }
    two_stage, contrastive = (
        paper["recipes"][name] | {"batch": 4, "steps": 2, "trained": {"kind": "lora", "rank": 2, "alpha": 2.0}}
        for name in ("two_stage", "contrastive")
    )
    contrastive["losses"] = {"info_nce": contrastive["losses"]["info_nce"] | {"negatives": 1}}
    paper["recipes"] |= {"two_stage": two_stage, "contrastive": contrastive}
    for recipe in (anchored, two_stage, contrastive):
        recipe["warmup"]["steps"] = 2
    banks = {
        "reranked": {"reranking": {"captions": 4, "candidates": 2}},
        "captions": {"caption_contrast": {"captions": 4}},
    }
    for name, changes in {**banks, "kernel": {}}.items():
        recipe = paper["recipes"][name]
        kind = {"kind": "lora", "rank": 2, "alpha": 2.0} if name == "kernel" else {"kind": "head", "heads": 2}
        recipe |= {"batch": 4, "steps": 2, "trained": kind}
        for loss, values in changes.items():
            recipe["losses"][loss] |= values
    paper["encoder"]["architecture"] = "vit_tiny_patch16_224"
    paper["encoder"]["download"]["at"] = [f"hf://timm/tiny@{COMMIT}"]
    paper["train"] |= {"compile": False, "validation": {"images": 2, "every": 1}}
    paper["mmvp"] |= {"draws": 2, "batch": 8}
    paper["zeroshot"] |= {"batch": 8}
    sources = {
        "openai_224": (checkpoints.OPENAI, f"{endpoint}/clip", "ViT-L-14.pt", "openai.pth"),
        "metaclip_l14": (checkpoints.OPENCLIP, f"{endpoint}/metaclip", "l14_fullcc2.5b.pt", "dfn.pth"),
        "siglip_224": (checkpoints.SIGLIP, "hf://timm/SigLIP@main", "open_clip_model.safetensors", "siglip.pth"),
        "dfn_378": (checkpoints.OPENCLIP, "hf://apple/DFN@main", "open_clip_pytorch_model.bin", "dfn.pth"),
    }
    for name, (architecture, address, file, tuned) in sources.items():
        entry = entries[name]
        entry["source"] |= {"architecture": architecture}
        entry["source"]["weights"] |= {"at": [address], "files": {file: None}}
        if entry["source"].get("tokenizer"):
            entry["source"]["tokenizer"]["at"] = [address]
        released = entry["checkpoints"]["released"]["weights"]
        released |= {"at": ["hf://BAAI/DIVA@main"], "files": {tuned: None}}
        entry["published"]["parameters"] = 0.1  # million: a test needs no disk for models of true size
    return content


@pytest.fixture
def folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory for profile paper, in which that server is the hub and is well again afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(downloads, "WAIT", 0.001)
    hub.stand_in(monkeypatch)
    write(smaller(committed(), hub.endpoint), ["siglip_224"], ["pretrained"])
    yield tmp_path
    hub.heal()


def committed() -> dict[str, Any]:
    """params.yaml, its published backbones spelled out, for tests to give them other addresses and architectures."""
    content = read_yaml(ROOT / "params.yaml")
    for name, source in checkpoints.SOURCES.items():
        content["backbones"][name]["source"] = source.model_dump()
    return content


def write(content: dict[str, Any], names: list[str], weights: list[str]) -> None:
    lists = {key.removeprefix("run."): values for key, values in run_of(weights).items()}
    content["run"] = {"profile": "paper", "backbones": names, **lists}
    write_yaml(Path("params.yaml"), content)


def read(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def fetched(requests: list[Request]) -> list[str]:
    """Names of the files whose bytes were asked for."""
    return [path.rpartition("/")[2] for method, path, *_ in requests if method == "GET" and "/api/" not in path]


@pytest.mark.slow
@pytest.mark.usefixtures("denoiser")
def test_the_paper_profile_from_download_to_report(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its stages in DVC's order, towers of open_clip and of timm: training, the authors' weights, every recipe."""
    content, names, weights = smaller(committed(), hub.endpoint), ["openai_224", "siglip_224"], ["diva", "released"]
    write(content, names, ["pretrained", *weights])
    hub.fail("/resolve/" + COMMIT + "/vae/config.json", status=500, times=2)  # which passes by itself
    hub.cut("cc3m-train-0000.tar", after_bytes=3000)
    hub.requests.clear()
    taken.clear()  # of the tests before
    for stage in (plan, images, mmvp_vlm, zeroshot_sets, denoiser_stage):
        run(stage)
    assert not [fault for fault in hub.faults if fault.times]
    assert fetched(hub.requests).count("cc3m-train-0000.tar") == 2  # cut before a whole piece of it was kept
    assert read("metrics/paper/images.json")["images"] == 12
    told = capsys.readouterr()
    assert "not among clip-benchmark's sets, so left out of 3: birdsnap" in told.out + told.err
    assert "hf://gone/sd@main" in told.err  # the first address does not answer, the mirror does

    hub.requests.clear()
    for name in names:
        run(backbone_stage, name)
        run(checkpoint, name, "released")
    assert sorted(fetched(hub.requests)) == [
        "ViT-L-14.pt", "open_clip_model.safetensors", "openai.pth", "siglip.pth", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert read("metrics/paper/backbone/siglip_224.json")["weights"]["revision"] == COMMIT
    assert "their licence: MIT" in capsys.readouterr().out

    hub.requests.clear()
    for name in names:
        run(train, name, "diva")
    for stage, name, tuned in itertools.product((mmvp, zeroshot), names, ["pretrained", *weights]):
        run(stage, name, tuned)
    run(report)
    found, evidence = read("metrics/paper/report.json"), read("metrics/paper/evidence.json")
    page = Path("metrics/paper/report.html").read_text()
    assert found["openai_224"]["published"] == {"pairs_stock": 19.3, "pairs_published": 25.9}
    for name in names:
        assert found[name].keys() == {"score", "gain", "published"}
        assert found[name]["score"].keys() == {"pretrained", *weights}
        assert found[name]["gain"].keys() == {*weights}
        assert evidence[name]["weights"]["diva"]["verdict"]["pairs"] in (
            "reproduced", "not reproduced", "not distinguishable",
        )  # fmt: skip
    assert "<td>genhancer, theirs (stock pooling)<td>19.3<td>31.9<td>+12.6" in page
    said = "stock embedding before, published pooling after, as in the paper&#39;s table; published +6.6; "
    assert f"{said}the published pooling alone" in page
    assert re.search(r"<td>SAN, mean IoU\s*<td>ADE20K-150\s*<td[^>]*>29\.2\s*<td[^>]*>30\.2\s*<td[^>]*>\+1\.0", page)
    assert "SAN" not in json.dumps(read("metrics/paper/evidence.json"))  # no verdict

    capsys.readouterr()
    for name, tuned in (("openai_224", "diva"), ("openai_224", "released"), ("siglip_224", "pretrained")):
        run(export, name, tuned)
    assert (
        "siglip_224: exported for open_clip only. transformers' SiglipModel is of another shape"
        in capsys.readouterr().out
    )
    card = Path("models/paper/export/openai_224-diva/README.md").read_text()
    assert "Licence of the base weights: MIT" in card
    assert "hf://datasets/pixparse/cc3m-wds@" in card

    write(content, names, ["text_anchored"])  # captions, gap, head
    content["run"]["benchmarks"] = ["mmvp"]
    write_yaml(Path("params.yaml"), content)
    for stage, name in itertools.product((train, mmvp), names):
        run(stage, name, "text_anchored")
    run(report)
    for name in names:
        run(export, name, "text_anchored")
        assert read(f"models/paper/text_anchored/{name}/diva.json")["recipe"]["warmup"]["steps"] == 2
        assert Path(f"models/paper/export/{name}-text_anchored/residual_head.py").is_file()
    profile = content["profiles"]["paper"]
    for recipe in ("two_stage", "contrastive"):
        write(content, names, [recipe])
        run(train, "siglip_224", recipe)
        made = read(f"models/paper/{recipe}/siglip_224/diva.json")
        assert made["recipe"]["losses"] == (profile["base_recipe"] | profile["recipes"][recipe])["losses"]
        assert made["result"]["steps"] == 2
    for control in (shuffled, drift):
        run(control, "siglip_224", "contrastive")
    assert hub.requests == []  # once all was fetched, nobody is asked

    read_encoder = {"reranked": False, "captions": True, "kernel": True}
    write(content, names, [*read_encoder])
    run(plan)
    for recipe, reads in read_encoder.items():
        hub.requests.clear()
        run(encoder, recipe)
        assert {*fetched(hub.requests)} == ({"config.json", "model.safetensors"} if reads else set())
        run(train, "siglip_224", recipe)
        assert read(f"models/paper/{recipe}/siglip_224/diva.json")["result"]["steps"] == 2
        run(shuffled, "siglip_224", recipe)
    declared = taken.keys() - {"plan", "drift"}  # drift is one of two that stage control runs
    assert not {name: idle(name) for name in declared if idle(name)}  # no stage declares in vain


SHORTEST = ["released", "genhancer", "un2clip"]


@pytest.fixture
def compared(hub: Hub, folder: Path) -> Path:
    """openai_224 beside three of others' checkpoints, on the pairs alone: a file, a folder of transformers, a path."""
    content, tuned = smaller(committed(), hub.endpoint), checkpoints.build(checkpoints.OPENAI, 8)
    made = folder / "made/OpenAICLIP/clip-vit-large-patch14"
    like = folder / "like"
    backbones.write_config(checkpoints.OPENAI, checkpoints.SOURCES["openai_224"].preprocessing.model_dump(), like)
    backbones.save_weights(tuned.state_dict(), like)
    exports.transformers_model(tuned, exports.tokenizer(Backbone.load(like))).save_pretrained(made)
    hub.add_repo("msj9817/GenHancer", folder / "made", lfs=1000)
    by_hand = folder / "data/by_hand/un2clip/openai_224.pth"
    by_hand.parent.mkdir(parents=True)
    torch.save({name: tensor for name, tensor in tuned.state_dict().items() if name.startswith("visual.")}, by_hand)
    write(content, ["openai_224"], ["pretrained", *SHORTEST])
    content["run"]["benchmarks"] = ["mmvp"]
    write_yaml(folder / "params.yaml", content)
    return by_hand


@pytest.mark.slow
def test_the_shortest_way_fetches_weights_and_pairs_alone(
    hub: Hub, compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """pretrained beside others' checkpoints on MMVP-VLM alone: told before, fetched, scored, judged and compared."""
    hub.requests.clear()
    run(plan)
    told = "".join(capsys.readouterr().out.split())
    for folder in ("data/paper/mmvp", *(f"models/paper/{name}/openai_224" for name in ("pretrained", *SHORTEST[:2]))):
        assert folder in told
    assert "zeroshot" not in told
    run(mmvp_vlm)
    run(backbone_stage, "openai_224")
    for name in SHORTEST:
        run(checkpoint, "openai_224", name)
    names = [name for name in fetched(hub.requests) if not name.endswith((".jpg", "Questions.csv"))]
    assert sorted(names) == ["ViT-L-14.pt", "config.json", "model.safetensors", "openai.pth"]
    record = read("metrics/paper/checkpoint/openai_224-un2clip.json")
    assert record["sha256"] == hashlib.sha256(compared.read_bytes()).hexdigest()
    genhancer, un2clip, pretrained = (
        load_file(Path("models/paper", name, "openai_224", backbones.WEIGHTS))
        for name in ("genhancer", "un2clip", "pretrained")
    )
    for name, tensor in genhancer.items():  # one model, whole and its image tower alone
        of = tensor if name.startswith("visual.") else pretrained[name]
        torch.testing.assert_close(un2clip[name], of, rtol=1e-6, atol=1e-6)

    for name in ("pretrained", *SHORTEST):
        run(mmvp, "openai_224", name)
    run(report)
    evidence = read("metrics/paper/evidence.json")["openai_224"]
    for name in SHORTEST:
        verdict = evidence["weights"][name]["verdict"]
        assert verdict["pairs"] in ("reproduced", "not reproduced", "not distinguishable")
        assert verdict["zeroshot"] == "not measured"
    published = {name: found["published"] for name, found in evidence["weights"].items()}
    assert published["released"] == {"gain": 6.6, "pooling": "published"}
    assert published["genhancer"] == {"gain": 12.6, "pooling": "stock"}
    assert published["un2clip"] == {"gain": 13.3, "pooling": "stock"}
    assert len(evidence["comparison"]) == 6  # every two of four
    away = evidence["baseline"]["pairs"]
    assert away["away"] == round(away["found"] * 9 / 100) - round(19.3 * 9 / 100)
    page = Path("metrics/paper/report.md").read_text()
    assert "p, corrected (Holm)" in page
    assert "| un2clip minus genhancer |" in page
    assert "The pretrained weights: pairs " in page
    run(export, "openai_224", "un2clip")
    card = Path("models/paper/export/openai_224-un2clip/README.md").read_text()
    assert "checkpoint `un2clip`, its image tower alone" in card
    assert "- Tuned weights: the authors of un2CLIP, licence theirs" in card
    assert {"config.json", "open_clip_config.json"} <= {
        p.name for p in Path("models/paper/export/openai_224-un2clip").iterdir()
    }


@pytest.mark.slow
def test_what_lies_here_and_does_not_fit_is_refused_before_anybody_is_asked(
    hub: Hub, compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_hand, content = compared.parent, read_yaml(Path("params.yaml"))
    entry = content["backbones"]["openai_224"]["checkpoints"]["un2clip"]
    torch.save(checkpoints.build(checkpoints.OPENCLIP, 2).visual.state_dict(), by_hand / "other.pth")
    (by_hand / "photos").mkdir()
    (by_hand / "photos/1.jpg").touch()
    shutil.copy(compared, "elsewhere.pth")
    sha256 = hashlib.sha256(compared.read_bytes()).hexdigest()
    good, run_section = dict(entry["weights"]), content["run"]
    missing = "get it from the authors of un2CLIP"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [  # of the weights, of the checkpoint, what is said
        ({"path": "data/by_hand/nowhere.pth"}, {}, f"nowhere.pth: no such file or folder. .*{missing}"),
        ({"sha256": "0" * 64}, {}, "other bytes than params.yaml states: expected sha256 0000"),
        ({"path": "data/by_hand/un2clip/other.pth"}, {}, "other.pth does not fit the architecture in params.yaml"),
        ({}, {"parts": "all"}, "openai_224.pth holds the image tower alone .*set parts: vision for this checkpoint"),
        ({"path": "data/by_hand/un2clip/photos"}, {}, "photos has no config.json .it holds 1.jpg."),
        ({"path": "elsewhere.pth"}, {}, f"elsewhere.pth: a change .* not be seen. .*un2clip.weights.sha256: {sha256}"),
        ({}, {"published": {"pairs": 32.6, "pooling": "mean"}}, "un2clip.published.pooling: found 'mean'"),
    ]

    def planned(weights: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        entry.update({"weights": good | weights, "parts": "vision", "published": None} | checkpoint)
        write_yaml(Path("params.yaml"), content)
        run(plan)

    hub.requests.clear()
    for weights, checkpoint_, said in cases:
        with pytest.raises(SystemExit):
            planned(weights, checkpoint_)
        assert re.search(said, capsys.readouterr().err)
        assert not Path("data/paper/planned").exists()
    run_section |= {"benchmarks": ["mmvp", "segmentation"], "benchmark_sets": ["segmentation"]}
    with pytest.raises(SystemExit):
        planned({}, {})
    assert "data/ADEChallengeData2016: no such file or folder. Fetch it by hand" in capsys.readouterr().err
    run_section |= {"benchmarks": ["mmvp"], "benchmark_sets": []}
    assert hub.requests == []
    planned({"path": "elsewhere.pth", "sha256": sha256}, {})
    assert read("data/paper/planned/un2clip-openai_224.json")["weights"] == {"sha256": sha256}


@pytest.mark.slow
def test_a_branch_keeps_the_bytes_of_its_first_fetch(
    hub: Hub, compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GenHancer's repository is pinned by no commit, nor are some of the zero-shot sets."""
    run(plan)
    said = capsys.readouterr().out
    assert (
        f"hf://msj9817/GenHancer@main is a branch, now at commit {COMMIT}. The first fetch records its hashes" in said
    )
    assert "clip@" not in said
    run(backbone_stage, "openai_224")
    for _ in range(2):  # the same bytes again are no matter
        run(checkpoint, "openai_224", "genhancer")
    model = compared.parents[3] / "made/OpenAICLIP/clip-vit-large-patch14/model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(model).items()}, model, metadata={"format": "pt"})
    hub.add_repo("msj9817/GenHancer", model.parents[2], lfs=1000)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(checkpoint, "openai_224", "genhancer")
    said = capsys.readouterr().err
    assert f"hf://msj9817/GenHancer@main has other bytes now (commit {COMMIT}) than an earlier fetch recorded" in said
    assert "model.safetensors, sha256" in said
    Path("metrics/paper/checkpoint/openai_224-genhancer.json").unlink()
    run(checkpoint, "openai_224", "genhancer")


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_a_set_s_branch_keeps_its_bytes_too(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    content = smaller(committed(), hub.endpoint)
    content["profiles"]["paper"]["zeroshot_sets"]["run"] = ["captions"]
    write(content, ["siglip_224"], [])
    served = hub.repos["datasets", "clip-benchmark/wds_captions"]
    try:
        run(zeroshot_sets)
        hub.add_repo("clip-benchmark/wds_captions", checkpoints.retrieval_set(5), kind="dataset", lfs=1000)
        with pytest.raises(SystemExit):
            run(zeroshot_sets)
    finally:
        hub.repos["datasets", "clip-benchmark/wds_captions"] = served
    assert "wds_captions@main has other bytes now" in capsys.readouterr().err
    assert read("metrics/paper/zeroshot_sets.json")["sets"] == {"captions": "retrieval"}
    run(zeroshot_sets)


@pytest.mark.exhaustive
def test_the_readme_s_shortest_way_through_dvc(hub: Hub, compared: Path, tmp_path: Path) -> None:
    """Its own command, with others' checkpoints beside: what it fetches is what it says before, and nothing else."""
    clone = Clone.make(tmp_path / "clone")
    shutil.copytree(compared.parents[1], clone.root / "data/by_hand", dirs_exist_ok=True)
    write_yaml(clone.root / "params.yaml", smaller(committed(), hub.endpoint))
    clone.commit("smaller")
    clone.environment = {"HF_ENDPOINT": hub.endpoint}
    (command,) = re.findall(r"^dvc exp run report .*\[mmvp\].*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    more = f"run.checkpoints=[{','.join(SHORTEST)}]"
    hub.requests.clear()
    output = clone.run(*shlex.split(command.replace("run.checkpoints=[released]", more)))
    expected = {"plan", "mmvp_vlm", "report", "backbone@openai_224", "score@mmvp-openai_224-pretrained"}
    for name in SHORTEST:
        expected |= {f"checkpoint@openai_224-{name}", f"score-checkpoints@mmvp-openai_224-{name}"}
    assert sorted(stages_run(output)) == sorted(expected)
    assert stages_run(output)[0] == "plan"
    assert output.index("What will be fetched") < output.index("fetching ")
    names = [name for name in fetched(hub.requests) if not name.endswith((".jpg", "Questions.csv"))]
    assert sorted(names) == ["ViT-L-14.pt", "config.json", "model.safetensors", "openai.pth"]
    evidence = json.loads((clone.root / "metrics/paper/evidence.json").read_text())["openai_224"]
    assert evidence["weights"].keys() == {*SHORTEST}
    assert "genhancer: pairs " in (clone.root / "metrics/paper/report.md").read_text()

    by_hand = clone.root / "data/by_hand/un2clip/openai_224.pth"  # without a hash in params.yaml
    torch.save({name: tensor + 0.01 for name, tensor in torch.load(by_hand).items()}, by_hand)
    hub.requests.clear()
    again = {name for name in expected if "un2clip" in name} | {"plan", "report"}
    assert sorted(stages_run(clone.run("dvc", "repro", "report"))) == sorted(again)
    assert not fetched(hub.requests)
    clone.run("dvc", "exp", "run", "report", "-S", "run.benchmarks=[zeroshot]",
              "-S", "profiles.paper.zeroshot_sets.run=[captions]")  # fmt: skip
    assert {path.name for path in (clone.root / "data/paper/zeroshot/wds").iterdir()} == {"captions"}


@pytest.mark.parametrize(
    ("stage", "arguments", "record"),
    [
        (zeroshot_sets, [], "metrics/paper/zeroshot_sets.json"),
        (checkpoint, ["openai_224", "released"], "metrics/paper/checkpoint/openai_224-released.json"),
    ],
)
@pytest.mark.parametrize("content", ["", "<<<<<<< HEAD\n{}\n", "[]"])
def test_a_damaged_record_is_named_before_anything_is_fetched(
    stage: ModuleType,
    arguments: list[str],
    record: str,
    content: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(downloads, "locate", lambda *_: pytest.fail("asked a server"))
    values = committed()
    values["run"]["profile"] = "paper"
    write_yaml(Path("params.yaml"), values)
    Path(record).parent.mkdir(parents=True)
    Path(record).write_text(content)
    with pytest.raises(SystemExit):
        run(stage, *arguments)
    assert f"error: {record}: " in (told := capsys.readouterr().err)
    assert f"git checkout {record}" in told


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_another_set_fetches_no_set_again(hub: Hub) -> None:
    content = smaller(committed(), hub.endpoint)
    for names in (["dots"], ["dots", "captions"]):
        content["profiles"]["paper"]["zeroshot_sets"]["run"] = names
        write(content, ["siglip_224"], [])
        hub.requests.clear()
        run(zeroshot_sets)
    asked = {path for method, path, *_ in hub.requests if method == "GET" and "/resolve/" in path}
    assert asked
    assert all("captions" in path for path in asked)
    assert read("metrics/paper/zeroshot_sets.json")["sets"].keys() == {"dots", "captions"}


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_chosen_sets_alone_are_fetched_scored_and_named(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    content = smaller(committed(), hub.endpoint)

    def choose(names: list[str] | str) -> str:
        """Score on these; returns what stage plan told."""
        content["profiles"]["paper"]["zeroshot_sets"]["run"] = names
        write(content, ["openai_224"], ["pretrained", "released"])
        content["run"]["benchmarks"] = ["zeroshot"]
        write_yaml(Path("params.yaml"), content)
        run(plan)
        run(zeroshot_sets)
        return capsys.readouterr().out

    hub.requests.clear()
    told = choose(["captions"])
    assert "wds/captions" in told
    assert not [path for _, path, *_ in hub.requests if "wds_dots" in path]
    run(mmvp_vlm)
    run(backbone_stage, "openai_224")
    run(checkpoint, "openai_224", "released")
    for weights in ("pretrained", "released"):
        run(zeroshot, "openai_224", weights)
        assert read(f"metrics/paper/scores/zeroshot/openai_224-{weights}/scores.json").keys() == {"captions"}
    run(report)
    assert "\nSets: retrieval, recall@k: captions.\n" in Path("metrics/paper/report.md").read_text()
    assert "Sets that the means are of: retrieval, recall@k: captions." in Path("metrics/paper/report.html").read_text()
    run(export, "openai_224", "released")
    assert "\nRetrieval, recall@k: captions.\n" in Path("models/paper/export/openai_224-released/README.md").read_text()

    told = choose("all")
    assert "wds/dots" in told
    assert "there already: data/paper/mmvp, data/paper/zeroshot/wds/captions, models" in told
    run(zeroshot, "openai_224", "released")
    with pytest.raises(SystemExit):
        run(report)
    assert re.search(
        "zeroshot scores before and after were made in different ways, .*: sets.dots: nothing and [0-9a-f]{64}. Run",
        capsys.readouterr().err,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["dot"], "zeroshot_sets: run names 'dot', which is none of the sets that are there: "),
        (["birdsnap"], "zeroshot_sets: run names 'birdsnap', which is none of"),
        ([], "zeroshot_sets.run: found"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_set_that_is_not_there_cannot_be_chosen(
    hub: Hub, names: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = smaller(committed(), hub.endpoint)
    content["profiles"]["paper"]["zeroshot_sets"]["run"] = names
    write(content, ["siglip_224"], ["pretrained"])
    with pytest.raises(SystemExit):
        run(plan)
    assert said in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.usefixtures("denoiser")
def test_the_user_s_commands_on_the_paper_profile(hub: Hub, tmp_path: Path) -> None:
    """Through DVC: two backbones with training, then another with the authors' weights and without it."""
    clone = Clone.make(tmp_path / "clone")
    write_yaml(clone.root / "params.yaml", smaller(committed(), hub.endpoint))
    clone.commit("smaller")
    clone.environment = {"HF_ENDPOINT": hub.endpoint}
    output = clone.run(
        "dvc", "exp", "run", "dvc.yaml", "-S", "run.profile=paper", "-S", "run.backbones=[openai_224,dfn_378]",
        "-S", "run.checkpoints=[]", "-S", "run.recipes=[diva]", "-S", "run.controls=[]",
    )  # fmt: skip
    everything = {"plan", "input@images", "mmvp_vlm", "zeroshot_sets", "input@denoiser", "encoder@diva", "report"}
    for name in ("openai_224", "dfn_378"):
        everything |= {f"backbone@{name}", f"train@{name}-diva"}
        for which in ("score@mmvp-", "score@zeroshot-", "export@"):
            everything |= {f"{which}{name}-pretrained", f"{which.replace('@', '-recipes@')}{name}-diva"}
    assert sorted(stages_run(output)) == sorted(everything)
    assert stages_run(output)[0] == "plan"
    assert "their licence: apple-amlr" in output
    report = json.loads((clone.root / "metrics/paper/report.json").read_text())
    assert report["dfn_378"].keys() == {"score", "gain", "published"}
    card = (clone.root / "models/paper/export/dfn_378-diva/README.md").read_text()
    assert "Licence of the base weights: apple-amlr (research only)" in card

    clone.use_every_verb(tmp_path / "trained")

    hub.requests.clear()
    output = clone.run(
        "dvc", "exp", "run", "dvc.yaml", "-S", "run.backbones=[siglip_224]", "-S", "run.checkpoints=[released]",
        "-S", "run.recipes=[]", "-S", "run.inputs=[]",
    )  # fmt: skip
    expected = {"plan", "backbone@siglip_224", "checkpoint@siglip_224-released", "report"}
    for which in ("score@mmvp-", "score@zeroshot-", "export@"):
        expected |= {f"{which}siglip_224-pretrained", f"{which.replace('@', '-checkpoints@')}siglip_224-released"}
    assert sorted(stages_run(output)) == sorted(expected)
    assert sorted(fetched(hub.requests)) == [
        "open_clip_model.safetensors", "siglip.pth", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    (clone.root / ".dvc/config.local").unlink()  # the other remote
    clone.use_every_verb(tmp_path / "scored")

    lists = ("run.recipes=[text_anchored]", "run.inputs=[images,denoiser]", "run.backbones=[openai_224,siglip_224]")
    clone.run("dvc", "exp", "run", "dvc.yaml", *(f"--set-param={values}" for values in (*lists, "run.checkpoints=[]")))
    for name in ("openai_224", "siglip_224"):
        assert (clone.root / f"models/paper/export/{name}-text_anchored/residual_head.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda hub: hub.corrupt("open_clip_model.safetensors"), r"other bytes than stated: expected sha256"),
        (lambda hub: hub.missing("tokenizer.json"), r"tokenizer\.json.*404|404.*tokenizer\.json"),
    ],
)
def test_a_faulty_download_stops_the_stage_and_leaves_nothing(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], fault: Any, message: str
) -> None:
    fault(hub)
    with pytest.raises(SystemExit) as ended:
        run(backbone_stage, "siglip_224")
    assert ended.value.code == 1
    assert re.search(f"error: .*({message})", capsys.readouterr().err, re.DOTALL)
    assert not [path for path in (folder / "models").rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert not list((folder / "metrics").rglob("*.json"))
    hub.heal()
    run(backbone_stage, "siglip_224")
    assert Backbone.load(folder / "models/paper/pretrained/siglip_224").width == 96


@pytest.mark.slow
def test_the_authors_checkpoint_lies_where_git_and_dvc_do_not_look(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a kill leaves nothing that would be committed."""
    run(backbone_stage, "siglip_224")
    lay, read = [], imports.tensors

    def noted(source: Path, original: Path, parts: str) -> backbones.Tensors:
        lay.append(source)
        return read(source, original, parts)

    monkeypatch.setattr(imports, "tensors", noted)
    run(checkpoint, "siglip_224", "released")
    (file,) = lay
    assert file.parts[:4] == ("models", "paper", "released", ".siglip_224.partial")
    models = (Path("models/paper", weights, "siglip_224") for weights in ("released", "pretrained"))
    assert len({frozenset(path.name for path in model.iterdir()) for model in models}) == 1


@pytest.mark.slow
def test_a_tokenizer_of_another_length_is_refused(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.save_tokenizer(folder / "short", 320)
    hub.add_repo("timm/short", folder / "short")
    content = smaller(committed(), hub.endpoint)
    content["backbones"]["siglip_224"]["source"]["tokenizer"]["at"] = ["hf://timm/short@main"]
    write(content, ["siglip_224"], ["pretrained"])
    with pytest.raises(SystemExit):
        run(backbone_stage, "siglip_224")
    assert "the tokenizer has 320 entries, the text tower 32000" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_another_model_of_open_clip_takes_one_entry(hub: Hub) -> None:
    """A small one at its true size, whose name is in no code of ours."""
    name = "ViT-S-32-alt"
    model = checkpoints.build(name, 5)
    stored = {key: tensor.half() for key, tensor in model.state_dict().items()}
    hub.add_repo(f"laion/{name}", {"open_clip_pytorch_model.bin": checkpoints.torch_file(stored)}, lfs=1000)
    content = smaller(committed(), hub.endpoint)
    content["backbones"]["other"] = {
        "profile": "paper",
        "source": {
            "kind": "checkpoint",
            "architecture": name,
            "preprocessing": content["backbones"]["openai_224"]["source"]["preprocessing"],
            "weights": {
                "at": [f"hf://laion/{name}@main"], "licence": "MIT", "files": {"open_clip_pytorch_model.bin": None}
            },
        },
        "condition": {"tokens": {"kind": "all"}, "text": "mean"},
        "published_pooling": {"tokens": {"kind": "none"}, "normalize_tokens": False, "normalize_output": True},
    }  # fmt: skip
    write(content, ["other"], ["pretrained"])
    for stage, *arguments in ((plan,), (mmvp_vlm,), (backbone_stage, "other"), (mmvp, "other", "pretrained")):
        run(stage, *arguments)
    assert read("metrics/paper/scores/mmvp/other-pretrained/scores.json")["pairs"] == 9
    found = Backbone.load(Path("models/paper/pretrained/other"))
    pixels = torch.stack([found.preprocess(checkpoints.image(i)) for i in range(2)])
    with torch.no_grad():
        similarity = F.cosine_similarity(found.encode_image(pixels), model.encode_image(pixels))
    assert similarity.min() > 0.999


def process(stage: ModuleType, *arguments: str) -> None:
    """Run a stage in a process of its own, as DVC does, so that its memory is its own."""
    subprocess.run([sys.executable, "-m", stage.__name__, *arguments], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "every_layer", [pytest.param(True, marks=pytest.mark.exhaustive, id="every layer"), pytest.param(False, id="one")]
)
def test_one_step_and_one_scoring_at_true_size(
    every_layer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ViT-L/14 and stable-diffusion-2-1-base with random weights, from download to score, one image at a time.

    With every layer its stages' times and memory stand in the README. With one, and the UNet's first block, widths are
    the true ones.
    """
    do, shape, shapes = process, checkpoints.VIT_L_14, checkpoints.STABLE_DIFFUSION_2_1_BASE
    content, served = committed(), tmp_path / "served"
    paper, entry = content["profiles"]["paper"], content["backbones"]["openai_224"]
    if not every_layer:
        do, shape, shapes = run, shape | {"vision_layers": 1, "transformer_layers": 1}, checkpoints.ONE_BLOCK
        entry["source"]["architecture"] = checkpoints.one_layer(entry["source"]["architecture"])
        paper["train"] |= {"size": 128, "precision": "float32"}
    monkeypatch.chdir(tmp_path)
    served.mkdir()
    try:
        checkpoints.openai_archive(served / "ViT-L-14.pt", 1, shape)
        checkpoints.stable_diffusion(served / "sd", shapes)
        paper["train"] |= {"micro_batch": 1}
        paper["recipes"]["diva"] |= {"steps": 1, "batch": 1, "warmup_ratio": 0.0}
        paper["train"] |= {"compile": False, "validation": {"images": 1, "every": 1}}
        paper["mmvp"] |= {"draws": 2, "batch": 1}
        paper["mmvp_vlm"]["pairs_per_pattern"] = 1
        for download in (paper["images"]["shards"], paper["mmvp_vlm"]["download"]):
            download["at"] = [f"{download['at'][0].partition('@')[0]}@main"]
        paper["denoiser"]["download"] |= {
            "at": ["hf://sd2-community/sd@main"], "files": dict.fromkeys(paper["denoiser"]["download"]["files"])
        }  # fmt: skip
        with Hub() as hub:
            hub.stand_in(monkeypatch)
            for name, value in {
                "HF_ENDPOINT": hub.endpoint,
                "PYTHONPATH": str(ROOT),
                "CUDA_VISIBLE_DEVICES": "",
            }.items():
                monkeypatch.setenv(name, value)
            entry["source"]["weights"] |= {"at": [f"{hub.endpoint}/clip"], "files": {"ViT-L-14.pt": None}}
            write(content, ["openai_224"], ["pretrained", "diva"])
            hub.add_files("/clip", {"ViT-L-14.pt": served / "ViT-L-14.pt"})
            hub.add_repo("sd2-community/sd", served / "sd")
            hub.add_repo("MMVP/MMVP_VLM", checkpoints.mmvp_vlm(1), kind="dataset")
            hub.add_repo("pixparse/cc3m-wds", {"cc3m-train-0000.tar": checkpoints.shard(0, 4)}, kind="dataset")
            for stage in (images, mmvp_vlm, denoiser_stage):
                do(stage)
            do(backbone_stage, "openai_224")
        do(train, "openai_224", "diva")
        do(mmvp, "openai_224", "diva")

        result = read("models/paper/diva/openai_224/diva.json")["result"]
        assert result["steps"] == 1
        assert result["loss_first_tenth"] > 0
        if every_layer:
            assert read("metrics/paper/backbone/openai_224.json")["parameters"] == 427_616_513
            assert read("metrics/paper/denoiser.json")["unet_parameters"] == 865_910_724
        before, after = (
            load_file(Path("models/paper", weights, "openai_224", backbones.WEIGHTS))
            for weights in ("pretrained", "diva")
        )
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert all(name.startswith("visual.") for name in moved)

        if every_layer:
            anchored = paper["recipes"]["text_anchored"]  # captions, gap, projection and head: each at least one step
            anchored |= {"steps": 1, "batch": 1, "gap_correction": {"components": 1, "images": 2}}
            anchored["warmup"]["steps"] = 1
            write(content, ["openai_224"], ["text_anchored"])
            do(train, "openai_224", "text_anchored")
            tower, head = (
                load_file(Path("models/paper/text_anchored/openai_224", file))
                for file in (backbones.WEIGHTS, backbones.HEAD)
            )
            assert all(torch.equal(tower[name], before[name]) for name in before)
            assert any(tensor.any() for name, tensor in head.items() if name.endswith("weight"))
        for line in map(json.loads, Path("metrics/timings.jsonl").read_text().splitlines()):
            print(line["stage"], line["seconds"], "s", line["peak_memory_mb"], "MB")
            assert line["peak_memory_mb"] < 16_000
    finally:
        shutil.rmtree(tmp_path)  # 20 GB, which pytest would keep for three runs
