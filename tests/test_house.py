"""Who may import whom, and whether dvc.yaml, params.yaml, the lock and the Makefile tell all of it."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache, reduce
from pathlib import Path
from typing import get_args

import pytest
import yaml

from pipeline.core import code
from pipeline.core.compute import PURPOSES
from pipeline.evidence import provenance
from pipeline.sections.run import Downstream

ROOT = Path(__file__).parents[1]
WANTED = yaml.load((ROOT / "dvc.yaml").read_text(), yaml.CSafeLoader)[
    "stages"
]  # by people; the others run where these need them
DVC = WANTED | yaml.load((ROOT / "pipeline" / "dvc.yaml").read_text(), yaml.CSafeLoader)["stages"]
PARAMS = yaml.load((ROOT / "params.yaml").read_text(), yaml.CSafeLoader)
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "pipeline").rglob("*.py") if path.stat().st_size)
TOOLS = {
    "clip", "clip_benchmark", "diffusers", "img2dataset", "open_clip", "sklearn", "timm", "tokenizers", "transformers",
}  # fmt: skip
# Stages whose bytes torch makes.
COMPUTE = {"train", "control", "export"}  # and scorings, of which the planned file has it
BUILDERS = {  # who builds small models of these packages' classes, beside the adapters
    "pipeline/mini/denoiser.py": {"diffusers"},
    "pipeline/mini/pretrain.py": {"diffusers", "open_clip", "tokenizers", "transformers"},
    "pipeline/engine/trial.py": {"diffusers"},
    "pipeline/tools/true_size.py": {"transformers"},
}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def module(file: Path) -> str:
    return ".".join(file.with_suffix("").parts)


def defines_main(file: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree(file).body)


DOWNSTREAM = get_args(Downstream)  # which no default run scores
RUNS = {  # the stages of dvc.yaml by the files in pipeline/ that they run
    **{stage: [stage] for stage in ("plan", "mmvp_vlm", "zeroshot_sets")},
    **{stage: [stage] for stage in ("encoder", "backbone", "train", "report")},
    **{f"score{of}": ["mmvp", "zeroshot", *DOWNSTREAM] for of in ("", "-checkpoints", "-recipes", "-controls")},
    **{f"export{of}": ["export"] for of in ("", "-checkpoints", "-recipes")},
    "input": ["images", "denoiser"],
    "benchmark_sets": [f"{name}_sets" for name in DOWNSTREAM],
    "checkpoint": ["checkpoint"],
    "control": ["shuffled", "drift"],
}
FETCH = {
    "images", "denoiser", "encoder", "mmvp_vlm", "zeroshot_sets", "segmentation_sets", "mllm_sets", "backbone",
    "checkpoint",
}  # fmt: skip
STAGES = [file for file in FILES if file.parent == Path("pipeline") and defines_main(file)]


@cache
def imports(file: Path) -> frozenset[str]:
    """Full names of the modules that a file imports, inside its functions too."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    ours = {module(f) for f in FILES}  # `from pipeline.x import y` imports the module x.y, or y of the module x
    return frozenset(
        name if name in ours or not name.startswith("pipeline.") else name.rpartition(".")[0] for name in found
    )


def of_house(file: Path) -> set[str]:
    return {name for name in imports(file) if name.split(".")[0] == "pipeline"}


def packages(file: Path) -> set[str]:
    """Top-level names of what a file imports from elsewhere."""
    return {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names) - {"pipeline"}


def may_import(file: Path, name: str) -> bool:
    """Downwards only: tools and stages, mini, benchmarks, engine and evidence, models, data and diva, core."""
    if name == "pipeline":  # its pins
        return True
    room, target = file.parts[1], name.split(".")[1]
    rooms = {
        "core": {"core"},
        "diva": {"diva"},
        "sections": {"core", "diva", "sections"},
        "data": {"core", "sections", "data"},
        "models": {"core", "sections", "data", "models"},
        "benchmarks": {"core", "sections", "data", "diva", "models", "engine", "benchmarks"},
        "mini": {"core", "sections", "data", "diva", "models", "benchmarks", "mini"},
        "evidence": {"core", "sections", "evidence"},
        "engine": {"core", "sections", "data", "diva", "models", "engine"},
    }
    stage = {*rooms}
    rooms["tools"] = {*stage, "tools"}
    rooms["shuffled.py"] = {*stage, "train"}  # a control, which is that stage on other images
    return target in rooms.get(room, stage)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down(file: Path) -> None:
    assert [name for name in of_house(file) if not may_import(file, name)] == []


def test_every_file_at_the_top_is_a_stage() -> None:
    assert RUNS.keys() == DVC.keys()
    files = {file for files in RUNS.values() for file in files}
    assert {file.stem for file in FILES if file.parent == Path("pipeline")} == {*files, "__init__"}
    assert {file.stem for file in STAGES} == files


def test_the_method_needs_torch_alone() -> None:
    diva = [file for file in FILES if file.parts[1] == "diva"]
    assert diva
    assert set().union(*map(packages, diva)) == {"torch"}


def test_packages_enter_through_models_data_and_benchmarks() -> None:
    found = {
        str(file): packages(file) & TOOLS for file in FILES if file.parts[1] not in ("models", "data", "benchmarks")
    }
    assert {file: names for file, names in found.items() if names} == BUILDERS
    assert set().union(*(packages(file) for file in FILES)) >= TOOLS  # each is used: the list is not out of date


def test_no_two_classes_share_a_name() -> None:
    """Nor two type aliases."""
    found = [node.name for file in FILES for node in ast.walk(tree(file)) if isinstance(node, ast.ClassDef)]
    given = [node.targets[0] for file in FILES for node in tree(file).body if isinstance(node, ast.Assign)]
    found += [
        name.id for name in given if isinstance(name, ast.Name) and not name.id.isupper() and name.id[0].isupper()
    ]
    assert not [name for name, count in Counter(found).items() if count > 1]


def test_every_purpose_of_a_draw_is_in_the_list_and_used() -> None:
    """Of calls with a word in them; `generator` refuses others at run time. The mini world's images have their own."""
    words, study = set(), Path("metrics/recipes/experiment.py")
    for file in {*FILES, study} - {Path("pipeline/core/compute.py")}:
        for call in (node for node in ast.walk(tree(file)) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in ("generator", "seeded", "_permutation"):
                found = [each.value for each in call.args if isinstance(each, ast.Constant)]
                words |= {next((each for each in found if isinstance(each, str)), "")} - {""}
    by_loop = {"images", "spare images"}  # of a window of shards
    assert words | by_loop | {"test"} == PURPOSES.keys()


@pytest.mark.slow
def test_the_stages_that_fetch_or_draw_images_start_without_torch() -> None:
    """It takes a second, and what is built on it several."""
    names = ("encoder", "images", "mllm_sets", "mmvp_vlm", "plan", "segmentation_sets", "zeroshot_sets")
    light = f"import {', '.join(f'pipeline.{name}' for name in names)}, sys"
    subprocess.run([sys.executable, "-c", f"{light}; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_text_files_are_utf8_whatever_the_locale(file: Path) -> None:
    """Every call that could open a text file says so; tarfile's, PIL's and os.open, and binary modes, cannot."""
    calls = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
    names = {"read_text", "write_text", "open", "fdopen", "TextIOWrapper", "NamedTemporaryFile", "TemporaryFile"}
    for call in calls:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name not in names or ast.unparse(call.func) in ("Image.open", "tarfile.open", "os.open", "shards.open"):
            continue
        binary = any(isinstance(a, ast.Constant) and a.value in ("rb", "wb", "ab", "r+b") for a in call.args)
        encodings = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "encoding"]
        assert binary or encodings in (["'utf-8'"], ["'utf-8-sig'"]), f"{file}:{call.lineno}: {ast.unparse(call)}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_images_are_opened_in_named_formats_alone(file: Path) -> None:
    """Else Pillow goes by the content, and hands PostScript over to another program."""
    calls = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
    for call in calls:
        if ast.unparse(call.func) == "Image.open" and file.name != "figures.py":  # which reads figures made here
            assert "formats" in [keyword.arg for keyword in call.keywords], f"{file}:{call.lineno}"


# dvc.yaml


def closure(file: Path) -> set[str]:
    """The files of pipeline/ that a file needs, itself included."""
    found, ahead = set(), {file}
    while ahead:
        found |= (new := ahead - found)
        ahead = {Path(*name.split(".")).with_suffix(".py") for f in new for name in of_house(f) - {"pipeline"}} - found
    return {str(f) for f in found} | {"pipeline/__init__.py"}  # which Python runs before any other


@pytest.mark.parametrize("stage", DVC)
def test_dependencies_are_the_import_closure(stage: str) -> None:
    """Of what is fetched or scored, nothing but a planned file; plan, which hashes code for them, depends on that."""
    deps = [dep for dep in DVC[stage]["deps"] if dep.startswith("pipeline/")]
    code, runs = [dep for dep in deps if dep.endswith(".py")], RUNS[stage]
    if FETCH.issuperset(runs) or stage.startswith("score"):
        assert deps == []
        assert sum("/planned/" in dep for dep in DVC[stage]["deps"]) == 1
        return
    if stage == "plan":
        runs = [*runs, *(FETCH - {"checkpoint"}), *RUNS["score"]]
    assert len(code) == len(set(code))
    assert set(code) == set().union(*(closure(Path("pipeline", f"{file}.py")) for file in runs))
    assert all((ROOT / dep).is_file() for dep in deps)


@pytest.mark.parametrize("file", STAGES, ids=str)
def test_a_program_is_the_import_closure(file: Path) -> None:
    assert {f"pipeline/{found}" for found in code.sources(file.name)} == closure(file)


def test_every_stage_before_the_report_decides_gains() -> None:
    after = {
        "plan",
        "checkpoint",
        "report",
        "export",
        *DOWNSTREAM,
        *(f"{name}_sets" for name in DOWNSTREAM),
    }  # or aside
    stages = {file.stem for file in STAGES}
    assert set(provenance.DECIDE) == {f"{stage}.py" for stage in stages - after} | {"evidence/results.py"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("diva/losses.py", "import torch\n", "import torch  # which it needs\n\n\n", True),
        ("engine/assemble.py", '"""Post-training', '"""The post-training', True),
        ("engine/curves.py", "len(tower) // 10", "len(tower) // 20", False),
        ("diva/diffusion.py", "\n\ndef ", "\n\nNEW = 1\n\n\ndef ", False),
        ("report.py", "import argparse", "import argparse, json", True),
    ],
)
def test_a_comment_makes_no_other_program(file: str, old: str, new: str, same: bool, tmp_path: Path) -> None:
    copy = tmp_path / "pipeline"
    shutil.copytree(ROOT / "pipeline", copy)
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location("copied", copy / "core" / "code.py")
    assert spec
    assert spec.loader
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert (copied.program("train.py") == code.program("train.py")) == same


def test_files_that_are_no_code_are_dependencies_of_their_stage() -> None:
    texts = {str(path.relative_to(ROOT)) for path in (ROOT / "pipeline").rglob("*.jinja")}
    assert texts == {dep for stage in DVC.values() for dep in stage["deps"] if dep.endswith(".jinja")}


@pytest.mark.parametrize("stage", DVC)
def test_a_stage_runs_its_own_file(stage: str) -> None:
    command, matrix = DVC[stage]["cmd"].split(), DVC[stage].get("matrix", {})
    offline = ["HF_HUB_OFFLINE=1"] if not FETCH.issuperset(RUNS[stage]) and matrix else []
    module, *arguments = command[6 if offline else 5 :]
    assert command[: 6 if offline else 5] == ["exec", "env", "STARTED_BY=$PPID", *offline, "python", "-m"]
    axis = {"input", "control"} & {stage} or {"benchmark"} & {*matrix}
    suffix = "_sets" if stage == "benchmark_sets" else ""
    assert module == (f"pipeline.${{item.{next(iter(axis))}}}{suffix}" if axis else f"pipeline.{RUNS[stage][0]}")
    assert set(re.findall(r"item\.(\w+)", " ".join(arguments))) == matrix.keys() - axis
    assert ("wdir" in DVC[stage]) == (stage not in WANTED)
    pretrained = {"weights": ["pretrained"]} if stage in ("score", "export") else {}
    lists = {name: values for name, values in matrix.items() if name not in pretrained}
    assert matrix == lists | pretrained
    assert all(re.fullmatch(r"\$\{run\.\w+s\}", values) for values in lists.values())


@pytest.mark.parametrize("stage", DVC)
@pytest.mark.parametrize("backbone", PARAMS["backbones"])
def test_declared_params_exist(stage: str, backbone: str) -> None:
    for declared in DVC[stage].get("params", []):
        profile = PARAMS["backbones"][backbone]["profile"]
        key = declared.replace("${run.profile}", profile).replace("${item.backbone}", backbone)
        key = key.replace("${item.recipe}", "diva")
        assert "$" not in key
        reduce(dict.__getitem__, key.split("."), PARAMS)


@pytest.mark.parametrize("stage", DVC)
def test_what_computes_depends_on_its_threads(stage: str) -> None:
    """Which pipeline/__init__.py takes. Of what a stage itself takes, noting.py tells wherever a test runs it."""
    wanted = stage.partition("-")[0] in COMPUTE
    assert ("profiles.${run.profile}.threads" in DVC[stage].get("params", [])) == wanted


@pytest.mark.parametrize("stage", DVC)
def test_a_new_profile_needs_no_file_that_no_stage_makes(stage: str) -> None:
    """A dependency that bears the profile's name is an output of some stage, or the folder of such outputs."""
    kinds = [out for each in DVC.values() for kind in ("outs", "metrics", "plots") for out in each.get(kind, [])]
    outs = [next(iter(out)) if isinstance(out, dict) else out for out in kinds]
    for dep in (dep for dep in DVC[stage]["deps"] if "${run.profile}" in dep):
        named = [zip(dep.split("/"), out.split("/"), strict=False) for out in outs]
        assert any(all(a == b or "${item." in a + b for a, b in parts) for parts in named), dep


# The lock and the Makefile


@pytest.mark.parametrize("repository", [False, True])
def test_make_says_that_git_is_needed_before_it_installs(repository: bool, tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    if repository:
        (tmp_path / ".git").mkdir()
    (tmp_path / "python").write_text("#!/bin/sh\necho would install; exit 1\n", encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment |= {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    done = subprocess.run(
        ["make", "repro", "PYTHON=./python"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert ("No git repository here" in done.stdout) != repository
    assert ("would install" in done.stdout) == repository


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_pins_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lines = (ROOT / "requirements.lock").read_text().split("\n")
    pinned = [re.fullmatch(r"([A-Za-z0-9][\w.-]*)==[\w.]+", line) for line in lines if line and line[0] != "#"]
    assert all(pinned), [line for line, match in zip(lines, pinned, strict=False) if not match]  # no URL, path, option
    names = [canonical(match[1]) for match in pinned if match]
    assert len(names) == len(set(names))
    assert {canonical(re.split(r"[<>=\[]", requirement)[0]) for requirement in direct} <= set(names)


def test_every_fault_of_the_list_can_be_made() -> None:
    """tests/mutate.py makes them; an edit of the code must not leave a fault that is nowhere."""
    for fault in yaml.load((ROOT / "tests/mutations.yaml").read_text(), yaml.CSafeLoader):
        assert (ROOT / fault["file"]).read_text().count(fault["old"]) == 1, fault["broken"]
        assert all((ROOT / test.split("::")[0]).is_file() for test in fault["tests"]), fault["broken"]
