"""Stage denoiser: the frozen text-to-image model, in the layout of stable-diffusion-2-1-base.

data/<profile>/denoiser/{vae,unet,text_encoder,tokenizer,scheduler}/
metrics/<profile>/denoiser.json     parameters; its source or, if it was trained here, its validation loss under the
                                    right, an empty and a wrong caption (and reconstructions.png beside the model)
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

from pipeline.core import config
from pipeline.core.compute import deterministic_device, generator
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, stage
from pipeline.data import downloads
from pipeline.diva import diffusion
from pipeline.mini import pretrain, world
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import denoiser as sections
from pipeline.sections.denoiser import MiniDenoiser


def make(p: MiniDenoiser, folder: Path, compute: torch.device) -> dict[str, Any]:
    """Pre-train the mini denoiser; save it with an image of its reconstructions; return its metrics."""
    pixels, scenes = pretrain.images("denoiser", p.images + p.validation, "images of the denoiser")
    vae = pretrain.autoencoder(pixels[: p.images], **p.autoencoder.model_dump())
    scheduler = DDPMScheduler(**p.scheduler.model_dump())
    denoiser, losses = pretrain.denoiser(vae, scheduler, pixels[: p.images], scenes, p, compute)
    kept, kept_scenes = pixels[p.images :].to(compute), scenes[p.images :]
    captions = [world.caption(scene) for scene in kept_scenes]
    by_caption = {
        "right": captions,
        "empty": [""] * len(captions),
        "wrong": captions[1:] + captions[:1],
    }
    loss = {which: conditional_loss(denoiser, kept, texts) for which, texts in by_caption.items()}
    restored = denoiser.pixels(denoiser.latent(pretrain.unit_range(kept)))
    denoiser.save(folder, scheduler)
    _strip(kept[:8], restored[:8]).save(folder / "reconstructions.png", "png")
    return {
        "validation_loss": {which: round(value, 5) for which, value in loss.items()},
        "reconstruction_mse": round(torch.nn.functional.mse_loss(restored, pretrain.unit_range(kept)).item(), 5),
        "training_loss": {"first": round(losses[0], 5), "last_50": round(float(np.mean(losses[-50:])), 5)},
    }


@torch.no_grad()
def conditional_loss(denoiser: Denoiser, pixels: torch.Tensor, captions: list[str]) -> float:
    """Denoising loss conditioned on `captions`, at fixed noise and timesteps; pixels uint8 [N, 3, H, W]."""
    latent = denoiser.latent(pretrain.unit_range(pixels))
    draws = generator("mini", "denoiser", "held out")
    steps = len(denoiser.alphas_cumprod)
    timestep = torch.randint(steps, (len(latent),), generator=draws).to(latent.device)
    noise = torch.randn(latent.shape, generator=draws).to(latent.device)
    noised = diffusion.add_noise(latent, noise, timestep, denoiser.alphas_cumprod)
    wanted = diffusion.target(latent, noise, timestep, denoiser.alphas_cumprod, denoiser.prediction_type)
    return torch.nn.functional.mse_loss(denoiser(noised, timestep, denoiser.text(captions)), wanted).item()


def _strip(pixels: torch.Tensor, restored: torch.Tensor) -> Image.Image:
    """Originals above their reconstructions."""
    rows = torch.cat([pixels.float(), ((restored + 1) * 127.5).clamp(0, 255)]).byte().cpu()
    n, _, h, w = pixels.shape
    grid = rows.reshape(2, n, 3, h, w).permute(0, 3, 1, 4, 2).reshape(2 * h, n * w, 3)
    return Image.fromarray(grid.numpy())


@stage
def main() -> None:
    profile, compute = config.profile(), deterministic_device()
    section: MiniDenoiser | sections.PublishedDenoiser = config.read(sections.Denoiser, f"profiles.{profile}.denoiser")
    outputs = Path("data", profile, "denoiser"), Path("metrics", profile, "denoiser.json")
    with atomic(*outputs) as (folder, metrics_file):
        if isinstance(section, MiniDenoiser):
            metrics = make(section, folder, compute)
        else:
            metrics = {"origin": downloads.fetch(section.download, folder)}
        denoiser = Denoiser.load(folder)  # fail here if later stages could not load it
        if (tokens := denoiser.text_encoder.config.max_position_embeddings) != section.text_tokens:
            raise UserError(
                f"the denoiser's text has {tokens} tokens, but profiles.{profile}.denoiser.text_tokens is "
                f"{section.text_tokens}, which every condition is checked against. Set it to {tokens} in params.yaml."
            )
        write_json(metrics_file, {"unet_parameters": sum(q.numel() for q in denoiser.unet.parameters()), **metrics})


if __name__ == "__main__":
    main()
