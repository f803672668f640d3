"""Section `launch`: who starts the processes of a training, and of a scoring that is shared among processes."""

from pipeline.core.config import Count, NonNegativeFloat, PositiveFloat, Section


class Launch(Section):
    """How the processes of a training and of a zero-shot scoring are started (engine/hosts.py), and how they run. No
    result and no stage depends on it.

    train, score: the command in the place of `python`. processes: how many either starts on all hosts together.
    cache_gb: disk space of each host for images of kind index, in GB. checkpoint_minutes: between two checkpoints of a
    training, and of benchmark mllm; 0: after every step.
    """

    train: str
    score: str = ""
    processes: Count
    cache_gb: PositiveFloat = 200.0
    checkpoint_minutes: NonNegativeFloat = 5.0
