"""Section `recipes`, each on the profile's `base_recipe`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.core import config
from pipeline.core.config import Count, Name, NonNegativeFloat, PositiveFloat, Section, Share, number


class Warmup(Section):
    """The projector warm-up (stage 1): the fresh projector is trained before the tower, by AdamW at a constant rate.

    source: what the denoiser is conditioned on: the image tower's tokens, or the text tower's embedding of a caption.
    denoiser: whether the denoiser is trained with the projector.
    """

    source: Literal["image_embeddings", "caption_embeddings"]
    denoiser: bool
    steps: Count
    lr: PositiveFloat


class ModalityGap(Section):
    """The modality-gap correction (diva/gap_correction.py). components: dimensions of text space that it keeps. images:
    how many images, with their captions, it is measured on."""

    components: Count
    images: Count


class WholeTower(Section):
    kind: Literal["tower"]


class Lora(Section):
    kind: Literal["lora"]
    rank: Count
    alpha: PositiveFloat


class Head(Section):
    kind: Literal["head"]
    heads: Count


class Sgd(Section):
    kind: Literal["sgd"]
    lr: PositiveFloat
    momentum: Share
    weight_decay: NonNegativeFloat


class AdamW(Section):
    kind: Literal["adamw"]
    lr: PositiveFloat
    weight_decay: NonNegativeFloat


class Recipe(Section):
    """How feedback trains a backbone. Keys that a recipe does not have come from the profile's `base_recipe`.

    condition: the rule of the backbone, or its class token alone, added to the mean of the prompt's embedding. losses:
    weight and settings of each, by the names in diva/losses.py.
    """

    condition: Literal["backbone", "class_token"]
    warmup: Warmup | None = None
    gap_correction: ModalityGap | None = None
    trained: WholeTower | Lora | Head = Field(discriminator="kind")
    with_projection: bool
    timesteps: list[int] = Field(min_length=2, max_length=2)
    draw_weights: list[PositiveFloat] = Field(min_length=1)
    losses: dict[Name, dict[str, Annotated[Any, BeforeValidator(number)]]] = Field(min_length=1)
    optimizer: Sgd | AdamW = Field(discriminator="kind")
    batch: Count
    steps: Count
    warmup_ratio: Share
    clip_norm: PositiveFloat

    @property
    def warms_up_on_captions(self) -> bool:
        return self.warmup is not None and self.warmup.source == "caption_embeddings"

    @property
    def reads_captions(self) -> bool:
        return self.gap_correction is not None or self.warms_up_on_captions

    @field_validator("timesteps")
    @classmethod
    def _timesteps(cls, timesteps: list[int]) -> list[int]:
        low, high = timesteps
        if not 0 <= low < high:
            raise ValueError(f"found {timesteps}, wanted [low, high) with 0 <= low < high")
        return timesteps

    @model_validator(mode="after")
    def _embedding_alone(self) -> "Recipe":
        """A caption has one embedding and no patches, and the modality gap is measured between embeddings."""
        if self.reads_captions and self.condition != "class_token":
            raise ValueError(
                "gap_correction, and warmup.source caption_embeddings, need condition class_token, because a caption "
                "has one embedding and no patch tokens"
            )
        return self


def read(profile: str, name: str) -> Recipe:
    """A recipe of a profile."""
    return config.read(Recipe, f"profiles.{profile}.recipes.{name}", base=f"profiles.{profile}.base_recipe")
