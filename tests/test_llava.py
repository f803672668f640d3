"""The small LLaVA on published data in their own formats: from hub and files to answers; a killed run; bad inputs."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from hub import Hub
from shrunk import METRICS, ROOT, read_yaml, run, write_params
from test_mllm import tiny_tower
from test_segmentation import png
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline import mllm, mllm_sets, plan
from pipeline.benchmarks import mllm as benchmark
from pipeline.benchmarks import mllm_score
from pipeline.benchmarks import questions as sets
from pipeline.benchmarks.mllm import Fit
from pipeline.benchmarks.questions import Choice
from pipeline.core.stages import UserError
from pipeline.evidence import downstream
from pipeline.models.backbones import model_config
from pipeline.sections import params
from pipeline.sections.mllm_sets import LlavaJson
from pipeline.tools import bench, true_size

END = "<|endoftext|>"
SPLITS = ("random", "popular", "adversarial")
PAPER = read_yaml(ROOT / "params.yaml")["profiles"]["paper"]
SETS, DATA = "profiles.mini.mllm_sets", Path("data/mini/mllm")


def image(number: int) -> bytes:
    return png(np.full((20, 24, 3), 10 * number, np.uint8))


def conversation(number: int, turns: int, first: str = "<image>\n", **changes: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": f"{first}What is {number}?"}, {"from": "gpt", "value": f"A {number}."}]
    said += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}] * (turns - 1)
    return {"id": str(number), "image": f"part/{number}.png", "conversations": said} | changes


def tiny_qwen(folder: Path, more_entries: int = 3) -> None:
    """A language model with Qwen2.5's files: a byte-level tokenizer, tied embeddings, bfloat16, no start token."""
    folder.mkdir(parents=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END, "<|im_start|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["Is there a cat in the image? Answer yes or no."] * 4, trainer)
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))  # vocab.json, merges.txt
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END, "pad_token": END, "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    end = backend.token_to_id(END)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=backend.get_vocab_size() + more_entries, hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
            bos_token_id=end, eos_token_id=end,
        )  # fmt: skip
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def mmvp() -> dict[str, bytes]:
    rows = [
        f'{i},"Is it {(i + 1) // 2}, or not?",(a) Open (b) Not quite,{"(a)" if i % 2 else "(b)"}' for i in (1, 2, 3, 4)
    ]
    table = "\n".join(["Index,Question,Options,Correct Answer", *rows]).encode()
    return {"Questions.csv": table, "README.md": b"-"} | {f"MMVP Images/{i}.jpg": image(i) for i in (1, 2, 3, 4)}


def yes_no(questions: list[tuple[int, str, str]], renamed: bool = False, **columns: Any) -> bytes:
    """A parquet as lmms-lab's: (number of the image, question, answer)."""
    images = [{"bytes": image(number), "path": f"{number}.png"} for number, _, _ in questions]
    asked = "asked" if renamed else "question"
    rows = {"image": images, asked: [q for _, q, _ in questions], "answer": [a for _, _, a in questions]}
    file = io.BytesIO()
    pd.DataFrame(rows | columns).to_parquet(file)
    return file.getvalue()


POPE = [(i // 2, f"Is there a {i} in the image?", "yes" if i % 2 else "no") for i in range(6)]
MME = [(i // 2 % 2, f"Is it {i}? Please answer yes or no.", "No" if i % 2 else "Yes") for i in range(6)]


def serve(hub: Hub, language: Path) -> None:
    hub.add_repo("Qwen/Qwen2.5-0.5B", language, lfs=1000)
    hub.add_repo("MMVP/MMVP", mmvp(), kind="dataset")
    pope = {f"Full/{split}-00000-of-00001.parquet": yes_no(POPE) for split in SPLITS}
    hub.add_repo("lmms-lab/POPE", pope, kind="dataset")
    mme = {"data/test-0.parquet": yes_no(MME, category=["OCR", "OCR", "count", "count", "color", "color"])}
    hub.add_repo("lmms-lab/MME", mme, kind="dataset")


def by_hand(folder: Path, learnt: list[dict] | None = None) -> dict[str, Any]:
    """The two splits in LLaVA's layouts, one zipped; returns their section."""
    folder.mkdir(parents=True)
    pretrain, tune = [conversation(i, 1) for i in range(5)], [conversation(i, 2, "<image>\n") for i in range(4)]
    tune.append({"id": "text", "conversations": tune[0]["conversations"]})
    (folder / "pretrain.json").write_text(json.dumps(pretrain), encoding="utf-8")
    (folder / "tune.json").write_text(json.dumps(tune if learnt is None else learnt), encoding="utf-8")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(5):
            archive.writestr(f"part/{i}.png", image(i))
    (folder / "images/part").mkdir(parents=True)
    for i in range(5):
        (folder / f"images/part/{i}.png").write_bytes(image(i))
    return {
        "pretrain": {"conversations": str(folder / "pretrain.json"), "images": str(folder / "images.zip"), "most": 3},
        "tune": {"conversations": str(folder / "tune.json"), "images": str(folder / "images"), "most": 10},
    }


def section(learnt: dict[str, Any]) -> dict[str, Any]:
    """profile paper's, from the hub of these tests."""
    own = json.loads(json.dumps(PAPER["mllm_sets"])) | {"learnt": learnt}
    for download in (own["language"], *(test["download"] for test in own["tests"].values())):
        download["at"] = [f"{download['at'][-1].partition('@')[0]}@main"]
    own["language"]["files"] = dict.fromkeys(own["language"]["files"])
    return own


def small(steps: int = 1) -> dict[str, Any]:
    """profile paper's phases, of a few steps."""
    own = json.loads(json.dumps(PAPER["mllm"])) | {"seeds": 2, "context": 300, "batch": 3, "precision": "float32"}
    for phase in own["phases"]:
        phase |= {"steps": steps, "batch": 4}
    return own


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "model"
    tiny_qwen(folder)
    return folder


@pytest.fixture(scope="module")
def served(language: Path) -> Iterator[Hub]:
    with Hub() as hub:
        serve(hub, language)
        yield hub


@pytest.fixture
def hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """In an empty folder with params.yaml for these tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    served.stand_in(monkeypatch)
    write_params(
        **{SETS: section(by_hand(tmp_path / "hand")), "profiles.mini.mllm": small(), "launch.checkpoint_minutes": 0}
    )
    yield served
    served.heal()


# From hub and files to questions


def test_published_data_become_questions(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    run(mllm_sets)
    assert "tune: 1 of 5 conversations have no image and are left out" in capsys.readouterr().out
    assert sets.tests(DATA) == {
        "mmvp": "pair", **{f"pope_{split}": "question" for split in SPLITS}, "mme": "image"
    }  # fmt: skip
    images, asked = sets.read_test(DATA, "mmvp", "pair")
    assert [sets.decoded(each).getpixel((0, 0))[0] for each in images] == [10, 20, 30, 40]
    letter = "Answer with the option's letter from the given choices directly."
    assert asked[1].text == f"Is it 1, or not?\nA. Open\nB. Not quite\n{letter}"
    assert [(each.options, each.answer) for each in asked] == [(("A", "B"), i) for i in (0, 1, 0, 1)]
    assert sets.units(asked, "pair") == [[0, 1], [2, 3]]
    images, asked = sets.read_test(DATA, "pope_popular", "question")
    assert len(images) == 3
    assert asked[3].text == "Is there a 3 in the image?\nAnswer the question using a single word or phrase."
    assert [(each.image, each.options[each.answer], each.pattern) for each in asked] == [
        (i // 2, "Yes" if i % 2 else "No", "pope_popular") for i in range(6)
    ]
    images, asked = sets.read_test(DATA, "mme", "image")
    assert len(images) == 3
    assert asked[0].text == "Is it 0?\nAnswer the question using a single word or phrase."
    assert [each.pattern for each in asked] == ["OCR", "OCR", "count", "count", "color", "color"]
    assert sets.units(asked, "image") == [[0, 1], [2, 3], [4, 5]]  # an image of two categories is two samples
    images, learnt = sets.read(DATA, "tune")
    assert len(images) == 4
    assert learnt[2].turns == (("What is 2?", "A 2."), ("Sure?", "Yes."))
    assert len(sets.read(DATA, "pretrain")[0]) == 3  # of 5, drawn
    before = {file.relative_to(DATA): file.read_bytes() for file in DATA.rglob("*.tar")}
    hub.requests.clear()
    run(mllm_sets)
    assert before == {file.relative_to(DATA): file.read_bytes() for file in DATA.rglob("*.tar")}
    got = {path.rpartition("/")[2] for method, path, *_ in hub.requests if method == "GET" and "/resolve/" in path}
    assert "model.safetensors" not in got  # the language model is there already
    origin = json.loads((METRICS / "mllm_sets.json").read_text())["origin"]
    assert origin["language"]["files"]["model.safetensors"]["verified"] == "hub"


@torch.no_grad()
@pytest.mark.parametrize("more_entries", [3, 0], ids=["room for <image>", "a row more"])
def test_a_published_language_model_computes_as_it_does_alone(more_entries: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_qwen(folder, more_entries)
    model, tok = benchmark.published(folder)
    alone = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert tok.convert_tokens_to_ids("<image>") == len(tok) - 1
    llava = benchmark.Llava(benchmark.new(tiny_tower(), model, tok, 0).eval(), tok, 100, 4, PartialState(cpu=True))
    e = llava.encode([[("Is it?", "yes")]])
    assert e.ids[0, :4].tolist() == [len(tok) - 1] * 4  # no start token
    assert e.ids[0, -1] == tok.eos_token_id == tok.pad_token_id
    assert e.there.all()
    ids, own = e.ids[:, 4:], llava.model
    logits = own.lm_head(own.model.language_model(ids).last_hidden_state)
    torch.testing.assert_close(logits[..., : len(tok) - 1], alone(ids).logits[..., : len(tok) - 1])
    assert own.lm_head.weight.data_ptr() == own.get_input_embeddings().weight.data_ptr()  # tied


def scored() -> dict[str, bytes]:
    run(mllm, "mini", "pretrained")
    folder = METRICS / "scores/mllm/mini-pretrained"
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.usefixtures("hub")
def test_a_published_model_learns_both_phases_and_answers(here: Path) -> None:
    write_params(
        **{SETS: section(by_hand(here / "hand")), "profiles.mini.mllm": small(1), "launch.checkpoint_minutes": 0}
    )
    run(mllm_sets)
    files = scored()
    scores, table = json.loads(files["scores.json"]), pd.read_parquet(io.BytesIO(files["right.parquet"]))
    assert [len(of_seed) for of_seed in scores["loss"].values()] == [2, 2]  # phases
    assert scores["tests"].keys() == {"mmvp", "mme", *(f"pope_{split}" for split in SPLITS)}
    pope = table[table.test == "pope_random"].groupby("seed").right.mean()
    assert scores["tests"]["pope_random"]["right"] == pytest.approx(100 * pope.mean(), abs=1e-3)
    found = downstream.read("mini", "mini", "pretrained", ["mllm"])
    assert found.keys() == {
        "small LLaVA, mmvp: pairs (questions)", "small LLaVA, mme: images (questions)",
        *(f"small LLaVA, pope_{split}: questions (F1 of yes)" for split in SPLITS),
    }  # fmt: skip
    assert found["small LLaVA, pope_random: questions (F1 of yes)"].answers.shape == (2, 3)  # seeds, images


@pytest.mark.exhaustive
@pytest.mark.usefixtures("hub")
def test_a_killed_run_goes_on_to_the_same_bytes(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(
        **{SETS: section(by_hand(here / "hand")), "profiles.mini.mllm": small(3), "launch.checkpoint_minutes": 0}
    )
    run(mllm_sets)
    undisturbed = scored()
    steps, real = iter(range(99)), Fit.step
    for last in (2, 5, 8):  # in the first phase, in the second, and in the next seed: steps that end with the process

        def step(*arguments: Any, last: int = last) -> float:
            if next(steps) == last:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(Fit, "step", step)
        with pytest.raises(SystemExit):
            scored()
    monkeypatch.setattr(Fit, "step", real)
    capsys.readouterr()
    assert scored() == undisturbed
    assert "going on after step " in capsys.readouterr().out
    assert not list((METRICS / "scores/mllm").glob(".*.checkpoint"))


def test_gains_hold_seeds_and_samples_of_every_test() -> None:
    """Two sets of weights at profile paper's names, tests with pairs and with images of several questions."""
    asked = [Choice(i // 2, "?", ("Yes", "No"), i % 2, "x") for i in range(8)]

    def of(reads: str, right: list[list[bool]], **scoring: str) -> dict[str, downstream.Reading]:
        tables, tests = [], {}
        for name, counted in (("mmvp", "pair"), ("pope_random", "question")):
            table = mllm_score._table(asked, counted, right)
            tables.append(table.assign(test=name))
            tests[name] = mllm_score._summary(table, asked, counted, right)
        return downstream.of_mllm({"reads_sha256": reads, "tests": tests}, pd.concat(tables), scoring)

    before = of("a", [[True, False] * 4, [False] * 8])
    after = of("b", [[True] * 4 + [False] * 4, [True, True, False, False] * 2])
    found = downstream.evidence({"pretrained": before, "released": after, "genhancer": before})
    pairs, pope = found.values()
    assert pairs["score"] == {"pretrained": [0, 25], "released": [50, 50], "genhancer": [0, 25]}
    assert pope["score"]["released"] == [50, pytest.approx(50)]
    value, low, high = pairs["gain"]["released"]
    assert low < value == 50 < high
    assert pope["gain"]["released"][0] == 25
    assert pope["gain"]["genhancer"] == downstream.CANNOT_CHANGE
    more, other = of("c", [[True] * 8] * 3), of("c", [[True] * 8] * 2, precision="bfloat16")
    for second, said in ((more, "seeds: 2 and 3"), (other, "precision: nothing and bfloat16")):
        with pytest.raises(UserError, match=f"in different ways.*{said}"):
            downstream.evidence({"pretrained": before, "released": second})


# What is refused


def table(old: str, new: str) -> dict[str, bytes]:
    """MMVP's files with a change of the table."""
    changed = mmvp()["Questions.csv"].decode().replace(old, new)
    return mmvp() | {"Questions.csv": changed.encode("latin-1")}


@pytest.mark.parametrize(
    ("kind", "files", "said"),
    [
        ("mmvp", {"Questions.csv": b"Index,Question\n1,What?\n"}, "row 1 has no options"),
        ("mmvp", {name: b for name, b in mmvp().items() if "3.jpg" not in name}, "its image 3.jpg is missing"),
        ("mmvp", mmvp() | {"more/2.jpg": image(2)}, "its image 2.jpg is missing or there twice"),
        ("mmvp", table(",(a)\n", ",(c)\n"), "the right one"),
        ("mmvp", mmvp() | {"MMVP Images/2.jpg": b"no image"}, "2.jpg cannot be decoded"),
        ("mmvp", {"Other.csv": b"-"}, "holds 0 files Questions.csv, wanted one. Name another revision"),
        ("mmvp", mmvp() | {"more/Questions.csv": b"-"}, "holds 2 files Questions.csv, wanted one"),
        ("mmvp", table("Open", "\xe9"), "Questions.csv is no table in UTF-8"),
        ("mmvp", table("Open", "o" * 140_000), "Questions.csv is no table in UTF-8"),
        ("mmvp", table("Question,", "Asked,"), "KeyError('Question')"),
        ("mmvp", table('"Is it 1, or not?"', '" "'), "row 1 has no options"),
        ("mmvp", table("(a) Open (b) Not quite", "(a) dog(s) (b) cat(s)"), "row 1 has no options"),
        ("mmvp", table("(a) Open (b) Not quite", "(a) Open (b)"), "row 1 has no options"),
        ("mmvp", table("(a) Open (b) Not quite", "Open (a) Shut (b) Not quite"), "row 1 has no options"),
        ("mmvp", table("(a) Open (b) Not quite", "(a) Open"), "row 1 has no options"),
        ("mmvp", table("\n2,", "\n1,"), "row 1 stands where the row of Index 2 should"),
        ("mmvp", table("\n2,", "\n5,"), "row 5 stands where the row of Index 2 should"),
        ("mmvp", table("\n4,", "\n"), "row Is it 2, or not? has no options"),
        ("mmvp", table('\n4,"Is it 2, or not?",(a) Open (b) Not quite,(b)', ""), "has 3 rows, wanted pairs"),
        ("mmvp", {"Questions.csv": b"Index,Question,Options,Correct Answer\n"}, "has 0 rows, wanted pairs"),
        ("mme", {"data/test-0.parquet": yes_no([(0, "Is it?", "maybe")])}, "row 0 has no image, question and answer"),
        ("mme", {"data/test-0.parquet": yes_no([(0, "Please answer yes or no.", "yes")])}, "row 0 has no image"),
        ("mme", {"data/test-0.parquet": yes_no(MME[:2], image=[{"bytes": None, "path": "0.png"}] * 2)}, "row 0 has no"),
        *(
            ("mme", {"data/test-0.parquet": yes_no(MME, category=["OCR", lost, *["OCR"] * 4])}, "row 1 has no image")
            for lost in (None, "")
        ),
        ("mme", {"data/test-0.parquet": yes_no(MME, category=[None] * 6)}, "row 0 has no image"),
        ("mme", {"data/test-0.parquet": yes_no([*MME, MME[1]])}, "row 1 of the same image asks. Name"),
        ("mme", {"data/test-0.parquet": yes_no(MME)[:-30]}, "test-0.parquet cannot be read (Arrow"),
        ("mme", {"data/test-0.parquet": b""}, "test-0.parquet cannot be read (Arrow"),
        ("mme", {"data/test-0.parquet": yes_no([])}, "has no questions. Name another revision"),
        ("pope", {"data/test-0.parquet": yes_no(POPE, renamed=True)}, "KeyError('question'); columns: image, asked"),
    ],
)
def test_tests_of_another_format_are_refused(kind: str, files: dict[str, bytes], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        list(mllm_sets._packed(kind, mllm_sets.FORMATS[kind].read(tmp_path, kind)))
    assert said in str(refused.value)


def conversations(values: dict[str, Any]) -> list[tuple[str, dict[str, bytes]]]:
    return list(mllm_sets._conversations("tune", LlavaJson(**values)))


@pytest.mark.parametrize(
    ("learnt", "said"),
    [
        ({"conversations": []}, "is no list of conversations"),
        ({"image": conversation(0, 1)}, "is no list of conversations"),
        (["an image"], "is no list of conversations"),
        ([], "has 0 conversations, none with an image"),
        ([conversation(0, 1, image="part/9.png")], "conversation 0: its image part/9.png is not in"),
        ([conversation(0, 1, image="part/0.png\0")], "is not in"),
        ([conversation(0, 1, image="../tune.json")], "the image '../tune.json', which lies outside"),
        ([conversation(0, 1, image="/part/0.png")], "the image '/part/0.png', which lies outside"),
        ([conversation(0, 1, image=["a.png", "b.png"])], "conversation 0 is by human, gpt, wanted turns"),
        ([conversation(0, 1, first="")], "wanted turns of human and gpt on one <image>"),
        ([conversation(0, 1, conversations=[{"from": "gpt", "value": "<image>"}])], "conversation 0 is by gpt, wanted"),
        ([conversation(0, 1, conversations=[{"from": None, "value": "<image>"}])], "conversation 0 is by None, wanted"),
        ([conversation(0, 1, conversations=["What?"])], "conversation 0 is not in LLaVA's JSON format"),
        ([{"conversations": []}], "has 1 conversations, none with an image"),
    ],
)
@pytest.mark.parametrize("images", ["images", "images.zip"])
def test_conversations_of_another_format_are_refused(learnt: Any, said: str, images: str, tmp_path: Path) -> None:
    values = by_hand(tmp_path / "other", learnt)["tune"] | {"images": str(tmp_path / "other" / images)}
    with pytest.raises(UserError) as refused:
        conversations(values)
    assert said in str(refused.value)


def test_nested_json_is_no_list_of_conversations(tmp_path: Path) -> None:
    values = by_hand(tmp_path / "other")["tune"]
    Path(values["conversations"]).write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError, match="is no list of conversations"):
        conversations(values)


@pytest.mark.parametrize(
    ("at", "fault", "said"),
    [
        ((6, b"PK\1\2", 8), 1, "is encrypted"),  # flags of the local header, and of the directory
        ((8, b"PK\1\2", 10), 99, "NotImplementedError"),  # method of compression
        ((40, b"PK\1\2", 16), 255, "error"),  # a byte of the deflated image
    ],
)
def test_images_in_a_zip_that_cannot_be_read_are_refused(
    at: tuple[int, bytes, int], fault: int, said: str, tmp_path: Path
) -> None:
    values, file = by_hand(tmp_path / "other", [conversation(0, 1)])["tune"], tmp_path / "images.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("part/0.png", image(0))
    content, (local, directory, offset) = bytearray(file.read_bytes()), at
    for place in (local, content.index(directory) + offset):
        content[place] = fault
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"conversation 0: its image part/0.png is not in .*images.zip.*{said}"):
        conversations(values | {"images": str(file)})


def test_what_is_to_be_fetched_by_hand_is_asked_for_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learnt = by_hand(tmp_path / "third")
    learnt["tune"]["images"] = "data/nowhere"
    axes = {"run.benchmarks": ["mllm"], "run.benchmark_sets": ["mllm"], "run.recipes": [], "run.inputs": []}
    write_params(**{SETS: section(learnt), "profiles.mini.mllm": small(), "launch.checkpoint_minutes": 0, **axes})
    with pytest.raises(SystemExit):
        run(plan)
    assert "data/nowhere: no such file or folder. Fetch it by hand" in capsys.readouterr().err
    learnt["tune"]["images"] = "third/images"
    write_params(**{SETS: section(learnt), "profiles.mini.mllm": small(), "launch.checkpoint_minutes": 0, **axes})
    hub.fail("/api/datasets/MMVP/MMVP/revision/main", 403, X_Error_Code="GatedRepo")
    with pytest.raises(SystemExit):
        run(plan)
    assert "MMVP/MMVP@main" in capsys.readouterr().err
    folders = {folder.name for folder, _ in plan.downloads_of(params.load())}
    assert folders >= {"language", "mmvp", *(f"pope_{split}" for split in SPLITS), "mme"}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("model.safetensors", "is no language model"),
        ("config.json", "is no language model"),
        ("tensors", "the weights lack"),
        ("entries", "They do not fit"),
    ],
)
def test_a_language_model_that_does_not_fit_is_refused(broken: str, said: str, tmp_path: Path, language: Path) -> None:
    folder = tmp_path / "broken"
    tiny_qwen(folder, more_entries=-9 if broken == "entries" else 0)
    if broken == "tensors":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    elif broken != "entries":
        (folder / broken).unlink()
    with pytest.raises(UserError, match=said):
        benchmark.published(folder)


# At true size


def small_config(name: str) -> dict[str, Any]:
    config = model_config(name)
    config["vision_cfg"] |= {"layers": 2, "width": 32, "head_width": 16}
    config["text_cfg"] |= {"layers": 1, "width": 32, "heads": 2}
    return config


SMALL = {
    "model_config": small_config,
    "QWEN2_5_05B": true_size.QWEN2_5_05B
    | {"hidden_size": 28, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 300},
    "CLASSES": 3, "IMAGES": 1, "PIXELS": 340, "STEPS": 1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SMALL, pytest.param({}, marks=pytest.mark.exhaustive)], ids=["small", "true"])
def test_true_size_is_timed_with_random_weights(
    sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sizes of params.yaml this takes a quarter of an hour and 14 GB."""
    monkeypatch.chdir(tmp_path)
    write_params()
    for name, value in sizes.items():
        monkeypatch.setattr(true_size, name, value)
    run(bench, "mllm", "segmentation", "--rounds", "1")
    found = json.loads(Path("metrics/bench/downstream.json").read_text())
    phases = found["mllm"]["phases"]
    assert [(name, of["batch"]) for name, of in phases.items()] == [("projector", 2), ("projector_and_language", 2)]
    assert all(of["images_per_second"] == pytest.approx(2 / of["seconds"], rel=0.1) for of in phases.values())
    assert found["mllm"]["image_tokens"] == 576
    if sizes != SMALL:
        assert 7.9e8 < found["mllm"]["parameters"] < 8.1e8
        assert found["segmentation"]["image_px"] == [682, 512]
    kinds = ("key_key", "value", "query_query_key_key", "probe", "probe_step")
    assert all(found["segmentation"][kind]["seconds"] > 0 for kind in kinds)
