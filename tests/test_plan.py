"""What is told before anything is fetched, and when a run is refused."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shrunk import SCORED, read_yaml, run, run_of, write_params, write_yaml

from pipeline import plan
from pipeline.core import code
from pipeline.core.stages import UserError
from pipeline.data import downloads
from pipeline.data.downloads import Listing, Remote
from pipeline.diva import step
from pipeline.diva.losses import Denoise, InfoNCE
from pipeline.diva.step import MicroBatch
from pipeline.engine import fetches, trial
from pipeline.engine.assemble import out_of_memory
from pipeline.engine.losses import smaller
from pipeline.engine.pins import pins
from pipeline.models.registry import complete
from pipeline.sections import params
from pipeline.sections.download import Download

COMMITTED = Path(__file__).parents[1] / "params.yaml"
GB = 10**9
ALWAYS = {"data/paper/mmvp", "data/paper/zeroshot/wds/imagenet1k", "models/paper/pretrained/openai_224"}


TRY = trial.check


@pytest.fixture(autouse=True)
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A folder with room on the disk and on the GPU; returns the trainings that were tried there."""
    monkeypatch.chdir(tmp_path)
    disk(monkeypatch, 10_000)
    tried: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(trial, "check", lambda p, name, recipe, compute: tried.append((name, recipe)))
    return tried


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Download]:
    """Downloads that were located. Every file of a list is of 2 GB; patterns find three."""
    asked = []

    def locate(download: Download) -> Listing:
        asked.append(download)
        names = list(download.files) or ["a", "b", "c"]
        return Listing(download.at[0], None, tuple(Remote(name, f"/{name}", 2 * GB, None, None) for name in names))

    monkeypatch.setattr(downloads, "locate", locate)
    return asked


def write(backbones: str = "openai_224", weights: str = "pretrained", **changes: Any) -> params.Params:
    """Write the committed params.yaml here with another run; a change's key is dotted, below profile paper."""
    content = read_yaml(COMMITTED)
    lists = {key.removeprefix("run."): names for key, names in run_of(weights.split()).items()}
    content["run"] = {"profile": "paper", "backbones": backbones.split(), **lists}
    content["profiles"]["paper"]["zeroshot_sets"]["sets"] = {"imagenet1k": "abc123", "birdsnap": None}
    for key, value in changes.items():
        *parents, last = key.split(".")
        reduce(dict.__getitem__, parents, content["profiles"]["paper"])[last] = value
    write_yaml(Path("params.yaml"), content)
    return params.load()


def disk(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    """Let so many GB be free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * GB))


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """Run the stage, which stops; returns what it says on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(plan)
    assert stopped.value.code == 1
    assert not Path("data/paper/planned").exists()
    return capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- what is told


@pytest.mark.slow
def test_mini_fetches_nothing_and_does_not_wait_for_large_packages() -> None:
    Path("params.yaml").write_text(COMMITTED.read_text())
    code = "from pipeline import plan; plan.main(); import sys; assert not {'open_clip', 'diffusers'} & {*sys.modules}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "profile mini: all inputs are made here, nothing is fetched\n"
    planned = {path.stem: json.loads(path.read_text()) for path in Path("data/mini/planned").iterdir()}
    inputs = {"images", "denoiser", "mmvp_vlm", "zeroshot_sets", "segmentation_sets", "mllm_sets"}
    scorings = {f"{benchmark}-mini-{weights}" for benchmark in ("mmvp", "zeroshot") for weights in SCORED}
    assert planned.pop("encoder-diva") == {"encoder": None}
    assert planned.keys() == inputs | {"pretrained-mini"} | scorings
    written = json.loads(Path("metrics/mini/scores/planned.json").read_text())
    assert written == {benchmark: planned[f"{benchmark}-mini-pretrained"]["code"] for benchmark in ("mmvp", "zeroshot")}
    assert all(re.fullmatch(r"[0-9a-f]{64}", pinned["code"]) for pinned in planned.values())
    assert planned["denoiser"]["threads"] == 2


@pytest.mark.parametrize(
    ("weights", "more"),
    [
        ("pretrained", set()),
        ("released", {"models/paper/released/openai_224"}),
        ("diva", {"data/paper/images", "data/paper/denoiser"}),
        ("diva diva-drift", {"data/paper/images", "data/paper/denoiser"}),
        ("diva released", {"data/paper/images", "data/paper/denoiser", "models/paper/released/openai_224"}),
    ],
)
def test_what_is_needed_follows_from_the_weights(weights: str, more: set[str]) -> None:
    assert {str(folder) for folder, _ in fetches.downloads_of(write(weights=weights))} == ALWAYS | more


def test_an_encoder_is_needed_and_counted_once_a_recipe_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recipe has a folder of its own."""
    p = write(weights="diva contrastive two_stage")
    before = {folder for folder, _ in fetches.downloads_of(p)}
    monkeypatch.setattr(Denoise, "encodes", True)  # a loss of diva and of two_stage
    more = [(str(folder), download) for folder, download in fetches.downloads_of(p) if folder not in before]
    folders = ["data/paper/encoder/diva", "data/paper/encoder/two_stage"]
    assert more == [(folder, p.profile.encoder.download) for folder in folders]  # type: ignore[union-attr]
    fetched = items(*((folder, 1.2) for folder in folders))
    assert (fetches.disk(p, fetched) - fetches.disk(p, [])) / GB == pytest.approx(2.4)


def test_every_backbone_and_its_tokenizer_are_needed() -> None:
    p = write("openai_336 siglip_384")
    found = [download for folder, download in fetches.downloads_of(p) if folder.parent.name == "pretrained"]
    first, second = (complete(name, p.backbones[name].source) for name in p.run.backbones)
    assert found == [first.weights, second.weights, second.tokenizer]


def test_addresses_sizes_and_licences_are_shown(asked: list[Download], capsys: pytest.CaptureFixture[str]) -> None:
    p = write("dfn_224", "pretrained diva")
    run(plan)
    out = capsys.readouterr().out
    shown = " ".join(out.replace("│", " ").split())
    assert len(asked) == len(fetches.downloads_of(p)) == 5
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "│" in line]
    addresses = "".join(row[2] for row in rows)  # a long one is folded
    for folder, download in fetches.downloads_of(p):
        assert str(folder) in shown
        assert download.at[0] in addresses
        assert all(word in shown for word in download.licence.split())
    assert "birdsnap" not in shown
    assert {row[1]: row[3:5] for row in rows if row[1]}["data/paper/denoiser"] == ["11", "22.00"]
    assert "\nto download in all: 42.0 GB; there already: nothing\n" in out
    assert "\ndisk: 65.7 GB needed, 10,000.0 GB free in " in out  # checkpoint 2 beside six models of 3.9


def test_only_the_kind_of_images_in_use_is_pinned() -> None:
    def pinned(**changes: Any) -> dict[str, Any]:
        return pins(write(**changes))["images"]

    for kind, own in (("shards", "shards.match"), ("links", "links.min_success")):
        before = pinned(**{"images.kind": kind})
        value = {"shards.match": ["*.tar"], "links.min_success": 0.7}
        for key in value:
            assert (pinned(**{"images.kind": kind, f"images.{key}": value[key]}) == before) == (key != own)


@pytest.mark.slow
@pytest.mark.usefixtures("asked")
def test_what_is_scored_depends_on_its_own_values_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that score depend on these files, their data and their weights."""

    def planned(weights: str = "released", **changes: Any) -> dict[str, bytes]:
        write(weights=weights, **changes)
        run(plan)
        found = {path.stem: path.read_bytes() for path in Path("data/paper/planned").iterdir()}
        return {name: found[name] for name in found if name.startswith(("mmvp-", "zeroshot-"))}

    before = planned()
    names = {f"{b}-openai_224-{w}" for b in ("mmvp", "zeroshot") for w in ("pretrained", "released")}
    assert before.keys() == names
    later = planned("released diva", **{"zeroshot_sets.sets": {"imagenet1k": "abc124"}})
    assert {name: later[name] for name in before} == before
    for changes, changed in (({"mmvp.draws": 3}, "mmvp"), ({"zeroshot.recall": 3}, "zeroshot"), ({"threads": 3}, "")):
        other = planned(**changes)
        assert {name for name in before if other[name] != before[name]} == {n for n in names if n.startswith(changed)}
    monkeypatch.setattr(
        "pipeline.engine.pins.program", lambda file: "another" if file == "mmvp.py" else code.program(file)
    )
    other = planned()
    assert {name for name in before if other[name] != before[name]} == {n for n in names if n.startswith("mmvp-")}
    p = write()
    for benchmark, folder in (("mmvp", "data/paper/zeroshot/wds/imagenet1k"), ("zeroshot", None)):
        alone = p.model_copy(update={"run": p.run.model_copy(update={"benchmarks": [benchmark]})})
        assert {str(path) for path, _ in fetches.downloads_of(alone)} == ALWAYS - {folder}


@pytest.mark.slow
@pytest.mark.usefixtures("asked")
def test_what_is_fetched_depends_on_its_pins_alone() -> None:
    """Stages that fetch depend on these files and on nothing else."""

    def planned(backbones: str, weights: str, **changes: Any) -> dict[str, bytes]:
        write(backbones, weights, **changes)
        run(plan)
        return {
            path.stem: path.read_bytes()
            for path in Path("data/paper/planned").iterdir()
            if not path.name.startswith(("mmvp-", "zeroshot-"))
        }

    before = planned("openai_224", "pretrained")
    assert b"abc123" in before["zeroshot_sets"]
    images = ["hf://datasets/pixparse/cc3m-wds@46f3d69f840e59d77d52e8decfe5baec97e94c7f", "hf://datasets/a/b@main"]
    same = {
        "images.shards.licence": "another", "images.shards.at": images, "images.links.threads": 1, "threads": 3,
        "mmvp.draws": 3,
    }  # fmt: skip
    after = planned("openai_224 siglip_224", "diva diva-drift released", **same)
    assert {name: after[name] for name in before} == before
    more = {"pretrained-siglip_224", "released-siglip_224", "released-openai_224", "encoder-diva"}
    assert after.keys() - before.keys() == more
    other = planned("openai_224", "pretrained", **{"zeroshot_sets.sets": {"imagenet1k": "abc124"}})
    assert {name for name in before if other[name] != before[name]} == {"zeroshot_sets"}


def test_a_hub_that_does_not_answer_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(downloads, "TRIES", 1)
    write(**{"mmvp_vlm.download": {"at": ["http://127.0.0.1:9/folder"], "licence": "MIT", "files": {"a.csv": None}}})
    assert "http://127.0.0.1:9/folder: ConnectError" in refusal(capsys)


# ------------------------------------------------------------------------------------------------------------- the disk


def items(*sizes: tuple[str, float]) -> list[fetches.Item]:
    return [fetches.Item(Path(folder), "", 1, size * GB, "") for folder, size in sizes]


FETCHED = [
    ("data/paper/images", 400), ("data/paper/denoiser", 5), ("models/paper/pretrained/openai_224", 0.9),
    ("models/paper/pretrained/dfn_224", 4), ("models/paper/released/dfn_224", 3),
]  # fmt: skip


@pytest.mark.slow
def test_disk_counts_what_stays_and_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    p = write("openai_224 dfn_224", "pretrained diva")
    models = 4 * (0.4276 + 0.9861)
    assert fetches.disk(p, items(*FETCHED[:4])) / GB == pytest.approx(405 + 6 * models + 4)  # two exports twice

    Path("models/paper/pretrained/dfn_224").mkdir(parents=True)
    assert fetches.disk(p, items(*FETCHED[:3])) / GB == pytest.approx(405 + (2 + 4) * models - 4 * 0.9861 + 0.9)

    p = write("dfn_224", "released")
    assert fetches.disk(p, items(FETCHED[4])) / GB == pytest.approx((1 + 4) * 4 * 0.9861 + 3)


def test_disk_counts_twice_without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links on this file system")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert fetches.disk(write(), items(*FETCHED[:3])) / GB == pytest.approx(2 * (405 + 3 * 4 * 0.4276) + 0.9)


@pytest.mark.slow
def test_disk_does_not_count_what_stopped_fetches_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left = Path("data/.downloads/0123/unet/weights.incomplete"), Path("data/paper/.images.scratch/shards/00000.tar")
    for size, path in zip((4 * 2**20, 2**20), left, strict=True):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
    found = fetches.disk(write(), items(*FETCHED[:2]))
    assert found == pytest.approx(405 * GB + 3 * 4e6 * 427.6 - 5 * 2**20, abs=1)
    for folder in ("pretrained/openai_224", "export/openai_224-pretrained"):
        Path("models/paper", folder).mkdir(parents=True)
    assert fetches.disk(write(), items(("data/paper/mmvp", 0.001))) == 0


def test_a_model_without_published_figures_counts_as_a_large_one() -> None:
    p = write()
    unknown = p.backbones["openai_224"].model_copy(update={"published": None})
    p = p.model_copy(update={"backbones": {"openai_224": unknown}})
    assert fetches.disk(p, []) == 3 * 4 * GB


@pytest.mark.parametrize("weights", ["pretrained", "diva"])
def test_too_small_a_disk_is_refused(
    weights: str, asked: list[Download], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(weights=weights)
    needed = {"pretrained": 19.1, "diva": 52.3}[weights]
    disk(monkeypatch, needed - 0.1)
    text = refusal(capsys)
    line = f"disk: {needed} GB needed, {needed - 0.1:.1f} GB free in {Path.cwd()}."
    assert f"\n  {line} Make room there, choose fewer run.backbones" in text
    assert ("run.recipes=[]" in text) == (weights == "diva")
    assert "GPU:" not in text
    disk(monkeypatch, needed + 0.1)
    run(plan)


# -------------------------------------------------------------------------------------------------------------- the GPU


@pytest.mark.parametrize("weights", ["diva", "pretrained"])
def test_a_training_without_a_gpu_is_refused(
    weights: str, asked: list[Download], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(weights=weights)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if weights == "pretrained":
        run(plan)
        return
    disk(monkeypatch, 1)
    text = refusal(capsys)
    assert "\n  disk: " in text
    assert "\n  GPU: none found, but profiles.paper.train.precision is bfloat16, which needs one" in text
    assert "run.recipes=[]" in text


@pytest.mark.usefixtures("asked")
def test_every_training_is_tried(tried: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    write("openai_224 dfn_378", "diva two_stage")
    run(plan)
    assert tried == list(itertools.product(("openai_224", "dfn_378"), ("diva", "two_stage")))
    assert "GPU memory: 0.0 GB taken by two steps of dfn_378 by recipe two_stage" in capsys.readouterr().out


def test_a_smaller_micro_batch_is_proposed_only_where_it_is_allowed() -> None:
    contrast = InfoNCE(1.0, temperature=0.2, negatives=15, view=0.8)
    assert [smaller([Denoise(1.0)], 32, 1, size) for size in (16, 2, 1)] == [8, 1, 0]
    assert [smaller([Denoise(1.0), contrast], 32, 1, size) for size in (32, 16)] == [16, 0]
    said = out_of_memory("paper", "b16", "contrastive", [Denoise(1.0), contrast], 32, 16)
    assert "train.micro_batch=16, which changes what is compared by info_nce, and so results, or" in said


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["diva", "two_stage", "contrastive", "text_anchored"])
@pytest.mark.parametrize("fits", [4, 1, 0])
def test_too_little_gpu_memory_names_the_micro_batch_that_fits(
    recipe: str, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In true steps of the mini world's sizes, where a larger micro-batch than `fits` has no room."""
    write_params(**run_of(["diva", recipe]), **{"profiles.mini.train.micro_batch": 8})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    least = 4 if recipe == "contrastive" else 1  # images of a micro-batch that its loss contrasts
    fits = fits if fits >= least else 0
    p, taken, terms = params.load(), list[tuple[int, bool]](), step.terms

    def narrow(feedback: Any, losses: Any, micro: MicroBatch, precision: torch.dtype) -> dict[str, torch.Tensor]:
        if len(micro.images_BCHW) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        gradients = any(parameter.grad is not None for parameter in feedback.parameters())
        taken.append((len(micro.images_BCHW), gradients))
        return terms(feedback, losses, micro, precision)

    monkeypatch.setattr(step, "terms", narrow)
    change = "what is compared by info_nce, and so results" if recipe == "contrastive" else "results by rounding alone"
    way = f"Add -S profiles.mini.train.micro_batch={fits}, which changes {change}" if fits else "Use a GPU with more"
    with pytest.raises(UserError, match=f"to train mini by recipe {recipe} with micro_batch 8. {way}"):
        TRY(p, "mini", recipe, torch.device("cpu"))
    phases = 1 + (p.profile.recipes[recipe].warmup is not None)
    step_ = [
        (fits, False),
        (fits, True),
    ]  # a second micro-batch beside the first one's gradients, if a step has several
    assert taken == step_[: 1 + (p.profile.recipes[recipe].batch > fits)] * 2 * phases * (fits > 0)


@pytest.mark.slow
def test_the_tower_phase_is_tried_with_the_denoiser_that_training_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are float32 while the warm-up trains them, and then of the training's precision."""
    write_params(**run_of(["two_stage"]), **{"profiles.mini.train.precision": "bfloat16"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen, terms = list[torch.dtype](), step.terms

    def noted(feedback: Any, *rest: Any) -> dict[str, torch.Tensor]:
        seen.append(feedback.denoiser.unet.dtype)
        return terms(feedback, *rest)

    monkeypatch.setattr(step, "terms", noted)
    TRY(params.load(), "mini", "two_stage", torch.device("cpu"))
    assert seen == [torch.float32] * (len(seen) // 2) + [torch.bfloat16] * (len(seen) // 2)
    assert len(seen) >= 4


KEY = "profiles.paper.recipes"
SMALL = {  # open_clip's configuration of a model
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 1, "layers": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        (
            "contrastive",
            {"recipes.contrastive.losses": {"info_nce": {"weight": 1.0, "negatives": 3}}},
            f"{KEY}.contrastive.losses.info_nce.temperature: missing. Add it.",
        ),
        *(
            (
                "contrastive",
                {f"recipes.contrastive.losses.info_nce.{setting}": value},
                f"{KEY}.contrastive.losses.info_nce{said}",
            )
            for setting, value, said in (
                ("negatives", 0, ": negatives is 0, wanted a number above 0."),
                ("negatives", 1.5, ".negatives: found 1.5. "),
                ("view", 1.5, ": view is 1.5, wanted a number above 0 and at most 1."),
                ("temperature", 0.0, ": temperature is 0.0, wanted a number above 0."),
                ("weight", float("nan"), ".weight: found nan. "),
                ("wieght", 1.0, ".wieght: unknown key (found 1.0)"),
            )
        ),
        (
            "contrastive",
            {"train.micro_batch": 8},
            f"the smallest of these has 8, but {KEY}.contrastive.losses.info_nce needs 16. Set another",
        ),
        (
            "contrastive",
            {"recipes.contrastive.batch": 40},  # 16 + 16 + 8
            f"the smallest of these has 8, but {KEY}.contrastive.losses.info_nce needs 16.",
        ),
        (
            "text_anchored",
            {"recipes.text_anchored.trained": {"kind": "head", "heads": 7}},
            f"{KEY}.text_anchored.trained.heads is 7, which does not divide 768, the width of openai_224's embedding.",
        ),
        (
            "text_anchored",
            {"recipes.text_anchored.gap_correction.components": 769},
            f"{KEY}.text_anchored.gap_correction.components is 769, more than the width of openai_224's embedding, 768",
        ),
        (
            "text_anchored",
            {"recipes.text_anchored.gap_correction": {"components": 9, "images": 8}},
            f"{KEY}.text_anchored.gap_correction.components is 9, more than gap_correction.images, 8. Lower it.",
        ),
        (
            "diva",
            {"images.kind": "links"},
            "data/Train_GCC-training.tsv: no such file. It is the list of Conceptual Captions' training images",
        ),
        (
            "diva",
            {"images.kind": "index"},
            "data/index.json: no such file. It names the shards: `python -m pipeline.tools.index` writes it, or",
        ),
        (
            "diva",
            {"recipes.diva.timesteps": [0, 1001], "denoiser": "mini"},
            f"{KEY}.diva.timesteps ends at 1001, but the denoiser has 1000 timesteps. Lower it.",
        ),
        (
            "",
            {"source": "ViT-L-17"},
            "backbones.openai_224.source: architecture 'ViT-L-17': open_clip has no such model. Similar names: ",
        ),
        ("", {"source": {"vision_cfg": {}}}, "source.architecture: embed_dim, its embedding's width, is missing."),
        *(
            ("", {"source": SMALL | changes}, f"backbones.openai_224.source: the architecture makes no model ({why}")
            for changes, why in (
                ({"vision_cfg": {"image_size": 64, "layer": 1}}, "TypeError: "),
                ({"vision_cfg": {"layers": 1}}, "KeyError: 'image_size'"),
                ({"vision_cfg": None}, "TypeError: "),
                ({"text_cfg": {"layers": 1}}, "KeyError: 'vocab_size'"),
                ({"text_cfg": SMALL["text_cfg"] | {"heads": 5}}, "AssertionError: "),
                ({"embed_dims": 9}, "TypeError: "),
            )
        ),
        (
            "",
            {"model": "ViT-L-17"},
            "backbones.openai_224.source.model: open_clip's registry has no weights of 'ViT-L-17'",
        ),
    ],
)
def test_what_a_later_stage_would_refuse_is_told_before_anything_is_fetched(
    recipe: str, changes: dict[str, Any], said: str, asked: list[Download], capsys: pytest.CaptureFixture[str]
) -> None:
    below = {key: value for key, value in changes.items() if key.split(".")[0] in ("train", "recipes", "images")}
    write(weights=recipe or "pretrained", **below)
    content = read_yaml(Path("params.yaml"))
    entry = content["backbones"]["openai_224"]
    if "denoiser" in changes:
        content["profiles"]["paper"]["denoiser"] = content["profiles"]["mini"]["denoiser"] | {"text_tokens": 77}
    if "source" in changes:
        own = complete("openai_224", params.load().backbones["openai_224"].source)
        entry["source"] = own.model_dump() | {"architecture": changes["source"]}
    if "model" in changes:
        entry["source"]["model"] = changes["model"]
    write_yaml(Path("params.yaml"), content)
    assert said in refusal(capsys)
    assert asked == []


@pytest.mark.slow
def test_a_list_of_links_is_not_asked_for_where_its_images_are_there(asked: list[Download]) -> None:
    write(weights="diva", **{"images.kind": "links", "train.precision": "float32"})
    Path("data/paper/images").mkdir(parents=True)
    run(plan)
    assert Path("data/paper/planned/images.json").is_file()


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        (None, "TypeError"),
        ({"width": 128}, "KeyError: 'image_size'"),
        ({"image_size": "64"}, "TypeError"),
        ({"image_size": 64, "patch_size": 0}, "ZeroDivisionError"),
        ({"image_size": 64}, None),  # open_clip's patches have 16 px
    ],
)
def test_an_architecture_without_patch_tokens_is_refused_by_its_key(
    vision: Any, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    content = read_yaml(COMMITTED)
    content["run"] |= {"recipes": [], "inputs": []}
    content["backbones"]["mini"]["source"]["architecture"]["vision_cfg"] = vision
    write_yaml(Path("params.yaml"), content)
    if said:
        assert f"backbones.mini.source makes no image tower with patch tokens ({said}" in refusal(capsys)
    else:
        run(plan)


@pytest.mark.parametrize(
    ("backbone", "tokens"),
    [
        ("openai_224", {"kind": "random_fraction", "number": 0.003}),  # of 256 patches
        ("openai_224", {"kind": "windows", "number": 257}),
        ("siglip_224", {"kind": "windows", "number": 257}),  # a tower of timm
        ("mini", {"kind": "random_fraction", "number": 0.05}),
    ],
)
def test_a_rule_that_selects_no_token_is_refused(
    backbone: str, tokens: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("condition", "published_pooling"):
        content = read_yaml(COMMITTED)
        content["run"] |= {"profile": content["backbones"][backbone]["profile"], "backbones": [backbone]}
        content["run"] |= {"recipes": [], "inputs": []}
        content["backbones"][backbone][key]["tokens"] = tokens
        if key == "condition":
            content["backbones"][backbone][key]["text"] = "mean"
        write_yaml(Path("params.yaml"), content)
        assert f"backbones.{backbone}.{key}.tokens: kind '{tokens['kind']}' with" in refusal(capsys)
