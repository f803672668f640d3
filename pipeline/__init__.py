"""Post-training of CLIP image encoders by diffusion feedback, as DVC stages.

Before numpy and torch are imported, importing this package pins the instruction set that their libraries use and the
number of threads. Without pins each library uses the widest instructions and all cores of the processor, and so sums in
another order on another machine; training amplifies the difference. A variable that the user has set is kept;
`core.compute.deterministic_device` prints a note about it.
"""

import os
import sys
from pathlib import Path

import yaml

if sys.platform == "win32":  # no locks of files, no `exec`, no groups of processes that end together
    sys.exit("error: this pipeline runs on Linux and macOS; on Windows, run it inside WSL, which is a Linux.")


def pins(processor: Path = Path("/proc/cpuinfo"), parameters: Path = Path("params.yaml")) -> dict[str, str]:
    """The environment variables and their values. AVX2 is what every x86-64 server processor since 2015 has.

    Without AVX2 no instruction set is pinned, because the libraries would crash. The number of threads is that of the
    profile in ./params.yaml; pipeline.core.config reports what is wrong with that file.
    """
    wanted: dict[str, str] = {}
    if processor.exists() and "avx2" in processor.read_text(encoding="utf-8").split():
        wanted |= {
            "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels
            "MKL_CBWR": "AVX2",  # torch's matrix products
            "ONEDNN_MAX_CPU_ISA": "AVX2",  # torch's convolutions
            "OPENBLAS_CORETYPE": "Haswell",  # numpy's and scipy's matrix products: OpenBLAS's name for AVX2
        }
    try:
        content = yaml.load(parameters.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        wanted["OMP_NUM_THREADS"] = str(int(content["profiles"][content["run"]["profile"]]["threads"]))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        pass
    return wanted


# A thread that waits for the others spins for some 20 microseconds, then sleeps. Spinning on, it would slow down a busy
# machine; sleeping at once, a quiet one.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
PINS = pins()
for _variable, _value in PINS.items():
    os.environ.setdefault(_variable, _value)
