"""The only reader of params.yaml: every value is checked once, and every message names the key.

Sections carry the names of the stages that read them. Unknown keys are refused, so a mistyped one cannot be ignored.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.runtime import UserError

PARAMS_FILE = Path("params.yaml")


def _number(value: Any) -> Any:
    """`-S lr=0.00005` makes DVC write `5e-05`, which YAML 1.1 reads as a string for want of a dot: take it as meant."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Run(Section):
    profile: Name
    backbones: list[Name] = Field(min_length=1)
    weights: list[Literal["pretrained", "diva"]] = Field(min_length=1)


class Images(Section):
    count: Count
    size: Count
    shard_size: Count
    min_success: Share
    processes: Count
    threads: Count


class MmvpVlm(Section):
    pairs_per_pattern: Count


class ZeroshotSets(Section):
    classification: Count
    retrieval: Count
    probe_train: Count
    probe_test: Count


class Scheduler(Section):
    num_train_timesteps: Count
    beta_schedule: Literal["scaled_linear", "linear"]
    beta_start: PositiveFloat
    beta_end: PositiveFloat
    prediction_type: Literal["epsilon", "v_prediction"]


class Autoencoder(Section):
    latent_channels: Count
    patch_size: Count


class DenoiserSection(Section):
    pictures: Count
    held_out: Count
    autoencoder: Autoencoder
    unet: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: Scheduler
    steps: Count
    batch: Count
    lr: PositiveFloat
    empty_share: Share


class Crop(Section):
    scale: list[PositiveFloat] = Field(min_length=2, max_length=2)
    ratio: list[PositiveFloat] = Field(min_length=2, max_length=2)

    @field_validator("scale", "ratio")
    @classmethod
    def _ascending(cls, value: list[float]) -> list[float]:
        if value[0] > value[1]:
            raise ValueError(f"found {value}, wanted [low, high] with low <= high")
        return value

    @field_validator("scale")
    @classmethod
    def _share_of_the_picture(cls, value: list[float]) -> list[float]:
        if value[1] > 1:
            raise ValueError(f"found {value}: a crop's share of the area is at most 1")
        return value


class Pixels(Section):
    tower_statistics: Literal["openai", "own"]
    tower_antialias: bool
    generator_statistics: Literal["imagenet", "own"]


class Train(Section):
    size: Count
    crop: Crop
    pixels: Pixels
    prompt: str
    timesteps: list[int] = Field(min_length=2, max_length=2)
    draws: Count
    draw_weighting: Literal["published", "symmetric"]
    micro_batch: Count
    accumulation: Count
    steps: Count
    lr: PositiveFloat
    momentum: Share
    weight_decay: NonNegativeFloat
    warmup_ratio: Share
    clip_norm: PositiveFloat
    projection_steps: Annotated[int, Field(ge=0)]
    projection_lr: PositiveFloat
    precision: Literal["float32", "bfloat16"]
    max_undecodable: Share

    @field_validator("timesteps")
    @classmethod
    def _timesteps(cls, timesteps: list[int]) -> list[int]:
        low, high = timesteps
        if not 0 <= low < high:
            raise ValueError(f"found {timesteps}, wanted [low, high) with 0 <= low < high")
        return timesteps


class Mmvp(Section):
    seed: int
    draws: Count
    batch: Count


class Zeroshot(Section):
    batch: Count
    recall: Count


class Profile(Section):
    images: Images
    mmvp_vlm: MmvpVlm
    zeroshot_sets: ZeroshotSets
    denoiser: DenoiserSection
    train: Train
    mmvp: Mmvp
    zeroshot: Zeroshot

    @model_validator(mode="after")
    def _timesteps_exist(self) -> "Profile":
        found, most = self.train.timesteps[1], self.denoiser.scheduler.num_train_timesteps
        if found > most:
            raise ValueError(f"train.timesteps ends at {found}, but denoiser.scheduler.num_train_timesteps is {most}")
        return self


class TextTower(Section):
    steps: Count
    batch: Count
    lr: PositiveFloat


class ImageTower(Section):
    pictures: Count
    steps: Count
    batch: Count
    lr: PositiveFloat
    detail_probability: Share


class Source(Section):
    """Where a backbone comes from: for mini, how it is made."""

    architecture: dict[str, Any]
    preprocessing: dict[str, Any]
    text_tower: TextTower
    image_tower: ImageTower


class Tokens(Section):
    kind: Literal["none", "all", "random", "random_share", "windows"]
    number: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _number_fits(self) -> "Tokens":
        if (self.kind in ("none", "all")) != (self.number == 0):
            raise ValueError(
                f"kind '{self.kind}' with number {self.number:g}: none and all take none, the others need one"
            )
        return self


class Condition(Section):
    tokens: Tokens
    text: Literal["sequence", "mean"]


class ReadOutSection(Section):
    tokens: Tokens
    unit_tokens: bool
    unit_sum: bool


class Backbone(Section):
    profile: Name
    source: Source
    condition: Condition
    published_read_out: ReadOutSection


class Params(Section):
    seed: Annotated[int, Field(ge=0)]
    run: Run
    profiles: dict[Name, Profile]
    backbones: dict[Name, Backbone]

    @property
    def profile(self) -> Profile:
        return self.profiles[self.run.profile]

    @model_validator(mode="after")
    def _run_fits(self) -> "Params":
        if self.run.profile not in self.profiles:
            raise ValueError(f"run.profile is '{self.run.profile}'; profiles here: {', '.join(self.profiles)}")
        for key in self.run.backbones:
            if key not in self.backbones:
                raise ValueError(f"run.backbones names '{key}'; backbones here: {', '.join(self.backbones)}")
            own = self.backbones[key].profile
            if own != self.run.profile:
                fitting = [k for k, b in self.backbones.items() if b.profile == self.run.profile]
                raise ValueError(
                    f"run.backbones names '{key}', which belongs to profile '{own}', but run.profile is "
                    f"'{self.run.profile}'. Set run.profile={own}, or choose among: {', '.join(fitting) or 'none'}"
                )
        return self


def load(path: Path = PARAMS_FILE) -> Params:
    """Raises UserError naming every key that is wrong, what was found and what is wanted."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Run from the folder that holds params.yaml.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {content!r}, wanted sections such as run, profiles and backbones.")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join([f"{path}:", *(_explain(e) for e in error.errors())])) from None


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "run"
    if error["type"] == "extra_forbidden":
        return f"  {key}: unknown key (found {error['input']!r}). Remove it, or correct its name."
    if error["type"] == "missing":
        return f"  {key}: missing. Add it."
    if error["type"] == "value_error":
        return f"  {key}: {error['ctx']['error']}."
    return f"  {key}: found {error['input']!r}. {error['msg']}."
