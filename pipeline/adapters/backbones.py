"""CLIP models, read from open_clip's local folders, and the stock calls that give their tokens.

open_clip_config.json  open_clip_model.safetensors  tokenizer files where the model brings its own
"""

import json
import shutil
import warnings
from functools import singledispatch
from pathlib import Path

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer as OpenClipViT
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from pipeline.runtime import UserError

with warnings.catch_warnings():  # openai-clip imports pkg_resources, which says at every import that it is old
    warnings.simplefilter("ignore")
    from clip.model import VisionTransformer as OpenAIViT

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


@singledispatch
def image_tokens(visual: nn.Module, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled [B, D], patches [B, N, D]) of an image tower: every token after the final norm and the projection."""
    raise UserError(f"no rule for the tokens of an image tower of type {type(visual).__name__}")


@image_tokens.register
def _(visual: OpenAIViT, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks: list[torch.Tensor] = []
    handle = visual.transformer.register_forward_hook(lambda module, inputs, output: blocks.append(output))
    try:
        pooled_BD = visual(pixels_BCHW)
    finally:
        handle.remove()
    tokens_BTD = visual.ln_post(blocks[0].transpose(0, 1)) @ visual.proj
    return pooled_BD, tokens_BTD[:, 1:]


@image_tokens.register
def _(visual: OpenClipViT, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = visual.forward_intermediates(
        pixels_BCHW, indices=1, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True
    )
    return outputs["image_features"], outputs["image_intermediates"][0] @ visual.proj


@image_tokens.register
def _(visual: TimmViT, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens_BTD = visual.forward_features(pixels_BCHW)
    return visual.forward_head(tokens_BTD), tokens_BTD[:, visual.num_prefix_tokens :]


@image_tokens.register
def _(visual: TimmModel, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pooled_BD, patches_BND = image_tokens(visual.trunk, pixels_BCHW)
    return visual.head(pooled_BD), visual.head(patches_BND)


class Backbone(nn.Module):
    """One CLIP with its own preprocessing and tokenizer."""

    def __init__(self, clip: nn.Module, tokenizer, preprocessing: dict) -> None:
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self.mean, self.std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
        self.image_size: int = preprocessing["size"]
        with torch.no_grad():
            pooled_BD, patches_BND = self.image_tokens(torch.zeros(1, 3, self.image_size, self.image_size))
        self.width: int = pooled_BD.shape[1]
        self.patches: int = patches_BND.shape[1]
        self._transform = image_transform_v2(PreprocessCfg(**preprocessing), is_train=False)

    @classmethod
    def load(cls, folder: Path) -> "Backbone":
        """Raises UserError where a file is missing or the tokenizer does not fit the text tower."""
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no {name}. Run `dvc repro`.")
        config = json.loads((folder / CONFIG).read_text())
        clip = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        entries, wanted = len(tokenizer.tokenizer), config["model_cfg"]["text_cfg"]["vocab_size"]
        if entries != wanted:  # transformers builds a wrong tokenizer, silently, when files are missing
            raise UserError(f"{folder}: the tokenizer has {entries} entries, the text tower {wanted}. Fetch it again.")
        return cls(clip.eval(), tokenizer, config["preprocess_cfg"])

    @property
    def tower(self) -> nn.Module:
        return self.clip.visual

    def image_tokens(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(pooled [B, D], patches [B, N, D]); see the function of the same name."""
        return image_tokens(self.clip.visual, pixels_BCHW)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """The backbone's own evaluation transform: a picture to float [3, size, size]."""
        return self._transform(image)

    def encode_image(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_image(pixels_BCHW)

    def encode_text(self, ids_BL: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_text(ids_BL)

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.clip.logit_scale.exp()

    def save_like(self, original: Path, folder: Path) -> None:
        """Write these weights into a copy of the folder they came from."""
        shutil.copytree(original, folder, ignore=shutil.ignore_patterns(WEIGHTS))
        save_weights(self.clip, folder)


def save_weights(clip: nn.Module, folder: Path) -> None:
    save_file({name: tensor.contiguous().cpu() for name, tensor in clip.state_dict().items()}, folder / WEIGHTS)


def write(clip: nn.Module, tokenizer, architecture: dict, preprocessing: dict, folder: Path) -> None:
    """Write a model that was made here as one of open_clip's local folders."""
    folder.mkdir(parents=True)
    config = {"model_cfg": architecture, "preprocess_cfg": preprocessing}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    save_weights(clip, folder)
