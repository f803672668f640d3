"""Section `images`, of stage images."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.config import Count, Section, Share
from pipeline.sections.download import Download


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
    """A list of captions and URLs, fetched by img2dataset."""

    tsv: str
    rows: Count
    size: Count
    shard_size: Count
    min_success: Share
    retries: Annotated[int, Field(ge=0)]
    processes: Count
    threads: Count


class Index(Section):
    """Shards that stay where they are (data/remote.py), named by a file that tools/index.py writes."""

    file: str


class PublishedImages(Section):
    kind: Literal["shards", "links", "index"]
    shards: Download
    links: Links
    index: Index


Images = Annotated[MiniImages | PublishedImages, Field(discriminator="kind")]
