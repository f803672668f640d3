"""Section `zeroshot_sets`, of stage zeroshot_sets."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.core.config import Count, Section
from pipeline.sections.download import Download


class MiniZeroshotSets(Section):
    kind: Literal["mini"]
    classification: Count
    retrieval: Count
    probe_train: Count
    probe_test: Count


class PublishedZeroshotSets(Section):
    """clip-benchmark's sets on the hub by name; absent: a set that is usually meant, but is not there.

    run: the names of those that are fetched and scored, or all.
    """

    kind: Literal["hub"]
    at: str  # the address, with {name} and {revision}
    licence: str
    sets: dict[str, Annotated[str | None, BeforeValidator(lambda found: None if found == "absent" else found)]]
    run: Literal["all"] | Annotated[list[str], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_sets(self) -> "PublishedZeroshotSets":
        there = [name for name, revision in self.sets.items() if revision is not None]
        for name in there:
            try:
                self._download(name)
            except (ValueError, LookupError, AttributeError):  # of format, or of the address that it makes
                raise ValueError(
                    f"at, {self.at!r}, makes no address for {name}: {self.sets[name]!r}. Wanted one such as "
                    "hf://datasets/owner/wds_{name}@{revision}, and a commit, branch or tag without a slash"
                ) from None
        for name in () if self.run == "all" else self.run:
            if name not in there:
                raise ValueError(f"run names '{name}', which is none of the sets that are there: {', '.join(there)}")
        return self

    def chosen(self) -> dict[str, str | None]:
        """Those of `sets` that `run` names, in their order."""
        return {name: revision for name, revision in self.sets.items() if self.run == "all" or name in self.run}

    def downloads(self) -> dict[str, Download]:
        """Of the chosen sets those that are there."""
        return {name: self._download(name) for name, revision in self.chosen().items() if revision is not None}

    def _download(self, name: str) -> Download:
        at = self.at.format(name=name, revision=self.sets[name])
        return Download(at=[at], licence=self.licence, match=["test/*", "*.txt"])


ZeroshotSets = Annotated[MiniZeroshotSets | PublishedZeroshotSets, Field(discriminator="kind")]
