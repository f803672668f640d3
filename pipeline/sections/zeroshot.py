"""Section `zeroshot`, of stage zeroshot."""

from pipeline.core.config import Count, Section


class Zeroshot(Section):
    batch: Count
    recall: Count
