"""Section `launch`: who starts the processes of a training."""

from pipeline.core.config import Count, PositiveFloat, Section


class Launch(Section):
    """Who starts the processes of a training (engine/hosts.py). No result depends on it, and no stage.

    cache_gb: of each host's disk, for images of kind index.
    """

    train: str
    processes: Count
    cache_gb: PositiveFloat = 200.0
