"""Section `zeroshot_sets`, of stage zeroshot_sets."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.config import Count, Section
from pipeline.sections.download import Download


class MiniZeroshotSets(Section):
    kind: Literal["mini"]
    classification: Count
    retrieval: Count
    probe_train: Count
    probe_test: Count


class PublishedZeroshotSets(Section):
    """clip-benchmark's sets on the hub by name; null for a set that is usually meant but is not there."""

    kind: Literal["hub"]
    at: str  # the address, with {name} and {revision}
    licence: str
    sets: dict[str, str | None]

    def downloads(self) -> dict[str, Download]:
        """The sets that are there."""
        return {
            name: Download(
                at=[self.at.format(name=name, revision=revision)], licence=self.licence, match=["test/*", "*.txt"]
            )
            for name, revision in self.sets.items()
            if revision
        }


ZeroshotSets = Annotated[MiniZeroshotSets | PublishedZeroshotSets, Field(discriminator="kind")]
