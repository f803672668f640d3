"""Stage zeroshot_sets: what zero-shot ability is measured on, in clip-benchmark's local wds/ layout.

data/<profile>/zeroshot_sets/wds/<name>/dataset_type.txt          classification, retrieval, or probe (ours)
data/<profile>/zeroshot_sets/wds/<name>/classnames.txt, zeroshot_classification_templates.txt
data/<profile>/zeroshot_sets/wds/<name>/<split>/nshards.txt, 0.tar
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import params
from pipeline.adapters.benchmarks import write_split
from pipeline.mini import world
from pipeline.params import ZeroshotSets
from pipeline.runtime import progress, stage, whole


def render(root: Path, sizes: ZeroshotSets) -> None:
    """Draw the mini world's three sets: objects, captions, details."""
    objects, captions, details = (root / "wds" / name for name in ("objects", "captions", "details"))
    write_split(objects, "test", "classification", _samples("scorings", 1, sizes.classification, _label))
    (objects / "classnames.txt").write_text("\n".join(world.OBJECTS) + "\n")
    (objects / "zeroshot_classification_templates.txt").write_text(world.PROMPT + "a {c}\n")
    write_split(captions, "test", "retrieval", _samples("scorings", 2, sizes.retrieval, _caption))
    write_split(details, "train", "probe", _samples("probe", 0, sizes.probe_train, _attributes))
    write_split(details, "test", "probe", _samples("scorings", 3, sizes.probe_test, _attributes))


def _samples(set_name: str, group: int, count: int, target) -> Iterator[dict[str, Any]]:
    for index in progress(range(count), f"{target.__name__.strip('_')} pictures"):
        pixels, scene = world.picture(set_name, group, index)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        yield {"__key__": f"{index:06d}", "png": file.getvalue(), **target(scene)}


def _label(scene: np.ndarray) -> dict[str, Any]:
    return {"cls": int(scene[0])}


def _caption(scene: np.ndarray) -> dict[str, Any]:
    return {"txt": world.caption(scene)}


def _attributes(scene: np.ndarray) -> dict[str, Any]:
    return {"json": json.dumps(dict(zip(world.PATTERNS, map(int, scene[1:]), strict=True))).encode()}


@stage
def main() -> None:
    p = params.load()
    with whole(Path("data", p.run.profile, "zeroshot_sets")) as (folder,):
        render(folder, p.profile.zeroshot_sets)


if __name__ == "__main__":
    main()
