"""What the report reads of params.yaml."""

from pipeline.core import config
from pipeline.core.config import Name, Section, Seed
from pipeline.sections.backbone import BackboneEntry
from pipeline.sections.run import Run


class Reported(Section):
    seed: Seed
    run: Run
    backbones: dict[Name, BackboneEntry]


def load() -> Reported:
    """Raises UserError naming every key that is wrong, what was found and what is wanted."""
    return Reported(
        seed=config.read(Seed, "seed"),
        run=config.read(Run, "run"),
        backbones=config.read(dict[Name, BackboneEntry], "backbones"),
    )
