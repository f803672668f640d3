"""Stage train@<backbone>: post-train an image tower by diffusion feedback, from images alone.

models/<profile>/diva/<backbone>/          the backbone's folder with the tuned weights; diva.json; fitted.safetensors,
                                           what the tower phase started from: the projection, and the denoiser where
                                           the recipe fits it
metrics/<profile>/train/<backbone>-diva/   metrics.json and the curves of both phases (DVCLive)
"""

import sys

from pipeline.core import params
from pipeline.core.stages import stage
from pipeline.engine import assemble


@stage
def main() -> None:
    assemble.start_on_every_gpu("pipeline.train")
    p, name = params.load(), sys.argv[1]
    own = p.backbones[name].condition
    assemble.post_train(p.run.profile, name, "diva", p.profile.train, p.profile.recipe, own, p.seed)


if __name__ == "__main__":
    main()
