"""A linear probe: which details does an embedding hold?"""

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.benchmarks.encoder import Encoder
from pipeline.benchmarks.sets import BenchmarkSet, answers
from pipeline.core.stages import progress


def probe(encoder: Encoder, found: BenchmarkSet) -> pd.DataFrame:
    """Is a linear classifier on the frozen image embedding right? One row per image and attribute."""
    (train_x, train_y), (test_x, test_y) = (_embedded(encoder, found, split) for split in ("train", "test"))
    tables = []
    for attribute in progress(train_y, "linear probe", disable=not encoder.processes.is_main_process):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky"))
        classifier.fit(train_x, train_y[attribute])
        tables.append(answers(attribute, classifier.predict(test_x) == test_y[attribute]))
    return pd.concat(tables)


def _embedded(encoder: Encoder, found: BenchmarkSet, split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    parts = encoder.of_all([(number, images_BD.cpu()) for number, _, images_BD in encoder.images(found, split)])
    samples = found.splits[split]
    labels = {key: np.array([sample.label[key] for sample in samples]) for key in samples[0].label}
    return torch.cat(parts).double().numpy(), labels
