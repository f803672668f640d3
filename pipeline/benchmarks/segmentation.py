"""Segmentation by the patch tokens of a frozen image tower: a linear probe, and open vocabulary without training."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize, to_tensor

from pipeline.benchmarks.masks import SegmentationSet
from pipeline.core.compute import generator, seeded
from pipeline.core.stages import UserError, progress
from pipeline.models.backbones import Backbone, tensors_sha256
from pipeline.sections.segmentation import Attention, Segmentation

NOTHING = -2.0  # below every cosine, and finite, because logits are interpolated
Places = list[tuple[int, int]]
Grids = Callable[[torch.Tensor], torch.Tensor]  # windows [W, 3, S, S] to logits [W, C, G, G]
COLUMNS = ["right", "predicted", "labelled"]


class NotInTextSpaceError(Exception):
    """The tower's patch tokens cannot be compared with texts; the message says why."""


# The tower, a window at a time


def windows(pixels_CHW: torch.Tensor, size: int, stride: int) -> tuple[torch.Tensor, Places]:
    """(windows [W, C, size, size], their top left corners), one every `stride` px and one at each far edge.

    mmsegmentation slides its windows in the same way. Raises ValueError if the image is smaller than a window.
    """
    height, width = pixels_CHW.shape[1:]
    if min(height, width) < size:
        raise ValueError(f"an image of {width} x {height} px is smaller than a window of {size} px")
    places = [
        (min(top, height - size), min(left, width - size))
        for top in range(0, height - size + stride, stride)
        for left in range(0, width - size + stride, stride)
    ]
    return torch.stack([pixels_CHW[:, top : top + size, left : left + size] for top, left in places]), places


def stitch(logits_WCGG: torch.Tensor, places: Places, size: int, height: int, width: int) -> torch.Tensor:
    """Logits [C, height, width] of the windows' grids: each is upsampled to `size` px, and overlaps are averaged."""
    total = logits_WCGG.new_zeros(logits_WCGG.shape[1], height, width)
    times = logits_WCGG.new_zeros(height, width)
    upsampled = F.interpolate(logits_WCGG, (size, size), mode="bilinear", align_corners=False)
    for logits_CSS, (top, left) in zip(upsampled, places, strict=True):
        total[:, top : top + size, left : left + size] += logits_CSS
        times[top : top + size, left : left + size] += 1
    return total / times


def text_space_tokens(
    visual: nn.Module, pixels_BCHW: torch.Tensor, attention: Attention, neighbourhood: float
) -> torch.Tensor:
    """Patch tokens [B, N, D] in text space: after the last block with its attention replaced, final norm, projection.

    key_key: softmax(k k^T / sqrt(d) + a Gaussian of the patches' distance), s.d. `neighbourhood` patches (NACLIP, arXiv
    2404.08181); value: each token sees itself alone (MaskCLIP, arXiv 2112.01071): both without the block's skip
    connection and MLP, as theirs. query_query_key_key: softmax(q q^T) + softmax(k k^T), with both (SCLIP, arXiv
    2312.01597). Raises NotInTextSpaceError for a tower that pools by other means than its class token.
    """
    visual, block = last_block(visual)
    found = visual.forward_intermediates(
        pixels_BCHW, indices=[len(visual.transformer.resblocks) - 2], stop_early=True, intermediates_only=True,
        output_fmt="NLC", output_extra_tokens=True,
    )  # fmt: skip
    x_BTD = torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], 1)
    heads = block.attn.num_heads
    qkv = F.linear(block.ln_1(x_BTD), block.attn.in_proj_weight, block.attn.in_proj_bias)
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))  # [B,H,T,d]
    alike = key @ key.transpose(-1, -2) * key.shape[-1] ** -0.5
    if attention == "key_key":
        alike[..., 1:, 1:] += _neighbours(visual.grid_size, neighbourhood).to(alike)
        mixed = alike.softmax(-1) @ value
    elif attention == "value":
        mixed = value
    else:
        queries = query @ query.transpose(-1, -2) * query.shape[-1] ** -0.5
        mixed = (queries.softmax(-1) + alike.softmax(-1)) @ value
    y_BTD = block.attn.out_proj(mixed.transpose(1, 2).flatten(2))
    if attention == "query_query_key_key":
        y_BTD = x_BTD + block.ls_1(y_BTD)
        y_BTD = y_BTD + block.ls_2(block.mlp(block.ln_2(y_BTD)))
    return visual.ln_post(y_BTD[:, 1:]) @ visual.proj


def last_block(visual: nn.Module) -> tuple[VisionTransformer, ResidualAttentionBlock]:
    """The tower without a residual head, which changes no patch token, and its last block.

    Raises NotInTextSpaceError for a tower that does not pool by its class token.
    """
    visual = getattr(visual, "visual", visual)
    block = visual.transformer.resblocks[-1] if isinstance(visual, VisionTransformer) else None
    if not isinstance(block, ResidualAttentionBlock) or visual.pool_type != "tok" or visual.attn_pool is not None:
        what = getattr(visual, "trunk", visual)
        raise NotInTextSpaceError(f"patch tokens of a {type(what).__name__} are not in the space of texts")
    return visual, block


def _neighbours(grid: tuple[int, int], deviation: float) -> torch.Tensor:
    """exp(-distance^2 / 2 s.d.^2) between the patches of a grid, [N, N]."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid))
    return torch.exp(-torch.cdist(places, places).square() / (2 * deviation**2))


@torch.no_grad()
def text_classifier(backbone: Backbone, found: SegmentationSet) -> Callable[[torch.Tensor], torch.Tensor]:
    """Cosines [B, C, G, G] of text-space tokens [B, G*G, D] to every class; NOTHING for a class without a name.

    A name's embedding is the mean over the templates. If a class has several names, the nearest one counts.
    """
    counts = [len(names) for names in found.classes.values()]
    names = [name for names in found.classes.values() for name in names]
    texts = [template.replace("{c}", name) for name in names for template in found.templates]
    embedded = F.normalize(torch.cat([backbone.embed(texts[i : i + 256]) for i in range(0, len(texts), 256)]), dim=-1)
    names_ED = F.normalize(embedded.unflatten(0, (len(names), -1)).mean(1), dim=-1)

    def classify(tokens_BND: torch.Tensor) -> torch.Tensor:
        cosines_BEN = names_ED @ F.normalize(tokens_BND, dim=-1).transpose(1, 2)
        nearest = [
            of.amax(1) if of.shape[1] else NOTHING + 0 * cosines_BEN[:, 0] for of in cosines_BEN.split(counts, 1)
        ]
        return _grid(torch.stack(nearest, 1))  # not by scatter_reduce, which a GPU does in no fixed order

    return classify


def _grid(values_BCN: torch.Tensor) -> torch.Tensor:
    side = round(values_BCN.shape[-1] ** 0.5)
    return values_BCN.unflatten(-1, (side, side))


# The linear probe


def cell_counts(mask: np.ndarray, places: Places, size: int, grid: int, cells: int, classes: int) -> torch.Tensor:
    """Labelled pixels of each class in every token's patch, cut into cells: [W * grid * grid, classes, cells^2].

    All pixels of a cell have one prediction, so the mean over pixels of its cross-entropy is that of these counts.
    """
    one_hot = F.one_hot(torch.tensor(mask).long().clamp(max=classes), classes + 1)[..., :classes].float()
    parts = [one_hot[top : top + size, left : left + size].permute(2, 0, 1) for top, left in places]
    counted = F.adaptive_avg_pool2d(torch.stack(parts), grid * cells) * (size / grid / cells) ** 2
    return F.pixel_unshuffle(counted, cells).flatten(2).transpose(1, 2).flatten(0, 1).unflatten(1, (classes, -1))


class PatchProbe(nn.Module):
    """Batch norm and a linear layer on frozen tokens [..., D]: a prediction for each of a patch's cells x cells."""

    def __init__(self, width: int, classes: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, classes * cells**2)

    def forward(self, tokens_BD: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes, cells^2]."""
        return self.linear(self.norm(tokens_BD)).unflatten(1, (-1, self.cells**2))

    def grids(self, tokens_WND: torch.Tensor) -> torch.Tensor:
        """Logits of windows, [W, classes, G * cells, G * cells]."""
        logits_WNK = self(tokens_WND.flatten(0, 1)).flatten(1).unflatten(0, tokens_WND.shape[:2])
        return F.pixel_shuffle(_grid(logits_WNK.transpose(1, 2)), self.cells)


def fit_probe(
    tokens_ND: np.ndarray, counts_NCK: np.ndarray, steps: int, batch: int, lr: float, compute: torch.device
) -> PatchProbe:
    """A probe fitted by AdamW to the pixels of the tokens' patches. Each step's rows are drawn with a fixed seed.

    With one cell per patch this is DINOv3's protocol (arXiv 2508.10104) without its augmentation.
    """
    (_, width), (_, classes, cells) = tokens_ND.shape, counts_NCK.shape
    with seeded("segmentation", "probe"):
        probe = PatchProbe(width, classes, round(cells**0.5)).to(compute)
    draws, optimizer = generator("segmentation", "rows"), torch.optim.AdamW(probe.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    for _ in progress(range(steps), "linear probe of the patch tokens"):
        rows = torch.randint(len(tokens_ND), (batch,), generator=draws).numpy()
        x_BD, y_BCK = (torch.from_numpy(part[rows]).to(compute, torch.float32) for part in (tokens_ND, counts_NCK))
        loss = pixel_loss(probe(x_BD), y_BCK)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


def pixel_loss(logits_BCK: torch.Tensor, counts_BCK: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled pixels; all pixels of a cell share one prediction."""
    return -(counts_BCK * logits_BCK.log_softmax(1)).sum() / counts_BCK.sum().clamp(min=1)


# What was right


def predict(logits_WCGG: torch.Tensor, places: Places, size: int, working: torch.Size, mask: np.ndarray) -> np.ndarray:
    """The class of every pixel of the mask, from windows on an image resized to `working` (height, width)."""
    stitched = stitch(logits_WCGG, places, size, *working)
    return F.interpolate(stitched[None], mask.shape, mode="bilinear", align_corners=False)[0].argmax(0).cpu().numpy()


def confusion(predicted: np.ndarray, mask: np.ndarray, classes: list[int]) -> np.ndarray:
    """Pixels of an image by class, [classes, 3]: right, predicted, labelled. Pixels of other classes do not count."""
    asked = np.isin(mask, classes)
    predicted, mask = predicted[asked], mask[asked]
    return np.array(
        [[((predicted == c) & (mask == c)).sum(), (predicted == c).sum(), (mask == c).sum()] for c in classes]
    )


# The score of a backbone


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
    visual = backbone.clip.visual
    return tensors_sha256(sorted(getattr(visual, "visual", visual).state_dict().items()))


def _windows(backbone: Backbone, image, p: Segmentation) -> tuple[torch.Tensor, Places, torch.Size]:
    """(windows of the resized image, their places, its height and width)."""
    short = round(p.scale * backbone.image_size)
    pixels = resize(to_tensor(image), [short], antialias=True) if min(image.size) != short else to_tensor(image)
    pixels = normalize(pixels, list(backbone.mean), list(backbone.std))
    stride = max(1, round(p.stride * backbone.image_size))
    return *windows(pixels, backbone.image_size, stride), pixels.shape[1:]


@torch.no_grad()
def predictions(
    backbone: Backbone, image, mask: np.ndarray, p: Segmentation, readings: dict[str, Grids], compute: torch.device
) -> dict[str, np.ndarray]:
    """The class of every pixel of the mask, by reading."""
    pixels, places, working = _windows(backbone, image, p)
    return {
        reading: predict(grids(pixels.to(compute)), places, backbone.image_size, working, mask)
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
                counted = cell_counts(nearest, places, backbone.image_size, grid, p.probe.cells, classes)
                counts_file.write(counted.half().numpy().tobytes())
        tokens: np.ndarray = np.memmap(files[0], np.float16, "r").reshape(-1, backbone.width)
        counts: np.ndarray = np.memmap(files[1], np.float16, "r").reshape(len(tokens), len(found.classes), -1)
        with torch.enable_grad():
            probe = fit_probe(tokens, counts, p.probe.steps, p.probe.batch, p.probe.lr, compute)
    return lambda pixels: probe.grids(backbone.image_tokens(pixels)[1])


def _training_free(backbone: Backbone, found: SegmentationSet, p: Segmentation) -> Grids:
    """Logits of windows by comparison with texts. Raises NotInTextSpaceError here, not when it is called."""
    visual, classify = backbone.clip.visual, text_classifier(backbone, found)
    last_block(visual)
    return lambda pixels: classify(text_space_tokens(visual, pixels, p.attention, p.neighbourhood))


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
            table = pd.DataFrame(confusion(predicted, mask, classes), columns=COLUMNS, dtype=np.int32)
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
