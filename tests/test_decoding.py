"""The decoder of images: what every viewer shows, and one error for all that can go wrong."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from pipeline.data.decoding import UndecodableError, decode

TURNED = {  # orientation tag: what of the stored image's corners lies upper left and upper right when shown
    1: "ab", 2: "ba", 3: "dc", 4: "cd", 5: "ac", 6: "ca", 7: "db", 8: "bd"
}  # fmt: skip
CORNERS = dict(zip("abcd", [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)], strict=True))
DOTS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners(width: int = 60, height: int = 40) -> Image.Image:
    """An image whose quarters are a b / c d."""
    small = Image.new("RGB", (2, 2))
    small.putdata(list(CORNERS.values()))
    return small.resize((width, height), Image.Resampling.NEAREST)


def mean(image: Image.Image) -> list[int]:
    return np.asarray(image).reshape(-1, 3).mean(0).round().astype(int).tolist()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_formats_and_modes_become_rgb(kind: str, tmp_path: Path) -> None:
    image = Image.fromarray(DOTS)
    data = stored(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    (tmp_path / "image").write_bytes(data)
    wanted = Image.open(io.BytesIO(data)).convert("RGB")
    for found in (decode(data, upright=True), decode(tmp_path / "image", upright=False)):
        assert (found.mode, found.size, found.tobytes()) == ("RGB", (60, 40), wanted.tobytes())


def test_a_jpeg_is_what_it_always_was() -> None:
    for image in (Image.fromarray(DOTS), Image.fromarray(DOTS).convert("L"), Image.fromarray(DOTS).convert("CMYK")):
        data = stored(image, "JPEG", quality=90)
        assert decode(data, upright=True).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("tag", TURNED)
def test_the_orientation_tag_is_followed_where_it_is_asked_for(tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    data = stored(corners(), "JPEG", quality=95, subsampling=0, exif=exif)
    lying, upright = decode(data, upright=False), decode(data, upright=True)
    assert lying.size == (60, 40)
    assert upright.size == ((60, 40) if tag < 5 else (40, 60))
    for image, left_right in ((lying, "ab"), (upright, TURNED[tag])):
        for x, corner in zip((3, image.width - 4), left_right, strict=True):
            assert np.abs(np.subtract(image.getpixel((x, 3)), CORNERS[corner])).max() < 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0"]
)
def test_a_damaged_orientation_tag_says_nothing(exif: bytes) -> None:
    data = stored(corners(), "JPEG", exif=exif)
    assert decode(data, upright=True).tobytes() == decode(data, upright=False).tobytes()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_to_eight(kind: str) -> None:
    levels = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    found = np.asarray(decode(stored(Image.fromarray(levels), kind), upright=True)).astype(int)
    assert np.abs(found - (levels / 257)[..., None]).max() <= 1
    assert found.max() > 250


def test_sixteen_bits_of_grey_with_a_transparent_level() -> None:
    levels = np.full((8, 8), 40000, np.uint16)
    assert mean(decode(stored(Image.fromarray(levels), "PNG", transparency=5), upright=True)) == [156, 156, 156]


def test_what_is_transparent_is_white_without_a_warning() -> None:
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    half = Image.new("LA", (8, 8), (0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 0, 200])
    keyed = Image.new("RGB", (8, 8), (1, 2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image, options, wanted in (
            (clear, {}, [255] * 3),
            (half, {}, [127] * 3),
            (palette, {}, [0, 0, 200]),
            (palette, {"transparency": bytes([255, 0])}, [255] * 3),
            (keyed, {"transparency": (1, 2, 3)}, [255] * 3),
        ):
            assert mean(decode(stored(image, "PNG", **options), upright=True)) == wanted


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_image(kind: str) -> None:
    first, *more = (Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250)))
    data = stored(first, kind, save_all=True, append_images=more)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(np.subtract(mean(decode(data, upright=True)), (250, 0, 0))).max() < 8


def chunked(kind: str) -> bytes:
    return stored(Image.fromarray(DOTS), kind)


WRONG = {
    "nothing": b"",
    "text": b"<html>moved</html>",
    "half a jpeg": chunked("JPEG")[:900],
    "half a png": chunked("PNG")[:900],
    "half a gif": chunked("GIF")[:900],
    "half a webp": stored(Image.fromarray(DOTS), "WEBP", lossless=True)[:900],
    "half a tiff": chunked("TIFF")[:900],
    "half a bmp": chunked("BMP")[:900],
    "ten thousand million pixels": b"P6 100000 100000 255\n",
    "no pixels": b"BM\x1e\0\0\0\0\0\0\0\x1a\0\0\0\x0c\0\0\0\0\0\x05\0\x01\0\x18\0\0\0\0\0",
    "a jpeg without pixels": chunked("JPEG").replace(b"\0\x28\0\x3c", b"\0\0\0\0", 1),
    "a png with a damaged chunk": chunked("PNG").replace(b"IDAT", b"ID\xffT", 1),
    "floating point, whose white is unknown": stored(Image.fromarray(DOTS[..., 0].astype(np.float32)), "TIFF"),
    "integers of 32 bits, whose white is unknown": stored(Image.fromarray(DOTS[..., 0].astype(np.int32)), "TIFF"),
    "integers with a sign, whose white is unknown": stored(
        Image.fromarray(DOTS[..., 0].astype(np.uint16)), "TIFF", tiffinfo={339: 2}
    ),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_image_raises_one_error(what: str, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(WRONG[what])
    for source in (WRONG[what], path):
        with pytest.raises(UndecodableError) as error:
            decode(source, upright=True)
        assert "0x" not in str(error.value)  # no address of an object, which would differ from run to run


def test_postscript_is_never_run_whatever_a_file_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pillow hands it over to Ghostscript."""
    run = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: run.append(arguments))
    path = tmp_path / "image.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    for source in (path, path.read_bytes()):
        with pytest.raises(UndecodableError, match="in none of the formats JPEG, PNG"):
            decode(source, upright=True)
    assert not run


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UndecodableError, match=r"No such file.*none\.jpg"):
        decode(tmp_path / "none.jpg", upright=True)
