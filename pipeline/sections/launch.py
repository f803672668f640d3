"""Section `launch`: who starts the processes of a training."""

from pipeline.core.config import Count, Section


class Launch(Section):
    """Who starts the processes of a training (engine/hosts.py). No result depends on it, and no stage."""

    train: str
    processes: Count
