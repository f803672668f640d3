"""All of params.yaml, and whether its sections go together: for stage plan, which comes first, and for tools."""

from pathlib import Path
from typing import get_args

from pydantic import model_validator

from pipeline.core import config
from pipeline.core.config import Count, Name, Section
from pipeline.core.stages import UserError
from pipeline.sections.backbone import BackboneEntry
from pipeline.sections.denoiser import DenoiserSource
from pipeline.sections.encoder import EncoderSource
from pipeline.sections.images import Images
from pipeline.sections.launch import Launch
from pipeline.sections.mllm import Mllm
from pipeline.sections.mllm_sets import MllmSets, PublishedMllmSets
from pipeline.sections.mmvp import Mmvp
from pipeline.sections.mmvp_vlm import MmvpVlm
from pipeline.sections.recipe import Recipe
from pipeline.sections.reported import Reported
from pipeline.sections.run import Downstream
from pipeline.sections.segmentation import Segmentation
from pipeline.sections.segmentation_sets import SegmentationSets
from pipeline.sections.train import Train
from pipeline.sections.zeroshot import Zeroshot
from pipeline.sections.zeroshot_sets import ZeroshotSets


class Profile(Section):
    """threads: of arithmetic on a CPU, which pipeline/__init__.py pins before this file is read. encoder: needed where
    a loss of the run's recipes reads it."""

    threads: Count
    images: Images
    mmvp_vlm: MmvpVlm
    zeroshot_sets: ZeroshotSets
    segmentation_sets: SegmentationSets
    mllm_sets: MllmSets
    denoiser: DenoiserSource
    encoder: EncoderSource | None = None
    train: Train
    recipes: dict[Name, Recipe]
    mmvp: Mmvp
    zeroshot: Zeroshot
    segmentation: Segmentation
    mllm: Mllm

    @model_validator(mode="after")
    def _mllm_learns_what_is_there(self) -> "Profile":
        fetched = isinstance(self.mllm_sets, PublishedMllmSets)
        there = [*self.mllm_sets.learnt] if isinstance(self.mllm_sets, PublishedMllmSets) else ["train"]
        for phase in self.mllm.phases:
            if phase.split not in there:
                raise ValueError(f"mllm.phases names the split '{phase.split}'; mllm_sets has {', '.join(there)}")
        if fetched != (self.mllm.language == "fetched"):
            wanted = "'fetched'" if fetched else "values of transformers' LlamaConfig"
            raise ValueError(f"mllm.language is {self.mllm.language!r}, but these mllm_sets need {wanted}")
        return self


class Params(Reported):
    launch: Launch
    profiles: dict[Name, Profile]

    @property
    def profile(self) -> Profile:
        return self.profiles[self.run.profile]

    def backbone(self, name: str) -> BackboneEntry:
        """Raises UserError for a name that is not in params.yaml."""
        if name not in self.backbones:
            raise UserError(f"params.yaml has no backbone '{name}'. Choose one of these: {', '.join(self.backbones)}.")
        return self.backbones[name]

    @model_validator(mode="after")
    def _run_fits(self) -> "Params":
        if self.run.profile not in self.profiles:
            raise ValueError(f"run.profile is '{self.run.profile}', which is none of {', '.join(self.profiles)}")
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
            for name in self.run.checkpoints:
                there = self.backbones[key].checkpoints
                if name not in there:
                    raise ValueError(
                        f"run.checkpoints names '{name}', but backbones.{key}.checkpoints has "
                        f"{', '.join(there) or 'none'}. Take it out, or add it there"
                    )
                if name in {"pretrained", *self.profile.recipes}:
                    raise ValueError(f"backbones.{key}.checkpoints names '{name}', as other weights are. Rename it")
        sets = [name for name in get_args(Downstream) if name in self.run.benchmarks]
        if sorted(self.run.benchmark_sets) != sorted(sets):
            raise ValueError(
                f"run.benchmark_sets is {self.run.benchmark_sets}, but run.benchmarks is {self.run.benchmarks}. "
                f"Set run.benchmark_sets=[{','.join(sets)}]"
            )
        for name in self.run.recipes:
            if name not in self.profile.recipes:
                raise ValueError(
                    f"run.recipes names '{name}', which is none of profile {self.run.profile}: "
                    f"{', '.join(self.profile.recipes)}. Correct the name, or add the recipe"
                )
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
                    f"{where}.condition adds its tokens (kind {tokens.kind}, number {tokens.number:g}) to the prompt's "
                    f"one by one (text: sequence), but the prompt has {wanted} "
                    f"(profiles.{self.run.profile}.denoiser.text_tokens). Set tokens {{kind: random, number: "
                    f"{wanted - 1}}}, which with the pooled token are as many, or text: mean"
                )


def load(path: Path = config.PARAMS_FILE) -> Params:
    """Raises UserError naming every key that is wrong, what was found and what is wanted."""
    content = config.content(path)
    profiles = content.get("profiles")
    for key, profile in profiles.items() if isinstance(profiles, dict) else ():
        if isinstance(profile, dict) and isinstance(profile.get("recipes"), dict):
            base, where = profile.pop("base_recipe", None), f"profiles.{key}.base_recipe"
            profile["recipes"] = {
                name: config.on_base(own, base, where, path) for name, own in profile["recipes"].items()
            }
    return config.checked(Params, content, path=path)
