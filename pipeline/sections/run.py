"""Section `run`: the profile at hand, and the axes of its stages."""

from typing import Literal

from pydantic import Field

from pipeline.core.config import Name, Section

Downstream = Literal["segmentation", "mllm"]  # benchmarks with sets of their own, which no verdict rests on


class Run(Section):
    profile: Name
    backbones: list[Name] = Field(min_length=1)
    checkpoints: list[Name]
    recipes: list[Name]
    controls: list[Literal["shuffled", "drift"]]
    benchmarks: list[Literal["mmvp", "zeroshot"] | Downstream]
    benchmark_sets: list[Downstream]
    inputs: list[Literal["images", "denoiser"]]

    @property
    def trained(self) -> list[str]:
        """What is trained here: each recipe followed by its controls."""
        return [f"{recipe}{control}" for recipe in self.recipes for control in ("", *(f"-{c}" for c in self.controls))]

    @property
    def weights(self) -> list[str]:
        """All that is scored: as published, then what is trained here."""
        return ["pretrained", *self.checkpoints, *self.trained]
