"""Do the tests see a fault? Make every fault of mutations.yaml, one at a time, and run the tests against it.

    python tests/mutate.py [--all-tiers] log.jsonl

Each is made in a copy of the tracked files. First come the tests that should see it, then, where these pass, all of the
default tier (with --all-tiers the exhaustive ones, too). A test that fails without the fault as well is no proof. The
log has a line a fault; the next call with it passes over those that were caught. Exit status 1: some survived.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def copy(folder: Path) -> Path:
    """The tracked files, as they are in the workspace."""
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)  # some tests ask git for the files that are there
    return folder


def failing(folder: Path, tests: list[str], options: list[str]) -> str | None:
    """The first test that fails there, with its reason."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", *options, *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) (.+)$", ended.stdout, re.MULTILINE)
    if ended.returncode and not found:
        sys.exit(f"pytest {' '.join(tests)}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return found and found[1]


def seen(fault: dict, tests: list[str], options: list[str]) -> str | None:
    """The test that fails with the fault, and passes without."""
    with tempfile.TemporaryDirectory() as sound, tempfile.TemporaryDirectory() as spoilt:
        file = copy(Path(spoilt)) / fault["file"]
        if file.read_text().count(fault["old"]) != 1:
            sys.exit(f"{fault['file']}: not once there: {fault['old']!r}")
        file.write_text(file.read_text().replace(fault["old"], fault["new"]))
        caught = failing(Path(spoilt), tests, options)
        if caught and (also := failing(copy(Path(sound)), [caught.split(" - ")[0]], options)):
            sys.exit(f"this test fails without the fault, too: {also}")
        return caught


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all-tiers", action="store_true")
    parser.add_argument("log", type=Path)
    asked = parser.parse_args()
    lines = [json.loads(line) for line in asked.log.read_text().splitlines()] if asked.log.exists() else []
    caught, options = {line["broken"] for line in lines if line["by"]}, ["-m", ""] if asked.all_tiers else []
    faults = yaml.load((ROOT / "tests/mutations.yaml").read_text(), yaml.CSafeLoader)
    for fault in faults:
        if fault["broken"] not in caught:
            by = seen(fault, fault["tests"], options) or seen(fault, [], options)
            with asked.log.open("a") as file:
                file.write(json.dumps({"broken": fault["broken"], "by": by}) + "\n")
            print(f"{'caught' if by else 'SURVIVED'}: {fault['broken']} ({by or fault['file']})", flush=True)
            if by:
                caught.add(fault["broken"])
    print(f"{len(caught)} of {len(faults)} faults are caught")
    sys.exit(len(caught) < len(faults))


if __name__ == "__main__":
    main()
