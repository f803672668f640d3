"""Section `backbones.<backbone>.checkpoints`: tuned weights of a backbone that others made."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from pipeline.core.config import PositiveFloat, Section, Sha256
from pipeline.sections.download import Download


class LocalFiles(Section):
    """A checkpoint on this machine: a file, or a folder as transformers saves it.

    origin: where others can get it. sha256: of the file, or of the lines "NAME SHA256\\n" of its files, sorted by
    name; without it, any bytes, which is allowed below data/by_hand, where DVC sees a change.
    """

    path: str
    origin: str
    licence: str
    sha256: Sha256 | None = None


def _kind(value: Any) -> str:
    """The kind of a section of params.yaml, or of an object made from one."""
    local = "path" in value if isinstance(value, dict) else isinstance(value, LocalFiles)
    return "local" if local else "download"


class Figure(Section):
    """MMVP-VLM pairs right in %, as a checkpoint's authors state them, and the pooling rule that they scored it by."""

    pairs: PositiveFloat
    pooling: Literal["stock", "published"]


class TunedWeights(Section):
    """Tuned weights of a backbone.

    parts: which parts of the model the checkpoint replaces: all, the image tower with its projection (vision), or
    without it (vision_tower). The other parts are those of the pretrained weights.
    """

    weights: Annotated[
        Annotated[Download, Tag("download")] | Annotated[LocalFiles, Tag("local")],
        Discriminator(_kind),
    ]
    parts: Literal["all", "vision", "vision_tower"] = "all"
    published: Figure | None = None
