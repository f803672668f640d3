"""DVC runs what an edit touches, and nothing else: each edit in a clone whose `dvc repro` has run."""

from collections.abc import Callable
from contextlib import chdir
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from clones import WEIGHTS, Clone
from dvc.repo import Repo
from shrunk import read_yaml, write_yaml
from test_end_to_end import reproduced, weights  # noqa: F401  (fixtures)

pytestmark = pytest.mark.slow
FETCH = {"input@images", "input@denoiser", "mmvp_vlm", "zeroshot_sets", "backbone@mini"}
TRAIN = {"train@mini-diva"}
SCORE = {"score@{}-mini-pretrained", "score-recipes@{}-mini-diva"}
SCORE = {name.format(benchmark) for name in SCORE for benchmark in ("mmvp", "zeroshot")}
EXPORT = {"export@mini-pretrained", "export-recipes@mini-diva"}


def comment(name: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        with (root / name).open("a") as file:
            file.write("# A comment.\n")

    return edit


def message(name: str, old: str) -> Callable[[Path], None]:
    """Another word in a message of a file."""

    def edit(root: Path) -> None:
        text = (root / name).read_text()
        assert text.count(old) == 1
        (root / name).write_text(text.replace(old, f"{old} indeed"))

    return edit


def values(**changes: Any) -> Callable[[Path], None]:
    """A change's key is dotted, with two underscores for a dot."""

    def edit(root: Path) -> None:
        content = read_yaml(root / "params.yaml")
        for key, value in changes.items():
            *parents, last = key.split("__")
            reduce(dict.__getitem__, parents, content)[last] = value(content) if callable(value) else value
        write_yaml(root / "params.yaml", content)

    return edit


EDITS = {
    "a comment in core": (comment("pipeline/core/outputs.py"), {"plan", "report"} | TRAIN | EXPORT),
    "a comment in data": (comment("pipeline/data/shards.py"), {"plan"} | TRAIN),
    "a comment in what fetches images": (comment("pipeline/data/links.py"), {"plan"}),
    "a comment in what reads others' checkpoints": (comment("pipeline/models/imports.py"), {"plan"}),
    "a comment in diva": (comment("pipeline/diva/losses.py"), {"plan"} | TRAIN),
    "a message in core": (message("pipeline/core/outputs.py", "Wait for it"), {"plan", "report"} | TRAIN | EXPORT),
    "a message in data": (message("pipeline/data/shards.py", "is no folder of shards"), {"plan"} | TRAIN),
    "a schema that many read": (comment("pipeline/sections/download.py"), {"plan", "report"} | EXPORT),
    "the recipes' schema": (comment("pipeline/sections/recipe.py"), {"plan"} | TRAIN),
    "a scoring's schema": (comment("pipeline/sections/mmvp.py"), {"plan"}),
    "a value of the recipe": (values(profiles__mini__recipes__diva__steps=5), {"plan"} | TRAIN),
    "another value than the base recipe's": (values(profiles__mini__recipes__diva__clip_norm=2.0), {"plan"} | TRAIN),
    "a value of another recipe": (values(profiles__mini__recipes__text_anchored__steps=5), {"plan"}),
    "a new recipe": (
        values(
            profiles__mini__recipes__other=lambda content: content["profiles"]["mini"]["recipes"]["diva"],
            run__recipes=["diva", "other"],
        ),
        {"plan", "report", "train@mini-other", "score-recipes@mmvp-mini-other", "score-recipes@zeroshot-mini-other"}
        | {"encoder@other", "export-recipes@mini-other"},
    ),
    "a new backbone": (
        values(backbones__other=lambda content: content["backbones"]["mini"], run__backbones=["mini", "other"]),
        {"plan", "report", "backbone@other", "train@other-diva"}
        | {each.replace("mini", "other") for each in SCORE | EXPORT},
    ),
    "a new control": (
        values(run__controls=["shuffled"]),
        {"plan", "report", "control@mini-diva-shuffled"}
        | {f"score-controls@{benchmark}-mini-diva-shuffled" for benchmark in ("mmvp", "zeroshot")},
    ),
    "how it runs": (values(launch__checkpoint_minutes=1, launch__cache_gb=9), set()),
    "a larger benchmark": (values(profiles__mini__zeroshot_sets__retrieval=7), {"plan"}),
    "a zero-shot set of another profile": (values(profiles__paper__zeroshot_sets__sets__other="main"), set()),
}
REMADE = {  # once plan has run, which finds that what these are made of has changed
    "a message in core": FETCH | SCORE,
    "a message in data": {"input@images"},
    "a larger benchmark": {"zeroshot_sets"},
}


two = pytest.mark.parametrize("weights", [WEIGHTS[:2]], ids=len, indirect=True)


@pytest.fixture
def clone(reproduced: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:  # noqa: F811
    copy = reproduced.copy(tmp_path / "clone")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(copy.root / ".dvc/tmp/site"))
    return copy


@two
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_runs_what_it_touches(clone: Clone, name: str) -> None:
    edit, expected = EDITS[name]
    edit(clone.root)
    assert stale(clone) == expected


@two
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name, (_, expected) in EDITS.items() if "plan" in expected])
def test_after_plan_an_edit_runs_what_it_touches(clone: Clone, name: str) -> None:
    """Its answers are the same, but where what an input is made of has changed."""
    edit, expected = EDITS[name]
    edit(clone.root)
    clone.run("dvc", "repro", "-s", "pipeline/dvc.yaml:plan")
    assert stale(clone) == expected - {"plan"} | REMADE.get(name, set())
    if name in ("a new recipe", "a new control"):  # what follows from their report
        clone.run("dvc", "repro", "report")
        assert stale(clone) == {stage for stage in expected if stage.startswith("export")}


def stale(clone: Clone) -> set[str]:
    """The stages that DVC calls changed, but for those that only follow from others."""
    with chdir(clone.root), Repo() as repo:
        return {stage.rpartition(":")[2] for stage in repo.status()}
