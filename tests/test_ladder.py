"""The ladder: what an entry must be, when its claim holds, and a run that is interrupted and goes on."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats
from shrunk import run, write_params

from metrics.recipes import experiment
from pipeline.core.stages import UserError
from pipeline.mini import world
from pipeline.tools import ladder
from pipeline.tools.ladder import ENTRIES, MEASURES, Entry, FrozenWorld

ENTRY: dict[str, Any] = {
    "by": "the test", "knows": "nothing", "claim": 2.0, "seeds": [1, 2, 3, 4, 5],
    "recipe": {
        "trained": {"kind": "tower"}, "optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.0}, "batch": 4,
        "steps": 2,
    },
}  # fmt: skip


def write(**changes: Any) -> None:
    ENTRIES.mkdir(parents=True, exist_ok=True)
    (ENTRIES / "own.yaml").write_text(yaml.safe_dump(ENTRY | changes))


def rows(pairs: list[float], zeroshot: list[float]) -> pd.DataFrame:
    """A log, whose backbone has 30 % of the pairs and 90 % of zero-shot accuracy before training."""
    after = [
        {
            "weights": "trained",
            "seed": i,
            **dict.fromkeys(MEASURES, 50.0),
            "pairs_stock": p,
            "zeroshot": z,
            "seconds": 9,
        }
        for i, (p, z) in enumerate(zip(pairs, zeroshot, strict=True), 1)
    ]
    before = {"weights": "pretrained", "seed": 0, **dict.fromkeys(MEASURES, 50.0), "seconds": 0}
    return pd.DataFrame([before | {"pairs_stock": 30.0, "zeroshot": 90.0}, *after])


HELD = [33.0, 33.5, 32.9, 33.2, 33.1], [89.9, 89.8, 89.9, 90.0, 89.8]


def test_a_claim_holds_where_both_tests_say_so(capsys: pytest.CaptureFixture) -> None:
    found = Entry.model_validate(ENTRY)
    ladder.judge("own", found, rows(*HELD))
    p = stats.ttest_1samp(np.array(HELD[0]) - 30, 2, alternative="greater").pvalue
    assert f"gains more than 2 points of pairs: p = {p:.2g}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"own: not shown at p < 0\.01 that it gains more than 3\.1 points of pairs\."):
        ladder.judge("own", found.model_copy(update={"claim": 3.1}), rows(*HELD))
    with pytest.raises(UserError, match=r"that it loses less than 0\.5 points of zero-shot accuracy"):
        ladder.judge("own", found, rows(HELD[0], [89.4, 89.6, 89.5, 89.6, 89.5]))
    with pytest.raises(UserError, match=r"gains more .* or loses less"):
        ladder.judge("own", found, rows([float("nan"), *HELD[0][1:]], [float("nan"), *HELD[1][1:]]))
    beside = rows([*HELD[0], 0.0], [*HELD[1], 0.0])  # a seed that the entry does not name
    ladder.judge("own", found, beside)


def test_the_table_says_whether_a_claim_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_params()
    nan = float("nan")
    for claim, (pairs, zeroshot), said in (
        (2.0, HELD, "yes | 5 | +3.1"),
        (3.1, HELD, "no | 5 | +3.1"),
        (2.0, ([33.0] * 3, [90.0] * 3), "unfinished | 3 | +3.0"),
        (2.0, ([33.0, nan, 33.0, 33.0, 33.0], [90.0, nan, 90.0, 90.0, 90.0]), "no | 5 | +nan"),
    ):
        write(claim=claim)
        recipe = ladder.hash_of(ladder.entry("own"))
        rows(pairs, zeroshot).assign(recipe=recipe).to_csv(ENTRIES / "own.csv", index=False)
        assert f"| `own` | nothing | {claim:g} | {said} |" in ladder.markdown()
    write(recipe=ENTRY["recipe"] | {"steps": 3})
    assert "`own`" not in ladder.markdown()  # its log is of another recipe


def test_seeds_that_agree_in_everything_are_compared_as_they_are() -> None:
    found = Entry.model_validate(ENTRY)
    ladder.judge("own", found, rows([33.0] * 5, [90.0] * 5))
    with pytest.raises(UserError, match="gains more than 2 points"):
        ladder.judge("own", found, rows([32.0] * 5, [90.0] * 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 2]}, r"ladder/own\.yaml:\n  seeds: found \[1, 2\]\. List should have at least 5 items"),
        ({"claim": -1.0}, r"claim: found -1\.0"),
        ({"more": 1}, "more: unknown key"),
        ({"recipe": {"trained": {"kind": "tower"}}}, r"recipe\.optimizer: missing"),
        (
            {"recipe": ENTRY["recipe"] | {"losses": {"magic": {"weight": 1.0}}}},
            "own.yaml:\n  recipe.losses.magic: unknown",
        ),
    ],
)
@pytest.mark.usefixtures("unfinished")
def test_a_wrong_entry_is_refused_before_anything_is_trained(
    changes: dict, message: str, capsys: pytest.CaptureFixture
) -> None:
    write(**changes)
    with pytest.raises(SystemExit):
        run(ladder, "own")
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.usefixtures("unfinished")
def test_an_entry_that_is_not_there_and_a_world_that_is_not_made_are_named(capsys: pytest.CaptureFixture) -> None:
    write()
    for name, message in (
        ("other", "other.yaml does not exist. Write it, or name one of these: own."),
        ("own", "models/mini/pretrained/mini does not exist. Make the frozen world: `dvc repro pipeline/dvc.yaml:back"),
    ):
        with pytest.raises(SystemExit):
            run(ladder, name)
        assert message in capsys.readouterr().err


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_params()


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_an_interrupted_entry_goes_on_and_made_again_has_the_same_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write(claim=99.0)
    measured, made = ladder.measured, list[int]()

    def interrupted(world: FrozenWorld, name: str, weights: str, seed: int) -> dict[str, Any]:
        if seed == 3 and made.count(3) == 0:
            made.append(3)
            raise KeyboardInterrupt
        made.append(seed)
        return measured(world, name, weights, seed) | {"seconds": 1}

    monkeypatch.setattr(ladder, "measured", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run(ladder, "own")
    for _ in range(2):  # the second has nothing left to do but to judge
        with pytest.raises(SystemExit):
            run(ladder, "own")
        assert "not shown at p < 0.01 that it gains more than 99 points" in capsys.readouterr().err
    assert made == [0, 1, 2, 3, 3, 4, 5]
    first = pd.read_csv(ENTRIES / "own.csv")
    with pytest.raises(SystemExit):
        run(ladder, "own", "--again")
    assert made[7:] == [0, 1, 2, 3, 4, 5]
    assert first.to_string(index=False) in capsys.readouterr().out
    assert not ladder.SCRATCH.exists()
    run(ladder)
    assert "| `own` | nothing | 99 | no | 5 |" in capsys.readouterr().out
    write(claim=99.0, recipe=ENTRY["recipe"] | {"steps": 1})
    with pytest.raises(SystemExit):
        run(ladder, "own")
    assert "6 rows of metrics/recipes/ladder/own.csv are of another recipe" in capsys.readouterr().out
    assert made[13:] == [0, 1, 2, 3, 4, 5]


def test_the_set_of_the_ladder_is_no_other_set() -> None:
    assert ladder.SET in world.SETS
    assert ladder.SET not in (*experiment.BENCHMARKS, "scorings", "probe")
