"""Stage zeroshot@<backbone>-<weights>: what the tower can still do, and what its embedding holds.

metrics/<profile>/zeroshot/<backbone>-<weights>.json    accuracy, recall and probe accuracy in %, by set
"""

import sys
from pathlib import Path

import torch

from pipeline import params
from pipeline.adapters import benchmarks
from pipeline.adapters.backbones import Backbone
from pipeline.params import Zeroshot
from pipeline.runtime import device, stage, whole, write_json


def score(backbone: Backbone, root: Path, p: Zeroshot, compute: torch.device) -> dict[str, dict]:
    @torch.no_grad()
    def embed(images) -> torch.Tensor:
        pixels = torch.stack([backbone.preprocess(image) for image in images]).to(compute)
        return torch.nn.functional.normalize(backbone.encode_image(pixels), dim=-1)

    results: dict[str, dict] = {}
    for name, kind in benchmarks.kinds(root).items():
        if kind == "classification":
            values = {"accuracy": benchmarks.classification(backbone, root, name, p.batch, compute)}
        elif kind == "retrieval":
            values = benchmarks.retrieval(backbone, root, name, p.batch, p.recall, compute)
        else:
            values = benchmarks.probe(embed, root, name, p.batch)
        results[name] = {"kind": kind, "average": sum(values.values()) / len(values), **values}
    return {n: {k: v if k == "kind" else round(v, 3) for k, v in values.items()} for n, values in results.items()}


@stage
def main() -> None:
    p, (name, weights), compute = params.load(), sys.argv[1:3], device()
    profile = p.run.profile
    with whole(Path("metrics", profile, "zeroshot", f"{name}-{weights}.json")) as (file,):
        backbone = Backbone.load(Path("models", profile, weights, name)).to(compute)
        write_json(file, score(backbone, Path("data", profile, "zeroshot_sets"), p.profile.zeroshot, compute))


if __name__ == "__main__":
    main()
