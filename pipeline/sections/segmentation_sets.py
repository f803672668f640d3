"""Section `segmentation_sets`, of the stage of that name."""

from collections import Counter
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.config import Count, Name, Section

Templates = Annotated[list[Annotated[str, Field(pattern=r"\{c\}")]], Field(min_length=1)]


class MiniSegmentationSets(Section):
    kind: Literal["mini"]
    train: Count
    test: Count


class LocalSet(Section):
    """A set fetched by hand, in mmsegmentation's layout; value 0 of a mask is unlabelled, i is class i from 1 on.

    at: its folder. images, masks: paths in it, with {id}, and with {split} if each split has a folder of its own.
    ids: a file in it that lists a split's ids, one a line, with {split}; by default all ids that have a mask.
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
        if value.count("{id}") != 1 or PurePosixPath(value).is_absolute():
            raise ValueError(f"found '{value}', wanted a path below `at` with {{id}} once")
        return value

    @field_validator("classes")
    @classmethod
    def _names_each_class_once(cls, value: list[str]) -> list[str]:
        for names in value:
            if "" in synonyms(names):
                raise ValueError(f"found '{names}', wanted a name before and after each comma")
        name, times = Counter(synonyms(names)[0] for names in value).most_common(1)[0]
        if times > 1:
            raise ValueError(f"found '{name}' {times} times, wanted each class once")
        return value

    @model_validator(mode="after")
    def _splits_differ(self) -> "LocalSet":
        key = "masks" if self.ids is None else "ids"
        if "{split}" not in (found := getattr(self, key)) or self.train == self.test:
            raise ValueError(
                f"{key} is '{found}', train '{self.train}' and test '{self.test}', so both would be the same images; "
                f"name {{split}} in {key}, and two splits"
            )
        return self


def synonyms(names: str) -> list[str]:
    """The names of a class, as `classes` has them; it goes by the first."""
    return [name.strip() for name in names.split(",")]


class LocalSegmentationSets(Section):
    """train: at most so many images of each set train its probe."""

    kind: Literal["local"]
    train: Count
    templates: Templates
    sets: Annotated[dict[Name, LocalSet], Field(min_length=1)]


SegmentationSets = Annotated[MiniSegmentationSets | LocalSegmentationSets, Field(discriminator="kind")]
