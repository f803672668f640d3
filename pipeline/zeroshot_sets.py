"""Stage zeroshot_sets: sets for zero-shot classification, retrieval and a linear probe, in clip-benchmark's layout.

data/<profile>/zeroshot/wds/<name>/dataset_type.txt          classification, retrieval, or probe (ours)
data/<profile>/zeroshot/wds/<name>/classnames.txt, zeroshot_classification_templates.txt
data/<profile>/zeroshot/wds/<name>/<split>/nshards.txt, 0.tar
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.benchmarks.sets import png, read, write_split
from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import progress, stage
from pipeline.data import downloads
from pipeline.mini import world
from pipeline.sections.zeroshot_sets import MiniZeroshotSets, PublishedZeroshotSets, ZeroshotSets


def make(root: Path, sizes: MiniZeroshotSets, set_name: str = "scorings") -> None:
    """Draw the mini world's three sets: objects, captions, details. Their test splits come from `set_name`."""
    objects, captions, details = (root / "wds" / name for name in ("objects", "captions", "details"))
    write_split(objects, "test", "classification", _samples(set_name, 1, sizes.classification, _label))
    (objects / "classnames.txt").write_text("\n".join(world.OBJECTS) + "\n", encoding="utf-8")
    (objects / "zeroshot_classification_templates.txt").write_text(world.PROMPT + "a {c}\n", encoding="utf-8")
    write_split(captions, "test", "retrieval", _samples(set_name, 2, sizes.retrieval, _caption))
    write_split(details, "train", "probe", _samples("probe", 0, sizes.probe_train, _attributes))
    write_split(details, "test", "probe", _samples(set_name, 3, sizes.probe_test, _attributes))


def _samples(set_name: str, group: int, count: int, target) -> Iterator[tuple[str, dict[str, bytes]]]:
    for index in progress(range(count), f"{target.__name__.strip('_')} images"):
        pixels, scene = world.image(set_name, group, index)
        yield f"{index:06d}", {"png": png(pixels), **target(scene)}


def _label(scene: np.ndarray) -> dict[str, bytes]:
    return {"cls": b"%d" % scene[0]}


def _caption(scene: np.ndarray) -> dict[str, bytes]:
    return {"txt": world.caption(scene).encode()}


def _attributes(scene: np.ndarray) -> dict[str, bytes]:
    return {"json": json.dumps(dict(zip(world.PATTERNS, map(int, scene[1:]), strict=True))).encode()}


def fetch(
    root: Path, section: PublishedZeroshotSets, earlier: Path, recorded: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fetch the chosen ones of clip-benchmark's sets; returns the source of each, and null where it is not on the hub.

    earlier: the folder of an earlier run; files that are there are not fetched again. recorded: what it returned.
    """
    chosen = section.chosen()
    absent = [name for name, revision in chosen.items() if revision is None]
    if absent:
        print(f"not among clip-benchmark's sets, so left out of {len(chosen)}: {', '.join(absent)}")
    wanted = {root / "wds" / name: download for name, download in section.downloads().items()}
    there = {folder: earlier / folder.relative_to(root) for folder in wanted}
    before = {root / "wds" / name: record for name, record in (recorded or {}).items()}
    records = downloads.fetch_all(wanted, there, before)
    return {name: records.get(root / "wds" / name) for name in chosen}


@stage
def main() -> None:
    profile = config.profile()
    section: MiniZeroshotSets | PublishedZeroshotSets = config.read(ZeroshotSets, f"profiles.{profile}.zeroshot_sets")
    outputs = Path("data", profile, "zeroshot"), Path("metrics", profile, "zeroshot_sets.json")
    with atomic(*outputs) as (folder, report):
        if isinstance(section, MiniZeroshotSets):
            origin = None
            make(folder, section)
        else:
            before = config.recorded(outputs[1]) or {}
            origin = fetch(folder, section, outputs[0], before.get("origin"))
        write_json(report, {"sets": {found.name: found.kind for found in read(folder)}, "origin": origin})


if __name__ == "__main__":
    main()
