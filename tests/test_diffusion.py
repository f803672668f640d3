"""Noising, draws and pixels."""

import pytest
import torch
from diffusers import DDPMScheduler
from torchvision.transforms import RandomResizedCrop

from pipeline.core.compute import generator
from pipeline.diva.diffusion import add_noise, draw, target
from pipeline.diva.pixels import IMAGENET, OPENAI, crop_box, denoiser_pixels, tower_pixels
from pipeline.diva.rules import TokenRule

RULE = TokenRule("random", 6)
SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_target_are_those_of_ddpm(prediction_type: str) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    latent, noise = torch.randn(2, 5, 4, 2, 2, generator=generator("test", "latent"))
    times = torch.tensor([0, 1, 500, 998, 999])
    noised = add_noise(latent, noise, times, scheduler.alphas_cumprod)
    torch.testing.assert_close(noised, scheduler.add_noise(latent, noise, times))
    wanted = noise if prediction_type == "epsilon" else scheduler.get_velocity(latent, noise, times)
    torch.testing.assert_close(target(latent, noise, times, scheduler.alphas_cumprod, prediction_type), wanted)


def test_a_sample_is_drawn_alike_in_every_batch() -> None:
    def drawn(*samples: int):
        return draw(torch.Size([4, 2, 2]), 16, RULE, (0, 1000), [generator("draw", sample) for sample in samples])

    together, pairs = drawn(0, 1, 2, 3), [drawn(2, 0), drawn(3, 1)]
    for pair, samples in zip(pairs, ([2, 0], [3, 1]), strict=True):
        assert pair.timestep_B.equal(together.timestep_B[samples])
        assert pair.noise_BChw.equal(together.noise_BChw[samples])
        assert pair.positions_BK.equal(together.positions_BK[samples])
    assert len(set(together.timestep_B.tolist())) == 4
    assert together.noise_BChw.flatten(1).unique(dim=0).shape[0] == 4


def test_timesteps_fill_their_range() -> None:
    generators = [generator("test", "range", sample) for sample in range(200)]
    times = draw(torch.Size([1, 1, 1]), 1, TokenRule("none"), (3, 7), generators).timestep_B
    assert times.unique().tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (500, 427), (400, 512)])
def test_crop_is_inside_and_of_the_wanted_area_and_ratio(size: tuple[int, int]) -> None:
    width, height = size
    boxes = [crop_box(width, height, SCALE, RATIO, generator("crop", i)) for i in range(300)]
    one_pixel = 1 / min(size)
    shares = [(right - left) * (bottom - top) / (width * height) for left, top, right, bottom in boxes]
    ratios = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    assert all(0 <= left < right <= width and 0 <= top < bottom <= height for left, top, right, bottom in boxes)
    assert SCALE[0] - one_pixel < min(shares) < 0.92
    assert max(shares) <= 1
    assert RATIO[0] - 2 * one_pixel < min(ratios) < max(ratios) < RATIO[1] + 2 * one_pixel
    assert len(set(boxes)) > 100


def test_crop_follows_a_narrow_scale_and_ratio() -> None:
    for i in range(50):
        left, top, right, bottom = crop_box(1000, 1000, (0.25, 0.26), (2.0, 2.1), generator("test", "narrow", i))
        assert 0.249 < (right - left) * (bottom - top) / 1e6 < 0.261
        assert 1.99 < (right - left) / (bottom - top) < 2.11
    corners = {crop_box(1000, 1000, (0.25, 0.26), (1.0, 1.0), generator("test", "corner", i))[:2] for i in range(50)}
    lefts, tops = zip(*corners, strict=True)
    assert max(lefts) > 400 > 100 > min(lefts)
    assert max(tops) > 400 > 100 > min(tops)


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (640, 427), (1, 1)])
def test_crop_of_an_elongated_image_is_the_largest_centred_one(size: tuple[int, int]) -> None:
    """No crop of 90 % has an allowed ratio, so nothing is random and torchvision's rule can be asked itself."""
    image = torch.empty(3, size[1], size[0])
    top, left, height, width = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
    assert crop_box(*size, SCALE, RATIO, generator("test", "elongated")) == (left, top, left + width, top + height)


def test_crop_is_determined_by_its_generator() -> None:
    first, again, other = (crop_box(500, 427, SCALE, RATIO, generator("crop", i)) for i in (1, 1, 2))
    assert first == again != other


def test_denoiser_pixels_are_nominal_with_the_same_statistics() -> None:
    pixels = torch.rand(2, 3, 4, 4, generator=generator("test", "pixels"))
    for statistics in (OPENAI, IMAGENET):
        torch.testing.assert_close(denoiser_pixels(pixels, statistics, statistics), 2 * pixels - 1, atol=1e-6, rtol=0)


def test_denoiser_pixels_as_published_are_narrower() -> None:
    ends = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)
    black, white = denoiser_pixels(ends, OPENAI, IMAGENET)[0, :, 0].mean(0).tolist()
    naive = [
        sum(
            2 * ((x - mean) / std * back_std + back_mean) - 1
            for mean, std, back_mean, back_std in zip(OPENAI.mean, OPENAI.std, IMAGENET.mean, IMAGENET.std, strict=True)
        )
        / 3
        for x in (0.0, 1.0)
    ]
    assert [black, white] == pytest.approx(naive, abs=1e-6)
    assert [black, white] == pytest.approx([-0.86, 0.82], abs=0.02)


def test_tower_pixels_of_the_right_size_are_only_normalised() -> None:
    pixels = torch.rand(1, 3, 8, 8, generator=generator("test", "pixels"))
    assert tower_pixels(pixels, OPENAI, 8, antialias=True).equal(OPENAI.apply(pixels))
    torch.testing.assert_close(OPENAI.undo(OPENAI.apply(pixels)), pixels)
    pooled = torch.nn.functional.avg_pool2d(OPENAI.apply(pixels), 2)  # halving without antialiasing averages 2 x 2
    torch.testing.assert_close(tower_pixels(pixels, OPENAI, 4, antialias=False), pooled)
