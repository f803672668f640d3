"""params.yaml as committed, and what a user is told about a wrong one."""

import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.serialize import modify_yaml

from pipeline.core import config
from pipeline.core.stages import UserError
from pipeline.engine.losses import losses_of
from pipeline.sections import params, recipe
from pipeline.sections.download import Download
from pipeline.sections.recipe import Recipe
from pipeline.sections.train import Train

COMMITTED = Path(__file__).parents[1] / "params.yaml"
BASE, TRAIN, DIVA, MINI, OPENAI = (
    "profiles.mini.base_recipe",
    "profiles.mini.train",
    "profiles.mini.recipes.diva",
    "backbones.mini",
    "backbones.openai_224",
)
SETS = "profiles.paper.zeroshot_sets"
HUB = {"at": ["hf://owner/name@main"], "licence": "MIT"}
OWN = """  own:                          # a checkpoint that no registry knows
    profile: paper
    source:
      kind: checkpoint
      architecture: ViT-L-14
      preprocessing: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], interpolation: bicubic, resize_mode: squash}
      weights: {at: ["hf://owner/name@main"], licence: MIT, files: {model.safetensors: hub}}
    condition: {tokens: {kind: all}, text: mean}
    published_pooling: {tokens: {kind: all}, normalize_tokens: true, normalize_output: true}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(COMMITTED.read_text() + OWN)
    return path


def change(file: Path, key: str, value: Any) -> None:
    """Set a dotted key; Ellipsis removes it."""
    content = yaml.load(file.read_text(), yaml.CSafeLoader)  # eight times as fast as the plain one
    *parents, last = key.split(".")
    section = reduce(dict.__getitem__, parents, content)
    if value is ...:
        del section[last]
    else:
        section[last] = value
    file.write_text(yaml.dump(content, Dumper=yaml.CSafeDumper))


def message(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        params.load(file)
    return str(caught.value)


def test_the_committed_file_loads() -> None:
    loaded = params.load(COMMITTED)
    content = yaml.load(COMMITTED.read_text(), yaml.CSafeLoader)
    assert loaded.profile is loaded.profiles[content["run"]["profile"]]
    assert loaded.model_dump(exclude_defaults=True)["profiles"].keys() == content["profiles"].keys()
    assert (
        loaded.profile.recipes["diva"].optimizer.lr == content["profiles"]["mini"]["recipes"]["diva"]["optimizer"]["lr"]
    )


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        # mistyped values
        (f"{DIVA}.steps", "many", "'many'"),
        (f"{DIVA}.steps", 1.5, "1.5"),
        (f"{DIVA}.steps", "200", "'200'"),
        (f"{DIVA}.batch", True, "True"),
        (f"{DIVA}.optimizer.lr", "fast", "'fast'"),
        (f"{DIVA}.optimizer.lr", float("inf"), "inf"),
        (f"{TRAIN}.pixels.tower_antialias", "no way", "'no way'"),
        (f"{TRAIN}.prompt", 7, "7"),
        (f"{TRAIN}.crop.scale", [0.9], "[0.9]"),
        ("seed", None, "None"),
        # out of range
        (f"{DIVA}.steps", 0, "0"),
        (f"{DIVA}.optimizer.lr", -0.1, "-0.1"),
        (f"{DIVA}.optimizer.momentum", 1.5, "1.5"),
        (f"{TRAIN}.precision", "float16", "'float16'"),
        ("run.backbones", [], "[]"),
        ("seed", -1, "-1"),
        # values that do not go together
        (f"{DIVA}.timesteps", [500, 500], "[500, 500]"),
        (f"{DIVA}.timesteps", [-1, 10], "[-1, 10]"),
        (f"{MINI}.condition.tokens", {"kind": "all", "number": 3}, "'all' with number 3"),
        (f"{MINI}.condition.tokens", {"kind": "random"}, "'random' with number 0"),
        (f"{MINI}.condition.tokens", {"kind": "random", "number": 76.5}, "'random' with number 76.5: wanted a whole"),
        (f"{MINI}.condition.tokens", {"kind": "windows", "number": 0.5}, "'windows' with number 0.5: wanted a whole"),
        (f"{MINI}.condition.tokens", {"kind": "random_fraction", "number": 1.5}, "number 1.5: wanted a fraction"),
        (f"{MINI}.published_pooling.tokens", {"kind": "windows", "number": 0}, "'windows' with number 0"),
        ("run.backbones", ["openai"], "'openai'"),
        ("run.profile", "papr", "'papr'"),
        ("run.checkpoints", ["released"], "backbones.mini.checkpoints has none"),
        ("profiles.paper.images", {"kind": "tar"}, "'tar'"),
        ("backbones.own.source.weights", {"at": ["https://a"], "licence": "MIT"}, "either files or match"),
        (
            "backbones.own.source.weights",
            {**HUB, "files": {"a.pt": None, "b.pt": None}},
            "2 files, wanted one checkpoint",
        ),
        ("backbones.own.source.weights", {**HUB, "files": {"../a.pt": None}}, "'../a.pt'"),
        ("backbones.own.source.weights", {**HUB, "at": ["https://a"], "match": ["*"]}, "match needs addresses"),
        ("backbones.own.source.weights.files", {"a.pt": "b8cca3"}, "'b8cca3', wanted a sha256"),
        (f"{OPENAI}.source.files", {"a.pt": "hob"}, "'hob', wanted a sha256 (64 of 0-9 and a-f), or hub for the one"),
        ("backbones.own.source.weights.at", ["hf://owner/name"], "'hf://owner/name'"),
        ("backbones.own.source.weights.at", ["ftp://host/folder"], "'ftp://host/folder'"),
        ("backbones.own.source.preprocessing.resize_mode", "crop", "'crop'"),
        (f"{OPENAI}.source.files", {"a.pt": None, "b.pt": None}, "at most 1"),
        (f"{OPENAI}.source.mirrors", ["ftp://host/folder"], "'ftp://host/folder'"),
        (f"{OPENAI}.published.after_patterns", [1.0], "[1.0]"),
        # unknown keys
        (f"{TRAIN}.learning_rate", 0.1, "unknown key (found 0.1)"),
        ("run.backbone", "mini", "unknown key (found 'mini')"),
        ("backbones.own.source.text_tower", {}, "unknown key (found {})"),
        ("profiles.paper.images.shards.repo", "cc3m", "unknown key (found 'cc3m')"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(file: Path, key: str, value: Any, found: str) -> None:
    change(file, key, value)
    text = message(file)
    assert text.startswith(f"{file}:\n")
    named = [line for line in text.splitlines()[1:] if re.match(rf"  (run: )?{re.escape(key)}\b", line)]
    assert len(named) == 1, text
    assert found in named[0]


@pytest.mark.parametrize(
    "key",
    [
        "seed",
        "run",
        f"{DIVA}.optimizer.lr",
        f"{TRAIN}.crop.ratio",
        f"{MINI}.condition.text",
        "backbones.own.source.weights.at",
        "profiles.paper.images.shards",
        "profiles.mini.denoiser.unet",
    ],
)
def test_a_missing_key_is_named(file: Path, key: str) -> None:
    change(file, key, ...)
    assert f"\n  {key}: missing" in message(file)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"run.recipes": ["divs"]}, "run.recipes names 'divs', which is none of profile mini: "),
        ({"run.recipes": []}, "run.recipes is [], which train nothing. Set run.inputs=[]"),
        ({"run.inputs": ["images"]}, "which train with both. Set run.inputs=[images,denoiser]"),
    ],
)
def test_a_profile_whose_values_do_not_go_together(file: Path, changes: dict[str, Any], found: str) -> None:
    for key, value in changes.items():
        change(file, key, value)
    text = message(file)
    assert text.startswith(f"{file}:\n  run: ")
    assert found in text


@pytest.mark.parametrize("key", [f"{DIVA}.gap_correction", "profiles.mini.recipes.text_anchored.condition"])
def test_the_gap_is_one_between_embeddings(file: Path, key: str) -> None:
    """Patches have none."""
    change(file, key, "backbone" if key.endswith("condition") else {"components": 3, "images": 9})
    assert "need condition class_token" in message(file)


@pytest.mark.slow
def test_a_recipe_is_what_differs_from_the_base(file: Path) -> None:
    base = yaml.load(COMMITTED.read_text(), yaml.CSafeLoader)["profiles"]["mini"]["base_recipe"]
    assert not {*base} - {*Recipe.model_fields}
    for key, value in ((f"{BASE}.steps", 7), (f"{BASE}.losses", {"denoise": {"weight": 2.0}}), (f"{DIVA}.batch", 9)):
        change(file, key, value)
    recipes = params.load(file).profile.recipes
    assert {name: recipe.steps for name, recipe in recipes.items()} == dict.fromkeys(recipes, 7)
    assert {name: recipe.batch for name, recipe in recipes.items()} == dict.fromkeys(recipes, 32) | {
        "diva": 9, "reranked": 16
    }  # fmt: skip
    assert recipes["two_stage"].losses == {"denoise": {"weight": 2.0}}
    assert recipes["contrastive"].losses.keys() == {"info_nce"}  # a key as a whole takes the base's place
    change(file, f"{BASE}.steps", "many")
    assert f"{DIVA}.steps: found 'many'" in message(file)


@pytest.mark.parametrize("spelled", ["null recipe", "null base", "no base"])
def test_a_stage_reads_a_recipe_as_the_whole_file_is_read(
    spelled: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    mini = yaml.load(COMMITTED.read_text(), yaml.CSafeLoader)["profiles"]["mini"]
    in_full = mini["base_recipe"] | mini["recipes"]["diva"]
    change(file, "profiles.mini.recipes", {"diva": None if spelled == "null recipe" else in_full})
    change(file, BASE, {"null recipe": in_full, "null base": None, "no base": ...}[spelled])
    assert recipe.read("mini", "diva") == params.load(file).profile.recipes["diva"]


@pytest.mark.parametrize("key", [BASE, DIVA])
@pytest.mark.parametrize("value", ["tower", ["tower"], 7])
def test_a_recipe_that_is_no_mapping_is_named(
    key: str, value: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    change(file, key, value)
    assert f"params.yaml:\n  {key}: found {value!r}" in message(file)
    with pytest.raises(UserError, match=rf"^params.yaml:\n  {key}: found {re.escape(repr(value))}"):
        recipe.read("mini", "diva")


@pytest.mark.parametrize("at", ["wds_{name}@{revision}", "hf://owner/{nme}@{revision}", "hf://owner/{}@a", "hf://o/{"])
def test_an_address_of_sets_that_is_none_is_named(at: str, file: Path) -> None:
    change(file, f"{SETS}.at", at)
    assert f"{SETS}: at, {at!r}, makes no address for " in message(file)


@pytest.mark.parametrize(("name", "revision"), [("mnist", "refs/pr/1"), ("my set", "main"), ("mnist", "")])
def test_a_set_without_an_address_is_named(name: str, revision: str, file: Path) -> None:
    change(file, f"{SETS}.sets", {name: revision})
    assert f"makes no address for {name}: {revision!r}" in message(file)


def test_nothing_is_spelled_null() -> None:
    assert "None" not in str(config.content(COMMITTED))


def test_a_stage_reads_its_section_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    change(file, f"{TRAIN}.precision", "float16")
    assert recipe.read("mini", "diva") == params.load(COMMITTED).profile.recipes["diva"]
    for key, kind, found in (
        (TRAIN, Train, f"{TRAIN}.precision: found 'float16'"),
        (f"{OPENAI}.condition.tokens.number", config.Count, f"{OPENAI}.condition.tokens.number: found 76.5"),
        (
            "backbones.mini.released",
            Download,
            "backbones.mini.released: missing. Add it, or name one of these: ",
        ),
        ("seed.of", int, "seed.of: missing. Add it."),
    ):
        change(file, f"{OPENAI}.condition.tokens.number", 76.5)
        with pytest.raises(UserError, match=f"^params.yaml:\n  {re.escape(found)}"):
            config.read(kind, key)


def test_every_wrong_key_is_named_at_once(file: Path) -> None:
    change(file, f"{DIVA}.steps", "many")
    change(file, f"{DIVA}.trained", ...)
    assert {line.split(":")[0].strip() for line in message(file).splitlines()[1:]} == {
        f"{DIVA}.steps",
        f"{DIVA}.trained",
    }


def test_a_backbone_of_another_profile_is_refused(file: Path) -> None:
    change(file, f"{MINI}.profile", "paper")
    text = message(file)
    assert "run.backbones names 'mini', which belongs to profile 'paper'" in text
    assert "run.profile is 'mini'" in text


@pytest.mark.slow
def test_a_small_rate_as_dvc_writes_it_is_a_number(file: Path) -> None:
    """DVC's YAML writer leaves out the dot, and YAML 1.1 then reads a string."""
    with modify_yaml(str(file)) as content:
        content["profiles"]["mini"]["recipes"]["diva"]["optimizer"]["lr"] = 0.00005
        content["profiles"]["mini"]["recipes"]["diva"]["losses"] = {"denoise": {"weight": 0.00005}}
    assert re.search(r"\blr: 5e-05\b", file.read_text(), re.MULTILINE)
    assert yaml.safe_load("5e-05") == "5e-05"
    assert params.load(file).profile.recipes["diva"].optimizer.lr == 5e-05
    assert losses_of("", params.load(file).profile.recipes["diva"])[0].weight == 5e-05


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/absent.yaml: no such file" in message(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "content",
    [b"run: [mini", b"run:\n\t- mini", b"\xff\xfe\x00\x81", b"run: 2026-02-30", b"run: 0b_"],
)
def test_content_that_is_not_yaml_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert message(file).startswith(f"{file}: not YAML: ")


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    assert message(tmp_path).startswith(f"{tmp_path}: not YAML: ")


@pytest.mark.parametrize(
    "content", ["2026-01-05: 1", "run: &run [*run]", pytest.param("a: " + "[" * 5000 + "]" * 5000, id="deep")]
)
def test_content_that_no_section_can_have_is_refused(file: Path, content: str) -> None:
    file.write_text(content)
    assert message(file).startswith(f"{file}: the file cannot be read: ")


@pytest.mark.parametrize(("content", "found"), [("", "None"), ("- a", "['a']"), ("hello", "'hello'")])
def test_content_without_sections_is_refused(file: Path, content: str, found: str) -> None:
    file.write_text(content)
    assert message(file).startswith(f"{file}: found {found}, wanted sections")


def test_the_shuffled_control_needs_two_images(file: Path) -> None:
    change(file, "profiles.mini.recipes.diva.batch", 1)
    assert re.search(r"run: run\.controls names 'shuffled'.*recipes\.diva\.batch is 1\. Raise it", message(file))
    change(file, "run.controls", ["drift"])
    assert params.load(file).run.weights == ["pretrained", "diva", "diva-drift"]


@pytest.mark.parametrize(
    ("tokens", "text", "fits"),
    [
        ({"kind": "random", "number": 27}, "sequence", True),
        ({"kind": "random", "number": 76}, "sequence", False),
        ({"kind": "none"}, "sequence", False),
        ({"kind": "all"}, "sequence", False),  # as many as the tower has patches
        ({"kind": "random", "number": 76}, "mean", True),
    ],
)
def test_a_condition_that_does_not_fit_the_text_is_refused(
    tokens: dict[str, Any], text: str, fits: bool, file: Path
) -> None:
    """By whatever stage comes first, that is before anything is fetched."""
    key = f"{MINI}.condition"
    change(file, key, {"tokens": tokens, "text": text})
    if fits:
        params.load(file)
        return
    said = message(file)
    assert f"{key} adds its tokens (kind {tokens['kind']}, number " in said
    assert "the prompt has 28 (profiles.mini.denoiser.text_tokens). Set tokens {kind: random, number: 27}" in said
    for axis in ("recipes", "inputs", "controls"):
        change(file, f"run.{axis}", [])
    params.load(file)  # nothing is trained
