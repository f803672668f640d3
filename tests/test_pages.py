"""The README pages: their tables are fresh, links hold, and every command and snippet is one that works."""

import copy
import dataclasses
import gc
import re
import shlex
from functools import reduce
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from dvc.repo import Repo

from pipeline.core.stages import UserError
from pipeline.diva import losses
from pipeline.sections import params
from pipeline.tools import pages

ROOT = Path(__file__).parents[1]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages.PAGES}
PARAMS = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader)
OWN = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", TEXTS[Path("models/README.md")], re.DOTALL)[0])  # a checkpoint
PROGRAM = re.compile(r"(make|python3?|pip|pytest|dvc|torchrun) ")
COMMANDS = [
    (page, shlex.split(line.strip(), comments=True))
    for page, text in TEXTS.items()
    for language, *quoted in re.findall(r"^```(\w*)\n(.*?)^```$|`([^`\n]+)`", text, re.DOTALL | re.MULTILINE)
    for line in "\n".join(quoted).splitlines()
    if not language and PROGRAM.match(line.strip())
]


def names(commands: list[tuple[Path, list[str]]]) -> list[str]:
    return [f"{page.parent}: {' '.join(words)}" for page, words in commands]


def of_program(*start: str) -> list[tuple[Path, list[str]]]:
    return [(page, words) for page, words in COMMANDS if tuple(words[: len(start)]) == start]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(TEXTS[Path("README.md")].splitlines()) <= 200


def test_every_page_is_known() -> None:
    """But for that of the golden arrays, which describes what others computed."""
    ours = [
        path
        for folder in ("pipeline", "metrics", "models", "data", "tests")
        for path in Path(folder).rglob("README.md")
    ]
    tracked = {path for path in ours if "export" not in path.parts and path.parent != Path("tests/golden")}
    assert {Path("README.md"), *tracked} == set(pages.PAGES)


# Blocks


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_the_tables_are_those_of_the_committed_metrics(page: Path) -> None:
    assert pages.filled(page) == TEXTS[page], "run `python -m pipeline.tools.pages`"


def test_every_block_is_used() -> None:
    used = [name for text in TEXTS.values() for _, name, _, _ in pages.BLOCK.findall(text)]
    assert sorted(used) == sorted(pages.BLOCKS)
    assert sum(text.count("<!-- begin: ") for text in TEXTS.values()) == len(used)  # each has its end


def test_a_stale_block_is_found_and_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    monkeypatch.setattr(pages, "PAGES", [page])
    page.write_text(
        "before\n<!-- begin: upper bound -->\n| old |\n<!-- end: upper bound -->\nafter\n", encoding="utf-8"
    )
    ((found, content),) = pages.stale().items()
    assert found == page
    assert content.startswith("before\n<!-- begin: upper bound -->\n\n| oracle upper bound | % |\n|---|---|\n| pairs, ")
    assert content.endswith("\n\n<!-- end: upper bound -->\nafter\n")
    page.write_text(content, encoding="utf-8")
    assert pages.stale() == {}
    page.write_text("<!-- begin: lower bound -->\n<!-- end: lower bound -->\n", encoding="utf-8")
    with pytest.raises(UserError, match="no block is called 'lower bound'"):
        pages.stale()


# Links


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_links_hold(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", TEXTS[page])
    assert links
    for link in (link for link in links if not link.startswith("https://")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors((target / "README.md" if target.is_dir() else target).read_text()), link


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_files_that_are_named_exist(page: Path) -> None:
    quoted = re.findall(r"`([\w./-]+\.(?:py|yaml|toml|lock|md|json|jsonl|csv|txt))`", TEXTS[page])
    made = {
        "report.html",
        "report.md",
        "report.json",
        "timings.jsonl",
        "metrics/timings.jsonl",
        "metrics/paper/images.json",
    }
    for name in set(quoted) - made:
        assert Path(name).exists() or (page.parent / name).exists() or any(Path("pipeline").rglob(name)), name


# Commands


def read(content: dict, folder: Path) -> params.Params:
    file = folder / "params.yaml"
    file.write_text(yaml.dump(content), encoding="utf-8")
    return params.load(file)


def overrides(words: list[str]) -> list[str]:
    return [value for option, value in pairwise(words) if option == "-S"]


@pytest.mark.parametrize(("page", "words"), of_program("dvc", "exp", "run"), ids=names(of_program("dvc", "exp", "run")))
def test_experiments_have_parameters_that_are_accepted(page: Path, words: list[str], tmp_path: Path) -> None:
    content = copy.deepcopy(PARAMS)
    for backbone in ("mini", "openai_224"):  # as the page says
        content["backbones"][backbone].setdefault("checkpoints", {}).update(OWN)
    for override in overrides(words):
        key, _, value = override.partition("=")
        *sections, name = key.split(".")
        section = reduce(dict.__getitem__, sections, content)
        assert name in section, f"{page}: {key}"
        section[name] = yaml.safe_load(value)
    p = read(content, tmp_path)
    target = [word for word in words[3:4] if word != "-S"]
    assert target in ([["dvc.yaml"], ["report"]] if p.run.profile == "paper" else [[]])
    if p.run.profile == "paper":  # whatever params.yaml has today, the command says all
        said = {name.removeprefix("run.").partition("=")[0] for name in overrides(words)}
        assert said >= {"profile", "backbones", "checkpoints", "recipes"}
        assert said >= ({"controls"} if p.run.recipes else {"inputs"})


@pytest.fixture(scope="module")
def stages() -> set[str]:
    """The addresses of the stages of params.yaml as committed, from the repository's root."""
    with Repo(str(ROOT)) as repo:
        return {stage.addressing for stage in repo.index.stages}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["repro", "status"])
def test_stages_that_are_named_exist(command: str, stages: set[str]) -> None:
    found = of_program("dvc", command)
    assert found
    for _, words in found:
        for name in (word for word in words[2:] if not word.startswith("-")):
            assert name in stages, words


def test_every_command_is_of_a_program_that_is_checked() -> None:
    """dvc's own commands, make's targets, the modules of this package with their options, files of tests."""
    targets = re.search(r"^\.PHONY: (.*)$", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert targets
    for _, words in COMMANDS:
        match words:
            case ["make", *asked]:
                assert set(asked) <= set(targets[1].split())
            case ["dvc", command, *rest]:
                known = {
                    "repro",
                    "status",
                    "pull",
                    "push",
                    "commit",
                    "cache dir",
                    "remote add",
                    "exp run",
                    "exp show",
                    "metrics diff",
                    "plots show",
                }
                assert command in known or f"{command} {rest[0]}" in known, words
            case ["python" | "torchrun", *_] if "-m" in words:
                module, *arguments = words[words.index("-m") + 1 :]
                source = Path(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
                options = [word for word in arguments if word.startswith("--")]
                assert all(f'"{option}"' in source for option in options), words
            case ["python", file, *_]:
                assert Path(file).is_file(), words
            case ["pytest", *arguments]:
                assert all(Path(word).is_file() for word in arguments if word.startswith("tests/")), words
            case _:
                assert words[:2] in (["python3", "-m"], ["pip", "install"]), words


def test_a_backbone_as_the_page_has_it_is_accepted(tmp_path: Path) -> None:
    (entry,) = re.findall(r"```yaml\n(.*?)```", TEXTS[Path("pipeline/README.md")], re.DOTALL)
    own = yaml.safe_load(entry)
    read(PARAMS | {"backbones": PARAMS["backbones"] | own}, tmp_path)
    assert not own.keys() & PARAMS["backbones"].keys()


def test_a_loss_as_the_page_has_it() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXTS[Path("pipeline/README.md")], re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    assert losses.known()["unit_length"] is names["UnitLength"]
    loss, pooled_BD = losses.known()["unit_length"](weight=0.1), torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(losses.Made))
    assert float(loss(losses.Made(**nothing | {"pooled_BD": pooled_BD}))) == pytest.approx(8.0)
    names.clear()
    del loss
    gc.collect()  # the class is gone for other tests
    assert "unit_length" not in losses.known()


def test_the_recipes_are_those_of_params() -> None:
    section = TEXTS[Path("README.md")].split("\n## Recipes\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert all(rows == list(PARAMS["profiles"][profile]["recipes"]) for profile in ("mini", "paper"))
