"""params.yaml as a stage gets it, noting which values the stage takes: are they those that dvc.yaml declares for it?"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from pipeline.core import config

ROOT = Path(__file__).parents[1]
DECLARED: dict[str, list[str]] = {
    name: stage.get("params", [])
    for file in ("dvc.yaml", "pipeline/dvc.yaml")
    for name, stage in yaml.load((ROOT / file).read_text(), yaml.CSafeLoader)["stages"].items()
}
FETCHED = {  # what data/<profile>/planned/ has of a stage's parameters, on which alone it depends
    "images": "profiles.${run.profile}.images",
    "denoiser": "profiles.${run.profile}.denoiser",
    "encoder": "profiles.${run.profile}.encoder",
    "mmvp_vlm": "profiles.${run.profile}.mmvp_vlm",
    "zeroshot_sets": "profiles.${run.profile}.zeroshot_sets",
    "segmentation_sets": "profiles.${run.profile}.segmentation_sets",
    "mllm_sets": "profiles.${run.profile}.mllm_sets",
    "backbone": "backbones.${item.backbone}.source",
    "checkpoint": "backbones.${item.backbone}.checkpoints",
}
DECLARED |= {name: [section] for name, section in FETCHED.items()}
DECLARED |= {  # likewise of a scoring's
    "mmvp": [
        "profiles.${run.profile}.mmvp", "profiles.${run.profile}.mmvp_vlm",
        "backbones.${item.backbone}.published_pooling",
    ],
    **{name: [f"profiles.${{run.profile}}.{name}"] for name in ("zeroshot", "segmentation", "mllm")},
}  # fmt: skip
DECLARED |= dict.fromkeys(("shuffled", "drift"), DECLARED["control"])
ELSEWHERE = {
    "profiles.${run.profile}.threads",  # taken by pipeline/__init__.py
    "profiles.${run.profile}.base_recipe",  # it is a part of the recipes
    "launch",  # the same result whoever starts the processes
    "run.profile",  # in the paths of every stage, so DVC sees it
}
taken: dict[str, set[str]] = defaultdict(set)  # by stage, what it took in this process


@contextmanager
def watched(stage: ModuleType, arguments: Sequence[str]) -> Iterator[None]:
    """Let a stage take params; fail where it took what it does not declare: DVC would not run it for another value."""
    name, keys, read = stage.__name__.removeprefix("pipeline."), set[str](), config.read
    if name not in DECLARED:  # a tool, which DVC does not run
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "read", lambda kind, key, base="": keys.add(key) or read(kind, key, base))
        yield
    found = {re.sub(r"^profiles\.\w+", "profiles.${run.profile}", key) for key in keys}
    if arguments:
        found = {re.sub(rf"^backbones\.{arguments[0]}\b", "backbones.${item.backbone}", key) for key in found}
    if len(arguments) > 1:
        found = {re.sub(rf"\.recipes\.{arguments[1]}\b", ".recipes.${item.recipe}", key) for key in found}
    taken[name] |= found
    undeclared = {key for key in found - ELSEWHERE if not any(_within(key, section) for section in DECLARED[name])}
    if name == "report":  # which names the run by all that decides gains, and follows every stage that decides them
        undeclared = {key for key in undeclared if not key.startswith("profiles.${run.profile}")}
    assert not undeclared, f"stage {name} takes params that it does not declare in dvc.yaml: {sorted(undeclared)}"


def idle(stage: str) -> set[str]:
    """What a stage declares, and did not take."""
    return {
        name
        for name in DECLARED[stage]
        if name not in ELSEWHERE and not any(_within(key, name) or _within(name, key) for key in taken[stage])
    }


def _within(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")
