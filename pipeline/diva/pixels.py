"""Which pixels the denoiser and the image tower are given; "published" is github baaivision/DIVA at d53c668.

Shape suffixes here and in the rest of `diva`: B images, C channels, H W pixels, N patch tokens of the tower,
T tokens of the condition, L tokens of the text, D width, K draws of tokens, P pairs.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation per colour, for pixels in 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        mean_C11, std_C11 = _columns(self, pixels_BCHW.dtype, pixels_BCHW.device)
        return (pixels_BCHW - mean_C11) / std_C11

    def undo(self, normalised_BCHW: torch.Tensor) -> torch.Tensor:
        mean_C11, std_C11 = _columns(self, normalised_BCHW.dtype, normalised_BCHW.device)
        return normalised_BCHW * std_C11 + mean_C11


@lru_cache  # a copy to a GPU waits for all that is in its queue
def _columns(statistics: Statistics, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor([statistics.mean, statistics.std], dtype=dtype, device=device)[..., None, None]


OPENAI = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def tower_pixels(pixels_BCHW: torch.Tensor, statistics: Statistics, size: int, antialias: bool) -> torch.Tensor:
    """Pixels in 0..1, normalised and then resized to `size` x `size`, bilinear.

    As published: OpenAI statistics for every family, no antialiasing (torchvision 0.15's default for tensors).
    """
    normalised = statistics.apply(pixels_BCHW)
    if normalised.shape[-2:] == (size, size):
        return normalised
    return F.interpolate(normalised, (size, size), mode="bilinear", align_corners=False, antialias=antialias)


def denoiser_pixels(pixels_BCHW: torch.Tensor, normalised_by: Statistics, undone_by: Statistics) -> torch.Tensor:
    """Pixels in 0..1 to the VAE's range, nominally -1..1.

    As published they are normalised with OpenAI's statistics and brought back with ImageNet's, so that black..white
    becomes about -0.86..0.82. With twice the same statistics this is 2x - 1.
    """
    return 2 * undone_by.undo(normalised_by.apply(pixels_BCHW)) - 1


@dataclass(frozen=True)
class PixelRule:
    """What tower and denoiser are given of images, uint8 [B, 3, H, W]; size: of the tower's."""

    statistics: Statistics
    undone_by: Statistics
    size: int
    antialias: bool

    def tower(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return tower_pixels(images_BCHW.float() / 255, self.statistics, self.size, self.antialias)

    def denoiser(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return denoiser_pixels(images_BCHW.float() / 255, self.statistics, self.undone_by)


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """A random crop (left, top, right, bottom): share of the area in `scale`, aspect ratio log-uniform in `ratio`.

    The rule is that of torchvision's RandomResizedCrop, which draws from the global state and takes no generator:
    ten tries, then the largest centred crop of an allowed ratio.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    def integer(limit: int) -> int:
        return int(torch.randint(limit + 1, (), generator=generator))

    for _ in range(10):
        area, aspect = width * height * uniform(*scale), math.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = integer(width - w), integer(height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
