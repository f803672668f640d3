"""What every stage shares: devices, named generators, progress, whole-or-nothing outputs, one writer at a time.

Nothing here knows the method. A stage's `main()` is decorated with `stage`, which pins determinism, turns a `UserError`
into a message and exit status 1, ties the process to its parent's life and notes time and memory in a side file.
Every text file is UTF-8, whatever the locale.
"""

import ast
import ctypes
import fcntl
import functools
import hashlib
import json
import locale
import os
import platform
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
from tqdm import tqdm

from pipeline import PINS

T = TypeVar("T")

# Wall clock and memory differ between runs, so they never stand in an output that DVC hashes.
TIMINGS = Path("metrics/timings.jsonl")


class UserError(Exception):
    """Something a user can mend: the message says what was found, where, and what to do."""


def stage(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a stage's `main()`."""

    @functools.wraps(main)
    def run() -> None:
        if main.__module__ == "__main__":
            _start_in_utf8_mode()
        _die_with_parent()
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted: nothing unfinished is left behind; run the same command again", file=sys.stderr)
            sys.exit(130)
        _note_timing()

    return run


def _start_in_utf8_mode() -> None:
    """Start this process anew with UTF-8 for what libraries read, too, unless the locale has it or this was done."""
    if locale.getencoding().lower() != "utf-8" and not sys.flags.utf8_mode and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _die_with_parent() -> None:
    """Ask Linux to kill this process when DVC dies: a killed `dvc repro` must leave no second writer behind."""
    if sys.platform == "linux" and "DVC_STAGE" in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() == 1:
            sys.exit("DVC died while this stage was starting")


def _note_timing() -> None:
    seconds = time.time() - psutil.Process().create_time()  # from the start of the process: imports count
    usage = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    line = {
        "stage": os.environ.get("DVC_STAGE", " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]])).rpartition(":")[2],
        "seconds": round(seconds, 1),
        "peak_memory_mb": max(u.ru_maxrss for u in usage) // 1024,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    TIMINGS.parent.mkdir(parents=True, exist_ok=True)
    with TIMINGS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def device():
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


def progress(items: Iterable[T], what: str, total: int | None = None, **options: Any) -> Iterator[T]:
    """Iterate with a bar and an ETA; in a log file a line every ten seconds. `options` are tqdm's."""
    interval = 0.1 if sys.stderr.isatty() else 10
    yield from tqdm(
        items, desc=what, total=total, mininterval=interval, maxinterval=interval, dynamic_ncols=True, **options
    )


@contextmanager
def whole(*outputs: Path) -> Iterator[tuple[Path, ...]]:
    """Yield temporary neighbours of `outputs`; rename them into place when the block ends well, remove them otherwise.

    What stands under an output's name is therefore always complete. Raises UserError where another process is
    already writing one of them.
    """
    partial = tuple(path.with_name(f".{path.name}.partial") for path in outputs)
    with _only_writer(outputs[0]):
        for path in partial:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(path)
        try:
            yield partial
            for path, final in zip(partial, outputs, strict=True):
                if not path.exists():
                    raise FileNotFoundError(f"{final}: the stage ended without writing it")
            for path, final in zip(partial, outputs, strict=True):
                remove(final)
                path.rename(final)
        finally:
            for path in partial:
                remove(path)


@contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Hold the lock of an output; the operating system gives it back when the process ends, however it ends."""
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{output} is being written by {file.read().strip() or 'another process'} (lock file {path}). "
                "Wait for it, or stop it, then run again."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}: {' '.join(sys.argv)}")
        file.flush()
        yield


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@functools.cache  # a process keeps the code that it started with
def program(*files: str) -> str:
    """sha256 of what these files of pipeline/, and all of pipeline/ that they import, tell Python to do.

    Comments, docstrings and layout do not count, so a better comment is no other program.
    """
    meant = {path: _meaning(tree) for path, tree in sorted(sources(*files).items())}
    return hashlib.sha256(json.dumps(meant).encode()).hexdigest()


def sources(*files: str) -> dict[str, ast.Module]:
    """These files of pipeline/ and all of pipeline/ that they import, inside their functions too, parsed."""
    package, trees, ahead = Path(__file__).parent, dict[str, ast.Module](), {"__init__.py", *files}
    while ahead:
        path = ahead.pop()
        trees[path] = ast.parse((package / path).read_bytes())
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package.name:
                module = "/".join(node.module.split(".")[1:])
                named = {f"{module}.py", *(f"{module}/{name.name}.py".lstrip("/") for name in node.names)}
                ahead |= {name for name in named if (package / name).is_file()} - trees.keys()
    return trees


def _meaning(node: Any) -> Any:
    """A syntax tree as JSON, without docstrings and empty fields, which differ between versions of Python."""
    if isinstance(node, list):
        return [_meaning(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    ):
        fields["body"] = node.body[1:]
    return [type(node).__name__, {name: _meaning(value) for name, value in fields.items() if value not in (None, [])}]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
