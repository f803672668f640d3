"""Read checkpoints in the formats of others as open_clip's tensors: the inverse of exports.py, also image towers alone.

A checkpoint is a file (read_checkpoint says of which formats) or a folder as transformers saves it:
config.json beside model.safetensors, shards of it with an index, or pytorch_model.bin. Known are CLIPModel, SiglipModel
and their vision models, with a projection and without, in any precision.
"""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from pipeline.core import config
from pipeline.core.stages import UserError
from pipeline.models import exports
from pipeline.models.backbones import Tensors, empty, float32, stored_tensors

KINDS = {"clip": exports.CLIP, "clip_vision_model": exports.CLIP, "siglip": exports.SIGLIP}
KINDS["siglip_vision_model"] = exports.SIGLIP
POOL, PROJECTION = "visual.trunk.attn_pool.", "visual.proj"
WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
AGAIN = "Fetch this checkpoint again."
SAME = ("hidden_act", "num_attention_heads", "num_hidden_layers", "layer_norm_eps")  # what no tensor's shape tells


def only_model(folder: Path) -> Path:
    """The one checkpoint that was fetched into a folder: a file, or the folder that holds a config.json."""
    configs = [path.parent for path in folder.rglob("config.json")]
    found = configs or [path for path in folder.rglob("*") if path.is_file()]
    if len(found) != 1:
        names = ", ".join(sorted(str(path.relative_to(folder)) for path in found)) or "no file"
        raise UserError(
            f"the download holds {len(found)} checkpoints ({names}), wanted one file, or one folder with config.json. "
            "Narrow `files` or `match` of this checkpoint in params.yaml."
        )
    return found[0]


def tensors(source: Path, original: Path, parts: str) -> Tensors:
    """The state of a checkpoint in float32, as the backbone in folder `original` has it.

    parts: `all`; `vision`: the image tower alone; `vision_tower`: without its projection. The rest is the original's.
    Raises UserError as `fitted`.
    """
    before = stored_tensors(original)
    return {name: before[name] if found.is_meta else found for name, found in fitted(source, original, parts).items()}


def fitted(source: Path, original: Path, parts: str) -> Tensors:
    """The same, with an empty tensor (on the meta device) for what is the original's; of `original` its configuration
    is read, no weights.

    Raises UserError where the checkpoint is of another architecture or lacks a part, naming what is missing.
    """
    wanted = empty(original).state_dict()
    found = _of_transformers(source, original, wanted) if source.is_dir() else _of_file(source, parts)
    kept = {
        "all": lambda name: False,
        "vision": lambda name: not name.startswith("visual."),
        "vision_tower": lambda name: not name.startswith("visual.") or name == PROJECTION,
    }[parts]
    lacking = [name for name in wanted if name not in found and not kept(name)]
    tower = [name for name in wanted if name.startswith("visual.") and name != PROJECTION]
    projected, read = PROJECTION not in lacking, any(not name.startswith("visual.") for name in found)
    if lacking and not {*tower} & {*lacking} and not (read and projected):
        have, need = ("holds the image tower alone", "vision") if projected else ("has no projection", "vision_tower")
        raise UserError(
            f"{source} {have} ({len(lacking)} tensors are missing, first: {lacking[0]}). If that is intended, set "
            f"parts: {need} for this checkpoint in params.yaml: the rest then comes from the pretrained weights."
        )
    used = {name: tensor for name, tensor in found.items() if not kept(name)}
    return fitting({**used, **{name: tensor for name, tensor in wanted.items() if kept(name)}}, original, source)


def fitting(tensors: Tensors, folder: Path, source: Path) -> Tensors:
    """The tensors of a checkpoint `source`, if they are those of the folder's model, name by name and shape by shape.

    Raises UserError naming what is missing, left over, of another shape or kind of number, infinite or no number.
    """
    wanted = empty(folder).state_dict()
    both = [(name, tensors[name], tensor) for name, tensor in wanted.items() if name in tensors]
    wrong = [
        *(f"missing: {name}" for name in wanted.keys() - tensors.keys()),
        *(f"left over: {name}" for name in tensors.keys() - wanted.keys()),
        *(
            f"{name}: {list(found.shape)} where {list(tensor.shape)} is wanted"
            for name, found, tensor in both
            if found.shape != tensor.shape
        ),
        *(
            f"{name}: {found.dtype} where {tensor.dtype} is wanted"
            for name, found, tensor in both
            if found.dtype != tensor.dtype
        ),
        *(
            f"{name}: numbers that are infinite or none"
            for name, found, _ in both
            if not found.is_meta and not found.isfinite().all()
        ),
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(
            f"{source.name} does not fit the architecture in params.yaml:\n  " + "\n  ".join(sorted(wrong)[:8]) + more
        )
    return tensors


def read_checkpoint(path: Path) -> Tensors:
    """The tensors of a checkpoint by name, in float32 whatever they are stored in.

    Formats: safetensors; PyTorch files of open_clip, MetaCLIP and DIVA's authors (plain, or below `state_dict`, with or
    without `module.`), read without running what they hold; OpenAI's TorchScript archive, by openai-clip.
    Raises UserError for anything else.
    """
    try:
        state = _state(path)
        if not state or not all(isinstance(name, str) and _plain(tensor) for name, tensor in state.items()):
            raise TypeError
        return float32(state)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises any; torch's own words tell how to run what a file holds
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}). Known formats: safetensors, a PyTorch "
            "state dict of plain tensors, OpenAI's TorchScript archive. Fetch it again, or name another file."
        ) from error


def _state(path: Path) -> Any:
    """What a checkpoint holds as its state. open_clip's `load_state_dict` is not taken: after a TypeError it reads a
    file again and lets torch's settings decide whether its code runs; so does `clip.load` after a RuntimeError."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if _is_torchscript(path):
        with warnings.catch_warnings():  # of pkg_resources, which openai-clip imports; no other format needs either
            warnings.simplefilter("ignore")
            from clip.model import build_model

            archive = torch.jit.load(str(path), map_location="cpu")
        return build_model(archive.state_dict()).float().state_dict()
    found = torch.load(path, map_location="cpu", weights_only=True)
    state = found.get("state_dict", found)
    if next(iter(state)).startswith("module."):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _plain(tensor: Any) -> bool:
    """Whether it is a tensor that holds its numbers: neither sparse nor one of the meta device."""
    return isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta


def _is_torchscript(path: Path) -> bool:
    """TorchScript archives carry code beside the tensors; PyTorch's own zip files do not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _of_file(source: Path, parts: str) -> Tensors:
    """Of a file; an image tower's own state, without `visual.` before its names, is taken as such."""
    found = read_checkpoint(source)
    if parts != "all" and not any(name.startswith("visual.") for name in found):
        return {f"visual.{name}": tensor for name, tensor in found.items()}
    return found


def _of_transformers(folder: Path, original: Path, wanted: Tensors) -> Tensors:
    """A transformers folder's tensors by the names that this backbone has for them; what it lacks is left out."""
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{folder} has no config.json (it holds {there}), so it is no transformers model. Set the path to a "
            "transformers folder or to a checkpoint file."
        )
    stored = _stored(folder)
    kind = config.json_object(folder / "config.json", AGAIN).get("model_type")
    model = empty(original)
    own = "siglip" if isinstance(model, open_clip.CustomTextCLIP) else "clip"
    if not (isinstance(kind, str) and kind in KINDS and kind.startswith(own)):
        raise UserError(
            f"{folder}/config.json says model_type {kind!r}, but the backbone is a {own} model. Name a checkpoint of "
            f"this backbone; known types: {', '.join(KINDS)}."
        )
    _same_architecture(folder, model)
    made = {}
    for name, tensor in wanted.items():
        try:
            made[name] = _one(name, tensor.shape, stored, KINDS[kind])
        except (RuntimeError, TypeError):  # of torch
            raise UserError(f"{folder}: the tensors for {name} do not go together. {AGAIN}") from None
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder in float32. Raises UserError where a file is missing or cannot be read."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has config.json but no weights. Put one of these there, too: {', '.join(WEIGHTS)}.")
    files = [file]
    if file.suffix == ".json":
        shards = config.json_object(file, AGAIN).get("weight_map")
        names = list(dict.fromkeys(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{file}: weight_map names no files beside it. {AGAIN}")
        files = [folder / name for name in names]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise UserError(f"{file} names {', '.join(missing)}, but {folder} lacks them. Put them there, too.")
    found: dict[str, torch.Tensor] = {}
    for path in files:
        found |= read_checkpoint(path)
    found = {name: tensor for name, tensor in found.items() if not name.endswith(".position_ids")}
    bare = not any(name.startswith(("vision_model.", "text_model.")) for name in found)
    return {f"vision_model.{name}": tensor for name, tensor in found.items()} if bare else found


def _same_architecture(folder: Path, model: nn.Module) -> None:
    """Raises UserError if the towers differ in a setting that changes no tensor's shape (SAME)."""
    try:
        settings: Any = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers and huggingface_hub raise any
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}/config.json: {type(error).__name__}: {why}. {AGAIN}") from error
    visual: Any = model.visual
    trunk: Any = visual.trunk if isinstance(visual, TimmModel) else visual
    text: Any = model.text if isinstance(model, open_clip.CustomTextCLIP) else model
    towers = {"vision": trunk.blocks if hasattr(trunk, "blocks") else trunk.transformer.resblocks}
    if hasattr(settings, "text_config"):
        towers["text"] = text.transformer.resblocks
    for tower, blocks in towers.items():
        theirs, ours = getattr(settings, f"{tower}_config", settings), exports._encoder(blocks)
        wrong = [f"{key} {getattr(theirs, key)}, not {ours[key]}" for key in SAME if getattr(theirs, key) != ours[key]]
        if wrong:
            raise UserError(
                f"{folder}/config.json describes another {tower} tower than the backbone's: {'; '.join(wrong)}. List "
                "this checkpoint under a backbone of its own architecture."
            )


def _one(name: str, shape: torch.Size, stored: Tensors, table: tuple[tuple[str, str], ...]) -> torch.Tensor | None:
    """The tensor that open_clip calls `name`, of transformers' ones; None where one of these is missing."""
    if name.startswith(POOL) and (part := re.match(r"(q|kv)\.(weight|bias)$", name.removeprefix(POOL))):
        joint = stored.get(f"vision_model.head.attention.in_proj_{part[2]}")
        if joint is None:
            return None
        width = len(joint) // 3
        return joint[:width] if part[1] == "q" else joint[width:]
    new = name
    for pattern, text in table:
        new = re.sub(pattern, text, new)
    stem, joined, kind = new.partition(".self_attn.in_proj_")
    names = [f"{stem}.self_attn.{part}_proj.{kind}" for part in "qkv"] if joined else [new]
    if not all(each in stored for each in names):
        return None
    tensor = torch.cat([stored[each] for each in names]) if joined else stored[new]
    if name in ("visual.proj", "text_projection"):
        return tensor.T
    if name == "visual.trunk.pos_embed":
        return tensor[None]
    return tensor.reshape(shape) if name in ("logit_scale", "logit_bias") else tensor
