"""LLaVA in miniature: a frozen image tower, a projector of two layers and a small language model, by transformers.

    <start> <image> x N question option <end>

The language model reads the patch tokens of the tower's last layer but one, as LLaVA-1.5 does. It learns the right
options. Its answer to a question is the option with the highest likelihood; nothing is sampled.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pipeline.benchmarks.questions import Choice
from pipeline.core.compute import generator, seeded
from pipeline.core.stages import UserError, progress

SPECIAL = ("<pad>", "<start>", "<end>", "<image>")
NOT_ASKED = -100  # labels that have no loss, in transformers


def tokenizer(questions: list[Choice]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of these questions and their options."""
    words = sorted({word for q in questions for text in (q.text, *q.options) for word in text.split()} - {*SPECIAL})
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def new(
    vision: PreTrainedModel, language: dict, tok: PreTrainedTokenizerFast, seed: int
) -> LlavaForConditionalGeneration:
    """A LLaVA with `vision` as its frozen tower; projector and language model are initialised from a seed.

    Raises UserError for a tokenizer without image token, start or end, or with more entries than the language model.
    """
    image, entries = tok.convert_tokens_to_ids("<image>"), len(tok)
    if image in (None, tok.unk_token_id) or tok.eos_token_id is None or tok.bos_token_id is None:
        raise UserError(f"the language model's tokenizer lacks one of {', '.join(SPECIAL)}. Choose another.")
    wanted = language.get("vocab_size", entries)
    if wanted < entries:
        raise UserError(
            f"mllm.language.vocab_size is {wanted}, but the tokenizer has {entries} entries. Raise vocab_size, or "
            "leave it out of params.yaml."
        )
    side = vision.config.image_size // vision.config.patch_size
    with seeded("mllm", seed):
        text = LlamaConfig(
            **{"vocab_size": entries, **language}, pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
        )  # fmt: skip
        select = "full" if vision.config.model_type.startswith("siglip") else "default"  # without the class token
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision.config, text_config=text, image_token_index=image, image_seq_length=side**2,
                vision_feature_layer=-2, vision_feature_select_strategy=select,
            )
        )  # fmt: skip
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.vision_tower.requires_grad_(False)
    return model


@torch.no_grad()
def patch_tokens(
    model: LlavaForConditionalGeneration, pixels_ICHW: torch.Tensor, batch: int, compute: torch.device
) -> torch.Tensor:
    """The patch tokens of images [I, 3, S, S] that the language model reads, [I, N, width]. The tower is frozen, so
    they are computed once."""
    tower, first = model.model.vision_tower.to(compute).eval(), model.config.vision_feature_select_strategy == "default"
    parts = []
    for pixels in progress(pixels_ICHW.split(batch), "patch tokens", total=-(-len(pixels_ICHW) // batch)):
        states = tower(pixels.to(compute), output_hidden_states=True).hidden_states
        parts.append(states[model.config.vision_feature_layer][:, int(first) :].cpu())
    return torch.cat(parts)


def encode(
    tok: PreTrainedTokenizerFast, asked: list[tuple[str, str]], image_tokens: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), int64 [B, L], of questions with an option each. Only the option and the end token have labels.

    Raises UserError for words that the tokenizer does not know, and for more than `context` tokens.
    """
    rows = []
    for question, option in asked:
        ids = [tok.convert_tokens_to_ids(tok.tokenize(text)) for text in (question, option)]
        if tok.unk_token_id in ids[0] + ids[1]:
            raise UserError(
                f"'{question} {option}' has words that no question of the train split has. Make the sets again."
            )
        before = [tok.bos_token_id, *[tok.convert_tokens_to_ids("<image>")] * image_tokens, *ids[0]]
        rows.append((before, [*ids[1], tok.eos_token_id]))
        if sum(map(len, rows[-1])) > context:
            raise UserError(
                f"'{question} {option}' with its image takes {sum(map(len, rows[-1]))} tokens, but mllm.context is "
                f"{context}. Raise mllm.context, or shorten the question."
            )
    length = max(len(before) + len(after) for before, after in rows)
    ids, labels = torch.full((len(rows), length), tok.pad_token_id), torch.full((len(rows), length), NOT_ASKED)
    for i, (before, after) in enumerate(rows):
        ids[i, : len(before) + len(after)] = torch.tensor(before + after)
        labels[i, len(before) : len(before) + len(after)] = torch.tensor(after)
    return ids, labels


def fit(
    model: LlavaForConditionalGeneration, tok: PreTrainedTokenizerFast, tokens: torch.Tensor, questions: list[Choice],
    steps: int, batch: int, lr: float, context: int, seed: int,
) -> list[float]:  # fmt: skip
    """Train projector and language model on the right options; tokens [images, N, width]. Returns every step's loss.

    The order of the questions is a function of the seed alone, so it is the same for every tower.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.1)
    draws, losses = generator("mllm", seed, "questions"), list[float]()
    model.train()
    for _ in progress(range(steps), f"language model, seed {seed}"):
        chosen = [questions[i] for i in torch.randint(len(questions), (batch,), generator=draws).tolist()]
        asked = [(q.text, q.options[q.answer]) for q in chosen]
        ids, labels = encode(tok, asked, model.config.image_seq_length, context)
        loss = -_likelihood(model, tokens[[q.image for q in chosen]], ids, labels).sum() / (labels != NOT_ASKED).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _likelihood(
    model: LlavaForConditionalGeneration, tokens_BNW: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Log-likelihood of each row's labels, [B]."""
    ids, labels = ids.to(model.device), labels.to(model.device)
    projected = model.model.multi_modal_projector(tokens_BNW.to(model.device))
    logits = model(
        input_ids=ids, attention_mask=(ids != model.config.text_config.pad_token_id).long(),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(projected))},
    ).logits  # fmt: skip
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=NOT_ASKED, reduction="none")
    return -losses.sum(1)


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration, tok: PreTrainedTokenizerFast, tokens: torch.Tensor, questions: list[Choice],
    batch: int, context: int,
) -> list[bool]:  # fmt: skip
    """Whether the likeliest option of each question is the right one; of equally likely ones the first is chosen."""
    model.eval()
    asked = [(q, option) for q in questions for option in q.options]
    found = list[float]()
    for start in progress(range(0, len(asked), batch), "options"):
        part = asked[start : start + batch]
        ids, labels = encode(tok, [(q.text, option) for q, option in part], model.config.image_seq_length, context)
        found += _likelihood(model, tokens[[q.image for q, _ in part]], ids, labels).tolist()
    right, start = [], 0
    for q in questions:
        own = found[start : start + len(q.options)]
        right.append(own.index(max(own)) == q.answer)
        start += len(q.options)
    return right
