"""Stage plan: before anything is fetched, print what will be fetched and check that disk and GPU suffice.

data/<profile>/planned/<what>.json      what decides an input's bytes; the stage that makes the input depends on this
                                        file alone. For a download: its pins (address, revision, sha256). For an input
                                        that is made here: its parameters and the hash of the code that makes it
data/<profile>/planned/<benchmark>-<backbone>-<weights>.json    the same of a scoring: its values, its code's hash
metrics/<profile>/scores/planned.json   the benchmarks that are scored, with the hash of the code of each

So a comment, another backbone, a licence or a number of threads makes no stage fetch anything twice. Servers are asked
for sizes only. An output that exists counts as fetched, whatever it holds.
"""

import dataclasses
import itertools
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from pipeline.core.code import program
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, progress, stage
from pipeline.data import downloads
from pipeline.models.registry import complete, embedding_width, patches
from pipeline.sections import params
from pipeline.sections.backbone import BackboneEntry
from pipeline.sections.checkpoint import LocalFiles
from pipeline.sections.denoiser import PublishedDenoiser
from pipeline.sections.download import Download
from pipeline.sections.encoder import NO_ENCODER, PublishedEncoder
from pipeline.sections.images import PublishedImages, check_there
from pipeline.sections.mllm_sets import PublishedMllmSets
from pipeline.sections.mmvp_vlm import PublishedMmvpVlm
from pipeline.sections.segmentation_sets import LocalSegmentationSets
from pipeline.sections.source import CheckpointSource, MiniSource
from pipeline.sections.zeroshot_sets import PublishedZeroshotSets

BY_HAND = Path("data/by_hand")  # a dependency of this stage
ALIVE, IMAGE_BYTES = 0.6, 60e3  # of a list of links: the share that comes (40 to 70 %), and bytes of an image of 512 px
MODEL = 4e9  # bytes of a converted model whose parameters were not published: as many as the largest that were
NO_TRAINING = "skip training by -S 'run.recipes=[]' -S 'run.inputs=[]', which needs no images, no denoiser and no GPU"
NOT_PINS = {"licence", "processes", "threads", "distributor"}  # they change no byte of what is fetched


@dataclass(frozen=True)
class Item:
    """Something to be fetched for a stage's output folder; the size is in bytes. `about`: estimated, not listed.

    commit: of the moment, where the address names a branch.
    """

    folder: Path
    origin: str
    files: int
    size: float
    licence: str
    about: str = ""
    commit: str = ""


def downloads_of(p: params.Params) -> list[tuple[Path, Download]]:
    """What the run needs, there or not, each with the output folder of its stage; but for images from links."""
    data, models = Path("data", p.run.profile), Path("models", p.run.profile)
    mmvp_vlm, sets = p.profile.mmvp_vlm, p.profile.zeroshot_sets
    images, denoiser = p.profile.images, p.profile.denoiser
    wanted = []
    if isinstance(mmvp_vlm, PublishedMmvpVlm):
        wanted.append((data / "mmvp", mmvp_vlm.download))  # every export is verified on images and statements of it
    if isinstance(sets, PublishedZeroshotSets) and "zeroshot" in p.run.benchmarks:
        wanted += [(data / "zeroshot" / "wds" / name, download) for name, download in sets.downloads().items()]
    if isinstance(p.profile.mllm_sets, PublishedMllmSets) and "mllm" in p.run.benchmarks:
        wanted += [(data / "mllm" / name, download) for name, download in p.profile.mllm_sets.downloads().items()]
    for backbone in p.run.backbones:
        source = complete(backbone, p.backbones[backbone].source)
        if isinstance(source, CheckpointSource):
            files = [source.weights, *([source.tokenizer] if source.tokenizer else [])]
            wanted += [(models / "pretrained" / backbone, download) for download in files]
        for name in p.run.checkpoints:
            weights = p.backbones[backbone].checkpoints[name].weights
            if isinstance(weights, Download):
                wanted.append((models / name / backbone, weights))
    if p.run.recipes:
        if isinstance(images, PublishedImages) and images.kind == "shards":
            wanted.append((data / "images", images.shards))
        if isinstance(denoiser, PublishedDenoiser):
            wanted.append((data / "denoiser", denoiser.download))
        if isinstance(p.profile.encoder, PublishedEncoder):
            wanted += [(data / "encoder" / name, p.profile.encoder.download) for name in _encode(p)]
    return wanted


def _encode(p: params.Params) -> list[str]:
    """The recipes of the run that read the frozen image encoder."""
    if not p.run.recipes:
        return []
    from pipeline.engine.checks import recipes_that_encode  # not above: torch takes a second

    return recipes_that_encode(p)


def links_of(p: params.Params) -> list[Item]:
    """The images, where they come from a list of links: about how many will come."""
    images = p.profile.images
    if not p.run.recipes or not isinstance(images, PublishedImages) or images.kind != "links":
        return []
    files, folder = round(ALIVE * images.links.rows), Path("data", p.run.profile, "images")
    return [Item(folder, images.links.tsv, files, IMAGE_BYTES * files, images.shards.licence, about="about ")]


def to_fetch(p: params.Params) -> list[Item]:
    """What is still to be fetched. Raises UserError where no address of a download answers."""
    ahead = [(folder, download) for folder, download in downloads_of(p) if not folder.exists()]
    items = []
    for folder, download in progress(ahead, "asking for sizes") if ahead else ():
        listing = downloads.locate(download)
        commit = listing.revision if _names_a_branch(listing.address, download) else ""
        items.append(
            Item(folder, listing.address, len(listing.files), listing.size, download.licence, commit=commit or "")
        )
    return items + [item for item in links_of(p) if not item.folder.exists()]


def _names_a_branch(address: str, download: Download) -> bool:
    """Whether what comes from there is pinned neither by a commit nor by the hashes of all files."""
    return not re.search(r"@[0-9a-f]{7,40}$", address) and not (download.files and all(download.files.values()))


def disk(p: params.Params, items: list[Item]) -> float:
    """Bytes that the run will add to the disk.

    Data sets, the denoiser and the encoder are kept as they come; a checkpoint makes way for a converted copy in
    float32, and every backbone has as large a one after training. Each is exported in two formats of its size. DVC's
    cache shares its bytes with the workspace wherever links work, for .dvc/config asks for them; elsewhere all is there
    twice. Less what stopped fetches have left.
    """
    models = _models(p)
    kept = sum(item.size for item in items if item.folder not in models)
    made = sum(size for folder, size in models.items() if not folder.exists())
    converted = max((item.size for item in items if item.folder in models), default=0)  # one at a time
    return max(0, _copies() * (kept + made) + converted - _left(p.run.profile))


def _models(p: params.Params) -> dict[Path, float]:
    """The folders of the models that are made of checkpoints, and their bytes."""
    models: dict[Path, float] = {}
    for backbone in p.run.backbones:
        if not isinstance(p.backbones[backbone].source, MiniSource):
            published = p.backbones[backbone].published
            size, root = 4e6 * published.parameters if published else MODEL, Path("models", p.run.profile)
            models |= {root / weights / backbone: size for weights in p.run.weights}
            exported = ["pretrained", *p.run.checkpoints, *p.run.recipes]
            models |= {root / "export" / f"{backbone}-{weights}": 2 * size for weights in exported}
    return models


def _copies() -> int:
    """How often DVC keeps a byte: its weakest link is a symbolic one."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".links.", suffix=".scratch") as folder:
        try:
            Path(folder, "link").symlink_to("target")
        except OSError:
            return 2
    return 1


def _left(profile: str) -> int:
    """Bytes of the fetches that were stopped; they go on from there."""
    folders = downloads.SCRATCH, Path("data", profile, ".images.scratch")
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def show(items: list[Item]) -> None:
    table = Table("what", title="What will be fetched")
    table.add_column("from", overflow="fold")
    for figure in ("files", "GB"):
        table.add_column(figure, justify="right")
    table.add_column("licence")
    for item in items:
        figures = f"{item.about}{item.files:,}", f"{item.about}{item.size / 1e9:,.2f}"
        table.add_row(str(item.folder), item.origin, *figures, item.licence)
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)
    for item in items:
        if item.commit:
            print(
                f"{item.origin} is a branch, now at commit {item.commit}. The first fetch records its hashes below "
                "metrics/, and other bytes are refused from then on. To pin it now, write that commit in params.yaml."
            )


def check_disk(p: params.Params, items: list[Item]) -> str | None:
    """Print what the run takes and what there is. Returns what to do where that is too little."""
    needed, free = disk(p, items), shutil.disk_usage(".").free
    line = f"disk: {needed / 1e9:,.1f} GB needed, {free / 1e9:,.1f} GB free in {Path.cwd()}"
    print(line)
    if needed <= free:
        return None
    training = f", or {NO_TRAINING}" if p.run.recipes else ""
    return f"{line}. Make room there, choose fewer run.backbones{training}."


def check_values(p: params.Params) -> None:
    """Raise UserError for values that a later stage would refuse, after all was fetched."""
    for name in p.run.backbones:
        embedding_width(name, p.backbones[name].source)
        _check_rules(name, p.backbones[name])
    if p.run.recipes:
        from pipeline.engine.checks import check_encoder, check_recipes  # not above: torch takes a second

        check_recipes(p)
        check_encoder(p)
        images = p.profile.images
        if isinstance(images, PublishedImages):
            if images.kind == "index":
                check_there(images.index.file, "index.file")
            if images.kind == "links" and not Path("data", p.run.profile, "images").exists():
                images.links.check_distributor()
                check_there(images.links.tsv, "links.tsv")


def _check_rules(name: str, entry: BackboneEntry) -> None:
    found = _patches(name, entry)
    for key, rule in (("condition", entry.condition), ("published_pooling", entry.published_pooling)):
        try:
            rule.tokens.check(found)
        except ValueError as error:
            raise UserError(f"params.yaml:\n  backbones.{name}.{key}.tokens: {error}. Correct its number.") from None


def _patches(name: str, entry: BackboneEntry) -> int:
    """How many patch tokens the image tower has."""
    source = complete(name, entry.source)
    try:
        if isinstance(source, MiniSource):  # not by its model, whose vocabulary is the tokenizer's
            vision = source.architecture["vision_cfg"]
            return (vision["image_size"] // vision.get("patch_size", 16)) ** 2  # open_clip's default
        return patches(source)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"params.yaml:\n  backbones.{name}.source makes no image tower with patch tokens ({type(error).__name__}: "
            f"{error}). Correct its architecture."
        ) from None


def check_by_hand(p: params.Params) -> None:
    """Raise UserError for what lies on this machine and would be refused later: a checkpoint that is not there, does
    not fit its backbone or could change unseen, and a set that is not there.
    """
    for backbone, name in itertools.product(p.run.backbones, p.run.checkpoints):
        weights = p.backbones[backbone].checkpoints[name].weights
        if isinstance(weights, LocalFiles):
            found = downloads.found_here(weights)["sha256"]
            if not weights.sha256 and not Path(weights.path).resolve().is_relative_to(BY_HAND.resolve()):
                raise UserError(
                    f"{weights.path}: a change of its bytes would not be seen. Put it below {BY_HAND}, which DVC "
                    f"watches, or give its hash, backbones.{backbone}.checkpoints.{name}.weights.sha256: {found}"
                )
            _check_fit(backbone, p.backbones[backbone], name)
    sets, questions, wanted = p.profile.segmentation_sets, p.profile.mllm_sets, list[tuple[str, str]]()
    if "segmentation" in p.run.benchmarks and isinstance(sets, LocalSegmentationSets):
        wanted += [(local.at, f"segmentation_sets.sets.{name}") for name, local in sets.sets.items()]
    if "mllm" in p.run.benchmarks and isinstance(questions, PublishedMllmSets):
        for name, learnt in questions.learnt.items():
            wanted += [(path, f"mllm_sets.learnt.{name}") for path in (learnt.conversations, learnt.images)]
    for path, key in wanted:
        if not Path(path).exists():
            raise UserError(
                f"{path}: no such file or folder. Fetch it by hand (params.yaml, {key}, says from where), or take it "
                "out there."
            )


def _check_fit(backbone: str, entry: BackboneEntry, name: str) -> None:
    """Raise UserError where a local checkpoint is none of this backbone's architecture, or lacks a part."""
    from pipeline.mini import pretrain  # not above: torch takes a second
    from pipeline.models import backbones, imports

    source, checkpoint = complete(backbone, entry.source), entry.checkpoints[name]
    architecture = source.architecture
    if isinstance(source, MiniSource):
        _, _, architecture = pretrain.new_clip(backbone, source.architecture)
    with tempfile.TemporaryDirectory() as folder:
        backbones.write_config(architecture, source.preprocessing.model_dump(), Path(folder))
        imports.fitted(Path(checkpoint.weights.path), Path(folder), checkpoint.parts)


def check_gpu(p: params.Params) -> str | None:
    """Try two steps of every training on random weights. Returns what to do if the GPU has too little memory."""
    import torch

    from pipeline.engine import trial

    if not torch.cuda.is_available():
        if p.profile.train.precision == "float32":
            return None
        needs = f"profiles.{p.run.profile}.train.precision is bfloat16, which needs one"
        return f"GPU: none found, but {needs}. Train on a machine with a GPU, or {NO_TRAINING}."
    for name, recipe in itertools.product(p.run.backbones, p.run.recipes):
        try:
            trial.check(p, name, recipe, torch.device("cuda"))
        except UserError as error:
            return f"{error} Or {NO_TRAINING}."
        memory = torch.cuda.max_memory_allocated() / 1e9
        print(f"GPU memory: {memory:.1f} GB taken by two steps of {name} by recipe {recipe} with random weights")
        torch.cuda.reset_peak_memory_stats()
    return None


def pins(p: params.Params) -> dict[str, dict]:
    """What decides the bytes of every input, by the name of its file."""
    sets = [name for name in params.Profile.model_fields if name.endswith("_sets")]
    sections = {name: getattr(p.profile, name) for name in ("images", "denoiser", "mmvp_vlm", *sets)}
    if isinstance(zeroshot := p.profile.zeroshot_sets, PublishedZeroshotSets):
        sections["zeroshot_sets"] = zeroshot.model_copy(update={"sets": zeroshot.chosen(), "run": "all"})
    found = {name: _pinned(section, name, p.profile.threads) for name, section in sections.items()}
    encoder, encode = p.profile.encoder, _encode(p)
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


@stage
def main() -> None:
    p = params.load()
    check_values(p)
    check_by_hand(p)
    if downloads_of(p) or links_of(p):
        items = to_fetch(p)
        if items:
            show(items)
        total = sum(item.size for item in items) / 1e9
        folders = [*(folder for folder, _ in downloads_of(p)), *(item.folder for item in links_of(p))]
        there = ", ".join(sorted({str(folder) for folder in folders if folder.exists()}))
        print(f"to download in all: {total:,.1f} GB; there already: {there or 'nothing'}")
        trains = p.run.recipes and isinstance(p.profile.denoiser, PublishedDenoiser)
        problems = [check_disk(p, items), check_gpu(p) if trains else None]
        if any(problems):
            raise UserError("This machine does not suffice for this run.\n  " + "\n  ".join(filter(None, problems)))
    else:
        print(f"profile {p.run.profile}: all inputs are made here, nothing is fetched")
    scores = Path("metrics", p.run.profile, "scores", "planned.json")
    with atomic(Path("data", p.run.profile, "planned"), scores) as (folder, benchmarks_file):
        write_json(benchmarks_file, {benchmark: program(f"{benchmark}.py") for benchmark in p.run.benchmarks})
        folder.mkdir()
        for name, pinned in pins(p).items():
            write_json(folder / f"{name}.json", pinned)


if __name__ == "__main__":
    main()
