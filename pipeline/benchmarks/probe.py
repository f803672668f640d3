"""A linear probe: which details does an embedding hold?"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import webdataset
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.benchmarks.sets import answers
from pipeline.core.stages import progress


def probe(embed: Callable[[list[Image.Image]], torch.Tensor], root: Path, name: str, batch: int) -> pd.DataFrame:
    """Whether a linear classifier on the frozen image embedding is right: one row per image and attribute."""
    (train_x, train_y), (test_x, test_y) = (_embedded(embed, root / "wds" / name / s, batch) for s in ("train", "test"))
    tables = []
    for attribute in progress(train_y, "linear probe"):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky"))
        classifier.fit(train_x, train_y[attribute])
        tables.append(answers(attribute, classifier.predict(test_x) == test_y[attribute]))
    return pd.concat(tables)


def _embedded(
    embed: Callable[[list[Image.Image]], torch.Tensor], split: Path, batch: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    dataset = webdataset.WebDataset(str(split / "0.tar"), shardshuffle=False).decode("pil").to_tuple("png", "json")
    samples = list(dataset)
    features = [embed([image for image, _ in samples[i : i + batch]]) for i in range(0, len(samples), batch)]
    labels = {key: np.array([attributes[key] for _, attributes in samples]) for key in samples[0][1]}
    return torch.cat(features).double().cpu().numpy(), labels
