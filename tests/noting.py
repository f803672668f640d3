"""params.yaml as a stage gets it, noting which values the stage takes: are they those that dvc.yaml declares for it?"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pipeline.core import params

ROOT = Path(__file__).parents[1]
DECLARED: dict[str, list[str]] = {
    name: stage.get("params", [])
    for file in ("dvc.yaml", "pipeline/dvc.yaml")
    for name, stage in yaml.safe_load((ROOT / file).read_text())["stages"].items()
}
FETCHED = {  # what data/<profile>/planned/ has of a stage's parameters, on which alone it depends
    "images": "profiles.${run.profile}.images",
    "denoiser": "profiles.${run.profile}.denoiser",
    "mmvp_vlm": "profiles.${run.profile}.mmvp_vlm",
    "zeroshot_sets": "profiles.${run.profile}.zeroshot_sets",
    "backbone": "backbones.${item.backbone}.source",
    "released": "backbones.${item.backbone}.released",
}
DECLARED |= {name: [section] for name, section in FETCHED.items()}
DECLARED |= {  # likewise of a scoring's
    "mmvp": [
        "profiles.${run.profile}.mmvp", "profiles.${run.profile}.mmvp_vlm",
        "backbones.${item.backbone}.published_pooling",
    ],
    "zeroshot": ["profiles.${run.profile}.zeroshot"],
}  # fmt: skip
DECLARED |= dict.fromkeys(("shuffled", "drift"), DECLARED["control"])
ELSEWHERE = {
    "profiles.${run.profile}.threads",  # taken by pipeline/__init__.py
    "profiles.${run.profile}.base_recipe",  # params.load puts it into the recipes
    "launch.train",  # the same result whoever starts the processes
    "launch.processes",
    "run.profile",  # in the paths of every stage, so DVC sees it
}
taken: dict[str, set[str]] = defaultdict(set)  # by stage, what it took in this process


class Noting:
    """A section, whose type it takes for its own; `keys` gets the key of every value that is taken from it."""

    def __init__(self, section: BaseModel, keys: set[str], key: str = "") -> None:
        vars(self).update(section=section, keys=keys, key=key)

    @property
    def __class__(self) -> type:
        return type(self.section)

    def __getattr__(self, name: str) -> Any:
        kind = type(self.section)
        if name in kind.model_fields:
            return _noting(getattr(self.section, name), self.keys, f"{self.key}.{name}".lstrip("."))
        if isinstance(own := getattr(kind, name), property):
            return own.fget(self)
        self.keys.add(self.key)  # a method sees all of it
        return getattr(self.section, name)


def _noting(value: Any, keys: set[str], key: str) -> Any:
    if isinstance(value, BaseModel):
        return Noting(value, keys, key)
    if isinstance(value, dict) and any(isinstance(each, BaseModel) for each in value.values()):
        return {name: _noting(each, keys, f"{key}.{name}") for name, each in value.items()}
    keys.add(key)
    return value


@contextmanager
def watched(stage: ModuleType, arguments: Sequence[str]) -> Iterator[None]:
    """Let a stage take params; fail where it took what it does not declare: DVC would not run it for another value."""
    name, keys, load = stage.__name__.removeprefix("pipeline."), set[str](), params.load
    if name not in DECLARED:  # a tool, which DVC does not run
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(params, "load", lambda *path: Noting(load(*path), keys))
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
