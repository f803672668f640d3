"""Section `denoiser`, of stage denoiser."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.config import Count, PositiveFloat, Section, Share
from pipeline.sections.download import Download


class Scheduler(Section):
    num_train_timesteps: Count
    beta_schedule: Literal["scaled_linear", "linear"]
    beta_start: PositiveFloat
    beta_end: PositiveFloat
    prediction_type: Literal["epsilon", "v_prediction"]


class Autoencoder(Section):
    latent_channels: Count
    patch_size: Count


class MiniDenoiser(Section):
    kind: Literal["mini"]
    images: Count
    validation: Count
    text_tokens: Count
    autoencoder: Autoencoder
    unet: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: Scheduler
    steps: Count
    batch: Count
    lr: PositiveFloat
    empty_share: Share


class PublishedDenoiser(Section):
    """text_tokens: how many its text encoder makes of any prompt; stage `denoiser` compares what it fetched with it."""

    kind: Literal["hub"]
    text_tokens: Count
    download: Download


DenoiserSource = Annotated[MiniDenoiser | PublishedDenoiser, Field(discriminator="kind")]
