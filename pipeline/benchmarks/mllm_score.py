"""The score of a small LLaVA: trained anew on every tower in the same way, with several seeds, and asked the tests."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn

from pipeline.benchmarks import mllm
from pipeline.benchmarks import questions as sets
from pipeline.benchmarks.mllm import Fit, Llava, PatchTokens
from pipeline.benchmarks.questions import Choice, Conversation
from pipeline.benchmarks.sets import SetImage
from pipeline.core import config
from pipeline.core.code import program
from pipeline.core.compute import generator, seeded
from pipeline.core.processes import cpus
from pipeline.core.stages import UserError, progress
from pipeline.engine.scratch import Scratch, digest_together
from pipeline.models.backbones import Backbone, tensors_sha256
from pipeline.models.exports import OpenClipOnly, tokenizer, transformers_model
from pipeline.models.residual_head import WithHead
from pipeline.sections.launch import Launch
from pipeline.sections.mllm import Mllm

LAST = 20  # steps whose mean loss is told


def vision_tower(clip: nn.Module, tok: Any):
    """The image tower as a model of transformers; tok: the CLIP's tokenizer. Raises UserError if transformers has no
    class for it.

    A residual head is left out: it stands behind the tower, and the language model reads patch tokens.
    """
    if isinstance(clip.visual, WithHead):
        clip.visual = clip.visual.visual
    try:
        vision = transformers_model(clip, tok).vision_model
    except OpenClipOnly as error:
        raise UserError(f"mllm: {error}. Take 'mllm' out of run.benchmarks for this backbone.") from error
    with seeded("mllm", "tower"):
        made = type(vision)(vision.config)  # an export's has no buffers that are not saved, such as position_ids
    made.load_state_dict(vision.state_dict())
    return made


def reads(vision) -> str:
    """sha256 of the tensors that the language model's input depends on: all before the last block."""
    last = f"encoder.layers.{vision.config.num_hidden_layers - 1}."
    found = sorted(vision.state_dict().items())
    return tensors_sha256(each for each in found if not each[0].startswith((last, "post_layernorm", "head.")))


def score(
    backbone: Backbone, root: Path, p: Mllm, compute: torch.device, checkpoint: Path | None = None,
    keep: Callable[[Llava], None] | None = None,
) -> tuple[dict, pd.DataFrame]:  # fmt: skip
    """(scores.json, the table of samples), the same in all processes. keep: gets every seed's model when trained."""
    processes = PartialState(cpu=compute.type == "cpu")
    if least := next((phase.batch for phase in p.phases if phase.batch < processes.num_processes), None):
        raise UserError(f"mllm.phases has a batch of {least}, too few for {processes.num_processes} GPUs. Raise it.")
    vision = vision_tower(backbone.clip, tokenizer(backbone)).to(processes.device)
    learnt = {phase.split: sets.read(root, phase.split) for phase in p.phases}
    tests = {name: (counted, *sets.read_test(root, name, counted)) for name, counted in sets.tests(root).items()}
    if p.language == "fetched":
        language, tok = mllm.published(root / "language")
    else:
        tok = mllm.tokenizer([each for _, conversations in learnt.values() for each in conversations])
        language = mllm.llama_config(p.language, tok)

    def llava(seed: int) -> Llava:
        model = mllm.new(vision, language, tok, seed).to(processes.device)
        return Llava(model, tok, p.context, p.batch, processes, p.precision)

    minutes: float = config.read(Launch, "launch").checkpoint_minutes if checkpoint else 0.0
    kept = Kept(checkpoint, _fingerprint(backbone, root, p, learnt, tests), minutes, processes)
    prompt, seeds = p.phases[-1].prompt, range(len(kept.finished), p.seeds)
    for number in seeds:
        own = llava(number)
        if number == seeds[0]:
            for _, _, questions in tests.values():
                own.check(questions, prompt)  # before hours of training
            of_images = {name: images for name, (images, _) in learnt.items()} | {
                n: test[1] for n, test in tests.items()
            }
            tokens = {name: _tokens(backbone, vision, images, p) for name, images in of_images.items()}
        _train(own, number, p, {name: each for name, (_, each) in learnt.items()}, tokens, kept)
        if keep:
            keep(own)
        right = {name: own.answers(questions, tokens[name], prompt) for name, (_, _, questions) in tests.items()}
        kept.finish(right)
        del own
    summary: dict[str, Any] = {"reads_sha256": reads(vision), "tests": {}, "loss": kept.last_losses()}
    tables = []
    for name, (counted, _, questions) in tests.items():
        table = _table(questions, counted, [of_seed["right"][name] for of_seed in kept.finished])
        tables.append(table.assign(test=name))
        summary["tests"][name] = _summary(table, questions, counted, [each["right"][name] for each in kept.finished])
    return summary, pd.concat(tables, ignore_index=True)


def _tokens(backbone: Backbone, vision, images: list[SetImage], p: Mllm) -> PatchTokens:
    def pixels(numbers: list[int]) -> torch.Tensor:
        with ThreadPoolExecutor(cpus()) as pool:
            return torch.stack([*pool.map(lambda n: backbone.preprocess(sets.decoded(images[n])), numbers)])

    return PatchTokens(vision, pixels, len(images), p.batch, p.precision)


class Kept(Scratch):
    """The checkpoint of a scoring. finished: of every seed that was trained, its losses by phase and its answers.

    losses: of the seed at hand, by phase.
    """

    def __init__(self, path: Path | None, fingerprint: dict[str, Any], minutes: float, processes: PartialState) -> None:
        super().__init__(path, fingerprint, minutes, processes)
        state = self.state() or {"finished": [], "losses": []}
        self.finished: list[dict[str, Any]] = state["finished"]
        self.losses: list[list[float]] = state["losses"]
        self.resumed = bool(self.losses)
        if (self.finished or self.resumed) and processes.is_main_process:
            steps = sum(map(len, self.losses))
            print(f"going on after step {steps} of seed {len(self.finished)}, from {path}", flush=True)

    def save(self, tensors: dict[str, torch.Tensor]) -> None:
        self.write(tensors, finished=self.finished, losses=self.losses)

    def finish(self, right: dict[str, list[bool]]) -> None:
        """The seed at hand is trained and has answered."""
        self.finished.append({"losses": self.losses, "right": right})
        self.losses, self.resumed = [], False
        self.save({})

    def last_losses(self) -> dict[str, list[float]]:
        """By seed, the mean loss of each phase's last steps."""
        means = [[sum(each[-LAST:]) / len(each[-LAST:]) for each in of["losses"]] for of in self.finished]
        return {str(seed): [round(mean, 4) for mean in of_phases] for seed, of_phases in enumerate(means)}


def _train(
    llava: Llava, seed: int, p: Mllm, learnt: dict[str, list[Conversation]], tokens: dict[str, PatchTokens], kept: Kept
) -> None:
    """All phases of a seed, from where its checkpoint stands. What is drawn is a function of the seed alone, so it is
    the same for every tower.
    """
    draws, stands = generator("mllm", seed, "questions"), len(kept.losses) - 1
    for number, phase in enumerate(p.phases):
        if number > stands:
            kept.losses.append([])
        losses, conversations = kept.losses[number], learnt[phase.split]
        drawn = [torch.randint(len(conversations), (phase.batch,), generator=draws) for _ in range(phase.steps)]
        if number < stands:
            continue
        values = phase.model_dump(include={"trained", "steps", "lr", "warmup_ratio", "weight_decay"})
        fit = Fit(llava, **values)
        if number == stands and kept.resumed and kept.path:
            fit.restore(load_file(kept.path), len(losses))
        bar = {"initial": len(losses), "total": phase.steps, "disable": not llava.processes.is_main_process}
        for chosen in progress(drawn[len(losses) :], f"{phase.trained}, seed {seed}", **bar):
            losses.append(fit.step([conversations[i] for i in chosen.tolist()], tokens[phase.split], phase.prompt))
            if kept.due():
                kept.save(fit.tensors())


def _fingerprint(backbone: Backbone, root: Path, p: Mllm, *asked: Any) -> dict[str, Any]:
    """All that the answers depend on; the number of processes, which changes rounding alone, is left out."""
    return {
        "mllm": p.model_dump(mode="json"),
        "weights": backbone.sha256,
        "language": digest_together(sorted((root / "language").glob("*"))),
        "asked": hashlib.sha256(repr(asked).encode()).hexdigest(),
        "code": program("benchmarks/mllm_score.py"),
        "torch": torch.__version__,
    }


def _table(questions: list[Choice], counted: sets.Counted, right: list[list[bool]]) -> pd.DataFrame:
    """Rows (seed, pattern, sample, right); right: whether each question was answered right, by seed."""
    rows, units = [], sets.units(questions, counted)
    for seed, of_seed in enumerate(right):
        for sample, unit in enumerate(units):
            answers = [of_seed[i] for i in unit]
            value = sum(answers) / len(answers) if counted == "question" else float(all(answers))
            rows.append((seed, questions[unit[0]].pattern, sample, value))
    return pd.DataFrame(rows, columns=["seed", "pattern", "sample", "right"])


def _summary(
    table: pd.DataFrame, questions: list[Choice], counted: sets.Counted, right: list[list[bool]]
) -> dict[str, Any]:
    """What scores.json says of a test."""
    of_questions = [100 * sum(of_seed) / len(of_seed) for of_seed in right]
    found = {
        "counted": counted,
        "right": _percent(table.right.mean()),
        "questions": round(sum(of_questions) / len(of_questions), 3),
        "patterns": {name: _percent(mean) for name, mean in table.groupby("pattern", sort=False).right.mean().items()},
        "seeds": {
            str(seed): {"right": _percent(mean), "questions": round(of_questions[seed], 3)}
            for seed, mean in table.groupby("seed").right.mean().items()
        },
    }
    if {option for q in questions for option in q.options} == {"Yes", "No"}:
        found["yes_f1"] = round(sum(_yes_f1(questions, of_seed) for of_seed in right) / len(right), 3)
    return found


def _percent(share: float) -> float:
    return round(100 * float(share), 3)


def _yes_f1(questions: list[Choice], right: list[bool]) -> float:
    """The F1 of answer yes in %, which POPE is reported by."""
    yes = [q.options[q.answer] == "Yes" for q in questions]
    hits = sum(a and b for a, b in zip(yes, right, strict=True))
    said = sum(a == b for a, b in zip(yes, right, strict=True))  # yes and right, or no and wrong
    return 200 * hits / max(1, said + sum(yes))
