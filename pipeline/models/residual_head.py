"""The tokens of an image tower, and a residual head that carries more of them into its embedding.

This file is complete in itself, for it travels with every export of a backbone that has such a head:

    from residual_head import load
    model, preprocess, tokenizer = load("the folder")        # an open_clip model
"""

from functools import singledispatch
from pathlib import Path

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipViT
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torch.nn import functional as F

HEAD, HEADS = "residual_head.safetensors", "heads"


@singledispatch
def image_tokens(visual: nn.Module, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled [B, D], patches [B, N, D]) of an image tower: every token after the final norm and the projection."""
    raise TypeError(f"no rule for the tokens of an image tower of type {type(visual).__name__}")


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


class ResidualHead(nn.Module):
    """Attends from the pooled token to the patches, and adds what it finds; of the length that the pooled token had.

    The last layer starts at zero, and with it the head: before training it changes nothing.
    """

    def __init__(self, width: int, heads: int) -> None:
        """width: of the embedding; heads: of the attention, which must divide it."""
        super().__init__()
        self.norm_pooled, self.norm_patches, self.norm_found = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.register_buffer(HEADS, torch.tensor(heads))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> "ResidualHead":
        """The head whose state these tensors are."""
        head = cls(len(tensors["norm_pooled.weight"]), int(tensors[HEADS]))
        head.load_state_dict(tensors)
        return head

    def forward(self, pooled_BD: torch.Tensor, patches_BND: torch.Tensor) -> torch.Tensor:
        patches_BND = self.norm_patches(patches_BND)
        query_B1D = self.norm_pooled(pooled_BD)[:, None]
        found_B1D = query_B1D + self.attention(query_B1D, patches_BND, patches_BND, need_weights=False)[0]
        added_BD = F.normalize(pooled_BD, dim=-1) + self.mlp(self.norm_found(found_B1D[:, 0]))
        return F.normalize(added_BD, dim=-1) * pooled_BD.norm(dim=-1, keepdim=True)


class WithHead(nn.Module):
    """An image tower and its residual head, in the place of the image tower of an open_clip model."""

    def __init__(self, visual: nn.Module, residual_head: ResidualHead) -> None:
        super().__init__()
        self.visual, self.residual_head = visual, residual_head

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return image_tokens(self, pixels_BCHW)[0]


@image_tokens.register
def _(visual: WithHead, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pooled_BD, patches_BND = image_tokens(visual.visual, pixels_BCHW)
    return visual.residual_head(pooled_BD, patches_BND), patches_BND


def load(folder: str | Path) -> tuple[nn.Module, object, object]:
    """(model, preprocess, tokenizer) of an exported folder, whose subfolder `tower` is open_clip's own format."""
    tower = f"local-dir:{Path(folder, 'tower')}"
    model, _, preprocess = open_clip.create_model_and_transforms(tower)
    model.visual = WithHead(model.visual, ResidualHead.of(load_file(Path(folder, HEAD))))
    return model.eval(), preprocess, open_clip.get_tokenizer(tower)
