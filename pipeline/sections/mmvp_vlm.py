"""Section `mmvp_vlm`, of stage mmvp_vlm."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.config import Count, Section
from pipeline.sections.download import Download


class MiniMmvpVlm(Section):
    kind: Literal["mini"]
    pairs_per_pattern: Count


class PublishedMmvpVlm(Section):
    kind: Literal["hub"]
    pairs_per_pattern: Count
    download: Download


MmvpVlm = Annotated[MiniMmvpVlm | PublishedMmvpVlm, Field(discriminator="kind")]
