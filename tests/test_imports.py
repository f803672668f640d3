"""Checkpoints in others' formats: transformers' folders back to open_clip's tensors, image towers alone, bad ones."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import TINY, model
from torch import nn
from transformers import AutoModel, CLIPVisionModel, CLIPVisionModelWithProjection, SiglipVisionModel

from pipeline.core.stages import UserError
from pipeline.models import backbones, exports, imports
from pipeline.models.backbones import Backbone


def random_like(architecture: str | dict, seed: int) -> nn.Module:
    """Another model of this architecture, in which no tensor is constant."""
    built, draw = checkpoints.build(architecture, seed), torch.Generator().manual_seed(seed)
    for tensor in built.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw) / 10)
    return built


def saved(architecture: str | dict, like: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor], nn.Module]:
    """(the pretrained backbone's folder, another model's state, the same as one of transformers')."""
    original = model(architecture, like, folder / "pretrained")
    tuned = random_like(architecture, 7)
    tok = exports.tokenizer(Backbone.load(original))
    return original, dict(tuned.state_dict()), exports.transformers_model(tuned, tok)


def assert_same(found: backbones.Tensors, wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
        assert found[name].dtype == torch.float32


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return saved(*TINY[request.param], tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_an_export_comes_back_as_it_was(tiny: tuple, tmp_path: Path) -> None:
    """Whole, and in shards with an index."""
    original, wanted, exported = tiny
    for name, options in (("whole", {}), ("shards", {"max_shard_size": "100KB"})):
        exported.save_pretrained(tmp_path / name, **options)
        assert (tmp_path / name / "model.safetensors.index.json").exists() == (name == "shards")
        assert_same(imports.tensors(tmp_path / name, original, "all"), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "openai_224" else pytest.mark.exhaustive) for name in checkpoints.SOURCES],
)
def test_at_true_widths(name: str, tmp_path: Path) -> None:
    architecture = checkpoints.one_layer(str(checkpoints.SOURCES[name].architecture))
    original, wanted, exported = saved(architecture, name, tmp_path)
    exported.save_pretrained(tmp_path / "exported")
    assert_same(imports.tensors(tmp_path / "exported", original, "all"), wanted)


def test_half_precision_is_read_as_float32(tiny: tuple, tmp_path: Path) -> None:
    original, wanted, exported = tiny
    exported.save_pretrained(tmp_path / "half")
    file = tmp_path / "half/model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert_same(imports.tensors(tmp_path / "half", original, "all"), wanted, 1e-3)


@pytest.mark.slow
def test_an_image_tower_alone_takes_the_text_tower_of_pretrained(tiny: tuple, tmp_path: Path) -> None:
    """As un2CLIP's is: of transformers, with the projection; a state dict, with `visual.` before its names or not."""
    original, wanted, exported = tiny
    before = load_file(original / backbones.WEIGHTS)
    expected = {name: wanted[name] if name.startswith("visual.") else before[name] for name in wanted}
    folder = tmp_path / "vision"
    exported.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    own = {name: tensor for name, tensor in stored.items() if name.startswith(("vision_model.", "visual_projection."))}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    prefixed = {name: tensor for name, tensor in wanted.items() if name.startswith("visual.")}
    torch.save(prefixed, tmp_path / "prefixed.pth")
    torch.save({name.removeprefix("visual."): tensor for name, tensor in prefixed.items()}, tmp_path / "bare.pth")
    for source in (folder, tmp_path / "prefixed.pth", tmp_path / "bare.pth"):
        assert_same(imports.tensors(source, original, "vision"), expected)
    for source in (folder, tmp_path / "prefixed.pth"):
        with pytest.raises(UserError, match=r"holds the image tower alone .* set parts: vision for this checkpoint"):
            imports.tensors(source, original, "all")


@pytest.mark.slow
def test_vision_models_of_transformers(tiny: tuple, tmp_path: Path) -> None:
    """What their own classes write: with a projection, and without one, which must be asked for."""
    original, wanted, exported = tiny
    exported.save_pretrained(tmp_path / "all")
    before = load_file(original / backbones.WEIGHTS)
    if type(exported).__name__ == "CLIPModel":
        CLIPVisionModelWithProjection.from_pretrained(tmp_path / "all").save_pretrained(tmp_path / "projected")
        expected = {name: wanted[name] if name.startswith("visual.") else before[name] for name in wanted}
        assert_same(imports.tensors(tmp_path / "projected", original, "vision"), expected)
    kind = CLIPVisionModel if type(exported).__name__ == "CLIPModel" else SiglipVisionModel
    kind.from_pretrained(tmp_path / "all").save_pretrained(tmp_path / "vision")
    kept = {name for name in wanted if not name.startswith("visual.") or name == "visual.proj"}
    expected = {name: before[name] if name in kept else wanted[name] for name in wanted}
    assert_same(imports.tensors(tmp_path / "vision", original, "vision_tower"), expected)
    if "visual.proj" in wanted:
        for parts in ("all", "vision"):
            with pytest.raises(UserError, match=r"has no projection .*set parts: vision_tower"):
                imports.tensors(tmp_path / "vision", original, parts)


@pytest.mark.slow
def test_older_files_have_positions_that_are_no_weights(tiny: tuple, tmp_path: Path) -> None:
    original, wanted, exported = tiny
    exported.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    more = {f"{tower}_model.embeddings.position_ids": torch.arange(5)[None] for tower in ("text", "vision")}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    assert_same(imports.tensors(tmp_path, original, "all"), wanted)


def edited(folder: Path, **values: Any) -> None:
    """config.json with other values of the image tower."""
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_what_is_no_such_model_is_refused(tiny: tuple, tmp_path: Path) -> None:
    original, wanted, exported = tiny
    folder, other = tmp_path / "model", tmp_path / "other"
    exported.save_pretrained(folder)

    def refused(source: Path, said: str, parts: str = "all") -> None:
        with pytest.raises(UserError, match=said):
            imports.tensors(source, original, parts)

    other.mkdir()
    refused(other, "has no config.json .it holds nothing")
    (other / "photo.jpg").touch()
    refused(other, "it holds photo.jpg.*Set the path")
    (other / "config.json").write_text('{"model_type": "bert"}')
    refused(other, "no weights")
    shutil.copytree(folder, tmp_path / "bert")
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    refused(tmp_path / "bert", "model_type 'bert'")
    shutil.copytree(folder, tmp_path / "scales")
    scales = load_file(tmp_path / "scales/model.safetensors") | {"logit_scale": torch.zeros(2)}
    save_file(scales, tmp_path / "scales/model.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "scales", "scales: the tensors for logit_scale do not go together")
    edited(folder, num_attention_heads=1 if "visual.proj" not in wanted else 16, hidden_act="relu")
    refused(folder, "another vision tower than the backbone's: hidden_act relu, not .*num_attention_heads")
    exported.save_pretrained(other, max_shard_size="100KB")
    (other / "model.safetensors").unlink(missing_ok=True)
    shard = min(other.glob("model-*.safetensors"))
    shard.unlink()
    refused(other, f"names .*{shard.name}.*Put them there, too")
    torch.save({name: tensor[..., :1] for name, tensor in wanted.items() if tensor.ndim}, tmp_path / "narrow.pth")
    refused(tmp_path / "narrow.pth", "does not fit the architecture")
    (tmp_path / "text.pth").write_text("no checkpoint")
    refused(tmp_path / "text.pth", "cannot be read as a checkpoint")


CONFIG = {"model_type": "clip", "vision_config": {"hidden_size": 64}, "text_config": {}}
INDEX = "model.safetensors.index.json"
NO_JSON = [b"", b'{"model_type": "cl', b"\xef\xbb\xbf{}", b'{"a": "\xe9"}', b"[]", b"null", b"[" * 100_000]
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 1, "layers": 1},
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(pytest.param(name, content, id=f"{name} {content[:9]!r}")
          for name in ("config.json", INDEX) for content in NO_JSON),
        *(("config.json", json.dumps(CONFIG | wrong).encode()) for wrong in (
            {"model_type": ["clip"]}, {"vision_config": {"hidden_size": "x"}}, {"vision_config": [1]}
        )),
        *((INDEX, json.dumps(each).encode()) for each in (
            {}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}, 
            {"weight_map": {"a": "../original/open_clip_config.json"}},
        )),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_folder_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    backbones.write_config(SMALL, {}, tmp_path / "original")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{folder / name}"):
        imports.fitted(folder, tmp_path / "original", "all")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda tensor: tensor * float("nan"), "visual.proj: numbers that are infinite or none"),
        (lambda tensor: tensor.to(torch.int8), "visual.proj: torch.int8 where torch.float32 is wanted"),
        (lambda tensor: tensor.to(torch.complex64), "visual.proj: torch.complex64 where torch.float32 is wanted"),
    ],
)
def test_weights_that_are_no_numbers_to_compute_with_are_refused(wrong: Any, said: str, tmp_path: Path) -> None:
    backbones.write_config(SMALL, {}, tmp_path)
    state = checkpoints.build(SMALL, 1).state_dict()
    torch.save(dict(state), tmp_path / "good.pt")
    assert imports.fitted(tmp_path / "good.pt", tmp_path, "all").keys() == state.keys()
    torch.save({**state, "visual.proj": wrong(state["visual.proj"])}, tmp_path / "bad.pt")
    for parts in ("all", "vision"):
        with pytest.raises(UserError, match=re.escape(said)):
            imports.fitted(tmp_path / "bad.pt", tmp_path, parts)


def test_a_download_is_one_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 0 checkpoints \(no file\)"):
        imports.only_model(tmp_path)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds 2 checkpoints \(a.pth, b.pth\)"):
        imports.only_model(tmp_path)
    (tmp_path / "b.pth").unlink()
    assert imports.only_model(tmp_path) == tmp_path / "a.pth"
    (tmp_path / "below").mkdir()
    (tmp_path / "below/config.json").touch()
    assert imports.only_model(tmp_path) == tmp_path / "below"


@pytest.mark.slow
def test_transformers_loads_what_comes_back(tiny: tuple, tmp_path: Path) -> None:
    """There and back again: the second export is the first."""
    original, _, exported = tiny
    exported.save_pretrained(tmp_path / "first")
    built = checkpoints.build(json.loads((original / backbones.CONFIG).read_text())["model_cfg"], 1)
    built.load_state_dict(dict(imports.tensors(tmp_path / "first", original, "all")))
    again = exports.transformers_model(built, exports.tokenizer(Backbone.load(original)))
    again.save_pretrained(tmp_path / "second")
    first, second = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
