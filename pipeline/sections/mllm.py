"""Section `mllm`, of the benchmark of that name."""

from typing import Annotated, Any

from pydantic import Field

from pipeline.core.config import Count, PositiveFloat, Section


class Mllm(Section):
    """seeds: how many times projector and language model are trained. context: at most so many tokens of image and
    question. language: values of transformers' LlamaConfig, except for those that the tokenizer decides.
    """

    seeds: Annotated[int, Field(ge=2)]
    language: dict[str, Any]
    context: Count
    steps: Count
    batch: Count
    lr: PositiveFloat
