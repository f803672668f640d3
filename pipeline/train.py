"""Stage train@<backbone>-<recipe>: post-train an image tower by a recipe, such as diffusion feedback.

models/<profile>/<recipe>/<backbone>/          the backbone's folder with the tuned weights; diva.json;
                                               fitted.safetensors, what the tower phase started from: the
                                               projection, and the denoiser where the recipe fits it
metrics/<profile>/train/<backbone>-<recipe>/   metrics.json and the curves of its phases
"""

from pipeline.core import config
from pipeline.core.stages import stage
from pipeline.engine import assemble, hosts
from pipeline.sections.launch import Launch


@stage
def main(backbone: str, recipe: str) -> None:
    hosts.start("pipeline.train", config.read(Launch, "launch"))
    assemble.post_train(backbone, recipe)


if __name__ == "__main__":
    main()
