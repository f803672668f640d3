"""Conditioning sensitivity: how much worse an image is restored under the condition of its pair's other image.

    python -m pipeline.tools.sensitivity mini diva       after `dvc repro`

Writes metrics/<profile>/sensitivity/<backbone>-<recipe>.{csv,png}. The two images of a pair differ in one detail.
Where the right condition does not restore an image better than the wrong one, feedback cannot teach this detail at that
timestep. The denoiser is conditioned in two or three ways:

    captions             the pair's statements through the denoiser's own text encoder: the most that it can use
    caption_embeddings   the statements through the backbone's text tower and the projector; only where the recipe warms
                         the projector up on captions. It is what a perfect image tower would give in text space.
    image_embeddings     the images through the image tower and the projector: what training starts from. The projector
                         is warmed up as the recipe says; in the published recipe it is random.

The table has a row for each condition, pattern and timestep: the mean of wrong minus right loss, and the share of
images that the right condition restores better (%; 50 is chance). Both conditions get the same noise.

For a mini backbone it also prints the oracle upper bound: the pairs that its frozen text tower would get right with an
image tower that was taught every detail. Where this is low, the text tower does not use a detail even if the image
embedding holds it. For a published backbone the bound is unknown, because no captions name every detail.

It looks at the benchmark's pairs, so it must not choose a recipe that is then judged by them.
"""

import json
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from pipeline.benchmarks.pairs import PROMPT, Question, read_mmvp_vlm
from pipeline.core.compute import autocast, deterministic_device, generator
from pipeline.core.outputs import atomic
from pipeline.core.stages import UserError, progress, stage
from pipeline.data.shards import Shards
from pipeline.diva import diffusion, step
from pipeline.diva.condition import draw_positions
from pipeline.diva.feedback import Feedback
from pipeline.diva.losses import Denoise, Loss
from pipeline.engine.assemble import Training, build_feedback, phases
from pipeline.engine.losses import losses_of
from pipeline.models.backbones import Backbone
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import params
from pipeline.sections.train import Train

WAYS = ("captions", "caption_embeddings", "image_embeddings")
TIMESTEPS = 10  # the middles of as many equal parts of the denoiser's range


@torch.no_grad()
def wrong_minus_right(
    denoiser, latent_BChw: torch.Tensor, noise_BChw: torch.Tensor, timestep: int, condition_BTD: torch.Tensor
) -> torch.Tensor:
    """Loss under the wrong condition minus loss under the right one, [B]; images 2n and 2n + 1 are a pair.

    A loss is the mean squared error of an image.
    """
    timestep_B = torch.full((len(latent_BChw),), timestep, device=latent_BChw.device)
    alphas = denoiser.alphas_cumprod
    noised = diffusion.add_noise(latent_BChw, noise_BChw, timestep_B, alphas)
    wanted = diffusion.target(latent_BChw, noise_BChw, timestep_B, alphas, denoiser.prediction_type)
    other_BTD = condition_BTD.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    wrong, right = (
        (denoiser(noised, timestep_B, condition).float() - wanted).square().flatten(1).mean(1)
        for condition in (other_BTD, condition_BTD)
    )
    return wrong - right


def warmed_up(
    backbone: Backbone, denoiser: Denoiser, p: params.Params, name: str, recipe_name: str, compute: torch.device
) -> Feedback:
    """The feedback after the projector warm-up, as stage train does it."""
    section, recipe, folder = p.profile.train, p.profile.recipes[recipe_name], Path("data", p.run.profile, "images")
    shards = Shards(folder, section.max_undecodable, section.validation.images, recipe.reads_captions)
    own, losses = p.backbones[name].condition, list[Loss]([Denoise(1.0)])  # losses of the tower phase are not needed
    t = Training(section, recipe, own, losses, p.seed, backbone, denoiser, shards)
    feedback = build_feedback(t, compute)
    precision, processes = getattr(torch, section.precision), Accelerator(cpu=compute.type == "cpu")
    for phase in phases(feedback, recipe, losses)[:-1]:
        steps = [(phase.name, number) for number in range(phase.steps)]
        feed = t.feed(feedback.tokens, losses, compute, steps)
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
    """(latent, projected condition) of uncropped images, at the size and with the statistics of training."""
    square = [question.image().resize((p.size, p.size), Image.Resampling.BICUBIC) for question in questions]
    images_BCHW = torch.stack([pil_to_tensor(image) for image in square]).to(compute)
    latent_BChw = denoiser.latent(feedback.pixels.denoiser(images_BCHW))
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
    """One row for each condition, pattern and timestep: wrong_minus_right, right_is_better (%), images."""
    denoiser.to(compute)
    # Before training drops the text encoder.
    captions = [denoiser.text([PROMPT + question.statement]).cpu() for question in questions]
    feedback = warmed_up(backbone, denoiser, p, name, recipe_name, compute)
    on_captions = p.profile.recipes[recipe_name].warms_up_on_captions
    steps, size = len(denoiser.alphas_cumprod), 2 * max(1, p.profile.mmvp.batch // 2)
    timesteps = [(2 * i + 1) * steps // (2 * TIMESTEPS) for i in range(TIMESTEPS)]
    rows = []
    for first in progress(range(0, len(questions), size), "pairs"):
        asked = questions[first : first + size]
        with autocast(compute, p.profile.train.precision):
            latent, projected = seen(feedback, backbone, denoiser, asked, p.profile.train, compute)
            conditions = {
                "captions": torch.cat(captions[first : first + size]).to(compute),
                "image_embeddings": projected,
            }
            if on_captions:
                statements = backbone.embed([PROMPT + question.statement for question in asked])
                conditions["caption_embeddings"] = feedback.condition_on_text(statements)
            for timestep in timesteps:
                draws = [generator("sensitivity", "noise", timestep, question.id) for question in asked]
                noise = torch.stack([torch.randn(latent.shape[1:], generator=g) for g in draws]).to(compute)
                for way, condition in conditions.items():
                    found = wrong_minus_right(denoiser, latent, noise, timestep, condition)
                    for question, value in zip(asked, found.tolist(), strict=True):
                        rows.append((way, question.type, timestep, value))
    table = pd.DataFrame(rows, columns=["condition", "pattern", "timestep", "wrong_minus_right"])
    table["right_is_better"] = 100.0 * (table.wrong_minus_right > 0)
    groups = table.groupby(["condition", "pattern", "timestep"], sort=False)
    return groups.agg({"wrong_minus_right": "mean", "right_is_better": "mean"}).assign(images=groups.size())


def figure(table: pd.DataFrame) -> Figure:
    """Share of images that the right condition restores better: patterns by timesteps, a panel for each condition."""
    ways = [way for way in WAYS if way in table.index.unique("condition")]
    drawn = Figure(figsize=(6 * len(ways), 4.6), layout="constrained")
    for axis, way in zip(drawn.subplots(1, len(ways), sharey=True), ways, strict=True):
        shares = table.loc[way].right_is_better.unstack().reindex(table.index.unique("pattern"))
        image = axis.imshow(shares, cmap="RdBu", vmin=0, vmax=100, aspect="auto")
        axis.set_xticks(range(len(shares.columns)), shares.columns)
        axis.set_yticks(range(len(shares)), shares.index)
        axis.set(title=f"conditioned on {way}", xlabel="timestep")
        for row, values in enumerate(shares.to_numpy()):
            for column, value in enumerate(values):
                colour = "white" if abs(value - 50) > 35 else "black"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    drawn.colorbar(image, ax=drawn.axes, label="restored better under the right condition, % (50: chance)")
    return drawn


@stage
def main(backbone: str, recipe: str) -> None:
    p, compute = params.load(), deterministic_device()
    profile = p.run.profile
    if backbone not in p.run.backbones:
        raise UserError(f"run.backbones does not name '{backbone}'. Choose one of these: {', '.join(p.run.backbones)}.")
    if recipe not in p.profile.recipes:
        raise UserError(
            f"profile {profile} has no recipe '{recipe}'. Choose one of these: {', '.join(p.profile.recipes)}."
        )
    losses = losses_of(f"profiles.{profile}.recipes.{recipe}", p.profile.recipes[recipe])
    if not any(loss.conditions for loss in losses):
        raise UserError(
            f"recipe '{recipe}' has no loss that conditions the denoiser on images, so there is none to measure. "
            "Name one that has, such as diva."
        )
    stem = Path("metrics", profile, "sensitivity", f"{backbone}-{recipe}")
    with atomic(stem.with_suffix(".csv"), stem.with_suffix(".png")) as (table_file, figure_file):
        clip = Backbone.load(Path("models", profile, "pretrained", backbone)).to(compute)
        denoiser = Denoiser.load(Path("data", profile, "denoiser"))
        questions = read_mmvp_vlm(Path("data", profile, "mmvp"), p.profile.mmvp_vlm.pairs_per_pattern)
        table = measure(clip, denoiser, questions, p, backbone, recipe, compute)
        table.to_csv(table_file, float_format="%.5f")
        figure(table).savefig(figure_file, format="png", dpi=110, metadata={"Software": None})
        late = table[table.index.get_level_values("timestep") >= len(denoiser.alphas_cumprod) * 0.6]
        shares = late.right_is_better.unstack("condition").groupby("pattern", sort=False).mean().round(1)
        known = Path("metrics", profile, "oracle", f"{backbone}.json")
        if known.is_file():
            shares["oracle"] = pd.Series(json.loads(known.read_text(encoding="utf-8"))["patterns"]).round(1)
        print("images restored better under the right condition, mean of the timesteps from 60 % on (%)")
        if known.is_file():
            print("oracle: pairs right at the oracle upper bound (%)")
        print(shares.to_string())
        if not known.is_file():
            print(
                f"The oracle upper bound is unknown. For a backbone of the mini world, run "
                f"`python -m pipeline.tools.oracle {backbone}`."
            )
        print(f"by timestep: {stem.with_suffix('.png')}, {stem.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
