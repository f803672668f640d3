"""Stage score@segmentation-<backbone>-<weights>: segmentation by the patch tokens of the frozen image tower.

metrics/<profile>/scores/segmentation/<backbone>-<weights>/
  scores.json       mean IoU and pixel accuracy in %, by set and reading; a hash of the tensors that it reads
  pixels.parquet    one row an image and class, by set and reading: pixels that are right, predicted, labelled

Two readings: a linear probe (`probe`), and open vocabulary without training (`training_free`). The second one is
undefined for towers whose patch tokens are not in text space, such as SigLIP's.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize, to_tensor

from pipeline.benchmarks import segmentation as benchmark
from pipeline.benchmarks.masks import SegmentationSet
from pipeline.benchmarks.segmentation import NotInTextSpaceError
from pipeline.core import config
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, progress, stage
from pipeline.models.backbones import Backbone
from pipeline.sections.segmentation import Segmentation

Grids = Callable[[torch.Tensor], torch.Tensor]  # windows [W, 3, S, S] to logits [W, C, G, G]
COLUMNS = ["right", "predicted", "labelled"]


def score(backbone: Backbone, root: Path, p: Segmentation, compute: torch.device) -> tuple[dict, pd.DataFrame]:
    """(scores.json, the table of pixels) of all sets below `root`."""
    folders = sorted(path.parent for path in root.glob("*/classes.json"))
    if not folders:
        raise UserError(f"{root} has no set. Run `dvc repro --force pipeline/dvc.yaml:benchmark_sets@segmentation`.")
    scores: dict[str, dict] = {}
    tables = []
    for folder in folders:
        found = SegmentationSet.read(folder)
        named = [i for i, names in enumerate(found.classes.values()) if names]
        readings: dict[str, tuple[Grids, list[int]]] = {
            "probe": (_probe(backbone, found, p, compute), list(range(len(found.classes))))
        }
        scores[folder.name] = {}
        try:
            readings["training_free"] = (_training_free(backbone, found, p), named)
        except NotInTextSpaceError as error:
            scores[folder.name]["training_free"] = {"undefined": str(error)}
        for reading, table in _pixels(backbone, found, p, readings, compute).items():
            scores[folder.name][reading] = _summary(table, found)
            tables.append(table.assign(set=folder.name, reading=reading))
    return {"reads_sha256": reads(backbone), "sets": scores}, pd.concat(tables, ignore_index=True)


def reads(backbone: Backbone) -> str:
    """sha256 of the image tower's tensors without a residual head, which no patch token passes."""
    digest, visual = hashlib.sha256(), backbone.clip.visual
    for name, tensor in sorted(getattr(visual, "visual", visual).state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _windows(backbone: Backbone, image, p: Segmentation) -> tuple[torch.Tensor, benchmark.Places, torch.Size]:
    """(windows of the resized image, their places, its height and width)."""
    short = round(p.scale * backbone.image_size)
    pixels = resize(to_tensor(image), [short], antialias=True) if min(image.size) != short else to_tensor(image)
    pixels = normalize(pixels, list(backbone.mean), list(backbone.std))
    stride = max(1, round(p.stride * backbone.image_size))
    return *benchmark.windows(pixels, backbone.image_size, stride), pixels.shape[1:]


@torch.no_grad()
def predictions(
    backbone: Backbone, image, mask: np.ndarray, p: Segmentation, readings: dict[str, Grids], compute: torch.device
) -> dict[str, np.ndarray]:
    """The class of every pixel of the mask, by reading."""
    pixels, places, working = _windows(backbone, image, p)
    return {
        reading: benchmark.predict(grids(pixels.to(compute)), places, backbone.image_size, working, mask)
        for reading, grids in readings.items()
    }


@torch.no_grad()
def _probe(backbone: Backbone, found: SegmentationSet, p: Segmentation, compute: torch.device) -> Grids:
    """A probe trained on the set's train split. The tokens are computed once and kept on disk meanwhile."""
    grid = math.isqrt(backbone.patches)
    with tempfile.TemporaryDirectory(prefix="tokens-") as scratch:
        files = [Path(scratch, name) for name in ("tokens", "counts")]
        with files[0].open("wb") as tokens_file, files[1].open("wb") as counts_file:
            for image, mask in progress(found.samples("train"), f"{found.folder.name}: tokens for the probe"):
                pixels, places, (height, width) = _windows(backbone, image, p)
                nearest = resize(torch.tensor(mask)[None], [height, width], InterpolationMode.NEAREST)[0].numpy()
                tokens_WND = backbone.image_tokens(pixels.to(compute))[1]
                tokens_file.write(tokens_WND.flatten(0, 1).half().cpu().numpy().tobytes())
                classes = len(found.classes)
                counted = benchmark.cell_counts(nearest, places, backbone.image_size, grid, p.probe.cells, classes)
                counts_file.write(counted.half().numpy().tobytes())
        tokens: np.ndarray = np.memmap(files[0], np.float16, "r").reshape(-1, backbone.width)
        counts: np.ndarray = np.memmap(files[1], np.float16, "r").reshape(len(tokens), len(found.classes), -1)
        with torch.enable_grad():
            probe = benchmark.fit_probe(tokens, counts, p.probe.steps, p.probe.batch, p.probe.lr, compute)
    return lambda pixels: probe.grids(backbone.image_tokens(pixels)[1])


def _training_free(backbone: Backbone, found: SegmentationSet, p: Segmentation) -> Grids:
    """Logits of windows by comparison with texts. Raises NotInTextSpaceError here, not when it is called."""
    visual, classify = backbone.clip.visual, benchmark.text_classifier(backbone, found)
    benchmark.last_block(visual)
    return lambda pixels: classify(benchmark.text_space_tokens(visual, pixels, p.attention, p.neighbourhood))


@torch.no_grad()
def _pixels(
    backbone: Backbone, found: SegmentationSet, p: Segmentation, readings: dict[str, tuple[Grids, list[int]]],
    compute: torch.device,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Tables of pixels by reading, one row an image and class."""
    rows: dict[str, list[pd.DataFrame]] = {reading: [] for reading in readings}
    grids = {reading: of for reading, (of, _) in readings.items()}
    for number, (image, mask) in enumerate(progress(found.samples("test"), f"{found.folder.name}: segmentation")):
        for reading, predicted in predictions(backbone, image, mask, p, grids, compute).items():
            classes = readings[reading][1]
            table = pd.DataFrame(benchmark.confusion(predicted, mask, classes), columns=COLUMNS, dtype=np.int32)
            rows[reading].append(table.assign(image=np.int32(number), label=np.int16(classes)))
    return {reading: pd.concat(tables, ignore_index=True) for reading, tables in rows.items()}


def _summary(table: pd.DataFrame, found: SegmentationSet) -> dict:
    """Mean IoU over the classes that occur, in %, pixel accuracy, and IoU by class."""
    total = table.groupby("label")[COLUMNS].sum()
    iou = 100 * total.right / (total.predicted + total.labelled - total.right)
    names = list(found.classes)
    return {
        "mean_iou": round(float(iou.mean()), 3),
        "pixel_accuracy": round(float(100 * total.right.sum() / total.labelled.sum()), 3),
        "classes": {names[int(i)]: round(float(value), 3) for i, value in iou.dropna().items()},
    }


@stage
def main(backbone: str, weights: str) -> None:
    profile, compute = config.profile(), deterministic_device()
    section: Segmentation = config.read(Segmentation, f"profiles.{profile}.segmentation")
    with atomic(Path("metrics", profile, "scores", "segmentation", f"{backbone}-{weights}")) as (folder,):
        clip = Backbone.load(Path("models", profile, weights, backbone)).to(compute)
        scores, table = score(clip, Path("data", profile, "segmentation"), section, compute)
        folder.mkdir()
        write_json(folder / "scores.json", scores)
        table.to_parquet(folder / "pixels.parquet", index=False)


if __name__ == "__main__":
    main()
