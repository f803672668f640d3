"""Section `mllm_sets`, of the stage of that name."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.core.config import Count, Name, Section
from pipeline.sections.download import Download


class MiniMllmSets(Section):
    """train: images; each has a question on every detail and on its object. pairs_per_pattern: of the test."""

    kind: Literal["mini"]
    train: Count
    pairs_per_pattern: Count


class LlavaJson(Section):
    """Conversations in LLaVA's JSON format, fetched by hand. images: a folder, or a zip. most: of them, drawn."""

    conversations: str
    images: str
    most: Count


class PublishedTest(Section):
    """format: mmvp (Questions.csv, and images by its index), pope or mme (parquet with image, question and answer)."""

    format: Literal["mmvp", "pope", "mme"]
    download: Download


class PublishedMllmSets(Section):
    """learnt: by hand, the splits that phases of `mllm` learn from. language: a model as transformers saves it."""

    kind: Literal["llava"]
    learnt: Annotated[dict[Name, LlavaJson], Field(min_length=1)]
    tests: Annotated[dict[Name, PublishedTest], Field(min_length=1)]
    language: Download

    @model_validator(mode="after")
    def _one_name_each(self) -> "PublishedMllmSets":
        if twice := {*self.learnt, "language"} & {*self.tests} | {"language"} & {*self.learnt}:
            raise ValueError(f"learnt, tests and language share the name '{min(twice)}'. Rename it")
        return self

    def downloads(self) -> dict[str, Download]:
        """By name, which is a folder's."""
        return {"language": self.language, **{name: test.download for name, test in self.tests.items()}}


MllmSets = Annotated[MiniMllmSets | PublishedMllmSets, Field(discriminator="kind")]
