"""Every recipe and its control: the same numbers on any number of processes, computed in the precision asked for."""

import shutil
from pathlib import Path

import launch
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from shrunk import DATA, METRICS, MODELS, write_params
from test_engine import close
from test_recipes import SMALL
from test_stages import trained

from pipeline.models.backbones import stored_tensors
from pipeline.models.stable_diffusion import Denoiser


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
def test_a_fitted_denoiser_computes_in_the_precision_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are float32 while they are fitted, else most steps would be rounded away, and bfloat16 afterwards."""
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
