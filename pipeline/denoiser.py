"""Stage denoiser: the frozen text-to-image model, in the layout of stable-diffusion-2-1-base.

models/<profile>/denoiser/{vae,unet,text_encoder,tokenizer,scheduler}/
metrics/<profile>/denoiser.json             held-out loss under the right, an empty and a wrong caption
metrics/<profile>/reconstructions.png       what the latents keep
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

from pipeline import params
from pipeline.adapters.denoisers import Denoiser
from pipeline.diva import diffusion
from pipeline.mini import pretrain, world
from pipeline.params import DenoiserSection
from pipeline.runtime import device, generator, stage, whole, write_json


def make(p: DenoiserSection, folder: Path, compute: torch.device) -> tuple[dict, Image.Image]:
    """Pre-train the mini denoiser and save it; returns its metrics and a picture of reconstructions."""
    pixels, scenes = pretrain.pictures("denoiser", p.pictures + p.held_out, "pictures of the denoiser")
    vae = pretrain.autoencoder(pixels[: p.pictures], **p.autoencoder.model_dump())
    scheduler = DDPMScheduler(**p.scheduler.model_dump())
    denoiser, losses = pretrain.denoiser(vae, scheduler, pixels[: p.pictures], scenes, p, compute)
    held_out, held_scenes = pixels[p.pictures :].to(compute), scenes[p.pictures :]
    captions = [world.caption(scene) for scene in held_scenes]
    by_caption = {
        "right": captions,
        "empty": [""] * len(captions),
        "wrong": captions[1:] + captions[:1],
    }
    loss = {which: conditional_loss(denoiser, held_out, texts) for which, texts in by_caption.items()}
    restored = denoiser.pixels(denoiser.latent(pretrain.unit_range(held_out)))
    metrics = {
        "held_out_loss": {which: round(value, 5) for which, value in loss.items()},
        "reconstruction_mse": round(torch.nn.functional.mse_loss(restored, pretrain.unit_range(held_out)).item(), 5),
        "training_loss": {"first": round(losses[0], 5), "last_50": round(float(np.mean(losses[-50:])), 5)},
        "unet_parameters": sum(q.numel() for q in denoiser.unet.parameters()),
    }
    denoiser.save(folder, scheduler)
    return metrics, _strip(held_out[:8], restored[:8])


@torch.no_grad()
def conditional_loss(denoiser: Denoiser, pixels: torch.Tensor, captions: list[str]) -> float:
    """Mean squared error at fixed noise and timesteps, told `captions`; pixels uint8 [N, 3, H, W]."""
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
    p = params.load()
    metrics_folder = Path("metrics", p.run.profile)
    outputs = (
        Path("models", p.run.profile, "denoiser"),
        metrics_folder / "denoiser.json",
        metrics_folder / "reconstructions.png",
    )
    with whole(*outputs) as (folder, metrics_file, picture_file):
        metrics, picture = make(p.profile.denoiser, folder, device())
        write_json(metrics_file, metrics)
        picture.save(picture_file, "png")


if __name__ == "__main__":
    main()
