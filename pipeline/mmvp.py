"""Stage score@mmvp-<backbone>-<weights>: score the image pairs under both pooling rules and in both directions.

metrics/<profile>/scores/mmvp/<backbone>-<weights>/
  scores.json    averages and patterns in %, ties, spread over evaluation draws
  pairs.csv      one row a pair and pooling rule: share of draws that were right, by MMVP's rule in both directions
                 and by the better of the two matchings; similarity_ij of statement i to image j, mean over draws
  scoring.json   version and hash of what was asked: prompt, rules, precision, the pairs' bytes
  images.csv     one row an image: the cosine between its stock embedding and the one of the pretrained weights
"""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
from torch.nn.functional import cosine_similarity

from pipeline.benchmarks import scoring
from pipeline.benchmarks.mmvp import score, tokens
from pipeline.benchmarks.pairs import PROMPT, read_mmvp_vlm
from pipeline.core import config
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import stage
from pipeline.diva.rules import PoolingRule
from pipeline.models.backbones import Backbone
from pipeline.sections.mmvp import Mmvp

VERSION = 1  # of the scoring, see benchmarks/scoring.py


@stage
def main(backbone: str, weights: str) -> None:
    profile, compute = config.profile(), deterministic_device()
    section: Mmvp = config.read(Mmvp, f"profiles.{profile}.mmvp")
    published: PoolingRule = config.read(PoolingRule, f"backbones.{backbone}.published_pooling")
    pairs: int = config.read(config.Count, f"profiles.{profile}.mmvp_vlm.pairs_per_pattern")
    with atomic(Path("metrics", profile, "scores", "mmvp", f"{backbone}-{weights}")) as (folder,):
        questions = read_mmvp_vlm(Path("data", profile, "mmvp"), pairs)
        clip = Backbone.load(Path("models", profile, weights, backbone)).to(compute)
        summary, table, pooled = score(clip, questions, published, section, compute)
        folder.mkdir()
        scoring.write(
            folder, VERSION, prompt=PROMPT, rule="p > 0.5 of a softmax over the pair, both statements",
            precision="float32", published_pooling=asdict(published), draws=section.draws, seed=section.seed,
            preprocessing=clip.preprocessing,
            pairs=scoring.content(Path("data", profile, "mmvp"), (".csv", ".jpg")),
        )  # fmt: skip
        write_json(folder / "scores.json", {"weights_sha256": clip.sha256, **summary})
        table.to_csv(folder / "pairs.csv", index=False, float_format="%.4f")
        if weights != "pretrained":
            original = Backbone.load(Path("models", profile, "pretrained", backbone)).to(compute)
            before, _ = tokens(original, questions, None, section.batch, compute)
            cosines = cosine_similarity(before.cpu().double(), pooled.double())
            ids = [question.id for question in questions]
            pd.DataFrame({"question": ids, "cosine": cosines}).to_csv(folder / "images.csv", index=False)


if __name__ == "__main__":
    main()
