"""Section `segmentation`, of the benchmark of that name."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.config import Count, Float, PositiveFloat, Section

Attention = Literal["key_key", "value", "query_query_key_key"]


class PatchProbeSettings(Section):
    """cells: a patch has cells x cells predictions. batch: tokens of a step."""

    cells: Count
    steps: Count
    batch: Count
    lr: PositiveFloat


class Segmentation(Section):
    """scale: shorter side of the images; stride: of the windows; both as multiples of the image tower's image size.

    attention, neighbourhood: see text_space_tokens in benchmarks/segmentation.py.
    """

    scale: Annotated[Float, Field(ge=1)]
    stride: Annotated[Float, Field(gt=0, le=1)]
    attention: Attention
    neighbourhood: PositiveFloat
    probe: PatchProbeSettings
