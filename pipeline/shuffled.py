"""Stage shuffled@<backbone>: a control, the tower is shown another image than the one whose restoration is its teacher.

models/<profile>/shuffled/<backbone>/          the backbone's folder with the weights that it comes to, and diva.json
metrics/<profile>/train/<backbone>-shuffled/   metrics.json and the curves of the tower phase (DVCLive)

It is the tower phase of stage `train` once more, from the same projection and denoiser, on the same images, crops and
draws; only what the tower is shown of them is another image of the step. So what it learns of details cannot be owed to
feedback.
"""

import sys
from pathlib import Path

from pipeline.core import params
from pipeline.core.stages import stage
from pipeline.engine import assemble


@stage
def main() -> None:
    assemble.start_on_every_gpu("pipeline.shuffled")
    p, name = params.load(), sys.argv[1]
    own, fitted = p.backbones[name].condition, Path("models", p.run.profile, "diva", name, assemble.FITTED)
    assemble.post_train(p.run.profile, name, "shuffled", p.profile.train, p.profile.recipe, own, p.seed, fitted)


if __name__ == "__main__":
    main()
