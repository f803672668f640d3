"""CLIP models: published checkpoints made into open_clip's local folders, read from there, and their tokens.

open_clip_config.json  open_clip_model.safetensors  tokenizer files, if the model has its own
residual_head.safetensors where a recipe trained one
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import Compose

from pipeline.core.compute import seeded
from pipeline.core.outputs import write_json
from pipeline.core.stages import UserError
from pipeline.models.residual_head import HEAD, ResidualHead, WithHead, image_tokens

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PREFIX = "visual.residual_head."
Tensors = Mapping[str, torch.Tensor]


class ImageTower(nn.Module):
    """The image tower of a CLIP."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(pooled [B, D], patches [B, N, D]); see the function `image_tokens`."""
        return image_tokens(self.visual, pixels_BCHW)


class Backbone(nn.Module):
    """One CLIP with its own preprocessing and tokenizer."""

    def __init__(self, clip: nn.Module, tokenizer, preprocessing: dict, sha256: str) -> None:
        """sha256: of the file from which the weights were read; where there is a head, of its file's bytes after it."""
        super().__init__()
        self.clip = clip
        self.tokenizer, self.sha256 = tokenizer, sha256
        self.preprocessing, self.resizing = preprocessing, dict[str | None, Compose]()
        self.mean, self.std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
        self.image_size: int = preprocessing["size"]
        if image_tokens.dispatch(type(clip.visual)) is image_tokens.dispatch(object):
            tower = type(clip.visual).__name__
            raise UserError(
                f"image towers of type {tower} are not supported. Choose another architecture, or add its tokens to "
                "image_tokens in pipeline/models/residual_head.py."
            )
        with torch.no_grad():
            pooled_BD, patches_BND = self.image_tokens(torch.zeros(1, 3, self.image_size, self.image_size))
        self.width: int = pooled_BD.shape[1]
        self.patches: int = patches_BND.shape[1]

    @classmethod
    def load(cls, folder: Path) -> "Backbone":
        """Raises UserError where a file is missing or the tokenizer does not fit the text tower."""
        _check_files(folder)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        clip = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        entries, wanted = _entries(tokenizer), config["model_cfg"]["text_cfg"]["vocab_size"]
        if entries != wanted:  # transformers builds a wrong tokenizer, silently, when files are missing
            raise UserError(f"{folder}: the tokenizer has {entries} entries, the text tower {wanted}. Fetch it again.")
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes())
        if (folder / HEAD).is_file():
            clip.visual = WithHead(clip.visual, ResidualHead.of(load_file(folder / HEAD)))
            digest.update((folder / HEAD).read_bytes())
        return cls(clip.eval(), tokenizer, config["preprocess_cfg"], digest.hexdigest())

    @property
    def tower(self) -> ImageTower:
        return ImageTower(self.clip.visual)

    def image_tokens(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tower(pixels_BCHW)

    def preprocess(self, image: Image.Image, resize_mode: str | None = None) -> torch.Tensor:
        """The backbone's evaluation transform, an image to float [3, size, size]; resize_mode None: its own."""
        return self.normalize(torch.from_numpy(self.resize(image, resize_mode).copy())[None])[0]

    def resize(self, image: Image.Image, resize_mode: str | None = None) -> np.ndarray:
        """The transform's first half, which Pillow does without Python's lock: uint8 [size, size, 3]."""
        if resize_mode not in self.resizing:
            other = {"resize_mode": resize_mode} if resize_mode else {}
            transform = image_transform_v2(PreprocessCfg(**self.preprocessing | other), is_train=False)
            self.resizing[resize_mode] = Compose(transform.transforms[:-2])  # the last two are what `normalize` does
        return np.asarray(self.resizing[resize_mode](image))

    def normalize(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Its second half, the same to the bit for a batch on any device: uint8 to float [B, 3, size, size]."""
        pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2).contiguous().float()
        mean, std, white = (pixels_BCHW.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std, [255.0]))
        return pixels_BCHW.div_(white).sub_(mean).div_(std)  # by a tensor: a GPU divides by a number inexactly

    def encode_image(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_image(pixels_BCHW)

    def encode_text(self, ids_BL: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_text(ids_BL)

    @torch.no_grad()
    def embed(self, texts: list[str]) -> torch.Tensor:
        """The text tower's embeddings, not normalised: [texts, D]."""
        return self.encode_text(self.tokenizer(texts).to(self.clip.logit_scale.device))

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.clip.logit_scale.exp()


def _entries(tokenizer) -> int:
    """The size of the vocabulary: open_clip wraps transformers' tokenizers, and has one of its own for CLIP."""
    return len(tokenizer.tokenizer) if hasattr(tokenizer, "tokenizer") else tokenizer.vocab_size


def _check_files(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}. Correct the names of weights and backbone, or make the model: `dvc repro`."
            )


def stored_tensors(folder: Path) -> Tensors:
    """The tensors of a model's folder by name, those of its residual head included, as the model's state has them.

    Raises UserError where a file is missing.
    """
    _check_files(folder)
    head = load_file(folder / HEAD) if (folder / HEAD).is_file() else {}
    return float32({**load_file(folder / WEIGHTS), **{PREFIX + name: tensor for name, tensor in head.items()}})


def text_sha256(folder: Path) -> str:
    """Of all in a model's folder that its text embeddings depend on: text tower, its configuration, the tokenizer."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    digest = hashlib.sha256(json.dumps({key: config[key] for key in config if key != "vision_cfg"}).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix != ".safetensors" and path.name not in (CONFIG, "diva.json"):  # what is left is the tokenizer's
            digest.update(path.name.encode() + path.read_bytes())
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = (name for name in sorted(file.keys()) if not name.startswith(("visual.", "logit_")))
        return tensors_sha256(((name, file.get_tensor(name).float()) for name in names), digest)


def tensors_sha256(tensors: Iterable[tuple[str, torch.Tensor]], digest: Any = None) -> str:
    """Of tensors and their names, in this order; after what `digest` has read."""
    digest = digest or hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def float32(tensors: Tensors) -> Tensors:
    """In float32, as every model here computes; half precision would lose small updates of a weight."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def fresh_head(width: int, heads: int, seed: int) -> ResidualHead:
    """The residual head that a run of this seed starts from."""
    with seeded(seed, "head"):
        return ResidualHead(width, heads)


def save_like(original: Path, tensors: Tensors, folder: Path) -> None:
    """Write a copy of a model's folder with other weights."""
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns(WEIGHTS), dirs_exist_ok=True)
    save_weights(tensors, folder)


def save_weights(tensors: Tensors, folder: Path) -> None:
    """Write a CLIP's state; a residual head's part of it goes into a file of its own."""
    parts: dict[str, dict[str, torch.Tensor]] = {WEIGHTS: {}, HEAD: {}}
    for name, tensor in tensors.items():
        file, own = WEIGHTS, name.replace("visual.visual.", "visual.", 1)
        if name.startswith(PREFIX):
            file, own = HEAD, name.removeprefix(PREFIX)
        parts[file][own] = tensor.contiguous().cpu()
    for file, part in parts.items():
        if part:
            save_file(part, folder / file)


def model_config(architecture: str | dict[str, Any]) -> dict[str, Any]:
    """open_clip's configuration of a model by its name, or the one given. Raises UserError for an unknown name."""
    if isinstance(architecture, dict):
        return copy.deepcopy(architecture)
    config = open_clip.get_model_config(architecture)
    if config is None:
        near = [name for name in open_clip.list_models() if name.split("-")[:2] == architecture.split("-")[:2]]
        raise UserError(
            f"architecture '{architecture}': open_clip has no such model. Similar names: {', '.join(near) or '-'}"
        )
    return config


def write_config(architecture: str | dict[str, Any], preprocessing: dict[str, Any], folder: Path) -> None:
    """Make `folder` a model's folder without weights; the images' size is the architecture's."""
    config = model_config(architecture)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"size": config["vision_cfg"]["image_size"], **preprocessing}
    write_json(folder / CONFIG, {"model_cfg": config, "preprocess_cfg": preprocess})


def empty(folder: Path) -> nn.Module:
    """The model of a folder as `on_meta`."""
    return on_meta(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"])


def untrained(architecture: dict[str, Any]) -> nn.Module:
    """A model of one of open_clip's configurations, of the class that open_clip itself would choose; random weights."""
    config = copy.deepcopy(architecture)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


def on_meta(architecture: dict[str, Any]) -> nn.Module:
    """A model of one of open_clip's configurations on the meta device: names and shapes, and no memory.

    Raises UserError where the configuration makes none, or lacks what a folder of a model needs beside.
    """
    try:
        for part, number in (("vision_cfg", "image_size"), ("text_cfg", "vocab_size")):
            _ = architecture[part][number] + 0
        with torch.device("meta"):
            return untrained(architecture)
    except Exception as error:  # open_clip, timm and torch raise any
        raise UserError(
            f"the architecture makes no model ({type(error).__name__}: {error}). Correct it by the files in "
            "open_clip/model_configs, or name one of them."
        ) from error
