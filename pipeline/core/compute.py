"""The device to compute on, and generators named by their purpose."""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline import PINS

# What every random draw is for, by the first word of its purpose. Others are of numpy: the images of the mini world
# (mini/world.py), the bootstraps of evidence/statistics.py and made-up inputs of tools, all with fixed seeds.
PURPOSES = {
    "shards": "the order of the shards in an epoch",
    "images": "the order of the images in a window of shards",
    "spare images": "the images that stand in for those that cannot be decoded",
    "crop": "the crop of an image of a step",
    "view": "its second crop, for losses that compare two",
    "mismatched": "which other image of the step the tower sees in the mismatched-image control",
    "draw": "timestep, noise and token positions of an image, for each draw of a step",
    "validation": "crops and draws of the validation loss, the same in every run",
    "projection": "the fresh projection's weights",
    "lora": "the fresh LoRA's weights",
    "head": "the fresh residual head's weights",
    "trial": "random weights and draws of a training that measures memory",
    "drift": "the direction of a tensor in the norm-matched control",
    "read-out": "token positions of the published pooling",
    "segmentation": "the probe's weights, and the rows that it learns from",
    "mllm": "the small LLaVA's fresh weights, and the order of its conversations",
    "mllm_sets": "which conversations of a published set are kept",
    "mini": "weights, texts and noise in the training of the mini world's models",
    "sensitivity": "positions and noise of the figure of conditioning sensitivity",
    "study": "the settings that a study of the recipes tries",
    "bench": "random weights and images of measurements",
    "test": "whatever tests draw",
}


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
    # Freeing this tensor makes glibc keep up to 62 MB of freed memory. Else it returns a step's memory after the step
    # and gets it again for the next one, page by page: 2 to 5 % of the mini training's time.
    torch.empty(31 << 20, dtype=torch.uint8)
    return torch.device("cpu")


def autocast(device, precision: str):
    """Compute in `precision` on a torch device, by autocast; "float32" leaves everything as it is."""
    import torch

    half = precision != "float32"
    return torch.autocast(device.type, getattr(torch, precision) if half else None, half)


def generator(*purpose: str | int):
    """A CPU `torch.Generator` that is a pure function of its purpose, e.g. `generator(seed, "crop", phase, step, i)`.

    CPU generators give the same numbers whatever device computes with them. Raises ValueError where the first word of
    the purpose is not in PURPOSES.
    """
    import torch

    word = next((part for part in purpose if isinstance(part, str)), None)
    if word not in PURPOSES:
        raise ValueError(f"purpose {purpose}: '{word}' is not in PURPOSES of pipeline/core/compute.py. Add it there.")
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def seeded(*purpose: str | int) -> Iterator[None]:
    """Let library code that draws from torch's global state draw as `generator(*purpose)` would."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(*purpose).initial_seed())
        yield
