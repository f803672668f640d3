"""Stage train@<backbone>-<recipe>: post-train an image tower by diffusion feedback, from images alone.

models/<profile>/<recipe>/<backbone>/          the backbone's folder with the tuned weights; diva.json;
                                               fitted.safetensors, what the tower phase started from: the
                                               projection, and the denoiser where the recipe fits it
metrics/<profile>/train/<backbone>-<recipe>/   metrics.json and the curves of both phases (DVCLive)
"""

import sys

from pipeline.core import params
from pipeline.core.stages import stage
from pipeline.engine import assemble, hosts


@stage
def main() -> None:
    p, (name, recipe) = params.load(), sys.argv[1:3]
    hosts.start("pipeline.train", p.launch)
    own, chosen = p.backbones[name].condition, p.profile.recipes[recipe]
    assemble.post_train(p.run.profile, name, recipe, p.profile.train, chosen, own, p.seed)


if __name__ == "__main__":
    main()
