"""What a run will fetch, and how much disk it takes. Servers are asked for sizes only.

An output that exists counts as fetched, whatever it holds.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.stages import progress
from pipeline.data import downloads
from pipeline.models.registry import complete
from pipeline.sections import params
from pipeline.sections.denoiser import PublishedDenoiser
from pipeline.sections.download import Download
from pipeline.sections.encoder import PublishedEncoder
from pipeline.sections.images import PublishedImages
from pipeline.sections.mllm_sets import PublishedMllmSets
from pipeline.sections.mmvp_vlm import PublishedMmvpVlm
from pipeline.sections.source import CheckpointSource, MiniSource
from pipeline.sections.zeroshot_sets import PublishedZeroshotSets

ALIVE, IMAGE_BYTES = 0.6, 60e3  # of a list of links: the share that comes (40 to 70 %), and bytes of an image of 512 px
MODEL = 4e9  # bytes of a converted model whose parameters were not published: as many as the largest that were


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
            wanted += [(data / "encoder" / name, p.profile.encoder.download) for name in encoding(p)]
    return wanted


def encoding(p: params.Params) -> list[str]:
    """The recipes of the run of which a loss reads the frozen image encoder."""
    if not p.run.recipes:
        return []
    from pipeline.engine.losses import losses_of  # not above: torch takes a second

    key, recipes = f"profiles.{p.run.profile}.recipes", p.profile.recipes
    return [name for name in p.run.recipes if any(loss.encodes for loss in losses_of(f"{key}.{name}", recipes[name]))]


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
