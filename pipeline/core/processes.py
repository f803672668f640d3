"""A stage ends with the process that started it, so a killed `dvc repro` leaves no process that writes."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

STARTED_BY = "STARTED_BY"  # the id of the process that started this one, as dvc.yaml's commands set it


def end_with_parent(end: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGKILL)) -> None:
    """Call `end`, which must not return, within a second of the end of the process that started this one.

    That is the one of multiprocessing, or the one that DVC or STARTED_BY names, whichever process is number 1 or adopts
    orphans. Exits if the latter ended while this process started.
    """
    if process := multiprocessing.parent_process():
        wait: Callable[[], object] = process.join
    elif STARTED_BY not in os.environ and "DVC_STAGE" not in os.environ:
        return  # started by hand: it ends when its user says so
    else:
        parent = os.environ.get(STARTED_BY, str(os.getppid()))  # a shell such as fish knows no $PPID
        wait = partial(_until_adopted, parent)
        if sys.platform == "linux":  # a signal at the parent's death, also to a launcher that takes this one's place
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if str(os.getppid()) != parent:  # asked after the tie, so that no moment is unwatched
            sys.exit(f"error: process {parent}, which started this stage, ended while the stage was starting")
    threading.Thread(target=lambda: (wait(), end()), daemon=True).start()


def _until_adopted(parent: str) -> None:
    while str(os.getppid()) == parent:
        time.sleep(0.5)


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
