"""Section `mllm`, of the benchmark of that name."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.core.config import Count, Float, Name, NonNegativeFloat, PositiveFloat, Section


class MllmPhase(Section):
    """A phase of training. split: of mllm_sets, whose conversations are learnt. prompt: with {question}, before an
    answer; LLaVA's first phase has none. warmup_ratio: of the steps.
    """

    split: Name
    trained: Literal["projector", "projector_and_language"]
    prompt: str
    steps: Count
    batch: Count
    lr: PositiveFloat
    warmup_ratio: Annotated[Float, Field(gt=0, lt=1)]
    weight_decay: NonNegativeFloat


class Mllm(Section):
    """seeds: how many times projector and language model are trained. language: values of transformers' LlamaConfig,
    except for those that the tokenizer decides; or fetched, the published one of mllm_sets. context: tokens of image
    and text at most; conversations are cut there. batch: images and texts at once on a device; it changes memory and
    speed, not results. Questions are asked by the last phase's prompt.
    """

    seeds: Annotated[int, Field(ge=2)]
    language: dict[str, Any] | Literal["fetched"]
    context: Count
    batch: Count
    precision: Literal["float32", "bfloat16"]
    phases: Annotated[list[MllmPhase], Field(min_length=1)]

    @model_validator(mode="after")
    def _asks(self) -> "Mllm":
        if "{question}" not in self.phases[-1].prompt:
            raise ValueError(f"the last phase's prompt is '{self.phases[-1].prompt}', but tests need its {{question}}")
        return self
