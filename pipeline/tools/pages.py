"""The tables of the README pages, filled from the committed metrics, params.yaml and the code.

    python -m pipeline.tools.pages            write every block anew
    python -m pipeline.tools.pages --check    exit status 1 where a block is not what its source says

A block lies between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; BLOCKS says what fills it. Run it after a run
whose metrics are committed, and after a module was added or its docstring's first sentence changed.
"""

import argparse
import ast
import json
import re
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.core.outputs import atomic
from pipeline.core.stages import UserError, stage
from pipeline.evidence import downstream
from pipeline.evidence.results import COLUMNS
from pipeline.evidence.statistics import over_seeds
from pipeline.models.registry import complete
from pipeline.sections import params
from pipeline.sections.source import CheckpointSource

FOLDERS = "", "pipeline", "pipeline/mini", "pipeline/launch", "metrics", "metrics/recipes", "models", "data", "tests"
PAGES = [Path(folder, "README.md") for folder in FOLDERS]
MINI = Path("metrics/mini")
BLOCK = re.compile(r"(<!-- begin: ([\w ]+) -->\n)(.*?)(<!-- end: \2 -->)", re.DOTALL)


def text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. A block of the pages needs it: check the file out.") from None


def table(rows: Iterable[Sequence[object]]) -> str:
    """Markdown; the first row has the headings."""
    first, *rest = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([first, "|---" * (first.count("|") - 1) + "|", *rest])


def backbone_part() -> str:
    """What metrics/mini/report.md says of backbone mini."""
    return text(MINI / "report.md").split("\n## mini\n")[1].split("\n## ")[0]


def tables(markdown: str) -> str:
    """The tables of a text, each under its heading in bold."""
    found = []
    for part in re.split(r"^### ", "### \n" + markdown, flags=re.MULTILINE):
        heading, _, body = part.partition("\n")
        for is_table, lines in groupby(body.splitlines(), lambda line: line.startswith("|")):
            if is_table:
                found.append(f"**{heading}**\n\n" * bool(heading) + "\n".join(lines))
    return "\n\n".join(found)


def result() -> str:
    """The first table of the report, and what it says of each recipe."""
    first = backbone_part().partition("\n### ")[0].splitlines()
    rows = [line for line in first if line.startswith("|")]
    return "\n".join([*rows, "", *(line for line in first if line.startswith("- "))])


def timings() -> str:
    """The stages' wall time and memory as the committed report has them."""
    lines = re.findall(r"^- (\S+): ([\d,]+) s, ([\d,]+) MB, \S+$", text(MINI / "report.md"), re.MULTILINE)
    return table([("stage", "seconds", "peak memory, MB"), *((f"`{name}`", *figures) for name, *figures in lines)])


def reference() -> str:
    """The gains of the committed run, and those of the reference runs: the mean, its 95 % t interval, the spread."""
    runs = json.loads(text(Path("metrics/reference/mini.json")))["runs"]
    committed = json.loads(text(MINI / "report.json"))["mini"]
    rows: list[Sequence[object]] = [("gain, points", "committed run", f"mean of {len(runs)} runs [95 %]", "s.d.")]
    for name in (name for name in runs[0]["figures"] if name.startswith("gain")):
        values = [run["figures"][name] for run in runs]
        own = reduce(dict.__getitem__, name.split("."), committed)
        rows.append((f"`{name}`", f"{own:+.1f}", over_seeds(values).text(), f"{np.std(values, ddof=1):.1f}"))
    return table(rows)


def upper_bound() -> str:
    found = json.loads(text(MINI / "oracle" / "mini.json"))
    figures = {COLUMNS.get(name, name): value for name, value in found.items() if name != "patterns"}
    rows = [(name, f"{value:.1f}") for name, value in figures.items()]
    return table([("oracle upper bound", "%"), *rows])


def downstream_of(*files: Path) -> str:
    """Scores, gains and effects of segmentation and the small LLaVA, of files that hold them by column."""
    return table(downstream.table({name: of for file in files for name, of in json.loads(text(file)).items()}))


def denoiser() -> str:
    """Every figure of its record under its dotted name."""
    figures = pd.json_normalize(json.loads(text(MINI / "denoiser.json"))).iloc[0]
    return table([("`metrics/mini/denoiser.json`", ""), *((f"`{name}`", f"{v:g}") for name, v in figures.items())])


def sensitivity() -> str:
    """From 60 % of the timesteps on, by pattern: restored better under the right condition; the upper bound below."""
    rows: list[Sequence[object]] = []
    for file in sorted((MINI / "sensitivity").glob("mini-*.csv")):
        found = pd.read_csv(file)
        way, pattern, timestep, _, share, _ = found.columns
        late = found[found[timestep] >= 0.6 * (found[timestep].max() + found[timestep].min())]
        means = late.pivot_table(share, way, pattern)[found[pattern].unique()]
        rows = rows or [("recipe", "conditioned on", *means.columns)]
        recipe = file.stem.removeprefix("mini-")
        rows += [(f"`{recipe}`", f"`{name}`", *(f"{value:.0f}" for value in row)) for name, row in means.iterrows()]
    patterns = json.loads(text(MINI / "oracle" / "mini.json"))["patterns"]
    return table([*rows, ("", "*upper bound: pairs right*", *(f"{patterns[name]:.0f}" for name in rows[0][2:]))])


def backbones() -> str:
    """The published backbones of params.yaml."""
    p = params.load()
    later = sorted(
        {name for entry in p.backbones.values() if entry.published for name in entry.checkpoints if name != "released"}
    )
    rows: list[Sequence[object]] = [
        ("key", "weights from", "licence", "before: stock", "DIVA: published pooling", *later)
    ]
    for name, entry in p.backbones.items():
        source = complete(name, entry.source)
        if entry.published and isinstance(source, CheckpointSource):
            weights = source.weights
            origin = re.sub(r"^hf://|^https://|@.*|/clip/models/.*", "", weights.at[0])
            figures = {key: checkpoint.published for key, checkpoint in entry.checkpoints.items()}
            others = (figure.pairs if (figure := figures.get(method)) else "" for method in later)
            shown = (f"`{name}`", origin, weights.licence, entry.published.before, entry.published.after)
            rows.append((*shown, *others))
    return table(rows)


def modules(folder: Path) -> str:
    """Every module below a folder with the first sentence of its docstring."""
    rows = [("file", "what it holds")]
    files = [path for path in folder.rglob("*.py") if path.stat().st_size]
    for path in sorted(files, key=lambda path: (path.parent != folder, path.as_posix())):
        first = " ".join((ast.get_docstring(ast.parse(text(path))) or "").partition("\n\n")[0].split())
        sentence = re.split(r"(?<=[.?!])\s", first)[0].rstrip(":")
        own = path.relative_to(folder).as_posix()
        rows.append((f"[{own}]({own})", sentence.replace("<", r"\<").replace("|", r"\|")))
    return table(rows)


def scoring_speed() -> str:
    """Images a second of zero-shot scoring: the median of the rounds, their range, the share of what decoding gives."""
    parts = []
    for file in sorted(Path("metrics/bench").glob("scoring-*.json")):
        found = json.loads(text(file))
        medians = {way: float(np.median(rates)) for way, rates in found["images_per_second"].items()}
        (decoding, *_) = medians.values()
        rows: list[Sequence[object]] = [("way", "images/s", "rounds", "of decoding alone")]
        for way, rates in found["images_per_second"].items():
            ends = f"{min(rates):.0f} to {max(rates):.0f}"
            rows.append((way, f"{medians[way]:.0f}", ends, f"{medians[way] / decoding:.0%}"))
        parts.append(f"{found['machine']}, {found['cores']} cores, {found['images']:,} images:\n\n{table(rows)}")
    return "\n\n".join(parts)


def ladder() -> str:
    """Every entry with a log."""
    from pipeline.tools.ladder import markdown  # not above: it needs all that trains

    return markdown().strip()


BLOCKS = {
    "result": result,
    "evidence": lambda: tables(backbone_part()),
    "timings": timings,
    "reference": reference,
    "upper bound": upper_bound,
    "downstream": lambda: downstream_of(Path("metrics/downstream/mini.json")),
    "downstream upper bound": lambda: downstream_of(
        *(MINI / "oracle" / f"mini-{benchmark}.json" for benchmark in downstream.FILES)
    ),
    "denoiser": denoiser,
    "sensitivity": sensitivity,
    "backbones": backbones,
    "ladder": ladder,
    "third experiment": lambda: tables(text(Path("metrics/recipes/results.md"))),
    "second experiment": lambda: tables(text(Path("metrics/recipes/second/results.md"))),
    "first experiment": lambda: tables(text(Path("metrics/recipes/first/results.md"))),
    "bench": lambda: "\n\n".join(text(file).strip() for file in sorted(Path("metrics/bench").glob("*.md"))),
    "scoring speed": scoring_speed,
    "modules": lambda: modules(Path("pipeline")),
    "tests": lambda: modules(Path("tests")),
}


def filled(page: Path) -> str:
    """The page with its blocks as they should be. Raises UserError for a block that BLOCKS does not know."""

    def block(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in BLOCKS:
            raise UserError(f"{page}: no block is called '{name}'. Known are: {', '.join(BLOCKS)}.")
        return f"{begin}\n{BLOCKS[name]()}\n\n{end}"

    return BLOCK.sub(block, text(page))


def stale() -> dict[Path, str]:
    """The pages that differ from what they should be, each with its right content."""
    wanted = {page: filled(page) for page in PAGES}
    return {page: content for page, content in wanted.items() if content != text(page)}


@stage
def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.tools.pages", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a block is stale")
    check, found = parser.parse_args(arguments).check, stale()
    if check and found:
        raise UserError(f"{', '.join(map(str, found))}: not up to date. Run `python -m pipeline.tools.pages`.")
    for page, content in found.items():
        with atomic(page) as (file,):
            file.write_text(content, encoding="utf-8")
        print(f"{page}: written anew")


if __name__ == "__main__":
    main()
