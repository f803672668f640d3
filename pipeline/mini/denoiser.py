"""The mini denoiser: a small text-to-image model that renders every detail."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from pipeline.core.compute import generator
from pipeline.diva import diffusion
from pipeline.mini import pretrain, world
from pipeline.models.stable_diffusion import Denoiser
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
    shown = torch.cat([kept[:8].float(), ((restored[:8] + 1) * 127.5).clamp(0, 255)]).byte().cpu()
    rows = make_grid(shown, nrow=len(shown) // 2, padding=0)  # originals above their reconstructions
    to_pil_image(rows).save(folder / "reconstructions.png", "png")
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
