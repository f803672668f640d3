"""Random-weight checkpoints in the formats in which the published ones come, of tiny or of true size."""

import csv
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import clip.model
import open_clip
import timm
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save_file
from timm.models import register_model
from timm.models._hub import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

from pipeline.mini import world
from pipeline.models.registry import complete
from pipeline.sections import params
from pipeline.tools import bench

COMMITTED = params.load(Path(__file__).parents[1] / "params.yaml")
SOURCES = {  # of the published backbones, with what open_clip's registry has
    name: complete(name, entry.source) for name, entry in COMMITTED.backbones.items() if entry.profile == "paper"
}

OPENAI = {
    "embed_dim": 32, "quick_gelu": True,
    "vision_cfg": {"image_size": 70, "layers": 2, "width": 64, "head_width": 64, "patch_size": 7},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}  # fmt: skip
OPENCLIP = OPENAI | {"embed_dim": 40, "vision_cfg": {**OPENAI["vision_cfg"], "width": 48, "head_width": 24}}
SIGLIP = {
    "embed_dim": 96, "init_logit_bias": -10, "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit3", "timm_model_pretrained": False,
                   "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {"context_length": 16, "vocab_size": 32000, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
                 "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 96, "heads": 2, "layers": 1,
                 "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
}  # fmt: skip
STABLE_DIFFUSION = {  # the shapes of stable-diffusion-2-1-base, smaller
    "unet": {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (1, 2), "cross_attention_dim": 32, "norm_num_groups": 4, "use_linear_projection": True,
    },
    "vae": {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "projection_dim": 32},
}  # fmt: skip


@register_model
def vit_tiny_siglip(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """An image tower of SigLIP's kind; timm's own small ones have register tokens."""
    assert options["global_pool"] == "map"
    return VisionTransformer(
        img_size=70, patch_size=7, embed_dim=96, depth=2, num_heads=3, mlp_ratio=3.7, class_token=False,
        num_classes=0, global_pool="map",
    )  # fmt: skip


TINY_SIGLIP = SIGLIP | {
    "vision_cfg": {**SIGLIP["vision_cfg"], "image_size": 70, "timm_model_name": "vit_tiny_siglip"},
    "text_cfg": {**SIGLIP["text_cfg"], "mlp_ratio": 3.7},
}


def build(architecture: str | Mapping[str, Any], seed: int) -> nn.Module:
    """A model of open_clip with random weights; `architecture` is a name or a configuration."""
    config = dict(open_clip.get_model_config(architecture) if isinstance(architecture, str) else architecture)
    custom = config.pop("custom_text", False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP)(**config).eval()


def one_layer(architecture: str) -> dict[str, Any]:
    """open_clip's configuration of a model, with one layer in each tower."""
    config = open_clip.get_model_config(architecture)
    config["text_cfg"]["layers"] = config["vision_cfg"]["layers"] = 1
    if trunk := config["vision_cfg"].get("timm_model_name"):

        def one_block(pretrained: bool = False, **options: Any) -> nn.Module:
            return timm.create_model(trunk, pretrained, depth=1, **options)

        one_block.__name__ = f"one_block_of_{trunk}"
        if not timm.is_model(one_block.__name__):
            register_model(one_block)
        config["vision_cfg"]["timm_model_name"] = one_block.__name__
    return config


class _Archive(nn.Module):
    """OpenAI's archives hold the model's parts, half of them in half precision, and three numbers beside them."""

    def __init__(self, model: nn.Module, numbers: dict[str, int]) -> None:
        super().__init__()
        for name, module in model.named_children():
            self.add_module(name, module)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, number in numbers.items():
            self.register_buffer(name, torch.tensor(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def openai_archive(path: Path, seed: int, shape: Mapping[str, int]) -> None:
    """Write a TorchScript archive as OpenAI publishes them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = clip.model.CLIP(**shape)
    clip.model.convert_weights(model)
    numbers = {"input_resolution": shape["image_resolution"], "context_length": 77, "vocab_size": 49408}
    torch.jit.trace(_Archive(model, numbers).eval(), torch.zeros(1)).save(str(path))


TINY_OPENAI = {
    "embed_dim": 32, "image_resolution": 70, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 7,
    "context_length": 77, "vocab_size": 49408, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1,
}  # fmt: skip
VIT_L_14 = {
    "embed_dim": 768, "image_resolution": 224, "vision_layers": 24, "vision_width": 1024, "vision_patch_size": 14,
    "context_length": 77, "vocab_size": 49408, "transformer_width": 768, "transformer_heads": 12,
    "transformer_layers": 12,
}  # fmt: skip
STABLE_DIFFUSION_2_1_BASE = bench.STABLE_DIFFUSION_2_1_BASE | {
    "text_encoder": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                     "num_attention_heads": 16, "projection_dim": 512},
}  # fmt: skip
ONE_BLOCK = bench.ONE_BLOCK | {  # the same widths
    "text_encoder": STABLE_DIFFUSION_2_1_BASE["text_encoder"] | {"num_hidden_layers": 1},
}


def metaclip_file(model: nn.Module) -> bytes:
    """As MetaCLIP's trainer saves: weights among other things, their names prefixed."""
    weights = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    return torch_file({"epoch": 1, "name": "fullcc", "state_dict": weights})


def torch_file(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def safetensors_folder(folder: Path, model: nn.Module) -> None:
    """A repository of open_clip's SigLIP: weights, and a tokenizer of 32,000 entries."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    save_tokenizer(folder, 32000)


def save_tokenizer(folder: Path, entries: int) -> None:
    words = ["<pad>", "</s>", "<unk>", *(f"▁{i}" for i in range(entries - 3))]
    backend = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=2))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def stable_diffusion(folder: Path, shapes: Mapping[str, Mapping[str, Any]] = STABLE_DIFFUSION) -> None:
    """A folder as diffusers saves it; `shapes` has the arguments of UNet, VAE and text encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(**shapes["unet"]).save_pretrained(folder / "unet")
        AutoencoderKL(**shapes["vae"]).save_pretrained(folder / "vae")
        text = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, hidden_act="gelu", **shapes["text_encoder"])
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
        folder / "scheduler"
    )
    bpe = SimpleTokenizer()  # CLIP's vocabulary; transformers spells its last two entries otherwise
    words = {word: i for i, word in enumerate([*list(bpe.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = folder / "tokenizer"
    CLIPTokenizer(vocab=words, merges=list(bpe.bpe_ranks)).save_pretrained(tokenizer)
    (tokenizer / "tokenizer.json").unlink(missing_ok=True)  # the published folder has the older pair of files alone
    (tokenizer / "vocab.json").write_text(json.dumps(words, ensure_ascii=False))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in bpe.bpe_ranks))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))


def image(index: int, size: int = 96) -> Image.Image:
    return Image.fromarray(world.image("scorings", index)[0]).resize((size, size))


def jpeg(index: int, size: int = 96) -> bytes:
    file = io.BytesIO()
    image(index, size).save(file, "JPEG")
    return file.getvalue()


def mmvp_vlm(pairs_per_pattern: int, spelling: str = "MLLM_VLM Images") -> dict[str, bytes]:
    """The files of the hub's data set."""
    text, files = io.StringIO(), {}
    writer = csv.writer(text)
    writer.writerow(["Question ID", "Type", "Statement"])
    number = 0
    for name in world.PATTERNS:
        for _ in range(2 * pairs_per_pattern):
            number += 1
            writer.writerow([number, name, f"a thing with {number} dots"])
            folder = name.replace(" ", "_") if "_" in spelling else name
            files[f"{spelling}/{folder}/{number}.jpg"] = jpeg(number)
    return files | {"Questions.csv": text.getvalue().encode(), "README.md": b"a data set\n"}


def tar(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def shard(first: int, count: int) -> bytes:
    """One tar of the mirror of CC3M."""
    members = {}
    for i in range(first, first + count):
        caption = f"a thing, number {i}".encode()
        members |= {f"{i:09d}.jpg": jpeg(i, 128), f"{i:09d}.txt": caption, f"{i:09d}.json": b'{"key": "x"}'}
    return tar(members)


def classification_set(classes: int, count: int) -> dict[str, bytes]:
    """A set of clip-benchmark's, in two shards; it does not say its type, as theirs do not."""
    samples = [{f"{i:05d}.jpg": jpeg(i), f"{i:05d}.cls": str(i % classes).encode()} for i in range(count)]
    shards = [samples[::2], samples[1::2]]
    return {
        **{f"test/{n}.tar": tar({k: v for s in part for k, v in s.items()}) for n, part in enumerate(shards)},
        "test/nshards.txt": b"2",
        "classnames.txt": "\n".join(f"class {i}" for i in range(classes)).encode(),
        "zeroshot_classification_templates.txt": b"a photo of a {c}.\na drawing of a {c}.",
        "README.md": b"a set\n",
    }


def retrieval_set(count: int) -> dict[str, bytes]:
    members = {}
    for i in range(count):
        members |= {f"{i:05d}.jpg": jpeg(i), f"{i:05d}.txt": f"{i} dots\n{i} points".encode()}
    return {"test/0.tar": tar(members), "test/nshards.txt": b"1", "dataset_type.txt": b"retrieval"}


def vision_transformer(folder: Path) -> Path:
    """A small vision transformer as timm's authors publish theirs, of 28 px, with statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=28, patch_size=14, embed_dim=16, depth=1, num_heads=2, num_classes=0,
            init_values=1e-5, pretrained_cfg_overlay={"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
        )  # fmt: skip
    save_for_hf(model, str(folder), safe_serialization=True)
    return folder
