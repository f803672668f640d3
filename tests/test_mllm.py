"""The small LLaVA: what it reads, learns and is asked; naive likelihoods; what is refused; the stages, shrunken."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from shrunk import METRICS, ROOT, run
from test_segmentation import png
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from pipeline import mllm, mllm_sets
from pipeline.benchmarks import mllm as benchmark
from pipeline.benchmarks import questions as sets
from pipeline.benchmarks.questions import Choice
from pipeline.benchmarks.sets import write_split
from pipeline.core.compute import generator
from pipeline.core.stages import UserError
from pipeline.evidence import downstream, statistics
from pipeline.sections import params

CPU = torch.device("cpu")
QUESTIONS = [Choice(i % 2, "what is it ?", ("a cat", "a big dog"), i % 2) for i in range(8)]
LANGUAGE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def vision() -> CLIPVisionModel:
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
def tok() -> PreTrainedTokenizerFast:
    return benchmark.tokenizer(QUESTIONS)


@pytest.fixture
def model(vision: nn.Module, tok: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    return benchmark.new(vision, LANGUAGE, tok, 0).eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=generator("pixels"))


def test_only_the_option_and_the_end_are_asked_for(tok: PreTrainedTokenizerFast) -> None:
    ids, labels = benchmark.encode(tok, [("what is it ?", "a cat"), ("it ?", "a big dog")], 4, 20)
    said = [tok.convert_ids_to_tokens(row) for row in ids.tolist()]
    assert said[0] == ["<start>", *["<image>"] * 4, "what", "is", "it", "?", "a", "cat", "<end>"]
    assert said[1] == ["<start>", *["<image>"] * 4, "it", "?", "a", "big", "dog", "<end>", "<pad>"]
    assert [int((row != benchmark.NOT_ASKED).sum()) for row in labels] == [3, 4]
    assert all(labels[labels != benchmark.NOT_ASKED] == ids[labels != benchmark.NOT_ASKED])


@torch.no_grad()
def test_likelihoods_are_those_of_a_row_by_itself(
    model: LlavaForConditionalGeneration, tok: PreTrainedTokenizerFast, pixels: torch.Tensor
) -> None:
    asked = [("what is it ?", "a big dog"), ("it ?", "a cat")]
    ids, labels = benchmark.encode(tok, asked, 4, 20)
    found = benchmark._likelihood(model, benchmark.patch_tokens(model, pixels, 1, CPU), ids, labels)
    for row, (question, option) in enumerate(asked):
        own = tok.convert_tokens_to_ids(["<start>", *["<image>"] * 4, *question.split(), *option.split(), "<end>"])
        logits = model(input_ids=torch.tensor([own]), pixel_values=pixels[row : row + 1]).logits[0].log_softmax(-1)
        first = len(own) - len(option.split()) - 1
        expected = sum(float(logits[i - 1, own[i]]) for i in range(first, len(own)))
        assert float(found[row]) == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_option_is_the_answer(
    model: LlavaForConditionalGeneration, tok: PreTrainedTokenizerFast, pixels: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    told = iter([[-1.0, -2.0, -3.0], [-2.0, -2.0, -5.0], [-1.0]])  # batches of 3 options and what is left
    monkeypatch.setattr(benchmark, "_likelihood", lambda *_: torch.tensor(next(told)))
    asked = [Choice(0, "it ?", ("a cat", "a dog"), 0), Choice(1, "it ?", ("a cat", "a dog"), 0)]
    asked += [Choice(1, "it ?", ("a cat", "a dog", "a big dog"), 2)]
    assert benchmark.answers(model, tok, torch.zeros(2, 4, 16), asked, 3, 20) == [
        True,
        False,
        True,
    ]  # -3 < -2; -2, -5, -1


@pytest.mark.slow
def test_the_tower_is_frozen_and_the_rest_learns(
    vision: nn.Module, model: LlavaForConditionalGeneration, tok: PreTrainedTokenizerFast, pixels: torch.Tensor
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in vision.state_dict().items():
        assert before[f"model.vision_tower.{name}"].equal(tensor)
    tokens = benchmark.patch_tokens(model, pixels, 2, CPU)
    losses = benchmark.fit(model, tok, tokens, QUESTIONS, 60, 8, 0.03, 20, 0)
    assert losses[-1] < 0.1 < losses[0]
    assert benchmark.answers(model, tok, tokens, QUESTIONS, 4, 20) == [True] * len(QUESTIONS)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]) == name.startswith("model.vision_tower."), name


def test_a_seed_decides_everything_that_is_drawn(
    vision: nn.Module, tok: PreTrainedTokenizerFast, pixels: torch.Tensor
) -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # which must not matter
        model = benchmark.new(vision, LANGUAGE, tok, seed)
        tokens = benchmark.patch_tokens(model, pixels, 2, CPU)
        runs.append(benchmark.fit(model, tok, tokens, QUESTIONS, 3, 4, 0.01, 20, seed))
    assert runs[0] == runs[1] != runs[2]


@torch.no_grad()
def test_the_model_is_saved_and_loaded_as_transformers_has_it(
    model: LlavaForConditionalGeneration, tok: PreTrainedTokenizerFast, pixels: torch.Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    ids, _ = benchmark.encode(tok, [("what is it ?", "a cat")] * 2, 4, 20)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(*(m(input_ids=ids, pixel_values=pixels).logits for m in (model, again)))


@torch.no_grad()
@pytest.mark.parametrize(("part", "read"), [("2", False), ("1", True), ("0", True)])
def test_what_the_last_block_does_is_not_read(
    vision: nn.Module, tok: PreTrainedTokenizerFast, pixels: torch.Tensor, part: str, read: bool
) -> None:
    """LLaVA reads the last layer but one; the hash of what it reads tells whether a recipe can change its answers."""
    ids, _ = benchmark.encode(tok, [("what is it ?", "a cat")] * 2, 4, 20)
    results = []
    for _ in range(2):
        model = benchmark.new(vision, LANGUAGE, tok, 0).eval()
        results.append((model(input_ids=ids, pixel_values=pixels).logits, mllm.reads(vision)))
        for name, parameter in vision.named_parameters():
            if name.startswith((f"encoder.layers.{part}.", "post_layernorm.")):
                parameter.add_(0.1)
    (first, hash_before), (second, hash_after) = results
    assert first.equal(second) != read
    assert (hash_before == hash_after) != read


# What is refused


def test_a_tokenizer_that_does_not_fit_is_refused(vision: nn.Module, tok: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=rf"vocab_size is 5, but the tokenizer has {len(tok)}"):
        benchmark.new(vision, {**LANGUAGE, "vocab_size": 5}, tok, 0)
    without = PreTrainedTokenizerFast(tokenizer_object=tok.backend_tokenizer, unk_token="<pad>", pad_token="<pad>")
    with pytest.raises(UserError, match="lacks one of"):
        benchmark.new(vision, LANGUAGE, without, 0)


@pytest.mark.parametrize(
    ("question", "context", "said"),
    [("what is that ?", 20, "that no question"), ("what is it ?", 10, "takes 12 tokens.*context is 10")],
)
def test_questions_that_do_not_fit_are_refused(
    tok: PreTrainedTokenizerFast, question: str, context: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        benchmark.encode(tok, [(question, "a cat")], 4, context)


GOOD = [{"question": "it ?", "options": ["a", "b"], "answer": 0, "pattern": "State"}]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "0 images, but not a question on each"),
        ([{"json": GOOD}], "1 questions|0 images"),
        ([{"png": True}], "1 images, but not a question on each"),
        ([{"png": True, "json": [{**GOOD[0], "answer": 2}]}], "answer 2 of 2 options"),
        ([{"png": True, "json": [{"question": "it ?"}]}], "neither an image nor questions on one"),
        ([{"png": b"P6 100000 100000 255\n", "json": GOOD}], "neither an image nor questions on one"),
        ([{"png": True, "json": GOOD}], "1 questions, wanted pairs"),
        ([{"png": True, "json": [{**GOOD[0], "pattern": ""}]}] * 2, "each with a pattern"),
    ],
)
def test_sets_that_are_no_pairs_of_questions_are_refused(samples: list[dict], said: str, tmp_path: Path) -> None:
    image = png(np.zeros((4, 4, 3), np.uint8))
    contents = [
        {
            kind: (image if value is True else value) if kind == "png" else json.dumps(value).encode()
            for kind, value in sample.items()
        }
        for sample in samples
    ]
    write_split(tmp_path, "test", "questions", [(str(i), content) for i, content in enumerate(contents)])
    with pytest.raises(UserError, match=said):
        sets.read(tmp_path, "test")


def test_a_set_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        sets.read(tmp_path, "train")


def test_a_profile_without_questions_cannot_be_asked(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["run"] |= {
        "profile": "paper",
        "backbones": ["openai_224"],
        "recipes": [],
        "inputs": [],
        "benchmarks": ["mllm"],
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"'mllm', but profiles\.paper has no mllm and mllm_sets"):
        params.load(tmp_path / "params.yaml")


def test_a_benchmark_without_its_set_is_refused(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["run"]["benchmarks"] = ["mmvp", "mllm"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"Set run\.benchmark_sets=\[mllm\]"):
        params.load(tmp_path / "params.yaml")


# The stages


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_stages_ask_score_and_repeat_themselves() -> None:
    run(mllm_sets)
    images, questions = sets.read(Path("data/mini/mllm"), "train")
    assert len(questions) == 10 * len(images)
    images, questions = sets.read(Path("data/mini/mllm"), "test")
    assert len(images) == len(questions) == 2 * 9 * 2
    for first, second in zip(questions[::2], questions[1::2], strict=True):
        assert (first.text, first.options, first.pattern) == (second.text, second.options, second.pattern)
        assert (first.answer, second.answer) == (0, 1)
        assert len(set(first.options)) == 2
    run(mllm, "mini", "pretrained")
    folder = METRICS / "scores/mllm/mini-pretrained"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    scores, pairs = json.loads(before["scores.json"]), pd.read_parquet(folder / "pairs.parquet")
    assert len(pairs) == 2 * 18
    assert scores["pairs"] == pytest.approx(100 * pairs.right.mean(), abs=1e-3)
    assert scores["seeds"].keys() == {"0", "1"}
    run(mllm, "mini", "pretrained")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    found = downstream.read("mini", "mini", "pretrained", ["mmvp", "mllm"])
    assert found.keys() == {"small LLaVA: pairs (questions)"}
    assert found["small LLaVA: pairs (questions)"].answers.shape == (2, 18)


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
