"""The feedback: how well a frozen denoiser restores an image when the image tower tells it what is there."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.diva.condition import TokenRule, condition, recap
from pipeline.diva.diffusion import Draw, Prediction, add_noise, target
from pipeline.diva.gap import GapRemoved


class Tower(Protocol):
    """An image tower, of which a recipe trains all or a part."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def image_tokens(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(pooled [B, D], patches [B, N, D])"""
        ...


class Denoiser(Protocol):
    """A denoiser in the latent space, frozen but where a recipe fits `unet`, which predicts, with the projection."""

    unet: nn.Module
    alphas_cumprod: torch.Tensor
    prediction_type: Prediction

    def __call__(
        self, noised_BChw: torch.Tensor, timestep_B: torch.Tensor, condition_BTD: torch.Tensor
    ) -> torch.Tensor: ...


class Anchor(nn.Module):
    """Keeps what pictures are like among a bank of prompts: the tower's similarities shall be the original's."""

    def __init__(self, original: Tower, prompt_PD: torch.Tensor, logit_scale: float) -> None:
        """original: the tower before training, of which a copy is kept; logit_scale: CLIP's own."""
        super().__init__()
        self.original = copy.deepcopy(original)
        self.register_buffer("prompt_PD", F.normalize(prompt_PD, dim=-1), persistent=False)
        self.logit_scale = logit_scale

    def _log_similarity(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        logits_BP = self.logit_scale * F.normalize(pooled_BD.float(), dim=-1) @ self.prompt_PD.T
        return logits_BP.log_softmax(-1)

    def forward(self, pixels_BCHW: torch.Tensor, pooled_BD: torch.Tensor) -> torch.Tensor:
        """Mean Kullback-Leibler divergence of the tower's softmax over the prompts from the original's, in nats."""
        with torch.no_grad():
            original_BP = self._log_similarity(self.original.image_tokens(pixels_BCHW)[0])
        return F.kl_div(self._log_similarity(pooled_BD), original_BP, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Contrast:
    """A contrast between predictions: softmax temperature, and how many other images' conditions are the negatives."""

    temperature: float
    negatives: int


def info_nce(
    predicted_BX: torch.Tensor, positive_PBX: torch.Tensor, negative_NBX: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Each image's mean over positives of -log(positive / (positive + negatives)), [B], by cosine similarity."""
    positive_PB = F.cosine_similarity(predicted_BX[None], positive_PBX, dim=-1) / temperature
    negative_NB = F.cosine_similarity(predicted_BX[None], negative_NBX, dim=-1) / temperature
    both_PB = torch.logaddexp(positive_PB, negative_NB.logsumexp(0))
    return (both_PB - positive_PB).mean(0)


class Feedback(nn.Module):
    """Image tower, the fresh linear layer after it ("visual projection"), and the frozen denoiser that judges them."""

    def __init__(
        self,
        tower: Tower,
        projection: nn.Linear,
        denoiser: Denoiser,
        text_1LD: torch.Tensor,
        tokens: TokenRule,
        text_rule: Literal["sequence", "mean"],
        gap: GapRemoved | None = None,
        contrast: Contrast | None = None,
        anchor: Anchor | None = None,
        fits_denoiser: bool = False,
    ) -> None:
        """gap: the map before the projection; contrast, anchor: parts of the loss, which `forward` is asked for;
        fits_denoiser: whether the denoiser is fitted with the projection, and so belongs to what a run changes."""
        super().__init__()
        self.fits_denoiser = fits_denoiser
        self.gap, self.contrast, self.anchor = gap, contrast, anchor
        self.tower, self.projection, self.denoiser = tower, projection, denoiser
        self.register_buffer("text_1LD", text_1LD, persistent=False)
        self.tokens, self.text_rule = tokens, text_rule

    def condition(
        self, pooled_BD: torch.Tensor, patches_BND: torch.Tensor, positions_BK: torch.Tensor | None
    ) -> torch.Tensor:
        tokens_BTD = recap(pooled_BD, patches_BND, self.tokens, positions_BK)
        return self._told(self.gap(tokens_BTD) if self.gap else tokens_BTD)

    def told_of_text(self, text_BD: torch.Tensor) -> torch.Tensor:
        """The condition that embeddings of the text tower make, in the place of the image tower's."""
        return self._told((self.gap.text(text_BD) if self.gap else text_BD)[:, None])

    def _told(self, tokens_BTD: torch.Tensor) -> torch.Tensor:
        return condition(self.text_1LD, self.projection(tokens_BTD), self.text_rule)

    def forward(
        self,
        pixels_BCHW: torch.Tensor,
        latent_BChw: torch.Tensor,
        draws: list[Draw],
        caption_BD: torch.Tensor | None = None,
        view_BCHW: torch.Tensor | None = None,
        anchored: bool = False,
    ) -> torch.Tensor:
        """Mean squared error of each draw, [draws]; [draws + 1] where it is anchored, with the anchor's divergence.

        caption_BD: embeddings of captions, which the denoiser is told in the tokens' place. view_BCHW: another view of
        the images; each draw's error is then replaced by the contrast between predictions, whose positives are the
        target and the prediction under the view's condition, and whose negatives are those under other images'.

        The published code runs tower and UNet once for each draw. The tower is deterministic, so one run serves all
        draws, and their gradients meet at its tokens; the UNet sees all draws as one batch.
        """
        if caption_BD is None:
            pooled_BD, patches_BND = self.tower.image_tokens(pixels_BCHW)
            conditions = [self.condition(pooled_BD, patches_BND, draw.positions_BK) for draw in draws]
        else:
            conditions = [self.told_of_text(caption_BD)] * len(draws)
        t_B, noise = (torch.cat(parts) for parts in ([d.timestep_B for d in draws], [d.noise_BChw for d in draws]))
        latent, alphas = latent_BChw.repeat(len(draws), 1, 1, 1), self.denoiser.alphas_cumprod
        noised = add_noise(latent, noise, t_B, alphas)
        wanted = target(latent, noise, t_B, alphas, self.denoiser.prediction_type)
        if view_BCHW is None:
            predicted = self.denoiser(noised, t_B, torch.cat(conditions)).float()
            losses = F.mse_loss(predicted, wanted, reduction="none").flatten(1).mean(1)
        else:
            losses = self._contrasts(noised, t_B, wanted, conditions, view_BCHW, draws)
        losses = losses.view(len(draws), -1).mean(1)
        if not anchored:
            return losses
        assert self.anchor is not None, "anchored: feedback without an anchor"
        assert caption_BD is None, "anchored: told captions, so there is no embedding to be kept"
        return torch.cat([losses, self.anchor(pixels_BCHW, pooled_BD)[None]])

    def _contrasts(
        self,
        noised: torch.Tensor,
        t_B: torch.Tensor,
        wanted: torch.Tensor,
        conditions: list[torch.Tensor],
        view_BCHW: torch.Tensor,
        draws: list[Draw],
    ) -> torch.Tensor:
        """The contrast of each image in each draw, [draws x B]. Raises ValueError where others are too few.

        The loss needs all predictions at once, but what autograd keeps of one of them fills a GPU: so each is made
        again when its gradient is taken, and the memory is that of one, whatever the number of negatives.
        """
        assert self.contrast is not None, "another view: feedback without a contrast"
        others = self.contrast.negatives
        if others >= len(view_BCHW):
            raise ValueError(f"{others} negatives among {len(view_BCHW)} images: raise micro_batch, or lower negatives")
        viewed = self.tower.image_tokens(view_BCHW)
        told = [torch.cat(conditions), torch.cat([self.condition(*viewed, draw.positions_BK) for draw in draws])]
        told += [torch.cat([own.roll(k, 0) for own in conditions]) for k in range(1, others + 1)]
        own_BX, view_BX, *other_BX = (
            checkpoint(self.denoiser, noised, t_B, one, use_reentrant=False, preserve_rng_state=False)
            .float()
            .flatten(1)
            for one in told
        )
        positives = torch.stack([wanted.flatten(1), view_BX])
        return info_nce(own_BX, positives, torch.stack(other_BX), self.contrast.temperature)
