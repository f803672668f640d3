"""Training and scoring in processes that a server of forks starts within a tenth of a second, its imports done."""

import gc
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pipeline.train", "pipeline.shuffled", "pipeline.zeroshot"])


def start(folder: Path, world: int = 1, stage: str = "train", others: Path | None = None) -> list[BaseProcess]:
    """Start a training or scoring of `mini` in `folder`, as torchrun would with `world` processes on one machine.

    others: where all but the first work, as if on another host, whose clock is three hours ahead.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        torchrun = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        where = others if others and rank else folder
        ahead = 3 * 3600 if others and rank else 0
        arguments = where, stage, torchrun if world > 1 else {}, rank, ahead
        process = FORKS.Process(target=_stage, args=arguments, daemon=True)
        process.start()
        started.append(process)
    return started


def finish(folder: Path, world: int = 1, stage: str = "train", others: Path | None = None) -> str:
    """Run it to the end; returns what the first process printed."""
    processes = start(folder, world, stage, others)
    join(processes)
    output = (folder / "output0").read_text()
    assert [process.exitcode for process in processes] == [0] * world, output
    return output


def join(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(600)
        assert process.exitcode is not None, "it hangs"


def _stage(folder: Path, stage: str, environment: dict[str, object], rank: int, ahead: float) -> None:
    from pipeline import shuffled, train, zeroshot
    from pipeline.sections import params

    with (folder / f"output{rank}").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ |= {"CUDA_VISIBLE_DEVICES": ""} | {name: str(value) for name, value in environment.items()}
        os.chdir(folder)
        gc.freeze()  # see conftest.py
        own = {name: getattr(time, name) for name in ("time", "monotonic")}
        for name, clock in own.items():
            setattr(time, name, lambda clock=clock: clock() + ahead)
        sys.argv = [stage, "mini", *params.load().run.recipes]
        {"train": train, "shuffled": shuffled, "zeroshot": zeroshot}[stage].main()
