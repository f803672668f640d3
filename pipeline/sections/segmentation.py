"""Section `segmentation`, of the benchmark of that name."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.config import Count, Float, PositiveFloat, Section


class PatchProbeSettings(Section):
    """cells: predictions of a patch, so many a side. batch: tokens of a step."""

    cells: Count
    steps: Count
    batch: Count
    lr: PositiveFloat


class Segmentation(Section):
    """Shorter side of the images, and stride of the windows, as multiples of the image tower's own size.

    attention, neighbourhood: benchmarks/segmentation.py's text_space_tokens.
    """

    scale: Annotated[Float, Field(ge=1)]
    stride: Annotated[Float, Field(gt=0, le=1)]
    attention: Literal["key_key", "value", "query_query_key_key"]
    neighbourhood: PositiveFloat
    probe: PatchProbeSettings
