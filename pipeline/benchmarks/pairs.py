"""MMVP-VLM's folder of image pairs."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image

from pipeline.core.stages import UserError
from pipeline.data.decoding import UndecodableError, decode

PROMPT = "a photo of "  # before every statement


@dataclass(frozen=True)
class Question:
    """One statement of MMVP-VLM and its image; questions 2n-1 and 2n are a pair.

    upright: follow the image's orientation tag, as viewers do; the published scoring does not.
    """

    id: int
    type: str
    statement: str
    path: Path
    upright: bool = False

    def image(self) -> Image.Image:
        """Raises UserError for a file that is no image."""
        try:
            return decode(self.path, self.upright)
        except UndecodableError as error:
            raise UserError(f"{self.path}: cannot be read as an image ({error}). Choose another file.") from error


def read_mmvp_vlm(folder: Path, pairs_per_pattern: int) -> list[Question]:
    """The questions in the order of their ids. Folder names may have underscores for spaces, as in published copies.

    Raises UserError if Questions.csv or an image is missing, or if the pairs are not the expected ones. Images are not
    decoded here, but by `Question.image`.
    """
    file = folder / "Questions.csv"
    hint = (
        "Run `dvc repro --force pipeline/dvc.yaml:mmvp_vlm`. If that does not help, name another copy in params.yaml."
    )
    if not file.is_file():
        raise UserError(f"{file}: no such file. {hint}")
    try:  # as text, every cell of it: a statement may be "None"
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:  # not UTF-8, not a table, or empty
        raise UserError(f"{file}: not a comma-separated table in UTF-8 ({error}). {hint}") from error
    columns = ["Question ID", "Type", "Statement"]
    if list(table.columns) != columns:
        raise UserError(f"{file}: columns are {list(table.columns)}, wanted {columns}. {hint}")
    counts = table.groupby("Type", sort=False).size()
    if (
        len(counts) != 9
        or (counts != 2 * pairs_per_pattern).any()
        or list(table[columns[0]]) != [str(number) for number in range(1, len(table) + 1)]
    ):
        raise UserError(
            f"{file}: {len(table)} statements ({', '.join(f'{k} {v}' for k, v in counts.items())}); wanted ids "
            f"1..{18 * pairs_per_pattern} and {2 * pairs_per_pattern} statements for each of nine types. {hint}"
        )
    folders = {path.name.replace("_", " "): path for path in folder.glob("*/*") if path.is_dir()}
    questions = []
    for number, (_, kind, statement) in enumerate(table.itertuples(index=False), 1):
        if not statement.strip():
            raise UserError(f"{file}: statement {number} is empty. {hint}")
        path = folders.get(kind.replace("_", " "), folder / kind) / f"{number}.jpg"
        if not path.is_file():
            raise UserError(f"{path}: no such file, but {file} names it. {hint}")
        questions.append(Question(number, kind, statement, path))
    return questions
