"""Section `launch`: who starts the processes of a training."""

from pipeline.core.config import Count, PositiveFloat, Section


class Launch(Section):
    """How the processes of a training are started (engine/hosts.py). No result and no stage depends on it.

    train: the command in the place of `python`. processes: how many it starts on all hosts together. cache_gb: disk
    space of each host for images of kind index, in GB.
    """

    train: str
    processes: Count
    cache_gb: PositiveFloat = 200.0
