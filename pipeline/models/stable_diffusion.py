"""Frozen text-to-image diffusion models, read from folders in the layout of stable-diffusion-2-1-base.

vae/ unet/ text_encoder/ tokenizer/ scheduler/      each with its config; tensors as safetensors
"""

import copy
import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDPMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel

from pipeline.core.stages import UserError


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """A linear autoencoder of square patches with AutoencoderKL's interface; the posterior has no variance."""

    @register_to_config
    def __init__(
        self, in_channels: int = 3, latent_channels: int = 24, patch_size: int = 8, scaling_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(in_channels, latent_channels, patch_size, stride=patch_size)
        self.decoder = nn.ConvTranspose2d(latent_channels, in_channels, patch_size, stride=patch_size)

    def encode(self, pixels_BCHW: torch.Tensor) -> AutoencoderKLOutput:
        mean = self.encoder(pixels_BCHW)
        moments = torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments, deterministic=True))

    def decode(self, latent_BCHW: torch.Tensor) -> DecoderOutput:
        return DecoderOutput(sample=self.decoder(latent_BCHW))


AUTOENCODERS = {cls.__name__: cls for cls in (AutoencoderKL, PatchAutoencoder)}


class Denoiser(nn.Module):
    """VAE, UNet and text encoder of one diffusion model, frozen but for the UNet where a recipe's warm-up trains it."""

    def __init__(self, vae, unet, text_encoder, tokenizer, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.vae, self.unet, self.text_encoder = vae, unet, text_encoder
        self.tokenizer = tokenizer
        self.prediction_type: Literal["epsilon", "v_prediction"] = scheduler.config.prediction_type
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float(), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: Path) -> "Denoiser":
        """Raises UserError where a part is missing or the tokenizer does not fit the text encoder."""
        for part in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
            if not (folder / part).is_dir():
                raise UserError(f"{folder}: no folder {part}/ (layout of stable-diffusion-2-1-base). Run `dvc repro`.")
        vae_class = json.loads((folder / "vae/config.json").read_text(encoding="utf-8"))["_class_name"]
        if vae_class not in AUTOENCODERS:
            raise UserError(f"{folder}/vae: unknown autoencoder {vae_class}; known: {', '.join(AUTOENCODERS)}")
        # Unlike diffusers, transformers computes in the type that a folder is stored in, unless another is given.
        text_encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder", local_files_only=True, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        if len(tokenizer) != text_encoder.config.vocab_size:  # transformers builds a wrong one when files are missing
            raise UserError(
                f"{folder}/tokenizer has {len(tokenizer)} entries, its text encoder {text_encoder.config.vocab_size}: "
                "files are missing or of another model. Fetch them again."
            )
        return cls(
            vae=AUTOENCODERS[vae_class].from_pretrained(folder / "vae", local_files_only=True),
            unet=UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            # The training noise is DDPM's; the sampler that a folder names adds noise by other formulas.
            scheduler=DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
        )

    def save(self, folder: Path, scheduler: DDPMScheduler) -> None:
        self.vae.save_pretrained(folder / "vae")
        self.unet.save_pretrained(folder / "unet")
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        scheduler.save_pretrained(folder / "scheduler")

    def for_feedback(self, precision: torch.dtype, trained: bool = False) -> "Denoiser":
        """The form in which the frozen parts are fastest: in `precision`, channels last. Returns self.

        trained: whether the warm-up trains the UNet; then it stays float32, because bfloat16 rounds updates away.
        The text encoder and the VAE's decoder, which feedback does not use, are dropped.
        """
        self.text_encoder = self.vae.decoder = None
        for part, dtype in ((self.vae, precision), (self.unet, torch.float32 if trained else precision)):
            nn.Module.to(part, dtype=dtype, memory_format=torch.channels_last)  # diffusers' `to` would warn
        return self

    def latent_shape(self, size: int) -> torch.Size:
        """[C, h, w] of the latent of an image of size x size pixels."""
        vae, pixels = copy.deepcopy(self.vae).to("meta"), torch.empty(1, 3, size, size, device="meta")
        return vae.encode(pixels.to(vae.dtype)).latent_dist.mean.shape[1:]

    @torch.no_grad()
    def latent(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Pixels, nominally -1..1, to float32 posterior mean times scaling factor (0.18215 for SD-2-1-base)."""
        mean = self.vae.encode(pixels_BCHW.to(self.vae.dtype)).latent_dist.mean
        return mean.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def pixels(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latent_BCHW / self.vae.config.scaling_factor).sample

    @torch.no_grad()
    def text(self, prompts: list[str]) -> torch.Tensor:
        """Last hidden states, float [prompts, L, D]; padded with id 0, as the published code does."""
        length = self.text_encoder.config.max_position_embeddings
        ids = [self.tokenizer(p, truncation=True, max_length=length).input_ids for p in prompts]
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        return self.text_encoder(padded.to(self.alphas_cumprod.device))[0]

    def forward(self, noised_BCHW: torch.Tensor, timestep_B: torch.Tensor, condition_BTD: torch.Tensor) -> torch.Tensor:
        """What the UNet predicts under a condition: noise or velocity, by `prediction_type`; in the UNet's precision.

        Autocast stays outside: it would cast the weights anew at every call, and run the norms in float32. But it is
        what computes in bfloat16 with the float32 weights of a UNet that is trained.
        """
        precision = self.unet.dtype
        if precision == torch.float32:
            return self.unet(noised_BCHW, timestep_B, condition_BTD).sample
        with torch.autocast(noised_BCHW.device.type, enabled=False):
            return self.unet(noised_BCHW.to(precision), timestep_B, condition_BTD.to(precision)).sample
