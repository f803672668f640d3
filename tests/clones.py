"""Clones of this repository with the shrunken mini world, in which tests run the virtual environment's own `dvc`.

A clone holds copies of the files that git tracks or would track.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from shrunk import ROOT, read_yaml, run_of, write_params

LOSS_CURVE = "metrics/mini/train/mini-diva/plots/metrics/tower/loss.tsv"
LOCKS = ("dvc.lock", "pipeline/dvc.lock")
WEIGHTS = ("pretrained", "diva", "diva-shuffled", "diva-drift")
VERBS = ("status", "status --cloud", "checkout", "commit", "push", "exp save --force", "gc --workspace --force")
DVC = """
import sys
from dvc.cli import main

for command in sys.argv[1:]:
    print(f"\\nnext: {command}", flush=True)
    assert main(command.split()) == 0
"""  # one process, because DVC takes seconds to start
VIEWS = ("timings.jsonl", "report.html", "report.md")  # tell wall time, so DVC does not hash them


@dataclass
class Clone:
    root: Path
    output: str = ""  # of the `dvc repro` that filled it
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path, weights: Sequence[str] = ("pretrained", "diva")) -> "Clone":
        """The repository with the shrunken world's parameters and nothing made yet, committed."""
        listed = subprocess.check_output(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
        )
        for name in listed.split("\0"):
            if (ROOT / name).is_file() and name not in LOCKS and not re.match(r"metrics/(?!seeds/)", name):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, root / name)
        write_params(root, **run_of(list(weights)))
        clone = cls(root.resolve())
        clone.run("git", "init", "--quiet")
        clone.commit("as published")
        return clone

    def copy(self, root: Path) -> "Clone":
        shutil.copytree(self.root, root)
        return Clone(root.resolve(), self.output)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GIT_"))}
        environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SHELL": "/bin/sh",  # DVC's choice where SHELL is unset; Debian's does not step aside for the command
            "DVC_SITE_CACHE_DIR": str(self.root / ".dvc" / "tmp" / "site"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            **self.environment,
            **{f"GIT_{who}_{what}": "tests@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        }
        return subprocess.Popen(
            command, cwd=self.root, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *command: str, status: int = 0) -> str:
        """Run a command that ends with `status`; returns what it printed."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=1800)
        assert process.returncode == status, output
        return output

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)

    def use_every_verb(self, folder: Path) -> None:
        """DVC's own verbs after a run that is committed, here and in a fresh clone, with a remote in `folder`."""
        self.commit("run")
        self.run("git", "clone", "--quiet", ".", str(folder / "fresh"))
        fresh = Clone(folder / "fresh", environment=self.environment)
        for clone, verbs in ((self, ("push", "status")), (fresh, ("pull", *VERBS))):
            remote = f"remote add --default --local store {folder / 'store'}"
            outputs = clone.run(sys.executable, "-c", DVC, remote, *verbs).split("\nnext: ")
            assert [output.partition("\n")[0] for output in outputs[1:]] == [remote, *verbs]
            for verb, output in zip(verbs, outputs[2:], strict=True):
                unasked = "missing|not found|does not exist|warning: (?!this will remove all cache except)"
                assert not re.search(unasked, output, re.IGNORECASE), output
                assert verb != "status" or output.partition("\n")[2].strip() == "Data and pipelines are up to date."
            assert clone.run("git", "status", "--porcelain") == ""
        came, own = (clone.contents("data", "models", "metrics") for clone in (fresh, self))
        assert came.items() <= own.items()  # what runs before this one made lies in the folder that made it
        assert stages_run(fresh.run("dvc", "repro", "dvc.yaml")) == []

    def contents(self, *names: str) -> dict[str, bytes]:
        """The bytes of every file that stands under these names, but for timings and what is hidden."""
        files = [
            path.relative_to(self.root) for name in names for path in (self.root / name, *(self.root / name).rglob("*"))
        ]
        return {
            str(file): (self.root / file).read_bytes()
            for file in files
            if (self.root / file).is_file() and file.name not in VIEWS and not re.search(r"(^|/)\.", str(file))
        }

    def md5(self) -> dict[str, str]:
        """Of every output, as the locks have it."""
        locks = [read_yaml(self.root / name) for name in LOCKS]
        return {out["path"]: out["md5"] for lock in locks for stage in lock["stages"].values() for out in stage["outs"]}

    def processes(self) -> list[psutil.Process]:
        """Every living process that works in this clone."""
        return [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(self.root)]


def stages_run(output: str) -> list[str]:
    """Names of the stages, without the file that they stand in."""
    return re.findall(r"^Running stage '(?:.+:)?(.+)':$", output, re.MULTILINE)
