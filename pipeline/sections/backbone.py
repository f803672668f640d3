"""Section `backbones`: where a backbone comes from, how it conditions and is read, and what was published of it."""

from pydantic import Field

from pipeline.core.config import Name, NonNegativeFloat, PositiveFloat, Section
from pipeline.diva.rules import Condition, PoolingRule
from pipeline.sections.checkpoint import TunedWeights
from pipeline.sections.source import Source


class Published(Section):
    """What the paper's table says: million parameters; pairs right in %, average and by pattern.

    imagenet1k: zero-shot accuracy of the pretrained weights, %, as open_clip's table of results has it.
    """

    parameters: PositiveFloat
    before: PositiveFloat
    after: PositiveFloat
    before_patterns: list[NonNegativeFloat] = Field(min_length=9, max_length=9)
    after_patterns: list[NonNegativeFloat] | None = Field(None, min_length=9, max_length=9)
    imagenet1k: PositiveFloat | None = None


class BackboneEntry(Section):
    profile: Name
    source: Source
    checkpoints: dict[Name, TunedWeights] = Field({})
    condition: Condition
    published_pooling: PoolingRule
    published: Published | None = None
