"""Section `source` of a backbone: what stage backbone makes it of."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pipeline.core.config import Count, Float, PositiveFloat, Section, Share
from pipeline.sections.download import Address, Download, Hash


class MiniTextTower(Section):
    steps: Count
    batch: Count
    lr: PositiveFloat
    detail_share: Share


class MiniImageTower(Section):
    images: Count
    steps: Count
    batch: Count
    lr: PositiveFloat
    detail_probability: Share


class Preprocessing(Section):
    """open_clip's PreprocessCfg, but for the size, which is the architecture's."""

    mean: list[Float] = Field(min_length=3, max_length=3)
    std: list[PositiveFloat] = Field(min_length=3, max_length=3)
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "squash"]


class MiniSource(Section):
    """A backbone that is made here."""

    kind: Literal["mini"]
    architecture: dict[str, Any]
    preprocessing: Preprocessing
    text_tower: MiniTextTower
    image_tower: MiniImageTower


class CheckpointSource(Section):
    """A published checkpoint, in any format that models/imports.py reads."""

    kind: Literal["checkpoint"]
    architecture: str | dict[str, Any]  # the name of one of open_clip's configurations, or a configuration
    preprocessing: Preprocessing
    weights: Download
    tokenizer: Download | None = None  # its files; without them, CLIP's own, a part of open_clip

    @field_validator("weights")
    @classmethod
    def _one_file(cls, weights: Download) -> Download:
        if len(weights.files) != 1:
            raise ValueError(f"found {len(weights.files)} files, wanted one checkpoint")
        return weights


class RegistrySource(Section):
    """A published checkpoint that open_clip's registry knows, with architecture, preprocessing and address.

    model, tag: its names there. files: the checkpoint and its sha256, or the word hub. revision: of its repository, if
    it is taken from the hub. mirrors: further addresses. tokenizer: files of that repository, where the model does not
    take CLIP's own.
    """

    kind: Literal["open_clip"]
    model: str
    tag: str
    revision: str | None = None
    licence: str
    files: dict[str, Hash] = Field(min_length=1, max_length=1)
    mirrors: list[Address] = Field([])
    tokenizer: dict[str, Hash] = Field({})


Source = Annotated[MiniSource | CheckpointSource | RegistrySource, Field(discriminator="kind")]
