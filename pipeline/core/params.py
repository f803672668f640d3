"""The only reader of params.yaml: every value is checked once, and every message names the key.

Sections carry the names of the stages that read them. Unknown keys are refused, so a mistyped one cannot be ignored.
"""

import re
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.core.stages import UserError

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
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Address = Annotated[str, Field(pattern=r"^(https?://|hf://(datasets/)?[\w.-]+/[\w.-]+@[\w.-]+$)")]
Pair = Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Run(Section):
    profile: Name
    backbones: list[Name] = Field(min_length=1)
    checkpoints: list[Literal["released"]]
    recipes: list[Name]
    controls: list[Literal["shuffled", "drift"]]
    benchmarks: list[Literal["mmvp", "zeroshot"]]
    inputs: list[Literal["images", "denoiser"]]

    @property
    def weights(self) -> list[str]:
        """All that is scored: as published, then each recipe followed by its controls."""
        trained = [[recipe, *(f"{recipe}-{control}" for control in self.controls)] for recipe in self.recipes]
        return ["pretrained", *self.checkpoints, *chain.from_iterable(trained)]


class Launch(Section):
    """Who starts the processes of a training (engine/hosts.py). No result depends on it, and no stage."""

    train: str
    processes: Count


class Download(Section):
    """Files from elsewhere. Of the addresses `at` (mirrors) the first that answers is used.

    An address is https://host/folder, hf://owner/name@revision, or hf://datasets/owner/name@revision. A mirror may name
    a file differently if its sha256 is given: on a hub the file is found by this hash. An https address with the ending
    of the only file (.pt) is taken as the address of that file.
    """

    at: list[Address] = Field(min_length=1)
    licence: str
    files: dict[str, Sha256 | None] = {}  # path below the address -> sha256; null: the one that the hub states
    match: list[str] = []  # instead of `files`, on a hub: every file whose path fits one of these patterns

    @model_validator(mode="after")
    def _names_files(self) -> "Download":
        if bool(self.files) == bool(self.match):
            raise ValueError("wanted either files or match, and found both or none")
        if self.match and not all(address.startswith("hf://") for address in self.at):
            raise ValueError("match needs addresses that begin with hf://, because only a hub lists its files")
        for name in self.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"files names '{name}', which would be written outside its folder")
        return self


class MiniImages(Section):
    kind: Literal["mini"]
    count: Count
    detail_share: Share
    size: Count
    shard_size: Count
    min_success: Share
    processes: Count
    threads: Count


class Links(Section):
    """A list of captions and URLs, fetched by img2dataset."""

    tsv: str
    rows: Count
    size: Count
    shard_size: Count
    min_success: Share
    retries: Annotated[int, Field(ge=0)]
    processes: Count
    threads: Count


class PublishedImages(Section):
    kind: Literal["shards", "links"]
    shards: Download
    links: Links


class MiniMmvpVlm(Section):
    kind: Literal["mini"]
    pairs_per_pattern: Count


class PublishedMmvpVlm(Section):
    kind: Literal["hub"]
    pairs_per_pattern: Count
    download: Download


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
    """text_tokens: what its text encoder makes of any prompt, against which stage `denoiser` holds what it fetched."""

    kind: Literal["hub"]
    text_tokens: Count
    download: Download


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
    generator_statistics: Literal["imagenet", "own"]


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
    checkpoint_minutes: NonNegativeFloat


class Tokens(Section):
    kind: Literal["none", "all", "random", "random_fraction", "windows"]
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

    def fits(self, text_tokens: int) -> bool:
        """Can it be added to a text of so many tokens? Not `sequence` where the number depends on a tower's patches."""
        known = {"none": 1, "random": 1 + int(self.tokens.number)}  # the pooled token is one of them
        return self.text == "mean" or known.get(self.tokens.kind) == text_tokens


class Warmup(Section):
    """The projector's: how the fresh visual projection is fitted before anything else is trained, by AdamW at a
    constant rate.

    source: what the denoiser is conditioned on, the image tower's tokens, or the text tower's embedding of a caption.
    denoiser: whether the denoiser is fitted with it.
    """

    source: Literal["image_embeddings", "caption_embeddings"]
    denoiser: bool
    steps: Count
    lr: PositiveFloat


class ModalityGap(Section):
    """The map before the projection (diva/gap_correction.py): components of text space kept; images that it is
    measured on."""

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


RENAMED = {  # keys of earlier versions, by the end of their full name, and what took their place
    "run.weights": "run.checkpoints, run.recipes and run.controls",
    "train.recipe": "run.recipes",
    "train.held_out": "train.validation",
    "train.projection_steps": "warmup.steps of a recipe",
    "train.projection_lr": "warmup.lr of a recipe",
    **{f"train.{key}": f"optimizer.{key} of a recipe" for key in ("lr", "momentum", "weight_decay")},
    **{
        f"train.{key}": f"{key} of a recipe, or of base_recipe"
        for key in ("batch", "clip_norm", "draw_weights", "steps", "timesteps", "warmup_ratio")
    },
    "train.shard": "no key: every GPU holds the model",
    "train.streams": "no key: any number of processes share a batch",
    "fit": "warmup",
    "warmup.told": "warmup.source (image_embeddings, caption_embeddings)",
    "gap": "gap_correction",
    "gap_correction.pictures": "gap_correction.images",
    "contrast": "losses.info_nce",
    "anchor": "losses.self_distillation",
    "denoiser.pictures": "denoiser.images",
    "denoiser.held_out": "denoiser.validation",
    "image_tower.pictures": "image_tower.images",
    "published_read_out": "published_pooling",
    "published_pooling.unit_tokens": "published_pooling.normalize_tokens",
    "published_pooling.unit_sum": "published_pooling.normalize_output",
}


class Recipe(Section):
    """How feedback trains a backbone: the profile's `base_recipe`, but for the keys that the recipe has itself.

    condition: the backbone's own, or its class token alone added to the text's mean. losses: by the names in
    diva/losses.py, each with its weight and settings.
    """

    condition: Literal["backbone", "class_token"]
    warmup: Warmup | None = None
    gap_correction: ModalityGap | None = None
    trained: WholeTower | Lora | Head = Field(discriminator="kind")
    with_projection: bool
    timesteps: list[int] = Field(min_length=2, max_length=2)
    draw_weights: list[PositiveFloat] = Field(min_length=1)
    losses: dict[Name, dict[str, Any]] = Field(min_length=1)
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
        """A caption has one embedding and no patches, and the gap is one between embeddings."""
        if self.reads_captions and self.condition != "class_token":
            raise ValueError(
                "gap_correction, and warmup.source caption_embeddings, need condition class_token: they know the "
                "embedding alone"
            )
        return self


class Mmvp(Section):
    seed: int
    draws: Count
    batch: Count


class Zeroshot(Section):
    batch: Count
    recall: Count


class Profile(Section):
    """threads: of arithmetic on a CPU, which pipeline/__init__.py pins before this file is read."""

    threads: Count
    images: MiniImages | PublishedImages = Field(discriminator="kind")
    mmvp_vlm: MiniMmvpVlm | PublishedMmvpVlm = Field(discriminator="kind")
    zeroshot_sets: MiniZeroshotSets | PublishedZeroshotSets = Field(discriminator="kind")
    denoiser: MiniDenoiser | PublishedDenoiser = Field(discriminator="kind")
    train: Train
    recipes: dict[Name, Recipe]
    mmvp: Mmvp
    zeroshot: Zeroshot


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
    """A published checkpoint, in any format that models/backbones.py reads."""

    kind: Literal["checkpoint"]
    architecture: str | dict[str, Any]  # the name of one of open_clip's configurations, or a configuration
    preprocessing: Preprocessing
    weights: Download
    tokenizer: Download | None = None  # its files; null: CLIP's own, a part of open_clip

    @field_validator("weights")
    @classmethod
    def _one_file(cls, weights: Download) -> Download:
        if len(weights.files) != 1:
            raise ValueError(f"found {len(weights.files)} files, wanted one checkpoint")
        return weights


class PoolingSection(Section):
    """diva/condition.py's PoolingRule says what the keys mean."""

    tokens: Tokens
    normalize_tokens: bool
    normalize_output: bool
    drawn_per: Literal["statement", "pair"] = "statement"
    resize_mode: Literal["shortest", "squash"] | None = None


class Published(Section):
    """What the paper's table says: million parameters; pairs right in %, average and by pattern.

    later: what later methods report for the same backbone and pairs, each under a pooling rule of its own.
    """

    parameters: PositiveFloat
    before: PositiveFloat
    after: PositiveFloat
    before_patterns: list[NonNegativeFloat] = Field(min_length=9, max_length=9)
    after_patterns: list[NonNegativeFloat] | None = Field(min_length=9, max_length=9)
    later: dict[str, PositiveFloat] = {}


class GpuMemory(Section):
    """What training takes, in GB: for weights, gradients and momentum, and for each image of a micro-batch."""

    fixed: PositiveFloat
    image: PositiveFloat


class BackboneEntry(Section):
    profile: Name
    source: MiniSource | CheckpointSource = Field(discriminator="kind")
    released: Download | None = None  # the authors' tuned weights
    condition: Condition
    published_pooling: PoolingSection
    published: Published | None = None
    gpu_memory: GpuMemory | None = None


class Params(Section):
    seed: Annotated[int, Field(ge=0)]
    run: Run
    launch: Launch
    profiles: dict[Name, Profile]
    backbones: dict[Name, BackboneEntry]

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
            if "released" in self.run.checkpoints and self.backbones[key].released is None:
                raise ValueError(
                    f"run.checkpoints names 'released', but backbones.{key} has none. Take it out, or add them there"
                )
        for name in self.run.recipes:
            if name not in self.profile.recipes:
                raise ValueError(f"run.recipes names '{name}'; recipes here: {', '.join(self.profile.recipes)}")
            self._recipe_fits(f"profiles.{self.run.profile}.recipes.{name}", self.profile.recipes[name])
        wanted = ["images", "denoiser"] if self.run.recipes else []
        if sorted(self.run.inputs) != sorted(wanted):
            does = "train with both" if wanted else "train nothing"
            raise ValueError(
                f"run.inputs is {self.run.inputs}, but run.recipes is {self.run.recipes}, which {does}. "
                f"Set run.inputs=[{','.join(wanted)}]"
            )
        return self

    def _recipe_fits(self, key: str, recipe: Recipe) -> None:
        if "shuffled" in self.run.controls and recipe.batch == 1:
            raise ValueError(
                f"run.controls names 'shuffled', which exchanges the images of a step, but {key}.batch is 1. Raise it"
            )
        for backbone in self.run.backbones:
            if recipe.condition != "backbone":  # its class token is added to the text's mean
                continue
            where, condition = f"backbones.{backbone}", self.backbones[backbone].condition
            tokens, wanted = condition.tokens, self.profile.denoiser.text_tokens
            if not condition.fits(wanted):
                raise ValueError(
                    f"{where}.condition adds its tokens (kind {tokens.kind}, number {tokens.number:g}) to the text's "
                    f"one by one (text: sequence), and profiles.{self.run.profile}.denoiser.text_tokens is {wanted}. "
                    f"Set tokens {{kind: random, number: {wanted - 1}}}, which are as many with the pooled one, or "
                    "text: mean"
                )


def load(path: Path = PARAMS_FILE) -> Params:
    """Raises UserError naming every key that is wrong, what was found and what is wanted."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Run from the folder that holds params.yaml.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {content!r}, wanted sections such as run, profiles and backbones.")
    _on_the_base(content)
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join([f"{path}:", *(_explain(e, content) for e in error.errors())])) from None


def _on_the_base(content: dict[str, Any]) -> None:
    """Add what a profile's `base_recipe` says to its recipes; a recipe's own key takes the place of the base's."""
    profiles = content.get("profiles")
    for profile in profiles.values() if isinstance(profiles, dict) else ():
        if isinstance(profile, dict) and isinstance(profile.get("recipes"), dict):
            base = profile.pop("base_recipe", None) or {}
            profile["recipes"] = {name: {**base, **(own or {})} for name, own in profile["recipes"].items()}


def _explain(error: Any, content: Any) -> str:
    parts = []
    for part in error["loc"]:  # pydantic names the chosen kind of a section, too, as if it were a key: leave it out
        if isinstance(content, list) or (isinstance(content, dict) and part in content):
            parts.append(str(part))
            content = content[part]
    if error["type"] == "missing":
        parts.append(str(error["loc"][-1]))
    key = ".".join(parts) or "run"
    if error["type"] == "extra_forbidden":
        old = next((old for old in RENAMED if f".{key}".endswith(f".{old}")), None)
        if old:
            return f"  {key}: an old key. Now it is {RENAMED[old]}."
        return f"  {key}: unknown key (found {error['input']!r}). Remove it, or correct its name."
    if error["type"] == "missing":
        return f"  {key}: missing. Add it."
    if error["type"] == "value_error":
        return f"  {key}: {error['ctx']['error']}."
    return f"  {key}: found {error['input']!r}. {error['msg']}."
