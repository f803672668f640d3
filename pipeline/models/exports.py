"""Exports: one folder that open_clip and transformers load, and a check that both give the backbone's embeddings.

open_clip_config.json  open_clip_model.safetensors                       open_clip
config.json  model.safetensors  preprocessor_config.json                 transformers (CLIPModel or SiglipModel)
tokenizer.json  tokenizer_config.json                                    transformers; open_clip for all but CLIP's own
"""

import re
import runpy
import shutil
from functools import singledispatch
from pathlib import Path

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as OpenClipViT
from PIL import Image, ImageOps
from timm.layers import GELUTanh
from timm.models.vision_transformer import VisionTransformer as TimmViT
from tokenizers import Regex, Tokenizer, normalizers
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from pipeline.core.stages import UserError
from pipeline.models import residual_head
from pipeline.models.backbones import CONFIG, WEIGHTS, Backbone, Tensors
from pipeline.models.residual_head import HEAD, WithHead

TOLERANCE = 1e-4  # of an embedding's length, float32
GREY_LEVELS = 4  # Pillow rounds to grey levels between the two passes of a resize, too; seen: 2, enlarging 70 px to 378

RESBLOCKS = (  # open_clip's names to transformers', in this order
    (r"transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
TEXT = (
    *RESBLOCKS,
    (r"^text\.", ""),
    (r"^(token_embedding\.)", r"text_model.embeddings.\1"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^(encoder\.)", r"text_model.\1"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
)
CLIP = (
    *TEXT,
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.(encoder\.)", r"vision_model.\1"),
    (r"^text_projection$", "text_projection.weight"),
)
SIGLIP = (
    *TEXT,
    (r"^text_projection\.", "text_model.head."),
    (r"^visual\.trunk\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.trunk\.pos_embed$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.trunk\.norm\.", "vision_model.post_layernorm."),
    (r"^visual\.trunk\.attn_pool\.latent$", "vision_model.head.probe"),
    (r"^visual\.trunk\.attn_pool\.(q|kv)\.", r"vision_model.head.attention.\1."),
    (r"^visual\.trunk\.attn_pool\.proj\.", "vision_model.head.attention.out_proj."),
    (r"^visual\.trunk\.attn_pool\.norm\.", "vision_model.head.layernorm."),
    (r"^visual\.trunk\.attn_pool\.(mlp\.)", r"vision_model.head.\1"),
    (r"^visual\.trunk\.blocks\.(\d+\.)norm([12])\.", r"vision_model.encoder.layers.\1layer_norm\2."),
    (r"^visual\.trunk\.blocks\.(\d+\.)(mlp\.)", r"vision_model.encoder.layers.\1\2"),
    (r"^visual\.trunk\.blocks\.(\d+\.)self_attn\.proj\.", r"vision_model.encoder.layers.\1self_attn.out_proj."),
    (r"^visual\.trunk\.blocks\.(\d+\.)self_attn\.qkv\.", r"vision_model.encoder.layers.\1self_attn.in_proj_"),
)


class OpenClipOnly(Exception):
    """transformers has no class for this model."""


def write(backbone: Backbone, original: Path, folder: Path) -> str | None:
    """Write the folder with both formats. Returns why there is no transformers format, if there is none."""
    headed = isinstance(backbone.clip.visual, WithHead)
    base = folder / "tower" if headed else folder  # a tower without its head would load and embed wrongly
    base.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copy(original / name, base)
    tok = tokenizer(backbone)
    tok.save_pretrained(base)
    said = base / "tokenizer_config.json"  # transformers 5 reads its classes' older names, too; 4 no other
    said.write_text(
        said.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8"
    )
    if headed:
        shutil.copy(original / HEAD, folder)
        shutil.copy(residual_head.__file__, folder)
        return "transformers has no class with a residual head; open_clip's model gets it from residual_head.py"
    try:
        transformers_model(backbone.clip, tok).save_pretrained(folder)
    except OpenClipOnly as reason:
        return str(reason)
    image_processor(backbone).save_pretrained(folder)
    return None


def tokenizer(backbone: Backbone) -> PreTrainedTokenizerFast:
    """The tokenizer as one of transformers'; what open_clip does to a text before it is part of it.

    It does not fix broken Unicode and HTML, as open_clip's basic_clean does.
    """
    own = backbone.tokenizer
    if not isinstance(own, HFTokenizer):  # CLIP's; transformers spells its last two entries differently
        words = [*list(own.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
        vocabulary, merges = {word: i for i, word in enumerate(words)}, list(own.bpe_ranks)
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=own.context_length)
    backend = Tokenizer.from_str(own.tokenizer.backend_tokenizer.to_str())
    if own.clean_fn("A.") == "a":  # SigLIP's texts are canonicalized
        # Python's string.punctuation, but for the underscore, which becomes a space
        steps: list[normalizers.Normalizer] = [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(r"[!-/:-@\[-\^`{-~]"), ""),
        ]
        steps += [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    backend.no_padding()
    backend.no_truncation()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=own.context_length,
        padding_side="right",
        # A mask of the padding would change SigLIP's embeddings, which were learnt without one.
        model_input_names=["input_ids"],
        **{key: str(token) for key, token in own.tokenizer.special_tokens_map.items() if isinstance(token, str)},
    )


@singledispatch
def transformers_model(clip: nn.Module, tok: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The same model as a class of transformers. Raises OpenClipOnly if transformers has no class for it."""
    raise OpenClipOnly(f"transformers has no class for {type(clip).__name__}")


@transformers_model.register
def _(clip: open_clip.CLIP, tok: PreTrainedTokenizerFast) -> CLIPModel:
    visual = clip.visual
    if not isinstance(visual, OpenClipViT):
        raise OpenClipOnly(f"transformers' CLIPModel has no image tower of type {type(visual).__name__}")
    vision = {"image_size": visual.image_size[0], "patch_size": visual.patch_size[0]}
    dimension = clip.text_projection.shape[1]
    config = CLIPConfig(
        projection_dim=dimension,
        vision_config={**_encoder(visual.transformer.resblocks), **vision, "projection_dim": dimension},
        text_config={**_text(clip, tok), "projection_dim": dimension},
    )
    tensors = _renamed(clip.state_dict(), CLIP)
    for name in ("visual_projection.weight", "text_projection.weight"):
        tensors[name] = tensors[name].T
    return _filled(CLIPModel, config, tensors)


@transformers_model.register
def _(clip: open_clip.CustomTextCLIP, tok: PreTrainedTokenizerFast) -> SiglipModel:
    visual = clip.visual
    trunk = visual.trunk if isinstance(visual, TimmModel) else visual
    if not isinstance(trunk, TimmViT) or trunk.attn_pool is None or clip.text.pool_type != "last":
        raise OpenClipOnly(
            f"transformers' SiglipModel has no image tower of type {type(trunk).__name__}, or text pooling"
        )
    vision = {"image_size": trunk.patch_embed.img_size[0], "patch_size": trunk.patch_embed.patch_size[0]}
    text = {**_text(clip.text, tok), "projection_size": clip.text.text_projection.out_features}
    tensors = _renamed(clip.state_dict(), SIGLIP)
    head, embedding = "vision_model.head.attention", "vision_model.embeddings.position_embedding.weight"
    for kind in ("weight", "bias"):
        tensors[f"{head}.in_proj_{kind}"] = torch.cat([tensors.pop(f"{head}.{part}.{kind}") for part in ("q", "kv")])
    tensors[embedding] = tensors[embedding][0]
    for name in ("logit_scale", "logit_bias"):
        tensors[name] = tensors[name].reshape(1)
    config = SiglipConfig(vision_config={**_encoder(trunk.blocks), **vision}, text_config=text)
    return _filled(SiglipModel, config, tensors)


def _encoder(blocks: nn.Sequential | nn.ModuleList) -> dict:
    """The part of a tower's configuration that its blocks tell, open_clip's or timm's."""
    block = blocks[0]
    norm, fc, activation = (
        (block.norm1, block.mlp.fc1, block.mlp.act)
        if hasattr(block, "norm1")
        else (block.ln_1, block.mlp.c_fc, block.mlp.gelu)
    )
    return {
        "hidden_size": fc.in_features, "intermediate_size": fc.out_features, "num_hidden_layers": len(blocks),
        "num_attention_heads": block.attn.num_heads, "hidden_act": _activation(activation), "layer_norm_eps": norm.eps,
    }  # fmt: skip


def _text(text: nn.Module, tok: PreTrainedTokenizerFast) -> dict:
    ids = {f"{name}_token_id": getattr(tok, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    size = {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length}
    return {**_encoder(text.transformer.resblocks), **size, **ids}


def _activation(module: nn.Module) -> str:
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    tanh = isinstance(module, GELUTanh) or getattr(module, "approximate", "none") == "tanh"
    return "gelu_pytorch_tanh" if tanh else "gelu"


def _renamed(tensors: Tensors, table: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    """Tensors by transformers' names; the one projection to queries, keys and values becomes three."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, new in table:
            name = re.sub(pattern, new, name)
        stem, joined, kind = name.partition(".self_attn.in_proj_")
        if joined:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            found |= {f"{stem}.self_attn.{part}_proj.{kind}": chunk.clone() for part, chunk in parts}
        else:
            found[name] = tensor
    return found


def _filled(kind: type[PreTrainedModel], config: CLIPConfig | SiglipConfig, tensors: Tensors) -> PreTrainedModel:
    with torch.device("meta"):
        model = kind(config)
    try:
        model.load_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:  # tensors that are left over or missing
        raise OpenClipOnly(f"transformers' {kind.__name__} is of another shape: {error}") from error
    return model


def image_processor(backbone: Backbone) -> CLIPImageProcessor | SiglipImageProcessor:
    p, square = backbone.preprocessing, {"height": backbone.image_size, "width": backbone.image_size}
    squash = p["resize_mode"] == "squash"
    values = {
        "size": square if squash else {"shortest_edge": backbone.image_size},
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        "resample": getattr(Image.Resampling, p["interpolation"].upper()),
    }
    if isinstance(backbone.clip, open_clip.CustomTextCLIP):
        return SiglipImageProcessor(**values)
    return CLIPImageProcessor(**values, crop_size=square)  # a squashed image needs no crop, but LLaVA reads crop_size


@torch.no_grad()
def verify(
    backbone: Backbone, folder: Path, images: list[Image.Image], texts: list[str], compute: torch.device
) -> dict[str, dict[str, float]]:
    """Load the folder as a user would, in each of its formats, and compare with the backbone.

    Returns by format the largest distance between an embedding and the backbone's own, as a share of its length, for
    the same pixels and token ids; and `through_processor`, the same for images as transformers' own processor makes
    them, whose resizing and cropping are not quite torchvision's. Raises UserError where the former exceeds TOLERANCE,
    token ids differ, or the processor's pixels of a square image differ by more than GREY_LEVELS.
    """
    pixels, ids = torch.stack([backbone.preprocess(image) for image in images]).to(compute), backbone.tokenizer(texts)
    wanted = {"image": backbone.encode_image(pixels), "text": backbone.encode_text(ids.to(compute))}

    if (folder / HEAD).exists():
        model, preprocess, tok = runpy.run_path(str(folder / "residual_head.py"))["load"](folder)
    else:
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tok = open_clip.get_tokenizer(f"local-dir:{folder}")
    model, found_ids = model.to(compute).eval(), tok(texts)
    _same_ids(found_ids, ids, texts, "open_clip's tokenizer")
    seen = torch.stack([preprocess(image) for image in images]).to(compute)
    found = {"image": model.encode_image(seen), "text": model.encode_text(found_ids.to(compute))}
    result = {"open_clip": _distances(found, wanted, "open_clip")}
    if not (folder / "config.json").exists():
        return result

    model = AutoModel.from_pretrained(folder).to(compute).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prepared = processor(text=texts, images=images, padding="max_length", truncation=True, return_tensors="pt")
    read = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(model, CLIPModel):  # which does not read what follows the end token, the largest id
        read = torch.arange(ids.shape[1]) <= ids.argmax(1, keepdim=True)
    _same_ids(prepared.input_ids.where(read, 0), ids.where(read, 0), texts, "transformers' tokenizer")
    _same_pixels(backbone, processor, images)
    prepared = prepared.to(compute)
    text_inputs = {key: value for key, value in prepared.items() if key != "pixel_values"}
    embedded = model.get_text_features(**text_inputs).pooler_output
    found = {"image": model.get_image_features(pixel_values=pixels).pooler_output, "text": embedded}
    result["transformers"] = _distances(found, wanted, "transformers")
    through = model.get_image_features(pixel_values=prepared.pixel_values).pooler_output
    result["transformers"]["through_processor"] = _distance(through, wanted["image"])
    return result


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(f"{((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item():.1e}")


def _distances(found: Tensors, wanted: Tensors, form: str) -> dict[str, float]:
    distances = {kind: _distance(found[kind], wanted[kind]) for kind in wanted}
    for kind, distance in distances.items():
        if not distance <= TOLERANCE:  # NaN is wrong, too
            raise UserError(
                f"the {form} export's {kind} embeddings are not the backbone's: {distance} of their length away, "
                f"{TOLERANCE} allowed. Please report this with the backbone's name; nothing was written."
            )
    return distances


def _same_ids(found: torch.Tensor, wanted: torch.Tensor, texts: list[str], what: str) -> None:
    wrong = [text for text, a, b in zip(texts, found, wanted, strict=True) if not torch.equal(a, b)]
    if wrong:
        raise UserError(
            f"{what} of the export gives other token ids for {len(wrong)} of {len(texts)} texts, first: {wrong[0]!r}"
        )


def _same_pixels(backbone: Backbone, processor, images: list[Image.Image]) -> None:
    squares = [ImageOps.fit(image, (min(image.size),) * 2) for image in images]
    found = processor(images=squares, return_tensors="pt").pixel_values
    wanted = torch.stack([backbone.preprocess(image) for image in squares])
    levels = 255 * (found - wanted).abs().amax((0, 2, 3)) * torch.tensor(backbone.std)
    if not levels.max() <= GREY_LEVELS:
        raise UserError(
            f"transformers' processor of the export shows square images up to {levels.max():.1f} grey levels "
            f"differently, {GREY_LEVELS} allowed. Please report this with the backbone's name; nothing was written."
        )
