"""The control whose tower is shown other images: it differs from the run it is compared with in nothing else."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from shrunk import METRICS, MODELS, run, write_params
from test_engine import KilledError, feed, killed_after, models, recipe, section, whole  # noqa: F401
from test_recipes import SMALL, shrink
from test_stages import CPU

from pipeline import shuffled, train
from pipeline.core.compute import generator
from pipeline.data.shards import Shards
from pipeline.diva.losses import InfoNCE
from pipeline.diva.rules import TokenRule
from pipeline.engine import feed as feed_
from pipeline.engine.assemble import START
from pipeline.engine.feed import Feed
from pipeline.models.backbones import Backbone, stored_tensors
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import params


def small(name: str) -> None:
    if name != "diva":  # it is small as it is
        shrink(name)


def losses(weights: str) -> dict[str, list[float]]:
    curves = Path(METRICS, f"train/mini-{weights}/plots/metrics")
    return {path.parent.name: pd.read_csv(path, sep="\t").loss.tolist() for path in curves.glob("*/loss.tsv")}


def in_place(count: int, draws: torch.Generator) -> list[int]:
    return list(range(count))


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["diva", *SMALL])
def test_with_its_own_images_the_control_is_the_run_it_is_compared_with(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same projection and denoiser to start from, the images, draws and rates: the mismatch is all there is."""
    small(name)
    run(train, "mini", name)
    run(shuffled, "mini", name)
    made = [json.loads((MODELS / weights / "mini/diva.json").read_text()) for weights in (name, f"{name}-shuffled")]
    assert made[0]["recipe"] == made[1]["recipe"]
    if name == "two_stage":  # its warm-up trains the denoiser, too
        with safe_open(MODELS / name / "mini" / START, "pt") as file:
            start = set(file.keys())
        assert {"projection.weight", "projection.bias"} < start
        assert any(key.startswith("denoiser.unet.") for key in start)
    (tower,) = losses(f"{name}-shuffled").values()
    warmup = params.load().profile.recipes[name].warmup
    assert losses(name).keys() == {"tower"} | ({"projection"} if warmup else set())
    assert tower != losses(name)["tower"]
    tuned = stored_tensors(MODELS / name / "mini")
    assert any(not tensor.equal(tuned[key]) for key, tensor in stored_tensors(MODELS / f"{name}-shuffled/mini").items())

    monkeypatch.setattr(feed_, "derangement", in_place)
    run(shuffled, "mini", name)
    assert losses(f"{name}-shuffled") == {"tower": losses(name)["tower"]}
    assert all(tensor.equal(tuned[key]) for key, tensor in stored_tensors(MODELS / f"{name}-shuffled/mini").items())


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_recipe_without_a_warm_up_starts_from_its_fresh_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on profile paper, where nothing is trained before the tower."""
    write_params(**{"profiles.mini.recipes.diva.warmup": None})
    run(train, "mini", "diva")
    monkeypatch.setattr(feed_, "derangement", in_place)
    run(shuffled, "mini", "diva")
    assert losses("diva-shuffled") == losses("diva")


@pytest.mark.slow
def test_a_killed_control_goes_on_to_the_same_weights(finished: Path, here: Path) -> None:
    """Of a killed training, tests/test_engine.py sees that the control is given the same start."""
    write_params(**{"launch.checkpoint_minutes": 0.0})
    shutil.copytree(finished / MODELS / "diva", MODELS / "diva")
    with pytest.raises(KilledError), killed_after(2):
        run(shuffled, "mini", "diva")
    run(shuffled, "mini", "diva")
    weights = MODELS / "diva-shuffled/mini/open_clip_model.safetensors"
    assert weights.read_bytes() == (finished / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_control_without_its_run_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        run(shuffled, "mini", "diva")
    assert "models/mini/diva/mini/start.safetensors does not exist" in capsys.readouterr().err


STEPS = [("tower", step) for step in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [3, 12])
def test_the_tower_is_shown_another_image_of_the_whole_step(
    models: tuple[Backbone, Denoiser],  # noqa: F811
    micro_batch: int,
) -> None:
    """Each once, in another place, and otherwise than in the step before; what is restored stays the same."""
    expected = feed(models, section(), STEPS, batch=12)
    found = feed(models, section(micro_batch=micro_batch), STEPS, batch=12, mismatched=True)
    orders = [feed_.derangement(12, generator(42, "mismatched", step)) for _, step in STEPS]
    for (_, step), order in zip(STEPS, orders, strict=True):
        (shown, *rest), (other, *others) = whole(list(expected(step))), whole(list(found(step)))
        assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
        assert torch.equal(other, shown[order])
        assert any(i // 3 != j // 3 for i, j in enumerate(order))  # of other micro-batches, too
    assert len({tuple(order) for order in orders}) == 4
    (shown,), (other,) = (whole(fed.validation()[0])[:1] for fed in (expected, found))
    assert torch.equal(shown, other)


def test_every_derangement_is_as_likely() -> None:
    drawn = [tuple(feed_.derangement(4, generator("test", i))) for i in range(900)]
    counts = {order: drawn.count(order) for order in set(drawn)}
    assert len(counts) == 9
    assert all(70 < count < 130 for count in counts.values())


@pytest.mark.slow
def test_a_view_is_of_the_image_that_is_shown(models: tuple[Backbone, Denoiser]) -> None:  # noqa: F811
    """Of InfoNCE: both crops that the tower is given are of one image."""
    losses = [InfoNCE(1.0, temperature=0.1, negatives=1, view=0.5)]
    shards, p = Shards(Path("data/mini/images"), 0.5), section(micro_batch=4)
    own, other = (
        list(
            Feed(
                shards, *models, TokenRule("none"), p, recipe(), losses, 42, CPU, STEPS[:1], mismatched=mismatched
            )(0)
        )
        for mismatched in (False, True)
    )  # fmt: skip
    order = feed_.derangement(8, generator(42, "mismatched", 0))
    images_BCHW, view_BCHW = (torch.cat([getattr(m, x) for m in own]) for x in ("images_BCHW", "view_BCHW"))
    assert torch.equal(torch.cat([micro.images_BCHW for micro in other]), images_BCHW)
    assert torch.equal(torch.cat([micro.shown_BCHW for micro in other]), images_BCHW[order])
    assert torch.equal(torch.cat([micro.view_BCHW for micro in other]), view_BCHW[order])
