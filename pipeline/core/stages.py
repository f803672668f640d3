"""The wrapper of every `main()`: usage and messages instead of tracebacks, end with the parent, timings; progress bars.

Every text file is UTF-8, whatever the locale.
"""

import argparse
import errno
import functools
import inspect
import json
import locale
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import psutil
from tqdm import tqdm

from pipeline.core.processes import cpus, end_with_parent

T = TypeVar("T")


# Wall clock and memory differ between runs, so they are part of no output that DVC hashes.
TIMINGS = Path("metrics/timings.jsonl")


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(Exception):
    """An error that the user can fix: the message says what was found, where, and what to do."""


def stage(main: Callable[..., None]) -> Callable[[], None]:
    """Decorate the `main()` of a stage or tool. The result takes the command line and exits with a message, not a
    traceback: status 2 and the usage where the arguments are wrong, 1 for a UserError, a full disk or a file that may
    not be opened, 130 for Ctrl+C.

    Each parameter of `main` is an argument of the command line. `*arguments` alone takes all of them, options too.
    """

    @functools.wraps(main)
    def run() -> None:
        if main.__module__ == "__main__":
            _start_in_utf8_mode()
        end_with_parent()
        try:
            main(*_arguments(main))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except OSError as error:
            if error.errno not in (*NO_ROOM, *NOT_OURS):
                raise
            todo = "Make room there" if error.errno in NO_ROOM else "Make it readable and writable for this user"
            print(f"error: {error.filename or Path.cwd()}: {error.strerror}. {todo}, then run again.", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted: no unfinished output is left; run the same command again to continue", file=sys.stderr)
            sys.exit(130)
        note_timing({})

    return run


def _arguments(main: Callable[..., None]) -> list[str]:
    """The command line's arguments. Exits where they are too few or too many for the parameters of `main`."""
    variadic = {p.name: p.kind is p.VAR_POSITIONAL for p in inspect.signature(main).parameters.values()}
    if all(variadic.values()) and variadic:
        return sys.argv[1:]
    module, text = main.__globals__["__spec__"], main.__globals__["__doc__"]
    parser = argparse.ArgumentParser(
        prog=module and f"python -m {module.name}", description=text, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, many in variadic.items():
        parser.add_argument(name, nargs="*" if many else None)
    found = vars(parser.parse_args())
    return [argument for name, many in variadic.items() for argument in (found[name] if many else [found[name]])]


def _start_in_utf8_mode() -> None:
    """Restart this process in Python's UTF-8 mode, so that libraries read UTF-8 too, unless the locale is UTF-8."""
    if locale.getencoding().lower() != "utf-8" and not sys.flags.utf8_mode and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def note_timing(more: dict[str, Any]) -> None:
    """Add a line to the timings: the stage, its seconds so far, the machine, and `more`. Where they cannot be written,
    print why: no work is lost for want of a note."""
    seconds = time.time() - psutil.Process().create_time()  # from the start of the process: imports count
    usage = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    line = {
        "stage": os.environ.get("DVC_STAGE", " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]])).rpartition(":")[2],
        "seconds": round(seconds, 1),
        "peak_memory_mb": max(u.ru_maxrss for u in usage) // (2**20 if sys.platform == "darwin" else 2**10),
        "cores": cpus(),
        "machine": platform.machine(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **more,
    }
    try:
        TIMINGS.parent.mkdir(parents=True, exist_ok=True)
        with TIMINGS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        print(f"warning: no time was noted in {TIMINGS} ({error})", file=sys.stderr)


def progress(items: Iterable[T] | None, what: str, total: int | None = None, **options: Any) -> "tqdm[T]":
    """A bar with an ETA, which iterates `items` or is told; in a log file a line every ten seconds. `options` are
    tqdm's."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(
        items, desc=what, total=total, mininterval=interval, maxinterval=interval, dynamic_ncols=True, **options
    )
