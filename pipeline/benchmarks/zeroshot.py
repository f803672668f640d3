"""The score of zero-shot ability: classification, retrieval, and what a linear probe reads off the embedding."""

from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState

from pipeline.benchmarks.clip_sets import classification, retrieval
from pipeline.benchmarks.encoder import Encoder
from pipeline.benchmarks.probe import probe
from pipeline.benchmarks.sets import read
from pipeline.models.backbones import Backbone
from pipeline.sections.zeroshot import Zeroshot


def score(
    backbone: Backbone, root: Path, p: Zeroshot, compute: torch.device, texts: Path | None = None
) -> tuple[dict[str, dict], pd.DataFrame]:
    """(summary for the JSON file, a table of answers), the same in all processes; texts: see Encoder."""
    processes = PartialState(cpu=compute.type == "cpu")
    encoder = Encoder(backbone.to(processes.device), processes, p.batch, p.precision, texts)
    summary, tables = {}, []
    for found in read(root):
        if found.kind == "classification":
            answers = classification(encoder, found)
        elif found.kind == "retrieval":
            answers = retrieval(encoder, found, p.recall)
        else:
            answers = probe(encoder, found)
        values = 100 * answers.groupby("measure", sort=False).right.mean()
        scores = {"average": values.mean(), **values}
        summary[found.name] = {"kind": found.kind, **{key: round(float(value), 3) for key, value in scores.items()}}
        tables.append(answers.assign(set=found.name))
    return summary, pd.concat(tables, ignore_index=True)
