"""Trainings and scorings by several processes, on one host or on several that share no folder: who starts them, what is
refused, the same numbers and bytes."""

import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any, Literal

import launch
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from shrunk import DATA, METRICS, MODELS, read_yaml, run, write_params, write_yaml
from test_engine import close, outputs
from test_recipes import SMALL
from test_stages import trained

from pipeline import zeroshot
from pipeline.core.stages import UserError
from pipeline.engine import hosts
from pipeline.models.backbones import stored_tensors
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections.launch import Launch


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What a process would have become."""
    programs: list[list[str]] = []
    for name in ("execv", "execvp"):
        monkeypatch.setattr(os, name, lambda path, arguments: programs.append(arguments))
    monkeypatch.setattr(sys, "argv", ["train.py", "openai_224", "diva"])
    for variable in ("WORLD_SIZE", hosts.LAUNCHED):
        monkeypatch.setenv(variable, "set, so that it is put back")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("STARTED_BY", "DVC")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").touch()
    return programs


ALONE = Launch(train="", processes=1)


def test_a_machine_with_several_gpus_uses_them_all(called: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus in (0, 1, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        hosts.start("pipeline.train", ALONE)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    assert called == [[sys.executable, *torchrun, "-m", "pipeline.train", "openai_224", "diva"]]
    assert os.environ["STARTED_BY"] == str(os.getpid())  # the other processes end with torchrun
    monkeypatch.setenv("WORLD_SIZE", "4")  # torchrun has started us
    hosts.start("pipeline.train", ALONE)
    assert len(called) == 1


def test_a_launcher_takes_the_place_of_python(called: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEAD", "nowhere.invalid")
    asked = Launch(train="env A=1 torchrun --nnodes 2 --rdzv-id '$HEAD 7'", processes=2)
    hosts.start("pipeline.train", asked)
    torchrun = ["env", "A=1", "torchrun", "--nnodes", "2", "--rdzv-id", "nowhere.invalid 7"]
    assert called == [[*torchrun, "-m", "pipeline.train", "openai_224", "diva"]]
    assert "STARTED_BY" not in os.environ  # a number of this host's
    monkeypatch.setenv("WORLD_SIZE", "2")
    hosts.start("pipeline.train", asked)
    assert len(called) == 1


@pytest.mark.parametrize(
    ("command", "environment", "said"),
    [
        ("a_launcher", {}, "begins with 'a_launcher', but PATH has no such program"),
        ("torchrun", {"WORLD_SIZE": "8"}, "started a group of 8 processes, but launch.processes is 16"),
        ("env", {"LAUNCHED": "1:1"}, "started this process outside a group of processes"),
        ("env --rdzv-endpoint here:x", {}, "--rdzv-endpoint is 'here:x', wanted HOST:PORT with a known host"),
        ("env --rdzv_endpoint=nowhere.invalid:1", {}, "'nowhere.invalid:1', wanted HOST:PORT with a known host"),
    ],
)
@pytest.mark.parametrize("key", ["train", "score"])
@pytest.mark.usefixtures("called")
def test_a_wrong_launcher_is_refused(
    key: Literal["train", "score"],
    command: str,
    environment: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = Launch(**{"train": "", key: command, "processes": 16})
    with pytest.raises(UserError, match=f"launch.{key}.* {said}|{said}.* launch.{key}"):
        hosts.start("pipeline.train", asked, key)


def test_each_kind_of_stage_has_a_launcher_of_its_own(called: list[list[str]]) -> None:
    hosts.start("pipeline.zeroshot", Launch(train="env", processes=2), "score")
    assert called == []
    hosts.start("pipeline.zeroshot", Launch(train="env", score="torchrun", processes=2), "score")
    assert called == [["torchrun", "-m", "pipeline.zeroshot", "openai_224", "diva"]]


def test_a_port_in_use_is_told(called: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun would wait at it for its time-out, if it belongs to another program."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        asked = Launch(train=f"env --rdzv-endpoint=127.0.0.1:{port}", processes=1)
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1, which --rdzv-endpoint names, is in use"):
            hosts.start("pipeline.train", asked)
    hosts.start("pipeline.train", asked)
    assert len(called) == 1
    monkeypatch.delenv(hosts.LAUNCHED)
    hosts.start("pipeline.train", Launch(train="env --rdzv-endpoint 192.0.2.1:29400", processes=1))  # of another host
    assert len(called) == 2


@pytest.mark.parametrize("endpoint", ["[2001:db8::1]:29500", "[2001:db8::1]", "192.0.2.1"])  # of other hosts
def test_an_endpoint_is_whatever_torchrun_takes(called: list[list[str]], endpoint: str) -> None:
    hosts.start("pipeline.train", Launch(train=f"env --rdzv-endpoint {endpoint}", processes=1))
    assert len(called) == 1


def test_a_taken_port_of_the_group_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(**options: Any) -> None:
        raise torch.distributed.DistNetworkError("address already in use")

    monkeypatch.setattr(hosts, "Accelerator", taken)
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("MASTER_PORT", "29400")
    with pytest.raises(UserError, match="cannot connect to each other at head:29400: address already in use"):
        hosts.join()


def copies(here: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same inputs."""
    write_params(**{"launch.checkpoint_minutes": 0.0, "profiles.mini.recipes.diva.steps": 6})
    other = tmp_path / "other host"
    shutil.copytree(here, other)
    return here, other


@pytest.mark.slow
def test_hosts_share_no_folder_and_their_clocks_may_differ(here: Path, tmp_path: Path) -> None:
    """Killed and started again, to the bytes of one host; the control's start is sent as well."""
    first, other = copies(here, tmp_path)
    one_host = tmp_path / "one host"
    shutil.copytree(here, one_host)
    for stage in ("train", "shuffled"):
        launch.finish(one_host, 2, stage)

    processes, checkpoint = launch.start(first, 2, others=other), first / MODELS / "diva/.mini.checkpoint"
    while not checkpoint.exists() and processes[0].exitcode is None:
        time.sleep(0.002)
    processes[1].kill()
    launch.join(processes)
    assert outputs(first) == {}
    assert "going on after step" in launch.finish(first, 2, others=other)
    launch.finish(first, 2, "shuffled", others=other)
    assert outputs(first) == outputs(one_host)
    weights = MODELS / "diva-shuffled/mini/open_clip_model.safetensors"
    assert (first / weights).read_bytes() == (one_host / weights).read_bytes()
    assert not (other / MODELS / "diva").exists()
    assert not (other / METRICS / "train").exists()


def other_recipe(other: Path) -> None:
    content = read_yaml(other / "params.yaml")
    content["profiles"]["mini"]["recipes"]["diva"]["optimizer"]["lr"] = 0.25
    write_yaml(other / "params.yaml", content)


def other_images(other: Path) -> None:
    (other / DATA / "images/shards.json").write_text((other / DATA / "images/shards.json").read_text() + "\n")


def no_images(other: Path) -> None:
    shutil.rmtree(other / DATA / "images")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_recipe, "differs from HOST in recipe.optimizer.lr (0.5, there 0.25)"),
        (other_images, "differs from HOST in images"),
        (no_images, "on HOST: data/mini/images is no folder of shards"),
    ],
)
@pytest.mark.slow
def test_hosts_that_are_not_alike_are_refused_on_all(here: Path, tmp_path: Path, change: Any, said: str) -> None:
    first, other = copies(here, tmp_path)
    change(other)
    processes = launch.start(first, 2, others=other)
    launch.join(processes)
    assert [process.exitcode for process in processes] == [1, 1]
    printed = (first / "output0").read_text() + (other / "output1").read_text()
    assert "The hosts of this stage differ, or one is not ready" in printed
    assert said.replace("HOST", socket.gethostname()) in printed
    assert outputs(first) == {}


@pytest.mark.slow
def test_two_processes_score_to_the_same_bytes(here: Path, finished: Path) -> None:
    shutil.copytree(finished / MODELS / "diva", MODELS / "diva")
    write_params(**{"profiles.mini.zeroshot.batch": 5})  # so that each process has a part of the images
    scores = METRICS / "scores/zeroshot/mini-diva"
    run(zeroshot, "mini", "diva")
    wanted = {file.name: file.read_bytes() for file in scores.iterdir()}
    shutil.rmtree(scores)
    launch.finish(here, 2, "zeroshot")
    assert {file.name: file.read_bytes() for file in scores.iterdir()} == wanted


@pytest.mark.slow
def test_a_host_scores_the_weights_of_the_first(here: Path, finished: Path, tmp_path: Path) -> None:
    """It has other ones there, or none, as it trained for another host; sets that differ are refused."""
    write_params(**{"profiles.mini.zeroshot.batch": 5})  # so that each host has a part of the images
    shutil.copytree(finished / MODELS / "diva", here / MODELS / "diva")
    scores, other = METRICS / "scores/zeroshot/mini-diva", tmp_path / "other host"
    wanted = {path.name: path.read_bytes() for path in (finished / scores).iterdir()}
    assert wanted["answers.parquet"] != (finished / scores.parent / "mini-pretrained/answers.parquet").read_bytes()
    shutil.rmtree(here / scores)
    shutil.copytree(here, other)
    shutil.rmtree(other / MODELS / "diva")
    launch.finish(here, 2, "zeroshot", others=other)
    assert {path.name: path.read_bytes() for path in (here / scores).iterdir()} == wanted
    assert not (other / MODELS / "diva").exists()
    assert not (other / scores).exists()

    shutil.rmtree(here / scores)
    shutil.copytree(other / MODELS / "pretrained", other / MODELS / "diva")
    with (other / DATA / "zeroshot/wds/objects/classnames.txt").open("a") as file:
        file.write("unicorn\n")
    processes = launch.start(here, 2, "zeroshot", others=other)
    launch.join(processes)
    assert [process.exitcode for process in processes] == [1, 1]
    assert f"differs from {socket.gethostname()} in sets.objects" in (here / "output0").read_text()
    assert not (here / scores).exists()


class Group:
    """What `agreed` asks of accelerate."""

    is_main_process, num_processes = True, 2


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("code", "b" * 64, "far differs from HOST in code"),
        ("torch", "2.14.0", "far differs from HOST in torch (2.15.0, there 2.14.0)"),
        ("packages", {"pillow": "11"}, "far differs from HOST in packages.pillow (12, there 11)"),
    ],
)
@pytest.mark.usefixtures("called")
def test_other_code_and_other_packages_are_named(
    key: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark: dict[str, Any] = {"code": "a" * 64, "torch": "2.15.0", "packages": {"pillow": "12"}}
    far = ("far", {**mark, key: value}, None)
    monkeypatch.setattr(hosts, "gather_object", lambda own: [*own, far, far])
    with pytest.raises(UserError) as refused:
        hosts.agreed(Group(), lambda: (None, mark))
    assert said.replace("HOST", socket.gethostname()) in str(refused.value)
    assert str(refused.value).count("far") == 1
    assert hosts.packages()["numpy"]


@pytest.mark.usefixtures("called")
def test_the_first_process_must_work_where_dvc_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun gives the first place to the host whose name sorts first, which DVC may not run on."""
    monkeypatch.setattr(hosts, "gather_object", lambda own: own)
    monkeypatch.setenv(hosts.LAUNCHED, hosts.folder_id())
    assert hosts.agreed(Group(), lambda: ("made", {})) == "made"
    monkeypatch.setenv(hosts.LAUNCHED, "of:another")
    with pytest.raises(UserError, match="does not run in the folder in which"):
        hosts.agreed(Group(), lambda: ("made", {}))


# ----------------------------------------------------------------------------------------------- recipes


def small(recipe: str, batch: int = 8) -> dict[str, object]:
    own = {"batch": batch, "steps": 3, "optimizer.lr": 0.01, "warmup.steps": 2, **SMALL.get(recipe, {})}
    return {f"profiles.mini.recipes.{recipe}.{key}": value for key, value in own.items()}


def shrink(recipe: str, **train: object) -> None:
    write_params(
        **small(recipe),
        **{f"profiles.mini.train.{key}": value for key, value in train.items()},
        **{"run.recipes": [recipe]},
    )


def made(folder: Path, recipe: str) -> dict[str, list[float] | torch.Tensor]:
    """All curves and tensors of a recipe and its control."""
    found: dict[str, list[float] | torch.Tensor] = {}
    for weights in (recipe, f"{recipe}-shuffled"):
        for path in sorted((folder / METRICS / f"train/mini-{weights}/plots/metrics").glob("*/*.tsv")):
            found[f"{weights}/{path.parent.name}/{path.stem}"] = pd.read_csv(path, sep="\t")[path.stem].tolist()
        found |= {
            f"{weights}/{name}": tensor for name, tensor in stored_tensors(folder / MODELS / weights / "mini").items()
        }
    return found


def moved_by_gradients(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without the bias of an attention's keys, which adds the same to all scores of a query: its gradient is
    rounding alone, and Adam makes that as large as any other."""
    return tensor.view(3, -1)[[0, 2]] if name.endswith("in_proj_bias") else tensor


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        "two_stage",
        *(pytest.param(r, marks=pytest.mark.exhaustive) for r in ("diva", "text_anchored", "contrastive")),
    ],
)
def test_any_number_of_processes_gives_the_same_curves(here: Path, tmp_path: Path, recipe: str) -> None:
    """Also where they have unequal parts: eight images among three processes. (The default test has one, and three.)"""
    shrink(recipe, micro_batch=3)
    if recipe == "contrastive":  # its negatives are others of the micro-batch: the same on any number of processes
        write_params(**{"run.recipes": [recipe], **small(recipe, batch=12), "profiles.mini.train.micro_batch": 2})
    found = {}
    for world in (1, 3) if recipe == "two_stage" else (1, 2, 3):
        folder = tmp_path / str(world)
        shutil.copytree(here, folder)
        for stage in ("train", "shuffled"):
            launch.finish(folder, world, stage)
        found[world] = made(folder, recipe)
    alone = found.pop(1)
    assert {name.rpartition("/")[0] for name, values in alone.items() if isinstance(values, list)} == {
        f"{recipe}/projection", f"{recipe}/tower", f"{recipe}-shuffled/tower"
    }  # fmt: skip
    for world, other in found.items():
        assert other.keys() == alone.keys()
        for name, values in alone.items():
            if isinstance(values, list):
                assert other[name] == pytest.approx(values, rel=1e-4, abs=1e-6), (world, name)
            else:
                pair = (moved_by_gradients(name, tensor).double() for tensor in (other[name], values))
                assert close(*pair, 1e-3), (world, name)  # Adam divides small gradients by their size


@pytest.mark.slow
def test_a_denoiser_in_warm_up_computes_in_the_precision_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are float32 while they are trained, else most steps would be rounded away; bfloat16 afterwards."""
    shrink("two_stage", micro_batch=3, precision="bfloat16")
    seen: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []
    predict = Denoiser.forward

    def watch(self: Denoiser, *given: torch.Tensor) -> torch.Tensor:
        inside: list[torch.dtype] = []
        hook = self.unet.conv_in.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
        predicted = predict(self, *given)
        hook.remove()
        seen.append((self.unet.dtype, inside[0], self.vae.dtype))
        return predicted

    monkeypatch.setattr(Denoiser, "forward", watch)
    _, denoiser, records = trained()
    single, half = torch.float32, torch.bfloat16
    phases = {"projection": (single, half, half), "tower": (half, half, half)}
    assert list(dict.fromkeys(seen)) == list(phases.values())
    assert all(torch.isfinite(torch.tensor(record.loss)) for record in records)
    before = load_file(DATA / "denoiser/unet/diffusion_pytorch_model.safetensors")
    moved = {name for name, tensor in denoiser.unet.state_dict().items() if not tensor.equal(before[name].to(half))}
    assert moved > {"conv_in.weight", "conv_out.weight"}
