"""What would stop a training long after it was asked for, told before anything is fetched."""

import torch

from pipeline.core.stages import UserError
from pipeline.engine.fetches import encoding
from pipeline.engine.losses import check_micro_batches, losses_of
from pipeline.models.registry import embedding_width
from pipeline.sections.denoiser import MiniDenoiser
from pipeline.sections.params import Params
from pipeline.sections.recipe import Head


def check_encoder(p: Params) -> None:
    """Raises UserError where a recipe of the run needs an encoder, and params.yaml has none that timm can make."""
    if not (needed := encoding(p)):
        return
    from pipeline.models.frozen_encoder import new_model  # not above: it imports timm, for which few runs need to wait

    key, section = f"profiles.{p.run.profile}.encoder", p.profile.encoder
    if section is None:
        raise UserError(
            f"{key}: missing, but losses of {', '.join(needed)} read a frozen image encoder. Add it, as another "
            "profile has it, or take these recipes out of run.recipes."
        )
    with torch.device("meta"):  # no weights are drawn
        try:
            new_model(section.architecture, section.arguments)
        except UserError as error:
            raise UserError(f"{key}: {error}. Correct it.") from None


def processes_of(p: Params) -> int:
    """How many processes train: those of the launcher, or one a GPU of this machine."""
    return p.launch.processes if p.launch.train else max(1, torch.cuda.device_count())


def check_recipes(p: Params) -> None:
    """Raises UserError naming the key, where a recipe of the run does not fit the rest of params.yaml."""
    train, denoiser = p.profile.train, p.profile.denoiser
    processes = processes_of(p)
    widths = {name: embedding_width(name, p.backbones[name].source) for name in p.run.backbones}
    for name in p.run.recipes:
        key, recipe = f"profiles.{p.run.profile}.recipes.{name}", p.profile.recipes[name]
        check_micro_batches(losses_of(key, recipe), recipe.batch, processes, train.micro_batch, f"{key}.")
        if isinstance(denoiser, MiniDenoiser) and recipe.timesteps[1] > denoiser.scheduler.num_train_timesteps:
            raise UserError(
                f"{key}.timesteps ends at {recipe.timesteps[1]}, but the denoiser has "
                f"{denoiser.scheduler.num_train_timesteps} timesteps. Lower it."
            )
        for backbone, width in widths.items():
            if isinstance(recipe.trained, Head) and width % recipe.trained.heads:
                raise UserError(
                    f"{key}.trained.heads is {recipe.trained.heads}, which does not divide {width}, the width of "
                    f"{backbone}'s embedding. Choose a number that does."
                )
            gap = recipe.gap_correction
            if gap and gap.components > (most := min(gap.images, width)):
                what = "gap_correction.images" if gap.images < width else f"the width of {backbone}'s embedding"
                raise UserError(
                    f"{key}.gap_correction.components is {gap.components}, more than {what}, {most}. Lower it."
                )
