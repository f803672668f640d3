"""The losses, a class each. An entry with the class's `name` in a recipe's `losses` gives its weight and settings.

A loss is called with what the step has made (`Made`) and returns means over the images: [draws], a value for each noise
draw, or a scalar if it does not use draws. Its attributes say what it needs beyond the images themselves.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.diva.feedback import Feedback
from pipeline.diva.rules import STRICT


@dataclass(frozen=True)
class Given:
    """What losses are given before training: the parts of CLIP, as they were, and what teaches.

    embed: texts to embeddings [N, D] of the text tower. logit_scale: CLIP's. condition: texts to conditions [N, T, D]
    of the denoiser. captions: of the first images, each once. encoder: images as uint8 [B, 3, H, W] to embeddings
    [B, E] of the frozen image encoder.
    """

    tower: nn.Module
    embed: Callable[[list[str]], torch.Tensor]
    logit_scale: float
    condition: Callable[[list[str]], torch.Tensor]
    captions: list[str]
    encoder: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class Made:
    """What a step makes of B images and K draws; draws follow each other in the tensors of KB.

    images_BCHW: uint8, what the denoiser restores. shown_BCHW: the tower's pixels. view_BCHW: those of a second crop.
    caption_BD: of the images, by the text tower. conditions: [B, T, D] for each draw. wanted_KBChw: the denoiser's
    target. predicted_KBChw: its prediction. What no loss needs is None.
    """

    feedback: Feedback
    images_BCHW: torch.Tensor
    shown_BCHW: torch.Tensor
    view_BCHW: torch.Tensor | None
    caption_BD: torch.Tensor | None
    pooled_BD: torch.Tensor | None
    positions: list[torch.Tensor | None]
    conditions: list[torch.Tensor]
    noised_KBChw: torch.Tensor | None
    timestep_KB: torch.Tensor
    wanted_KBChw: torch.Tensor | None
    predicted_KBChw: torch.Tensor | None

    def predict(self, conditions: list[torch.Tensor]) -> torch.Tensor:
        """The denoiser's prediction under other conditions, float32.

        It is computed again in the backward pass (gradient checkpointing), because the activations of one prediction
        fill a GPU.
        """
        given = self.noised_KBChw, self.timestep_KB, torch.cat(conditions)
        return checkpoint(self.feedback.denoiser, *given, use_reentrant=False, preserve_rng_state=False).float()


def between(low: float, high: float = math.inf) -> Any:
    """A setting above `low`, which is out of range, and at most `high`. Without it a number is above 0."""
    return field(metadata={"range": (low, high)})


@dataclass
class Loss:
    """weight: of this term in the sum that is minimised.

    name: of its entry and curves. What it needs: denoises, noised images; conditions, those that the tower's tokens
    make; predicts, the denoiser's prediction under them; second_view, a second crop of each image, of at least this
    share of the area (0: none); images, so many in a micro-batch, which it compares with each
    other if they are several; captioned, the captions of the images; bank, so many captions of the first images;
    encodes, the frozen image encoder.
    """

    __pydantic_config__: ClassVar = STRICT

    weight: float
    name: ClassVar[str]
    denoises: ClassVar[bool] = False
    conditions: ClassVar[bool] = False
    predicts: ClassVar[bool] = False
    second_view: ClassVar[float] = 0.0
    images: ClassVar[int] = 1
    captioned: ClassVar[bool] = False
    bank: ClassVar[int] = 0
    encodes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range, and for an empty list."""
        for setting in fields(self):
            value, (low, high) = getattr(self, setting.name), setting.metadata.get("range", (0.0, math.inf))
            if isinstance(value, list) and not value:
                raise ValueError(f"{setting.name} is empty. Name some")
            if isinstance(value, int | float) and not low < value <= high:
                most = f" and at most {high:g}" if high < math.inf else ""
                raise ValueError(f"{setting.name} is {value}, wanted a number above {low:g}{most}")

    def prepare(self, given: Given) -> None:
        """Called before training."""

    def __call__(self, made: Made) -> torch.Tensor:
        raise NotImplementedError


@dataclass
class Denoise(Loss):
    """Squared error of the prediction."""

    name = "denoise"
    denoises = conditions = predicts = True

    def __call__(self, made: Made) -> torch.Tensor:
        assert made.predicted_KBChw is not None
        assert made.wanted_KBChw is not None
        squared = F.mse_loss(made.predicted_KBChw, made.wanted_KBChw, reduction="none")
        return squared.flatten(1).mean(1).view(len(made.conditions), -1).mean(1)


@dataclass
class InfoNCE(Loss):
    """InfoNCE between predictions of the denoiser. Positives: the target, and the prediction under the condition of a
    second view of the image. Negatives: the predictions under the conditions of other images of the micro-batch."""

    temperature: float
    negatives: int
    view: float = between(0, 1)
    name = "info_nce"
    denoises = conditions = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.second_view, self.images = self.view, self.negatives + 1  # type: ignore[misc]

    def __call__(self, made: Made) -> torch.Tensor:
        assert made.view_BCHW is not None
        assert made.wanted_KBChw is not None
        pooled_BD, patches_BND = made.feedback.tower(made.view_BCHW)
        other = [made.feedback.condition(pooled_BD, patches_BND, positions) for positions in made.positions]
        turned = ([own.roll(k, 0) for own in made.conditions] for k in range(1, self.negatives + 1))
        own_BX, view_BX, *other_BX = (made.predict(each).flatten(1) for each in (made.conditions, other, *turned))
        positives = torch.stack([made.wanted_KBChw.flatten(1), view_BX])
        losses = info_nce(own_BX, positives, torch.stack(other_BX), self.temperature)
        return losses.view(len(made.conditions), -1).mean(1)


class Frozen:
    """The tower as it was before training, and how similar it finds texts."""

    def __init__(self, given: Given, texts: list[str]) -> None:
        self.tower, self.logit_scale = copy.deepcopy(given.tower), given.logit_scale
        self.text_PD = F.normalize(given.embed(texts), dim=-1)

    def logits(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """[B, P], of any tower's embeddings."""
        return self.logit_scale * F.normalize(pooled_BD.float(), dim=-1) @ self.text_PD.T

    @torch.no_grad()
    def own_logits(self, shown_BCHW: torch.Tensor) -> torch.Tensor:
        return self.logits(self.tower(shown_BCHW)[0])


def divergence(logits_BP: torch.Tensor, wanted_BP: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of softmax(logits) from softmax(wanted), nats."""
    return F.kl_div(logits_BP.log_softmax(-1), wanted_BP.log_softmax(-1), reduction="batchmean", log_target=True)


@dataclass
class SelfDistillation(Loss):
    """Mean Kullback-Leibler divergence, in nats, of the tower's softmax over a bank of prompts from the original's."""

    prompts: list[str]
    name = "self_distillation"

    def prepare(self, given: Given) -> None:
        self.original = Frozen(given, self.prompts)

    def __call__(self, made: Made) -> torch.Tensor:
        assert made.pooled_BD is not None, "conditioned on captions, so there is no embedding to be kept"
        return divergence(self.original.logits(made.pooled_BD), self.original.own_logits(made.shown_BCHW))


@dataclass
class Reranking(Loss):
    """Distillation of the denoiser's reranking of captions. Ours.

    The candidates of an image are those captions of a bank that the tower finds most similar. Their posterior is the
    original tower's softmax times the denoiser's likelihood, exp(-evidence x squared error) under the caption, with
    the same noise for all of them. The loss is the mean Kullback-Leibler divergence of the tower's softmax from the
    posterior, nats. Where the denoiser tells no difference, the original is kept.

    captions: of the bank. candidates: of an image. evidence: nats for a unit of mean squared error.
    """

    captions: int
    candidates: int = between(1)
    evidence: float = between(0)
    name = "reranking"
    denoises = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bank = self.captions  # type: ignore[misc]

    def prepare(self, given: Given) -> None:
        captions = given.captions[: self.captions]
        self.original, self.condition_PTD = Frozen(given, captions), given.condition(captions)

    def __call__(self, made: Made) -> torch.Tensor:
        assert made.pooled_BD is not None
        logits_BP = self.original.logits(made.pooled_BD)
        likely_BC = logits_BP.topk(min(self.candidates, len(self.condition_PTD)), sorted=False).indices
        posterior_BC = self.original.own_logits(made.shown_BCHW).gather(1, likely_BC) - self.evidence * torch.stack(
            [self.error(made, likely_B) for likely_B in likely_BC.T], 1
        )
        return divergence(logits_BP.gather(1, likely_BC), posterior_BC)

    @torch.no_grad()
    def error(self, made: Made, caption_B: torch.Tensor) -> torch.Tensor:
        """The denoiser's squared error under a caption for each image, mean over draws, [B]."""
        assert made.noised_KBChw is not None
        assert made.wanted_KBChw is not None
        draws = len(made.noised_KBChw) // len(caption_B)
        condition_KBTD = self.condition_PTD[caption_B].repeat(draws, 1, 1)
        predicted = made.feedback.denoiser(made.noised_KBChw, made.timestep_KB, condition_KBTD).float()
        squared = F.mse_loss(predicted, made.wanted_KBChw, reduction="none")
        return squared.flatten(1).mean(1).view(draws, -1).mean(0)


@dataclass
class CaptionContrast(Loss):
    """InfoNCE of an image's own caption against a bank of captions, as in ComCLIP; no denoiser.

    captions: of the bank; those that say the same as the image's own are left out.
    """

    captions: int
    temperature: float
    name = "caption_contrast"
    captioned = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bank = self.captions  # type: ignore[misc]

    def prepare(self, given: Given) -> None:
        self.text_PD = F.normalize(given.embed(given.captions[: self.captions]), dim=-1)

    def __call__(self, made: Made) -> torch.Tensor:
        assert made.pooled_BD is not None
        assert made.caption_BD is not None
        image_BD, own_BD = (F.normalize(each.float(), dim=-1) for each in (made.pooled_BD, made.caption_BD))
        others_BP = image_BD @ self.text_PD.T / self.temperature
        others_BP = others_BP.masked_fill(own_BD @ self.text_PD.T > 1 - 1e-5, -torch.inf)
        own_B = (image_BD * own_BD).sum(1) / self.temperature
        return (torch.logaddexp(own_B, others_BP.logsumexp(1)) - own_B).mean()


@dataclass
class KeepEmbedding(Loss):
    """Squared distance of the unit embedding from the original tower's."""

    name = "keep_embedding"

    def prepare(self, given: Given) -> None:
        self.original = copy.deepcopy(given.tower)

    def __call__(self, made: Made) -> torch.Tensor:
        assert made.pooled_BD is not None
        with torch.no_grad():
            before_BD = self.original(made.shown_BCHW)[0]
        now_BD, before_BD = (F.normalize(each.float(), dim=-1) for each in (made.pooled_BD, before_BD))
        return (now_BD - before_BD).square().sum(1).mean()


@dataclass
class Kernel(Loss):
    """Squared difference of two kernel matrices of the micro-batch, the tower's and the frozen image encoder's, as in
    KUEA; no denoiser. A kernel is ((x y + offset) / (1 + offset)) ^ degree of unit embeddings x, y."""

    degree: int
    offset: float = between(-1)
    name = "kernel"
    images = 2
    encodes = True

    def prepare(self, given: Given) -> None:
        assert given.encoder
        self.encoder = given.encoder

    def __call__(self, made: Made) -> torch.Tensor:
        assert made.pooled_BD is not None
        with torch.no_grad():
            wanted_BB = self.kernel(self.encoder(made.images_BCHW))
        own_BB = self.kernel(made.pooled_BD)
        others = ~torch.eye(len(own_BB), dtype=torch.bool, device=own_BB.device)
        return (own_BB - wanted_BB)[others].square().mean()

    def kernel(self, embedding_BD: torch.Tensor) -> torch.Tensor:
        unit_BD = F.normalize(embedding_BD.float(), dim=-1)
        return ((unit_BD @ unit_BD.T + self.offset) / (1 + self.offset)) ** self.degree


def info_nce(
    predicted_BX: torch.Tensor, positive_PBX: torch.Tensor, negative_NBX: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Each image's mean over positives of -log(positive / (positive + negatives)), [B], by cosine similarity."""
    positive_PB = F.cosine_similarity(predicted_BX[None], positive_PBX, dim=-1) / temperature
    negative_NB = F.cosine_similarity(predicted_BX[None], negative_NBX, dim=-1) / temperature
    both_PB = torch.logaddexp(positive_PB, negative_NB.logsumexp(0))
    return (both_PB - positive_PB).mean(0)


def known() -> dict[str, type[Loss]]:
    """Every loss by its name."""
    return {loss.name: loss for loss in Loss.__subclasses__()}
