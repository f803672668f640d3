"""What decides the bytes of every input and of every scoring; stage plan writes it, and theirs depend on that alone."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.core.code import program
from pipeline.data import downloads
from pipeline.engine.fetches import encoding
from pipeline.models.registry import complete
from pipeline.sections import params
from pipeline.sections.backbone import BackboneEntry
from pipeline.sections.checkpoint import LocalFiles
from pipeline.sections.download import Download
from pipeline.sections.encoder import NO_ENCODER
from pipeline.sections.images import PublishedImages
from pipeline.sections.zeroshot_sets import PublishedZeroshotSets

NOT_PINS = {"licence", "processes", "threads", "distributor"}  # they change no byte of what is fetched


def pins(p: params.Params) -> dict[str, dict]:
    """What decides the bytes of every input, by the name of its file."""
    sets = [name for name in params.Profile.model_fields if name.endswith("_sets")]
    sections = {name: getattr(p.profile, name) for name in ("images", "denoiser", "mmvp_vlm", *sets)}
    if isinstance(zeroshot := p.profile.zeroshot_sets, PublishedZeroshotSets):
        sections["zeroshot_sets"] = zeroshot.model_copy(update={"sets": zeroshot.chosen(), "run": "all"})
    found = {name: _pinned(section, name, p.profile.threads) for name, section in sections.items()}
    encoder, encode = p.profile.encoder, encoding(p)
    for name in p.run.recipes:
        found[f"encoder-{name}"] = NO_ENCODER
        if encoder and name in encode:
            found[f"encoder-{name}"] = _pinned(encoder, "encoder", p.profile.threads)
    for name in p.run.backbones:
        backbone = p.backbones[name]
        found[f"pretrained-{name}"] = _pinned(complete(name, backbone.source), "backbone", p.profile.threads)
        for chosen in p.run.checkpoints:
            checkpoint = backbone.checkpoints[chosen]
            pinned = {"parts": checkpoint.parts, "weights": _only_pins(checkpoint.weights)}
            if isinstance(checkpoint.weights, LocalFiles):
                pinned["weights"] = {"sha256": downloads.found_here(checkpoint.weights)["sha256"]}
            found[f"{chosen}-{name}"] = pinned
        for benchmark, weights in itertools.product(p.run.benchmarks, p.run.weights):
            found[f"{benchmark}-{name}-{weights}"] = _scoring(p, benchmark, backbone)
    return found


def _scoring(p: params.Params, benchmark: str, backbone: BackboneEntry) -> dict:
    """What decides a scoring, but for its data and weights: code, threads, and every value that it takes."""
    found = {"code": program(f"{benchmark}.py"), "threads": p.profile.threads}
    found |= {benchmark: getattr(p.profile, benchmark).model_dump(mode="json")}
    if benchmark == "mmvp":
        found |= {"published_pooling": dataclasses.asdict(backbone.published_pooling)}
    return found


def _pinned(section: params.Section, maker: str, threads: int) -> dict:
    """threads: they decide the bytes of what torch makes."""
    found = {maker: _only_pins(section)}
    if isinstance(section, PublishedImages):
        chosen = found[maker][section.kind]
        if section.kind == "index":
            index = Path(section.index.file)
            chosen = downloads.digest(index) if index.is_file() else None
        found[maker] = {"kind": section.kind, section.kind: chosen}
    if getattr(section, "kind", None) == "mini":
        found |= {"code": program(f"{maker}.py")}
        if maker in ("denoiser", "encoder", "backbone"):
            found |= {"threads": threads}
    return found


def _only_pins(value: Any) -> Any:
    """Of a download whose files all have a hash, those; of any other, its first address, too."""
    if isinstance(value, Download):
        hashed = value.files and all(value.files.values())
        return {"files": value.files} if hashed else {"at": value.at[0], "files": value.files, "match": value.match}
    if isinstance(value, BaseModel):
        fields = value.__class__.model_fields.keys() - NOT_PINS
        return {name: _only_pins(getattr(value, name)) for name in sorted(fields)}
    if isinstance(value, dict):
        return {name: _only_pins(each) for name, each in value.items()}
    return value
