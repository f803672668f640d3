"""Section `zeroshot`, of stage zeroshot."""

from typing import Literal

from pipeline.core.config import Count, Section


class Zeroshot(Section):
    """precision: of both towers; bfloat16 by autocast."""

    batch: Count
    recall: Count
    precision: Literal["float32", "bfloat16"]
