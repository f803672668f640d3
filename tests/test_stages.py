"""The stages on a mini world shrunk to seconds: what they read, write, refuse, and leave as it was."""

import errno
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from accelerate import Accelerator, PartialState
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_retrieval
from diffusers import AutoencoderKL, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from shrunk import DATA, METRICS, MODELS, ROOT, read_yaml, run, write_params
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pipeline import backbone as backbone_stage
from pipeline import denoiser as denoiser_stage
from pipeline import mmvp_vlm, train
from pipeline.benchmarks import clip_sets, mmvp, zeroshot
from pipeline.benchmarks.encoder import Encoder
from pipeline.benchmarks.pairs import PROMPT, Question, read_mmvp_vlm
from pipeline.benchmarks.probe import probe
from pipeline.benchmarks.sets import read, write_split
from pipeline.core.code import program
from pipeline.core.compute import generator, seeded
from pipeline.core.outputs import atomic
from pipeline.core.stages import TIMINGS, UserError, stage
from pipeline.data.shards import Shards
from pipeline.diva import step
from pipeline.diva.feedback import Feedback
from pipeline.diva.pairs import matching, score_pairs
from pipeline.diva.rules import PoolingRule, TokenRule
from pipeline.diva.step import Record
from pipeline.engine import assemble, drift
from pipeline.engine.losses import losses_of
from pipeline.engine.resume import Checkpoint
from pipeline.mini import denoiser as mini_denoiser
from pipeline.mini import pretrain, sets, world
from pipeline.mini.images import SET
from pipeline.models.backbones import CONFIG, WEIGHTS, Backbone
from pipeline.models.imports import read_checkpoint
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import params
from pipeline.sections.mmvp import Mmvp
from pipeline.sections.zeroshot import Zeroshot
from pipeline.sections.zeroshot_sets import MiniZeroshotSets

CPU = torch.device("cpu")
GOLDEN_LOSS = Path(__file__).parent / "golden_mini_loss.txt"


def equal(first: nn.Module, second: nn.Module) -> bool:
    """Are all parameters and buffers bitwise the same?"""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------- the mini world


@pytest.mark.slow
def test_no_image_is_in_two_sets() -> None:
    sets = {
        **{name: [world.image(name, i)[0] for i in range(50)] for name in ("image tower", "denoiser", SET, "encoder")},
        "probe": [world.image("probe", 0, i)[0] for i in range(50)],
    }
    for name in ("scorings", "dev", "test", "dev 3", "test 3", "ladder"):
        sets[name] = [world.image(name, group, i)[0] for group in (1, 2, 3) for i in range(50)]
        pairs = [world.pair(pattern, i, name)[0] for pattern in range(9) for i in range(6)]
        sets[f"pairs of {name}"] = [image for pair in pairs for image in pair]
    assert {name.removeprefix("pairs of ") for name in sets} == set(world.SETS)
    everything = [image.tobytes() for found in sets.values() for image in found]
    assert len(set(everything)) == len(everything)


def test_an_image_is_a_pure_function_of_its_index() -> None:
    first, second = (world.image("probe", 0, 7) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes()
    assert (first[1] == second[1]).all()
    with pytest.raises(ValueError, match="not in tuple"):
        world.rng_of("training", 0)


def seen(scene: np.ndarray) -> np.ndarray:
    """The image of a scene, its nuisance and its noise always the same."""
    nuisance = world.Nuisance.sample(np.random.default_rng(0))
    return world.render(scene, nuisance, np.random.default_rng(0)).astype(int)


@pytest.mark.parametrize("attribute", range(10))
def test_every_value_of_every_attribute_is_visible(attribute: int) -> None:
    for what in range(len(world.OBJECTS)):
        scene = np.array([what, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        images = []
        for value in range(world.CARDINALITIES[attribute]):
            scene[attribute] = value
            images.append(seen(scene))
        for a, b in itertools.combinations(images, 2):
            assert (np.abs(a - b).max(-1) > 25).sum() >= 8, world.OBJECTS[what]


def test_a_pair_differs_in_its_pattern_alone() -> None:
    for pattern, index in itertools.product(range(9), range(5)):
        (first, second), scenes = world.pair(pattern, index)
        assert np.flatnonzero(scenes[0] != scenes[1]).tolist() == [1 + pattern]
        assert (first != second).any()
        assert abs(first[:8, :8].mean() - second[:8, :8].mean()) < 2  # one sky, with fresh noise


def test_the_tokenizer_knows_every_word_and_has_room_for_the_longest_caption() -> None:
    tok = pretrain.tokenizer()
    longest = [0, *(max(range(len(v)), key=lambda i: len(v[i].split())) for v in world.PATTERNS.values())]
    captions = [world.caption(np.array(longest)), train_prompt()]
    captions += [f"{PROMPT}a {name}" for name in world.OBJECTS]
    captions += [phrase for values in world.PATTERNS.values() for phrase in values]
    ids = tok(captions).input_ids
    assert all(tok.unk_token_id not in row for row in ids)
    assert tok.unk_token_id in tok(["a photo of a unicorn"]).input_ids[0]
    assert max(map(len, ids)) == len(ids[0]) <= pretrain.CONTEXT_LENGTH
    assert all(row[-1] == tok.eos_token_id == len(tok) - 1 for row in ids)  # where CLIP's text tower looks


def train_prompt() -> str:
    return read_yaml(ROOT / "params.yaml")["profiles"]["mini"]["train"]["prompt"]


# --------------------------------------------------------------------------------------------------------- the denoiser


def patch_autoencoder() -> nn.Module:
    pixels, _ = pretrain.images("denoiser", 48, "images")
    return pretrain.autoencoder(pixels, latent_channels=4, patch_size=8)


def kl_autoencoder() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            3, 3, ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, block_out_channels=(4, 4, 4, 4),
            layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64,
        )  # fmt: skip


@pytest.mark.parametrize("vae", [patch_autoencoder, kl_autoencoder])
def test_a_denoiser_comes_back_as_it_was_saved(here: Path, vae: Callable[[], nn.Module]) -> None:
    denoiser = Denoiser.load(DATA / "denoiser")
    denoiser.vae = vae().requires_grad_(False).eval()
    denoiser.save(here / "other", DDPMScheduler.from_pretrained(DATA / "denoiser" / "scheduler"))
    loaded = Denoiser.load(here / "other")
    assert type(loaded.vae) is type(denoiser.vae)
    assert equal(loaded, denoiser)
    assert loaded.prediction_type == denoiser.prediction_type == "v_prediction"
    pixels = torch.randn(2, 3, 64, 64, generator=generator("test", "pixels"))
    with torch.no_grad():
        latent = loaded.vae.encode(pixels).latent_dist
        assert torch.equal(latent.mean, latent.mode())
        assert torch.equal(denoiser.latent(pixels), latent.mean * loaded.vae.config.scaling_factor)
        assert loaded.vae.decode(latent.mean).sample.shape == pixels.shape
    assert denoiser.latent(pixels).shape == (2, 4, 8, 8)
    assert torch.equal(loaded.text(["a photo of a fish red"]), denoiser.text(["a photo of a fish red"]))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.slow
def test_24_components_keep_an_image() -> None:
    pixels, _ = pretrain.images("denoiser", 300, "images")
    vae = pretrain.autoencoder(pixels[:240], latent_channels=24, patch_size=8)
    kept = pretrain.unit_range(pixels[240:])
    with torch.no_grad():
        latent = vae.encode(kept).latent_dist.mean
        restored = vae.decode(latent).sample
    assert F.mse_loss(restored, kept) < 0.02
    assert latent.std((0, 2, 3)).sub(1).abs().max() < 0.2  # whitened: noise of one size drowns no component first


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_cfg": {"image_size": 64, "widht": 128}}, "TypeError: CLIPVisionCfg"),
        ({"vision_cfg": {"image_size": 64, "patch_size": 0}}, "ZeroDivisionError"),
        ({"vision_cfg": {"image_size": 32}}, "ValueError: image_size is 32, but the mini world's images have 64 px"),
        ({"vision_cfg": {"width": 128}}, "KeyError: 'image_size'"),
        ({"vision_cfg": None}, "TypeError"),
        ({"text_cfg": None}, "TypeError"),
        ({"embed_dims": 9}, "TypeError"),
    ],
)
def test_an_architecture_that_makes_no_mini_backbone_is_refused_by_its_key(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    architecture = read_yaml(ROOT / "params.yaml")["backbones"]["mini"]["source"]["architecture"]
    write_params(**{"backbones.mini.source.architecture": architecture | changes})
    with pytest.raises(SystemExit):
        run(backbone_stage, "mini")
    assert f"backbones.mini.source.architecture makes no model ({said}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_denoiser_of_another_text_length_than_declared_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the declared one, conditions were held before anything was fetched."""
    write_params(**{"profiles.mini.denoiser.text_tokens": 27})
    with pytest.raises(SystemExit):
        run(denoiser_stage)
    assert "the denoiser's text has 28 tokens, but profiles.mini.denoiser.text_tokens is 27" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_denoiser_without_a_part_is_refused(here: Path, part: str) -> None:
    shutil.rmtree(DATA / "denoiser" / part)
    with pytest.raises(UserError, match=f"no folder {part}/"):
        Denoiser.load(DATA / "denoiser")


def test_an_unknown_autoencoder_is_refused(here: Path) -> None:
    config = DATA / "denoiser/vae/config.json"
    config.write_text(config.read_text().replace("PatchAutoencoder", "VQModel"))
    with pytest.raises(UserError, match="unknown autoencoder VQModel; known: AutoencoderKL, PatchAutoencoder"):
        Denoiser.load(DATA / "denoiser")


def test_tokenizers_of_another_length_are_refused(here: Path) -> None:
    tok = pretrain.tokenizer()
    right = len(tok)
    tok.add_tokens(["unicorn"])
    tok.save_pretrained(DATA / "denoiser/tokenizer")
    with pytest.raises(UserError, match=f"denoiser/tokenizer has {right + 1} entries, its text encoder {right}"):
        Denoiser.load(DATA / "denoiser")
    tok.save_pretrained(MODELS / "pretrained/mini")
    with pytest.raises(UserError, match=f"the tokenizer has {right + 1} entries, the text tower {right}"):
        Backbone.load(MODELS / "pretrained/mini")


def test_the_loss_depends_on_the_caption_alone(here: Path) -> None:
    denoiser = Denoiser.load(DATA / "denoiser")
    pixels, scenes = pretrain.images("denoiser", 8, "images")
    captions = [world.caption(scene) for scene in scenes]
    right, again, empty, wrong = (
        mini_denoiser.conditional_loss(denoiser, pixels, texts)
        for texts in (captions, captions, [""] * 8, captions[1:] + captions[:1])
    )
    assert right == again
    assert len({right, empty, wrong}) == 3


# --------------------------------------------------------------------------------------------------------- the backbone


@torch.no_grad()
def test_a_backbone_is_one_of_open_clips_folders(here: Path) -> None:
    folder = MODELS / "pretrained/mini"
    backbone = Backbone.load(folder)
    image = Image.fromarray(world.image("probe", 0, 0)[0]).resize((90, 70))
    pixels = backbone.preprocess(image)[None]
    pooled, patches = backbone.image_tokens(pixels)
    assert torch.equal(pooled, backbone.encode_image(pixels))
    assert (patches.shape[1:], pooled.shape[1]) == ((16, 16), 16) == ((backbone.patches, backbone.width), 16)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder.resolve()}")
    assert equal(clip, backbone.clip)
    assert torch.equal(preprocess(image)[None], pixels)
    assert torch.equal(clip.eval().encode_image(pixels), pooled)
    ids = open_clip.get_tokenizer(f"local-dir:{folder.resolve()}")(["a photo of a fish"])
    assert torch.equal(clip.encode_text(ids), backbone.encode_text(backbone.tokenizer(["a photo of a fish"])))


def test_a_backbone_without_its_weights_is_refused(here: Path) -> None:
    (MODELS / "pretrained/mini" / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"no {WEIGHTS}"):
        Backbone.load(MODELS / "pretrained/mini")


# ------------------------------------------------------------------------------------------------------------- training


def trained(seed: int = 42, processes: Accelerator | None = None) -> tuple[Backbone, Denoiser, list[Record]]:
    """Three steps of the projection, four of the tower."""
    p, processes = params.load(), processes or Accelerator(cpu=True)
    backbone, denoiser = Backbone.load(MODELS / "pretrained/mini"), Denoiser.load(DATA / "denoiser")
    section, recipe, own = p.profile.train, p.profile.recipes[p.run.recipes[0]], p.backbones["mini"].condition
    shards = Shards(Path("data/mini/images"), validation=section.validation.images)
    losses = losses_of("recipe", recipe)
    t = assemble.Training(section, recipe, own, losses, seed, backbone, denoiser, shards)
    feedback = assemble.build_feedback(t, processes.device)
    checkpoint = Checkpoint(None, {}, 60, processes)
    end = assemble.run_phases(t, feedback, Path("curves"), processes, checkpoint)
    return backbone, denoiser, end.records


@pytest.mark.slow
def test_training_moves_the_image_tower_and_nothing_else(here: Path) -> None:
    original = Backbone.load(MODELS / "pretrained/mini")
    backbone, denoiser, _ = trained()
    frozen = Denoiser.load(DATA / "denoiser").state_dict()
    assert all(torch.equal(value, frozen[name]) for name, value in denoiser.state_dict().items())
    before = original.clip.state_dict()
    moved = {name for name, value in backbone.clip.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("visual.")}
    assert all(p.grad is None for p in [*backbone.clip.parameters(), *denoiser.parameters()])  # released with the phase


@pytest.mark.slow
def test_training_is_a_pure_function_of_its_seed(here: Path) -> None:
    first, second, other = trained(), trained(), trained(seed=3)
    assert equal(first[0], second[0])
    assert first[2] == second[2]
    assert not {record.loss for record in first[2]} & {record.loss for record in other[2]}


@pytest.mark.slow
def test_the_loss_curve_is_the_committed_one(here: Path) -> None:
    """Where a change is meant (of a draw, say), copy the curve from this test's message."""
    _, _, records = trained()
    curve = [f"{record.phase} {record.step} {record.loss:.6f}" for record in records]
    found, golden = ([line.split() for line in lines] for lines in (curve, GOLDEN_LOSS.read_text().splitlines()))
    assert [line[:2] for line in found] == [line[:2] for line in golden]
    losses, expected = ([float(line[2]) for line in lines] for lines in (found, golden))
    assert losses == pytest.approx(expected, rel=1e-4), "\n".join(curve)


@pytest.mark.slow
def test_the_stage_writes_what_it_trained(finished: Path, here: Path) -> None:
    backbone, _, records = trained()
    assert equal(Backbone.load(finished / MODELS / "diva/mini"), backbone)
    notes = json.loads((finished / MODELS / "diva/mini/diva.json").read_text())
    assert (notes["seed"], notes["recipe"]["steps"], notes["backbone"]) == (42, 4, "mini")
    assert notes["code"] == program("train.py")  # which an exported card tells how to compare
    folder = finished / METRICS / "train/mini-diva"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == notes["result"]
    assert metrics["images"] == (3 + 4) * 2 * 2
    tower = [record.loss for record in records if record.phase == "tower"]
    assert (metrics["loss_first_tenth"], metrics["loss_last_tenth"]) == (round(tower[0], 5), round(tower[-1], 5))
    written = pd.read_csv(folder / "plots/metrics/tower/loss.tsv", sep="\t")
    assert written.step.tolist() == [0, 1, 2, 3]
    assert written.loss.tolist() == pytest.approx(tower)


def test_drift_goes_as_far_as_training_in_every_tensor(finished: Path) -> None:
    before, trained, moved = (
        read_checkpoint(finished / MODELS / w / "mini" / WEIGHTS) for w in ("pretrained", "diva", "diva-drift")
    )
    for name, tensor in before.items():
        by_training, by_chance = trained[name] - tensor, moved[name] - tensor
        assert by_chance.norm().item() == pytest.approx(by_training.norm().item(), rel=1e-3)
        assert bool(by_chance.any()) == name.startswith("visual.")
        if by_training.numel() > 1000:
            assert abs(F.cosine_similarity(by_training.flatten(), by_chance.flatten(), dim=0)) < 0.2
    alike = (f"visual.transformer.resblocks.{i}.attn.in_proj_weight" for i in range(2))
    first, second = ((moved[name] - before[name]).flatten() for name in alike)
    assert abs(F.cosine_similarity(first, second, dim=0)) < 0.2  # of one shape, and in directions of their own
    again, other = (drift.drifted(before, trained, seed) for seed in (42, 3))
    assert all(torch.equal(again[name], moved[name]) for name in before)
    assert not torch.equal(other["visual.proj"], moved["visual.proj"])


@pytest.mark.parametrize("share", [1.0, 0.01])  # of the change by training; published rates move far less than mini's
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_drift_goes_as_far_as_training_whatever_type_the_checkpoint_was_stored_in(
    finished: Path, tmp_path: Path, dtype: torch.dtype, share: float
) -> None:
    before, after = (load_file(finished / MODELS / weights / "mini" / WEIGHTS) for weights in ("pretrained", "diva"))
    stored = {name: tensor.to(dtype) for name, tensor in before.items()}
    trained = {name: stored[name].float() + share * (after[name] - before[name]) for name in before}
    for folder, tensors in (("pretrained", stored), ("diva", trained)):
        shutil.copytree(finished / MODELS / "pretrained/mini", tmp_path / folder)
        save_file(tensors, tmp_path / folder / WEIGHTS)
    drift.drift(tmp_path / "pretrained", tmp_path / "diva", 42, tmp_path / "drift")
    moved = load_file(tmp_path / "drift" / WEIGHTS)
    distances = {
        name: [(to[name].double() - tensor.double()).norm().item() for to in (moved, trained)]
        for name, tensor in stored.items()
    }
    assert sum(by_training > 0 for _, by_training in distances.values()) > 20
    for by_chance, by_training in distances.values():
        assert by_chance == pytest.approx(by_training, rel=0.01)


def poison_the_denoiser() -> None:
    file = DATA / "denoiser/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"][0] = torch.nan
    save_file(weights, file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "name", "helps"),
    [(step, "terms", True), (Feedback, "__init__", False)],
    ids=["while it trains", "while models are built, which no micro-batch changes"],
)
def test_a_training_that_fills_the_gpu_says_which_micro_batch_to_set(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: object,
    name: str,
    helps: bool,
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(where, name, full)
    half, more = "Add -S profiles.mini.train.micro_batch=1, which", "Use a GPU with more memory"
    for micro_batch, way in ((2, half if helps else more), (1, more)):
        write_params(**{"profiles.mini.train.micro_batch": micro_batch})
        with pytest.raises(SystemExit):
            run(train, "mini", "diva")
        said = capsys.readouterr().err
        assert f"by recipe diva with micro_batch {micro_batch}. {way}" in said
        assert "CUDA out of memory." in said


def raise_the_rate() -> None:
    write_params(**{"profiles.mini.recipes.diva.optimizer.lr": 1e30})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "where"), [(poison_the_denoiser, "step 0 of phase 'projection'"), (raise_the_rate, "of phase 'tower'")]
)
def test_training_that_diverges_stops_and_keeps_the_last_good_weights(
    here: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[], None], where: str
) -> None:
    spoil()
    kept = MODELS / "diva/mini.last-good"
    kept.mkdir(parents=True)  # of an earlier failure
    with pytest.raises(SystemExit) as ended:
        run(train, "mini", "diva")
    assert ended.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert re.search(rf"(nan|inf) in step \d {where}|(nan|inf) in {where}", message), message
    assert str(kept) in message
    last_good = Backbone.load(kept)
    assert all(torch.isfinite(p).all() for p in last_good.parameters())
    assert equal(last_good, Backbone.load(MODELS / "pretrained/mini")) == (spoil is poison_the_denoiser)
    drawn = {str(path.relative_to(kept / "curves")) for path in (kept / "curves").rglob("loss.tsv")}
    tower = {f"plots/metrics/{phase}/loss.tsv" for phase in ("projection", "tower")}
    assert drawn == (set() if spoil is poison_the_denoiser else tower)  # of every step before that one
    assert f"{kept}/curves" in message
    assert {path.name for path in (MODELS / "diva").iterdir()} == {".mini.lock", "mini.last-good"}
    assert list((METRICS / "train").iterdir()) == []


HOLD = """
import sys
from pathlib import Path
from pipeline.core.outputs import atomic
with atomic(Path("models/mini/diva/mini")):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_second_trainer_is_told_who_is_the_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}){HOLD}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SystemExit) as ended:
            run(train, "mini", "diva")
        holder.kill()
    assert ended.value.code == 1
    assert f"models/mini/diva/mini is being written by process {holder.pid} on " in capsys.readouterr().err
    run(train, "mini", "diva")  # a killed holder holds no more
    assert (MODELS / "diva/mini/diva.json").is_file()


# -------------------------------------------------------------------------------------------------------------- runtime


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UserError])
def test_an_output_is_whole_or_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    old, new = tmp_path / "old", tmp_path / "deep/new.json"
    old.mkdir()
    (old / "content").write_text("old")

    def write() -> None:
        with atomic(old, new) as partial:
            partial[0].mkdir()
            (partial[0] / "content").write_text("new")
            partial[1].write_text("new")
            raise error

    with pytest.raises(error):
        write()
    assert (old / "content").read_text() == "old"
    assert {path.name for path in tmp_path.rglob("*")} == {"old", "content", "deep", ".old.lock"}


def test_success_replaces_and_a_missing_output_does_not(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file.json"
    for content in ("first", "second"):
        with atomic(folder, file) as partial:
            partial[0].mkdir()
            (partial[0] / content).touch()
            partial[1].write_text(content)
    with pytest.raises(FileNotFoundError, match=r"file\.json"), atomic(folder, file) as partial:
        partial[0].mkdir()
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert file.read_text() == "second"
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file.json", ".folder.lock"}


def test_a_kill_while_an_old_output_is_removed_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"

    def make(content: str) -> None:
        with atomic(folder) as (partial,):
            partial.mkdir()
            for name in ("a", "b"):
                (partial / name).write_text(content)

    def half(path: Path, *_: Any, **__: Any) -> None:
        (path / "a").unlink()
        raise SystemExit  # as a kill would

    make("first")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(SystemExit):
            make("second")
    assert not folder.exists() or {file.read_text() for file in folder.iterdir()} == {"second"}
    make("third")
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "a", "b", ".folder.lock"}


def test_what_the_disk_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tool"])

    def fails(error: OSError) -> None:
        def main() -> None:
            raise error

        stage(main)()

    for error, said in (
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device. Make room"),
        (OSError(errno.ENOSPC, "No space left on device"), f"{tmp_path}: No space left on device. Make room"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a"),
            "a: Permission denied. Make it readable and writable",
        ),
    ):
        with pytest.raises(SystemExit, match="1"):
            fails(error)
        assert said in capsys.readouterr().err
    with pytest.raises(OSError, match="Input"):  # of a broken disk: no remedy is known
        fails(OSError(errno.EIO, "Input/output error"))


def test_a_stage_whose_time_cannot_be_noted_has_ended_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["tool"])
    TIMINGS.mkdir(parents=True)  # a folder, which nobody can write to as a file
    stage(lambda: print("done"))()
    told = capsys.readouterr()
    assert told.out == "done\n"
    assert "warning: no time was noted in metrics/timings.jsonl" in told.err


def test_a_generator_is_a_pure_function_of_its_purpose() -> None:
    purposes = [(1, "test", 2), (1, "test", "2"), ("test", 1, 2), (1, "test"), (1, "test", 2, 0), (12, "test")]
    draws = [torch.rand(3, generator=generator(*purpose)).tolist() for purpose in purposes]
    torch.manual_seed(5)
    assert draws == [torch.rand(3, generator=generator(*purpose)).tolist() for purpose in purposes]
    assert len({tuple(draw) for draw in draws}) == len(purposes)
    assert torch.initial_seed() == 5


def test_what_a_purpose_draws_never_changes() -> None:
    """Else other weights would come from the same params.yaml."""
    assert generator(42, "crop", "tower", 3, 7).initial_seed() == 3957238335221144144
    with seeded("mini", "clip"):
        assert torch.initial_seed() == 3452578113337391563


def test_a_purpose_that_is_not_in_the_list_is_refused() -> None:
    for purpose in [(1, "noise", 2), ("noise",), (1, 2), ()]:
        with pytest.raises(ValueError, match="not in PURPOSES"):
            generator(*purpose)
    with pytest.raises(ValueError, match="not in PURPOSES"), seeded(1, "noise"):
        pass


# ----------------------------------------------------------------------------------------------------------------- MMVP


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    sets.pairs(tmp_path / "benchmark", 1)
    return tmp_path / "benchmark"


def test_questions_are_read_in_the_order_of_their_ids(benchmark: Path) -> None:
    questions = read_mmvp_vlm(benchmark, 1)
    assert [question.id for question in questions] == list(range(1, 19))
    assert [question.type for question in questions[::2]] == list(world.PATTERNS)
    for pattern, values in enumerate(world.PATTERNS.values()):
        pair = questions[2 * pattern : 2 * pattern + 2]
        for question, image, scene in zip(pair, *world.pair(pattern, 0), strict=True):
            assert question.statement == f"a {world.OBJECTS[scene[0]]} {values[scene[1 + pattern]]}"
            assert np.abs(np.asarray(question.image(), float) - image).mean() < 8
    underscored = benchmark / "MLLM_VLM Images/Structural_Character"
    (benchmark / "MLLM_VLM Images/Structural Character").rename(underscored)
    assert [q.path.parent for q in read_mmvp_vlm(benchmark, 1) if q.type == "Structural Character"] == [underscored] * 2


def edit(table: str, change: Callable[[list[str]], list[str]]) -> str:
    return "\n".join(change(table.splitlines())) + "\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "17 statements"),
        (lambda lines: [*lines, "19,Text,a fish letter A"], "19 statements"),
        (lambda lines: [*lines[:17], lines[18], lines[17]], r"wanted ids 1\.\.18"),
        (lambda lines: lines[:17], "16 statements"),
        (lambda lines: [line.replace("Text", "State") for line in lines], "State 4"),
        (lambda lines: ["Id,Type,Statement", *lines[1:]], "columns are .'Id', 'Type', 'Statement'."),
        (lambda lines: [*lines[:5], "five,Presence,a fish", *lines[6:]], r"wanted ids 1\.\.18"),
        (lambda lines: [*lines[:3], "3,Presence, ", *lines[4:]], "statement 3 is empty"),
        (lambda lines: [*lines[:3], "3,Presence,a,fish", *lines[4:]], "not a comma-separated table in UTF-8 .*line 4"),
        (lambda lines: [], "not a comma-separated table|columns are"),
    ],
)
def test_a_wrong_table_is_refused(benchmark: Path, change: Callable[[list[str]], list[str]], message: str) -> None:
    file = benchmark / "Questions.csv"
    file.write_text(edit(file.read_text(), change))
    with pytest.raises(UserError, match=f"Questions.csv: {message}|Questions.csv: 18 statements.*{message}"):
        read_mmvp_vlm(benchmark, 1)


def test_every_statement_is_text(benchmark: Path) -> None:
    file = benchmark / "Questions.csv"
    said = ["None", "NA", "null", "nan", "12", '"a fish, blue"', "true"]
    lines = file.read_text().splitlines()
    for i, statement in enumerate(said, 1):
        lines[i] = ",".join([*lines[i].split(",")[:2], statement])
    file.write_text("\n".join(lines), encoding="utf-8-sig")  # as Excel writes it
    assert [q.statement for q in read_mmvp_vlm(benchmark, 1)[:7]] == [text.strip('"') for text in said]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_a_table_in_another_encoding_is_refused(benchmark: Path, encoding: str) -> None:
    file = benchmark / "Questions.csv"
    file.write_text(file.read_text().replace(",a ", ",a caf\N{LATIN SMALL LETTER E WITH ACUTE}"), encoding=encoding)
    with pytest.raises(UserError, match=r"Questions\.csv: (not a comma-separated table in UTF-8|columns are)"):
        read_mmvp_vlm(benchmark, 1)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["half", "ten thousand million pixels"])
def test_a_damaged_image_is_refused_where_the_pairs_come_in(
    here: Path, content: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = sets.pairs

    def damaged(folder: Path, pairs: int) -> None:
        make(folder, pairs)
        file = folder / "MLLM_VLM Images/State/6.jpg"
        file.write_bytes(file.read_bytes()[:700] if content == "half" else b"P6 100000 100000 255\n")

    monkeypatch.setattr(sets, "pairs", damaged)
    write_params(**{"profiles.mini.mmvp_vlm.pairs_per_pattern": 1})
    with pytest.raises(SystemExit):
        run(mmvp_vlm)
    assert "State/6.jpg: cannot be read as an image (" in capsys.readouterr().err


def test_a_missing_table_or_image_is_named(benchmark: Path) -> None:
    (benchmark / "MLLM_VLM Images/State/6.jpg").unlink()
    with pytest.raises(UserError, match=r"State/6\.jpg: no such file"):
        read_mmvp_vlm(benchmark, 1)
    (benchmark / "Questions.csv").unlink()
    with pytest.raises(UserError, match=r"Questions\.csv: no such file"):
        read_mmvp_vlm(benchmark, 1)


# Embeddings of (statements 1 and 2, images 1 and 2) of a pair that is right in which direction.
X, Y, NEAR_Y = (1.0, 0.0), (0.0, 1.0), (0.6, 0.8)
PAIRS = {
    "both": (X, Y, X, Y),
    "neither": (X, Y, Y, X),
    "statement to image": (X, Y, NEAR_Y, (0.1, 0.995)),
    "image to statement": (NEAR_Y, (0.1, 0.995), X, Y),
    "tied": (X, Y, X, X),
}


class ByHand(nn.Module):
    """Embeds question n by a table, reading n off the image's grey or the statement's number."""

    def __init__(self, pairs: list[tuple], patch: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.texts = torch.tensor([vector for pair in pairs for vector in pair[:2]])
        self.images = torch.tensor([vector for pair in pairs for vector in pair[2:]])
        self.patch, self.logit_scale = patch, torch.tensor(10.0)

    def preprocess(self, image: Image.Image, resize_mode: str | None = None) -> torch.Tensor:
        return torch.tensor(round(np.asarray(image).mean() / 10))

    def image_tokens(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[numbers], self.patch(self.images[numbers])

    def embed(self, texts: list[str]) -> torch.Tensor:
        assert all(text.startswith("a photo of ") for text in texts)
        numbers = torch.tensor([int(text.split()[-1]) for text in texts])
        return (3 - 2 * (numbers % 2))[:, None] * self.texts[numbers]  # a pair's first statement is three times as long


def by_hand(
    folder: Path, kinds: dict[str, list[str]], published: PoolingRule, patch: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[dict, pd.DataFrame]:
    """Score pairs of the given kinds, pattern by pattern."""
    pairs = [PAIRS[kind] for group in kinds.values() for kind in group]
    patterns = [pattern for pattern, group in kinds.items() for _ in group for _ in range(2)]
    questions = []
    for number, pattern in enumerate(patterns):
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(folder / f"{number}.png")
        questions.append(Question(number, pattern, f"{number}", folder / f"{number}.png"))
    settings = Mmvp(seed=0, draws=6, batch=4)
    return mmvp.score(ByHand(pairs, patch), questions, published, settings, CPU)[:2]


KINDS = {
    "Color": ["both", "statement to image", "neither", "tied"],
    "Text": ["both"],
    "State": ["image to statement", "statement to image"],
}


def swapped(images: torch.Tensor) -> torch.Tensor:
    """One patch an image, which drowns the pooled token and says the other axis."""
    return 100 * images.flip(-1)[:, None]


def test_scores_of_hand_made_pairs(tmp_path: Path) -> None:
    summary, table = by_hand(tmp_path, KINDS, PoolingRule(TokenRule("all")), swapped)
    assert summary["pairs"] == 7
    stock, published = summary["stock"], summary["published"]
    assert stock["statement_to_image"]["patterns"] == {"Color": 50.0, "Text": 100.0, "State": 50.0}
    assert stock["image_to_statement"]["patterns"] == {"Color": 25.0, "Text": 100.0, "State": 50.0}
    assert stock["statement_to_image"]["average"] == 66.667  # of the patterns, though they differ in size
    assert stock["image_to_statement"]["average"] == 58.333
    assert (stock["statement_to_image"]["ties"], stock["image_to_statement"]["ties"]) == (2, 0)
    assert published["statement_to_image"]["patterns"] == {"Color": 25.0, "Text": 0.0, "State": 0.0}
    assert published["statement_to_image"]["average"] == 8.333
    assert {(block["draws"], block["sd_over_draws"]) for r in (stock, published) for block in r.values()} == {(1, 0.0)}
    rows = table[table.pooling == "stock"]
    assert rows.pattern.tolist() == ["Color"] * 4 + ["Text"] + ["State"] * 2
    assert rows.statement_to_image.tolist() == [1, 1, 0, 0, 1, 0, 1]
    assert rows.image_to_statement.tolist() == [1, 0, 0, 0, 1, 1, 0]
    assert rows.matching.tolist() == [1, 1, 0, 0, 1, 1, 1]  # forgives an image that both like; a tie is not right
    assert summary["matching"]["stock"] == {
        "average": 83.333, "patterns": {"Color": 50.0, "Text": 100.0, "State": 100.0}
    }  # fmt: skip
    kept = rows[list(mmvp.SIMILARITIES)].astype(float).to_numpy()
    assert kept[0].tolist() == [1, 0, 0, 1]
    again = torch.from_numpy(kept).unflatten(1, (2, 2))
    assert score_pairs(again[:3]).right_P.tolist() == [True, True, False]  # any rule can be asked of them later
    assert matching(again).tolist() == rows.matching.astype(bool).tolist()


@pytest.mark.parametrize("drawn_per", ["statement", "pair"])
def test_a_pooling_rule_that_draws_tokens_is_scored_over_its_draws(
    tmp_path: Path, drawn_per: Literal["statement", "pair"]
) -> None:
    def honest_or_swapped(images: torch.Tensor) -> torch.Tensor:
        return 100 * torch.stack([images, images.flip(-1)], 1)

    kinds = {"Color": ["both"] * 6, "Text": ["both"] * 5}
    pooling = PoolingRule(TokenRule("random", 1), drawn_per=drawn_per)
    (first, table), (second, _) = (by_hand(tmp_path, kinds, pooling, honest_or_swapped) for _ in range(2))
    assert first == second
    assert (first["stock"]["statement_to_image"]["average"], first["stock"]["statement_to_image"]["draws"]) == (100, 1)
    result = first["published"]["statement_to_image"]
    assert result["draws"] == 6

    def honest(draw: int, statement: int, image: int) -> bool:
        own = statement if drawn_per == "statement" else 0
        return int(torch.randint(2, (1,), generator=generator(0, "read-out", draw, own, image))) == 0

    right = np.array([  # an image that shows its other axis still beats nothing: both must, to mislead a statement
        [all(honest(d, s, 2 * pair) or honest(d, s, 2 * pair + 1) for s in range(2)) for pair in range(11)]
        for d in range(6)
    ])  # fmt: skip
    shares = table[table.pooling == "published"].statement_to_image.to_numpy()
    assert shares == pytest.approx(right.mean(0))
    by_draw = 100 * (right[:, :6].mean(1) + right[:, 6:].mean(1)) / 2
    assert result["average"] == pytest.approx(by_draw.mean(), abs=1e-3)
    assert result["sd_over_draws"] == pytest.approx(by_draw.std(ddof=1), abs=1e-3)
    assert result["sd_over_draws"] > 0


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_a_pooling_rule_has_its_own_way_to_resize(
    finished: Path, tmp_path: Path, resize_mode: Literal["shortest", "squash"]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished / MODELS / "pretrained/mini", folder)
    config = json.loads((folder / CONFIG).read_text())
    config["preprocess_cfg"]["resize_mode"] = "squash"  # DFN's own
    (folder / CONFIG).write_text(json.dumps(config))
    backbone, questions, expected = Backbone.load(folder), [], []
    for number in range(8):
        image = Image.fromarray(world.image("scorings", 0, number)[0]).resize((128, 64))
        image.save(tmp_path / f"{number}.png")
        crop = image.crop((32, 0, 96, 64)) if resize_mode == "shortest" else image.resize((64, 64), 3)
        expected.append(backbone.preprocess(crop))
        questions.append(Question(number, "Color", f"{number} dots", tmp_path / f"{number}.png"))
    pooling = PoolingRule(TokenRule("none"), normalize_output=False, resize_mode=resize_mode)
    squashed, _ = mmvp.tokens(backbone, questions, None, 8, CPU)
    pooled, _ = mmvp.tokens(backbone, questions, resize_mode, 8, CPU)
    with torch.no_grad():
        torch.testing.assert_close(pooled, backbone.encode_image(torch.stack(expected)), rtol=1e-3, atol=1e-4)
    _, table, stock = mmvp.score(backbone, questions, pooling, Mmvp(seed=0, draws=1, batch=4), CPU)
    torch.testing.assert_close(stock, squashed)  # whatever the published pooling is
    logits = mmvp.logits(backbone, questions, pooled, pooled[:, None], pooling, 0, 0)
    right = score_pairs(logits).right_P.tolist()
    assert table[table.pooling == "published"].statement_to_image.tolist() == right


def test_an_embedding_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    def broken(images: torch.Tensor) -> torch.Tensor:
        return images.masked_fill(images == 1, torch.nan)[:, None]

    with pytest.raises(ValueError, match="pair 1: a logit is not finite"):
        by_hand(tmp_path, {"Color": ["both", "both"]}, PoolingRule(TokenRule("all")), broken)


# ------------------------------------------------------------------------------------------------------------ zero-shot


class Raw(nn.Module):
    """What all models made here have: the pixels as they are, 0..255."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    def resize(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.permute(0, 3, 1, 2).float()

    def embed(self, texts: list[str]) -> torch.Tensor:
        return self.encode_text(self.tokenizer(texts))


def encoder(model: nn.Module, batch: int) -> Encoder:
    return Encoder(model, PartialState(cpu=True), batch, "float32")  # type: ignore[arg-type]


class Blurred(Raw):
    """Coarse pixels against fixed random sentences: wrong as a rule, but never the same answer for all."""

    def __init__(self, tokenizer) -> None:
        super().__init__(64)
        self.tokenizer = tokenizer
        self.words = torch.randn(100, 48, generator=generator("test", "fixed words"))

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        coarse = F.avg_pool2d(pixels, 16).flatten(1)
        return coarse - coarse.new_tensor(BLUR_MEAN)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words[ids].sum(1)


BLUR_MEAN = np.mean([world.image("probe", 1, i)[0].reshape(4, 16, 4, 16, 3).mean((1, 3)) for i in range(50)], 0)
BLUR_MEAN = BLUR_MEAN.transpose(2, 0, 1).ravel().tolist()


def members(tar_file: Path, extension: str) -> list[bytes]:
    with tarfile.open(tar_file) as tar:
        return [tar.extractfile(m).read() for m in tar if m.name.endswith(extension)]  # type: ignore[union-attr]


@pytest.mark.slow
@torch.no_grad()
def test_zero_shot_scores_are_what_a_naive_formula_says(here: Path) -> None:
    root, (n, k) = here / "sets", (60, 5)
    sizes = MiniZeroshotSets(kind="mini", classification=n, retrieval=30, probe_train=1, probe_test=1)
    sets.zeroshot(root, sizes)
    captions_set, details_set, objects_set = read(root)
    assert [s.kind for s in (captions_set, details_set, objects_set)] == ["retrieval", "probe", "classification"]
    model = Blurred(Backbone.load(MODELS / "pretrained/mini").tokenizer)

    def units(tar_file: Path) -> torch.Tensor:
        pixels = [np.asarray(Image.open(io.BytesIO(data)), np.float32) for data in members(tar_file, ".png")]
        return F.normalize(model.encode_image(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)), dim=-1)

    def sentences(texts: list[str]) -> torch.Tensor:
        return F.normalize(model.encode_text(model.tokenizer(texts)), dim=-1)

    labels = torch.tensor([int(data) for data in members(root / "wds/objects/test/0.tar", ".cls")])
    assert labels.tolist() == [world.image("scorings", 1, i)[1][0] for i in range(n)]
    prompts = sentences([f"a photo of a {name}" for name in world.OBJECTS])
    chosen = (units(root / "wds/objects/test/0.tar") @ prompts.T).argmax(1)
    expected = 100 * (chosen == labels).double().mean().item()
    assert len(set(chosen.tolist())) > 3
    assert 0 < expected < 100
    answers = clip_sets.classification(encoder(model, 16), objects_set)
    assert answers.right.tolist() == (chosen == labels).tolist()

    captions = [data.decode() for data in members(root / "wds/captions/test/0.tar", ".txt")]
    assert captions == [world.caption(world.image("scorings", 2, i)[1]) for i in range(30)]
    similarity = units(root / "wds/captions/test/0.tar") @ sentences(captions).T  # [image, text]
    found = {"image_to_text": similarity, "text_to_image": similarity.T}
    recall = {way: 100 * np.mean([i in row.topk(k).indices for i, row in enumerate(s)]) for way, s in found.items()}
    assert recall["image_to_text"] != recall["text_to_image"]
    answers = clip_sets.retrieval(encoder(model, 7), captions_set, k)
    assert (100 * answers.groupby("measure").right.mean()).to_dict() == pytest.approx(recall)
    for way, table in answers.groupby("measure"):
        assert table.right.tolist() == [i in row.topk(k).indices for i, row in enumerate(found[str(way)])]
        assert table.image.tolist() == list(range(30))


def write_set(root: Path, kind: str | None = None, label: str = "cls", labels: tuple[str, ...] = ("0", "1")) -> Path:
    """A set as clip-benchmark's, of as many grey images as there are labels."""
    grey = io.BytesIO()
    Image.new("RGB", (4, 4)).save(grey, "JPEG")
    folder = root / "wds/dots"
    samples = ((str(i), {"jpg": grey.getvalue(), label: text.encode()}) for i, text in enumerate(labels))
    write_split(folder, "test", kind or "", samples)
    if kind is None:
        (folder / "dataset_type.txt").unlink()
    (folder / "classnames.txt").write_text("one dot\ntwo dots\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n")
    return folder


def cut(tar: Path, size: int) -> None:
    tar.write_bytes(tar.read_bytes()[:size])


def again(tar: Path) -> None:
    with tarfile.open(tar, "a") as file:
        file.addfile(tarfile.TarInfo("1.jpg"))


def relabel(folder: Path, **options: Any) -> None:
    shutil.rmtree(folder)
    write_set(folder.parents[1], **options)


@pytest.mark.parametrize("kind", [None, "classification", "Classification", " CLASSIFICATION\r\n"])
def test_a_set_may_say_its_kind_in_any_case(tmp_path: Path, kind: str | None) -> None:
    write_set(tmp_path, kind)
    assert [(found.name, found.kind) for found in read(tmp_path)] == [("dots", "classification")]


@pytest.mark.parametrize("kind", ["multilabel", "", "detection"])
def test_a_set_of_another_kind_is_refused_with_what_to_do(tmp_path: Path, kind: str) -> None:
    write_set(tmp_path, kind)
    said = (
        rf"dots/dataset_type\.txt names the kind '{kind}'; known kinds: classification, retr.*Remove 'dots' from zeros"
    )
    with pytest.raises(UserError, match=said):
        read(tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "classnames.txt").unlink(), r"No such file.*classnames\.txt"),
        (lambda folder: (folder / "classnames.txt").write_text(""), r"classnames\.txt .* is empty"),
        (lambda folder: (folder / "classnames.txt").write_text("one dot"), r"1\.cls says '1', which is none of 1"),
        (lambda folder: (folder / "classnames.txt").write_text("a\n\nb"), r"line 2 of classnames\.txt is empty"),
        *(
            (
                lambda folder, text=text: (folder / "zeroshot_classification_templates.txt").write_text(text),
                r"must have \{c\}, and no other brace",
            )
            for text in ("{}", "a photo", "{c} and {d}", "a {c}}")
        ),
        (lambda folder: (folder / "test/nshards.txt").write_text("two"), r"test/nshards\.txt says 'two'"),
        (lambda folder: (folder / "test/nshards.txt").write_text("2"), r"No such file.*test/1\.tar"),
        (lambda folder: (folder / "test/nshards.txt").write_text("0"), r"test/ holds no image"),
        (lambda folder: (folder / "test/0.tar").write_bytes(b"<html>"), r"0\.tar cannot be read \(truncated header"),
        (lambda folder: (folder / "dataset_type.txt").write_text("retrieval"), r"0\.tar: 0 lacks .* its \.txt"),
        (lambda folder: relabel(folder, label="npy"), r"0\.tar: 0 lacks .* its \.cls"),
        (lambda folder: relabel(folder, labels=("0", "dot")), r"1\.cls says 'dot', which is none of 2"),
        (lambda folder: relabel(folder, kind="retrieval", label="txt", labels=("a", "")), r"1\.txt holds no caption"),
        (lambda folder: cut(folder / "test/0.tar", 1600), r"0\.tar cannot be read \(unexpected end of data"),
        (lambda folder: again(folder / "test/0.tar"), r"0\.tar holds 1\.jpg twice"),
    ],
)
def test_a_set_that_cannot_be_scored_is_refused_where_it_comes_in(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    folder = write_set(tmp_path)
    read(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=rf"dots cannot be scored: .*{said}.*Remove 'dots' from zeroshot_sets\.sets"):
        read(tmp_path)


def test_a_byte_order_mark_and_empty_last_lines_are_no_part_of_a_name(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    (before,) = read(tmp_path)
    for name in ("dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt"):
        text = (folder / name).read_text() if (folder / name).exists() else "classification"
        (folder / name).write_text(f"{text}\n\n", encoding="utf-8-sig")
    assert read(tmp_path) == [before]


@torch.no_grad()
def test_an_image_of_several_texts_is_retrieved_as_clip_benchmark_does(tmp_path: Path) -> None:
    """Five texts for some images, one for others; each text is noted with its image."""
    numbers = [5, 1, 2, 5, 3, 1]
    draws = generator("test", "texts")
    images = torch.randn(6, 8, generator=draws)
    of_text = [i for i, n in enumerate(numbers) for _ in range(n)]
    texts = images[of_text] + 1.5 * torch.randn(len(of_text), 8, generator=draws)

    class Drawn(Raw):
        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return images[pixels[:, 0, 0, 0].round().long() // 10]

        def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
            return texts[ids]

        def tokenizer(self, found: list[str]) -> torch.Tensor:
            return torch.tensor([int(text) for text in found])

    def floats(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1)

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        first = 0
        for i, n in enumerate(numbers):
            file = io.BytesIO()
            Image.new("RGB", (2, 2), (10 * i,) * 3).save(file, "png")
            yield f"{i:06d}", {"png": file.getvalue(), "txt": "\n".join(map(str, range(first, first + n))).encode()}
            first += n

    write_split(tmp_path / "wds/captions", "test", "retrieval", samples())
    answers = clip_sets.retrieval(encoder(Drawn(2), 4), *read(tmp_path), 2)
    dataset = build_dataset("wds/captions", root=str(tmp_path / "wds/captions"), transform=floats, task="")
    loader = DataLoader(dataset.batched(4), batch_size=None)
    model = Drawn(2)
    expected = zeroshot_retrieval.evaluate(model, loader, model.tokenizer, "cpu", amp=False, recall_k_list=[2])
    found = answers.groupby("measure").right.mean()
    assert found["text_to_image"] == pytest.approx(expected["image_retrieval_recall@2"])
    assert found["image_to_text"] == pytest.approx(expected["text_retrieval_recall@2"])
    assert 0 < found["text_to_image"] < 1
    assert answers[answers.measure == "text_to_image"].image.tolist() == of_text


def write_details(root: Path) -> None:
    """A set for the probe: of its two attributes one is the red of the image, the other is not to be seen."""
    draws = np.random.default_rng(0)

    def samples(count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in range(count):
            shown, hidden = (int(v) for v in draws.integers(3, size=2))
            file = io.BytesIO()
            Image.new("RGB", (2, 2), (100 * shown, int(draws.integers(256)), int(draws.integers(256)))).save(
                file, "png"
            )
            labels = json.dumps({"shown": shown, "hidden": hidden}).encode()
            yield f"{i:06d}", {"png": file.getvalue(), "json": labels}

    for split in ("train", "test"):
        write_split(root / "wds/details", split, "probe", samples(400))


@pytest.mark.slow
def test_the_probe_reads_what_the_embedding_holds_and_nothing_else(tmp_path: Path) -> None:
    write_details(tmp_path)

    class Red(Raw):
        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            red, *noise = pixels[:, :, 0, 0].T
            return torch.stack([red == 0, red == 100, *(colour / 255 for colour in noise)], 1)

    scores = 100 * probe(encoder(Red(2), 64), *read(tmp_path)).groupby("measure").right.mean()
    assert scores["shown"] == 100
    assert scores["hidden"] == pytest.approx(100 / 3, abs=8)


@pytest.mark.slow
def test_the_probe_is_given_directions_alone(tmp_path: Path) -> None:
    """As similarities are: what only an embedding's length tells is no detail that it holds."""
    write_details(tmp_path)

    class Long(Raw):
        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return (1 + pixels[:, :1, 0, 0]) * pixels[:, 1:, 0, 0]

    section = Zeroshot(batch=64, recall=1, precision="float32")
    summary, _ = zeroshot.score(Long(2), tmp_path, section, CPU)  # type: ignore[arg-type]
    assert summary["details"]["shown"] == pytest.approx(100 / 3, abs=8)


def test_the_same_samples_give_the_same_shard(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_split(tmp_path / name, "test", "retrieval", [("0", {"txt": b"a fish"})])
    assert (tmp_path / "first/test/0.tar").read_bytes() == (tmp_path / "second/test/0.tar").read_bytes()


# ------------------------------------------------------------------------------------------------ the committed figures


def committed(name: str) -> dict:
    return json.loads((ROOT / METRICS / name).read_text())


def test_the_committed_denoiser_listens_to_its_caption() -> None:
    loss = committed("denoiser.json")["validation_loss"]
    assert loss["right"] + 0.02 < loss["empty"]
    assert loss["empty"] + 0.02 < loss["wrong"]


def test_the_committed_backbone_knows_objects_and_has_room_for_details() -> None:
    sets = committed("scores/zeroshot/mini-pretrained/scores.json")
    assert next(scores["average"] for scores in sets.values() if scores["kind"] == "classification") > 98
    stock = committed("scores/mmvp/mini-pretrained/scores.json")["stock"]
    assert 30 <= stock["statement_to_image"]["average"] <= 45
    assert committed("oracle/mini.json")["pairs_stock"] > 75
