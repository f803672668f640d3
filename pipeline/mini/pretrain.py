"""The small models of the mini world: a CLIP whose image tower misses details, a denoiser that renders them, and a
frozen encoder that sees them.

DIVA's premise is that the text tower distinguishes details that the image embedding does not hold. Here it is true by
construction: the text tower learns from an oracle that reads every scene's attributes, and is then frozen; the image
tower learns against it from captions that name the object and rarely a detail.
"""

from collections.abc import Callable

import numpy as np
import open_clip
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import normalize
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from pipeline.benchmarks.pairs import PROMPT
from pipeline.core.compute import generator, seeded
from pipeline.core.stages import UserError, progress
from pipeline.mini import world
from pipeline.models.frozen_encoder import FrozenEncoder, new_model
from pipeline.models.stable_diffusion import Denoiser, PatchAutoencoder
from pipeline.sections.denoiser import MiniDenoiser
from pipeline.sections.encoder import MiniEncoder
from pipeline.sections.source import MiniImageTower, MiniTextTower

Details = Callable[[np.random.Generator], np.ndarray]
CONTEXT_LENGTH = 28  # the longest caption has 24 words; start and end make 26, and two are to spare


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word. The end token has the highest id, because CLIP text towers pool where the id is largest."""
    every = [PROMPT + "a .", *world.OBJECTS, *(p for values in world.PATTERNS.values() for p in values)]
    words = sorted({word for phrase in every for word in phrase.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unknown>", "<start>", *words, "<end>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(t, vocabulary[t]) for t in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unknown>",
        model_max_length=CONTEXT_LENGTH,
    )


def encode(tok: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids, int64 [captions, CONTEXT_LENGTH], padded with id 0."""
    return tok(captions, padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt").input_ids


def images(set_name: str, count: int, what: str) -> tuple[torch.Tensor, np.ndarray]:
    """The first `count` images of a set: pixels uint8 [count, 3, 64, 64] and scenes int64 [count, 10]."""
    drawn = [world.image(set_name, i) for i in progress(range(count), what)]
    pixels = torch.from_numpy(np.stack([p for p, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    return pixels, np.stack([s for _, s in drawn])


def choices(what: str) -> np.random.Generator:
    """The generator of scenes, rows and details in the training of `what`."""
    return np.random.default_rng(generator("mini", what, "choices").initial_seed())


def unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to -1..1."""
    return pixels.float() / 127.5 - 1


def clip_loss(image_BD: torch.Tensor, text_BD: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    logits_BB = logit_scale.exp() * F.normalize(image_BD, dim=-1) @ F.normalize(text_BD, dim=-1).T
    labels = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, labels) + F.cross_entropy(logits_BB.T, labels)) / 2


def fit(
    parameters: list[nn.Parameter], steps: int, lr: float, loss_of: Callable[[int], torch.Tensor], what: str
) -> list[float]:
    """AdamW under a one-cycle schedule; returns the loss of every step."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    losses = []
    for step in progress(range(steps), what):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def new_clip(name: str, architecture: dict) -> tuple[open_clip.CLIP, PreTrainedTokenizerFast, dict]:
    """A fresh CLIP, its tokenizer, and the architecture with what the tokenizer decides filled in.

    name: the backbone's, whose architecture a UserError names if it makes no model.
    """
    tok = tokenizer()
    try:
        if (size := architecture["vision_cfg"]["image_size"]) != world.SIZE:
            raise ValueError(f"image_size is {size}, but the mini world's images have {world.SIZE} px")
        text_cfg = {**architecture["text_cfg"], "vocab_size": len(tok), "context_length": CONTEXT_LENGTH}
        complete = {**architecture, "text_cfg": {**text_cfg, "hf_tokenizer_name": "mini"}}
        with seeded("mini", "clip"):
            return open_clip.CLIP(**complete), tok, complete
    except Exception as error:  # open_clip and torch raise any
        raise UserError(
            f"backbones.{name}.source.architecture makes no model ({type(error).__name__}: {error}). Correct it by the "
            "files in open_clip/model_configs."
        ) from error


def text_tower(clip: open_clip.CLIP, tok: PreTrainedTokenizerFast, p: MiniTextTower) -> list[float]:
    """Train the text side of `clip` against an oracle that reads the scene itself; a share of captions has details."""
    compute, rng, coin = clip.logit_scale.device, choices("text tower"), choices("text tower's captions")
    width = clip.text_projection.shape[1]
    with seeded("mini", "oracle"):
        oracle = nn.Sequential(nn.Linear(sum(world.CARDINALITIES), 256), nn.GELU(), nn.Linear(256, width)).to(compute)

    def loss_of(step: int) -> torch.Tensor:
        scenes = rng.integers(0, world.CARDINALITIES, (p.batch, len(world.CARDINALITIES)))
        captions = [
            world.caption(scene, world.any_details(rng) if coin.random() < p.detail_share else ()) for scene in scenes
        ]
        one_hot = [F.one_hot(torch.from_numpy(scenes[:, i]), n) for i, n in enumerate(world.CARDINALITIES)]
        seen = oracle(torch.cat(one_hot, 1).float().to(compute))
        return clip_loss(seen, clip.encode_text(encode(tok, captions).to(compute)), clip.logit_scale)

    visual = {id(q) for q in clip.visual.parameters()}
    text = [q for q in clip.parameters() if id(q) not in visual]
    return fit([*text, *oracle.parameters()], p.steps, p.lr, loss_of, "text tower")


def image_tower(
    clip: open_clip.CLIP,
    tok: PreTrainedTokenizerFast,
    preprocessing: dict,
    p: MiniImageTower,
    steps: int,
    details: Details,
) -> list[float]:
    """Train the image side of `clip` against its frozen text side; `details` chooses the patterns a caption names."""
    compute, rng = clip.logit_scale.device, choices("image tower")
    pixels, scenes = images("image tower", p.images, "images of the image tower")
    clip.requires_grad_(False)
    clip.visual.requires_grad_(True)

    def loss_of(step: int) -> torch.Tensor:
        rows = rng.integers(0, len(pixels), p.batch)
        captions = [world.caption(scenes[i], details(rng)) for i in rows]
        images = normalize(pixels[rows].to(compute).float() / 255, preprocessing["mean"], preprocessing["std"])
        with torch.no_grad():
            text_BD = clip.encode_text(encode(tok, captions).to(compute))
        return clip_loss(clip.encode_image(images), text_BD, clip.logit_scale)

    return fit(list(clip.visual.parameters()), steps, p.lr, loss_of, "image tower")


def autoencoder(pixels: torch.Tensor, latent_channels: int, patch_size: int) -> PatchAutoencoder:
    """Whitened principal components of the patches of `pixels` (uint8 [N, 3, 64, 64])."""
    # The decoder's bias is one value a colour, so patches are centred by colour alone.
    colour = torch.stack([unit_range(part).mean((0, 2, 3)) for part in pixels.split(1000)]).mean(0)
    moment = torch.zeros(3 * patch_size**2, 3 * patch_size**2, dtype=torch.float64)
    for part in pixels.split(1000):
        columns = F.unfold(unit_range(part) - colour[:, None, None], patch_size, stride=patch_size)
        patches = columns.transpose(1, 2).flatten(0, 1).double()
        moment += patches.T @ patches
    variance, axes = torch.linalg.eigh(moment / (len(pixels) * len(columns[0].T)))
    variance, axes = variance.flip(0)[:latent_channels], axes.flip(1)[:, :latent_channels]
    axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)  # an eigenvector's sign is arbitrary: fix it
    vae = PatchAutoencoder(3, latent_channels, patch_size)
    with torch.no_grad():
        vae.encoder.weight.copy_((axes / variance.sqrt()).T.reshape_as(vae.encoder.weight))
        vae.encoder.bias.copy_(-vae.encoder.weight.sum((2, 3)) @ colour)
        vae.decoder.weight.copy_((axes * variance.sqrt()).T.reshape_as(vae.decoder.weight))
        vae.decoder.bias.copy_(colour)
    return vae


def denoiser(
    vae: PatchAutoencoder,
    scheduler: DDPMScheduler,
    pixels: torch.Tensor,
    scenes: np.ndarray,
    p: MiniDenoiser,
    compute: torch.device,
) -> tuple[Denoiser, list[float]]:
    """Train a UNet and its text encoder together on fully captioned images; a share of the captions is left empty.

    pixels: uint8 [N, 3, 64, 64]. The objective follows the scheduler's prediction_type.
    """
    rng, draws = choices("denoiser"), generator("mini", "denoiser", "noise")
    tok, channels = tokenizer(), vae.config.latent_channels
    with seeded("mini", "denoiser"):
        unet_model = UNet2DConditionModel(
            sample_size=world.SIZE // p.autoencoder.patch_size, in_channels=channels, out_channels=channels, **p.unet
        )
        text_config = CLIPTextConfig(
            vocab_size=len(tok),
            max_position_embeddings=CONTEXT_LENGTH,
            hidden_act="gelu",
            pad_token_id=tok.pad_token_id,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            **p.text_encoder,
        )
        text_model = CLIPTextModel(text_config)
    parameters = [*unet_model.to(compute).parameters(), *text_model.to(compute).parameters()]
    model = Denoiser(vae.to(compute), unet_model, text_model, tok, scheduler).to(compute)
    latents = torch.cat([model.latent(unit_range(part.to(compute))) for part in pixels.split(1000)])
    for parameter in parameters:
        parameter.requires_grad_(True)

    def loss_of(step: int) -> torch.Tensor:
        rows = rng.integers(0, len(latents), p.batch)
        captions = ["" if rng.random() < p.empty_share else world.caption(scenes[i]) for i in rows]
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=draws).to(compute)
        timestep = torch.randint(len(model.alphas_cumprod), (p.batch,), generator=draws).to(compute)
        noised = scheduler.add_noise(clean, noise, timestep)
        velocity = scheduler.config.prediction_type == "v_prediction"
        wanted = scheduler.get_velocity(clean, noise, timestep) if velocity else noise
        condition = text_model(encode(tok, captions).to(compute))[0]
        return F.mse_loss(model(noised, timestep, condition), wanted)

    losses = fit(parameters, p.steps, p.lr, loss_of, "denoiser")
    return model.requires_grad_(False), losses


def encoder(pixels: torch.Tensor, p: MiniEncoder, compute: torch.device) -> tuple[FrozenEncoder, list[float]]:
    """Train an image encoder by reconstruction: from its embedding alone, a decoder of two layers restores the image.

    pixels: uint8 [N, 3, 64, 64], and there is nothing else to learn from. What is restored are the patches' whitened
    components, in which a letter's stroke counts as much as the tint of the sky.
    """
    rng, size = choices("encoder"), (3, world.SIZE, world.SIZE)
    with seeded("mini", "encoder"):  # of pixels of -1..1
        model = new_model(p.architecture, p.arguments, input_size=size, mean=[0.5] * 3, std=[0.5] * 3)
    model.to(compute)
    vae = autoencoder(pixels, **p.target.model_dump())
    with torch.no_grad():
        wanted = torch.cat([vae.encode(unit_range(part)).latent_dist.mean for part in pixels.split(1000)]).flatten(1)
    with seeded("mini", "encoder", "decoder"):
        decoder = nn.Sequential(
            nn.Linear(model.num_features, p.decoder_width), nn.GELU(), nn.Linear(p.decoder_width, wanted.shape[1])
        ).to(compute)

    def loss_of(step: int) -> torch.Tensor:
        rows = rng.integers(0, len(pixels), p.batch)
        restored = decoder(model(unit_range(pixels[rows].to(compute))))
        return F.mse_loss(restored, wanted[rows].to(compute))

    losses = fit([*model.parameters(), *decoder.parameters()], p.steps, p.lr, loss_of, "encoder")
    return FrozenEncoder(model), losses
