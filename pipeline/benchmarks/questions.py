"""Questions on images: how conversations to learn from and multiple-choice tests are stored and read.

tests.json      {test: what is counted}: `pair`, two neighbours that must both be right; `image`, all of an image's
                questions must be; `question`, each for itself, of which those on one image are one sample
<split>/0.tar   KEY.png or another image, and KEY.json with a list on it. Of a test {"question": text, "options":
                [text, ...], "answer": the number of the right option, "pattern": what it asks about}; of a split
                that is learnt the same, or {"turns": [[question, answer], ...]}
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import TypeAdapter

from pipeline.benchmarks.sets import SetImage, contents
from pipeline.core.stages import UserError
from pipeline.data.decoding import UndecodableError, decode

AGAIN = "Make the set again: `dvc repro --force pipeline/dvc.yaml:benchmark_sets@mllm`."
Counted = Literal["pair", "image", "question"]


@dataclass(frozen=True)
class Choice:
    """A question of a test. image: the number of its image. pattern: what it asks about."""

    image: int
    text: str
    options: tuple[str, ...]
    answer: int
    pattern: str = ""


@dataclass(frozen=True)
class Conversation:
    """Questions on an image, each with its answer, in order. options: of a question that has some."""

    image: int
    turns: tuple[tuple[str, str], ...]
    options: tuple[str, ...] = ()


def read(folder: Path, split: str) -> tuple[list[SetImage], list[Conversation]]:
    """Images and the conversations on them. Raises UserError for a missing file and for what is no conversation."""
    images, asked = _read(folder, split)
    return images, [
        Conversation(number, tuple((q, a) for q, a in each["turns"]))
        if "turns" in each
        else Conversation(number, ((each["question"], each["options"][each["answer"]]),), tuple(each["options"]))
        for number, each in asked
    ]


def tests(folder: Path) -> dict[str, Counted]:
    """What is counted, by test. Raises UserError if the file is missing or says anything else."""
    file = folder / "tests.json"
    try:
        return TypeAdapter(dict[str, Counted]).validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} does not name the tests ({error}). {AGAIN}") from None


def read_test(folder: Path, name: str, counted: Counted) -> tuple[list[SetImage], list[Choice]]:
    """Images and the questions on them. Raises UserError for a missing file and for what is no test."""
    images, asked = _read(folder, name)
    questions = [
        Choice(number, each["question"], tuple(each["options"]), each["answer"], each.get("pattern", ""))
        for number, each in asked
    ]
    pairs = counted != "pair" or len(questions) % 2 == 0
    if not pairs or any(not q.pattern for q in questions):
        wanted = "pairs of questions" if counted == "pair" else "questions"
        raise UserError(
            f"{folder / name} has {len(questions)} questions, wanted {wanted}, each with a pattern. {AGAIN}"
        )
    return images, questions


def units(questions: Sequence[Choice], counted: Counted) -> list[list[int]]:
    """The numbers of the questions of each sample: a pair, or all on one image."""
    found: dict[int, list[int]] = {}
    for i, q in enumerate(questions):
        found.setdefault(i // 2 if counted == "pair" else q.image, []).append(i)
    return list(found.values())


def decoded(image: SetImage) -> Image.Image:
    """Raises UserError for an image that cannot be decoded."""
    try:
        return decode(image.read(), upright=False)
    except UndecodableError as error:
        raise UserError(f"{image.file.tar}: {image.key} cannot be decoded ({error}). {AGAIN}") from error


def _read(folder: Path, split: str) -> tuple[list[SetImage], list[tuple[int, dict]]]:
    """The images of a split, and what is asked about them with their numbers."""
    file = folder / split / "0.tar"
    images, asked = list[SetImage](), list[tuple[int, dict]]()
    try:
        found = contents(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no such file, or no tar ({error}). {AGAIN}") from error
    for number, (key, files) in enumerate(found.items()):
        questions = files.pop("json", None)
        if len(files) == 1:
            images.append(SetImage(key, next(iter(files.values())), None))
        try:
            for each in json.loads(questions.read()) if questions else ():
                _check(each)
                asked.append((number, each))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: {key}.json is neither a list of questions nor of turns ({error!r}). {AGAIN}"
            ) from error
    if not asked or not len({number for number, _ in asked}) == len(images) == len(found):
        raise UserError(f"{file} has {len(images)} images, but not a question on each of them. {AGAIN}")
    return images, asked


def _check(each: dict) -> None:
    """Raises ValueError, KeyError or TypeError for what is neither a question with options nor turns."""
    if "turns" in each:
        if not each["turns"] or any(len(turn) != 2 for turn in each["turns"]):
            raise ValueError(f"turns {each['turns']}")
    elif len(each["options"]) < 2 or not 0 <= each["answer"] < len(each["options"]) or not each["question"]:
        raise ValueError(f"answer {each['answer']} of {len(each['options'])} options")
