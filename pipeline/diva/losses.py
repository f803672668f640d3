"""The losses, a class each. An entry with the class's `name` in a recipe's `losses` gives its weight and settings.

A loss is called with what the step has made (`Made`) and returns means over the images: [draws], a value for each noise
draw, or a scalar if it does not use draws. Its attributes say what it needs beyond the images themselves.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.diva.feedback import Feedback, Tower


@dataclass(frozen=True)
class Made:
    """What a step makes of B images and K draws; draws follow each other in the tensors of KB.

    shown_BCHW: the tower's pixels. view_BCHW: those of a second crop. conditions: [B, T, D] for each draw.
    wanted_KBChw: the denoiser's target. predicted_KBChw: its prediction, if a loss needs it.
    """

    feedback: Feedback
    shown_BCHW: torch.Tensor
    view_BCHW: torch.Tensor | None
    pooled_BD: torch.Tensor | None
    positions: list[torch.Tensor | None]
    conditions: list[torch.Tensor]
    noised_KBChw: torch.Tensor
    timestep_KB: torch.Tensor
    wanted_KBChw: torch.Tensor
    predicted_KBChw: torch.Tensor | None

    def predict(self, conditions: list[torch.Tensor]) -> torch.Tensor:
        """The denoiser's prediction under other conditions, float32.

        It is computed again in the backward pass (gradient checkpointing), because the activations of one prediction
        fill a GPU.
        """
        given = self.noised_KBChw, self.timestep_KB, torch.cat(conditions)
        return checkpoint(self.feedback.denoiser, *given, use_reentrant=False, preserve_rng_state=False).float()


@dataclass
class Loss:
    """weight: of this term in the sum that is minimised.

    name: of its entry and curves. predicts: whether it needs `Made.predicted_KBChw`. second_view: the least share of
    the area that a second crop of an image keeps; 0: it needs no second crop. images: how many a micro-batch must have.
    encodes: whether it reads the frozen image encoder.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # unknown settings are refused

    weight: float
    name: ClassVar[str]
    predicts: ClassVar[bool] = False
    second_view: ClassVar[float] = 0.0
    images: ClassVar[int] = 1
    encodes: ClassVar[bool] = False

    def prepare(self, tower: Tower, embed: Callable[[list[str]], torch.Tensor], logit_scale: float) -> None:
        """Called before training. embed: texts to embeddings [texts, D] of CLIP's text tower. logit_scale: CLIP's."""

    def __call__(self, made: Made) -> torch.Tensor:
        raise NotImplementedError


@dataclass
class Denoise(Loss):
    """Squared error of the prediction."""

    name = "denoise"
    predicts = True

    def __call__(self, made: Made) -> torch.Tensor:
        assert made.predicted_KBChw is not None
        squared = F.mse_loss(made.predicted_KBChw, made.wanted_KBChw, reduction="none")
        return squared.flatten(1).mean(1).view(len(made.conditions), -1).mean(1)


@dataclass
class InfoNCE(Loss):
    """InfoNCE between predictions of the denoiser. Positives: the target, and the prediction under the condition of a
    second view of the image. Negatives: the predictions under the conditions of other images of the micro-batch."""

    temperature: float
    negatives: int
    view: float
    name = "info_nce"

    def __post_init__(self) -> None:
        self.second_view, self.images = self.view, self.negatives + 1  # type: ignore[misc]

    def __call__(self, made: Made) -> torch.Tensor:
        assert made.view_BCHW is not None
        viewed = made.feedback.tower(made.view_BCHW)
        other = [made.feedback.condition(*viewed, positions) for positions in made.positions]
        turned = ([own.roll(k, 0) for own in made.conditions] for k in range(1, self.negatives + 1))
        own_BX, view_BX, *other_BX = (made.predict(each).flatten(1) for each in (made.conditions, other, *turned))
        positives = torch.stack([made.wanted_KBChw.flatten(1), view_BX])
        losses = info_nce(own_BX, positives, torch.stack(other_BX), self.temperature)
        return losses.view(len(made.conditions), -1).mean(1)


@dataclass
class SelfDistillation(Loss):
    """Mean Kullback-Leibler divergence, in nats, of the tower's softmax over a bank of prompts from the original's."""

    prompts: list[str]
    name = "self_distillation"

    def prepare(self, tower: Tower, embed: Callable[[list[str]], torch.Tensor], logit_scale: float) -> None:
        self.original, self.logit_scale = copy.deepcopy(tower), logit_scale
        self.prompt_PD = F.normalize(embed(self.prompts), dim=-1)

    def _log_similarity(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        logits_BP = self.logit_scale * F.normalize(pooled_BD.float(), dim=-1) @ self.prompt_PD.T
        return logits_BP.log_softmax(-1)

    def __call__(self, made: Made) -> torch.Tensor:
        assert made.pooled_BD is not None, "conditioned on captions, so there is no embedding to be kept"
        with torch.no_grad():
            original_BP = self._log_similarity(self.original(made.shown_BCHW)[0])
        return F.kl_div(self._log_similarity(made.pooled_BD), original_BP, reduction="batchmean", log_target=True)


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
