"""A trial of a recipe in the mini world: it, or a control of it, is trained and scored. Trials share what was made."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from pipeline.benchmarks import mmvp, zeroshot
from pipeline.benchmarks.pairs import read_mmvp_vlm
from pipeline.core.outputs import atomic, remove
from pipeline.core.stages import UserError
from pipeline.data.shards import Shards
from pipeline.diva.step import NotFiniteError
from pipeline.engine.assemble import START, Training, build_feedback, run_phases, save_start, tuned
from pipeline.engine.drift import drift
from pipeline.engine.losses import losses_of
from pipeline.engine.resume import Checkpoint
from pipeline.evidence.results import headline
from pipeline.mini import sets, world
from pipeline.mini.backbone import make as make_backbone
from pipeline.mini.denoiser import make as make_denoiser
from pipeline.mini.encoder import make as make_encoder
from pipeline.mini.images import make as make_images
from pipeline.models.backbones import Backbone, save_like
from pipeline.models.frozen_encoder import FrozenEncoder
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import params
from pipeline.sections.recipe import Recipe

NAME = "mini"
MEASURES = (
    "pairs_stock", "matching", "image_to_statement_stock", "zeroshot", "zeroshot_outside_bank", "retrieval", "probe"
)  # fmt: skip
RIGHT = "right"


@dataclass(frozen=True)
class Trial:
    """One row: a recipe or a control of it, in one cell, with one choice of settings, on one benchmark."""

    benchmark: str  # dev | test 3
    recipe: str  # `none`: the backbone before training
    weights: str  # pretrained | trained | shuffled | drift
    detail_share: float
    denoiser_steps: int
    seed: int
    choice: str  # KEY=VALUE, with a space between them; `none` before training


def chosen(recipe: Recipe, choice: str) -> Recipe:
    """The recipe with these settings."""
    changed = recipe.model_dump(mode="json")
    for key, _, value in (each.partition("=") for each in choice.split()):
        *sections, last = key.split(".")
        section = reduce(dict.__getitem__, sections, changed)
        section[last] = type(section[last])(float(value))
    return Recipe.model_validate(changed)


class Assets:
    """The backbones, denoisers and images that trials share, each made in `scratch` when first asked for."""

    def __init__(self, p: params.Params, compute: torch.device, scratch: Path) -> None:
        if p.run.profile != NAME:
            raise UserError(f"trials are of the mini world. Set run.profile to {NAME} in params.yaml.")
        self.p, self.compute, self.scratch = p, compute, scratch
        self.processes = Accelerator(cpu=compute.type == "cpu")
        self.source: Any = p.backbones[NAME].source
        self.mini: Any = p.profile

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of this name, made if it is not there yet."""
        folder = self.scratch / name
        if not folder.exists():
            with atomic(folder) as (new,):
                make(new)
        return folder

    def backbone(self, share: float) -> Path:
        text_tower = self.source.text_tower.model_copy(update={"detail_share": share})
        source = self.source.model_copy(update={"text_tower": text_tower})
        return self.once(f"backbone-{share}", lambda new: make_backbone(NAME, source, new))

    def denoiser(self, steps: int) -> Path:
        section = self.mini.denoiser.model_copy(update={"steps": steps})
        return self.once(f"denoiser-{steps}", lambda new: make_denoiser(section, new, self.compute))

    def encoder(self) -> Path:
        return self.once("encoder", lambda new: make_encoder(self.mini.encoder, new))

    def post_training(self, share: float) -> Shards:
        """The images, all of which have captions."""
        images, section = self.mini.images.model_copy(update={"detail_share": share}), self.mini.train
        folder = self.once(f"images-{share}", lambda new: make_images(images, new))
        return Shards(folder, section.max_undecodable, section.validation.images, captioned=True)

    def benchmark(self, name: str) -> tuple[Path, Path]:
        """The folders of the pairs and of the sets of zero-shot ability."""

        def make(new: Path) -> None:
            sets.pairs(new / "mmvp_vlm", self.mini.mmvp_vlm.pairs_per_pattern, name)
            sets.zeroshot(new / "zeroshot_sets", self.mini.zeroshot_sets, name)

        folder = self.once(name, make)
        return folder / "mmvp_vlm", folder / "zeroshot_sets"

    def trained(self, run: Trial) -> Path:
        """The model's folder, trained here where it is not there yet."""
        original = self.backbone(run.detail_share)
        if run.weights == "pretrained":
            return original

        def make(new: Path) -> None:
            if run.weights == "trained":
                self.train(run, original, None, new)
                return
            trained = self.trained(replace(run, weights="trained"))
            if run.weights == "drift":
                drift(original, trained, run.seed, new)
            else:
                self.train(run, original, trained / START, new)

        key = f"{run.recipe}-{run.detail_share}-{run.denoiser_steps}-{run.seed}-{run.choice.replace(' ', '-')}"
        return self.once(f"{run.weights}-{key}", make)

    def recipe(self, run: Trial) -> Recipe:
        return chosen(self.p.profile.recipes[run.recipe], run.choice)

    def train(self, run: Trial, original: Path, starts_from: Path | None, folder: Path) -> None:
        """Write the model's folder; starts_from: the start of the tower phase, for a control."""
        recipe, section, own = self.recipe(run), self.p.profile.train, self.p.backbones[NAME].condition
        backbone, shards = Backbone.load(original), self.post_training(run.detail_share)
        denoiser = Denoiser.load(self.denoiser(run.denoiser_steps))
        losses = losses_of(f"profiles.{NAME}.recipes.{run.recipe}", recipe)
        encoder = FrozenEncoder.load(self.encoder()) if any(loss.encodes for loss in losses) else None
        t = Training(section, recipe, own, losses, run.seed, backbone, denoiser, shards, starts_from, encoder)
        feedback = build_feedback(t, self.compute)
        curves = folder.with_name(f"{folder.name}.curves")
        checkpoint = Checkpoint(None, {}, float("inf"), self.processes)
        end = run_phases(t, feedback, curves, self.processes, checkpoint)
        remove(curves)
        save_like(original, tuned(backbone), folder)
        if not starts_from:
            assert end.start
            save_start(feedback, end.start, folder / START)

    def score(self, run: Trial) -> dict[str, float | str]:
        """The measures in %, and which pairs are right, a bit each, in hexadecimal digits; all NaN, and no digits,
        where training came to numbers that are not finite."""
        pairs_folder, sets_folder = self.benchmark(run.benchmark)
        try:
            backbone = Backbone.load(self.trained(run)).to(self.compute)
        except NotFiniteError as error:
            print(f"{run}: {error}")
            return {**dict.fromkeys(MEASURES, float("nan")), RIGHT: ""}
        p, pooling = self.p.profile, self.p.backbones[NAME].published_pooling
        questions = read_mmvp_vlm(pairs_folder, p.mmvp_vlm.pairs_per_pattern)
        pairs, table, _ = mmvp.score(backbone, questions, pooling, p.mmvp, self.compute)
        of_sets, answers = zeroshot.score(backbone, sets_folder, p.zeroshot, self.compute)
        found = headline(pairs, of_sets) | {
            "matching": pairs["matching"]["stock"]["average"],
            "zeroshot_outside_bank": self.outside_bank(answers, run.benchmark),
        }
        right = table[table.pooling == "stock"].statement_to_image.to_numpy() > 0.5
        return {**{key: found[key] for key in MEASURES}, RIGHT: np.packbits(right).tobytes().hex()}

    def outside_bank(self, answers: pd.DataFrame, set_name: str) -> float:
        """Zero-shot accuracy on the images whose object no prompt of the bank names, %."""
        anchored = " ".join(self.p.profile.recipes["text_anchored"].losses["self_distillation"]["prompts"])
        asked = answers[answers.measure == "accuracy"]
        objects = [world.OBJECTS[world.image(set_name, 1, int(i))[1][0]] for i in asked.image]
        outside = [name not in anchored.split() for name in objects]
        return 100 * float(asked.right[outside].mean())
