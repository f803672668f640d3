"""Does a training fit this GPU's memory? Two steps of it, on models of the same sizes with random weights."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from pipeline.core.compute import generator, seeded
from pipeline.core.stages import UserError
from pipeline.diva import diffusion, step
from pipeline.engine.assemble import Training, build_feedback, out_of_memory, phases
from pipeline.engine.checks import processes_of
from pipeline.engine.losses import losses_of
from pipeline.models.backbones import Backbone, model_config, untrained
from pipeline.models.frozen_encoder import FrozenEncoder, new_model
from pipeline.models.registry import complete
from pipeline.models.stable_diffusion import Denoiser, PatchAutoencoder
from pipeline.sections.denoiser import MiniDenoiser
from pipeline.sections.encoder import EncoderSource
from pipeline.sections.params import Params

STABLE_DIFFUSION_2_1_BASE: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True,
    },
    "vae": {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
}  # fmt: skip


def random_clip(config: dict[str, Any], preprocessing: dict[str, Any]) -> Backbone:
    """A CLIP with random weights, of open_clip's configuration. It has no tokenizer: all texts have the same ids."""
    clip = untrained(config).eval().requires_grad_(False)
    length = config["text_cfg"].get("context_length", 77)
    preprocessing = {"size": config["vision_cfg"]["image_size"], **preprocessing}
    return Backbone(clip, lambda texts: torch.zeros(len(texts), length, dtype=torch.int64), preprocessing, "")


def random_denoiser(section: Any, shape: dict[str, dict[str, Any]] = STABLE_DIFFUSION_2_1_BASE) -> Denoiser:
    """A denoiser with random weights and no text encoder: of the sizes of section `denoiser` for the mini world, of
    `shape` for a published one."""
    if isinstance(section, MiniDenoiser):
        vae = PatchAutoencoder(**section.autoencoder.model_dump())
        channels, size = section.autoencoder.latent_channels, 64 // section.autoencoder.patch_size
        unet = UNet2DConditionModel(sample_size=size, in_channels=channels, out_channels=channels, **section.unet)
        scheduler = DDPMScheduler(**section.scheduler.model_dump())
    else:
        vae, unet = AutoencoderKL(**shape["vae"]), UNet2DConditionModel(**shape["unet"])
        scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return Denoiser(vae, unet, None, None, scheduler)


def random_encoder(section: EncoderSource) -> FrozenEncoder:
    """A frozen image encoder with random weights, of the architecture that section `encoder` names."""
    return FrozenEncoder(new_model(section.architecture, section.arguments))


class WithoutText(Denoiser):
    """A denoiser that needs no text encoder: the embedding of a text is random."""

    def text(self, prompts: list[str]) -> torch.Tensor:
        device = self.alphas_cumprod.device
        return torch.randn(len(prompts), self.text_tokens, self.unet.config.cross_attention_dim, device=device)


def trial(p: Params, name: str, recipe_name: str, micro_batch: int, compute: torch.device) -> Iterator[step.Record]:
    """Two steps of each phase of a recipe; the second one has the optimizer's state. Where a process has several
    micro-batches a step, it is of two here, of which the second is computed beside the gradients of the first.

    A published denoiser is taken to have the sizes of stable-diffusion-2-1-base, fetched or not. Left out: compilation
    and modality-gap correction, which take little memory, and the sum of the gradients over several GPUs, which takes
    as much as the update after it.
    """
    section = p.profile.train.model_copy(update={"micro_batch": micro_batch, "compile": False})
    recipe = p.profile.recipes[recipe_name]
    own = -(-recipe.batch // processes_of(p))
    micro_batches = 1 + (own > micro_batch)
    batch = micro_batches * micro_batch
    recipe = recipe.model_copy(update={"batch": batch, "steps": 2, "gap_correction": None})
    if recipe.warmup:
        recipe = recipe.model_copy(update={"warmup": recipe.warmup.model_copy(update={"steps": 2})})
    entry, losses = p.backbones[name], losses_of(f"profiles.{p.run.profile}.recipes.{recipe_name}", recipe)
    with seeded("trial"):
        source = complete(name, entry.source)
        with compute:  # a GPU draws its weights at once, a CPU takes half a minute
            backbone = random_clip(model_config(source.architecture), source.preprocessing.model_dump())
            denoiser = random_denoiser(p.profile.denoiser)
            encodes = any(loss.encodes for loss in losses)
            encoder = random_encoder(read) if (read := p.profile.encoder) and encodes else None
        denoiser.__class__, denoiser.text_tokens = WithoutText, p.profile.denoiser.text_tokens
        t = Training(section, recipe, entry.condition, losses, p.seed, backbone, denoiser, shards=None, encoder=encoder)
        feedback = build_feedback(t, compute)
    images_BCHW = torch.zeros(micro_batch, 3, section.size, section.size, dtype=torch.uint8, device=compute)
    shape = denoiser.latent_shape(section.size)
    draws = [[generator("trial", k, i) for i in range(micro_batch)] for k in range(len(recipe.draw_weights))]
    drawn = [
        diffusion.draw(shape, backbone.patches, feedback.tokens, (0, 1000), generators).to(compute)
        for generators in draws
    ]
    processes, precision = Accelerator(cpu=compute.type == "cpu"), getattr(torch, section.precision)
    for phase in phases(feedback, recipe, losses):
        if phase.name == "tower":
            denoiser.for_feedback(precision)  # now frozen, if it was warmed up
        on_captions = phase.name == "projection" and recipe.warms_up_on_captions
        micro = [step.stand_in(images_BCHW, drawn, phase.losses, backbone.width, on_captions)] * micro_batches
        for record, _ in step.run(feedback, phase, lambda number, micro=micro: micro, precision, processes):  # type: ignore[misc]
            yield record
        phase.release()


def check(p: Params, name: str, recipe_name: str, compute: torch.device) -> None:
    """Raises UserError if training does not fit the GPU's memory; it names the largest divisor of
    `micro_batch` that fits."""
    asked, recipe = p.profile.train.micro_batch, p.profile.recipes[recipe_name]
    losses = losses_of(f"profiles.{p.run.profile}.recipes.{recipe_name}", recipe)
    least = max(loss.images for loss in losses)
    for micro_batch in (size for size in range(asked, least - 1, -1) if asked % size == 0):
        try:
            for _ in trial(p, name, recipe_name, micro_batch, compute):
                pass
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        except step.NotFiniteError:  # of random weights; memory sufficed
            pass
        if micro_batch < asked:
            raise UserError(out_of_memory(p.run.profile, name, recipe_name, losses, asked, micro_batch))
        return
    raise UserError(out_of_memory(p.run.profile, name, recipe_name, losses, asked, 0))
