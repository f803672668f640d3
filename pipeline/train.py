"""Stage train@<backbone>-<recipe>: post-train an image tower by a recipe, such as diffusion feedback.

models/<profile>/<recipe>/<backbone>/          the backbone's folder with the tuned weights; diva.json;
                                               start.safetensors, what the tower phase started from: the
                                               projection, and the denoiser where the recipe warms it up
metrics/<profile>/train/<backbone>-<recipe>/   metrics.json and the curves of its phases

It runs on every GPU of the machine, or as one of the processes that a launcher started (engine/hosts.py), on as many
machines. From models/<profile>/<recipe>/.<backbone>.checkpoint a killed run goes on; the end of the run removes it.
"""

import dataclasses
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from pipeline.core import config
from pipeline.core.outputs import atomic, remove, write_json
from pipeline.core.stages import UserError, stage
from pipeline.data.shards import Shards
from pipeline.diva import step
from pipeline.diva.rules import Condition
from pipeline.engine import hosts
from pipeline.engine.assemble import (
    START,
    Training,
    build_feedback,
    fingerprint,
    out_of_memory,
    run_phases,
    save_start,
    tuned,
)
from pipeline.engine.curves import ends
from pipeline.engine.losses import losses_of, smaller
from pipeline.engine.resume import Checkpoint
from pipeline.models.backbones import Backbone, save_like
from pipeline.models.frozen_encoder import FrozenEncoder
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import recipe as recipes
from pipeline.sections.launch import Launch
from pipeline.sections.train import Train


@stage
def main(backbone: str, recipe: str) -> None:
    hosts.start("pipeline.train", config.read(Launch, "launch"))
    post_train(backbone, recipe)


def post_train(name: str, recipe_name: str, control: str = "") -> None:
    """Make models/<profile>/<weights>/<name> and its curves, by a recipe or by a control that starts where it did."""
    profile = config.profile()
    section: Train = config.read(Train, f"profiles.{profile}.train")
    recipe = recipes.read(profile, recipe_name)
    own: Condition = config.read(Condition, f"backbones.{name}.condition")
    seed: int = config.read(config.Seed, "seed")
    launch: Launch = config.read(Launch, "launch")
    weights = f"{recipe_name}-{control}" if control else recipe_name
    starts_from = Path("models", profile, recipe_name, name, START) if control else None
    key = f"profiles.{profile}.recipes.{recipe_name}"
    losses = losses_of(key, recipe)
    captioned = recipe.reads_captions or any(loss.captioned or loss.bank for loss in losses)
    processes = hosts.join()
    original, images = Path("models", profile, "pretrained", name), Path("data", profile, "images")
    models, teacher = Path("data", profile, "denoiser"), Path("data", profile, "encoder", recipe_name)
    outputs = Path("models", profile, weights, name), Path("metrics", profile, "train", f"{name}-{weights}")
    scratch = outputs[0].with_name(f".{name}.checkpoint")

    def load() -> tuple[tuple[Training, dict[str, Any]], dict[str, Any]]:
        """What is read, and what of it must be the same on all hosts."""
        backbone, denoiser = Backbone.load(original), Denoiser.load(models)
        if recipe.timesteps[1] > len(denoiser.alphas_cumprod):
            raise UserError(
                f"{key}.timesteps ends at {recipe.timesteps[1]}, but the denoiser has {len(denoiser.alphas_cumprod)} "
                "timesteps. Lower it."
            )
        shards = Shards(images, section.max_undecodable, section.validation.images, captioned, launch.cache_gb)
        encoder = FrozenEncoder.load(teacher) if any(loss.encodes for loss in losses) else None
        if starts_from and processes.is_main_process and not starts_from.is_file():
            raise UserError(
                f"{starts_from} does not exist, but the control starts from it. Run stage train of {name} first."
            )
        t = Training(section, recipe, own, losses, seed, backbone, denoiser, shards, starts_from, encoder)
        mark = fingerprint(t, models, images, teacher)
        return (t, mark), {**mark, "start": bool(starts_from), "packages": hosts.packages()}

    with atomic(*outputs) if processes.is_main_process else nullcontext(outputs) as (folder, curves):
        t, mark = hosts.agreed(processes, load)
        checkpoint = Checkpoint(scratch, mark, launch.checkpoint_minutes, processes)
        half = 0  # no smaller micro-batch helps where the models alone fill the GPU
        try:
            feedback = build_feedback(t, processes.device)
            half = smaller(losses, recipe.batch, processes.num_processes, section.micro_batch)
            end = run_phases(t, feedback, curves, processes, checkpoint)
        except torch.OutOfMemoryError as error:
            way = out_of_memory(profile, name, recipe_name, losses, section.micro_batch, half)
            raise UserError(f"{error}\n{way}") from None
        except step.NotFiniteError as error:
            tensors = tuned(t.backbone)
            if not processes.is_main_process:
                sys.exit(1)
            kept = outputs[0].with_name(f"{name}.last-good")
            remove(kept)
            save_like(original, tensors, kept)
            curves.rename(kept / "curves")
            raise UserError(
                f"{error}. Training stopped; the weights before that step are in {kept}, the curves up to it in "
                f"{kept / 'curves'}. Lower {key}.optimizer.lr (now {recipe.optimizer.lr:g}), or use precision float32."
            ) from None
        tensors = tuned(t.backbone)
        if processes.is_main_process:
            result = {
                "seed": seed,
                "steps": recipe.steps,
                "images": len(end.records) * recipe.batch,
                "undecodable_images": sum(map(len, end.undecodable.values())),
                **ends(end.records),
            }
            save_like(original, tensors, folder)
            if not starts_from:
                assert end.start
                save_start(feedback, end.start, folder / START)
            write_json(
                folder / "diva.json",
                {
                    "backbone": name,
                    "weights": weights,
                    "seed": seed,
                    "train": section.model_dump(),
                    "recipe": recipe.model_dump(exclude_none=True),
                    "captions": captioned,
                    "condition": dataclasses.asdict(t.condition),
                    "code": mark["code"],
                    "result": result,
                },
            )
            write_json(curves / "metrics.json", result)
    if processes.is_main_process:
        remove(scratch)
    processes.end_training()


if __name__ == "__main__":
    main()
