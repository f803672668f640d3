"""Two images and two statements, before and after: the quickest way to see what changed.

    python -m pipeline.tools.look mini a.jpg b.jpg "a cup on its left side" "a cup on its right side"

Prints, for every set of weights of the run that is there, how well each statement fits each image (the cosine,
where a pooling rule makes unit vectors) by the stock embedding and by the published pooling, and whether the pair is
right by MMVP's rule: the first statement prefers the first image, the second the second. Saves the images with the
stock embedding's scores.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pipeline.benchmarks.mmvp import logits, tokens
from pipeline.benchmarks.pairs import PROMPT, Question
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic
from pipeline.core.stages import UserError, stage
from pipeline.diva.pairs import score_pairs
from pipeline.diva.rules import STOCK
from pipeline.models.backbones import Backbone
from pipeline.sections import params

OUTPUT = Path("look.png")


def scores(backbone: Backbone, questions: list[Question], p: params.Params, name: str) -> dict[str, torch.Tensor]:
    """[statement, image] by pooling rule; if the rule draws tokens, the mean over `mmvp.draws` draws."""
    compute, found = next(backbone.parameters()).device, {}
    for pooling, rule in (("stock", STOCK), ("published", p.backbones[name].published_pooling)):
        pooled, patches = tokens(backbone, questions, rule.resize_mode, len(questions), compute)
        draws = p.profile.mmvp.draws if rule.tokens.positions(patches.shape[1]) else 1
        asked = [logits(backbone, questions, pooled, patches, rule, p.profile.mmvp.seed, draw) for draw in range(draws)]
        found[pooling] = (torch.stack(asked).mean(0)[0] / backbone.logit_scale).cpu()
    return found


def strip(questions: list[Question], stock: dict[str, torch.Tensor]) -> Figure:
    """The two images, and a table of how well each statement fits them by weights, the preferred one in bold."""
    rows = [(statement, weights) for statement in range(2) for weights in stock]
    figure = Figure(figsize=(9, 5 + 0.3 * len(rows)), layout="constrained")
    axes: dict[str, Axes] = figure.subplot_mosaic(
        [["first", "second"], ["table", "table"]], height_ratios=[5, 0.3 * (len(rows) + 1)]
    )
    for name, question in zip(("first", "second"), questions, strict=True):
        axes[name].imshow(question.image())
    for axis in axes.values():
        axis.axis("off")
    cells = [
        [questions[statement].statement if weights == next(iter(stock)) else "", weights]
        + [f"{value:+.3f}" for value in stock[weights][statement]]
        for statement, weights in rows
    ]
    headings = ["stock embedding", "", "first image", "second image"]
    table = axes["table"].table(cells, colLabels=headings, colWidths=[0.46, 0.14, 0.2, 0.2], cellLoc="left", edges="B")
    table.scale(1, 1.4)
    for cell in table.get_celld().values():
        cell.get_text().set_parse_math(False)  # a statement may have a $
    for row, (statement, weights) in enumerate(rows, 1):
        table[row, 2 + int(stock[weights][statement].argmax())].set_text_props(weight="bold")
    return figure


@stage
def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.tools.look", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backbone")
    parser.add_argument("images", nargs=2, type=Path, metavar="image")
    parser.add_argument(
        "statements", nargs=2, metavar="statement", help=f"'{PROMPT}' is put before each, as in scoring"
    )
    asked, p, compute = parser.parse_args(arguments), params.load(), deterministic_device()
    models = Path("models", p.backbone(asked.backbone).profile)
    asking = zip(asked.statements, asked.images, strict=True)
    questions = [Question(number, "", text, path, upright=True) for number, (text, path) in enumerate(asking, 1)]
    for question in questions:
        question.image()  # before models are loaded
    there = [weights for weights in p.run.weights if (models / weights / asked.backbone).is_dir()]
    if not there:
        raise UserError(f"{models}: no weights of {asked.backbone} ({', '.join(p.run.weights)}). Run `dvc repro`.")
    table = Table("weights", "pooling rule", "statement", "first image", "second image", "pair")
    stock: dict[str, torch.Tensor] = {}
    for weights in there:
        backbone = Backbone.load(models / weights / asked.backbone).to(compute)
        for pooling, found in scores(backbone, questions, p, asked.backbone).items():
            right = "right" if score_pairs(found[None]).right_P else "wrong"
            for question, values, words in zip(
                questions, found, ((weights, pooling, right), ("", "", "")), strict=True
            ):
                table.add_row(*words[:2], question.statement, *(f"{value:+.3f}" for value in values), words[2])
            if pooling == "stock":
                stock[weights] = found
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    with atomic(OUTPUT) as (file,):
        strip(questions, stock).savefig(file, format="png", dpi=110, metadata={"Software": None})
    print(f"images with the stock embedding's scores: {OUTPUT}")


if __name__ == "__main__":
    main()
