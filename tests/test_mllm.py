"""The small LLaVA: what it reads, learns and is asked; naive likelihoods; what is refused; the stages, shrunken."""

import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from shrunk import METRICS, MODELS, ROOT, SHRUNK, read_yaml, run, write_params, write_yaml
from test_segmentation import png
from torch import nn
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from pipeline import mllm, mllm_sets
from pipeline.benchmarks import mllm as benchmark
from pipeline.benchmarks import mllm_score
from pipeline.benchmarks import questions as sets
from pipeline.benchmarks.mllm import Fit, Llava, PatchTokens
from pipeline.benchmarks.questions import Choice, Conversation
from pipeline.benchmarks.sets import write_split
from pipeline.core.compute import generator
from pipeline.core.stages import UserError
from pipeline.evidence import downstream, statistics
from pipeline.sections import params
from pipeline.tools import llava

CPU = torch.device("cpu")
TURNS = (("what is it ?", "a cat"),), (("what is it ?", "a big dog"),)
LEARNT = [Conversation(i % 2, TURNS[i % 2], ("a cat", "a big dog")) for i in range(8)]
QUESTIONS = [Choice(i % 2, "what is it ?", ("a cat", "a big dog"), i % 2) for i in range(8)]
LANGUAGE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPT = "{question}"


def tiny_tower() -> CLIPVisionModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        return CLIPVisionModel(config).eval()


@pytest.fixture
def vision() -> CLIPVisionModel:
    return tiny_tower()


@pytest.fixture
def tok() -> PreTrainedTokenizerFast:
    return benchmark.tokenizer(LEARNT)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=generator("test", "pixels"))


def made(vision: nn.Module, tok: PreTrainedTokenizerFast, seed: int = 0, **settings: Any) -> Llava:
    model = benchmark.new(vision, benchmark.llama_config(LANGUAGE, tok), tok, seed).eval()
    return Llava(model, tok, **{"context": 20, "rows": 8, "processes": PartialState(cpu=True), **settings})


def read(llava: Llava, pixels: torch.Tensor, rows: int = 2) -> PatchTokens:
    return PatchTokens(llava.model.model.vision_tower, lambda numbers: pixels[numbers], len(pixels), rows)


def fitted(llava: Llava, tokens: PatchTokens, steps: int, seed: int = 0, batch: int = 8, **changes: Any) -> list[float]:
    values = {"trained": "projector_and_language", "lr": 0.03, "warmup_ratio": 0.1, "weight_decay": 0.01} | changes
    fit, draws = Fit(llava, steps=steps, **values), generator("mllm", seed, "questions")
    drawn = [torch.randint(len(LEARNT), (batch,), generator=draws).tolist() for _ in range(steps)]
    return [fit.step([LEARNT[i] for i in chosen], tokens, PROMPT) for chosen in drawn]


def test_only_answers_and_their_ends_are_learnt(vision: nn.Module, tok: PreTrainedTokenizerFast) -> None:
    turns = [TURNS[0], (("it ?", "a big dog"), ("is ?", "a cat"))]
    e = made(vision, tok).encode(turns)
    said = [tok.convert_ids_to_tokens(row) for row in e.ids.tolist()]
    head = ["<start>", *["<image>"] * 4]
    assert said[0] == [*head, "what", "is", "it", "?", "a", "cat", "<end>", *["<pad>"] * 4]
    assert said[1] == [*head, "it", "?", "a", "big", "dog", "<end>", "is", "?", "a", "cat", "<end>"]
    learnt = [[tok.decode([i]) for i in row[row != benchmark.NOT_ASKED]] for row in e.labels]
    assert learnt == [["a", "cat", "<end>"], ["a", "big", "dog", "<end>", "a", "cat", "<end>"]]
    assert e.there.sum(1).tolist() == [12, 16]
    assert [tensor.shape for tensor in e.part([0])] == [(1, 12)] * 3
    cut = made(vision, tok, context=14).encode(turns, cut=True)
    assert cut.ids.equal(e.ids[:, :14])


@torch.no_grad()
@pytest.mark.parametrize("at_once", [benchmark.LOGITS, 0])
def test_likelihoods_are_those_of_a_row_by_itself(
    vision: nn.Module, tok: PreTrainedTokenizerFast, pixels: torch.Tensor, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all logits are computed or those of labels alone."""
    monkeypatch.setattr(benchmark, "LOGITS", at_once)
    llava = made(vision, tok)
    asked = [("what is it ?", "a big dog"), ("it ?", "a cat")]
    found = llava.likelihood(read(llava, pixels)[[0, 1]], llava.encode([[turn] for turn in asked]))
    for row, (question, option) in enumerate(asked):
        own = tok.convert_tokens_to_ids(["<start>", *["<image>"] * 4, *question.split(), *option.split(), "<end>"])
        logits = llava.model(input_ids=torch.tensor([own]), pixel_values=pixels[row : row + 1]).logits[0]
        first, logits = len(own) - len(option.split()) - 1, logits.log_softmax(-1)
        expected = sum(float(logits[i - 1, own[i]]) for i in range(first, len(own)))
        assert float(found[row]) == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_option_is_the_answer(
    vision: nn.Module, tok: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([[-1.0, -2.0, -3.0], [-2.0, -2.0, -5.0], [-1.0]])  # batches of 3 options and what is left
    monkeypatch.setattr(Llava, "likelihood", lambda *_: torch.tensor(next(told)))
    asked = [Choice(0, "it ?", ("a cat", "a dog"), 0), Choice(1, "it ?", ("a cat", "a dog"), 0)]
    asked = [replace(each, options=("a cat", "a big dog")) for each in asked]
    asked += [Choice(1, "it ?", ("a cat", "a dog", "a big dog"), 2)]
    asked[2] = replace(asked[2], options=("a cat", "a big cat", "a big dog"))
    tokens: Any = torch.zeros(2, 4, 16)
    assert made(vision, tok, rows=3).answers(asked, tokens, PROMPT) == [True, False, True]  # -3 < -2; -2, -5, -1


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["projector", "projector_and_language"])
def test_the_tower_is_frozen_and_the_rest_learns(
    vision: nn.Module, tok: PreTrainedTokenizerFast, pixels: torch.Tensor, trained: str
) -> None:
    llava = made(vision, tok)
    before = {name: tensor.clone() for name, tensor in llava.model.state_dict().items()}
    for name, tensor in vision.state_dict().items():
        assert before[f"model.vision_tower.{name}"].equal(tensor)
    tokens = read(llava, pixels)
    losses = fitted(llava, tokens, 60, trained=trained)
    assert losses[-1] < losses[0]
    if trained == "projector_and_language":
        assert losses[-1] < 0.1
        assert llava.answers(QUESTIONS, tokens, PROMPT) == [True] * len(QUESTIONS)
    learns = (
        "model.multi_modal_projector." if trained == "projector" else ("model.multi_modal", "model.lang", "lm_head")
    )
    for name, tensor in llava.model.state_dict().items():
        assert tensor.equal(before[name]) != name.startswith(learns), name


def test_a_seed_decides_everything_that_is_drawn(
    vision: nn.Module, tok: PreTrainedTokenizerFast, pixels: torch.Tensor
) -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # which must not matter
        llava = made(vision, tok, seed)
        runs.append(fitted(llava, read(llava, pixels), 3, seed, batch=4, lr=0.01))
    assert runs[0] == runs[1] != runs[2]


def test_rows_at_once_and_kept_tokens_change_rounding_alone(
    vision: nn.Module, tok: PreTrainedTokenizerFast, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for rows, kept in ((8, benchmark.KEPT), (3, benchmark.KEPT), (3, 0)):
        monkeypatch.setattr(benchmark, "KEPT", kept)
        llava = made(vision, tok, rows=rows)
        tokens = read(llava, pixels)
        assert (tokens.kept is None) == (kept == 0)
        runs.append(fitted(llava, tokens, 4))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[0] == pytest.approx(runs[2], rel=1e-4)


def test_a_loss_that_is_no_number_stops(vision: nn.Module, tok: PreTrainedTokenizerFast, pixels: torch.Tensor) -> None:
    llava = made(vision, tok)
    with pytest.raises(UserError, match=r"became nan\. Lower lr"):
        fitted(llava, read(llava, pixels * float("nan")), 1)


@torch.no_grad()
def test_the_model_is_saved_and_loaded_as_transformers_has_it(
    vision: nn.Module, tok: PreTrainedTokenizerFast, pixels: torch.Tensor, tmp_path: Path
) -> None:
    llava = made(vision, tok)
    llava.model.save_pretrained(tmp_path)
    ids = llava.encode([TURNS[0]] * 2).ids
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(*(m(input_ids=ids, pixel_values=pixels).logits for m in (llava.model, again)))


@torch.no_grad()
@pytest.mark.parametrize(("part", "reaches"), [("2", False), ("1", True), ("0", True)])
def test_what_the_last_block_does_is_not_read(
    vision: nn.Module, tok: PreTrainedTokenizerFast, pixels: torch.Tensor, part: str, reaches: bool
) -> None:
    """LLaVA reads the last layer but one; the hash of what it reads tells whether a recipe can change its answers."""
    results = []
    for _ in range(2):
        llava = made(vision, tok)
        ids = llava.encode([TURNS[0]] * 2).ids
        logits = llava.model(input_ids=ids, pixel_values=pixels).logits
        results.append((logits, read(llava, pixels)[[0, 1]], mllm_score.reads(vision)))
        for name, parameter in vision.named_parameters():
            if name.startswith((f"encoder.layers.{part}.", "post_layernorm.")):
                parameter.add_(0.1)
    (first, tokens, hash_before), (second, others, hash_after) = results
    assert first.equal(second) == tokens.equal(others) != reaches
    assert (hash_before == hash_after) != reaches


# What is refused


def test_a_tokenizer_that_does_not_fit_is_refused(vision: nn.Module, tok: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=rf"vocab_size is 5, but the tokenizer has {len(tok)}"):
        benchmark.llama_config({**LANGUAGE, "vocab_size": 5}, tok)
    without = PreTrainedTokenizerFast(tokenizer_object=tok.backend_tokenizer, unk_token="<pad>", pad_token="<pad>")
    with pytest.raises(UserError, match="lacks one of"):
        benchmark.new(vision, benchmark.llama_config(LANGUAGE, tok), without, 0)


@pytest.mark.parametrize(
    ("question", "context", "said"),
    [
        ("what is that ?", 20, "that a cat' has <image>, or words that no question"),
        ("what is <image> ?", 20, "<image> . a cat' has <image>, or words"),
        ("what is it ?", 10, "takes 12 tokens.*context is 10"),
    ],
)
def test_questions_that_do_not_fit_are_refused(
    vision: nn.Module, tok: PreTrainedTokenizerFast, question: str, context: int, said: str
) -> None:
    said = said.replace("that a cat", r"that \? a cat").replace("<image> . a", r"<image> \? a")
    with pytest.raises(UserError, match=said):
        made(vision, tok, context=context).check([Choice(0, question, ("a cat", "a big dog"), 0)], PROMPT)


GOOD = [{"question": "it ?", "options": ["a", "b"], "answer": 0, "pattern": "State"}]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "0 images, but not a question on each"),
        ([{"json": GOOD}], "0 images, but not a question on each"),
        ([{"png": True}], "1 images, but not a question on each"),
        ([{"png": True, "json": [{**GOOD[0], "answer": 2}]}], "answer 2 of 2 options"),
        ([{"png": True, "json": [{"question": "it ?"}]}], "neither a list of questions nor of turns"),
        ([{"png": True, "json": [{"turns": [["it ?"]]}]}], "neither a list of questions nor of turns"),
        ([{"png": True, "json": GOOD}], "1 questions, wanted pairs"),
        ([{"png": True, "json": [{**GOOD[0], "pattern": ""}]}] * 2, "each with a pattern"),
    ],
)
def test_sets_that_are_no_pairs_of_questions_are_refused(samples: list[dict], said: str, tmp_path: Path) -> None:
    image = png(np.zeros((4, 4, 3), np.uint8))
    contents = [
        {kind: image if kind == "png" else json.dumps(value).encode() for kind, value in sample.items()}
        for sample in samples
    ]
    write_split(tmp_path, "test", "questions", [(str(i), content) for i, content in enumerate(contents)])
    with pytest.raises(UserError, match=said):
        sets.read_test(tmp_path, "test", "pair")


def test_an_image_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    content = {"png": b"P6 100000 100000 255\n", "json": json.dumps(GOOD).encode()}
    write_split(tmp_path, "test", "questions", [("0", content)])
    images, _ = sets.read(tmp_path, "test")
    with pytest.raises(UserError, match="0 cannot be decoded"):
        sets.decoded(images[0])


def test_a_set_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        sets.read(tmp_path, "train")
    for content in ("{", '["test"]', '{"test": "pairs"}'):
        (tmp_path / "tests.json").write_text(content)
        with pytest.raises(UserError, match="does not name the tests"):
            sets.tests(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run.benchmarks": ["mmvp", "mllm"]}, r"Set run\.benchmark_sets=\[mllm\]"),
        ({"profiles.mini.mllm.language": "fetched"}, "these mllm_sets need values of transformers' LlamaConfig"),
        ({"profiles.paper.mllm.language": LANGUAGE}, "these mllm_sets need 'fetched'"),
        ({"profiles.paper.mllm.phases.0.split": "train"}, "names the split 'train'; mllm_sets has pretrain, tune"),
        ({"profiles.paper.mllm.phases.1.prompt": ""}, "tests need its {question}"),
        ({"profiles.paper.mllm_sets.learnt.mme": {"conversations": "a", "images": "b", "most": 1}}, "the name 'mme'"),
    ],
)
def test_values_that_do_not_go_together_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    content = read_yaml(ROOT / "params.yaml")
    for key, value in changes.items():
        *parents, last = key.split(".")
        reduce(lambda found, part: found[int(part) if part.isdecimal() else part], parents, content)[last] = value
    write_yaml(tmp_path / "params.yaml", content)
    with pytest.raises(UserError, match=said):
        params.load(tmp_path / "params.yaml")


# The stages


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_stages_ask_score_and_repeat_themselves() -> None:
    run(mllm_sets)
    images, conversations = sets.read(Path("data/mini/mllm"), "train")
    assert len(conversations) == 10 * len(images)
    assert sets.tests(Path("data/mini/mllm")) == {"test": "pair"}
    images, questions = sets.read_test(Path("data/mini/mllm"), "test", "pair")
    assert len(images) == len(questions) == 2 * 9 * 2
    for first, second in zip(questions[::2], questions[1::2], strict=True):
        assert (first.text, first.options, first.pattern) == (second.text, second.options, second.pattern)
        assert (first.answer, second.answer) == (0, 1)
        assert len(set(first.options)) == 2
    run(mllm, "mini", "pretrained")
    folder = METRICS / "scores/mllm/mini-pretrained"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    scores, pairs = json.loads(before["scores.json"])["tests"]["test"], pd.read_parquet(folder / "right.parquet")
    assert len(pairs) == 2 * 18
    scoring, section = json.loads(before["scoring.json"]), SHRUNK["profiles.mini.mllm"]
    assert {key: scoring[key] for key in ("phases", "seeds", "language")}.items() <= section.items()
    assert {"version", "sets", "preprocessing", "precision", "sha256"} <= scoring.keys()
    assert scores["right"] == pytest.approx(100 * pairs.right.mean(), abs=1e-3)
    assert scores["seeds"].keys() == {"0", "1"}
    run(mllm, "mini", "pretrained")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    found = downstream.read("mini", "mini", "pretrained", ["mmvp", "mllm"])
    assert found.keys() == {"small LLaVA: pairs (questions)"}
    assert found["small LLaVA: pairs (questions)"].answers.shape == (2, 18)


def asked_of_the_folder(folder: Path, images: list[Image.Image], questions: list[Choice]) -> list[bool]:
    """Whether each question is answered right, as anybody would ask a LLaVA of transformers: by prompt and loss."""
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    right = []
    for q in questions:
        losses = []
        for option in q.options:
            turns = [{"role": "user", "content": f"<image>\n{q.text}"}, {"role": "assistant", "content": option}]
            text = processor.tokenizer.apply_chat_template(turns, chat_template=processor.chat_template, tokenize=False)
            inputs = processor(text=text, images=images[q.image], return_tensors="pt")
            labels = inputs.input_ids.clone()
            labels[:, : -len(processor.tokenizer(option).input_ids) - 1] = -100  # the option and its end are learnt
            losses.append(model(**inputs, labels=labels).loss.item())
        right.append(losses.index(min(losses)) == q.answer)
    return right


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_saved_llava_answers_as_the_benchmark_says(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(llava, "mini", "pretrained")
    assert (
        "data/mini/mllm does not exist. Name mllm in run.benchmarks and run.benchmark_sets" in capsys.readouterr().err
    )
    run(mllm_sets)
    run(mllm, "mini", "pretrained")
    run(llava, "mini", "pretrained")
    folder = MODELS / "llava/mini-pretrained"
    assert not list(folder.parent.glob(".*.checkpoint"))
    images, questions = sets.read_test(Path("data/mini/mllm"), "test", "pair")
    right = asked_of_the_folder(folder, [sets.decoded(image) for image in images], questions)
    table = pd.read_parquet(METRICS / "scores/mllm/mini-pretrained/right.parquet")
    pairs = [float(first and second) for first, second in zip(right[::2], right[1::2], strict=True)]
    assert pairs == table[table.seed == 0].right.tolist()


LMMS_EVAL = shutil.which("lmms-eval")


@pytest.mark.exhaustive
@pytest.mark.skipif(not LMMS_EVAL, reason="no lmms-eval in PATH (its environment: pipeline/launch/lmms-eval.lock)")
@pytest.mark.usefixtures("here")
def test_lmms_eval_gets_the_saved_llava_s_answers(tmp_path: Path) -> None:
    phase = {**SHRUNK["profiles.mini.mllm"]["phases"][0], "steps": 150}  # after two, all answers are the same
    write_params(**{"profiles.mini.mllm": {**SHRUNK["profiles.mini.mllm"], "phases": [phase]}})
    run(mllm_sets)
    run(llava, "mini", "pretrained")
    folder = MODELS / "llava/mini-pretrained"
    images, questions = sets.read_test(Path("data/mini/mllm"), "test", "pair")
    rows = [(images[q.image].read(), q.text, q.options[q.answer]) for q in questions]
    pd.DataFrame(rows, columns=["image", "question", "answer"]).to_parquet(tmp_path / "test.parquet")
    (tmp_path / "details.yaml").write_text(
        f"""
task: details
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {tmp_path}/test.parquet}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{max_new_tokens: 4}}
doc_to_visual: !function details.visual
doc_to_text: question
doc_to_target: answer
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
    )
    (tmp_path / "details.py").write_text(
        "import io\nfrom PIL import Image\n\n"
        "def visual(doc):\n    return [Image.open(io.BytesIO(doc['image'])).convert('RGB')]\n"
    )
    command = [LMMS_EVAL, "eval", "--model", "llava_hf", "--model_args"]
    command += [f"pretrained={folder.resolve()},device=cpu,device_map=cpu", "--tasks", "details", "--include_path"]
    command += [tmp_path, "--batch_size", "1", "--output_path", tmp_path / "out", "--log_samples"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(command, env=environment, check=True)
    (found,) = tmp_path.glob("out/*/*_samples_details.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in found.read_text(encoding="utf-8").splitlines()]

    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    wanted = []
    for q in questions:
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}]
        text = processor.apply_chat_template(asked, add_generation_prompt=True)
        inputs = processor(text=text, images=sets.decoded(images[q.image]), return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs.input_ids.shape[1] :]
        wanted.append(processor.decode(ids, skip_special_tokens=True))
    assert answers == wanted
    assert len({*answers}) > 1


# Its checkpoint


def test_a_scoring_goes_on_where_its_own_checkpoint_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    def kept(steps: int) -> mllm_score.Kept:
        return mllm_score.Kept(tmp_path / "checkpoint", {"mllm": {"steps": steps}}, 0, PartialState(cpu=True))

    first = kept(2)
    first.losses = [[2.0, 1.0]]
    first.finish({"mmvp": [True]})
    first.losses = [[3.0]]
    first.save({"a": torch.ones(1)})
    again = kept(2)
    assert again.resumed
    assert (again.finished, again.losses) == ([{"losses": [[2.0, 1.0]], "right": {"mmvp": [True]}}], [[3.0]])
    assert "going on after step 1 of seed 1, from " in capsys.readouterr().out
    other = kept(4)
    assert (other.finished, other.losses, other.resumed) == ([], [], False)
    assert "which differs in mllm.steps (2, now 4): training starts anew" in capsys.readouterr().out


# The interval over seeds and answers


def test_the_interval_holds_seeds_and_answers() -> None:
    draws, truth, covered, naive = np.random.default_rng(0), 3.0, 0, 0
    for _ in range(400):
        seeds, answers = draws.normal(0, 2, (4, 1)), draws.normal(0, 10, (1, 60))
        changes = truth + seeds + answers + draws.normal(0, 5, (4, 60))
        found = statistics.over_seeds_and_answers(changes)
        covered += found.low <= truth <= found.high
        alone = statistics.over_seeds(changes.mean(1).tolist())
        naive += alone.low <= truth <= alone.high
    assert covered / 400 >= 0.94
    assert naive / 400 < 0.92  # the seeds alone know nothing of other questions
    assert statistics.over_seeds_and_answers(np.zeros((3, 5))) == (0, 0, 0)
    with pytest.raises(ValueError, match="1 seeds and 5 answers"):
        statistics.over_seeds_and_answers(np.zeros((1, 5)))


def test_the_interval_of_two_parts_by_hand() -> None:
    changes = np.array([[1.0, 3.0], [2.0, 6.0]])
    a, b = np.var([2, 4], ddof=1) / 2, np.var([1.5, 4.5], ddof=1) / 2
    freedom = (a + b) ** 2 / (a**2 + b**2)
    from scipy import stats

    half = stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
    assert statistics.over_seeds_and_answers(changes) == pytest.approx((3, 3 - half, 3 + half))
