"""Stage zeroshot_sets: sets for zero-shot classification, retrieval and a linear probe, in clip-benchmark's layout.

data/<profile>/zeroshot/wds/<name>/dataset_type.txt          classification, retrieval, or probe (ours)
data/<profile>/zeroshot/wds/<name>/classnames.txt, zeroshot_classification_templates.txt
data/<profile>/zeroshot/wds/<name>/<split>/nshards.txt, 0.tar
"""

from pathlib import Path
from typing import Any

from pipeline.benchmarks.sets import read
from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import stage
from pipeline.data import downloads
from pipeline.mini import sets
from pipeline.sections.zeroshot_sets import MiniZeroshotSets, PublishedZeroshotSets, ZeroshotSets


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
            sets.zeroshot(folder, section)
        else:
            before = config.recorded(outputs[1]) or {}
            origin = fetch(folder, section, outputs[0], before.get("origin"))
        write_json(report, {"sets": {found.name: found.kind for found in read(folder)}, "origin": origin})


if __name__ == "__main__":
    main()
