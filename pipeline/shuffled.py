"""Stage control@<backbone>-<recipe>-shuffled: the mismatched-image control.

The denoiser restores one image while it is conditioned on another.

models/<profile>/<recipe>-shuffled/<backbone>/         the backbone's folder with its weights, and diva.json
metrics/<profile>/train/<backbone>-<recipe>-shuffled/   metrics.json and the curves of the tower phase

It repeats the tower phase of stage `train` from the same projector and denoiser, on the same images, crops and noise;
but the tower sees another image of the same step. So what it gains is not attributable to feedback about its image.
"""

from pipeline.core import config
from pipeline.core.stages import stage
from pipeline.engine import hosts
from pipeline.sections.launch import Launch
from pipeline.train import post_train


@stage
def main(backbone: str, recipe: str) -> None:
    hosts.start("pipeline.shuffled", config.read(Launch, "launch"))
    post_train(backbone, recipe, "shuffled")


if __name__ == "__main__":
    main()
