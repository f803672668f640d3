"""What the denoiser can tell apart: known answers, the figure's cells, and the command on a shrunken world."""

import itertools
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from shrunk import DATA, METRICS, MODELS, run, write_params
from test_recipes import SMALL

from pipeline.benchmarks.pairs import read_mmvp_vlm
from pipeline.core.compute import generator
from pipeline.diva import diffusion
from pipeline.mini import world
from pipeline.models.backbones import Backbone
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import params
from pipeline.tools import oracle, sensitivity


class Told:
    """Predicts what is wanted plus the first number of the condition."""

    alphas_cumprod = torch.linspace(0.99, 0.01, 100)

    def __init__(self, latent: torch.Tensor, noise: torch.Tensor, prediction_type: str) -> None:
        self.latent, self.noise, self.prediction_type = latent, noise, prediction_type

    def __call__(self, noised: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        assert noised.equal(diffusion.add_noise(self.latent, self.noise, timestep, self.alphas_cumprod))
        wanted = diffusion.target(self.latent, self.noise, timestep, self.alphas_cumprod, self.prediction_type)
        return wanted + condition[:, 0, 0, None, None, None]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_wrong_minus_right_of_a_denoiser_whose_error_is_its_condition(prediction_type: str) -> None:
    latent, noise = torch.randn(2, 4, 3, 2, 2, generator=generator("test", "latent"))
    condition = torch.tensor([1.0, 2.0, 3.0, 0.5])[:, None, None].expand(-1, 2, 5)
    found = sensitivity.wrong_minus_right(Told(latent, noise, prediction_type), latent, noise, 30, condition)
    torch.testing.assert_close(found, torch.tensor([3.0, -3.0, -8.75, 8.75]))  # squares: 4 - 1, 1 - 4, 1/4 - 9, 9 - 1/4


@pytest.mark.parametrize("ways", [("captions", "image_embeddings"), sensitivity.WAYS])
def test_every_cell_of_the_figure_shows_its_own_value(ways: tuple[str, ...]) -> None:
    """pandas' unstack(sort=False) once put values into other timesteps' columns."""
    patterns, timesteps = ["b", "a", "c"], [50, 150, 250, 350]
    keys = list(itertools.product(ways, patterns, timesteps))
    index = pd.MultiIndex.from_tuples(keys, names=["condition", "pattern", "timestep"])
    table = pd.DataFrame({"right_is_better": [float(i) for i in range(len(keys))]}, index=index)
    figure = sensitivity.figure(table)
    assert isinstance(figure, Figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == patterns  # which both panels share
    for axis, way in zip(figure.axes, ways, strict=False):
        shown = {(int(y), int(x)): text.get_text() for text in axis.texts for x, y in [text.get_position()]}
        assert shown == {
            (row, column): f"{table.loc[(way, pattern, timestep)].item():.0f}"
            for row, pattern in enumerate(patterns)
            for column, timestep in enumerate(timesteps)
        }


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_command_measures_every_pattern_and_timestep_and_repeats_itself(capsys: pytest.CaptureFixture[str]) -> None:
    files = [METRICS / "sensitivity" / f"mini-diva.{kind}" for kind in ("csv", "png")]
    run(sensitivity, "mini", "diva")
    first = [file.read_bytes() for file in files]
    table = pd.read_csv(files[0])
    timesteps = [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
    wanted = itertools.product(("captions", "image_embeddings"), world.PATTERNS, timesteps)
    assert set(table[["condition", "pattern", "timestep"]].itertuples(index=False, name=None)) == set(wanted)
    assert set(table.images) == {4}  # two pairs
    assert table.right_is_better.isin([0, 25, 50, 75, 100]).all()
    assert table.groupby("condition").wrong_minus_right.apply(lambda values: (values != 0).any()).all()
    printed = capsys.readouterr().out
    assert "Camera Perspective" in printed
    assert "`python -m pipeline.tools.oracle mini`" in printed
    run(oracle, "mini")
    run(sensitivity, "mini", "diva")
    assert [file.read_bytes() for file in files] == first
    patterns = json.loads((METRICS / "oracle/mini.json").read_text())["patterns"]
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{pattern} .* {value:.1f}$", printed, re.MULTILINE) for pattern, value in patterns.items())


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_projection_warmed_up_on_captions_is_measured_on_the_text_tower_too() -> None:
    small = {"batch": 4, **SMALL["text_anchored"]}
    write_params(
        **{f"profiles.mini.recipes.text_anchored.{key}": value for key, value in small.items()},
        **{"run.recipes": ["text_anchored"]},
    )
    p, cpu = params.load(), torch.device("cpu")
    backbone, denoiser = Backbone.load(MODELS / "pretrained/mini"), Denoiser.load(DATA / "denoiser")
    questions = read_mmvp_vlm(Path("data/mini/mmvp"), p.profile.mmvp_vlm.pairs_per_pattern)
    table = sensitivity.measure(backbone, denoiser, questions, p, "mini", "text_anchored", cpu).sort_index()
    assert set(table.index.unique("condition")) == {*sensitivity.WAYS}
    for pattern in world.PATTERNS:
        found = [table.loc[(way, pattern)].wrong_minus_right.tolist() for way in sensitivity.WAYS]
        assert found[0] != found[1] != found[2]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_losses_of_the_tower_phase_need_nothing_here(capsys: pytest.CaptureFixture[str]) -> None:
    """One that reads a frozen image encoder, beside the one that conditions the denoiser."""
    losses = {"denoise": {"weight": 1.0}, "kernel": {"weight": 1.0, "degree": 1, "offset": 0.0}}
    write_params(**{"profiles.mini.recipes.diva.losses": losses})
    run(sensitivity, "mini", "diva")
    printed = capsys.readouterr().out
    assert "Camera Perspective" in printed
    assert "oracle: pairs right" not in printed  # no such column without a bound


@pytest.mark.usefixtures("here")
def test_a_loss_that_is_wrong_is_named_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    write_params(**{"profiles.mini.recipes.diva.losses": {"denoise": {"weight": "much"}}})
    with pytest.raises(SystemExit):
        run(sensitivity, "mini", "diva")
    assert "profiles.mini.recipes.diva.losses.denoise.weight" in capsys.readouterr().err


def test_without_a_denoiser_it_says_what_to_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / DATA / "denoiser/unet").rename(here / "elsewhere")
    with pytest.raises(SystemExit):
        run(sensitivity, "mini", "diva")
    assert "no folder unet/" in capsys.readouterr().err
    assert not list((METRICS / "sensitivity").glob("mini*"))


@pytest.mark.usefixtures("here")
def test_a_backbone_that_is_not_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(sensitivity, "openai_224", "diva")
    assert "run.backbones does not name 'openai_224'. Choose one of these: mini." in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["kernel", "captions", "reranked"])
@pytest.mark.usefixtures("here")
def test_a_recipe_without_a_condition_is_refused(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(sensitivity, "mini", recipe)
    assert f"recipe '{recipe}' has no loss that conditions the denoiser on images" in capsys.readouterr().err
