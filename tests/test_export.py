"""The exports: both formats against the backbone they came from, the card, the pages' snippets, `look`."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from shrunk import METRICS, MODELS, ROOT, copy_untrained, run
from test_stages import CPU
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionModel,
)

from pipeline import export, report
from pipeline.core.code import program
from pipeline.core.outputs import write_json
from pipeline.core.stages import UserError
from pipeline.evidence import provenance
from pipeline.evidence.results import COLUMNS
from pipeline.evidence.statistics import Interval
from pipeline.models import backbones, exports
from pipeline.models.backbones import Backbone
from pipeline.sections import params
from pipeline.tools import look, pages

TEXTS = ["a photo of a Red cup, with two_dots!", "a photo of 12 dots", "it's  one's café", "dots " * 100]
TINY = {  # architecture, and the backbone whose preprocessing it has
    "quick GELU, as OpenAI's": (checkpoints.OPENAI, "openai_224"),
    "squashed images, as DFN's": (checkpoints.OPENCLIP, "dfn_378"),
    "GELU": (checkpoints.OPENCLIP | {"quick_gelu": False}, "metaclip_h14"),
    "SigLIP": (checkpoints.TINY_SIGLIP, "siglip_224"),
}


def photos(count: int = 4) -> list[Image.Image]:
    """Of several sizes and shapes."""
    return [checkpoints.image(i).resize(size) for i, size in enumerate([(96, 96), (133, 90), (70, 200), (64, 48)])][
        :count
    ]


def model(architecture: str | dict, like: str, folder: Path) -> Path:
    """A folder as stage backbone makes it, with random weights."""
    source = checkpoints.SOURCES[like]
    backbones.write_config(architecture, source.preprocessing.model_dump(), folder)
    backbones.save_weights(checkpoints.build(architecture, 3).state_dict(), folder)
    if source.tokenizer:
        checkpoints.save_tokenizer(folder, 32000)
        said = folder / "tokenizer_config.json"  # as the hub has it
        said.write_text(json.dumps(json.loads(said.read_text()) | {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    return folder


@pytest.fixture(scope="module", params=TINY)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Path]:
    folder = tmp_path_factory.mktemp("export")
    original = model(*TINY[request.param], folder / "original")
    backbone = Backbone.load(original)
    assert exports.write(backbone, original, folder / "export") is None
    return backbone, folder / "export"


@pytest.mark.slow
def test_both_formats_embed_as_the_backbone_does(exported: tuple[Backbone, Path]) -> None:
    backbone, folder = exported
    distances = exports.verify(backbone, folder, photos(), TEXTS, CPU)
    assert distances["open_clip"] == {"image": 0, "text": 0}
    assert max(distances["transformers"][kind] for kind in ("image", "text")) < 1e-5
    siglip = isinstance(backbone.clip, open_clip.CustomTextCLIP)
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is (SiglipModel if siglip else CLIPModel)
    assert loaded.logit_scale.exp().item() == pytest.approx(backbone.logit_scale.item())
    if siglip:
        assert loaded.logit_bias.item() == pytest.approx(backbone.clip.logit_bias.item())
    assert {name.name for name in folder.iterdir()} == {
        "open_clip_config.json", "open_clip_model.safetensors", "config.json", "model.safetensors",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.slow
def test_scores_through_transformers_are_those_of_the_pipeline(exported: tuple[Backbone, Path]) -> None:
    backbone, folder = exported
    image = photos()[0].resize((backbone.image_size,) * 2)  # nothing to resize or crop: the same pixels
    inputs = AutoProcessor.from_pretrained(folder)(
        text=TEXTS[:2], images=image, padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        found = AutoModel.from_pretrained(folder)(**inputs).logits_per_image[0]
        image_D = torch.nn.functional.normalize(backbone.encode_image(backbone.preprocess(image)[None])[0], dim=-1)
        text_TD = torch.nn.functional.normalize(backbone.encode_text(backbone.tokenizer(TEXTS[:2])), dim=-1)
        wanted = backbone.logit_scale * text_TD @ image_D
        if backbone.clip.logit_bias is not None:
            wanted += backbone.clip.logit_bias
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_transformers_crops_or_squashes_as_the_backbone_does(exported: tuple[Backbone, Path]) -> None:
    """Twice as high as wide, and the lower, the lighter: a crop has neither black nor white."""
    backbone, folder = exported
    image = Image.linear_gradient("L").resize((100, 200)).convert("RGB")
    found = AutoProcessor.from_pretrained(folder)(images=image, return_tensors="pt").pixel_values[0]
    assert (found - backbone.preprocess(image)).abs().max() * max(backbone.std) < 0.05


def test_llava_s_loader_finds_the_tower(exported: tuple[Backbone, Path]) -> None:
    """What llava/model/multimodal_encoder/clip_encoder.py calls, for SigLIP its counterparts."""
    backbone, folder = exported
    siglip = isinstance(backbone.clip, open_clip.CustomTextCLIP)
    tower_class, processor_class = (
        (SiglipVisionModel, SiglipImageProcessor) if siglip else (CLIPVisionModel, CLIPImageProcessor)
    )
    tower, processor = (
        tower_class.from_pretrained(str(folder), device_map=None),
        processor_class.from_pretrained(folder),
    )
    pixels = processor.preprocess(photos()[0], return_tensors="pt")["pixel_values"]
    assert pixels.shape[-2:] == (backbone.image_size,) * 2
    with torch.no_grad():
        found = tower(pixels, output_hidden_states=True).hidden_states[-2]
        visual = backbone.clip.visual
        if siglip:
            wanted = visual.trunk.forward_intermediates(
                pixels, indices=[-2], output_fmt="NLC", intermediates_only=True
            )[0]
        else:
            outputs = visual.forward_intermediates(pixels, indices=2, output_fmt="NLC")
            found, wanted = found[:, 1:], outputs["image_intermediates"][0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    if not siglip:
        config = CLIPVisionConfig.from_pretrained(folder)
        assert (config.image_size // config.patch_size) ** 2 == found.shape[1] == backbone.patches
        assert processor.crop_size["height"] == backbone.image_size


@pytest.fixture
def spoilt(exported: tuple[Backbone, Path], tmp_path: Path) -> tuple[Backbone, Path]:
    """A copy to spoil, of a CLIPModel or of a SiglipModel."""
    shutil.copytree(exported[1], tmp_path / "export")
    return exported[0], tmp_path / "export"


refusals = pytest.mark.parametrize("exported", ["GELU", "SigLIP"], indirect=True)


def refused(spoilt: tuple[Backbone, Path]) -> str:
    with pytest.raises(UserError) as error:
        exports.verify(*spoilt, photos(), TEXTS, CPU)
    return str(error.value)


@pytest.mark.slow
@refusals
@pytest.mark.parametrize("file", ["model.safetensors", "open_clip_model.safetensors"])
@pytest.mark.parametrize("part", ["image", "text"])
def test_other_weights_are_refused(spoilt: tuple[Backbone, Path], file: str, part: str) -> None:
    path = spoilt[1] / file
    tensors = load_file(path)
    norms = {"image": ("post_layernorm.weight", "head.layernorm.weight", "ln_post.weight", "attn_pool.norm.weight")}
    ends = norms.get(part, ("final_layer_norm.weight", "ln_final.weight"))
    name = next(name for end in ends for name in tensors if name.endswith(end))
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, path, metadata={"format": "pt"})
    form = "transformers" if file == "model.safetensors" else "open_clip"
    assert f"the {form} export's {part} embeddings are not the backbone's" in refused(spoilt)


@pytest.mark.slow
@refusals
def test_embeddings_that_are_no_numbers_are_refused(spoilt: tuple[Backbone, Path]) -> None:
    path = spoilt[1] / "model.safetensors"
    tensors = load_file(path)
    tensors["text_model.final_layer_norm.bias"][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    assert "the transformers export's text embeddings are not the backbone's: nan" in refused(spoilt)


@pytest.mark.slow
@refusals
def test_another_activation_is_refused(spoilt: tuple[Backbone, Path]) -> None:
    path = spoilt[1] / "config.json"
    config = json.loads(path.read_text())
    own = config["vision_config"]["hidden_act"]
    config["vision_config"]["hidden_act"] = "quick_gelu" if own == "gelu" else "gelu"
    path.write_text(json.dumps(config))
    assert "the transformers export's image embeddings are not the backbone's" in refused(spoilt)


@pytest.mark.slow
@refusals
def test_another_tokenizer_is_refused(spoilt: tuple[Backbone, Path]) -> None:
    path = spoilt[1] / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "o"}, "content": "0"}
    if isinstance(vocabulary := content["model"]["vocab"], dict):  # CLIP's, which makes its own normalizer
        vocabulary["dots</w>"], vocabulary["one</w>"] = vocabulary["one</w>"], vocabulary["dots</w>"]
    path.write_text(json.dumps(content))
    assert re.search(
        r"(transformers|open_clip)'s? tokenizer of the export gives other token ids for \d of 4 texts", refused(spoilt)
    )


@pytest.mark.slow
@refusals
@pytest.mark.parametrize("change", [{"image_mean": [0.4, 0.4, 0.4]}, {"resample": 2}, {"do_rescale": False}])
def test_another_preprocessing_is_refused(spoilt: tuple[Backbone, Path], change: dict) -> None:
    path = spoilt[1] / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "transformers' processor of the export shows square images up to" in refused(spoilt)


@pytest.mark.slow
def test_what_transformers_has_no_class_for_is_exported_for_open_clip_and_said(tmp_path: Path) -> None:
    original = model(checkpoints.SIGLIP, "siglip_224", tmp_path / "original")  # an image tower with a register token
    backbone = Backbone.load(original)
    missing = exports.write(backbone, original, tmp_path / "export")
    assert missing is not None
    assert "reg_token" in missing
    assert not (tmp_path / "export" / "config.json").exists()
    assert exports.verify(backbone, tmp_path / "export", photos(), TEXTS, CPU).keys() == {"open_clip"}


@pytest.mark.slow
def test_another_interpolation_is_handed_over(tmp_path: Path) -> None:
    original = model(checkpoints.OPENAI, "openai_224", tmp_path / "original")
    config = json.loads((original / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["interpolation"] = "bilinear"
    (original / "open_clip_config.json").write_text(json.dumps(config))
    backbone = Backbone.load(original)
    exports.write(backbone, original, tmp_path / "export")
    distances = exports.verify(backbone, tmp_path / "export", photos(), TEXTS, CPU)
    assert distances["transformers"]["image"] < 1e-5
    assert json.loads((tmp_path / "export/preprocessor_config.json").read_text())["resample"] == 2


# Two pairs of the eight share one.
ARCHITECTURES = {source.architecture: name for name, source in reversed(checkpoints.SOURCES.items())}


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_true_shapes(architecture: str, tmp_path: Path) -> None:
    handed_over_whole(architecture, ARCHITECTURES[architecture], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openai_336", "siglip_384"])
def test_true_widths(name: str, tmp_path: Path) -> None:
    """Both families' widths, heads and largest images, a single layer deep."""
    handed_over_whole(checkpoints.one_layer(str(checkpoints.SOURCES[name].architecture)), name, tmp_path)


def handed_over_whole(architecture: str | dict, like: str, folder: Path) -> None:
    original = model(architecture, like, folder / "original")
    backbone = Backbone.load(original)
    assert exports.write(backbone, original, folder / "export") is None
    distances = exports.verify(backbone, folder / "export", photos(2)[1:], TEXTS, CPU)
    shutil.rmtree(folder)
    assert max(distances["transformers"][kind] for kind in ("image", "text")) <= exports.TOLERANCE


# The stage, the card and the pages


def notes(p: params.Params, recipe: str) -> dict[str, Any]:
    """What training writes beside the weights, as far as a card tells of it."""
    chosen = p.profile.recipes[recipe]
    return {
        "seed": 42,
        "train": p.profile.train.model_dump(mode="json"),
        "recipe": chosen.model_dump(exclude_none=True),
        "captions": chosen.reads_captions,
        "code": program("train.py"),
    }


@pytest.fixture(scope="session")
def exported_stage(once: Callable[[str, Callable[[Path], None]], Path], finished: Path) -> Path:
    """A folder in which the pretrained weights stand for diva's and were exported."""

    def make(folder: Path) -> None:
        copy_untrained(finished, folder)
        shutil.copytree(folder / MODELS / "pretrained", folder / MODELS / "diva")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            write_json(MODELS / "diva/mini/diva.json", notes(params.load(), "diva"))
            run(export, "mini", "diva")

    return once("exported_stage", make)


@pytest.fixture
def handed_over(exported_stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in; returns the export."""
    monkeypatch.chdir(shutil.copytree(exported_stage, tmp_path / "copy"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return MODELS / "export/mini-diva"


@pytest.mark.slow
def test_the_stage_writes_both_formats_their_distances_and_a_card(handed_over: Path) -> None:
    distances = json.loads((METRICS / "export/mini-diva.json").read_text())
    assert distances["transformers"].keys() == {"image", "text", "through_processor"}
    assert max(distances["transformers"].values()) < 1e-4  # mini's images need no resizing
    _, front, text = (handed_over / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    code = re.search(r"Code that trained it: sha256 (\w+).*program\('(.+?)'\)", text, re.DOTALL)
    assert code
    assert code[1] == program(code[2])
    found = json.loads((METRICS / "evidence.json").read_text())["mini"]["weights"]["diva"]
    score = json.loads((METRICS / "report.json").read_text())["mini"]["score"]
    for column, label in COLUMNS.items():
        before, after = (f"{score[weights][column]:.1f}" for weights in ("pretrained", "diva"))
        gain = Interval(*found["gain"][column]).text()
        assert f"| {label} | {before} | {after} | {gain} |" in text
    assert (
        f"Verdict: pairs {found['verdict']['pairs']}, zero-shot classification {found['verdict']['zeroshot']}." in text
    )
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["recipe"]["draw_weights"] == [2.0, 1.0]
    before = {path.name: path.read_bytes() for path in handed_over.iterdir()}
    run(export, "mini", "diva")
    assert {path.name: path.read_bytes() for path in handed_over.iterdir()} == before


@pytest.mark.slow
def test_a_mismatch_fails_the_stage_and_leaves_nothing(handed_over: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(handed_over)
    (METRICS / "export/mini-diva.json").unlink()
    monkeypatch.setattr(exports, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit):
        run(export, "mini", "diva")
    assert [
        path for path in (*(MODELS / "export").iterdir(), *(METRICS / "export").iterdir()) if path.suffix != ".lock"
    ] == []


@pytest.mark.slow
def test_cards_of_published_backbones_tell_base_licence_and_data(here: Path) -> None:
    p = params.load()
    p = p.model_copy(update={"run": p.run.model_copy(update={"profile": "paper"})})
    cards = Path("metrics/paper/cards")
    cards.mkdir(parents=True)
    for weights in ("pretrained", "diva", "text_anchored", "released"):
        own = weights if weights == "pretrained" else "diva"
        shutil.copy(METRICS / f"cards/mini-{own}.json", cards / f"dfn_224-{weights}.json")
    distances = {"open_clip": {"image": 0.0, "text": 0.0}}

    card = export.card("paper", "dfn_224", "diva", "0123", notes(p, "diva"), distances, "no class for it", headed=False)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license_name"] == "apple-amlr (research only)"
    assert "ViT-H-14-quickgelu, hf://apple/DFN5B-CLIP-ViT-H-14@" in card
    assert "sha256 d67de50f" in card
    assert "hf://datasets/pixparse/cc3m-wds@" in card
    assert "There is no transformers format: no class for it" in card
    assert "recipe `diva`" in card
    anchored = export.card(
        "paper", "dfn_224", "text_anchored", "0123", notes(p, "text_anchored"), distances, None, headed=True
    )
    assert "recipe `text_anchored`" in anchored
    recipe = yaml.safe_load(anchored.split("```yaml\n")[1].split("```")[0])["recipe"]
    assert recipe["timesteps"] == [600, 1000]
    released = export.card("paper", "dfn_224", "released", "0123", None, distances, None, headed=False)
    assert "Tuned weights: hf://BAAI/DIVA@" in released
    assert "Recipe" not in released
    assert "gain" not in export.card("paper", "dfn_224", "pretrained", "0123", None, distances, None, headed=False)


LOCKS = {
    "pipeline/dvc.lock": """
stages:
  train@mini-diva:
    deps:
    - {path: data/mini/images, md5: aaa.dir}
    - {path: models/mini/pretrained/mini, md5: bbb.dir}
    - {path: pipeline/train.py, md5: ccc}
    outs:
    - {path: models/mini/diva/mini, md5: ddd.dir}
  images:
    outs:
    - {path: data/mini/images, md5: aaa.dir}
""",
    "dvc.lock": """
stages:
  export@mini-diva:
    deps:
    - {path: models/mini/diva/mini, md5: ddd.dir}
    outs:
    - {path: models/mini/export/mini-diva, md5: of the export before}
""",
}


@pytest.mark.slow
def test_a_card_names_code_and_data_and_needs_no_git(
    handed_over: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever owns the checkout, and in whatever state it is: the card is the same."""
    assert "  - models/mini/diva/mini: unknown: no dvc.lock here lists it\n" in (handed_over / "README.md").read_text()
    Path("pipeline").mkdir()
    for name, text in LOCKS.items():
        Path(name).write_text(text)
    monkeypatch.setenv("PATH", "")  # no program `git`
    run(export, "mini", "diva")
    card = (handed_over / "README.md").read_text()
    assert f"sha256 {json.loads((MODELS / 'diva/mini/diva.json').read_text())['code']} of what" in card
    assert """
- Made from, md5 in DVC's locks:
  - data/mini/images: aaa.dir
  - models/mini/diva/mini: ddd.dir
  - models/mini/pretrained/mini: unknown: no dvc.lock here lists it
- sha256""" in card  # fmt: skip
    run(report)
    page = (METRICS / "report.md").read_text()
    assert f"- run of mini, diva: {provenance.run('mini', 'mini', 'diva')}\n" in page
    assert "before" not in page.partition("## Provenance")[2]  # of the exports, which come after
    assert "revision" not in card + page
    assert "git" not in capsys.readouterr().err


PAGES = {page: (ROOT / page).read_text() for page in pages.PAGES}
USE = PAGES[Path("README.md")] + PAGES[Path("models/README.md")]
SNIPPETS = re.findall(r"```python\n(.*?)```", USE, re.DOTALL)


@pytest.mark.slow
@pytest.mark.usefixtures("handed_over")
def test_the_pages_snippets_run() -> None:
    checkpoints.image(1, 64).save("image.jpg")
    found = []
    for snippet in SNIPPETS:
        names: dict = {}
        exec(snippet, names)
        found += [names[name] for name in ("scores", "features") if name in names]
    assert len(SNIPPETS) == 4
    assert [value.shape[0] for value in found] == [1, 1, 1]
    assert all(torch.isfinite(value).all() for value in found)


@pytest.mark.slow
def test_the_container_file_of_san_reads_an_export(handed_over: Path) -> None:
    """Its lines are a container file's and a shell's; what it turns the weights into has the same tensors."""
    content = (ROOT / "pipeline/launch/san.Dockerfile").read_text()
    lines = [line.split(" ", 1) for line in content.splitlines() if line and not line.startswith("#")]
    assert [word for word, _ in lines] == ["FROM", "ENV", "RUN", "RUN", "WORKDIR", "RUN", "CMD"]
    shell, option, script = json.loads(lines[-1][1])
    for command in (script, *(rest for word, rest in lines if word == "RUN")):
        subprocess.run([shell, "-n", "-c", command], check=True)
    assert (shell, option) == ("bash", "-euc")
    (convert,) = re.findall(r"python -c '(.*?)'", script)
    exec(convert.replace("/clip/", f"{handed_over}/").replace("/tmp/", f"{handed_over}/"))
    read = torch.load(handed_over / "clip.pt", weights_only=True)
    stored = load_file(handed_over / "open_clip_model.safetensors")
    assert read.keys() == stored.keys()
    assert all(read[name].equal(tensor) for name, tensor in stored.items())


@pytest.mark.slow
@pytest.mark.usefixtures("handed_over")
def test_look_as_the_pages_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    line, *again = re.findall(r"^python -m pipeline.tools.look .*$", "\n".join(PAGES.values()), re.MULTILINE)
    assert again == [line]
    _, _, _, *arguments = shlex.split(line)
    for i, name in enumerate(arguments[1:3]):
        checkpoints.image(i, 64).save(name)
    run(look, *arguments)
    out = capsys.readouterr().out
    rows = re.findall(r"│ (\w+) +│ (stock|published) +│ [^│]+│ ([-+][\d.]+) +│ ([-+][\d.]+) +│ (right|wrong)", out)
    assert [row[:2] for row in rows] == [(w, r) for w in ("pretrained", "diva") for r in ("stock", "published")]
    backbone = Backbone.load(MODELS / "pretrained/mini")
    with torch.no_grad():
        images = torch.stack([backbone.preprocess(Image.open(name)) for name in arguments[1:3]])
        text = backbone.encode_text(backbone.tokenizer([f"a photo of {arguments[3]}"]))
        wanted = torch.nn.functional.cosine_similarity(backbone.encode_image(images), text)
    assert [float(value) for value in rows[0][2:4]] == pytest.approx(wanted.tolist(), abs=6e-4)
    with Image.open("look.png") as strip:
        assert strip.width > 500
    run(look, *arguments[:3], "a tag of $5, 10 % off $9", arguments[4])  # no formula


@pytest.mark.slow
@pytest.mark.usefixtures("handed_over")
def test_look_sees_a_photo_as_viewers_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The pixels of a phone's photo lie on their side, and a tag says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    said = []
    for kind in ("upright", "phone"):
        for i in range(2):
            image = checkpoints.image(i, 64)
            lying = image.transpose(Image.Transpose.ROTATE_90) if kind == "phone" else image
            lying.save(f"{i}.png", exif=exif if kind == "phone" else None)
        run(look, "mini", "0.png", "1.png", "a fish", "a boat")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.slow
def test_look_names_what_is_wrong(handed_over: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.image(1, 64).save("a.jpg")
    for arguments, message in (
        (("minni", "a.jpg", "a.jpg", "a", "b"), "params.yaml has no backbone 'minni'. Choose one of these: mini, "),
        (("mini", "a.jpg", "params.yaml", "a", "b"), "params.yaml: cannot be read as an image"),
        (("openai_224", "a.jpg", "a.jpg", "a", "b"), "models/paper: no weights of openai_224"),
    ):
        with pytest.raises(SystemExit):
            run(look, *arguments)
        assert message in capsys.readouterr().err
    assert not Path("look.png").exists()
