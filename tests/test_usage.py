"""What a stage or tool says that is started without its arguments, with too many, or with names that there are not."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
from shrunk import ROOT

FILES = [file for folder in ("pipeline", "pipeline/tools") for file in sorted((ROOT / folder).glob("*.py"))]
MODULES = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in FILES if "\n@stage\n" in f.read_text()]
ARGUMENTS = {  # the others run without any
    **dict.fromkeys(("pipeline.mmvp", "pipeline.zeroshot", "pipeline.export"), "backbone weights"),
    **dict.fromkeys(("pipeline.segmentation", "pipeline.mllm"), "backbone weights"),
    **dict.fromkeys(("pipeline.train", "pipeline.shuffled", "pipeline.drift"), "backbone recipe"),
    "pipeline.backbone": "backbone",
    "pipeline.encoder": "recipe",
    "pipeline.checkpoint": "backbone checkpoint",
    "pipeline.tools.index": "--at ADDRESS --size SIZE",
    "pipeline.tools.look": "backbone image image statement statement",
    "pipeline.tools.oracle": "backbone [benchmarks ...]",
    "pipeline.tools.sensitivity": "backbone recipe",
    "pipeline.tools.sweep": "--seeds SEEDS",
}
ABSENT = {  # a command of each that names what there is not, and the word that it names
    **{f"pipeline.{stage}": (["mini", "nothing"], "nothing") for stage in ("train", "shuffled")},
    "pipeline.checkpoint": (["openai_224", "nothing"], "nothing"),
    **{f"pipeline.{stage}": (["nothing", "diva"], "nothing") for stage in ("mmvp", "drift", "backbone")},
    **{f"pipeline.{stage}": (["mini", "nothing"], "nothing") for stage in ("zeroshot", "segmentation", "mllm")},
    "pipeline.backbone": (["nothing"], "nothing"),
    "pipeline.encoder": (["nothing"], "nothing"),
    "pipeline.export": (["mini", "nothing"], "nothing"),
    "pipeline.report": (["--compare", "nothing"], "nothing"),
    "pipeline.tools.bench": (["nothing"], "nothing"),
    "pipeline.tools.index": (["nothing", "--at", "s3://bucket", "--size", "512"], "nothing"),
    "pipeline.tools.look": (["mini", "nothing.jpg", "nothing.jpg", "a", "b"], "nothing.jpg"),
    "pipeline.tools.oracle": (["nothing"], "nothing"),
    "pipeline.tools.reference": (["nothing"], "mini.json"),
    "pipeline.tools.sensitivity": (["mini", "nothing"], "nothing"),
    "pipeline.tools.sweep": (["--seeds", "nothing"], "nothing"),
}


def said(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """What `python -m <module> <arguments>` says before it ends with a status other than 0."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert ended.value.code in (1, 2)
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that holds params.yaml alone, and a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("module", MODULES)
def test_wrong_arguments_end_with_the_usage(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = f"usage: python -m {module} [-h]"
    wrong = [["--nothing"], *([[]] if module in ARGUMENTS else [])]
    for arguments in wrong:
        text = said(module, arguments, monkeypatch, capsys)
        assert text.startswith(usage)
        assert text.splitlines()[-1].startswith(f"python -m {module}: error: ")
        assert len(text.splitlines()) == 2
        assert ARGUMENTS.get(module, "") in text.splitlines()[0]


@pytest.mark.parametrize("module", ABSENT)
def test_an_unknown_name_ends_with_a_message(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments, word = ABSENT[module]
    text = said(module, arguments, monkeypatch, capsys)
    assert "error: " in text
    assert word in text
