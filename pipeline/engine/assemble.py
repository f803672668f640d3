"""Post-training, from a recipe to tuned weights: what it is made of, and its phases, for every stage and tool."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from pipeline.core.code import program
from pipeline.core.compute import seeded
from pipeline.core.stages import UserError, progress
from pipeline.data.shards import INDEX, Shards
from pipeline.diva import adapters, pixels, step
from pipeline.diva.feedback import Feedback
from pipeline.diva.gap_correction import GapCorrection
from pipeline.diva.losses import Denoise, Given, Loss
from pipeline.diva.rules import CLASS_TOKEN, Condition, TokenRule
from pipeline.diva.schedule import Phase, learning_rate
from pipeline.engine import hosts
from pipeline.engine.curves import plot
from pipeline.engine.feed import Feed
from pipeline.engine.resume import Checkpoint, Projection, RunState, of_all
from pipeline.engine.scratch import digest_together
from pipeline.engine.speed import Speed
from pipeline.models.backbones import Backbone, ImageTower, fresh_head
from pipeline.models.residual_head import WithHead
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections.recipe import Head, Lora, Recipe, Sgd
from pipeline.sections.train import Train

START = "start.safetensors"
PARTS = {"tower": "", "lora": ".lora_", "head": "residual_head."}  # a part of the names of a trained part's parameters


@dataclasses.dataclass(frozen=True)
class Training:
    """What one training is made of.

    own: the backbone's condition. losses: the recipe's. shards: its images; None where only memory is measured.
    starts_from: for a control, which is the tower phase alone: what `save_start` wrote of the recipe's run.
    encoder: the frozen image encoder, where a loss needs it.
    """

    section: Train
    recipe: Recipe
    own: Condition
    losses: list[Loss]
    seed: int
    backbone: Backbone
    denoiser: Denoiser
    shards: Shards | None
    starts_from: Path | None = None
    encoder: torch.nn.Module | None = None

    @property
    def phased(self) -> Recipe:
        """The recipe, without the warm-up that a control does not make again."""
        return self.recipe.model_copy(update={"warmup": None}) if self.starts_from else self.recipe

    @property
    def condition(self) -> Condition:
        """The rule by which the denoiser is conditioned."""
        return self.own if self.recipe.condition == "backbone" else CLASS_TOKEN

    def feed(
        self, rule: TokenRule, losses: list[Loss], compute: torch.device, steps: list[tuple[str, int]], **options: Any
    ) -> Feed:
        """Of these steps; see Feed."""
        assert self.shards
        return Feed(
            self.shards, self.backbone, self.denoiser, rule, self.section, self.recipe, losses, self.seed, compute,
            steps, **options,
        )  # fmt: skip


def out_of_memory(profile: str, name: str, recipe: str, losses: list[Loss], micro_batch: int, fitting: int) -> str:
    """The message for a GPU with too little memory; fitting: a smaller micro-batch, 0 if none fits."""
    compare = " and ".join(loss.name for loss in losses if loss.images > 1)
    change = f"what is compared by {compare}, and so results" if compare else "results by rounding alone"
    way = f"Add -S profiles.{profile}.train.micro_batch={fitting}, which changes {change}"
    return (
        f"The GPU has too little memory to train {name} by recipe {recipe} with micro_batch {micro_batch}. "
        f"{way if fitting else 'Use a GPU with more memory'}, or choose other run.backbones."
    )


def pixel_rule(backbone: Backbone, p: Train) -> pixels.PixelRule:
    own = pixels.Statistics(backbone.mean, backbone.std)
    tower = pixels.OPENAI if p.pixels.tower_statistics == "openai" else own
    undone_by = pixels.IMAGENET if p.pixels.denoiser_statistics == "imagenet" else tower
    return pixels.PixelRule(tower, undone_by, backbone.image_size, p.pixels.tower_antialias)


def measure_gap(t: Training, compute: torch.device) -> GapCorrection:
    """The modality gap, measured on the first images and their captions; every process gets the same."""
    assert t.recipe.gap_correction
    wanted, rule = t.recipe.gap_correction, pixel_rule(t.backbone, t.section)
    steps = [("gap", number) for number in range(math.ceil(wanted.images / t.recipe.batch))]
    feed = t.feed(TokenRule("none"), [Denoise(1.0)], compute, steps)
    found = [
        (t.backbone.image_tokens(rule.tower(micro.images_BCHW))[0], micro.caption_BD)
        for _, number in progress(steps, "gap between images and captions")
        for micro in feed(number)
    ]
    images, captions = (torch.cat(parts)[: wanted.images].cpu() for parts in zip(*found, strict=True))
    try:
        return GapCorrection(images, captions, wanted.components)
    except ValueError as error:
        raise UserError(f"the recipe: {error}") from None


def first_captions(t: Training) -> list[str]:
    """Those of the first images, as many as a loss needs, each once. Raises UserError if there are fewer."""
    wanted, captions = max(loss.bank for loss in t.losses), dict[str, None]()
    if not t.shards:
        return ["a photo"] * wanted
    for number in range(len(t.shards) if wanted else 0):
        captions[t.shards.read(*t.shards.place(t.seed, number)).caption] = None
        if len(captions) == wanted:
            return list(captions)
    if len(captions) < wanted:
        raise UserError(
            f"the {len(t.shards)} images have {len(captions)} different captions, but a loss of the recipe needs "
            f"{wanted} (captions). Lower it, or train on more images."
        )
    return []


@torch.no_grad()
def build_feedback(t: Training, compute: torch.device) -> Feedback:
    """The frozen parts, the tower with what the recipe adds to it, and a fresh projection initialised from the seed.

    The losses see the tower as it was.
    """
    p, backbone, denoiser, trained, warmup = t.section, t.backbone, t.denoiser, t.recipe.trained, t.phased.warmup
    with seeded(t.seed, "projection"):
        projection = torch.nn.Linear(backbone.width, denoiser.unet.config.cross_attention_dim)
    text_1LD = denoiser.text([p.prompt])
    warms_up_denoiser = warmup is not None and warmup.denoiser
    backbone.to(compute).clip.requires_grad_(False)
    denoiser.to(compute)
    if t.encoder:
        t.encoder.to(compute)
    scale = float(backbone.logit_scale)
    given = Given(backbone.tower, backbone.embed, scale, denoiser.text, first_captions(t), t.encoder)
    for loss in t.losses:
        loss.prepare(given)
    denoiser.for_feedback(getattr(torch, p.precision), warms_up_denoiser)
    gap = measure_gap(t, compute) if t.recipe.gap_correction and t.shards else None
    if isinstance(trained, Head):
        backbone.clip.visual = WithHead(backbone.clip.visual, fresh_head(backbone.width, trained.heads, t.seed))
    elif isinstance(trained, Lora):
        with seeded(t.seed, "lora"):
            adapters.adapt(backbone.clip.visual, trained.rank, trained.alpha)
    tower = ImageTower(backbone.clip.visual)
    if p.compile:
        tower.compile()
        denoiser.compile()
        denoiser.vae.encoder.compile()
    return Feedback(
        tower, projection, denoiser, text_1LD, t.condition.tokens, t.condition.text,
        pixel_rule(backbone, p), gap, warms_up_denoiser,
    ).to(compute)  # fmt: skip


def phases(feedback: Feedback, recipe: Recipe, found: list[Loss]) -> list[Phase]:
    """What the recipe trains, in order."""
    projection, optimizer = list(feedback.projection.parameters()), recipe.optimizer
    part = PARTS[recipe.trained.kind]
    tower = [parameter for name, parameter in feedback.tower.named_parameters() if part in name]
    tower += projection if recipe.with_projection else []
    made: torch.optim.Optimizer = (
        torch.optim.SGD(
            tower, lr=optimizer.lr, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay, fused=True
        )
        if isinstance(optimizer, Sgd)
        else torch.optim.AdamW(tower, lr=optimizer.lr, weight_decay=optimizer.weight_decay, fused=True)
    )
    of_tower = Phase(
        "tower", recipe.steps, recipe.batch, tower, made,
        lambda number: learning_rate(number, recipe.steps, optimizer.lr, recipe.warmup_ratio),
        recipe.draw_weights, recipe.clip_norm, found,
    )  # fmt: skip
    if not (warmup := recipe.warmup):
        return [of_tower]
    warmed_up = [*projection, *(feedback.denoiser.unet.parameters() if feedback.warms_up_denoiser else [])]
    of_projection = Phase(
        "projection", warmup.steps, recipe.batch, warmed_up, torch.optim.AdamW(warmed_up, lr=warmup.lr, fused=True),
        lambda number: warmup.lr, [1.0] * len(recipe.draw_weights), recipe.clip_norm, [Denoise(1.0)],
    )  # fmt: skip
    return [of_projection, of_tower]


def save_start(feedback: Feedback, start: Projection, path: Path) -> None:
    """Write what the tower phase started from: the projector, and the denoiser if it was trained in the warm-up."""
    tensors = {f"projection.{name}": tensor for name, tensor in start.items()}
    if feedback.warms_up_denoiser:
        unet = feedback.denoiser.unet.named_parameters()
        tensors |= {f"denoiser.unet.{name}": tensor.detach() for name, tensor in unet}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


@torch.no_grad()
def put_start(feedback: Feedback, path: Path, processes: Accelerator) -> None:
    """Put back what `save_start` wrote; the first process alone has the file."""
    own = dict(feedback.named_parameters())
    saved = hosts.to_all(processes, load_file(path) if processes.is_main_process else None)
    for name, tensor in saved.items():
        own[name].copy_(tensor)


def fingerprint(t: Training, denoiser: Path, images: Path, encoder: Path) -> dict[str, Any]:
    """All that the numbers of a run depend on, but for the number of processes.

    That changes rounding alone, or which images are compared, where a loss compares those of a micro-batch. The first
    process alone has what a control starts from, and the checkpoint.
    """
    return {
        "seed": t.seed,
        "train": t.section.model_dump(mode="json"),
        "recipe": t.recipe.model_dump(mode="json"),
        "condition": dataclasses.asdict(t.own),
        "start": digest_together([t.starts_from]) if t.starts_from and t.starts_from.is_file() else None,
        "backbone": t.backbone.sha256,
        "denoiser": digest_together(sorted(path for path in denoiser.rglob("*") if path.is_file())),
        "images": digest_together([images / INDEX]),
        "encoder": digest_together(sorted(encoder.iterdir())) if t.encoder else None,
        "code": program("train.py"),
        "torch": torch.__version__,
    }


def run_phases(
    t: Training, feedback: Feedback, curves: Path, processes: Accelerator, checkpoint: Checkpoint
) -> RunState:
    """Run the phases from where the checkpoint stands, drawing the curves. Raises step.NotFiniteError."""
    assert t.shards
    if t.starts_from:
        put_start(feedback, t.starts_from, processes)
    planned, every = phases(feedback, t.phased, t.losses), t.section.validation.every
    precision = getattr(torch, t.section.precision)
    so_far = checkpoint.resume(feedback) or RunState([], t.shards.undecodable)
    t.shards.undecodable = so_far.undecodable
    done = {phase.name: sum(record.phase == phase.name for record in so_far.records) for phase in planned}
    schedule = [(phase.name, number) for phase in planned for number in range(done[phase.name], phase.steps)]
    feed = t.feed(
        feedback.tokens, t.losses, processes.device, schedule, process=processes.process_index,
        processes=processes.num_processes, mismatched=t.starts_from is not None,
    )  # fmt: skip
    validation = feed.validation()

    def measure(phase: Phase) -> Callable[[int], float | None]:
        def validation_loss(number: int) -> float | None:
            if not any(loss.conditions for loss in phase.losses) or (number % every and number != phase.steps - 1):
                return None
            return step.denoising_loss(feedback, *validation, precision, processes)

        return validation_loss

    main = processes.is_main_process
    if main:
        curves.mkdir(parents=True, exist_ok=True)
        for record in so_far.records:
            plot(curves, record)
    for phase in planned:
        first = done[phase.name]
        if so_far.optimizer and so_far.optimizer[0] == phase.name:
            step.restore_optimizer(phase, so_far.optimizer[1])
        if phase.name == "tower":
            t.denoiser.for_feedback(precision)  # now frozen, if it was warmed up
        if phase.name == "tower" and not first:
            so_far.start = {name: tensor.clone() for name, tensor in feedback.projection.state_dict().items()}
        steps = step.run(feedback, phase, feed, precision, processes, first, measure(phase), checkpoint.due)
        bar = {"initial": first, "unit": " images", "unit_scale": t.recipe.batch, "disable": not main}
        speed = Speed(feedback, phase, validation[0], processes, precision)
        for record, at_rest in progress(steps, phase.name, phase.steps, **bar):
            so_far.records.append(record)
            if main:
                plot(curves, record)
            speed.count()
            if at_rest:
                checkpoint.save(feedback, phase, so_far)
        if main:
            speed.report()
        phase.release()
    so_far.undecodable = of_all(so_far.undecodable)
    return so_far


def tuned(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The CLIP's state after training, with LoRA merged into its weights."""
    adapters.merge(backbone.clip.visual)
    return backbone.clip.state_dict()
