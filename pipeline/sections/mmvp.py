"""Section `mmvp`, of stage mmvp."""

from pipeline.core.config import Count, Section


class Mmvp(Section):
    seed: int
    draws: Count
    batch: Count
