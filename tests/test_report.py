"""The evidence on made-up scores with known answers, the report on a shrunken run, and commits compared."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from shrunk import DATA, METRICS, read_yaml, run, write_params, write_seeds, write_yaml

from pipeline import report
from pipeline.benchmarks import mmvp, scoring
from pipeline.core.stages import UserError
from pipeline.evidence import page, provenance, results, statistics
from pipeline.evidence.results import COLUMNS, Claim, Scores
from pipeline.mini import world
from pipeline.sections import params, reported

PATTERNS = ["Color"] * 2 + ["Text"] * 3


def made(stock: list[float], published: list[float], objects: list[bool], texts: list[bool]) -> Scores:
    """Five pairs of two patterns; four images to classify; two images with two texts each to find."""
    table = pd.DataFrame({"pair": range(1, 6), "pattern": PATTERNS, "image_to_statement": stock})
    pairs = pd.concat(
        [
            table.assign(pooling=name, statement_to_image=right)
            for name, right in (("stock", stock), ("published", published))
        ]
    )
    block = {name: group for name, group in pairs.groupby("pooling")}

    def average(pooling: str, direction: str) -> float:
        return 100 * block[pooling].groupby("pattern")[direction].mean().mean()

    directions = ("statement_to_image", "image_to_statement")
    mmvp = {r: {d: {"average": average(r, d)} for d in directions} for r in ("stock", "published")}
    answers = pd.concat(
        [
            pd.DataFrame({"set": "objects", "measure": "accuracy", "image": range(4), "right": objects}),
            pd.DataFrame({"set": "captions", "measure": "image_to_text", "image": range(2), "right": [True, False]}),
            pd.DataFrame({"set": "captions", "measure": "text_to_image", "image": [0, 0, 1, 1], "right": texts}),
        ]
    )
    zeroshot = {
        "objects": {"kind": "classification", "average": 100 * np.mean(objects)},
        "captions": {"kind": "retrieval", "average": 100 * (0.5 + np.mean(texts)) / 2},
    }
    return Scores(mmvp, pairs, zeroshot, answers)


BEFORE = made([0, 1, 0, 0, 1], [0, 0, 0.25, 0.75, 1], [True, True, True, False], [True, False, False, False])
AFTER = made([1, 1, 0, 1, 0], [0.5, 0, 0.25, 0.25, 1], [True, True, False, False], [True, True, False, False])


def test_a_headline_is_the_mean_of_what_there_is() -> None:
    sets = {
        "objects": {"kind": "classification", "average": 90.0},
        "animals": {"kind": "classification", "average": 80.0},
        "captions": {"kind": "retrieval", "average": 12.346},
    }
    found = results.headline(BEFORE.mmvp, sets)
    assert found == {
        "pairs_stock": 41.67, "pairs_published": 33.33, "image_to_statement_stock": 41.67,
        "image_to_statement_published": 41.67, "zeroshot": 85, "retrieval": 12.35,
    }  # fmt: skip
    assert [column for column in COLUMNS if column in found] == list(found)


def test_answers_come_in_strata_and_an_image_is_one_sample() -> None:
    stock = BEFORE.strata("pairs_stock")
    assert {name: answers.tolist() for name, answers in stock.items()} == {"Color": [0, 100], "Text": [0, 0, 100]}
    assert BEFORE.strata("pairs_published")["Text"].tolist() == [25, 75, 100]
    assert BEFORE.strata("zeroshot")["objects"].tolist() == [100, 100, 100, 0]
    assert BEFORE.strata("retrieval")["captions"].tolist() == [75, 0]  # of each image: its own hit, its texts' mean
    assert BEFORE.strata("probe") == {}


def test_a_gain_is_the_difference_of_two_headlines() -> None:
    gains, (was, now) = results.gains(BEFORE, AFTER), (BEFORE.headline(), AFTER.headline())
    assert gains.keys() == was.keys()
    assert {c: gain.value for c, gain in gains.items()} == pytest.approx({c: now[c] - was[c] for c in was}, abs=0.011)
    assert all(gain.low <= gain.value <= gain.high for gain in gains.values())
    assert (gains["zeroshot"].value, gains["zeroshot"].low < -25 < gains["zeroshot"].high) == (-25, True)


def test_answers_to_other_questions_are_not_compared() -> None:
    fewer = Scores(AFTER.mmvp, AFTER.pairs[AFTER.pairs.pair < 5], AFTER.zeroshot, AFTER.answers)
    with pytest.raises(UserError, match="different questions"):
        results.gains(BEFORE, fewer)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"prompt": "an image of "}, "prompt: a photo of  and an image of "),
        ({"version": 2}, "version: 1 and 2"),
        ({"sets": {"a": "1", "c": "3"}}, "sets.b: 2 and nothing; sets.c: nothing and 3"),
    ],
)
def test_different_scorings_are_not_compared(other: dict[str, Any], said: str) -> None:
    asked = {"version": 1, "prompt": "a photo of ", "sets": {"a": "1", "b": "2"}, "sha256": "1234"}
    same, changed = (replace(AFTER, scoring={"mmvp": record}) for record in (asked, asked | other | {"sha256": "5678"}))
    before = replace(BEFORE, scoring={"mmvp": asked, "zeroshot": {"version": 1}})
    assert results.gains(before, same) == results.gains(BEFORE, AFTER)
    with pytest.raises(UserError, match=f"mmvp scores before and after were made in different ways, .*: {said}. Run"):
        results.gains(before, changed)


def test_a_scoring_is_recorded_with_all_that_decides_it(finished: Path, tmp_path: Path) -> None:
    for benchmark, keys in (("mmvp", {"prompt", "published_pooling", "pairs"}), ("zeroshot", {"sets", "recall"})):
        records = [
            json.loads((finished / METRICS / f"scores/{benchmark}/mini-{weights}/scoring.json").read_text())
            for weights in ("pretrained", "diva")
        ]
        assert records[0] == records[1]
        assert records[0].keys() >= keys | {"version", "rule", "precision", "preprocessing", "sha256"}
    (tmp_path / "a").mkdir()
    hashes = set()
    for name, content in (("a/list.txt", "1"), ("a/list.txt", "2"), ("a/0.tar", "1"), ("a/0.tar", "12")):
        (tmp_path / name).write_text(content)
        hashes.add(scoring.content(tmp_path, (".txt",)))
    assert len(hashes) == 4
    (tmp_path / "a/0.tar").write_text("34")
    assert scoring.content(tmp_path, (".txt",)) in hashes  # of what is large, names and sizes


def test_the_better_matching_stands_beside_mmvp_s_rule(finished: Path) -> None:
    pairs = pd.read_csv(finished / METRICS / "scores/mmvp/mini-diva/pairs.csv")
    stock = pairs[pairs.pooling == "stock"]
    s11, s12, s21, s22 = (stock[column] for column in mmvp.SIMILARITIES)
    assert (stock.matching == (s11 + s22 > s12 + s21)).mean() > 0.9  # but for rounding
    assert (stock.matching >= stock.statement_to_image).all()  # who is right by the one is right by the other
    average = 100 * stock.groupby("pattern").matching.mean().mean()
    assert f"| diva | stock | {100 * stock.groupby('pattern').statement_to_image.mean().mean():.1f} |" in (
        markdown := (finished / METRICS / "report.md").read_text()
    )
    assert re.search(rf"^\| diva \| stock \| .* \| {average:.1f} \| .* \|$", markdown, re.MULTILINE)


def test_pairs_won_and_lost_are_those_of_one_pooling_rule() -> None:
    assert results.changed_pairs(BEFORE, AFTER, "stock") == {"won": [1, 4], "lost": [5]}
    assert results.changed_pairs(BEFORE, AFTER, "published") == {
        "won": [],
        "lost": [4],
    }  # half of the draws is not most
    found = results.won_and_lost(BEFORE, AFTER, "stock")
    assert {key: found[key] for key in ("won", "lost", "pairs", "p")} == {"won": 2, "lost": 1, "pairs": 5, "p": 1.0}
    assert found["smallest_gain"] is None  # five pairs show nothing
    many = Scores(BEFORE.mmvp, several(BEFORE), BEFORE.zeroshot, BEFORE.answers)
    more = Scores(AFTER.mmvp, several(AFTER), AFTER.zeroshot, AFTER.answers)
    found = results.won_and_lost(many, more, "stock")
    assert (found["won"], found["lost"]) == (40, 20)
    assert found["smallest_gain"] == round(100 * statistics.smallest_gain(100, 60), 1)


def several(scores: Scores) -> pd.DataFrame:
    """Its pairs twenty times over."""
    return pd.concat([scores.pairs.assign(pair=scores.pairs.pair + 5 * i) for i in range(20)])


def evidence(published: tuple[float, float] | None, pooling: str = "published", **known: float) -> dict:
    """Of two recipes: diva, and one that does nothing, of which the mismatched images make what diva is."""
    scores = {
        "pretrained": BEFORE, "diva": AFTER, "diva-shuffled": BEFORE, "diva-drift": AFTER,
        "idle": BEFORE, "idle-shuffled": AFTER,
    }  # fmt: skip
    moved = {name: np.zeros(2) if name in ("diva", "diva-drift") else np.ones(2) for name in scores}
    scores = {name: replace(of_weights, cosines=moved[name]) for name, of_weights in scores.items()}
    claims = dict.fromkeys(scores, Claim(*published, pooling)) if published else {}
    return results.evidence(scores, claims, known)


@pytest.mark.slow
def test_evidence_keeps_training_and_pooling_rule_apart() -> None:
    found = evidence(published=(20.0, 26.0))
    diva, shuffled = found["weights"]["diva"], found["weights"]["diva-shuffled"]
    assert diva["gain"]["pairs_stock"][0] == round(100 * (0.5 + 0) / 2, 2)
    assert diva["gain"]["pairs_published"][0] == round(100 * (0.25 - 0.5 / 3) / 2, 2)
    assert diva["as_published"][0] == round(AFTER.headline()["pairs_published"] - BEFORE.headline()["pairs_stock"], 2)
    assert found["pooling"][0] == -8.33
    assert found["pooling"] == shuffled["as_published"]
    assert {part for interval in shuffled["gain"].values() for part in interval} == {0}
    assert (diva["cosine"], shuffled["cosine"]) == ([0, 0, 0], [1, 1, 1])
    judged = statistics.Interval(*diva["as_published"])
    assert diva["verdict"]["pairs"] == statistics.gain_verdict(judged, 6.0)
    assert evidence((0.0, 100.0))["weights"]["diva"]["verdict"]["pairs"] == "not reproduced"
    assert evidence(None)["weights"]["diva"]["verdict"]["pairs"] == "not distinguishable"


@pytest.mark.slow
def test_a_checkpoint_is_judged_by_its_own_figure_and_pooling_rule() -> None:
    """GenHancer's are of the stock embedding: nothing of a change of pooling is in them."""
    found = evidence((40.0, 46.0), "stock")["weights"]["diva"]
    assert found["as_published"] == found["gain"]["pairs_stock"]
    assert found["published"] == {"gain": 6.0, "pooling": "stock"}
    said = page.verdicts(evidence((40.0, 46.0), "stock"))["diva"]
    assert "; published +6.0)" in said
    assert "published pooling" not in said


@pytest.mark.slow
def test_every_two_weights_are_compared_and_p_corrected_for_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    found = evidence(None)["comparison"]
    assert list(found) == ["diva minus pretrained", "idle minus pretrained", "idle minus diva"]
    assert (found["idle minus diva"]["won"], found["idle minus diva"]["lost"]) == (1, 2)
    assert found["diva minus pretrained"]["won"] == 2
    rows = page.comparison(evidence(None))
    assert [row[0] for row in rows[1:]] == list(found)
    monkeypatch.setattr(results, "won_and_lost", lambda *_: {"won": 28, "lost": 12, "p": 0.017})
    corrected = results.comparison(dict.fromkeys(("pretrained", "diva", "idle"), BEFORE))
    assert {tests["p_holm"] for tests in corrected.values()} == {0.05}  # 3 x 0.0166, not 3 x 0.017
    assert all(len(row) == len(rows[0]) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "away", "said"),
    [
        (40.0, 0, "pairs as published (41.7 %, published 40 %)"),
        (60.0, -1, "pairs 1 pair away"),
        (0.0, 2, "2 pairs of 5"),
    ],
)
def test_the_baseline_is_held_against_what_is_published(pairs: float, away: int, said: str) -> None:
    found = evidence(None, pairs=pairs, objects=75.05, elsewhere=3.0)["baseline"]
    assert found["pairs"]["away"] == away
    assert found["objects"] == {"published": 75.05, "found": 75.0, "away": 0.0}
    assert found.keys() == {"pairs", "objects"}
    told = page.baseline(found, BEFORE)
    assert said in told
    assert "objects as published" in told
    assert ("Check revision" in told) == (away != 0)
    assert "objects 5 points away" in page.baseline({"objects": {"published": 80, "found": 75.0, "away": -5.0}}, BEFORE)
    assert page.baseline({}, BEFORE) == ""


@pytest.mark.slow
def test_an_effect_is_a_recipe_s_gain_less_that_of_its_own_control() -> None:
    found = evidence(None)
    gain = {weights: result["gain"] for weights, result in found["weights"].items()}
    assert list(found["effect"]) == ["diva-shuffled", "diva-drift", "idle-shuffled"]
    assert found["effect"]["diva-shuffled"] == gain["diva"]
    assert {part for interval in found["effect"]["diva-drift"].values() for part in interval} == {0}
    assert found["effect"]["idle-shuffled"]["zeroshot"][0] == -gain["diva"]["zeroshot"][0]
    (difference,) = found["difference"].items()
    assert difference[0] == "idle minus diva"
    assert {column: interval[0] for column, interval in difference[1].items()} == {
        column: -gain["diva"][column][0] for column in ("pairs_stock", "zeroshot")
    }


@pytest.mark.slow
def test_a_control_never_fails_the_check() -> None:
    found = evidence(None)
    assert results.failures({"mini": found}) == [
        f"mini, {w}: {what}" for w in ("diva", "idle") for what in (
            "pairs not distinguishable", "zeroshot not distinguishable"
        ) if (w, what) != ("idle", "zeroshot not distinguishable")
    ]  # fmt: skip
    for recipe in ("diva", "idle"):
        found["weights"][recipe]["verdict"] = {"pairs": "reproduced", "zeroshot": "preserved"}
    assert results.failures({"mini": found}) == []


@pytest.mark.slow
def test_a_gain_at_the_cost_of_zero_shot_ability_is_called_so() -> None:
    found = evidence(None)
    found["weights"]["diva"]["verdict"] = {"pairs": "gained", "zeroshot": "lost"}
    assert "at the cost of zero-shot ability" in page.verdicts(found)["diva"]
    found["weights"]["diva"]["verdict"] = {"pairs": "gained", "zeroshot": "preserved"}
    assert "at the cost" not in " ".join(page.verdicts(found).values())
    found["weights"]["diva"]["verdict"] = {"pairs": "gained", "zeroshot": "not distinguishable"}
    assert "at the cost" not in (said := page.verdicts(found)["diva"])
    assert "A loss of more than 1 point is not excluded." in said


def test_over_seeds_a_published_gain_is_judged_with_its_pooling_rule() -> None:
    """Gains by the published pooling, plus what the pooling rule alone gives: as the paper's table counts."""
    paper = Claim(20.0, 26.6, "published")
    group = pd.DataFrame({"pairs_stock": [9, 9, 9], "pairs_published": [1.0, 2, 3], "zeroshot": [0.1, 0.0, -0.1]})
    assert "pairs reproduced, +6.0 [+3.5, +8.5]; zero-shot classification preserved" in page.seeds_verdict(
        group, {"pooling": [4.0, 3.0, 5.0]}, paper
    )
    assert "pairs not reproduced, +2.0 [" in page.seeds_verdict(group, {"pooling": [0.0, 0.0, 0.0]}, paper)
    assert "pairs gained, +9.0" in page.seeds_verdict(group, {"pooling": [4.0, 3.0, 5.0]}, None)
    unscored = group.assign(pairs_stock=np.nan, pairs_published=np.nan)
    assert "training seeds: pairs not measured; zero-shot" in page.seeds_verdict(unscored, {}, paper)


def test_the_paper_s_claim_is_of_its_own_recipe_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_params(**{"run.recipes": ["diva", "captions"], "run.checkpoints": ["released", "genhancer"]})
    p = reported.load()
    claims = report.claims(p, p.backbones["openai_224"])
    assert claims == {
        "diva": Claim(19.3, 25.9, "published"), "released": Claim(19.3, 25.9, "published"),
        "genhancer": Claim(19.3, 31.9, "stock"),
    }  # fmt: skip
    scores = {name: replace(AFTER, cosines=np.ones(2)) for name in ("pretrained", "diva", "captions")}
    found = results.evidence(scores, claims)
    assert {w: result["verdict"]["pairs"] for w, result in found["weights"].items()} == {
        "diva": "not distinguishable", "captions": "not distinguishable"
    }  # fmt: skip
    rows = {row[0]: row[1:] for row in page.overview(scores, found)}
    assert rows["pairs: published gain, points"] == ["", "+6.6 (published pooling)", ""]
    judged = [found["weights"]["diva"]["as_published"], found["weights"]["captions"]["gain"]["pairs_stock"]]
    assert rows["pairs: gain as judged, points"] == ["", *map(page.cell, judged)]


# ---------------------------------------------------------------------------------------------------------- a whole run


def test_the_report_says_what_the_stages_wrote(finished: Path) -> None:
    metrics = finished / METRICS
    written = json.loads((metrics / "report.json").read_text())["mini"]
    assert {part: list(rows) for part, rows in written.items()} == {
        "score": ["pretrained", "diva"], "gain": ["diva", "diva-shuffled", "diva-drift"],
    }  # fmt: skip
    score = written["score"]
    for weights in ("pretrained", "diva"):
        pairs = json.loads((metrics / f"scores/mmvp/mini-{weights}/scores.json").read_text())
        sets = json.loads((metrics / f"scores/zeroshot/mini-{weights}/scores.json").read_text())
        assert score[weights]["pairs_published"] == round(pairs["published"]["statement_to_image"]["average"], 2)
        assert score[weights]["probe"] == round(sets["details"]["average"], 2)
        assert score[weights].keys() == COLUMNS.keys()
    for column, gain in written["gain"]["diva"].items():
        assert gain == pytest.approx(score["diva"][column] - score["pretrained"][column], abs=0.011)
    patterns = pd.read_csv(metrics / "patterns.csv")
    assert patterns.pattern.tolist() == [f"{w}: {p}" for w in ("pretrained", "diva") for p in world.PATTERNS]
    answers = pd.read_parquet(metrics / "scores/zeroshot/mini-diva/answers.parquet")
    sets = json.loads((metrics / "scores/zeroshot/mini-diva/scores.json").read_text())
    for (name, measure), right in answers.groupby(["set", "measure"]).right:
        assert sets[name][measure] == pytest.approx(100 * right.mean(), abs=1e-3)


def test_the_page_needs_nothing_else_and_shows_every_changed_pair(finished: Path) -> None:
    html = (finished / METRICS / "report.html").read_text()
    text, embedded = re.subn(r'"data:image/\w+;base64,[\w+/=]+"', '""', html)
    assert "http" not in text.partition("<summary>params.yaml")[0]
    linked = set(re.findall(r'(?:src|href)="([^"]*)', text))
    assert all(f'id="{link[1:]}"' in text for link in linked - {""})
    scores = {weights: read(finished, weights) for weights in ("pretrained", "diva")}
    changed = results.changed_pairs(*scores.values(), "stock")
    assert embedded == 4 + 1 + 2 * sum(min(4, count) for count in by_pattern(changed))
    markdown = (finished / METRICS / "report.md").read_text()
    for how, numbers in changed.items():
        assert f"{len(numbers)} pairs {how} (stock embedding)" in text
        section = markdown.partition(f"### diva: pairs {how} (stock embedding)\n")[2].partition("#")[0]
        assert [int(number) for number in re.findall(r"^- (\d+), ", section, re.MULTILINE)] == numbers
    for told in (text, markdown):
        assert all(said in told for said in ("run of mini, diva", "training seed", "torch", "processor"))
        assert scores["diva"].mmvp["weights_sha256"] in told


@pytest.mark.parametrize("said", ["None", "007"])
def test_a_statement_is_shown_as_it_was_asked(finished: Path, tmp_path: Path, said: str) -> None:
    shutil.copytree(finished / DATA / "mmvp", tmp_path / "mmvp")
    file, before = tmp_path / "mmvp/Questions.csv", read(finished, "pretrained")
    lines = [line.rpartition(",")[0] for line in file.read_text().splitlines()]
    file.write_text("\n".join(["Question ID,Type,Statement", *(f"{line},{said}" for line in lines[1:])]))
    right = ~before.right("stock").to_numpy()
    after = replace(before, pairs=before.pairs.assign(statement_to_image=np.tile(right, 2).astype(float)))
    won, lost = page.pairs_changed({"pretrained": before, "diva": after}, tmp_path / "mmvp")
    images = [image for pair in won["pairs"] + lost["pairs"] for image in pair["images"]]
    assert [statement for _, statement in images] == [said] * 36
    assert all(path.is_file() for path, _ in images)


@pytest.fixture
def both(here: Path) -> Path:
    """A folder in which a second recipe was scored, too: one that did what diva's random perturbation does."""
    for path in [*METRICS.glob("scores/*/mini-*")]:
        for old, new in (("diva-shuffled", "-shuffled"), ("diva-drift", "-drift"), ("diva-drift", "")):
            if path.name == f"mini-{old}":
                shutil.copytree(path, path.with_name(f"mini-text_anchored{new}"))
    content = read_yaml(Path("params.yaml"))
    content["run"]["recipes"] = ["diva", "text_anchored"]
    write_yaml(Path("params.yaml"), content)
    run(report)
    return here


def test_a_second_recipe_leaves_the_cards_of_the_others(finished: Path, both: Path) -> None:
    before, after = (
        {file.name: file.read_bytes() for file in (f / METRICS / "cards").iterdir()} for f in (finished, both)
    )
    assert before.keys() == {"mini-pretrained.json", "mini-diva.json"}
    assert after == before | {"mini-text_anchored.json": after["mini-text_anchored.json"]}


def rows(table: str) -> list[list[str]]:
    """Of one table of report.md."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.strip().split("\n")]


@pytest.mark.slow
@pytest.mark.usefixtures("both")
def test_recipes_stand_side_by_side() -> None:
    written, found = (json.loads((METRICS / f"{name}.json").read_text())["mini"] for name in ("report", "evidence"))
    assert list(written["score"]) == ["pretrained", "diva", "text_anchored"]
    controls = ["shuffled", "drift"]
    assert list(written["gain"]) == [f"{r}{c}" for r in ("diva", "text_anchored") for c in ("", "-shuffled", "-drift")]
    assert list(pd.read_csv(METRICS / "patterns.csv").pattern.str.partition(":")[0].unique()) == list(written["score"])
    html, markdown = ((METRICS / f"report.{suffix}").read_text() for suffix in ("html", "md"))
    first = rows(re.search(r"(?:^\|.*\n)+", markdown, re.MULTILINE)[0])  # type: ignore[index]
    assert first[0] == ["", "original", "diva", "text_anchored"]
    expected = {"pairs: gain, points": [found["weights"][r]["gain"]["pairs_stock"] for r in ("diva", "text_anchored")]}
    for control, words in zip(controls, ("mismatched images", "random perturbation"), strict=True):
        for what, column in (("pairs", "pairs_stock"), ("zero-shot classification", "zeroshot")):
            effects = [found["effect"][f"{recipe}-{control}"][column] for recipe in ("diva", "text_anchored")]
            expected[f"{what}: effect over {words}"] = effects
    shown = {row[0]: row[2:] for row in first}
    for name, intervals in expected.items():
        assert shown[name] == [statistics.Interval(*interval).text() for interval in intervals]
    places = [
        html.index(words) for words in ("diva. Pairs: ", "Next:", "pairs: effect over random", "all figures</h2>")
    ]
    assert places == sorted(places)
    difference = statistics.Interval(*found["difference"]["text_anchored minus diva"]["pairs_stock"]).text()
    assert f"| text_anchored minus diva | {difference} |" in markdown
    assert "corrected for the number of comparisons" in markdown
    for recipe in ("diva", "text_anchored"):
        assert f"- run of mini, {recipe}: {provenance.run('mini', 'mini', recipe)}\n" in markdown


def read(folder: Path, weights: str) -> Scores:
    return Scores.read("mini", "mini", weights, ("mmvp", "zeroshot"), lambda path: (folder / path).read_bytes())


def by_pattern(changed: dict[str, list[int]]) -> list[int]:
    """How many pairs changed, for each way and pattern."""
    pairs = len(world.PATTERNS)
    size = params.load().profile.mmvp_vlm.pairs_per_pattern if Path("params.yaml").exists() else 2
    return [sum((n - 1) // size == k for n in numbers) for numbers in changed.values() for k in range(pairs)]


@pytest.mark.slow
def test_the_seeds_table_is_shown_and_its_age_noticed(both: Path) -> None:
    """Of each recipe of this run, and of no other."""
    gains = json.loads((METRICS / "report.json").read_text())["mini"]["gain"]
    own = {weights: ",".join(map(str, gain.values())) for weights, gain in gains.items()}
    diva, anchored = (provenance.run("mini", "mini", recipe) for recipe in ("diva", "text_anchored"))
    write_seeds(
        f"mini,diva,diva,42,{own['diva']},{diva}", f"mini,diva,diva,43,1,2,3,4,5,6,7,{diva}",
        f"mini,diva,diva,43,2,2,3,4,5,6,7,{diva}", "mini,diva,diva,44,1,2,3,4,5,6,7,abc",
        f"mini,text_anchored,text_anchored,42,{own['text_anchored']},{anchored}",
        f"mini,text_anchored,text_anchored,46,8,2,3,4,5,6,7,{anchored}",
        f"mini,text_anchored,text_anchored,47,1,2,3,4,5,6,7,{diva}",
        f"mini,other,other,45,1,2,3,4,5,6,7,{diva}",
    )  # fmt: skip
    run(report)
    html, markdown = ((METRICS / f"report.{suffix}").read_text() for suffix in ("html", "md"))
    assert "<b>diva</b>, <b>text_anchored</b>" in html
    assert "Training seeds 42, 43, 46<" in html
    assert "on another machine" not in html
    for recipe, other in (("diva", 1), ("text_anchored", 8)):
        interval = statistics.over_seeds([gains[recipe]["pairs_stock"], other])
        said = f"Over 2 training seeds: pairs {statistics.gain_verdict(interval, None)}, {interval.text()}"
        assert re.search(rf"^- {recipe}\. .*{re.escape(said)}", markdown, re.MULTILINE)
        assert said in html
    assert statistics.over_seeds([gains["diva"]["probe"], 7]).text() in markdown
    for page_ in (html, markdown):
        assert "metrics/seeds/mini.csv has seeds 44, 47 of other code or parameters" in page_
    write_seeds(f"mini,diva,diva,42,9,9,9,9,9,9,9,{diva}", f"mini,diva,diva,43,1,2,3,4,5,6,7,{diva}")
    run(report)
    for suffix in ("html", "md"):
        assert "on another machine" in (METRICS / f"report.{suffix}").read_text()
        assert "other code" not in (METRICS / f"report.{suffix}").read_text()
    write_seeds("mini,diva,diva,43,9,9,9,9,9,9,9,abc", "mini,diva,diva,44,1,2,3,4,5,6,7,abc")
    run(report)
    html = (METRICS / "report.html").read_text()
    assert "Training seeds" not in html
    assert "has seeds 43, 44 of other code" in html


@pytest.mark.slow
def test_a_run_of_fewer_benchmarks_than_its_seed_is_no_other_run(here: Path) -> None:
    gains = json.loads((METRICS / "report.json").read_text())["mini"]["gain"]["diva"]
    write_params(**{"run.benchmarks": ["zeroshot"]})
    own = provenance.run("mini", "mini", "diva")
    write_seeds(
        f"mini,diva,diva,42,{','.join(map(str, gains.values()))},{own}", f"mini,diva,diva,43,1,2,3,4,5,6,7,{own}"
    )
    run(report)
    assert "Training seeds 42, 43<" in (html := (METRICS / "report.html").read_text())
    assert "on another machine" not in html
    write_seeds(f"mini,diva,diva,42,1,2,3,4,,,,{own}", f"mini,diva,diva,43,,,,,5,6,7,{own}")
    run(report)
    assert "Training seeds" not in (METRICS / "report.html").read_text()  # no figure that both have


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_without_pictures_and_questions_the_report_says_what_is_missing() -> None:
    for missing in ("denoiser", "mmvp"):
        shutil.rmtree(DATA / missing)
    before = [(METRICS / name).read_bytes() for name in ("report.json", "evidence.json", "patterns.csv")]
    run(report)
    assert [(METRICS / name).read_bytes() for name in ("report.json", "evidence.json", "patterns.csv")] == before
    for suffix in ("html", "md"):
        assert "restore data/mini/mmvp" in (METRICS / f"report.{suffix}").read_text()


@pytest.mark.slow
def test_the_check_tells_by_its_exit_status(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (METRICS / "report.html").read_bytes()
    with pytest.raises(SystemExit) as ended:
        run(report, "--check")
    assert ended.value.code == 1
    assert "the check fails:\n  mini, diva: pairs" in capsys.readouterr().err
    found = json.loads((METRICS / "evidence.json").read_text())
    for verdict in ({"pairs": "gained", "zeroshot": "preserved"}, {"pairs": "gained", "zeroshot": "not measured"}):
        found["mini"]["weights"]["diva"]["verdict"] = verdict
        (METRICS / "evidence.json").write_text(json.dumps(found))
        run(report, "--check")
    run(report, "--show")
    assert (METRICS / "report.html").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmarks", "left_out", "columns"),
    [
        (["mmvp"], ["zeroshot"], [column for column in COLUMNS if column in results.PAIRS]),
        (["zeroshot"], ["pairs"], ["zeroshot", "retrieval", "probe"]),
        ([], ["pairs", "zeroshot"], []),
    ],
    ids=str,
)
def test_what_was_not_scored_is_not_measured(
    here: Path, benchmarks: list[str], left_out: list[str], columns: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(**{"run.benchmarks": benchmarks})
    for name in {"mmvp", "zeroshot"} - {*benchmarks}:  # as where they never ran
        shutil.rmtree(METRICS / "scores" / name)
        shutil.rmtree(here / "data/mini" / name)
    run(report)
    written = json.loads((METRICS / "report.json").read_text())["mini"]
    assert all(list(figures) == columns for part in written.values() for figures in part.values())
    verdict = json.loads((METRICS / "evidence.json").read_text())["mini"]["weights"]["diva"]["verdict"]
    assert {what for what, said in verdict.items() if said == "not measured"} == {*left_out}
    shown = rows(re.search(r"(?:^\|.*\n)+", (METRICS / "report.md").read_text(), re.MULTILINE)[0])  # type: ignore[index]
    names = {"pairs": "pairs", "zeroshot": "zero-shot classification"}
    said = {row[0]: row[-1] for row in shown}
    assert all(said[f"{names[what]}: verdict"] == "not measured" for what in left_out)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(report, "--check")
    failed = capsys.readouterr().err
    assert all((f"{what} not measured" in failed) == (benchmarks == []) for what in left_out)


@pytest.mark.slow
def test_two_commits_are_compared_pair_by_pair(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the figures of `dvc metrics diff`; worse pairs fail the check, better ones do not."""

    def do(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    dvc = (sys.executable, "-m", "dvc")
    do("git", "init", "--quiet")
    do(*dvc, "init", "--quiet")
    Path("dvc.yaml").write_text("metrics:\n- metrics/mini/report.json\n")
    commit = ("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "--message", "x")
    files = (
        *(f"metrics/mini/{kind}" for kind in ("scores", "report.json")),
        "dvc.yaml",
        ".dvc",
        "params.yaml",
    )
    mmvp, summary = METRICS / "scores/mmvp/mini-diva/pairs.csv", METRICS / "report.json"
    table, figures = pd.read_csv(mmvp), json.loads(summary.read_text())

    def score(right: float) -> None:
        table.assign(statement_to_image=right).to_csv(mmvp, index=False)
        figures["mini"]["score"]["diva"]["pairs_stock"] = 100 * right
        summary.write_text(json.dumps(figures))

    score(1.0)
    do("git", "add", "--force", *files)
    do(*commit)
    score(0.0)
    run(report, "--compare")  # the workspace against the last commit
    told = capsys.readouterr().out
    assert re.search(r"diva.*pairs, stock.*100\.00.*0\.00.*lost", told)
    do("git", "add", "--force", *files)
    do(*commit)
    diff = json.loads(do(*dvc, "metrics", "diff", "--json", "HEAD~1", "HEAD"))["metrics/mini/report.json"]
    assert (diff["mini.score.diva.pairs_stock"]["old"], diff["mini.score.diva.pairs_stock"]["new"]) == (100, 0)
    with pytest.raises(SystemExit) as ended:
        run(report, "--compare", "HEAD~1", "HEAD", "--check")
    assert ended.value.code == 1
    assert "mini, diva: pairs, stock embedding -" in capsys.readouterr().err
    run(report, "--compare", "HEAD", "HEAD~1", "--check")
    assert re.search(r"diva.*pairs, stock.*0\.00.*100\.00.*gained", capsys.readouterr().out)
    figures["mini"]["score"] = {"released": figures["mini"]["score"]["diva"]}
    summary.write_text(json.dumps(figures))
    with pytest.raises(SystemExit):
        run(report, "--compare", "--check")
    assert "no figure of the same backbone and weights" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(report, "--compare", "nowhere")
    assert "nowhere" in capsys.readouterr().err
