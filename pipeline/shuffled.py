"""Stage control@<backbone>-<recipe>-shuffled: the mismatched-image control.

The denoiser restores one image while it is conditioned on another.

models/<profile>/<recipe>-shuffled/<backbone>/         the backbone's folder with its weights, and diva.json
metrics/<profile>/train/<backbone>-<recipe>-shuffled/   metrics.json and the curves of the tower phase (DVCLive)

It repeats the tower phase of stage `train` from the same projector and denoiser, on the same images, crops and noise;
but the tower sees another image of the same step. So what it gains is not attributable to feedback about its image.
"""

import sys
from pathlib import Path

from pipeline.core import params
from pipeline.core.stages import stage
from pipeline.engine import assemble, hosts


@stage
def main() -> None:
    p, (name, recipe) = params.load(), sys.argv[1:3]
    hosts.start("pipeline.shuffled", p.launch)
    own, chosen = p.backbones[name].condition, p.profile.recipes[recipe]
    fitted = Path("models", p.run.profile, recipe, name, assemble.FITTED)
    assemble.post_train(p.run.profile, name, f"{recipe}-shuffled", p.profile.train, chosen, own, p.seed, fitted)


if __name__ == "__main__":
    main()
