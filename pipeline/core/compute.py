"""The device to compute on, and generators named by their purpose."""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline import PINS


def deterministic_device():
    """The torch device to compute on (the first GPU where there is one), with deterministic kernels asked for.

    On a CPU it says which of the package's pins (pipeline/__init__.py) the user's environment overrides.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would write every new tensor twice
    torch.backends.cudnn.allow_tf32 = False  # a patch embedding is a convolution: float32 means float32
    if torch.cuda.is_available():
        return torch.device("cuda")
    others = [
        f"{name}={os.environ[name]} (pinned: {value})" for name, value in PINS.items() if os.environ[name] != value
    ]
    if others:
        print(f"note: the environment sets {', '.join(others)}; figures may differ in rounding", file=sys.stderr)
    return torch.device("cpu")


def generator(*purpose: str | int):
    """A CPU `torch.Generator` that is a pure function of its purpose, e.g. `generator(seed, "noise", step, sample)`.

    CPU generators give the same numbers whatever device computes with them.
    """
    import torch

    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def seeded(*purpose: str | int) -> Iterator[None]:
    """Let library code that draws from torch's global state draw as `generator(*purpose)` would."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(*purpose).initial_seed())
        yield
