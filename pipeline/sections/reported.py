"""What the report reads of params.yaml."""

from pipeline.core import config
from pipeline.core.config import Name, PositiveFloat, Section, Seed
from pipeline.sections.backbone import BackboneEntry
from pipeline.sections.run import Run

ModelFigures = dict[str, dict[str, tuple[PositiveFloat, PositiveFloat]]]  # by model and test: original encoder, tuned


class Reported(Section):
    seed: Seed
    run: Run
    published_downstream: dict[Name, ModelFigures]
    backbones: dict[Name, BackboneEntry]


def load() -> Reported:
    """Raises UserError naming every key that is wrong, what was found and what is wanted."""
    return Reported(
        seed=config.read(Seed, "seed"),
        run=config.read(Run, "run"),
        published_downstream=config.read(dict[Name, ModelFigures], "published_downstream"),
        backbones=config.read(dict[Name, BackboneEntry], "backbones"),
    )
