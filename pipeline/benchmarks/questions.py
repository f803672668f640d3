"""Multiple-choice questions on images: how a set of them is stored and read.

train/0.tar   KEY.png, and KEY.json with a list of questions on it: {"question": text, "options": [text, ...],
              "answer": the number of the right option}
test/0.tar    the same with one question an image; two neighbours are a pair, and each has its "pattern"
"""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.core.stages import UserError
from pipeline.data.decoding import UndecodableError, decode


@dataclass(frozen=True)
class Choice:
    """A question. image: the number of its image. pattern: the detail that it asks about; '' in the train split."""

    image: int
    text: str
    options: tuple[str, ...]
    answer: int
    pattern: str = ""


def read(folder: Path, split: str) -> tuple[list[Image.Image], list[Choice]]:
    """Images in RGB, and the questions on them. Raises UserError for a missing file and for a wrong question."""
    file = folder / split / "0.tar"
    again = "Make the set again: `dvc repro --force pipeline/dvc.yaml:benchmark_sets@mllm`."
    if not file.is_file():
        raise UserError(f"{file}: no such file. {again}")
    images, questions, numbers = dict[int, Image.Image](), list[Choice](), dict[str, int]()
    with tarfile.open(file) as tar:
        for member in tar:
            content, where = tar.extractfile(member).read(), f"{file}: {member.name}"  # type: ignore[union-attr]
            number = numbers.setdefault(member.name.partition(".")[0], len(numbers))
            try:
                if not member.name.endswith(".json"):
                    images[number] = decode(content, upright=False)
                    continue
                for asked in json.loads(content):
                    options = tuple(asked["options"])
                    if len(options) < 2 or not 0 <= asked["answer"] < len(options):
                        raise ValueError(f"answer {asked['answer']} of {len(options)} options")
                    pattern = asked.get("pattern", "")
                    questions.append(Choice(number, asked["question"], options, asked["answer"], pattern))
            except (ValueError, KeyError, TypeError, UndecodableError) as error:
                raise UserError(f"{where} is neither an image nor questions on one ({error!r}). {again}") from error
    if not questions or not {q.image for q in questions} == images.keys() == {*numbers.values()}:
        raise UserError(f"{file} has {len(images)} images, but not a question on each of them. {again}")
    if split == "test" and (len(questions) % 2 or any(not q.pattern for q in questions)):
        raise UserError(
            f"{file} has {len(questions)} questions, wanted pairs of questions, each with a pattern. {again}"
        )
    return [images[number] for number in sorted(images)], questions
