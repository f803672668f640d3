"""Compare the metrics in the working tree with those committed: equal within a tolerance, else exit status 1.

On the machine that made the committed ones they are equal to the last byte. Another processor rounds differently, and
training carries that on: scores may then differ by POINTS, losses by the share LOSS.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

POINTS, LOSS = 3.0, 0.05


def leaves(value: object, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}".strip("."))
    elif isinstance(value, int | float):
        yield key, value


def main() -> int:
    compared, wrong = 0, []
    for file, points in (("report.json", True), ("denoiser.json", False), ("train/mini-diva/metrics.json", False)):
        path = Path("metrics/mini", file)
        committed = json.loads(subprocess.check_output(["git", "show", f"HEAD:{path}"]))
        found = dict(leaves(json.loads(path.read_text(encoding="utf-8"))))
        for key, value in leaves(committed):
            compared += 1
            tolerance = POINTS if points else LOSS * abs(value)
            if abs(found.get(key, float("inf")) - value) > tolerance:
                wrong.append(f"{path} {key}: {found.get(key)} here, {value} committed, tolerance {tolerance:g}")
    print("\n".join(wrong) or f"{compared} committed figures are met ({POINTS} points, {LOSS:.0%} of a loss)")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
