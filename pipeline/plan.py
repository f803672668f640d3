"""Stage plan: before anything is fetched, print what will be fetched and check that disk and GPU suffice.

data/<profile>/planned/<what>.json      what decides an input's bytes; the stage that makes the input depends on this
                                        file alone. For a download: its pins (address, revision, sha256). For an input
                                        that is made here: its parameters and the hash of the code that makes it
data/<profile>/planned/<benchmark>-<backbone>-<weights>.json    the same of a scoring: its values, its code's hash
metrics/<profile>/scores/planned.json   the benchmarks that are scored, with the hash of the code of each

So a comment, another backbone, a licence or a number of threads makes no stage fetch anything twice.
"""

import itertools
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.core.code import program
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, stage
from pipeline.data import downloads
from pipeline.engine.fetches import Item, disk, downloads_of, links_of, to_fetch
from pipeline.engine.pins import pins
from pipeline.models.registry import complete, embedding_width, patches
from pipeline.sections import params
from pipeline.sections.backbone import BackboneEntry
from pipeline.sections.checkpoint import LocalFiles
from pipeline.sections.denoiser import PublishedDenoiser
from pipeline.sections.images import PublishedImages, check_there
from pipeline.sections.mllm_sets import PublishedMllmSets
from pipeline.sections.segmentation_sets import LocalSegmentationSets
from pipeline.sections.source import MiniSource

BY_HAND = Path("data/by_hand")  # a dependency of this stage
NO_TRAINING = "skip training by -S 'run.recipes=[]' -S 'run.inputs=[]', which needs no images, no denoiser and no GPU"


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
