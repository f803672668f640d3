"""A small LLaVA: a frozen image tower, a projector of two layers and a language model, by transformers.

    [start] <image> x N question answer <end> question answer <end> ...

The language model reads the patch tokens of the tower's last layer but one, as LLaVA-1.5 does. It learns the answers.
Its answer to a question is the option with the highest likelihood; nothing is sampled.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline.benchmarks.questions import Choice, Conversation
from pipeline.core.compute import autocast, seeded
from pipeline.core.stages import UserError, progress

SPECIAL = ("<pad>", "<start>", "<end>", "<image>")
LAYER = -2  # of the tower, which LLaVA reads
NOT_ASKED = -100  # labels that have no loss, in transformers
LOGITS = 2**28  # at once at most; of more, only those of labels are computed
KEPT = 4e9  # bytes of patch tokens that are kept in memory


def tokenizer(conversations: list[Conversation]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of these conversations."""
    texts = [text for c in conversations for text in (*chain.from_iterable(c.turns), *c.options)]
    words = {word for text in texts for word in text.split()} - {*SPECIAL}
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def llama_config(language: dict, tok: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama for the tokenizer. Raises UserError for a tokenizer with more entries than the language model."""
    entries = len(tok)
    if (wanted := language.get("vocab_size", entries)) < entries:
        raise UserError(
            f"mllm.language.vocab_size is {wanted}, but the tokenizer has {entries} entries. Raise vocab_size, or "
            "leave it out of params.yaml."
        )
    return LlamaConfig(
        **{"vocab_size": entries, **language}, pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )  # fmt: skip


def published(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The language model of a folder that transformers saved, in float32, and its tokenizer, with <image> added.

    Raises UserError for a folder that is no such model, that lacks tensors, or whose tokenizer does not fit.
    """
    again = "Name a language model that is complete in profiles.<profile>.mllm_sets.language."
    try:
        language, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tok = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{folder} is no language model of transformers ({str(error).splitlines()[0]}). {again}"
        ) from None
    if lacking := sorted([*loading["missing_keys"], *loading["mismatched_keys"]], key=str):
        raise UserError(f"{folder}: the weights lack {len(lacking)} tensors, {lacking[0]} first. {again}")
    own, ends = language.config.vocab_size, language.config.eos_token_id
    if len(tok) > own or tok.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        raise UserError(
            f"{folder}: the tokenizer has {len(tok)} entries and ends texts with {tok.eos_token_id}, but the language "
            f"model has {own} and ends them with {ends}. They do not fit. {again}"
        )
    tok.add_special_tokens({"additional_special_tokens": ["<image>"]})
    if len(tok) > own:
        with seeded("mllm", "embeddings"):
            language.resize_token_embeddings(len(tok), mean_resizing=False)
    return language, tok


def new(
    vision: PreTrainedModel, language: PreTrainedModel | Any, tok: PreTrainedTokenizerFast, seed: int
) -> LlavaForConditionalGeneration:
    """A LLaVA with `vision` as its frozen tower. What has no weights yet is initialised from the seed: the projector,
    and the language model if only its configuration is given.

    Raises UserError for a tokenizer without image token, end or padding.
    """
    image = tok.convert_tokens_to_ids("<image>")
    if image in (None, tok.unk_token_id) or tok.eos_token_id is None or tok.pad_token_id is None:
        raise UserError(f"the language model's tokenizer lacks one of {', '.join(SPECIAL)}. Choose another.")
    loaded = isinstance(language, PreTrainedModel)
    side = vision.config.image_size // vision.config.patch_size
    with seeded("mllm", seed):
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision.config, text_config=language.config if loaded else language,
                image_token_index=image, image_seq_length=side**2, vision_feature_layer=LAYER,
                vision_feature_select_strategy=selects(vision),
            )
        )  # fmt: skip
    if loaded:
        model.model.language_model.load_state_dict(language.base_model.state_dict())
        model.lm_head.load_state_dict(language.get_output_embeddings().state_dict())
    model.model.vision_tower = vision.requires_grad_(False).eval()
    return model


class PatchTokens:
    """The patch tokens [B, N, width] of images by their numbers, `tokens[[3, 5]]`, as the language model reads them.

    The tower is frozen, so they are computed once if those of all images fit into KEPT bytes, else when asked for.
    """

    def __init__(
        self, vision: PreTrainedModel, pixels: Callable[[list[int]], torch.Tensor], images: int, rows: int,
        precision: str = "float32",
    ) -> None:  # fmt: skip
        """pixels: of images by their numbers, [B, 3, S, S]. rows: images at once."""
        self.vision, self.pixels, self.precision, self.kept = vision, pixels, precision, None
        config = vision.config
        if 4 * images * (config.image_size // config.patch_size) ** 2 * config.hidden_size <= KEPT:
            parts = [list(range(images))[start : start + rows] for start in range(0, images, rows)]
            self.kept = torch.cat([self._computed(part).cpu() for part in progress(parts, "patch tokens")])

    def __getitem__(self, numbers: list[int]) -> torch.Tensor:
        return self._computed(numbers) if self.kept is None else self.kept[numbers]

    @torch.no_grad()
    def _computed(self, numbers: list[int]) -> torch.Tensor:
        device = self.vision.device
        with autocast(device, self.precision):
            states = self.vision(self.pixels(numbers).to(device), output_hidden_states=True).hidden_states
        return states[LAYER][:, 1 if selects(self.vision) == "default" else 0 :].float()


def selects(vision: PreTrainedModel) -> str:
    """Which of the tower's tokens LLaVA reads, by its own name: all but the class token, if there is one."""
    return "full" if vision.config.model_type.startswith("siglip") else "default"


class Encoded(NamedTuple):
    """Texts, int64 [B, L]: ids; labels, NOT_ASKED where no answer is; there, 0 where it is padded."""

    ids: torch.Tensor
    labels: torch.Tensor
    there: torch.Tensor

    def part(self, rows: Sequence[int]) -> "Encoded":
        length = int(self.there[rows].sum(1).max())
        return Encoded(*(tensor[rows, :length] for tensor in self))


@dataclass(frozen=True)
class Llava:
    """A model and how it computes. context: tokens of an image and its text at most. rows: texts at once on a device.

    precision: of the computation, by autocast; the weights are float32.
    """

    model: LlavaForConditionalGeneration
    tok: PreTrainedTokenizerFast
    context: int
    rows: int
    processes: PartialState
    precision: str = "float32"

    def encode(self, texts: Sequence[Sequence[tuple[str, str]]], cut: bool = False) -> Encoded:
        """Turns of questions and answers behind an image. Only answers, with the end token of each, have labels.

        cut: at `context` tokens. Raises UserError for words that the tokenizer does not know, for the image token in a
        text and, if it is not to be cut, for a text that is too long.
        """
        tok, image = self.tok, self.model.config.image_token_index
        start = [] if tok.bos_token_id is None else [tok.bos_token_id]
        head = [*start, *[image] * self.model.config.image_seq_length]
        pieces = [piece for turns in texts for question, answer in turns for piece in (question, f" {answer}")]
        found = iter(tok(pieces, add_special_tokens=False).input_ids)
        rows, answers = [], []
        for turns in texts:
            ids, labels = [*head], [NOT_ASKED] * len(head)
            for question, answer in turns:
                asked, told = next(found), next(found)
                if image in asked + told or (tok.unk_token_id is not None and tok.unk_token_id in asked + told):
                    raise UserError(
                        f"'{question} {answer}' has <image>, or words that no question of the train split has. Make "
                        "the sets again."
                    )
                ids += [*asked, *told, tok.eos_token_id]
                labels += [*[NOT_ASKED] * len(asked), *told, tok.eos_token_id]
            if len(ids) > self.context and not cut:
                raise UserError(
                    f"'{turns[0][0]} {turns[0][1]}' with its image takes {len(ids)} tokens, but mllm.context is "
                    f"{self.context}. Raise mllm.context, or shorten the question."
                )
            rows.append(torch.tensor(ids[: self.context]))
            answers.append(torch.tensor(labels[: self.context]))
        padded = partial(pad_sequence, batch_first=True)
        return Encoded(
            padded(rows, padding_value=tok.pad_token_id),
            padded(answers, padding_value=NOT_ASKED),
            padded([torch.ones_like(ids) for ids in rows]),
        )

    def likelihood(self, tokens_BNW: torch.Tensor, e: Encoded) -> torch.Tensor:
        """Log-likelihood of each row's labels, [B]."""
        model, device = self.model, self.model.device
        ids, targets, there = e.ids.to(device), e.labels[:, 1:].to(device), e.there.to(device)
        first = 0 if self.tok.bos_token_id is None else 1
        with autocast(device, self.precision):
            image = model.model.multi_modal_projector(tokens_BNW.to(device))
            text = model.get_input_embeddings()(ids)
            read = torch.cat([text[:, :first], image.to(text.dtype), text[:, first + image.shape[1] :]], 1)
            hidden = model.model.language_model(
                inputs_embeds=read, attention_mask=there, use_cache=False
            ).last_hidden_state
            if device.type == "cpu" and ids.numel() * model.config.text_config.vocab_size <= LOGITS:
                logits = model.lm_head(hidden)[:, :-1].transpose(1, 2)
                return -F.cross_entropy(logits, targets, ignore_index=NOT_ASKED, reduction="none").sum(1)
            asked = targets != NOT_ASKED  # a fraction, which a GPU has room for; its NLLLoss is not deterministic
            logits = model.lm_head(hidden[:, :-1][asked]).float()
        found = logits.log_softmax(-1).gather(1, targets[asked][:, None])[:, 0]
        return found.new_zeros(len(ids)).index_add(0, asked.nonzero()[:, 0], found)

    @torch.no_grad()
    def answers(self, questions: list[Choice], tokens: PatchTokens, prompt: str) -> list[bool]:
        """Whether the likeliest option of each question is the right one; of equally likely ones the first is chosen.

        Processes share the questions; all of them get all answers.
        """
        self.model.eval()
        own = list(range(len(questions)))[self.processes.process_index :: self.processes.num_processes]
        asked = [(questions[i], option) for i in own for option in questions[i].options]
        found = list[float]()
        for start in progress(range(0, len(asked), self.rows), "options"):
            part = asked[start : start + self.rows]
            e = self.encode([[(prompted(prompt, q.text), option)] for q, option in part])
            found += self.likelihood(tokens[[q.image for q, _ in part]], e).tolist()
        right, start = list[tuple[int, bool]](), 0
        for i in own:
            of_options = found[start : start + len(questions[i].options)]
            right.append((i, of_options.index(max(of_options)) == questions[i].answer))
            start += len(of_options)
        return [each for _, each in sorted(gather_object(right))]

    def check(self, questions: list[Choice], prompt: str) -> None:
        """Raises UserError for a question that could not be asked."""
        for q in questions:
            self.encode([[(prompted(prompt, q.text), option)] for option in q.options])


def _trainable(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Projector and language model, by name."""
    return {name: each for name, each in model.named_parameters() if "vision_tower" not in name}


def prompted(prompt: str, question: str) -> str:
    return prompt.replace("{question}", question)


def chat_template(prompt: str) -> str:
    """One question and its answer, as they were learnt: nothing between the image and the prompt.

    A message is a text, in which lmms-eval writes `<image>` and a line break first, or a list of parts.
    """
    before, _, after = prompt.partition("{question}")
    return (
        "{% for message in messages %}{% set text = message.content if message.content is string else "
        "message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}"
        "{% if message.role == 'user' %}"
        f"{{{{ (bos_token or '') + '<image>' + {before!r} + text.replace('<image>', '').strip() + {after!r} }}}}"
        "{% else %}{{ ' ' + text + eos_token }}{% endif %}{% endfor %}"
    )


def save(llava: Llava, image_processor: Any, prompt: str, folder: Path) -> None:
    """Write a folder of transformers: LlavaForConditionalGeneration, LlavaProcessor and the prompt as a template."""
    llava.model.save_pretrained(folder)
    vision = llava.model.model.vision_tower
    LlavaProcessor(
        image_processor, llava.tok, patch_size=vision.config.patch_size,
        vision_feature_select_strategy=selects(vision), num_additional_image_tokens=int(selects(vision) == "default"),
        chat_template=chat_template(prompt),
    ).save_pretrained(folder)  # fmt: skip


class Fit:
    """One phase of training on the answers of conversations, a step at a time, by all processes together."""

    def __init__(
        self, llava: Llava, trained: str, steps: int, lr: float, warmup_ratio: float, weight_decay: float
    ) -> None:
        """trained: projector, or projector_and_language."""
        self.llava, self.model = llava, llava.model.train()
        part = "multi_modal_projector" if trained == "projector" else ""
        self.parameters = {name: each for name, each in _trainable(self.model).items() if part in name}
        for name, parameter in _trainable(self.model).items():
            parameter.requires_grad_(name in self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps=steps + 1, pct_start=warmup_ratio
        )

    def step(self, chosen: list[Conversation], tokens: PatchTokens, prompt: str) -> float:
        """One step; returns the mean loss of an answer's token. Raises UserError for a loss that is no number."""
        processes, rows = self.llava.processes, self.llava.rows
        e = self.llava.encode([[(prompted(prompt, q), a) for q, a in c.turns] for c in chosen], cut=True)
        asked = (e.labels != NOT_ASKED).sum().clamp(min=1)
        own = list(range(len(chosen)))[processes.process_index :: processes.num_processes]
        total = torch.zeros((), device=self.model.device)
        self.optimizer.zero_grad()
        for part in (own[start : start + rows] for start in range(0, len(own), rows)):
            loss = -self.llava.likelihood(tokens[[chosen[i].image for i in part]], e.part(part)).sum() / asked
            loss.backward()
            total += loss.detach()
        if processes.num_processes > 1:
            for parameter in self.parameters.values():
                parameter.grad = reduce(parameter.grad, "sum")
            total = reduce(total, "sum")
        found = float(total)
        if not math.isfinite(found):
            raise UserError(f"the language model's loss became {found}. Lower lr of mllm.phases, or use float32.")
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Projector and language model, and the optimizer's state."""
        found = _trainable(self.model)
        for name, parameter in self.parameters.items():
            found |= {f"{name}:{key}": value for key, value in self.optimizer.state[parameter].items()}
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        """Take up what `tensors` gave after so many steps."""
        for name, parameter in _trainable(self.model).items():
            parameter.copy_(tensors[name])
        for name, parameter in self.parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"{name}:{key}"]
                self.optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer has not gone these steps
            for _ in range(steps):
                self.schedule.step()
