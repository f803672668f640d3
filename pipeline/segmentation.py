"""Stage score@segmentation-<backbone>-<weights>: segmentation by the patch tokens of the frozen image tower.

metrics/<profile>/scores/segmentation/<backbone>-<weights>/
  scores.json       mean IoU and pixel accuracy in %, by set and reading; a hash of the tensors that it reads
  scoring.json      version and hash of what was asked: settings, the sets' classes and templates
  pixels.parquet    one row an image and class, by set and reading: pixels that are right, predicted, labelled

Two readings: a linear probe (`probe`), and open vocabulary without training (`training_free`). The second one is
undefined for towers whose patch tokens are not in text space, such as SigLIP's.
"""

from pathlib import Path

from pipeline.benchmarks import scoring
from pipeline.benchmarks.segmentation import score
from pipeline.core import config
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import stage
from pipeline.models.backbones import Backbone
from pipeline.sections.segmentation import Segmentation

VERSION = 1  # of the scoring, see benchmarks/scoring.py


@stage
def main(backbone: str, weights: str) -> None:
    profile, compute = config.profile(), deterministic_device()
    data = Path("data", profile, "segmentation")
    section: Segmentation = config.read(Segmentation, f"profiles.{profile}.segmentation")
    with atomic(Path("metrics", profile, "scores", "segmentation", f"{backbone}-{weights}")) as (folder,):
        clip = Backbone.load(Path("models", profile, weights, backbone)).to(compute)
        scores, table = score(clip, data, section, compute)
        folder.mkdir()
        scoring.write(
            folder, VERSION, rule="mean IoU over the classes that occur", precision="float32",
            preprocessing=clip.preprocessing, sets=scoring.content(data, (".json",)), **section.model_dump(),
        )  # fmt: skip
        write_json(folder / "scores.json", scores)
        table.to_parquet(folder / "pixels.parquet", index=False)


if __name__ == "__main__":
    main()
