"""The mini world's images to post-train on, which img2dataset fetches as if they were elsewhere."""

from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image

from pipeline.core.outputs import remove
from pipeline.core.stages import progress
from pipeline.data import links
from pipeline.mini import world
from pipeline.sections.images import MiniImages

SET = "post-training"


def draw(count: int, folder: Path) -> list[str]:
    """Write images 0..count-1 of the post-training set into a new folder; returns their addresses."""
    folder.mkdir(parents=True)
    files = [folder / f"{index}.png" for index in range(count)]
    for index, file in enumerate(progress(files, "images")):
        Image.fromarray(world.image(SET, index)[0]).save(file, compress_level=1)
    return [file.resolve().as_uri() for file in files]


def caption(index: int, detail_share: float) -> str:
    """The caption of a post-training image: its object, and in this share of the captions any number of details."""
    scene = world.draw_scene(world.rng_of(SET, index))  # as world.image() draws it
    rng = world.rng_of(SET, index, 1)
    return world.caption(scene, world.any_details(rng) if rng.random() < detail_share else ())


def make(images: MiniImages, folder: Path) -> dict[str, Any]:
    """Fill `folder` with the shards of the mini profile. Returns img2dataset's counts."""
    drawn, scratch = folder / "drawn", folder / "scratch"
    addresses = draw(images.count, drawn)
    captions = [caption(i, images.detail_share) for i in range(images.count)]
    options = images.model_dump(exclude={"kind", "count", "detail_share"})
    wanted = pyarrow.table({"url": addresses, "caption": captions})
    report = links.download(wanted, folder, scratch, retries=0, **options)
    remove(drawn)
    remove(scratch)
    return report
