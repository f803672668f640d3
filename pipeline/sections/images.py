"""Section `images`, of stage images."""

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.config import Count, Section, Share
from pipeline.core.stages import UserError
from pipeline.sections.download import Download

LIST_PAGE = "https://ai.google.com/research/ConceptualCaptions/download"
BY_HAND = {  # a file on this disk that names the images, by its key
    "links.tsv": f"It is the list of Conceptual Captions' training images, whose owner asks for consent: fetch it from "
    f"{LIST_PAGE} and put it there",
    "index.file": "It names the shards: `python -m pipeline.tools.index` writes it",
}


class MiniImages(Section):
    kind: Literal["mini"]
    count: Count
    detail_share: Share
    size: Count
    shard_size: Count
    min_success: Share
    processes: Count
    threads: Count


class Links(Section):
    """A list of captions and URLs, fetched by img2dataset; distributor: who runs its workers, on one or many hosts."""

    tsv: str
    rows: Count
    size: Count
    shard_size: Count
    min_success: Share
    retries: Annotated[int, Field(ge=0)]
    processes: Count
    threads: Count
    distributor: Literal["multiprocessing", "pyspark", "ray"] = "multiprocessing"

    def check_distributor(self) -> None:
        """Raise UserError where it is not installed: img2dataset would do nothing, and say nothing."""
        if not importlib.util.find_spec(self.distributor):
            raise UserError(
                f"images.links.distributor is '{self.distributor}', but this environment has no such package. "
                f"Run `pip install {self.distributor}`, or choose multiprocessing."
            )


class Index(Section):
    """Shards that stay where they are (data/remote.py), named by a file that tools/index.py writes."""

    file: str


class PublishedImages(Section):
    kind: Literal["shards", "links", "index"]
    shards: Download
    links: Links
    index: Index


Images = Annotated[MiniImages | PublishedImages, Field(discriminator="kind")]


def check_there(file: Path | str, key: str) -> None:
    """Raise UserError where a file that names the images is not there; key: one of BY_HAND."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file. {BY_HAND[key]}, or name its place in params.yaml (images.{key}).")
