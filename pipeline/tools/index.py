"""Write an index of shards that stay where they are: of img2dataset's output folder, or another folder of tars.

    python -m pipeline.tools.index FOLDER --at s3://bucket/folder --size 512 --output data/index.json

FOLDER is read here, each tar once, and is not changed. ADDRESS is where trainings find the same files: s3://, gs://,
https:// or a folder that every host has. SIZE is the images' shorter edge at most, in pixels. With `images.kind: index`
a training reads the shards from there (data/remote.py).
"""

import argparse
from pathlib import Path

from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, progress, stage
from pipeline.data import downloads, shards


def index(folder: Path, at: str, size: int) -> dict:
    """The index of a folder. Raises UserError if it has no tar, and for one that is packed, cut or without image."""
    tars = sorted(path for path in folder.rglob("*.tar") if path.is_file())
    if not tars:
        raise UserError(
            f"{folder} has no *.tar file. Name a folder of shards, such as img2dataset's output (webdataset)."
        )
    files, counts, captioned = {}, {}, {}
    for tar in progress(tars, "indexing"):
        name = tar.relative_to(folder).as_posix()
        counts[name], captioned[name], _ = shards.count(tar, "Write it anew, or move it out of the folder.")
        if not counts[name]:
            raise UserError(f"{tar} has no image, and every shard of an index must have one. Move it out of {folder}.")
        files[name] = {"bytes": tar.stat().st_size, "sha256": downloads.digest(tar)}
    found = {"size": size, "samples": sum(counts.values()), "shards": counts, "captioned": captioned}
    return {**found, "at": at, "files": files}


@stage
def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.tools.index", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder of shards; it is read, not changed")
    parser.add_argument("--at", required=True, metavar="ADDRESS", help="where trainings read the same files")
    parser.add_argument("--size", required=True, type=int, help="the images' shorter edge at most, in pixels")
    parser.add_argument("--output", type=Path, default=Path("data/index.json"), help="default: %(default)s")
    asked = parser.parse_args(arguments)
    found = index(asked.folder, asked.at, asked.size)
    with atomic(asked.output) as (file,):
        write_json(file, found)
    print(f"{found['samples']} images in {len(found['files'])} shards: {asked.output}")


if __name__ == "__main__":
    main()
