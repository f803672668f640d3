"""The frozen image encoder of recipes: made of images alone, fetched in timm's format, or not needed."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import timm
import torch
from hub import COMMIT, Hub
from noting import idle, taken
from safetensors.torch import load_file
from shrunk import DATA, METRICS, SHRUNK, read_yaml, run, write_params, write_yaml
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize

from pipeline import encoder, plan
from pipeline.core.compute import generator
from pipeline.core.stages import UserError
from pipeline.diva.losses import Denoise
from pipeline.engine import trial
from pipeline.engine.fetches import encoding
from pipeline.mini import pretrain
from pipeline.models.frozen_encoder import FrozenEncoder
from pipeline.sections import params
from pipeline.sections.encoder import MiniEncoder

FOLDER, FIGURES = DATA / "encoder/diva", METRICS / "encoder/diva.json"
PLANNED = DATA / "planned/encoder-diva.json"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def _needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of recipe diva reads the encoder."""
    monkeypatch.setattr(Denoise, "encodes", True)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return checkpoints.vision_transformer(tmp_path / "published")


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add_repo("timm/tiny", tiny, lfs=lambda path, size: path.endswith(".safetensors"))
        hub.stand_in(monkeypatch)
        yield hub


def published(architecture: str = "vit_tiny_patch16_224", weights: str | None = None) -> dict[str, Any]:
    files = {"config.json": None, "model.safetensors": weights}
    download = {"at": [f"hf://timm/tiny@{COMMIT}"], "licence": "Apache-2.0", "files": files}
    return {"kind": "hub", "architecture": architecture, "download": download}


def refusal(what: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        what()
    assert ended.value.code == 1
    assert not FOLDER.exists()
    assert not FIGURES.exists()
    return capsys.readouterr().err


def pixels(count: int, *size: int) -> torch.Tensor:
    return torch.randint(256, (count, 3, *size), generator=generator("test", "pixels"), dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("size", [(28, 28), (40, 64), (20, 20)])
def test_embeddings_are_timm_s_own_of_the_same_pixels(tiny: Path, size: tuple[int, int]) -> None:
    found, model = FrozenEncoder.load(tiny), timm.create_model(f"local-dir:{tiny}", pretrained=True).eval()
    images = pixels(2, *size)
    resized = resize(images.float() / 255, [28, 28], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    with torch.no_grad():
        tokens = model.forward_features(normalize(resized, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        wanted = model.forward_head(tokens, pre_logits=True)
    embedded = found(images)
    torch.testing.assert_close(embedded, wanted, rtol=1e-4, atol=1e-5)
    assert (embedded.shape, embedded.dtype) == ((2, 16), torch.float32)
    assert not embedded.requires_grad
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert not any(module.training for module in found.modules())


def test_a_saved_encoder_comes_back(tiny: Path, tmp_path: Path) -> None:
    first, images = FrozenEncoder.load(tiny), pixels(2, 64, 64)
    first.save(tmp_path / "copy")
    assert torch.equal(FrozenEncoder.load(tmp_path / "copy")(images), first(images))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_encoder_without_a_file_is_refused(tiny: Path, name: str) -> None:
    (tiny / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}. If a loss of the recipe reads the encoder, make it"):
        FrozenEncoder.load(tiny)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config["model_args"].update(depth=2), "blocks.1"),
        (lambda config: config["model_args"].update(embed_dim=32), "size mismatch"),
        (lambda config: config.update(architecture="vit_of_nobody"), "vit_of_nobody"),
        (lambda config: config["model_args"].update(colour=1), "colour"),
    ],
)
def test_weights_of_another_model_are_refused(tiny: Path, change: Callable[[dict], None], said: str) -> None:
    config = json.loads((tiny / "config.json").read_text())
    change(config)
    (tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"(?s)timm cannot load this model: .*{said}"):
        FrozenEncoder.load(tiny)


# ------------------------------------------------------------------------------------------------------------ the stage


def test_a_recipe_whose_losses_read_none_gets_a_file_that_says_so() -> None:
    write_params()
    run(plan)
    assert json.loads(PLANNED.read_text()) == {"encoder": None}
    run(encoder, "diva")
    assert [path.name for path in FOLDER.iterdir()] == ["none.json"]
    assert json.loads((FOLDER / "none.json").read_text()) == json.loads(FIGURES.read_text()) == {"encoder": None}
    with pytest.raises(UserError, match=r"diva has no config.json. If a loss of the recipe reads the encoder"):
        FrozenEncoder.load(FOLDER)


@pytest.mark.slow
@pytest.mark.usefixtures("_needed")
def test_the_mini_encoder_has_the_same_bytes_each_time_and_says_what_it_holds() -> None:
    write_params()
    run(plan)
    planned = json.loads(PLANNED.read_text())
    assert planned.keys() == {"encoder", "code", "threads"}
    assert planned["encoder"]["steps"] == 3
    run(encoder, "diva")
    made = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    assert made.keys() == {"config.json", "model.safetensors"}
    figures = json.loads(FIGURES.read_text())
    assert figures.keys() == {"parameters", "training_loss", "probe"}
    assert figures["probe"].keys() == {"average", *pretrain.world.PATTERNS}
    found = FrozenEncoder.load(FOLDER)
    assert figures["parameters"] == sum(q.numel() for q in found.parameters())
    assert (found.size, found.mean.flatten().tolist()) == ((64, 64), [127.5] * 3)
    assert found(pixels(3, 64, 64)).shape == (3, 16)
    shutil.rmtree(FOLDER)
    run(encoder, "diva")
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == made


@pytest.mark.slow
def test_what_the_mini_encoder_embeds_restores_the_image() -> None:
    section = {**SHRUNK["profiles.mini.encoder"], "images": 128, "steps": 40, "batch": 32}  # type: ignore[dict-item]
    p = MiniEncoder(**section)
    images, _ = pretrain.images("encoder", 160, "images")
    found, losses = pretrain.encoder(images[:128], p, torch.device("cpu"))
    assert losses[-1] < 0.8 * losses[0]
    kept = found(images[128:])
    assert torch.linalg.matrix_rank(kept - kept.mean(0)) > 8  # not one embedding for all


@pytest.mark.usefixtures("_needed")
def test_a_published_encoder_is_shown_fetched_and_checked(
    hub: Hub, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(**{"profiles.mini.encoder": published()})
    run(plan)
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert ["data/mini/encoder/diva", f"hf://timm/tiny@{COMMIT}", "2", "0.00", "Apache-2.0"] in [
        row[1:6] for row in rows
    ]
    pins = json.loads(PLANNED.read_text())["encoder"]
    assert pins["download"] == {
        "at": f"hf://timm/tiny@{COMMIT}", "files": {"config.json": None, "model.safetensors": None}, "match": []
    }  # fmt: skip
    taken.clear()
    run(encoder, "diva")
    assert not idle("encoder")  # it declares nothing in vain
    assert load_file(FOLDER / "model.safetensors").keys() == load_file(tiny / "model.safetensors").keys()
    images = pixels(2, 64, 64)
    assert torch.equal(FrozenEncoder.load(FOLDER)(images), FrozenEncoder.load(tiny)(images))
    origin = json.loads(FIGURES.read_text())["origin"]
    assert (origin["revision"], origin["licence"]) == (COMMIT, "Apache-2.0")


@pytest.mark.usefixtures("_needed", "hub")
@pytest.mark.parametrize(
    ("section", "said"),
    [
        (published(weights="0" * 64), "model.safetensors"),
        (published(architecture="vit_small_patch16_224"), "the encoder is a vit_tiny_patch16_224, but profiles.mini"),
    ],
)
def test_another_file_or_model_than_stated_is_refused(
    section: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(**{"profiles.mini.encoder": section})
    PLANNED.parent.mkdir(parents=True)
    PLANNED.write_text("{}")
    assert said in refusal(lambda: run(encoder, "diva"), capsys)


def test_a_recipe_that_was_not_planned_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write_params()
    said = refusal(lambda: run(encoder, "diva"), capsys)
    assert "encoder-diva.json: no such file. Stage plan writes it for every name in run.recipes: add 'diva'" in said


# ------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.usefixtures("_needed")
@pytest.mark.parametrize(
    ("section", "said"),
    [
        (None, "profiles.mini.encoder: missing, but losses of diva read a frozen image encoder. Add it"),
        (published(architecture="vit_of_nobody"), "profiles.mini.encoder: timm cannot make the image model 'vit_of_n"),
        (
            {**SHRUNK["profiles.mini.encoder"], "arguments": {"colour": 1}},  # type: ignore[dict-item]
            "profiles.mini.encoder: timm cannot make the image model 'vit_tiny_patch16_224': ",
        ),
    ],
)
def test_an_encoder_that_there_is_not_is_told_before_anything_is_fetched(
    section: dict[str, Any] | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(**{"profiles.mini.encoder": section})
    if section is None:
        content = read_yaml(Path("params.yaml"))
        del content["profiles"]["mini"]["encoder"]
        write_yaml(Path("params.yaml"), content)
    assert said in refusal(lambda: run(plan), capsys)


def test_only_recipes_whose_losses_read_it_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(**{"run.recipes": ["diva", "contrastive"]})
    assert encoding(params.load()) == []
    monkeypatch.setattr(Denoise, "encodes", True)
    assert encoding(params.load()) == ["diva"]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "expected"), [("kernel", [2, 2, 2, 2]), ("diva", [])])
def test_memory_is_tried_with_the_encoder_where_it_is_read(
    recipe: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of two steps, on the images of two micro-batches."""
    write_params()
    shown, forward = list[int](), FrozenEncoder.forward
    monkeypatch.setattr(
        FrozenEncoder, "forward", lambda self, images: shown.append(len(images)) or forward(self, images)
    )
    trial.check(params.load(), "mini", recipe, torch.device("cpu"))
    assert shown == expected
