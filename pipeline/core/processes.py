"""A stage ends with the process that started it, so a killed `dvc repro` leaves no process that writes."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

STARTED_BY = "STARTED_BY"  # the id of the process that started this one, as dvc.yaml's commands set it


def end_with_parent() -> None:
    """End this process when the process that started it ends, if DVC or STARTED_BY names that one.

    It works whichever process is number 1 or adopts orphans. Exits if the parent ended while this process started.
    """
    if STARTED_BY not in os.environ and "DVC_STAGE" not in os.environ:
        return  # started by hand: it ends when its user says so
    parent = os.environ.get(STARTED_BY, str(os.getppid()))  # a shell such as fish knows no $PPID
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if str(os.getppid()) != parent:  # asked after the tie, so that no moment is unwatched
        sys.exit(f"error: process {parent}, which started this stage, ended while the stage was starting")


def _watch(parent: str) -> None:
    """For systems without a signal at the parent's death: kill this process within a second of it."""
    while str(os.getppid()) == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent_of_pool(end: Callable[[], None]) -> None:
    """In a process of multiprocessing: call `end`, which must not return, when its parent is gone, however it ended."""
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        end()

    threading.Thread(target=watch, daemon=True).start()


def cpus() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_every_gpu(module: str) -> None:
    """Become torchrun with a process of `module` for each GPU, unless there is one at most, or torchrun started us."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus > 1 and "WORLD_SIZE" not in os.environ:
        os.environ[STARTED_BY] = str(os.getpid())  # torchrun, which takes this process's place, starts the others
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", module, *sys.argv[1:]])
