"""Sets for segmentation: images, masks, and the words for their classes. A set is a folder:

classes.json           {"classes": {class: [name, ...], ...}, "templates": ["a photo of a {c}", ...]}, the classes in
                       the order of their pixels' values, from 0
<split>/0.tar          train and test: KEY.jpg or KEY.png, and KEY.mask.png of one channel and the image's size

A class may have several names; the one nearest to the pixel counts. The pixels of a class without a name count for the
probe alone. Pixels of value UNLABELLED do not count.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.benchmarks.sets import contents
from pipeline.core.stages import UserError
from pipeline.data.decoding import UndecodableError, decode, stored

UNLABELLED = 255


@dataclass(frozen=True)
class SegmentationSet:
    """classes: each class's names, in the order of the masks' values. templates: with {c} in the place of a name."""

    folder: Path
    classes: dict[str, list[str]]
    templates: list[str]

    @classmethod
    def read(cls, folder: Path) -> "SegmentationSet":
        """Raises UserError if classes.json is missing or incomplete."""
        file = folder / "classes.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            classes, templates = found["classes"], found["templates"]
            names = [name for of_class in classes.values() for name in of_class]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} lacks classes with names, or templates ({error!r}). {_again(folder)}") from error
        if not 2 <= len(classes) <= UNLABELLED or not names:
            raise UserError(
                f"{file} has {len(classes)} classes, wanted 2 to {UNLABELLED}, with names. {_again(folder)}"
            )
        if not templates or any("{c}" not in template for template in templates):
            raise UserError(
                f"{file} has the templates {templates}, wanted at least one, each with {{c}}. {_again(folder)}"
            )
        return cls(folder, classes, templates)

    def samples(self, split: str) -> Iterator[tuple[Image.Image, np.ndarray]]:
        """The images of a split in RGB and their masks, uint8 [height, width].

        Raises UserError for a missing file, and for a mask of another size, of several channels or with an unknown
        class.
        """
        file = self.folder / split / "0.tar"
        try:
            found = contents(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: no such file, or no tar ({error}). {_again(self.folder)}") from error
        for key, parts in found.items():
            where = f"{file}: {key}"
            images = [part for ending, part in parts.items() if ending in ("jpg", "jpeg", "png")]
            if len(images) != 1 or "mask.png" not in parts:
                raise UserError(f"{where} has {sorted(parts)}, wanted an image and mask.png. {_again(self.folder)}")
            yield check_mask(images[0].read(), parts["mask.png"].read(), len(self.classes), where)


def _again(folder: Path) -> str:
    return f"Make the set '{folder.name}' again: `dvc repro --force pipeline/dvc.yaml:benchmark_sets@segmentation`."


def check_mask(image: bytes, mask: bytes, classes: int, where: str) -> tuple[Image.Image, np.ndarray]:
    """An image and its mask, decoded. Raises UserError if their sizes differ or the mask has unknown values."""
    try:
        decoded = decode(image, upright=False)  # the mask is of the pixels as they are stored
        with stored(mask) as opened:
            values = np.asarray(opened)
    except UndecodableError as error:
        raise UserError(f"{where} cannot be decoded ({error}). Take it out, or fetch it again.") from error
    if values.ndim != 2 or values.dtype != np.uint8:
        raise UserError(
            f"{where}: the mask is {values.dtype} {list(values.shape)}, wanted one channel of 8 bits. Convert it."
        )
    if values.shape != (decoded.height, decoded.width):
        size = f"{values.shape[1]} x {values.shape[0]}"
        raise UserError(
            f"{where}: the mask is {size} px, the image {decoded.width} x {decoded.height}. Fetch both again."
        )
    others = sorted({*np.unique(values).tolist()} - {*range(classes), UNLABELLED})
    if others:
        raise UserError(
            f"{where}: the mask has values {others}, but the set's classes are 0..{classes - 1} ({UNLABELLED}: "
            "unlabelled). Correct the mask, or the classes of the set."
        )
    return decoded, values
