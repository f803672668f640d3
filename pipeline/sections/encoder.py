"""Section `encoder`, of stage encoder: the frozen image encoder that some recipes' losses read."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.core.config import Count, PositiveFloat, Section
from pipeline.sections.denoiser import Autoencoder
from pipeline.sections.download import Download

NO_ENCODER = {"encoder": None}  # of a recipe whose losses read none: what plan and stage encoder write


class MiniEncoder(Section):
    """architecture, arguments: of timm. images: that it is trained on. probe_train, probe_test: other images, on which
    a linear classifier then learns and shows what the embedding holds. target: of the image, what is restored."""

    kind: Literal["mini"]
    architecture: str
    arguments: dict[str, Any]
    images: Count
    probe_train: Count
    probe_test: Count
    target: Autoencoder
    decoder_width: Count
    steps: Count
    batch: Count
    lr: PositiveFloat


class PublishedEncoder(Section):
    """architecture: timm's name of what is fetched, so that memory is known before; stage encoder compares the two."""

    kind: Literal["hub"]
    architecture: str
    arguments: ClassVar[dict[str, Any]] = {}
    download: Download


EncoderSource = Annotated[MiniEncoder | PublishedEncoder, Field(discriminator="kind")]
