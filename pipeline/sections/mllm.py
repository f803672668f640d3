"""Section `mllm`, of the benchmark of that name."""

from typing import Annotated, Any

from pydantic import Field

from pipeline.core.config import Count, PositiveFloat, Section


class Mllm(Section):
    """seeds: how many, of projector and language model. context: tokens of image and question at most.

    language: transformers' LlamaConfig, but for what the tokenizer decides.
    """

    seeds: Annotated[int, Field(ge=2)]
    language: dict[str, Any]
    context: Count
    steps: Count
    batch: Count
    lr: PositiveFloat
