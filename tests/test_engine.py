"""The engine around the step: what it is fed, several processes, kills and resumes, full disks."""

import dataclasses
import json
import random
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import launch
import pandas as pd
import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from shrunk import DATA, METRICS, MODELS, read_yaml, run, write_params, write_shards, write_yaml
from test_stages import CPU, trained
from test_training import both, build

from pipeline import train
from pipeline.core.outputs import write_json
from pipeline.core.stages import UserError
from pipeline.data.shards import Shards
from pipeline.diva import step as step_
from pipeline.diva.feedback import Feedback
from pipeline.diva.losses import Denoise, InfoNCE
from pipeline.diva.rules import TokenRule
from pipeline.diva.step import MicroBatch, terms
from pipeline.engine import assemble, resume, scratch
from pipeline.engine.curves import CURVES, ends
from pipeline.engine.feed import Feed
from pipeline.models.backbones import Backbone
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import params
from pipeline.sections.recipe import Recipe
from pipeline.sections.train import Train
from pipeline.tools import bench, growth

EXHAUSTIVE = pytest.mark.exhaustive
RULE = TokenRule("random", 5)


# -------------------------------------------------------------------------------------------------- what steps are fed


@pytest.fixture
def models(here: Path) -> tuple[Backbone, Denoiser]:
    """Beside three shards of images, of which two cannot be decoded."""
    shutil.rmtree("data/mini/images")
    counts = {}
    for i, count in enumerate((9, 8, 7)):
        write_shards(Path("data/mini/images", str(i)), count)
        counts[f"{i}/00000.tar"] = count
    path = Path("data/mini/images/1/00000.tar")
    content = path.read_bytes()
    for _ in range(2):
        start = content.index(b"\xff\xd8\xff")
        content = content[:start] + b"none" + content[start + 4 :]
    path.write_bytes(content)
    write_json(Path("data/mini/images/shards.json"), {"size": 64, "samples": 24, "shards": counts})
    return Backbone.load(MODELS / "pretrained/mini"), Denoiser.load(DATA / "denoiser").for_feedback(torch.float32)


def section(**changes: object) -> Train:
    found = params.load().profile.train.model_dump()
    return Train(**(found | {"micro_batch": 3, "max_undecodable": 0.5} | changes))


def recipe(**changes: object) -> Recipe:
    return Recipe(**(params.load().profile.recipes["diva"].model_dump() | {"batch": 8} | changes))


STEPS = [("projection", 0), ("projection", 1), ("tower", 0), ("tower", 1), ("tower", 2)]


def feed(
    models: tuple[Backbone, Denoiser], p: Train, steps: list[tuple[str, int]] = STEPS, batch: int = 8, **options
) -> Feed:
    shards = Shards(Path("data/mini/images"), p.max_undecodable, 2)
    return Feed(shards, *models, RULE, p, recipe(batch=batch), [Denoise(1.0)], 42, CPU, steps, **options)


def whole(parts: list[MicroBatch]) -> list[torch.Tensor]:
    """All tensors of a step, however it was cut."""
    draws = [draw for micro in parts for draw in micro.draws]
    each = [draws[k :: len(parts[0].draws)] for k in range(len(parts[0].draws))]
    return [
        torch.cat([micro.images_BCHW if micro.shown_BCHW is None else micro.shown_BCHW for micro in parts]).float(),
        torch.cat([micro.images_BCHW for micro in parts]).float(),
        *(torch.cat(tensors) for same in each for tensors in zip(*same, strict=True)),
    ]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "threads", "micro_batch"), [(1, 0, 8), (1, 4, 3), (1, 2, 5), (2, 1, 3), (3, 2, 2), (8, 1, 1)]
)
def test_a_step_is_the_same_however_it_is_shared(
    models: tuple[Backbone, Denoiser], processes: int, threads: int, micro_batch: int
) -> None:
    expected = feed(models, section())
    parts = [
        feed(models, section(micro_batch=micro_batch), process=i, processes=processes, threads=threads)
        for i in range(processes)
    ]
    for _, step in STEPS:
        cut = [list(part(step)) for part in parts]
        assert all(len(micro.images_BCHW) <= micro_batch for own in cut for micro in own)
        assert same(whole(list(expected(step))), whole([micro for own in cut for micro in own]))
    assert together(parts) == expected.shards.undecodable == {"1/00000.tar": {"0000000", "0000001"}}


def together(parts: list[Feed]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for part in parts:
        for shard, keys in part.shards.undecodable.items():
            found.setdefault(shard, set()).update(keys)
    return found


def test_threads_read_ahead_so_far_and_no_further(models: tuple[Backbone, Denoiser]) -> None:
    """Of micro-batches of two: the one that is given, and as many more as asked for; on a CPU none."""
    for ahead, expected in ((None, [range(2)]), (2, [range(2), range(2, 4), range(4, 6)])):
        batches = feed(models, section(micro_batch=2))
        batches.ahead = batches.ahead if ahead is None else ahead
        started: list[range] = []
        start = batches._start
        batches._start = lambda phase, step, samples: started.append(samples) or start(phase, step, samples)  # noqa: B023
        next(iter(batches(0)))
        assert started == expected


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="what a container makes small is Linux's")
def test_the_feed_needs_no_shared_memory_and_no_other_process(models: tuple[Backbone, Denoiser]) -> None:
    """A container's /dev/shm is 64 MB by default, and whoever waits for a process has to notice that it is gone."""
    before, children = set(Path("/dev/shm").iterdir()), psutil.Process().children()
    batches = feed(models, section(), threads=3)
    for _, step in STEPS:
        for _ in batches(step):
            assert set(Path("/dev/shm").iterdir()) <= before
            assert psutil.Process().children() == children


@pytest.mark.parametrize(("micro_batch", "processes", "left"), [(3, 1, 2), (8, 1, None), (8, 4, 2)])
def test_a_loss_without_enough_images_is_refused_before_the_first_step(
    models: tuple[Backbone, Denoiser], micro_batch: int, processes: int, left: int | None
) -> None:
    losses, shards = [InfoNCE(1.0, 0.1, negatives=2, view=0.8)], Shards(Path("data/mini/images"), 0.5, 2)
    said = rf"the smallest of these has {left}, but losses\.info_nce needs 3"
    with nullcontext() if left is None else pytest.raises(UserError, match=said):
        Feed(shards, *models, RULE, section(micro_batch=micro_batch), recipe(), losses, 42, CPU, STEPS,
             processes=processes)  # fmt: skip


def test_the_two_views_of_info_nce_are_drawn_apart(models: tuple[Backbone, Denoiser]) -> None:
    """Though they are crops of one kind."""
    own = section(micro_batch=4, crop={"scale": [0.5, 1.0], "ratio": [0.75, 1.25]})
    losses, shards = [InfoNCE(1.0, 0.1, negatives=1, view=0.5)], Shards(Path("data/mini/images"), 0.5)
    batches = Feed(shards, *models, RULE, own, recipe(), losses, 42, CPU, [("tower", 0)])
    pairs = [pair for micro in batches(0) for pair in zip(micro.images_BCHW, micro.view_BCHW, strict=True)]
    assert len(pairs) == 8
    assert not any(first.equal(second) for first, second in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [0, 3])
def test_the_feed_goes_on_at_any_step(models: tuple[Backbone, Denoiser], threads: int) -> None:
    """However far another one has come: a step's number is all that it needs."""
    expected = feed(models, section())
    given = [whole(list(expected(step))) for _, step in STEPS]
    for first in range(len(STEPS)):
        rest = feed(models, section(), STEPS[first:], threads=threads)
        for tensors, (_, step) in zip(given[first:], STEPS[first:], strict=True):
            assert same(tensors, whole(list(rest(step))))


@pytest.mark.parametrize("threads", [0, 3])
def test_a_damaged_shard_is_told_in_its_own_words(models: tuple[Backbone, Denoiser], threads: int) -> None:
    Path("data/mini/images/2/00000.tar").write_bytes(b"")
    batches = feed(models, section(), threads=threads)
    with pytest.raises(UserError, match=r"^data/mini/images/2/00000\.tar cannot be read"):
        [list(batches(step)) for _, step in STEPS]


def test_more_processes_than_images_are_refused(models: tuple[Backbone, Denoiser]) -> None:
    with pytest.raises(UserError, match="9 processes share a batch of 8 images"):
        feed(models, section(), process=0, processes=9)


@pytest.mark.slow
def test_validation_images_and_their_draws_never_change(models: tuple[Backbone, Denoiser]) -> None:
    (alone,), number = feed(models, section()).validation()
    assert number == len(alone.images_BCHW) == 2
    assert [len(draw.timestep_B) for draw in alone.draws] == [2]
    assert alone.draws[0].timestep_B.tolist() == [250, 750]
    parts = [feed(models, section(), process=i, processes=2).validation()[0] for i in range(2)]
    assert same(whole([alone]), whole([micro for part in parts for micro in part]))
    shares = [len(feed(models, section(), process=i, processes=4).validation()[0]) for i in range(4)]
    assert shares == [1, 0, 1, 0]  # two images for four processes; the first, which measures the speed, has one


# ----------------------------------------------------------------------------------------------------- the same numbers

RULES = [
    TokenRule("none"), TokenRule("all"), TokenRule("random", 7), TokenRule("random_fraction", 0.3),
    TokenRule("windows", 3),
]  # fmt: skip


def close(found: torch.Tensor, expected: torch.Tensor, relative: float) -> bool:
    return bool((found - expected).norm() <= relative * expected.norm())


def gradients(feedback: Feedback) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in feedback.named_parameters() if parameter.grad is not None}


def parts(
    backbone: Backbone, denoiser: Denoiser, projection: torch.nn.Linear, text: torch.Tensor, rule: TokenRule
) -> Feedback:
    pixels = assemble.pixel_rule(backbone, section())
    return Feedback(backbone.tower, projection, denoiser, text, rule, "mean", pixels)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_the_engine_s_gradient_is_that_of_the_released_schedule(
    models: tuple[Backbone, Denoiser], rule: TokenRule
) -> None:
    """Real tower, UNet and data path, in float32; the reference has its frozen parts as they come from disk."""
    backbone, frozen = models
    p, wanted = section(), recipe(steps=1, warmup=None, clip_norm=1e9, draw_weights=[5.0, 1.0])
    projection = torch.nn.Linear(backbone.width, frozen.unet.config.cross_attention_dim)
    text = torch.randn(1, 9, projection.out_features)
    found, expected = {}, {}
    for denoiser, gradient in ((Denoiser.load(DATA / "denoiser"), expected), (frozen, found)):
        feedback = parts(backbone, denoiser, projection, text, rule)
        shards = Shards(Path("data/mini/images"), 0.5)
        batches = Feed(shards, backbone, denoiser, rule, p, wanted, [Denoise(1.0)], 42, CPU, [("tower", 0)])
        (phase,) = assemble.phases(feedback, wanted, [Denoise(1.0)])
        if gradient is found:
            ((record, _),) = step_.run(feedback, phase, batches, torch.float32, Accelerator(cpu=True))
        else:
            loss = bench.published_gradient(feedback, batches(0), wanted.batch, wanted.draw_weights, torch.float32)
        gradient |= {name: tensor.clone() for name, tensor in gradients(feedback).items()}
        feedback.zero_grad()
    assert record.loss == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    assert all(tensor.any() for tensor in expected.values())
    for name, tensor in expected.items():
        assert close(found[name], tensor, 1e-5), name


@pytest.mark.exhaustive
def test_compiled_feedback_has_the_same_losses_and_gradients(
    models: tuple[Backbone, Denoiser], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # its cache mixes kernels of other instruction sets
    found = []
    for compiled in (False, True):
        backbone, denoiser = Backbone.load(MODELS / "pretrained/mini"), Denoiser.load(DATA / "denoiser")
        p, own = section(compile=compiled, micro_batch=4), params.load().backbones["mini"].condition
        shards = Shards(Path("data/mini/images"), 0.5)
        t = assemble.Training(p, recipe(batch=4), own, [Denoise(1.0)], 42, backbone, denoiser, shards)
        feedback = assemble.build_feedback(t, CPU)
        (micro,) = feed((backbone, denoiser), p, batch=4)(0)
        feedback.tower.requires_grad_(True)
        losses = terms(feedback, [Denoise(1.0)], micro, torch.float32)["denoise"]
        (losses * torch.tensor([5.0, 1.0])).sum().backward()
        found.append((losses.detach(), gradients(feedback)))
    (losses, plain), (others, compiled_gradients) = found
    assert not torch.equal(losses, others) or any(not torch.equal(plain[n], compiled_gradients[n]) for n in plain)
    assert close(others, losses, 1e-5)
    assert all(close(compiled_gradients[name], tensor, 1e-4) for name, tensor in plain.items())


@pytest.mark.slow
def test_in_bfloat16_the_frozen_parts_are_bfloat16_and_the_trained_are_not(models: tuple[Backbone, Denoiser]) -> None:
    backbone, exact = models
    rough = Denoiser.load(DATA / "denoiser").for_feedback(torch.bfloat16)
    assert {tensor.dtype for tensor in rough.parameters()} == {torch.bfloat16}
    assert rough.alphas_cumprod.dtype == torch.float32
    projection = torch.nn.Linear(backbone.width, exact.unet.config.cross_attention_dim)
    text, losses = torch.randn(1, 9, projection.out_features), []
    for denoiser, precision in ((exact, torch.float32), (rough, torch.bfloat16)):
        feedback = parts(backbone, denoiser, projection, text, RULE).requires_grad_(False)
        feedback.tower.requires_grad_(True)
        (micro, *_) = feed((backbone, denoiser), section())(0)
        losses.append(terms(feedback, [Denoise(1.0)], micro, precision)["denoise"])
        losses[-1].sum().backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in feedback.tower.parameters())
    assert close(losses[1], losses[0], 1e-2)
    assert not torch.equal(losses[0], losses[1])


# --------------------------------------------------------------------------------------------------- several processes


def outputs(folder: Path) -> dict[str, bytes]:
    """The bytes of what the stage makes."""
    roots = folder / MODELS / "diva", folder / METRICS / "train/mini-diva"
    files = [path for root in roots for path in root.rglob("*") if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def curves(folder: Path) -> dict[str, list[float]]:
    plots = folder / METRICS / "train/mini-diva/plots/metrics"
    return {
        f"{phase}/{curve}": pd.read_csv(plots / phase / f"{curve}.tsv", sep="\t")[curve].tolist()
        for phase in ("projection", "tower")
        for curve in CURVES
    }


# ----------------------------------------------------------------------------------------------------- kills and resume

LONGER = {
    "profiles.mini.recipes.diva.steps": 25,
    "profiles.mini.recipes.diva.warmup.steps": 10,
    "launch.checkpoint_minutes": 0.0,
    "profiles.mini.recipes.diva.optimizer.lr": 0.05,
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [1, 2])
def test_kills_change_no_bit(here: Path, tmp_path: Path, world: int) -> None:
    """Ten of them, each somewhere in the steps after a run's first, second or third checkpoint."""
    write_params(**LONGER)
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(here, undisturbed)
    launch.finish(undisturbed, world)
    expected, draws, checkpoint = outputs(undisturbed), random.Random(world), here / MODELS / "diva/.mini.checkpoint"
    assert len(expected) > 10

    for _ in range(10):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        processes, seen, wanted = launch.start(here, world), {before}, draws.randint(1, 3)
        while len(seen) <= wanted and processes[0].exitcode is None:
            with suppress(FileNotFoundError):
                seen.add(checkpoint.stat().st_mtime_ns)
            time.sleep(0.002)
        draws.choice(processes).kill()  # the other one misses it, and ends
        launch.join(processes)
        assert ("going on after step" in (here / "output0").read_text()) == (before is not None)
        if processes[0].exitcode == 0:  # it was faster than the kill
            assert outputs(here) == expected
            for folder in (MODELS / "diva", METRICS / "train"):
                shutil.rmtree(here / folder)
    launch.finish(here, world)
    assert outputs(here) == expected
    assert sorted(path.name for path in (here / MODELS / "diva").iterdir()) == [".mini.lock", "mini"]


class KilledError(Exception):
    """Stands for a kill, in the process of the test."""


@contextmanager
def killed_after(saves: int) -> Iterator[None]:
    """Let the stage die just after it has written so many checkpoints."""
    save, left = scratch.save, [saves]

    def save_and_die(*arguments) -> None:
        save(*arguments)
        left[0] -= 1
        if not left[0]:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "save", save_and_die)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("saves", [1, 3, 5, 7])
def test_a_run_goes_on_from_its_checkpoint(
    finished: Path, here: Path, capsys: pytest.CaptureFixture[str], saves: int
) -> None:  # fmt: skip
    """After a step of either phase, the last ones too: to the same bytes as one without checkpoints."""
    write_params(**{"launch.checkpoint_minutes": 0.0})
    with pytest.raises(KilledError), killed_after(saves):
        run(train, "mini", "diva")
    assert outputs(here) == {}
    capsys.readouterr()
    run(train, "mini", "diva")
    phase, step = ("projection", saves - 1) if saves <= 3 else ("tower", saves - 4)
    assert f"going on after step {step} of phase '{phase}'" in capsys.readouterr().out
    expected = outputs(finished)
    notes = f"{MODELS}/diva/mini/diva.json"
    made = outputs(here)
    assert json.loads(made.pop(notes))["result"] == json.loads(expected.pop(notes))["result"]
    assert made == expected


def change_the_rate() -> None:
    write_params(**{"launch.checkpoint_minutes": 0.0, "profiles.mini.recipes.diva.optimizer.lr": 0.25})


def change_the_seed() -> None:
    content = read_yaml(Path("params.yaml"))
    write_yaml(Path("params.yaml"), content | {"seed": 3})


def change_the_backbone() -> None:
    path = MODELS / "pretrained/mini/open_clip_model.safetensors"
    tensors = load_file(path)
    tensors["visual.proj"] += 1e-3
    scratch.save(path, tensors, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_the_rate, "recipe.optimizer.lr (0.5, now 0.25)"),
        (change_the_seed, "seed (42, now 3)"),
        (change_the_backbone, "backbone"),
    ],
)
def test_another_recipe_never_goes_on_from_a_checkpoint(
    here: Path, capsys: pytest.CaptureFixture[str], change, named: str
) -> None:  # fmt: skip
    write_params(**{"launch.checkpoint_minutes": 0.0})
    with pytest.raises(KilledError), killed_after(5):
        run(train, "mini", "diva")
    change()
    capsys.readouterr()
    run(train, "mini", "diva")
    printed = capsys.readouterr().out
    assert f"mini.checkpoint is of another run, which differs in {named}: training starts anew" in printed
    assert "going on" not in printed
    made = outputs(here)
    shutil.rmtree(MODELS / "diva")
    run(train, "mini", "diva")
    assert outputs(here) == made


@pytest.mark.parametrize("what", ["denoiser", "images", "start", "encoder"])
def test_a_checkpoint_is_of_the_files_that_a_run_reads(here: Path, what: str) -> None:
    files = {
        "denoiser": DATA / "denoiser/scheduler/scheduler_config.json",
        "images": Path("data/mini/images/shards.json"),
        "start": Path("start"),
        "encoder": Path("encoder/config.json"),
    }
    files["encoder"].parent.mkdir()
    for empty in ("start", "encoder"):
        files[empty].touch()
    p, backbone = params.load(), Backbone.load(MODELS / "pretrained/mini")

    def mark() -> dict:
        own, recipe = p.backbones["mini"].condition, p.profile.recipes["diva"]
        t = assemble.Training(
            p.profile.train, recipe, own, [], 42, backbone, Denoiser.load(DATA / "denoiser"), None, files["start"],
            lambda images: images.flatten(1),
        )  # fmt: skip
        return assemble.fingerprint(t, DATA / "denoiser", files["images"].parent, files["encoder"].parent)

    before = mark()
    files[what].write_text(files[what].read_text() + "\n")
    assert scratch.changes(before, mark()) == [what]


def test_a_checkpoint_tells_what_all_processes_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the first of two: what the other would send is added here."""
    monkeypatch.setattr(resume, "gather_object", lambda own: [*own, ("0.tar", {"b"}), ("1.tar", {"a"})])
    feedback, checkpoint = build(), resume.Checkpoint(tmp_path / "checkpoint", {}, 0.0, Accelerator(cpu=True))
    record = step_.Record("projection", 0, 1.0, {"denoise": 1.0}, 0.1, 1.0, 1.0, 1.0, None)
    checkpoint.save(feedback, both(feedback)[0], resume.RunState([record], {"0.tar": {"a"}}))
    found = checkpoint.resume(feedback)
    assert found is not None
    assert found.undecodable == {"0.tar": {"a", "b"}, "1.tar": {"a"}}


def test_a_scratch_file_is_of_one_fingerprint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def scratched(rate: float, minutes: float = 0, path: Path | None = tmp_path / "checkpoint") -> scratch.Scratch:
        return scratch.Scratch(path, {"of": {"rate": rate}}, minutes, Accelerator(cpu=True))

    scratched(0.5).write({"a": torch.ones(1)}, steps=3)
    assert scratched(0.5).state() == {"fingerprint": {"of": {"rate": 0.5}}, "steps": 3}
    assert capsys.readouterr().out == ""
    assert scratched(0.25).state() is None
    said = f"{tmp_path}/checkpoint is of another run, which differs in of.rate (0.5, now 0.25): training starts anew"
    assert capsys.readouterr().out.strip() == said
    assert scratched(0.5).due()
    assert not scratched(0.5, minutes=60).due()
    scratched(0.5, path=None).write({}, steps=3)
    assert scratched(0.5, path=None).state() is None


@contextmanager
def full_disk(size: int = 1000) -> Iterator[None]:
    """No file grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / ".x.checkpoint"
    scratch.save(path, {"a": torch.arange(3.0)}, {"step": 1})
    with pytest.raises((OSError, SafetensorError)), full_disk():
        scratch.save(path, {"a": torch.zeros(5000)}, {"step": 2})
    assert scratch.read_state(path) == {"step": 1}
    assert load_file(path)["a"].tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [".x.checkpoint"]


@pytest.mark.slow
def test_a_full_disk_costs_the_checkpoint_not_the_run(
    finished: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    write_params(**{"launch.checkpoint_minutes": 0.0})
    save = scratch.save

    def save_on_a_full_disk(*arguments) -> None:
        with full_disk():
            save(*arguments)

    monkeypatch.setattr(scratch, "save", save_on_a_full_disk)
    run(train, "mini", "diva")
    assert capsys.readouterr().err.count("warning: no checkpoint written to models/mini/diva/.mini.checkpoint") == 7
    weights = f"{MODELS}/diva/mini/open_clip_model.safetensors"
    assert outputs(here)[weights] == outputs(finished)[weights]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_what_is_no_checkpoint_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "checkpoint"
    if content is not None:
        path.write_bytes(content)
    assert scratch.read_state(path) is None


# ------------------------------------------------------------------------------------------------------------ to watch


@pytest.mark.slow
def test_norms_and_the_validation_loss_are_recorded(here: Path) -> None:
    """Of seven steps; every second step and the last of each phase measure the validation images."""
    backbone, _, records = trained()
    measured = [(record.phase, record.step) for record in records if record.validation_loss is not None]
    assert measured == [("projection", 0), ("projection", 2), ("tower", 0), ("tower", 2), ("tower", 3)]
    first, *_, last = [record for record in records if record.phase == "tower"]
    assert first.lr == first.update_norm == 0  # the warm-up's
    assert last.update_norm > 0
    moved = next(record for record in records if record.phase == "projection")
    assert 0 < moved.update_norm < moved.parameter_norm
    assert dataclasses.asdict(first).keys() == {"phase", "step", "terms", *CURVES}
    squares = sum(parameter.square().sum().item() for parameter in backbone.tower.parameters())
    assert squares**0.5 < last.parameter_norm < squares**0.5 + 10  # the projection's part is small


def test_the_ends_of_a_curve_are_tenths_of_it(here: Path) -> None:
    def record(phase: str, step: int) -> step_.Record:
        measured = None if step % 10 else float(step)
        return step_.Record(phase, step, float(step), {"denoise": 2.0 * step}, 0.0, 0.0, 0.0, 0.0, measured)

    records = [*(record("projection", step) for step in range(5)), *(record("tower", step) for step in range(31))]
    found = ends(records)
    assert (found["loss_first_tenth"], found["loss_last_tenth"]) == (1, 29)  # of 0 1 2 and of 28 29 30
    assert found["terms_last_tenth"] == {"denoise": 58}
    assert (found["validation_loss_first"], found["validation_loss_last"]) == (0, 30)


# ---------------------------------------------------------------------------------------------------------- to measure


@pytest.mark.exhaustive
def test_the_bench_times_both_schedules_and_the_loader(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(bench, "mini", "--rounds", "2")
    (written,) = Path("metrics/bench").glob("*.json")
    figures = json.loads(written.read_text())["subjects"]["mini"]
    speed, flops = figures["images_per_second"], figures["gflop_per_image"]
    assert figures["ratio"]["min"] <= figures["ratio"]["median"] <= figures["ratio"]["max"]
    assert 0 < flops["engine"] < flops["published"]  # the tower runs once, not twice
    assert 0 < figures["utilisation"]["engine"] < 1
    assert f"| mini | float32 | 2 | {speed['engine']:g} |" in capsys.readouterr().out
    write_params(**{"profiles.paper.recipes.diva.batch": 80})
    run(bench, "loader", "--images", "80")
    (written,) = Path("metrics/bench").glob("loader-*.json")
    figures = json.loads(written.read_text())
    assert figures["threads_1"]["images"] == 160
    assert not bench.SCRATCH.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("subjects", [("loader", "mini"), ("mllm", "mini"), ("elsewhere",)], ids=" ".join)
def test_the_bench_says_what_can_be_measured_together(
    subjects: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(bench, *subjects)
    said = "wanted one of loader, growth, scoring, or some of mllm, segmentation or some of block, mini, openai_224, "
    assert f"found {' '.join(subjects)}, {said}" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_the_bench_measures_growth(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images made up: 400 to 4,000, ten in a shard."""
    monkeypatch.setattr(growth, "MILLIONS", (0.0004, 0.001, 0.004))
    write_params(**{"profiles.paper.recipes.diva.batch": 8})
    run(bench, "growth", "--images", "10")
    (written,) = Path("metrics/bench").glob("growth-*.json")
    figures = json.loads(written.read_text())
    for millions in growth.MILLIONS:
        of = figures[f"{millions}_million"]
        assert 0 <= of["index_seconds"] <= of["seconds_to_start"]
        assert of["seconds_to_resume"] > 0
    assert figures["by_the_line"].keys() == {"index_mb", "index_seconds"}
    assert not bench.SCRATCH.exists()
