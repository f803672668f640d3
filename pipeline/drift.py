"""Stage control@<backbone>-<recipe>-drift: the norm-matched random perturbation, a control.

models/<profile>/<recipe>-drift/<backbone>/                         the backbone's folder with the moved weights
metrics/<profile>/train/<backbone>-<recipe>-drift/metrics.json      how far they were moved: the norm of the change

Each tensor gets Gaussian noise with the norm of its change in training. What this tower gains or loses is attributable
to the size of the change alone.
"""

from pathlib import Path

from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import stage
from pipeline.engine.drift import drift


@stage
def main(backbone: str, recipe: str) -> None:
    profile = config.profile()
    seed: int = config.read(config.Seed, "seed")
    models, weights = Path("models", profile), f"{recipe}-drift"
    outputs = models / weights / backbone, Path("metrics", profile, "train", f"{backbone}-{weights}")
    with atomic(*outputs) as (folder, metrics):
        distance = drift(models / "pretrained" / backbone, models / recipe / backbone, seed, folder)
        metrics.mkdir()
        write_json(metrics / "metrics.json", {"seed": seed, "norm_of_change": round(distance, 5)})


if __name__ == "__main__":
    main()
