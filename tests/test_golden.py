"""The pipeline's own code against arrays that the authors' unmodified code gave (tests/golden/README.md)."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipeline.diva.condition import pool, recap
from pipeline.diva.diffusion import Draw, add_noise
from pipeline.diva.feedback import Feedback
from pipeline.diva.losses import Denoise
from pipeline.diva.pixels import IMAGENET, OPENAI, PixelRule, denoiser_pixels, tower_pixels
from pipeline.diva.rules import STOCK, PoolingRule, TokenRule
from pipeline.diva.schedule import Phase, learning_rate
from pipeline.diva.step import MicroBatch, run, terms
from pipeline.models.backbones import Backbone
from pipeline.models.stable_diffusion import Denoiser

GOLDEN = Path(__file__).parent / "golden"
Arrays = dict[str, torch.Tensor]


def openai_clip() -> nn.Module:
    return open_clip.model.CLIP(
        embed_dim=32,
        quick_gelu=True,
        vision_cfg={"image_size": 56, "layers": 2, "width": 64, "head_width": 64, "patch_size": 7},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    )


def metaclip() -> nn.Module:
    return open_clip.model.CLIP(
        embed_dim=40,
        quick_gelu=True,
        vision_cfg={"image_size": 56, "layers": 2, "width": 48, "head_width": 24, "patch_size": 7},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 1},
    )


@timm.models.register_model
def golden_siglip(**_: object) -> VisionTransformer:
    """The image tower under a name by which open_clip can build it."""
    return VisionTransformer(
        img_size=56, patch_size=7, embed_dim=48, depth=2, num_heads=2, mlp_ratio=3.7362, class_token=False,
        global_pool="map", num_classes=0,
    )  # fmt: skip


def siglip() -> nn.Module:
    return open_clip.model.CustomTextCLIP(
        embed_dim=48,
        init_logit_bias=-10,
        vision_cfg={"timm_model_name": "golden_siglip", "timm_pool": "map", "timm_proj": "none", "image_size": 56},
        text_cfg={
            "context_length": 16, "vocab_size": 64, "width": 48, "heads": 2, "layers": 1, "mlp_ratio": 3.7362,
            "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What differs between families; eval_rows: the rows of `eval_idx` with which statements 1 and 2 see the images."""

    weights: str
    build: Callable[[], nn.Module]
    tokens: TokenRule
    text: str
    pooling: PoolingRule
    scale: float | None = None
    eval_rows: tuple[int, int] = (0, 1)


VARIANTS = {
    "openai": Variant(
        "openai",
        openai_clip,
        TokenRule("random", 76),
        "sequence",
        PoolingRule(TokenRule("random", 76)),
        eval_rows=(1, 3),
    ),
    "metaclip": Variant(
        "openclip",
        metaclip,
        TokenRule("all"),
        "mean",
        PoolingRule(TokenRule("all"), normalize_tokens=True),
        scale=100.0,
    ),
    "siglip224": Variant("siglip", siglip, TokenRule("windows", 6), "mean", STOCK),
}
PIXELS = PixelRule(OPENAI, IMAGENET, 56, antialias=False)
SGD = {"sgd": (1e-4, math.inf), "sgdclip": (1e-4, 1.0), "sgdbig": (1.0, 0.25)}  # rate and clip of each golden pair


@cache
def arrays(name: str) -> Arrays:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind != "U"}


@cache
def names(variant: str, key: str) -> list[str]:
    with np.load(GOLDEN / f"{variant}.npz") as file:
        return [str(name) for name in file[key]]


def state(name: str, prefix: str = "w.") -> Arrays:
    """The state dict below a prefix, its big embeddings made dense."""
    stored = arrays(name)
    weights = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    sparse = "sparse." + prefix.removeprefix("w.")
    for key in (key.removesuffix(".ids") for key in stored if key.startswith(sparse) and key.endswith(".ids")):
        dense = torch.zeros(stored[f"{key}.shape"].tolist())
        dense[stored[f"{key}.ids"].long()] = stored[f"{key}.rows"]
        weights[key.removeprefix(sparse)] = dense
    return weights


@cache
def denoiser() -> Denoiser:
    vae = AutoencoderKL(
        3, 3, ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, block_out_channels=(8, 8, 16, 16),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=128,
    )  # fmt: skip
    absent = vae.load_state_dict(state("sd_weights", "vae."), strict=False)
    assert not absent.unexpected_keys
    assert {key.split(".")[0] for key in absent.missing_keys} == {"decoder", "post_quant_conv"}
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
        cross_attention_dim=32, attention_head_dim=(2, 4), norm_num_groups=8, use_linear_projection=True,
    )  # fmt: skip
    unet.load_state_dict(state("sd_weights", "unet."))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=77, hidden_act="gelu", projection_dim=32,
        )
    )  # fmt: skip
    text_encoder.load_state_dict(state("sd_weights", "text."))
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    bpe = SimpleTokenizer()  # CLIP's vocabulary; transformers spells its last two entries otherwise
    words = [*list(bpe.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=list(bpe.bpe_ranks))
    return Denoiser(vae, unet, text_encoder, tokenizer, scheduler)


@dataclass(frozen=True)
class Case:
    """One variant, its golden arrays, and the pipeline's objects with the golden weights."""

    name: str
    variant: Variant
    golden: Arrays
    backbone: Backbone
    feedback: Feedback

    def drawn(self, key: str) -> list[torch.Tensor | None]:
        """Token positions row by row; None for both inner steps where the variant draws none."""
        return list(self.golden[key].long()) if key in self.golden else [None, None]

    def micro_batch(self) -> MicroBatch:
        times, noises = self.golden["train_t"].long(), self.golden["train_noise"]
        draws = [Draw(*parts) for parts in zip(times, noises, self.drawn("train_idx"), strict=True)]
        return MicroBatch(arrays("common")["image_u8"].permute(0, 3, 1, 2), draws)

    def losses(self) -> torch.Tensor:
        return terms(self.feedback, [Denoise(1.0)], self.micro_batch(), torch.float32)["denoise"]

    def parameters(self, feedback: Feedback | None = None) -> dict[str, nn.Parameter]:
        """CLIP's and the projection's parameters, named as upstream names them."""
        feedback = feedback or self.feedback
        clip = dict(self.backbone.clip.named_parameters()) | dict(feedback.tower.named_parameters())
        return clip | {f"visual_proj.{name}": value for name, value in feedback.projection.named_parameters()}


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest) -> Case:
    variant, golden = VARIANTS[request.param], arrays(request.param)
    clip = variant.build()
    clip.load_state_dict(state(f"{variant.weights}_weights"))
    backbone = Backbone(clip, None, {"size": 56, "mean": OPENAI.mean, "std": OPENAI.std}, "")
    projection = nn.Linear(backbone.width, 32)
    projection.load_state_dict(state(request.param, "w.visual_proj."))
    text = arrays("common")["sd_text_embedding"]
    clip.requires_grad_(False)
    feedback = Feedback(backbone.tower, projection, denoiser(), text, variant.tokens, variant.text, PIXELS)
    feedback.requires_grad_(False)
    for module in (backbone.tower, projection):
        module.requires_grad_(True)
    return Case(request.param, variant, golden, backbone, feedback)


def close(actual: torch.Tensor, expected: torch.Tensor, absolute: float = 0.0, relative: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach(), expected, atol=absolute, rtol=relative)


def norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack([tensor.norm() for tensor in tensors]))


# ---------------------------------------------------------------------------------------------- what all variants share


def test_pixels_are_those_of_the_published_data_path() -> None:
    common = arrays("common")
    raw = common["image_u8"].permute(0, 3, 1, 2).float() / 255
    close(OPENAI.apply(raw), common["image"], absolute=1e-5)
    close(tower_pixels(raw, OPENAI, 56, antialias=False), common["discrimi_image"], absolute=1e-5)
    close(tower_pixels(raw, OPENAI, 56, antialias=True), common["discrimi_image_antialias"], absolute=1e-5)
    close(denoiser_pixels(raw, OPENAI, IMAGENET), common["renormed_image"], absolute=1e-5)


@pytest.mark.slow
def test_denoiser_is_the_published_one() -> None:
    common = arrays("common")
    close(denoiser().latent(common["renormed_image"]), common["latent"], absolute=1e-5)
    close(denoiser().text(["a photo of a ."]), common["sd_text_embedding"], absolute=1e-5)
    close(denoiser().alphas_cumprod, common["alphas_cumprod"], absolute=1e-6)


def test_learning_rate() -> None:
    stored = arrays("lr")
    total = int(stored["total_steps"])
    rates = [learning_rate(step, total, 1e-4, 0.005) for step in range(total + 1)]
    np.testing.assert_allclose(np.array(rates)[stored["steps"]], stored["lr_f64"], rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose(rates[:total:10], stored["all_lr_f64"], rtol=1e-9, atol=1e-18)
    assert rates.index(max(rates)) == stored["warmup_steps"]


# --------------------------------------------------------------------------------------------------------- each variant


def test_condition(case: Case) -> None:
    golden, micro = case.golden, case.micro_batch()
    pooled, patches = case.backbone.image_tokens(PIXELS.tower(micro.images_BCHW))
    positions = golden["cond_idx"].long() if "cond_idx" in golden else None
    close(recap(pooled, patches, case.variant.tokens, positions), golden["cond_tokens"], absolute=1e-5)
    for k, draw in enumerate(micro.draws):
        tokens = recap(pooled, patches, case.variant.tokens, draw.positions_BK)
        close(tokens, golden["train_tokens"][k], absolute=1e-5)
        close(case.feedback.condition(pooled, patches, draw.positions_BK), golden["train_context"][k], absolute=1e-5)


def test_noising_and_prediction(case: Case) -> None:
    golden, micro, latent = case.golden, case.micro_batch(), arrays("common")["latent"]
    for k, draw in enumerate(micro.draws):
        noised = add_noise(latent, draw.noise_BChw, draw.timestep_B, denoiser().alphas_cumprod)
        close(noised, golden["train_noised_latent"][k], absolute=1e-5)
        predicted = denoiser()(noised, draw.timestep_B, golden["train_context"][k])
        close(predicted, golden["train_pred_noise"][k], absolute=1e-5)


def test_losses(case: Case) -> None:
    close(case.losses(), case.golden["train_loss"], relative=1e-5)


def test_gradients(case: Case) -> None:
    golden, trained = case.golden, names(case.name, "grad_names")
    losses, parameters = case.losses(), case.parameters()
    reached = [name for name, parameter in parameters.items() if parameter.requires_grad]
    assert set(reached) == set(trained)
    assert set(parameters) - set(reached) == set(names(case.name, "grad_none_names"))
    assert names(case.name, "grad_zero_names") == ["class_model.final_fc.weight"]  # left out here

    def gradients(weights: list[float]) -> Arrays:
        loss = (torch.tensor(weights) * losses).sum()
        found = torch.autograd.grad(loss, [parameters[name] for name in trained], retain_graph=True)
        return dict(zip(trained, found, strict=True))

    whole = {"first": [1.0, 0.0], "second": [0.0, 1.0], "total": [1.0, 1.0]}
    for which, weights in whole.items():
        found = gradients(weights)
        assert all(gradient.any() for gradient in found.values())
        norms = torch.stack([gradient.norm() for gradient in found.values()])
        close(norms, golden[f"grad_norm_{which}"], relative=1e-4)
        for key in (key for key in golden if key.startswith(f"grad_{which}.")):
            gradient = found[key.removeprefix(f"grad_{which}.")]
            assert (gradient - golden[key]).norm() < 1e-4 * golden[key].norm(), key
    close(norm(list(found.values())), golden["grad_global_norm_total"], relative=1e-5)
    published = gradients(
        [weight / 5 for weight in (5.0, 1.0)]
    )  # the recipe's draw_weights, in one of five micro-batches
    close(norm(list(published.values())), golden["grad_global_norm_first_plus_second_over5"], relative=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", SGD)
def test_sgd_steps(case: Case, prefix: str) -> None:
    """The first step is the pipeline's own; the second repeats the optimizer's on the gradient that the first left."""
    lr, clip_norm = SGD[prefix]
    feedback = copy.deepcopy(case.feedback)
    parameters = case.parameters(feedback)
    trained = [*feedback.tower.parameters(), *feedback.projection.parameters()]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, fused=True)
    phase = Phase("tower", 1, 2, trained, optimizer, lambda step: lr, [1.0, 1.0], clip_norm, [Denoise(1.0)])
    ((record, _),) = run(feedback, phase, lambda step: [case.micro_batch()], torch.float32, Accelerator(cpu=True))
    assert record.gradient_norm == pytest.approx(float(case.golden["grad_global_norm_total"]), rel=1e-5)
    assert record.loss == pytest.approx(float(case.golden["train_loss"].mean()), rel=1e-5)
    for step in ("step1", "step2"):
        stored = [key for key in case.golden if key.startswith(f"{prefix}_{step}.")]
        assert len(stored) == 4
        for key in stored:
            name, expected = key.removeprefix(f"{prefix}_{step}."), case.golden[key]
            moved = (expected - case.parameters()[name].detach()).abs().max().item()
            close(parameters[name], expected, absolute=1.5e-7 + 1e-4 * moved)  # small steps are a few float32 ulps
        optimizer.step()


@torch.no_grad()
def test_read_outs(case: Case) -> None:
    golden, variant = case.golden, case.variant
    pooled, patches = case.backbone.image_tokens(golden["eval_images"])
    text = nn.functional.normalize(case.backbone.encode_text(golden["eval_text_ids"].long()), dim=-1)
    close(text, golden["eval_text_features"], absolute=1e-5)
    local = [case.drawn("eval_idx")[row] for row in variant.eval_rows]
    images = torch.stack([pool(pooled, patches, variant.pooling, positions) for positions in local])
    close(images, golden["eval_image_features"].expand(2, 2, -1), absolute=1e-5)  # [text, image, D]
    scale = variant.scale or case.backbone.logit_scale
    bias = getattr(case.backbone.clip, "logit_bias", None)
    logits = scale * torch.einsum("td,tid->ti", text, images) + (0 if bias is None else bias)
    close(logits, golden["eval_logits_per_text"], relative=1e-5, absolute=1e-4)
    close(logits.softmax(-1), golden["eval_probs"], absolute=1e-5)
