"""Stage benchmark_sets@mllm: questions on images, for benchmarks/questions.py, and a language model that learns them.

data/<profile>/mllm/tests.json, <split>/0.tar    what is learnt, and the tests
data/<profile>/mllm/language/                    a published language model
metrics/<profile>/mllm_sets.json                 images and questions of each; addresses, commits, hashes

The mini world's questions are drawn here: as in MMVP the two images of a pair differ in a detail, the question is the
same, and the options are the two values. Of the published ones, conversations in LLaVA's format are fetched by hand
(params.yaml says from where) and packed; MMVP, POPE and MME's yes/no questions come from the hub, worded as LLaVA-1.5
is asked them.
"""

import csv
import hashlib
import json
import re
import string
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pipeline.benchmarks.questions import Counted
from pipeline.benchmarks.sets import Samples, write_split
from pipeline.core import config
from pipeline.core.compute import generator
from pipeline.core.outputs import atomic, remove, write_json
from pipeline.core.stages import UserError, progress, stage
from pipeline.data import downloads
from pipeline.data.decoding import UndecodableError, decode
from pipeline.mini import sets, world
from pipeline.sections.mllm_sets import LlavaJson, MiniMllmSets, MllmSets, PublishedMllmSets

LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."


def pack(root: Path, section: PublishedMllmSets, earlier: Path) -> dict[str, Any]:
    """Fetch language model and tests, pack them with the conversations; returns where all came from.

    earlier: the folder of an earlier run, whose language model is not fetched again if it is the same. Raises UserError
    for what is missing, of another format, or cannot be decoded.
    """
    folders = {name: root / ("language" if name == "language" else f"fetched/{name}") for name in section.downloads()}
    found = downloads.fetch_all(
        {folders[name]: download for name, download in section.downloads().items()},
        {folders["language"]: earlier / "language"},
    )
    for name, test in section.tests.items():
        write_split(root, name, "questions", _packed(name, FORMATS[test.format].read(folders[name], name)))
    remove(root / "fetched")
    for name, learnt in section.learnt.items():
        write_split(root, name, "questions", _conversations(name, learnt))
    write_json(root / "tests.json", {name: FORMATS[test.format].counted for name, test in section.tests.items()})
    return {name: found[folder] for name, folder in folders.items()}


# Tests


def _packed(name: str, images: dict[str, tuple[bytes, list[dict[str, Any]]]]) -> Samples:
    """The images of a test, each with its questions."""
    for i, (where, (image, questions)) in enumerate(progress(images.items(), name, len(images))):
        yield f"{i:06d}", {_ending(image, where): image, "json": json.dumps(questions).encode()}


def _ending(image: bytes, where: str) -> str:
    """Raises UserError for an image that cannot be decoded."""
    try:
        decode(image, upright=False)
    except UndecodableError as error:
        raise UserError(f"{where} cannot be decoded ({error}). Fetch it again, or take it out.") from None
    return "png" if image.startswith(b"\x89PNG") else "jpg"


def _mmvp(folder: Path, name: str) -> dict[str, tuple[bytes, list[dict[str, Any]]]]:
    """MMVP's questions: two neighbours in its order are a pair.

    Raises UserError for a table of another format, and where a row or an image is missing or there twice.
    """
    files = list(folder.rglob("Questions.csv"))
    if len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} files Questions.csv, wanted one. {_another(name)}")
    (file,) = files
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file} is no table in UTF-8 ({error}). {_another(name)}") from None
    found = {}
    for number, row in enumerate(rows, 1):
        where = f"{file}: row {row.get('Index')}"
        try:
            before, *parts = re.split(r"\(([a-z])\)", row["Options"].strip())
            letters, options = parts[::2], [part.strip() for part in parts[1::2]]
            index, asks = int(row["Index"]), row["Question"].strip()
            answer = letters.index(row["Correct Answer"].strip().strip("()"))
            in_order = len(letters) > 1 and "".join(letters) == string.ascii_lowercase[: len(letters)]
            if before or not in_order or not all([asks, *options]):
                raise ValueError(f"'{asks}' {row['Options']}")
        except (KeyError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where} has no options (a), (b) ... with the right one, or no question ({error!r}). {_another(name)}"
            ) from None
        if index != number:
            raise UserError(f"{where} stands where the row of Index {number} should. {_another(name)}")
        images = list(folder.rglob(f"{index}.jpg"))
        if len(images) != 1:
            raise UserError(f"{where}: its image {index}.jpg is missing or there twice. {_another(name)}")
        choices = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
        text = "\n".join([asks, *choices, LETTER])
        asked = {"question": text, "options": [each[0] for each in choices], "answer": answer, "pattern": name}
        found[str(images[0])] = images[0].read_bytes(), [asked]
    if not rows or len(rows) % 2:
        raise UserError(f"{file} has {len(rows)} rows, wanted pairs. {_another(name)}")
    return found


def _yes_no(folder: Path, name: str) -> dict[str, tuple[bytes, list[dict[str, Any]]]]:
    """Questions with the answers yes and no, by category (a table without any is one), and in it by image.

    Raises UserError for what cannot be read, for another format, and for a question that an image is asked twice.
    """
    import pandas as pd  # not above: it takes a second

    found: dict[str, tuple[bytes, list[dict[str, Any]]]] = {}
    first: dict[tuple[str, ...], str] = {}  # the row of an image in a category, and of a question on it
    for file in sorted(folder.rglob("*.parquet")):
        try:
            table = pd.read_parquet(file)
        except MemoryError:  # a lack of the machine, not a fault of the file
            raise
        except Exception as error:  # pyarrow fails in several ways on damaged files
            raise UserError(f"{file} cannot be read ({type(error).__name__}: {error}). {_another(name)}") from None
        for number, row in enumerate(table.to_dict("records")):
            where = f"{file}: row {number}"
            try:
                image, answer = row["image"]["bytes"], ["yes", "no"].index(row["answer"].strip().lower())
                text = row["question"].replace("Please answer yes or no.", "").strip()
                digest = hashlib.sha256(image).hexdigest()
                pattern = row.get("category", name)
                if not text or not isinstance(pattern, str) or not pattern:
                    raise ValueError(f"question '{text}' of category {pattern!r}")
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{where} has no image, question and answer yes or no ({error!r}; columns: "
                    f"{', '.join(table)}). {_another(name)}"
                ) from None
            if (other := first.setdefault((pattern, digest, text), where)) != where:
                raise UserError(f"{where} asks what {other} of the same image asks. {_another(name)}")
            same = found.setdefault(first.setdefault((pattern, digest), where), (image, []))
            same[1].append(
                {"question": f"{text}\n{WORD}", "options": ["Yes", "No"], "answer": answer, "pattern": pattern}
            )
    if not found:
        raise UserError(f"{folder} has no questions. {_another(name)}")
    return found


class Format(NamedTuple):
    """Of a test. counted: see benchmarks/questions.py. read: of its folder and name."""

    counted: Counted
    read: Callable[[Path, str], dict[str, tuple[bytes, list[dict[str, Any]]]]]


FORMATS = {"mmvp": Format("pair", _mmvp), "pope": Format("question", _yes_no), "mme": Format("image", _yes_no)}


def _another(name: str) -> str:
    return f"Name another revision in params.yaml, mllm_sets.tests.{name}, or remove it there."


# What is learnt


def _conversations(name: str, learnt: LlavaJson) -> Samples:
    """`most` conversations with an image, drawn by the split's name. Those without one are told and left out."""
    key = f"mllm_sets.learnt.{name}"
    file, hint = Path(learnt.conversations), f"Fetch the set by hand (params.yaml, {key}, says from where)."
    if not file.is_file():
        raise UserError(f"{file}: no such file. {hint}")
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError("wanted a list of objects")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no list of conversations in LLaVA's JSON format ({error}). {hint}") from None
    chosen = [i for i, record in enumerate(records) if "image" in record]
    if not chosen:
        raise UserError(f"{file} has {len(records)} conversations, none with an image. {hint}")
    print(f"{name}: {len(records) - len(chosen)} of {len(records)} conversations have no image and are left out")
    if len(chosen) > learnt.most:
        import torch  # not above: it takes seconds

        order = torch.randperm(len(chosen), generator=generator("mllm_sets", name))[: learnt.most].sort().values
        chosen = [chosen[i] for i in order.tolist()]
    read = _images(Path(learnt.images), hint)
    for number, i in enumerate(progress(chosen, f"conversations of {name}")):
        where = f"{file}: conversation {i}"
        turns, image = _turns(records[i], where), read(records[i]["image"], where)
        contents = {_ending(image, f"{where}: {records[i]['image']}"): image}
        yield f"{number:07d}", contents | {"json": json.dumps([{"turns": turns}]).encode()}


def _turns(record: dict[str, Any], where: str) -> list[list[str]]:
    """Questions and answers in turns.

    Raises UserError for anything else, for a second image, and for one outside the folder of images.
    """
    try:
        said = record["conversations"]
        speakers, texts = [each["from"] for each in said], [each["value"].replace("<image>", "", 1) for each in said]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is not in LLaVA's JSON format ({error!r}).") from None
    fits = speakers == ["human", "gpt"] * (len(said) // 2) and speakers and isinstance(record["image"], str)
    if not fits or sum(each["value"].count("<image>") for each in said) != 1:
        raise UserError(
            f"{where} is by {', '.join(map(str, speakers)) or 'nobody'}, wanted turns of human and gpt on one <image>. "
            "Take it out."
        )
    name = PurePosixPath(record["image"])
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where} names the image '{name}', which lies outside the folder of images. Take it out.")
    return [[q.strip(), a.strip()] for q, a in zip(texts[::2], texts[1::2], strict=True)]


def _images(path: Path, hint: str) -> Callable[[str, str], bytes]:
    """A reader of images by their names, from a folder or a zip."""
    if not path.exists():
        raise UserError(f"{path}: no such folder or zip. {hint}")
    try:
        archive = zipfile.ZipFile(path) if path.is_file() else None
    except Exception as error:  # zipfile, and what decompresses for it, fail in a dozen ways on damaged files
        raise UserError(f"{path} is neither a folder nor a zip ({error!r}). {hint}") from None

    def read(name: str, where: str) -> bytes:
        try:
            return archive.read(name) if archive else (path / name).read_bytes()
        except MemoryError:  # a lack of the machine, not a fault of the file
            raise
        except Exception as error:
            raise UserError(
                f"{where}: its image {name} is not in {path}, or cannot be read ({error!r}). {hint}"
            ) from None

    return read


@stage
def main() -> None:
    profile = config.profile()
    section: MiniMllmSets | PublishedMllmSets = config.read(MllmSets, f"profiles.{profile}.mllm_sets")
    outputs = Path("data", profile, "mllm"), Path("metrics", profile, "mllm_sets.json")
    with atomic(*outputs) as (folder, report):
        if isinstance(section, MiniMllmSets):
            sets.mllm(folder, section)
            write_json(report, {"images": section.train, "pairs": section.pairs_per_pattern * len(world.PATTERNS)})
        else:
            write_json(report, {"origin": pack(folder, section, outputs[0])})


if __name__ == "__main__":
    main()
