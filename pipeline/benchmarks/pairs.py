"""MMVP-VLM's folder of image pairs."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image

from pipeline.runtime import UserError


@dataclass(frozen=True)
class Question:
    """One statement of MMVP-VLM and its image; questions 2n-1 and 2n are a pair."""

    id: int
    type: str
    statement: str
    path: Path

    def image(self) -> Image.Image:
        with Image.open(self.path) as image:
            return image.convert("RGB")


def read_mmvp_vlm(folder: Path, pairs_per_pattern: int) -> list[Question]:
    """The questions in the order of their ids. Folder names may spell spaces as underscores, as published copies do.

    Raises UserError where Questions.csv or an image is missing, or the pairs are not those that are expected.
    """
    file = folder / "Questions.csv"
    hint = "Run `dvc repro --force pipeline/dvc.yaml:mmvp_vlm`."
    if not file.is_file():
        raise UserError(f"{file}: no such file. {hint}")
    table = pd.read_csv(file)
    columns = ["Question ID", "Type", "Statement"]
    if list(table.columns) != columns:
        raise UserError(f"{file}: columns are {list(table.columns)}, wanted {columns}. {hint}")
    counts = table.groupby("Type", sort=False).size()
    if (
        len(counts) != 9
        or (counts != 2 * pairs_per_pattern).any()
        or list(table[columns[0]]) != list(range(1, len(table) + 1))
    ):
        raise UserError(
            f"{file}: {len(table)} statements ({', '.join(f'{k} {v}' for k, v in counts.items())}); wanted ids "
            f"1..{18 * pairs_per_pattern} and {2 * pairs_per_pattern} statements for each of nine types. {hint}"
        )
    folders = {path.name.replace("_", " "): path for path in folder.glob("*/*") if path.is_dir()}
    questions = []
    for number, kind, statement in table.itertuples(index=False):
        path = folders.get(kind.replace("_", " "), folder / kind) / f"{number}.jpg"
        if not path.is_file():
            raise UserError(f"{path}: no such file, but {file} names it. {hint}")
        questions.append(Question(number, kind, statement, path))
    return questions
