"""The same bytes whatever the locale: what stages and the libraries that they call read and write is UTF-8."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shrunk import METRICS, ROOT, run

from pipeline import report, zeroshot


@pytest.fixture(params=["ASCII", pytest.param("ISO-8859-1", marks=pytest.mark.exhaustive)])
def locale(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that neither has UTF-8 nor helps itself to it."""
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    if request.param != "ASCII":
        environment = {"LC_ALL": "test", "LOCPATH": str(tmp_path)}
        command = ["localedef", "-c", "-i", "en_US", "-f", request.param, str(tmp_path / "test")]
        if not shutil.which("localedef") or subprocess.run(command, capture_output=True).returncode > 1:
            pytest.skip("no localedef here, or no definition of the locale")
    said = stage("-c", "import locale; print(locale.getencoding())", **environment)
    assert said.strip() in (request.param, "ANSI_X3.4-1968")  # which is ASCII's other name
    return environment


def stage(*arguments: str, **environment: str) -> str:
    clean = {
        name: value for name, value in os.environ.items() if name[:3] != "LC_" and name not in ("LANG", "PYTHONUTF8")
    }
    clean |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.check_output([sys.executable, *arguments], env=clean, text=True, encoding="utf-8")


@pytest.mark.slow
def test_the_report_is_the_same(here: Path, locale: dict[str, str]) -> None:
    with Path("params.yaml").open("a", encoding="utf-8") as file:
        file.write("# é, → and 像\n")
    run(report)
    names = ("report.json", "evidence.json", "patterns.csv", "report.html")
    written = [(METRICS / name).read_bytes() for name in names]
    assert "é, → and 像".encode() in written[-1]
    assert "+" in stage("-m", "pipeline.report", **locale)
    assert [(METRICS / name).read_bytes() for name in names[:-1]] == written[:-1]
    assert "é, → and 像".encode() in (METRICS / "report.html").read_bytes()


@pytest.mark.exhaustive
def test_a_library_reads_the_same_class_names(here: Path, locale: dict[str, str]) -> None:
    file = Path("data/mini/zeroshot/wds/objects/classnames.txt")
    first, rest = file.read_text(encoding="utf-8").split("\n", 1)
    file.write_text(f"{first}, Übersee 像\n{rest}", encoding="utf-8")
    run(zeroshot, "mini", "pretrained")
    answers = METRICS / "scores/zeroshot/mini-pretrained/answers.parquet"
    written = answers.read_bytes()
    answers.unlink()
    stage("-m", "pipeline.zeroshot", "mini", "pretrained", **locale)
    assert answers.read_bytes() == written
