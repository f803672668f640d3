"""Stage benchmark_sets@segmentation: images and masks for benchmarks/segmentation.py.

data/<profile>/segmentation/<name>/classes.json, train/0.tar, test/0.tar

The mini world's set is drawn here. Published sets are fetched by hand (params.yaml says from where); the stage checks
and packs them.
"""

import json
from collections import Counter
from glob import escape
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.benchmarks.masks import UNLABELLED, check_mask
from pipeline.benchmarks.sets import Samples, png, write_split
from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, progress, stage
from pipeline.mini import sets
from pipeline.sections.segmentation_sets import (
    LocalSegmentationSets,
    LocalSet,
    MiniSegmentationSets,
    SegmentationSets,
    synonyms,
)


def pack(root: Path, section: LocalSegmentationSets) -> None:
    """Check the sets that were fetched by hand, and pack them. Raises UserError for what is missing or does not fit.

    Images go by number: an id may have dots, spaces or any length, which names in a tar may not.
    """
    for name, local in section.sets.items():
        for split, own, most in (("train", local.train, section.train), ("test", local.test, None)):
            write_split(root / name, split, "segmentation", _local(name, local, own, most))
        classes = {synonyms(names)[0]: synonyms(names) for names in local.classes}
        write_json(root / name / "classes.json", {"classes": classes, "templates": section.templates})


def _local(name: str, local: LocalSet, split: str, most: int | None) -> Samples:
    """The images of a split and their masks, by number; `most` of them, evenly spaced, if there are more."""
    hint = f"Fetch the set by hand (params.yaml, segmentation_sets.sets.{name}, says from where), or remove it there."
    if local.ids:
        ids = _listed(Path(local.at, local.ids.replace("{split}", split)), hint)
    else:
        before, _, after = str(Path(local.masks.replace("{split}", split))).rpartition("{id}")
        found = Path(local.at).glob(f"{escape(before)}*{escape(after)}")
        ids = sorted(str(path.relative_to(local.at))[len(before) :].removesuffix(after) for path in found)
    if not ids:
        raise UserError(f"{Path(local.at)} has no masks of split '{split}'. {hint}")
    if most and len(ids) > most:
        ids = [ids[i * len(ids) // most] for i in range(most)]
    for number, key in enumerate(progress(ids, f"{name}: {split}")):
        paths = [
            Path(local.at, part.replace("{split}", split).replace("{id}", key)) for part in (local.images, local.masks)
        ]
        image, mask = (_content(path, hint) for path in paths)
        _, values = check_mask(image, mask, len(local.classes) + 1, str(paths[1]))
        labels = np.where(values == UNLABELLED, 0, values) - np.uint8(1)  # 0 becomes 255, which is UNLABELLED
        ending = "png" if image.startswith(b"\x89PNG") else "jpg"  # whatever it is: readers go by the content
        yield f"{number:06d}", {ending: image, "mask.png": png(labels.astype(np.uint8))}


def _listed(file: Path, hint: str) -> list[str]:
    """The ids in a file, one a line. Raises UserError for one that it has twice, and for one that leads elsewhere."""
    try:
        lines = [line.strip() for line in _content(file, hint).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no list in UTF-8 ({error}). Save it as UTF-8.") from None
    ids = [line for line in lines if line]
    for key, times in Counter(ids).items():
        if times > 1:
            raise UserError(f"{file} lists '{key}' {times} times. Keep one.")
        if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
            raise UserError(f"{file} lists '{key}', which lies outside the set's folders. Take it out.")
    return ids


def _content(path: Path, hint: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. {hint}") from None
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise UserError(f"{path} cannot be read ({error}). {hint}") from None


@stage
def main() -> None:
    profile = config.profile()
    section: MiniSegmentationSets | LocalSegmentationSets = config.read(
        SegmentationSets, f"profiles.{profile}.segmentation_sets"
    )
    outputs = Path("data", profile, "segmentation"), Path("metrics", profile, "segmentation_sets.json")
    with atomic(*outputs) as (folder, report):
        if isinstance(section, MiniSegmentationSets):
            sets.segmentation(folder, section)
        else:
            pack(folder, section)
        found = {
            path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/classes.json")
        }
        write_json(report, {name: {"classes": len(of_set["classes"])} for name, of_set in sorted(found.items())})


if __name__ == "__main__":
    main()
