"""Stage score@zeroshot-<backbone>-<weights>: what the tower can still do, and what its embedding holds.

metrics/<profile>/scores/zeroshot/<backbone>-<weights>/
  scores.json        accuracy, recall and probe accuracy in %, by set
  answers.parquet    what of it was right: one row an answer (set, measure, image)
"""

import sys
from pathlib import Path

import pandas as pd
import torch

from pipeline.benchmarks.clip_sets import classification, retrieval
from pipeline.benchmarks.probe import probe
from pipeline.benchmarks.sets import kinds
from pipeline.core import config
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import stage
from pipeline.models.backbones import Backbone
from pipeline.sections.zeroshot import Zeroshot


def score(backbone: Backbone, root: Path, p: Zeroshot, compute: torch.device) -> tuple[dict[str, dict], pd.DataFrame]:
    """(summary for the JSON file, a table of answers)."""

    @torch.no_grad()
    def embed(images) -> torch.Tensor:
        pixels = torch.stack([backbone.preprocess(image) for image in images]).to(compute)
        return torch.nn.functional.normalize(backbone.encode_image(pixels), dim=-1)

    summary, tables = {}, []
    for name, kind in kinds(root).items():
        if kind == "classification":
            answers = classification(backbone, root, name, p.batch, compute)
        elif kind == "retrieval":
            answers = retrieval(backbone, root, name, p.batch, p.recall, compute)
        else:
            answers = probe(embed, root, name, p.batch)
        values = 100 * answers.groupby("measure", sort=False).right.mean()
        scores = {"average": values.mean(), **values}
        summary[name] = {"kind": kind, **{key: round(float(value), 3) for key, value in scores.items()}}
        tables.append(answers.assign(set=name))
    return summary, pd.concat(tables, ignore_index=True)


@stage
def main() -> None:
    profile, (name, weights), compute = config.profile(), sys.argv[1:3], deterministic_device()
    section: Zeroshot = config.read(Zeroshot, f"profiles.{profile}.zeroshot")
    with atomic(Path("metrics", profile, "scores", "zeroshot", f"{name}-{weights}")) as (folder,):
        backbone = Backbone.load(Path("models", profile, weights, name)).to(compute)
        summary, answers = score(backbone, Path("data", profile, "zeroshot"), section, compute)
        folder.mkdir()
        write_json(folder / "scores.json", summary)
        answers.to_parquet(folder / "answers.parquet", index=False)


if __name__ == "__main__":
    main()
