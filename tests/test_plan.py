"""What is told before anything is fetched, when a run is refused, and the GPU memory that params.yaml declares."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from shrunk import SCORED, run_of
from torch._subclasses import FakeTensorMode

from pipeline import plan
from pipeline.core import code
from pipeline.data import downloads
from pipeline.data.downloads import Listing, Remote
from pipeline.diva import pixels
from pipeline.diva.diffusion import Draw
from pipeline.diva.feedback import Feedback
from pipeline.diva.losses import Denoise, InfoNCE
from pipeline.diva.pixels import IMAGENET, OPENAI, PixelRule
from pipeline.diva.rules import TokenRule
from pipeline.diva.step import MicroBatch, terms
from pipeline.models.backbones import ImageTower
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import params
from pipeline.sections.download import Download
from pipeline.tools.bench import STABLE_DIFFUSION_2_1_BASE

COMMITTED = Path(__file__).parents[1] / "params.yaml"
GB = 10**9
ALWAYS = {"data/paper/mmvp", "data/paper/zeroshot", "models/paper/pretrained/openai_224"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    disk(monkeypatch, 10_000)
    graphics(monkeypatch, 100)


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
    content = yaml.safe_load(COMMITTED.read_text())
    lists = {key.removeprefix("run."): names for key, names in run_of(weights.split()).items()}
    content["run"] = {"profile": "paper", "backbones": backbones.split(), **lists}
    content["profiles"]["paper"]["zeroshot_sets"]["sets"] = {"imagenet1k": "abc123", "birdsnap": None}
    for key, value in changes.items():
        *parents, last = key.split(".")
        reduce(dict.__getitem__, parents, content["profiles"]["paper"])[last] = value
    Path("params.yaml").write_text(yaml.safe_dump(content))
    return params.load()


def disk(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    """Let so many GB be free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * GB))


def graphics(monkeypatch: pytest.MonkeyPatch, *memory: float) -> None:
    """Let there be GPUs of so many GB."""
    found = [SimpleNamespace(name=f"Board {i}", total_memory=m * GB) for i, m in enumerate(memory)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: found[i])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """Run the stage, which stops; returns what it says on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        plan.main()
    assert stopped.value.code == 1
    assert not Path("data/paper/planned").exists()
    return capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- what is told


def test_mini_fetches_nothing_and_does_not_wait_for_torch() -> None:
    Path("params.yaml").write_text(COMMITTED.read_text())
    code = "import sys; from pipeline import plan; plan.main(); assert 'torch' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "profile mini: all inputs are made here, nothing is fetched\n"
    planned = {path.stem: json.loads(path.read_text()) for path in Path("data/mini/planned").iterdir()}
    scorings = {f"{benchmark}-mini-{weights}" for benchmark in ("mmvp", "zeroshot") for weights in SCORED}
    assert planned.keys() == {"images", "denoiser", "mmvp_vlm", "zeroshot_sets", "pretrained-mini"} | scorings
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
    assert {str(folder) for folder, _ in plan.downloads_of(write(weights=weights))} == ALWAYS | more


def test_every_backbone_and_its_tokenizer_are_needed() -> None:
    p = write("openai_336 siglip_384")
    found = [download for folder, download in plan.downloads_of(p) if folder.parent.name == "pretrained"]
    first, second = (p.backbones[name].source for name in p.run.backbones)
    assert found == [first.weights, second.weights, second.tokenizer]


def test_addresses_sizes_and_licences_are_shown(asked: list[Download], capsys: pytest.CaptureFixture[str]) -> None:
    p = write("dfn_224", "pretrained diva")
    plan.main()
    out = capsys.readouterr().out
    shown = " ".join(out.replace("│", " ").split())
    assert len(asked) == len(plan.downloads_of(p)) == 5
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "│" in line]
    addresses = "".join(row[2] for row in rows)  # a long one is folded
    for folder, download in plan.downloads_of(p):
        assert str(folder) in shown
        assert download.at[0] in addresses
        assert all(word in shown for word in download.licence.split())
    assert "birdsnap" not in shown
    assert {row[1]: row[3:5] for row in rows if row[1]}["data/paper/denoiser"] == ["11", "22.00"]
    assert "\nto download in all: 42.0 GB; there already: nothing\n" in out
    assert "\ndisk: 65.7 GB needed, 10,000.0 GB free in " in out  # checkpoint 2 beside six models of 3.9
    needed = f"{1.15 * (10.7 + 16 * 1.9):.1f}"
    assert (
        f"\nGPU memory: {needed} GB needed to train dfn_224 with micro_batch 16; GPU found: Board 0 with 100.0" in out
    )


def test_what_is_there_is_neither_asked_for_nor_counted(
    asked: list[Download], capsys: pytest.CaptureFixture[str]
) -> None:
    p = write(weights="pretrained diva")
    for name in ("data/paper/images", "models/paper/pretrained/openai_224", "data/paper/denoiser"):
        Path(name).mkdir(parents=True)
    plan.main()
    assert asked == [p.profile.mmvp_vlm.download, *p.profile.zeroshot_sets.downloads().values()]
    out = capsys.readouterr().out
    there = "data/paper/denoiser, data/paper/images, models/paper/pretrained/openai_224"
    assert f"\nto download in all: 12.0 GB; there already: {there}\n" in out
    assert "\ndisk: 20.6 GB needed" in out  # the trained model and the exports are yet to come

    asked.clear()
    for folder in ALWAYS:
        Path(folder).mkdir(parents=True, exist_ok=True)
    plan.main()
    assert asked == []
    assert capsys.readouterr().out.startswith("to download in all: 0.0 GB; there already: data/paper/denoiser, data/")


def test_links_are_estimated(asked: list[Download], capsys: pytest.CaptureFixture[str]) -> None:
    write(**{"weights": "diva", "images.kind": "links", "images.links.rows": 1_000_000})
    plan.main()
    out = capsys.readouterr().out
    (row,) = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "data/paper/images" in line]
    assert row[2:5] == ["data/Train_GCC-training.tsv", "about 600,000", "about 36.00"]
    assert "Conceptual" in row[5]
    assert "to download in all: 72.0 GB" in out  # 12 benchmarks, 2 checkpoint, 22 denoiser, 36 images
    assert not any("cc3m" in address for download in asked for address in download.at)

    Path("data/paper/images").mkdir()
    plan.main()
    assert "to download in all: 36.0 GB; there already: data/paper/images\n" in capsys.readouterr().out

    assert plan.links_of(write(**{"weights": "pretrained released", "images.kind": "links"})) == []


@pytest.mark.usefixtures("asked")
def test_what_is_scored_depends_on_its_own_values_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that score depend on these files, their data and their weights."""

    def planned(weights: str = "released", **changes: Any) -> dict[str, bytes]:
        write(weights=weights, **changes)
        plan.main()
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
    monkeypatch.setattr(plan, "program", lambda file: "another" if file == "mmvp.py" else code.program(file))
    other = planned()
    assert {name for name in before if other[name] != before[name]} == {n for n in names if n.startswith("mmvp-")}
    p = write()
    for benchmark, folder in (("mmvp", "data/paper/zeroshot"), ("zeroshot", None)):
        alone = p.model_copy(update={"run": p.run.model_copy(update={"benchmarks": [benchmark]})})
        assert {str(path) for path, _ in plan.downloads_of(alone)} == ALWAYS - {folder}


@pytest.mark.usefixtures("asked")
def test_what_is_fetched_depends_on_its_pins_alone() -> None:
    """Stages that fetch depend on these files and on nothing else."""

    def planned(backbones: str, weights: str, **changes: Any) -> dict[str, bytes]:
        write(backbones, weights, **changes)
        plan.main()
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
    assert after.keys() - before.keys() == {"pretrained-siglip_224", "released-siglip_224", "released-openai_224"}
    other = planned("openai_224", "pretrained", **{"zeroshot_sets.sets": {"imagenet1k": "abc124"}})
    assert {name for name in before if other[name] != before[name]} == {"zeroshot_sets"}


def test_a_hub_that_does_not_answer_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(downloads, "TRIES", 1)
    write(**{"mmvp_vlm.download": {"at": ["http://127.0.0.1:9/folder"], "licence": "MIT", "files": {"a.csv": None}}})
    assert "http://127.0.0.1:9/folder: ConnectError" in refusal(capsys)


# ------------------------------------------------------------------------------------------------------------- the disk


def items(*sizes: tuple[str, float]) -> list[plan.Item]:
    return [plan.Item(Path(folder), "", 1, size * GB, "") for folder, size in sizes]


FETCHED = [
    ("data/paper/images", 400), ("data/paper/denoiser", 5), ("models/paper/pretrained/openai_224", 0.9),
    ("models/paper/pretrained/dfn_224", 4), ("models/paper/released/dfn_224", 3),
]  # fmt: skip


def test_disk_counts_what_stays_and_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    p = write("openai_224 dfn_224", "pretrained diva")
    models = 4 * (0.4276 + 0.9861)
    assert plan.disk(p, items(*FETCHED[:4])) / GB == pytest.approx(405 + (2 + 4) * models + 4)  # 4: two exports twice

    Path("models/paper/pretrained/dfn_224").mkdir(parents=True)
    assert plan.disk(p, items(*FETCHED[:3])) / GB == pytest.approx(405 + (2 + 4) * models - 4 * 0.9861 + 0.9)

    p = write("dfn_224", "released")
    assert plan.disk(p, items(FETCHED[4])) / GB == pytest.approx((1 + 4) * 4 * 0.9861 + 3)


def test_disk_counts_twice_without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links on this file system")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert plan.disk(write(), items(*FETCHED[:3])) / GB == pytest.approx(2 * (405 + 3 * 4 * 0.4276) + 0.9)


def test_disk_does_not_count_what_stopped_fetches_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left = Path("data/.downloads/0123/unet/weights.incomplete"), Path("data/paper/.images.scratch/shards/00000.tar")
    for size, path in zip((4 * 2**20, 2**20), left, strict=True):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
    found = plan.disk(write(), items(*FETCHED[:2]))
    assert found == pytest.approx(405 * GB + 3 * 4e6 * 427.6 - 5 * 2**20, abs=1)
    for folder in ("pretrained/openai_224", "export/openai_224-pretrained"):
        Path("models/paper", folder).mkdir(parents=True)
    assert plan.disk(write(), items(("data/paper/mmvp", 0.001))) == 0


def test_a_model_without_published_figures_counts_as_a_large_one() -> None:
    p = write()
    unknown = p.backbones["openai_224"].model_copy(update={"published": None})
    p = p.model_copy(update={"backbones": {"openai_224": unknown}})
    assert plan.disk(p, []) == 3 * 4 * GB


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
    assert "GPU memory" not in text
    disk(monkeypatch, needed + 0.1)
    plan.main()


# -------------------------------------------------------------------------------------------------------------- the GPU


def test_gpu_memory_grows_with_the_micro_batch_and_is_needed_for_training_alone() -> None:
    p = write("openai_224 dfn_378", "pretrained diva")
    for micro_batch in (1, 16):
        assert plan.gpu(p, micro_batch) == {
            name: pytest.approx(plan.MARGIN * (takes.fixed + micro_batch * takes.image))
            for name in p.run.backbones
            if (takes := p.backbones[name].gpu_memory)
        }
    assert len(plan.gpu(p, 1)) == 2
    assert plan.gpu(write(weights="pretrained released"), 16) == {}


@pytest.mark.parametrize(
    ("memory", "found", "ways"),
    [
        ([], "none", "Train where there is more"),
        ([8.9], "Board 0 with 8.9 GB", "Train where there is more"),
        ([24, 80], "Board 0 with 24.0 GB, Board 1 with 80.0 GB", "Set -S profiles.paper.train.micro_batch=8,"),
        ([55], "Board 0 with 55.0 GB", "Set -S profiles.paper.train.micro_batch=8,"),
    ],
)
def test_too_little_gpu_memory_is_refused(
    memory: list[float], found: str, ways: str, asked: list[Download], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    p = write("openai_224 dfn_378" if memory == [55] else "openai_224", "pretrained diva")
    needed = plan.gpu(p, 16)
    most = max(needed, key=needed.__getitem__)
    graphics(monkeypatch, *memory)
    text = refusal(capsys)
    line = f"GPU memory: {needed[most]:.1f} GB needed to train {most} with micro_batch 16; GPU found: {found}."
    assert f"\n  {line} {ways}" in text
    assert "choose other run.backbones, or -S 'run.recipes=[]' -S 'run.inputs=[]'" in text
    assert "disk:" not in text

    write("openai_224", "pretrained released")
    plan.main()  # as the message promises


@pytest.mark.usefixtures("asked")
def test_the_count_of_gpu_memory_names_its_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    for recipe, said in (
        ("diva", "micro_batch 16; GPU"),
        ("two_stage", "(counted for recipe diva; two_stage may take"),
    ):
        write(weights=recipe)
        plan.main()
        assert said in capsys.readouterr().out


def test_all_that_is_lacking_is_told_at_once(
    asked: list[Download], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(weights="diva")
    disk(monkeypatch, 1)
    graphics(monkeypatch)
    text = refusal(capsys)
    assert "\n  disk: " in text
    assert "\n  GPU memory: " in text


# ------------------------------------------------------------------------------------- the GPU memory that is declared

PAPER = [name for name, backbone in params.load(COMMITTED).backbones.items() if backbone.profile == "paper"]
EXTREME = ("openai_224", "metaclip_h14", "siglip_384", "dfn_378")  # every tower, every rule, the largest images


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast with CUDA's rules, which keep more than the CPU's, for tensors without content and no device."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """What a GPU chooses in bfloat16; without one, torch would choose a kernel that keeps all the weights."""
        assert attn_mask is None
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


def stable_diffusion() -> Denoiser:
    """What training takes of stable-diffusion-2-1-base, in bfloat16; the cast in place wants tensors with content."""
    torch.set_default_dtype(torch.bfloat16)
    unet, vae = (
        cls(**STABLE_DIFFUSION_2_1_BASE[part]) for cls, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    assert sum(q.numel() for q in unet.parameters()) == 865_910_724
    vae.decoder = None
    torch.set_default_dtype(torch.float32)
    denoiser = Denoiser(vae, unet, None, None, DDPMScheduler())
    denoiser.alphas_cumprod = torch.zeros(1000)  # the scheduler's may lie on the CPU, if models were loaded before
    return denoiser


def saved(forward: Callable[[], torch.Tensor], parameters: list[torch.nn.Parameter]) -> int:
    """Bytes that autograd keeps for the backward pass, parameters apart."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def bytes_of(tensors: list[torch.nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@cache
def count(name: str, draws: int, negatives: int = 0) -> dict[str, float]:
    """GB of a step of pipeline/engine/assemble.py in bfloat16 at 512 px, with so many draws: fixed, and for each image.

    fixed: weights (of the tower in float32, frozen ones in bfloat16), gradients and momentum of what is trained, and
    what autograd keeps whatever the number of images, the casts of the tower's weights.
    image: what autograd keeps for one image, of the tower once and of the UNet for each draw, until backward.

    Left out, and covered by plan.MARGIN: tensors that live shorter than a layer (1 to 2 % of the whole by the CPU's
    rules), CUDA's own half GB, the workspaces of kernels and the allocator's fragmentation. The VAE, which comes first,
    and the copy of the weights from which the update's norm is taken, which comes last, give back what they take.
    """
    backbone = params.load(COMMITTED).backbones[name]
    with torch.device("meta"):
        clip = open_clip.create_model(backbone.source.architecture, load_weights=False, device="meta").eval()
    shapes = {key: tensor.shape for key, tensor in clip.state_dict().items()}
    size = open_clip.get_model_config(backbone.source.architecture)["vision_cfg"]["image_size"]
    least, loss = negatives + 1, InfoNCE(1.0, 0.1, negatives, 0.8) if negatives else Denoise(1.0)

    with FakeTensorMode(), torch.device("cuda"):
        clip.load_state_dict({key: torch.empty(shape) for key, shape in shapes.items()}, assign=True)
        tower = ImageTower(clip.visual)
        pooled, patches = tower(torch.zeros(1, 3, size, size))
        projection = torch.nn.Linear(pooled.shape[1], 1024)
        rule = TokenRule("none") if negatives else backbone.condition.tokens
        text_rule = "mean" if negatives else backbone.condition.text
        feedback = Feedback(
            tower, projection, stable_diffusion(), torch.zeros(1, 77, 1024), rule, text_rule,
            PixelRule(OPENAI, IMAGENET, size, False),
        )  # fmt: skip
        trained = [*tower.parameters(), *projection.parameters()]
        everything = list(feedback.parameters())

        def forward(images: int) -> torch.Tensor:
            positions = rule.positions(patches.shape[1])
            drawn = Draw(
                torch.zeros(images, dtype=torch.int64), torch.zeros(images, 4, 64, 64),
                torch.zeros(images, positions, dtype=torch.int64) if positions else None,
            )  # fmt: skip
            raw_BCHW = torch.zeros(images, 3, 512, 512, dtype=torch.uint8)
            micro = MicroBatch(raw_BCHW, [drawn] * draws, view_BCHW=raw_BCHW if negatives else None)
            return terms(feedback, [loss], micro, torch.bfloat16)[loss.name]

        pixels._column.cache_clear()
        one, two, three = (saved(lambda n=n: forward(n), everything) for n in range(least, least + 3))
        pixels._column.cache_clear()  # its fake tensors belong to this mode

    assert three - two == pytest.approx(two - one, rel=1e-3)
    fixed = bytes_of(everything) + 2 * bytes_of(trained) + one - least * (two - one)
    return {"fixed": fixed / GB, "image": (two - one) / GB}


@pytest.mark.slow
@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EXTREME else pytest.mark.exhaustive) for name in PAPER]
)
def test_declared_gpu_memory_is_what_training_takes(name: str) -> None:
    found, declared = count(name, draws=2), params.load(COMMITTED).backbones[name].gpu_memory
    assert declared, found
    assert declared.model_dump() == {key: pytest.approx(value, rel=0.1) for key, value in found.items()}, found


@pytest.mark.slow
@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("negatives", [2, pytest.param(15, marks=pytest.mark.exhaustive)])
def test_info_nce_takes_no_more_than_the_published_recipe(negatives: int) -> None:
    """What its forward pass keeps, and then one prediction made again, against the published recipe's two."""
    contrast = count("openai_224", draws=1, negatives=negatives)
    assert contrast["image"] + count("openai_224", draws=1)["image"] < count("openai_224", draws=2)["image"]
