"""Can feedback carry it? How much worse a picture is restored when the denoiser is told of its pair's other picture.

    python -m pipeline.tools.sensitivity mini diva       after `dvc repro`

Writes metrics/<profile>/sensitivity/<backbone>-<recipe>.{csv,png}. The two pictures of a pair differ in one detail.
Where the denoiser does not restore a picture better when told the right one than when told the other, nothing about
this detail can be fed back at that timestep. Told in two ways, or three:

    caption     the pair's statements through the denoiser's own text encoder: what it can tell at all
    text        the statements through the backbone's text tower and the visual projection, where the recipe fits that
                on captions: what it could be told in the text tower's words, if the image tower showed all
    image       the pictures through the image tower and the projection, fitted as the recipe says (where it says
                nothing it is the random one that the published recipe starts from): what it is told before training

The table has, by way, pattern and timestep, the mean of wrong minus right loss and the share of pictures (%) restored
better when told right, with one noise each, the same for both; 50 % is chance.

Of a backbone that was made here the ceiling is printed beside: the pairs that its frozen text tower would get right
with an image tower taught every detail. Where this is low, feedback that arrives is not read. For a published backbone
no captions of every detail exist, and the ceiling is unknown.

It looks at the benchmark's pairs, so it must not choose a recipe that is then judged by them.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from pipeline.benchmarks.pairs import Question, read_mmvp_vlm
from pipeline.core import params
from pipeline.core.compute import device, generator
from pipeline.core.outputs import whole
from pipeline.core.params import Train
from pipeline.core.stages import UserError, progress, stage
from pipeline.data.shards import Shards
from pipeline.diva import diffusion, step
from pipeline.diva.condition import draw_positions
from pipeline.diva.feedback import Feedback
from pipeline.engine.assemble import build_feedback, losses_of, phases
from pipeline.engine.feed import Feed
from pipeline.mmvp import PROMPT
from pipeline.models.backbones import Backbone
from pipeline.models.stable_diffusion import Denoiser

TIMESTEPS = 10  # the middles of as many equal parts of the denoiser's range


@torch.no_grad()
def losses(
    denoiser, latent_BChw: torch.Tensor, noise_BChw: torch.Tensor, timestep: int, condition_BTD: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of each picture, [B]."""
    timestep_B = torch.full((len(latent_BChw),), timestep, device=latent_BChw.device)
    alphas = denoiser.alphas_cumprod
    predicted = denoiser(diffusion.add_noise(latent_BChw, noise_BChw, timestep_B, alphas), timestep_B, condition_BTD)
    wanted = diffusion.target(latent_BChw, noise_BChw, timestep_B, alphas, denoiser.prediction_type)
    return (predicted.float() - wanted).square().flatten(1).mean(1)


def wrong_minus_right(
    denoiser, latent_BChw: torch.Tensor, noise_BChw: torch.Tensor, timestep: int, condition_BTD: torch.Tensor
) -> torch.Tensor:
    """[B], of whole pairs: pictures 2n and 2n + 1 are each other's wrong ones."""
    other_BTD = condition_BTD.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return losses(denoiser, latent_BChw, noise_BChw, timestep, other_BTD) - losses(
        denoiser, latent_BChw, noise_BChw, timestep, condition_BTD
    )


def fitted(
    backbone: Backbone, denoiser: Denoiser, p: params.Params, name: str, recipe_name: str, compute: torch.device
) -> Feedback:
    """The feedback with its projection fitted, as the first phase of stage train does."""
    section, recipe, folder = p.profile.train, p.profile.recipes[recipe_name], Path("data", p.run.profile, "images")
    shards = Shards(folder, section.max_undecodable, section.validation.images, recipe.reads_captions)
    own, losses = p.backbones[name].condition, losses_of(recipe_name, recipe)
    feedback = build_feedback(backbone, denoiser, own, section, recipe, losses, p.seed, shards, compute)
    precision, processes = getattr(torch, section.precision), Accelerator(cpu=compute.type == "cpu")
    for phase in phases(feedback, recipe, losses)[:-1]:
        steps = [(phase.name, number) for number in range(phase.steps)]
        feed = Feed(shards, backbone, denoiser, feedback.tokens, section, recipe, losses, p.seed, compute, steps)
        for _ in progress(step.run(feedback, phase, feed, precision, processes), phase.name, phase.steps):
            pass
    return feedback.requires_grad_(False)


@torch.no_grad()
def seen(
    feedback: Feedback,
    backbone: Backbone,
    denoiser: Denoiser,
    questions: list[Question],
    p: Train,
    compute: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(latent, condition through the projection) of whole pictures, at the size and with the statistics of training."""
    square = [question.image().resize((p.size, p.size), Image.Resampling.BICUBIC) for question in questions]
    images_BCHW = torch.stack([pil_to_tensor(image) for image in square]).to(compute)
    latent_BChw = denoiser.latent(feedback.pixels.generator(images_BCHW))
    shown = feedback.pixels.tower(images_BCHW)
    draws = [generator("sensitivity", "positions", question.id) for question in questions]
    positions_BK = draw_positions(feedback.tokens, backbone.patches, draws)
    return latent_BChw, feedback.condition(*backbone.image_tokens(shown), positions_BK)


def measure(
    backbone: Backbone,
    denoiser: Denoiser,
    questions: list[Question],
    p: params.Params,
    name: str,
    recipe_name: str,
    compute: torch.device,
) -> pd.DataFrame:
    """One row a way of telling, pattern and timestep: wrong_minus_right, told_right_is_better (%), pictures."""
    denoiser.to(compute)
    captions = [
        denoiser.text([PROMPT + question.statement]).cpu() for question in questions
    ]  # before training drops it
    feedback = fitted(backbone, denoiser, p, name, recipe_name, compute)
    on_captions = p.profile.recipes[recipe_name].warms_up_on_captions
    steps, size = len(denoiser.alphas_cumprod), 2 * max(1, p.profile.mmvp.batch // 2)
    timesteps = [(2 * i + 1) * steps // (2 * TIMESTEPS) for i in range(TIMESTEPS)]
    rows = []
    for first in progress(range(0, len(questions), size), "pairs"):
        asked = questions[first : first + size]
        with step.autocast(compute, getattr(torch, p.profile.train.precision)):
            latent, projected = seen(feedback, backbone, denoiser, asked, p.profile.train, compute)
            told = {"caption": torch.cat(captions[first : first + size]).to(compute), "image": projected}
            if on_captions:
                statements = backbone.embed([PROMPT + question.statement for question in asked])
                told["text"] = feedback.condition_on_text(statements)
            for timestep in timesteps:
                draws = [generator("sensitivity", "noise", timestep, question.id) for question in asked]
                noise = torch.stack([torch.randn(latent.shape[1:], generator=g) for g in draws]).to(compute)
                for way, condition in told.items():
                    found = wrong_minus_right(denoiser, latent, noise, timestep, condition)
                    for question, value in zip(asked, found.tolist(), strict=True):
                        rows.append((way, question.type, timestep, value))
    table = pd.DataFrame(rows, columns=["told", "pattern", "timestep", "wrong_minus_right"])
    table["told_right_is_better"] = 100.0 * (table.wrong_minus_right > 0)
    groups = table.groupby(["told", "pattern", "timestep"], sort=False)
    return groups.agg({"wrong_minus_right": "mean", "told_right_is_better": "mean"}).assign(pictures=groups.size())


def figure(table: pd.DataFrame) -> Figure:
    """The share of pictures restored better when told right: patterns by timesteps, a panel for each way of telling."""
    ways = [way for way in ("caption", "text", "image") if way in table.index.unique("told")]
    drawn = Figure(figsize=(6 * len(ways), 4.6), layout="constrained")
    for axis, way in zip(drawn.subplots(1, len(ways), sharey=True), ways, strict=True):
        shares = table.loc[way].told_right_is_better.unstack().reindex(table.index.unique("pattern"))
        image = axis.imshow(shares, cmap="RdBu", vmin=0, vmax=100, aspect="auto")
        axis.set_xticks(range(len(shares.columns)), shares.columns)
        axis.set_yticks(range(len(shares)), shares.index)
        axis.set(title=f"told by {way}", xlabel="timestep")
        for row, values in enumerate(shares.to_numpy()):
            for column, value in enumerate(values):
                colour = "white" if abs(value - 50) > 35 else "black"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    drawn.colorbar(image, ax=drawn.axes, label="restored better when told right, % (50: chance)")
    return drawn


@stage
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.tools.sensitivity", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("backbone")
    parser.add_argument("recipe")
    asked, p, compute = parser.parse_args(), params.load(), device()
    name, recipe = asked.backbone, asked.recipe
    profile = p.run.profile
    if name not in p.run.backbones:
        raise UserError(f"'{name}' is not among run.backbones of params.yaml: {', '.join(p.run.backbones)}")
    if recipe not in p.profile.recipes:
        raise UserError(f"'{recipe}' is not among profiles.{profile}.recipes: {', '.join(p.profile.recipes)}")
    stem = Path("metrics", profile, "sensitivity", f"{name}-{recipe}")
    with whole(stem.with_suffix(".csv"), stem.with_suffix(".png")) as (table_file, figure_file):
        backbone = Backbone.load(Path("models", profile, "pretrained", name)).to(compute)
        denoiser = Denoiser.load(Path("data", profile, "denoiser"))
        questions = read_mmvp_vlm(Path("data", profile, "mmvp_vlm"), p.profile.mmvp_vlm.pairs_per_pattern)
        table = measure(backbone, denoiser, questions, p, name, recipe, compute)
        table.to_csv(table_file, float_format="%.5f")
        figure(table).savefig(figure_file, format="png", dpi=110, metadata={"Software": None})
        late = table[table.index.get_level_values("timestep") >= len(denoiser.alphas_cumprod) * 0.6]
        shares = late.told_right_is_better.unstack("told").groupby("pattern", sort=False).mean().round(1)
        known = Path("metrics", profile, "ceiling", f"{name}.json")
        if known.is_file():
            shares["ceiling"] = pd.Series(json.loads(known.read_text(encoding="utf-8"))["patterns"]).round(1)
        print("restored better when told right, mean of the timesteps from 60 % on (%); ceiling: pairs right (%):")
        print(shares.to_string())
        if not known.is_file():
            print(f"The ceiling is unknown: run `python -m pipeline.tools.ceiling {name}`, for a backbone made here.")
        print(f"by timestep: {stem.with_suffix('.png')}, {stem.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
