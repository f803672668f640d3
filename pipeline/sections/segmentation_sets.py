"""Section `segmentation_sets`, of the stage of that name."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.core.config import Count, Name, Section

Templates = Annotated[list[Annotated[str, Field(pattern=r"\{c\}")]], Field(min_length=1)]


class MiniSegmentationSets(Section):
    kind: Literal["mini"]
    train: Count
    test: Count


class LocalSet(Section):
    """A set fetched by hand, in mmsegmentation's layout; value 0 of a mask is unlabelled, i is class i from 1 on.

    at: its folder. images, masks: paths in it, with {id}, and with {split} if each split has a folder of its own.
    ids: a file in it that lists a split's ids, with {split}; by default all ids that have a mask.
    train, test: the set's own names of these splits. classes: in order; commas separate synonyms.
    """

    at: str
    images: str
    masks: str
    ids: str | None = None
    train: str
    test: str
    classes: Annotated[list[str], Field(min_length=2, max_length=254)]

    @field_validator("images", "masks")
    @classmethod
    def _names_an_id(cls, value: str) -> str:
        if value.count("{id}") != 1:
            raise ValueError(f"found '{value}', wanted a path with {{id}} once")
        return value


class LocalSegmentationSets(Section):
    """train: at most so many images of each set train its probe."""

    kind: Literal["local"]
    train: Count
    templates: Templates
    sets: Annotated[dict[Name, LocalSet], Field(min_length=1)]


SegmentationSets = Annotated[MiniSegmentationSets | LocalSegmentationSets, Field(discriminator="kind")]
