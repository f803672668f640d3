"""Section `mllm_sets`, of the stage of that name."""

from typing import Literal

from pipeline.core.config import Count, Section


class MllmSets(Section):
    """train: images; each has a question on every detail and on its object. pairs_per_pattern: of the test split."""

    kind: Literal["mini"]
    train: Count
    pairs_per_pattern: Count
