"""A linear probe: which details does an embedding hold?"""

import numpy as np
import pandas as pd
import torch

from pipeline.benchmarks.encoder import Encoder
from pipeline.benchmarks.linear import is_right
from pipeline.benchmarks.sets import BenchmarkSet, answers
from pipeline.core.stages import progress


def probe(encoder: Encoder, found: BenchmarkSet) -> pd.DataFrame:
    """Is a linear classifier on the frozen image embedding right? One row per image and attribute."""
    (train_x, train_y), (test_x, test_y) = (_embedded(encoder, found, split) for split in ("train", "test"))
    tables = [
        answers(attribute, is_right(train_x, train_y[attribute], test_x, test_y[attribute]))
        for attribute in progress(train_y, "linear probe", disable=not encoder.processes.is_main_process)
    ]
    return pd.concat(tables)


def _embedded(encoder: Encoder, found: BenchmarkSet, split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    parts = encoder.of_all([(number, images_BD.cpu()) for number, _, images_BD in encoder.images(found, split)])
    samples = found.splits[split]
    labels = {key: np.array([sample.label[key] for sample in samples]) for key in samples[0].label}
    return torch.cat(parts).double().numpy(), labels
