"""From a file to an image: the one decoder, for shards, for the pairs, for masks and for your own photos.

Of a tar, the one reader of what it holds.
"""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

# Of the other formats that Pillow knows, some are read by another program: PostScript is run by Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "PPM", "JPEG2000")
END = 2 * tarfile.BLOCKSIZE  # bytes, all zero, that end a tar
LONGEST_END = END + tarfile.RECORDSIZE - tarfile.BLOCKSIZE  # with the zeros that fill up a record, 10,240 bytes


class UndecodableError(Exception):
    """Why bytes are not an image; the caller counts it or names the file."""


def decode(source: Path | bytes, upright: bool) -> Image.Image:
    """The image in RGB: of an animation the first frame, 16 bits scaled to 8, white where it is transparent.

    upright: turn it as its orientation tag says, as viewers do. Raises UndecodableError for bytes that Pillow cannot
    decode, for another format than FORMATS, for an image without pixels, for one with more pixels than Pillow's limit,
    and for one of numbers whose white is unknown (floating point, 32 bits).
    """
    with stored(source) as image:
        if upright:
            with suppress(Exception):  # a tag that cannot be read is ignored
                ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


@contextmanager
def stored(source: Path | bytes) -> Iterator[Image.Image]:
    """The image in the mode of its file, as a mask is read. Raises UndecodableError as `decode` does."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            image.load()
            if 0 in image.size:
                raise ValueError("it has no pixels")
            yield image
    except MemoryError:  # a lack of the machine, not a fault of the image
        raise
    except UnidentifiedImageError as error:
        raise UndecodableError(f"in none of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's readers raise a dozen kinds of errors on damaged files
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):  # in "I" others hold 16 bits
        raise ValueError("its pixels are numbers in an unknown range")
    if image.mode.startswith("I"):  # Pillow would cut off whatever is lighter than 255 of 65535
        image = image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
        image.info.pop("transparency", None)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def members(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """All members of a tar, in its order. Raises tarfile.ReadError for a tar that is not whole.

    For tarfile, whatever is no header is the end: a tar that was cut or damaged, or of which zeros came instead of the
    rest, would be a shorter one, and of two tars in one file the second would be lost.
    """
    found = list(tar)
    assert tar.fileobj
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(LONGEST_END + 1)
    if end[:END] != bytes(END):
        raise tarfile.ReadError(f"cut or damaged at byte {tar.offset}: no file is there, and no end")
    if end.strip(b"\0"):
        raise tarfile.ReadError(f"more follows its end at byte {tar.offset}: damaged, or two tars in one file")
    if len(end) > LONGEST_END:
        raise tarfile.ReadError(
            f"more than {LONGEST_END} zeros at its end, from byte {tar.offset} on: its download was not finished, or "
            f"its records are larger than {tarfile.RECORDSIZE} bytes; if so, write it anew by `tar -b 20`"
        )
    return found
