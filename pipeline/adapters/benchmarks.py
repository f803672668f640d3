"""Benchmarks: MMVP-VLM's folder; sets in clip-benchmark's wds/ layout, scored by its own functions; a linear probe."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import webdataset
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from pipeline.runtime import UserError, progress


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


def write_split(root: Path, split: str, kind: str, samples: Iterable[dict[str, Any]]) -> None:
    """Write one split as a single shard whose bytes depend on the samples alone."""
    (root / split).mkdir(parents=True)
    (root / "dataset_type.txt").write_text(kind + "\n")
    (root / split / "nshards.txt").write_text("1\n")
    with webdataset.TarWriter(str(root / split / "0.tar"), mtime=0, user="", group="") as tar:
        for sample in samples:
            tar.write(sample)


def kinds(root: Path) -> dict[str, str]:
    """The sets below `root`/wds and their kind: classification (where they do not say), retrieval or probe."""
    sets = sorted(path for path in (root / "wds").glob("*") if path.is_dir())
    if not sets:
        raise UserError(f"{root}: no sets (wds/<name>/). Run `dvc repro --force pipeline/dvc.yaml:zeroshot_sets`.")
    files = {path.name: path / "dataset_type.txt" for path in sets}
    return {name: file.read_text().strip() if file.exists() else "classification" for name, file in files.items()}


def classification(backbone, root: Path, name: str, batch: int, device: torch.device) -> pd.DataFrame:
    """Zero-shot classification: whether the first answer is right, an image a row."""
    dataset, loader = _load(backbone, root, name, "zeroshot_classification", batch)
    classifier = zeroshot_classification.zero_shot_classifier(
        backbone, backbone.tokenizer, dataset.classes, dataset.templates, device.type, amp=False
    )
    logits, labels = zeroshot_classification.run_classification(backbone, classifier, loader, device.type, amp=False)
    return _answers("accuracy", logits.argmax(1) == labels)


@torch.no_grad()
def retrieval(backbone, root: Path, name: str, batch: int, recall: int, device: torch.device) -> pd.DataFrame:
    """Retrieval in both directions: whether a right answer is among the first `recall`, a query a row.

    clip_benchmark's evaluate gives the means of just this; here each query keeps its image, because an image and its
    texts are one sample.
    """
    _, loader = _load(backbone, root, name, "zeroshot_retrieval", batch)
    images, texts, of_text = [], [], []
    for pixels, captions, numbers in progress(zeroshot_retrieval.dataloader_with_indices(loader), name):
        images.append(normalize(backbone.encode_image(pixels.to(device)), dim=-1).cpu())
        ids = backbone.tokenizer([caption for own in captions for caption in own]).to(device)
        texts.append(normalize(backbone.encode_text(ids), dim=-1).cpu())
        of_text += [number for number, own in zip(numbers.tolist(), captions, strict=True) for _ in own]
    scores = torch.cat(texts) @ torch.cat(images).T
    belongs = torch.zeros_like(scores, dtype=torch.bool)
    belongs[torch.arange(len(scores)), of_text] = True

    def found(scores: torch.Tensor, belongs: torch.Tensor) -> torch.Tensor:
        args = (zeroshot_retrieval.recall_at_k, scores, belongs, batch, device.type)
        return zeroshot_retrieval.batchify(*args, k=recall) > 0

    return pd.concat(
        [
            _answers("image_to_text", found(scores.T, belongs.T)),
            _answers("text_to_image", found(scores, belongs), of_text),
        ]
    )


def _answers(measure: str, right: torch.Tensor | np.ndarray, images: list[int] | None = None) -> pd.DataFrame:
    """A table of answers; images: the number of the image that each is about, by default its own."""
    return pd.DataFrame(
        {
            "measure": measure,
            "image": np.arange(len(right), dtype=np.int32) if images is None else np.array(images, np.int32),
            "right": np.asarray(right, dtype=bool),
        }
    )


def _load(backbone, root: Path, name: str, task: str, batch: int):
    with warnings.catch_warnings():  # clip_benchmark leaves webdataset's shard shuffling at its default, which is off
        warnings.filterwarnings("ignore", message=".*shardshuffle.*")
        dataset = build_dataset(f"wds/{name}", root=str(root / "wds" / name), transform=backbone.preprocess, task=task)
    return dataset, DataLoader(dataset.batched(batch), batch_size=None, num_workers=0)


def probe(embed: Callable[[list[Image.Image]], torch.Tensor], root: Path, name: str, batch: int) -> pd.DataFrame:
    """Whether a linear classifier reads an attribute off the frozen image embedding, a picture and attribute a row."""
    (train_x, train_y), (test_x, test_y) = (_embedded(embed, root / "wds" / name / s, batch) for s in ("train", "test"))
    answers = []
    for attribute in progress(train_y, "linear probe"):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky"))
        classifier.fit(train_x, train_y[attribute])
        answers.append(_answers(attribute, classifier.predict(test_x) == test_y[attribute]))
    return pd.concat(answers)


def _embedded(
    embed: Callable[[list[Image.Image]], torch.Tensor], split: Path, batch: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    dataset = webdataset.WebDataset(str(split / "0.tar"), shardshuffle=False).decode("pil").to_tuple("png", "json")
    samples = list(dataset)
    features = [embed([image for image, _ in samples[i : i + batch]]) for i in range(0, len(samples), batch)]
    labels = {key: np.array([attributes[key] for _, attributes in samples]) for key in samples[0][1]}
    return torch.cat(features).double().cpu().numpy(), labels
