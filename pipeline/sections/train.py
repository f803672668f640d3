"""Section `train`: what holds for the training of every recipe."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.core.config import Count, PositiveFloat, Section, Share

Pair = Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)]


class Crop(Section):
    scale: Pair
    ratio: Pair

    @field_validator("scale", "ratio")
    @classmethod
    def _ascending(cls, value: list[float]) -> list[float]:
        if value[0] > value[1]:
            raise ValueError(f"found {value}, wanted [low, high] with low <= high")
        return value

    @field_validator("scale")
    @classmethod
    def _share_of_the_image(cls, value: list[float]) -> list[float]:
        if value[1] > 1:
            raise ValueError(f"found {value}: a crop's share of the area is at most 1")
        return value


class Pixels(Section):
    tower_statistics: Literal["openai", "own"]
    tower_antialias: bool
    denoiser_statistics: Literal["imagenet", "tower"]


class Validation(Section):
    images: Count
    every: Count


class Train(Section):
    size: Count
    crop: Crop
    pixels: Pixels
    prompt: str
    micro_batch: Count
    precision: Literal["float32", "bfloat16"]
    compile: bool
    max_undecodable: Share
    validation: Validation
