"""The losses of a recipe, their settings checked."""

from pathlib import Path

from pipeline.core import config
from pipeline.core.stages import UserError
from pipeline.diva import losses
from pipeline.diva.losses import Loss
from pipeline.sections.recipe import Recipe


def losses_of(key: str, recipe: Recipe, path: Path = config.PARAMS_FILE) -> list[Loss]:
    """The losses of a recipe; key: its full name in the file. Raises UserError naming file and key of what is wrong."""
    found, known = [], losses.known()
    for loss, settings in recipe.losses.items():
        if loss not in known:
            raise UserError(f"{path}:\n  {key}.losses.{loss}: unknown loss. Known: {', '.join(known)}.")
        found.append(config.checked(known[loss], settings, f"{key}.losses.{loss}", path))
    return found


def check_micro_batches(losses: list[Loss], batch: int, processes: int, micro_batch: int, key: str = "") -> None:
    """Raise UserError where a process would have no image of a step, or a micro-batch too few for a loss.

    key: of the recipe in params.yaml, with a dot behind it, where that is known.
    """
    fewest = batch // processes  # of the images of a process
    if not fewest:
        raise UserError(
            f"{processes} processes share a batch of {batch} images ({key}batch), so some would have none. Start fewer "
            "processes, or raise the batch."
        )
    for images in {fewest, -(-batch // processes)}:
        smallest = min(images, images % micro_batch or micro_batch)
        for loss in losses:
            if smallest < loss.images:
                raise UserError(
                    f"a process has {images} images of a step, in micro-batches of {micro_batch}; the smallest of "
                    f"these has {smallest}, but {key}losses.{loss.name} needs {loss.images}. Set another "
                    "train.micro_batch, start fewer processes, or choose settings of the loss that need fewer."
                )


def smaller(losses: list[Loss], batch: int, processes: int, micro_batch: int) -> int:
    """Half the size of a micro-batch, or 0 where that is not allowed."""
    half = micro_batch // 2
    try:
        check_micro_batches(losses, batch, processes, max(1, half))
    except UserError:
        return 0
    return half
