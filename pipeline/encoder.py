"""Stage encoder@<recipe>: the frozen image encoder that the recipe's losses read, in timm's format on the hub.

data/<profile>/encoder/<recipe>/            config.json and model.safetensors; or none.json alone, where they read none
metrics/<profile>/encoder/<recipe>.json     parameters; its source or, if it was trained here, losses, and how often a
                                            linear classifier on its embedding is right, by attribute, on other images

Every recipe has a folder of its own, because a dependency of DVC cannot be optional.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.core import config
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, stage
from pipeline.data import downloads
from pipeline.sections.encoder import NO_ENCODER, EncoderSource, MiniEncoder, PublishedEncoder


def found(folder: Path, section: MiniEncoder | PublishedEncoder, key: str) -> dict[str, Any]:
    """The encoder's architecture and sizes. Raises UserError for one that cannot be loaded, or is none of `key`'s."""
    from pipeline.models.frozen_encoder import FrozenEncoder

    encoder = FrozenEncoder.load(folder)
    if encoder.architecture != section.architecture:
        raise UserError(
            f"the encoder is a {encoder.architecture}, but {key}.architecture is {section.architecture}, by which "
            "stage plan tried the GPU's memory. Correct it in params.yaml."
        )
    return {"parameters": sum(q.numel() for q in encoder.parameters())}


@stage
def main(recipe: str) -> None:
    profile = config.profile()
    planned = Path("data", profile, "planned", f"encoder-{recipe}.json")
    if not planned.is_file():
        raise UserError(
            f"{planned}: no such file. Stage plan writes it for every name in run.recipes: add '{recipe}' there, and "
            "run `dvc repro`."
        )
    outputs = Path("data", profile, "encoder", recipe), Path("metrics", profile, "encoder", f"{recipe}.json")
    with atomic(*outputs) as (folder, metrics_file):
        folder.mkdir()
        if json.loads(planned.read_text(encoding="utf-8")) == NO_ENCODER:
            write_json(folder / "none.json", NO_ENCODER)
            write_json(metrics_file, NO_ENCODER)
            return
        key = f"profiles.{profile}.encoder"
        section: MiniEncoder | PublishedEncoder = config.read(EncoderSource, key)
        if isinstance(section, MiniEncoder):
            from pipeline.mini.encoder import make  # not above: most recipes read none, and need not wait for torch

            metrics = make(section, folder)
        else:
            metrics = {"origin": downloads.fetch(section.download, folder)}
        write_json(metrics_file, found(folder, section, key) | metrics)


if __name__ == "__main__":
    main()
