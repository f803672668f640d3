"""Work by many processes: how they are started, what must be equal on all hosts, and what they send each other.

`launch.train` and `launch.score` of params.yaml, where set, take the place of `python`: they start the processes of a
training or a scoring, on one machine or on several. The hosts share no folder: each has its own clone with the same
inputs, the first process alone reads checkpoints and writes outputs, and the others are sent what they need.
"""

import errno
import hashlib
import importlib.metadata
import itertools
import os
import platform
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from pipeline.core.compute import deterministic_device
from pipeline.core.config import PARAMS_FILE
from pipeline.core.processes import STARTED_BY, on_every_gpu
from pipeline.core.stages import UserError
from pipeline.engine.scratch import changes
from pipeline.sections.launch import Launch

T = TypeVar("T")

LAUNCHED = "LAUNCHED"  # by the launcher: the folder in which it was called, and what was asked for
PACKAGES = ("accelerate", "diffusers", "numpy", "open_clip_torch", "pillow", "safetensors", "timm", "transformers")


def start(module: str, launch: Launch, key: Literal["train", "score"] = "train") -> None:
    """Become what starts the processes of `module`: the launcher, or torchrun on a machine with several GPUs.

    Returns in the processes that it started, and where one process is all. Raises UserError for a launcher that cannot
    be called, whose port is taken, or that has started another number of processes than launch.processes.
    """
    name, launcher = f"launch.{key}", getattr(launch, key)
    if "WORLD_SIZE" in os.environ:
        if launcher and int(os.environ["WORLD_SIZE"]) != launch.processes:
            raise UserError(
                f"{name} started a group of {os.environ['WORLD_SIZE']} processes, but launch.processes is "
                f"{launch.processes}. Set launch.processes to the number of processes on all hosts together. If each "
                "host started a group of its own, the hosts did not find each other: give torchrun the same "
                "--rdzv-endpoint on all of them, and no --standalone."
            )
        return
    if LAUNCHED in os.environ:
        raise UserError(
            f"{name} started this process outside a group of processes (WORLD_SIZE is not set). It takes "
            "the place of `python`: let it end with torchrun and torchrun's options."
        )
    if launcher:
        command = shlex.split(os.path.expandvars(launcher))
        if not shutil.which(command[0]):
            raise UserError(f"{name} begins with '{command[0]}', but PATH has no such program. Correct it.")
        check_port(command, name)
        os.environ[LAUNCHED] = folder_id()
        # Hosts have their own process ids: a process is tied to the torchrun that started it, as DVC_STAGE asks for.
        os.environ.pop(STARTED_BY, None)
        os.execvp(command[0], [*command, "-m", module, *sys.argv[1:]])
    on_every_gpu(module)


def check_port(command: list[str], name: str) -> None:
    """Raise UserError if --rdzv-endpoint names a port of this host that another program uses.

    torchrun's c10d rendezvous would wait there and print nothing.
    """
    options = [word for argument in command for word in argument.split("=", 1)]
    found = [b for a, b in itertools.pairwise(options) if a.replace("_", "-") == "--rdzv-endpoint"]
    if not found:
        return
    try:
        host, port = parse_rendezvous_endpoint(found[-1], 29400)  # torchrun's own port, where none is named
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: --rdzv-endpoint is '{found[-1]}', wanted HOST:PORT with a known host ({error}). Correct it."
        ) from None
    with socket.socket(address[0]) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address[4])
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # else the address is another host's
                raise UserError(
                    f"{name}: port {port} of {host}, which --rdzv-endpoint names, is in use. Choose another port,"
                    " or end the program that uses it (`ss -ltnp` names the program)."
                ) from None


def folder_id() -> str:
    """An id of this folder: equal on hosts that share the folder over a network, different for two clones."""
    found = PARAMS_FILE.stat()
    return f"{found.st_ino}:{found.st_mtime_ns}"


def join() -> Accelerator:
    """The group of processes that this one belongs to. Raises UserError if they cannot connect to each other."""
    try:
        return Accelerator(cpu=deterministic_device().type == "cpu")
    except torch.distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the processes of this stage cannot connect to each other at {where}: {error}. If the port is in use, "
            "choose another one. If the host cannot be reached, check its name and the firewall."
        ) from error


def agreed(processes: Accelerator, make: Callable[[], tuple[T, dict[str, Any]]]) -> T:
    """The first value of make() in every process. Its second value must be equal in all of them.

    Raises UserError in all processes if make() failed in one of them or the second values differ; it names the hosts.
    """
    host, made, mark, problem = socket.gethostname(), None, None, None
    try:
        made, mark = make()
    except UserError as error:
        if processes.num_processes == 1:
            raise
        problem = str(error)
    if processes.is_main_process and os.environ.get(LAUNCHED, folder_id()) != folder_id():
        problem = (
            "rank 0, which writes the outputs, does not run in the folder in which the launcher was called, so DVC "
            "would not find them. With torchrun's c10d rendezvous, rank 0 is on the host whose name sorts first "
            "(--local-addr gives a host another name); with --rdzv-backend static it is on the host with --node-rank 0"
        )
    found = gather_object([(host, mark, problem)])
    problems = list(dict.fromkeys(f"on {host}: {problem}" for host, _, problem in found if problem))
    if not problems:
        first, of_first, _ = found[0]
        for host, mark, _ in found[1:]:
            if changed := changes(of_first, mark, "there"):
                problems.append(f"{host} differs from {first} in {', '.join(changed)}")
        problems = list(dict.fromkeys(problems))
    if problems:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(1)  # the first process of each host says why
        listed = "\n  ".join(problems)
        raise UserError(
            f"The hosts of this stage differ, or one is not ready:\n  {listed}\nAll hosts need the same commit and "
            "packages, and each needs the inputs (`dvc pull`)."
        )
    return made  # type: ignore[return-value]


def packages() -> dict[str, str]:
    """Versions of what decides the numbers, by name."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def to_all(processes: Accelerator, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The first process's tensors, on the CPU of each; the others give None. One at a time: all may fill a GPU."""
    first = tensors or {}
    (kinds,) = broadcast_object_list([{name: (tensor.shape, tensor.dtype) for name, tensor in first.items()}])
    if processes.num_processes == 1:
        return first
    found = {}
    for name, (shape, dtype) in kinds.items():
        here = first[name] if processes.is_main_process else torch.empty(shape, dtype=dtype)
        moved = here.to(processes.device).contiguous()
        torch.distributed.broadcast(moved, 0)
        found[name] = moved.cpu()
    return found


@contextmanager
def sent(processes: Accelerator, folder: Path) -> Iterator[Path]:
    """The first process's `folder` of files: itself where its files are the same, elsewhere a temporary copy."""
    files = sorted(path for path in folder.glob("*") if path.is_file()) if processes.num_processes > 1 else []
    own = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (wanted,) = broadcast_object_list([own])
    same = own == wanted
    if all(gather_object([same])):
        yield folder
        return
    first = {path.name: torch.from_numpy(np.fromfile(path, np.uint8)) for path in files if processes.is_main_process}
    received = to_all(processes, first)
    with tempfile.TemporaryDirectory() as copy:
        for name, content in received.items() if not same else ():
            content.numpy().tofile(Path(copy, name))
        yield folder if same else Path(copy)
