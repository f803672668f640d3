"""The check that knows chance from fault: its bands, what it reads, and that faults of every kind fail it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from clones import Clone
from scipy.stats import t as students_t
from shrunk import METRICS, ROOT, run

from pipeline.core.compute import generator
from pipeline.core.outputs import write_json
from pipeline.core.stages import UserError
from pipeline.tools import reference


@pytest.mark.slow
def test_a_band_holds_one_new_value_as_often_as_it_says() -> None:
    rng = np.random.default_rng(generator("test", "bands").initial_seed())
    low, high = reference.band([1.0, 2.0, 3.0, 6.0])
    half = students_t.ppf(0.995, 3) * np.std([1, 2, 3, 6], ddof=1) * np.sqrt(1.25)
    assert (low, high) == pytest.approx((3 - half, 3 + half))
    inside = 0
    for *values, new in rng.standard_normal((5000, 7)).tolist():
        low, high = reference.band(values)
        inside += low <= new <= high
    assert 0.985 < inside / 5000 < 0.995


@pytest.fixture
def made(here: Path, finished: Path) -> Path:
    """metrics/mini of the finished run beside a reference of which it is the first of eight runs."""
    shutil.rmtree(METRICS)
    shutil.copytree(finished / METRICS, METRICS)
    write_json(METRICS / "images.json", {"downloaded": 12})
    for name, part in (("report", "gain"), ("evidence", "weights")):  # a second recipe
        content = json.loads((METRICS / f"{name}.json").read_text())
        content["mini"][part]["text_anchored"] = content["mini"][part]["diva"]
        write_json(METRICS / f"{name}.json", content)
    shutil.copytree(METRICS / "train/mini-diva", METRICS / "train/mini-text_anchored")
    shutil.copytree(METRICS / "scores/mmvp/mini-diva", METRICS / "scores/mmvp/mini-text_anchored")
    rng = np.random.default_rng(generator("test", "reference").initial_seed())
    pairs = pd.DataFrame({"pair": range(1, 181), "pattern": np.repeat([f"pattern {i}" for i in range(9)], 20)})
    answers = [
        pairs.assign(pooling=pooling, statement_to_image=rng.integers(0, 2, len(pairs)))
        for pooling in ("stock", "published")
    ]
    pd.concat(answers).to_csv(METRICS / "scores/mmvp/mini-pretrained/pairs.csv", index=False)
    found = reference.MeasuredRun.read(METRICS)
    right = 7 * found.right + rng.integers(0, 3, found.right.shape)
    figures = found.figures | reference.agreement(found.right, right)
    rows = [
        {"figures": {name: value + k * rng.standard_normal() for name, value in figures.items()}}
        | {"verdicts": found.verdicts}
        for k in (0, *[1] * 7)
    ]
    reference.OUTPUT.mkdir(parents=True)
    write_json(reference.OUTPUT / "mini.json", {"counts": found.counts, "runs": rows})
    right.to_csv(reference.OUTPUT / "pairs.csv")
    return METRICS


def change(file: Path, *keys: str, to: object) -> None:
    content = json.loads(file.read_text())
    *parents, last = keys
    inner = content
    for key in parents:
        inner = inner[key]
    inner[last] = to
    file.write_text(json.dumps(content))


def test_the_committed_run_and_one_within_chance_pass(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(reference)
    assert "metrics/mini: every figure is that of the first reference run" in capsys.readouterr().out
    gain = json.loads((made / "report.json").read_text())["mini"]["gain"]["diva"]["probe"]
    change(made / "report.json", "mini", "gain", "diva", "probe", to=gain + 1)
    change(made / "train/mini-diva/metrics.json", "loss_last_tenth", to=0.5)  # no headline, and chance moves it
    change(made / "train/mini-diva/metrics.json", "terms_last_tenth", "denoise", to=0.5)
    shutil.copytree(made, "somebody's")
    run(reference, "somebody's")
    out = capsys.readouterr().out
    assert "gain.diva.probe" in out
    assert "somebody's: every figure lies in its band" in out


def test_a_band_of_no_width_allows_its_own_value_alone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((reference.OUTPUT / "mini.json").read_text())
    for row in content["runs"]:
        row["figures"]["gain.diva.probe"] = 1.5
    (reference.OUTPUT / "mini.json").write_text(json.dumps(content))
    change(made / "report.json", "mini", "gain", "diva", "probe", to=1.5)
    run(reference)
    change(made / "report.json", "mini", "gain", "diva", "probe", to=1.51)
    with pytest.raises(SystemExit):
        run(reference)
    assert "gain.diva.probe is 1.51, outside 1.5 to 1.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "keys", "value", "message"),
    [
        ("report.json", ("mini", "gain", "diva", "probe"), 99.0, "gain.diva.probe is 99, outside"),
        (
            "report.json",
            ("mini", "gain", "text_anchored", "zeroshot"),
            99.0,
            "gain.text_anchored.zeroshot is 99, outside",
        ),
        ("report.json", ("mini", "gain", "diva", "probe"), float("nan"), "gain.diva.probe is nan, outside"),
        ("report.json", ("mini", "score", "pretrained"), {}, "pretrained.zeroshot is nan, outside"),
        ("denoiser.json", ("validation_loss", "right"), 70.0, "denoiser.right is 70, outside"),
        (
            "train/mini-diva/metrics.json",
            ("validation_loss_last",),
            -70.0,
            "training.diva.validation_loss_fell_by is 70",
        ),
        ("train/mini-diva/metrics.json", ("steps",), 5, "training.diva.steps is 5, wanted 4"),
        (
            "scores/mmvp/mini-diva/scores.json",
            ("stock", "statement_to_image", "draws"),
            3,
            "draws.diva.stock.statement_to_image is 3, wanted 1",
        ),
        ("images.json", ("downloaded",), 5, "images.downloaded is 5, wanted "),
        (
            "evidence.json",
            ("mini", "weights", "diva", "verdict", "pairs"),
            "gained",
            "the verdict diva.pairs is 'gained'",
        ),
    ],
)
def test_what_is_outside_fails(
    made: Path, file: str, keys: tuple[str, ...], value: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(made / file, *keys, to=value)
    with pytest.raises(SystemExit):
        run(reference)
    assert message in capsys.readouterr().err


def test_a_mislabelled_pattern_and_swapped_pooling_rules_are_seen_though_no_average_changes() -> None:
    """In a pattern that a model hardly knows, as many pairs are right with the labels exchanged as without."""
    index = pd.MultiIndex.from_product([range(100), ["Color", "State"]], names=["pair", "pattern"])
    rng = np.random.default_rng(generator("test", "agreement").initial_seed())
    chances = rng.choice([0.05, 0.9], (len(index), 2), p=[0.8, 0.2])  # which are easy depends on the pooling rule
    runs = [
        pd.DataFrame((rng.random(chances.shape) < chances).astype(float), index, ["stock", "published"])
        for _ in range(9)
    ]
    total, honest = sum(runs[:8]), runs[8]
    found = reference.agreement(honest, total)
    others = [reference.agreement(own, sum(runs) - own) for own in runs[:8]]
    lowest = {name: reference.band([other[name] for other in others])[0] for name in found}
    assert all(found[name] > low for name, low in lowest.items())
    mislabelled = honest.copy()
    state = mislabelled.index.get_level_values("pattern") == "State"
    mislabelled.loc[state, "stock"] = rng.permutation(honest.stock[state])
    assert mislabelled.mean().equals(honest.mean())
    name = "agreement.smallest_pattern"
    assert reference.agreement(mislabelled, total)[name] < lowest[name]
    for constant in (0.0, 1.0):  # all wrong, as where a pattern's images are equal
        alike = honest.copy()
        alike.loc[state, "stock"] = constant
        assert np.isnan(reference.agreement(alike, total)[name])
    name = "agreement.pooling"
    assert reference.agreement(honest.rename(columns=reference.OTHER), total)[name] < lowest[name]


def test_other_folders_are_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, prepare, message in (
        (("nowhere",), lambda: None, "nowhere: not the metrics of a run of profile mini"),
        (
            (),
            lambda: (made / "train/mini-diva/metrics.json").write_text("{}"),
            "metrics/mini: not the metrics of a run",
        ),
        ((), lambda: (made / "denoiser.json").write_text("{"), "metrics/mini: not the metrics of a run"),
        ((), lambda: shutil.rmtree(reference.OUTPUT), "metrics/reference/mini.json does not exist"),
        (("--make",), lambda: None, "reference runs are made from the last commit"),
    ):
        prepare()
        with pytest.raises(SystemExit):
            run(reference, *arguments)
        assert message in capsys.readouterr().err


def test_equal_bytes_are_told_by_the_locks(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check() -> bool:
        run(reference)
        return "equal byte for byte" in capsys.readouterr().out

    Path("pipeline").mkdir()
    for lock in reference.LOCKS:
        Path(lock).write_text("hashes")
    assert not check()  # no repository: nobody knows
    for command in (("init",), ("add", *reference.LOCKS, str(METRICS)), ("commit", "--message", "all")):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], check=True)
    assert check()
    kept = (made / "report.json").read_bytes()
    change(made / "report.json", "mini", "gain", "diva", "note", to="by hand")
    assert not check()  # though the locks are the committed ones
    (made / "report.json").write_bytes(kept)
    assert check()
    Path("dvc.lock").write_text("others")
    assert not check()


def test_the_committed_reference_is_of_runs_enough_and_their_bands_are_narrow() -> None:
    content = json.loads((ROOT / reference.OUTPUT / "mini.json").read_text())
    runs = content["runs"]
    assert len({row["seed"] for row in runs}) == len(runs) >= 7
    of_models = [[v for k, v in row["figures"].items() if k.startswith(reference.MODELS)] for row in runs]
    assert len({tuple(figures) for figures in of_models}) == len(runs)  # else two runs count as one
    assert all(row["figures"].keys() == runs[0]["figures"].keys() for row in runs)
    known = re.compile(r"gain\.diva\.probe|gain\.diva-shuffled\.pairs_stock|agreement\..*")
    names = [name for name in runs[0]["figures"] if known.fullmatch(name)]
    assert len(names) == 4
    for name in names:  # 0: of a tower that is not trained; of labels or pooling rules exchanged, at most
        low, high = reference.band([row["figures"][name] for row in runs])
        assert not low <= 0 <= high, name


def test_runs_whose_rounding_is_the_same_are_no_reference(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On some processors three threads round as two do: such a run has the models of the committed one."""
    kept = (reference.OUTPUT / "mini.json").read_bytes()
    found = reference.MeasuredRun.read(METRICS)
    others = [found._replace(figures=found.figures | {"denoiser.right": float(seed)}) for seed in reference.ROUNDINGS]
    twin = others[4]._replace(figures=others[4].figures | {"denoiser.right": found.figures["denoiser.right"]})
    with pytest.raises(UserError, match="runs committed and 5 have the same pretrained backbone and denoiser"):
        reference.write([found, *others[:4], twin, others[5]])
    assert (reference.OUTPUT / "mini.json").read_bytes() == kept
    reference.write([found, *others])
    assert (reference.OUTPUT / "mini.json").read_bytes() != kept


@pytest.mark.exhaustive
def test_reference_runs_through_dvc_go_on_where_they_were(tmp_path: Path) -> None:
    clone = Clone.make(tmp_path)
    clone.run("dvc", "repro")
    clone.commit("made")
    make = "from pipeline.tools import reference as r; r.SCRATCH = r.Path('scratch')"
    make = f"{make}; r.MODELS = ('',)"  # of so small models no digit differs: let the seeds tell the runs apart
    make = f"{make}; r.ROUNDINGS = {{seed: r.ROUNDINGS[seed] for seed in (1, 2)}}; r.make()"
    (clone.root / "scratch/run-2/.git").mkdir(parents=True)  # no repository: this run fails
    failed = clone.run("python", "-c", make, status=1)
    assert "the reference run of seed 2 ended with status" in failed
    assert "\nseed: 1" in "\n" + (clone.root / "scratch/run-1/params.yaml").read_text()
    first = (clone.root / "scratch/run-1/metrics/mini/report.json").stat().st_mtime_ns
    shutil.rmtree(clone.root / "scratch/run-2")
    clone.run("python", "-c", make)
    rows = json.loads((clone.root / reference.OUTPUT / "mini.json").read_text())["runs"]
    assert [row["seed"] for row in rows] == ["committed", 1, 2]
    assert first
    assert rows[1]["figures"] != rows[2]["figures"]
    said = clone.run("python", "-m", "pipeline.tools.reference", status=1)  # of so few pairs a pattern is all wrong
    assert "equal byte for byte" in said
    _, _, wrong = said.partition("'Chance or fault').\n")
    assert wrong.split("\n")[0] == "  agreement.smallest_pattern is nan, outside nan to nan"
    assert "outside" not in wrong.partition("\n")[2]
