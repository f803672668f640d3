"""Stage `images`: the images to post-train on, as shards.

Four ways, by `kind`. links: a published list of links, fetched by img2dataset. shards: a mirror's shards, as they are.
index: a file that names shards, which stay where they are. mini: images that are drawn into files, which img2dataset
fetches, so that they take the path of links.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow

from pipeline.core import config
from pipeline.core.outputs import atomic, remove, write_json
from pipeline.core.stages import UserError, stage
from pipeline.data import downloads, links, shards
from pipeline.mini.images import make
from pipeline.sections.download import Download
from pipeline.sections.images import LIST_PAGE, Images, Links, MiniImages, PublishedImages, check_there

MIRROR_SIZE = 512  # pixels of the shorter edge at most: how pixparse/cc3m-wds was made; nothing in its files says so


def mirror(source: Download, folder: Path) -> dict[str, Any]:
    """Fill `folder` with shards that somebody else made. Returns their counts, and where they came from."""
    record = downloads.fetch(source, folder)
    found = shards.index(folder, MIRROR_SIZE)
    others = ", ".join(f"{count} {ending}" for ending, count in found["other_files"].items()) or "none"
    print(
        f"{found['images']} images in {found['shards']} shards, {found['captioned']} of them with a caption (recipes "
        f"that read captions pass over the rest); other files in the shards, left alone: {others}"
    )
    return found | {"source": record}


def indexed(file: Path, folder: Path) -> dict[str, Any]:
    """Fill `folder` with an index of shards that stay where they are. Returns their counts, and which index it was.

    Raises UserError for a file that is missing, is no index, or does not say where its shards are.
    """
    check_there(file, "index.file")
    shards.read_index(file, "Write it anew by `python -m pipeline.tools.index`.")
    folder.mkdir(parents=True)
    shutil.copyfile(file, folder / shards.INDEX)
    found = shards.Shards(folder, cache_gb=math.inf)
    if not found.remote:
        raise UserError(f"{file} does not say where its shards are (at). Write it by `python -m pipeline.tools.index`.")
    return {
        "shards": len(found.found),
        "images": len(found),
        "bytes": sum(stated.bytes for stated in found.remote.files.values()),
        "source": {"at": found.remote.at, "sha256": downloads.digest(file)},
    }


def published(section: Links, folder: Path, scratch: Path) -> dict[str, Any]:
    """Fill `folder` with the shards of a list of links. Returns img2dataset's counts, and which list it was."""
    section.check_distributor()
    tsv = Path(section.tsv)
    table = read_links(tsv, section.rows)
    sha256 = downloads.digest(tsv)
    report = links.download(table, folder, scratch, **section.model_dump(exclude={"tsv", "rows"}))
    return report | {"source": {"list": section.tsv, "sha256": sha256}}


def read_links(tsv: Path, rows: int) -> pyarrow.Table:
    """Read a list of `rows` lines CAPTION TAB URL, without a header; nothing is quoted, and no text means "no value".

    A byte order mark is no part of the first caption.

    Raises UserError for a list that is missing, for a line of another form, and for another number of lines.
    """
    check_there(tsv, "links.tsv")
    captions, urls = [], []
    with tsv.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text, url = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n").split("\t")
            except ValueError:  # a UnicodeDecodeError is one, too
                raise UserError(
                    f"{tsv}, line {number}: found {line[:200]!r}, wanted a caption, a tab and a URL, in UTF-8. Correct "
                    f"the line, or fetch the list again from {LIST_PAGE}."
                ) from None
            captions.append(text)
            urls.append(url)
    if len(urls) != rows:
        raise UserError(
            f"{tsv}: found {len(urls)} lines, wanted images.links.rows = {rows}. If the list is complete and the one "
            f"that you mean, set rows to {len(urls)} in params.yaml; else fetch it again from {LIST_PAGE}."
        )
    return pyarrow.table({"url": urls, "caption": captions})


@stage
def main() -> None:
    profile = config.profile()
    images: MiniImages | PublishedImages = config.read(Images, f"profiles.{profile}.images")
    outputs = Path(f"data/{profile}/images"), Path(f"metrics/{profile}/images.json")
    scratch = outputs[0].with_name(".images.scratch")  # stays after a failure: links take hours
    with atomic(*outputs) as (folder, report):
        if isinstance(images, MiniImages):
            result = make(images, folder)
        elif images.kind == "shards":
            result = mirror(images.shards, folder)
        elif images.kind == "index":
            result = indexed(Path(images.index.file), folder)
        else:
            result = published(images.links, folder, scratch)
        write_json(report, result)
    remove(scratch)


if __name__ == "__main__":
    main()
