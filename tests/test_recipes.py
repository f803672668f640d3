"""The pieces of the recipes, each against its formula, and every recipe through the stages on a shrunken world."""

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, rel_entr
from shrunk import MODELS, read_yaml, run, write_params, write_yaml
from test_training import PIXELS, RULES, both, build, changed, micro_batches, moved, snapshot, train
from torch import nn
from torch.nn import functional as F

from pipeline import drift, export, mmvp, plan, report
from pipeline import encoder as stage_encoder
from pipeline import train as stage_train
from pipeline.core.compute import generator, seeded
from pipeline.diva import adapters
from pipeline.diva.diffusion import draw
from pipeline.diva.feedback import Feedback
from pipeline.diva.gap_correction import GapCorrection
from pipeline.diva.losses import (
    CaptionContrast,
    Denoise,
    Given,
    InfoNCE,
    KeepEmbedding,
    Kernel,
    Loss,
    Reranking,
    SelfDistillation,
    info_nce,
)
from pipeline.diva.rules import TokenRule
from pipeline.diva.step import MicroBatch, terms
from pipeline.engine.assemble import phases
from pipeline.models.backbones import CONFIG, HEAD, PREFIX, Backbone, fresh_head, save_weights, stored_tensors
from pipeline.models.residual_head import ResidualHead, WithHead
from pipeline.sections.recipe import AdamW, Lora


def random(*shape: int, what: str = "random") -> torch.Tensor:
    return torch.randn(*shape, generator=generator("test", what))


# ---------------------------------------------------------------------- the gap


def test_the_gap_map_is_its_formula() -> None:
    """P [(e - mean_image) sd_text / sd_image] + mean_text, in numpy's double precision."""
    images, texts, new = (3 * random(40, 6, what=what) + 1 for what in ("images", "texts", "new"))
    unit = [(x / x.norm(dim=1, keepdim=True)).double().numpy() for x in (images, texts, new)]
    image, text, e = unit
    spread = [np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean()) for x in (image, text)]
    variance, axes = np.linalg.eigh(np.cov((text - text.mean(0)).T))
    axes = axes[:, np.argsort(variance)[::-1][:3]]
    expected = (e - image.mean(0)) * (spread[1] / spread[0]) @ (axes @ axes.T) + text.mean(0)
    gap = GapCorrection(images, texts, components=3)
    np.testing.assert_allclose(gap(new).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(gap(5 * new).numpy(), expected, atol=1e-6)  # the length of an embedding says nothing


def test_with_all_components_text_stays_and_images_get_its_mean_and_spread() -> None:
    images, texts = random(50, 6, what="images") + 2, random(50, 6, what="texts") - 2
    gap = GapCorrection(images, texts, components=6)
    unit = F.normalize(texts, dim=-1)
    torch.testing.assert_close(gap.text(texts), unit, atol=1e-6, rtol=0)
    mapped = gap(images)
    torch.testing.assert_close(mapped.mean(0), unit.mean(0), atol=1e-6, rtol=0)
    spread = [(x - x.mean(0)).square().sum(1).mean() for x in (mapped, unit)]
    assert spread[0] == pytest.approx(spread[1].item(), rel=1e-4)


def test_too_many_components_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"gap_correction\.components is 7, but 50 embeddings of width 6 have 6 at most"
    ):
        GapCorrection(random(50, 6), random(50, 6), components=7)


# ---------------------------------------------------------------------- head, LoRA, anchor


def test_a_fresh_head_changes_nothing_and_a_trained_one_only_the_direction() -> None:
    head, pooled, patches = fresh_head(8, 2, seed=0), 3 * random(5, 8, what="pooled"), random(5, 7, 8, what="patches")
    torch.testing.assert_close(head(pooled, patches), pooled)
    nn.init.normal_(head.mlp[2].weight)
    found = head(pooled, patches)
    assert F.cosine_similarity(found, pooled).max() < 0.99
    torch.testing.assert_close(found.norm(dim=1), pooled.norm(dim=1))
    assert not torch.allclose(head(pooled, patches.roll(1, 0)), found, atol=1e-3)  # it looks at the patches
    torch.testing.assert_close(head(5 * pooled, patches), 5 * found, rtol=1e-3, atol=1e-3)  # a length is no direction


def test_a_head_s_first_gradient_reaches_its_last_layer() -> None:
    head = fresh_head(8, 2, seed=0)
    head(random(5, 8), random(5, 7, 8))[:, 0].sum().backward()
    assert head.mlp[2].weight.grad.any()
    assert not head.mlp[0].weight.grad.any()  # nothing passes a layer of zeros


class Layers(nn.Module):
    """What image towers are made of: an attention with its matrices in one, linear layers, a norm, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 6)
        self.norm, self.patch = nn.LayerNorm(8), nn.Conv1d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.patch(x.transpose(1, 2)).transpose(1, 2))
        return self.linear(self.attention(x, x, x, need_weights=False)[0])


def test_low_rank_adaptation_from_nothing_to_merged() -> None:
    with seeded("test", "layers"):
        layers = Layers()
    plain, x = copy.deepcopy(layers), random(3, 5, 8)
    with seeded("test", "lora"):
        adapters.adapt(layers, rank=2, alpha=6.0)
    assert layers(x).equal(plain(x))
    added = {name: parameter for name, parameter in layers.named_parameters() if ".lora_" in name}
    assert len(added) == 2 * 3  # attention's in and out, and the linear layer
    for name, parameter in added.items():
        nn.init.normal_(parameter, generator=generator("test", name))
    parts = layers.linear.parametrizations.weight[0]
    adapted = layers(x)
    assert not torch.allclose(adapted, plain(x), atol=1e-2)
    adapters.merge(layers)
    torch.testing.assert_close(layers(x), adapted)
    assert snapshot(layers).keys() == snapshot(plain).keys()
    assert moved(snapshot(plain), layers) == {"attention.in_proj_weight", "attention.out_proj.weight", "linear.weight"}
    change = layers.linear.weight - plain.linear.weight
    torch.testing.assert_close(change, 3.0 * parts.lora_up_OR @ parts.lora_down_RI)
    assert torch.linalg.matrix_rank(change, atol=1e-4) == 2


def distillation(tower: nn.Module, prompts: torch.Tensor, weight: float = 1.0) -> SelfDistillation:
    loss = SelfDistillation(weight, prompts=["one", "two", "three", "four"])
    loss.prepare(given(tower, prompts))
    return loss


def given(tower: nn.Module, texts: torch.Tensor, **more: Any) -> Given:
    """texts: embeddings [N, D] of the captions 0, 1, ..., and of as many prompts."""
    captions, conditions = [str(i) for i in range(len(texts))], random(len(texts), 4, 5, what="conditions")

    def first(of: torch.Tensor) -> Callable[[list[str]], torch.Tensor]:
        return lambda asked: of[: len(asked)]

    return Given(tower, first(texts), 7.0, first(conditions), captions, **more)


def unit_rows(x: torch.Tensor) -> np.ndarray:
    return F.normalize(x.detach().double(), dim=-1).numpy()


def move(feedback: Feedback) -> None:
    """Train the tower, as it were."""
    nn.init.normal_(feedback.tower.pool.weight, generator=generator("test", "moved"))


def test_self_distillation_is_the_divergence_from_the_original_and_zero_at_first() -> None:
    feedback, prompts, micro = build(TokenRule("none")), random(4, 6, what="prompts"), micro_batches(0)[0]
    loss, pixels = distillation(feedback.tower, prompts), PIXELS.tower(micro.images_BCHW)
    before, _ = feedback.tower(pixels)
    assert found(feedback, [loss], micro)["self_distillation"].item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        feedback.tower.pool.weight.normal_(generator=generator("test", "moved"))  # the loss has a copy of its own
    now = feedback.tower(pixels)[0]

    def log_share(pooled: torch.Tensor) -> np.ndarray:
        unit, bank = (F.normalize(x.detach().double(), dim=-1).numpy() for x in (pooled, prompts))
        return log_softmax(7 * unit @ bank.T, axis=1)

    expected = rel_entr(np.exp(log_share(before)), np.exp(log_share(now))).sum(1).mean()
    assert expected > 0.1
    assert found(feedback, [loss], micro)["self_distillation"].item() == pytest.approx(expected, rel=1e-5)


def found(feedback: Feedback, losses: list[Loss], micro: MicroBatch) -> dict[str, torch.Tensor]:
    return terms(feedback, losses, micro, torch.float32)


def test_a_term_has_its_weight_and_no_draws_weight() -> None:
    """The step's gradient is that of the draws' and the weight times the divergence's."""
    feedback = build(TokenRule("none"))
    losses = [Denoise(1.0), distillation(feedback.tower, random(4, 6), weight=3.0)]
    nn.init.normal_(feedback.tower.pool.weight, generator=generator("test", "moved"))
    phase = phases(feedback, changed(steps=1, clip_norm=1e9), losses)[1]
    batch = micro_batches(0, TokenRule("none"))
    (record,) = train(feedback, dataclasses.replace(phase, lr=lambda step: 0.0), lambda step: batch)
    gradient = feedback.tower.pool.weight.grad.clone()
    feedback.zero_grad()
    means = []
    for micro in batch:
        denoise, divergence = found(feedback, losses, micro).values()
        (0.5 * ((denoise * torch.tensor([5.0, 1.0])).sum() + 3 * divergence)).backward()
        means.append((denoise.mean().item(), divergence.item()))
    torch.testing.assert_close(gradient, feedback.tower.pool.weight.grad)
    assert list(record.terms.values()) == pytest.approx(np.mean(means, 0).tolist())
    assert record.loss == pytest.approx(np.mean(means, 0) @ [1, 3])


# ---------------------------------------------------------------------- losses without the image's own condition


def test_reranking_is_the_divergence_from_prior_times_likelihood_of_the_likeliest_captions() -> None:
    feedback, texts, micro = build(TokenRule("none")), random(6, 6, what="texts"), micro_batches(0)[0]
    loss = Reranking(1.0, captions=5, candidates=3, evidence=4.0)
    assert (loss.bank, loss.denoises, loss.conditions) == (5, True, False)
    loss.prepare(given(feedback.tower, texts))
    before, _ = feedback.tower(PIXELS.tower(micro.images_BCHW))
    move(feedback)
    now, _ = feedback.tower(PIXELS.tower(micro.images_BCHW))
    conditions, alphas = random(6, 4, 5, what="conditions"), feedback.denoiser.alphas_cumprod
    latent, expected = feedback.denoiser.latent(PIXELS.denoiser(micro.images_BCHW)), []
    for i in range(4):
        own, prior = (7 * unit_rows(pooled)[i] @ unit_rows(texts)[:5].T for pooled in (now, before))
        likely = np.argsort(-own)[:3]
        errors = []
        for caption in likely:
            squared = []
            for one in micro.draws:
                alpha = alphas[one.timestep_B[i]]
                noised = alpha.sqrt() * latent[i : i + 1] + (1 - alpha).sqrt() * one.noise_BChw[i : i + 1]
                predicted = feedback.denoiser(noised, one.timestep_B[i : i + 1], conditions[caption][None])
                squared.append((predicted - one.noise_BChw[i]).square().mean().item())
            errors.append(np.mean(squared))
        posterior = log_softmax(prior[likely] - 4 * np.array(errors))
        expected.append(rel_entr(np.exp(posterior), np.exp(log_softmax(own[likely]))).sum())
    got = found(feedback, [loss], micro)["reranking"]
    assert got.item() == pytest.approx(np.mean(expected), rel=1e-4)
    got.backward()
    assert feedback.tower.pool.weight.grad.any()
    assert feedback.projection.weight.grad is None


def test_where_the_denoiser_tells_no_difference_reranking_keeps_the_original() -> None:
    feedback, micro = build(TokenRule("none")), micro_batches(0)[0]
    nn.init.zeros_(feedback.denoiser.unet.weight)  # which reads the condition
    loss = Reranking(1.0, captions=6, candidates=4, evidence=100.0)
    loss.prepare(given(feedback.tower, random(6, 6)))
    assert found(feedback, [loss], micro)["reranking"].item() == pytest.approx(0.0, abs=1e-5)


def test_caption_contrast_is_info_nce_without_the_captions_that_say_the_same() -> None:
    feedback, texts, plain = build(TokenRule("none")), random(5, 6, what="texts"), micro_batches(0)[0]
    loss = CaptionContrast(1.0, captions=5, temperature=0.2)
    assert (loss.bank, loss.captioned, loss.denoises) == (5, True, False)
    loss.prepare(given(feedback.tower, texts))
    own = torch.cat([3 * texts[:1], random(3, 6, what="own")])  # the first image's caption is in the bank
    pooled, _ = feedback.tower(PIXELS.tower(plain.images_BCHW))
    similar, bank = (unit_rows(pooled) * unit_rows(own)).sum(1) / 0.2, unit_rows(pooled) @ unit_rows(texts).T / 0.2
    expected = [logsumexp([similar[i], *bank[i, i == 0 :]]) - similar[i] for i in range(4)]
    got = found(feedback, [loss], dataclasses.replace(plain, caption_BD=own))["caption_contrast"]
    assert got.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_keep_embedding_is_the_distance_of_unit_embeddings() -> None:
    feedback, micro, loss = build(TokenRule("none")), micro_batches(0)[0], KeepEmbedding(1.0)
    loss.prepare(given(feedback.tower, random(1, 6)))
    before, _ = feedback.tower(PIXELS.tower(micro.images_BCHW))
    move(feedback)
    now, _ = feedback.tower(PIXELS.tower(micro.images_BCHW))
    expected = ((unit_rows(now) - unit_rows(before)) ** 2).sum(1).mean()
    assert found(feedback, [loss], micro)["keep_embedding"].item() == pytest.approx(expected, rel=1e-5)


def test_kernel_is_the_difference_of_the_two_kernel_matrices_beside_their_diagonals() -> None:
    feedback, micro, sharp = build(TokenRule("none")), micro_batches(0)[0], random(4, 3, what="sharp")
    seen: list[torch.Tensor] = []
    loss = Kernel(1.0, degree=3, offset=0.5)
    loss.prepare(given(feedback.tower, random(1, 6), encoder=lambda images: [seen.append(images), sharp][1]))
    pooled, _ = feedback.tower(PIXELS.tower(micro.images_BCHW))
    own, wanted = (((unit_rows(x) @ unit_rows(x).T + 0.5) / 1.5) ** 3 for x in (pooled, sharp))
    expected = ((own - wanted) ** 2)[~np.eye(4, dtype=bool)].mean()
    assert found(feedback, [loss], micro)["kernel"].item() == pytest.approx(expected, rel=1e-5)
    assert seen[0] is micro.images_BCHW  # in the control, those that the tower is not shown


# ---------------------------------------------------------------------- the objective


def test_info_nce_is_its_formula() -> None:
    own, positives, negatives = random(3, 10, what="own"), random(2, 3, 10, what="+"), random(4, 3, 10, what="-")
    found = info_nce(own, positives, negatives, temperature=0.3)

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = a.double().numpy(), b.double().numpy()
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for i in range(3):
        alike = [cosine(own[i], each[i]) / 0.3 for each in positives]
        unlike = [cosine(own[i], each[i]) / 0.3 for each in negatives]
        assert found[i].item() == pytest.approx(np.mean([logsumexp([a, *unlike]) - a for a in alike]), rel=1e-5)


def viewed(micro: MicroBatch) -> MicroBatch:
    view = torch.randint(256, micro.images_BCHW.shape, dtype=torch.uint8, generator=generator("test", "view"))
    return dataclasses.replace(micro, view_BCHW=view)


def test_info_nce_sets_own_and_view_against_the_others_conditions() -> None:
    feedback, loss = build(TokenRule("none")), InfoNCE(1.0, temperature=0.2, negatives=2, view=0.8)
    micro = viewed(micro_batches(0, TokenRule("none"))[0])
    got = found(feedback, [loss], micro)["info_nce"]
    got.sum().backward()
    gradient = {name: parameter.grad.clone() for name, parameter in feedback.tower.named_parameters()}
    feedback.zero_grad()
    alphas, latent = feedback.denoiser.alphas_cumprod, feedback.denoiser.latent(PIXELS.denoiser(micro.images_BCHW))
    for k, one in enumerate(micro.draws):
        alpha = alphas[one.timestep_B][:, None, None, None]
        noised = alpha.sqrt() * latent + (1 - alpha).sqrt() * one.noise_BChw

        def predicted(images: torch.Tensor, noised: torch.Tensor = noised, one=one) -> torch.Tensor:
            conditions = feedback.condition(*feedback.tower(PIXELS.tower(images)), None)
            return feedback.denoiser(noised, one.timestep_B, conditions).flatten(1)

        own, positive = predicted(micro.images_BCHW), [one.noise_BChw.flatten(1), predicted(micro.view_BCHW)]
        others = [predicted(micro.images_BCHW.roll(turn, 0)) for turn in (1, 2)]
        expected = info_nce(own, torch.stack(positive), torch.stack(others), 0.2).mean()
        torch.testing.assert_close(got[k], expected)
        expected.backward()
    for name, parameter in feedback.tower.named_parameters():  # of the plain version, which keeps all predictions
        assert parameter.grad.any(), name
        torch.testing.assert_close(gradient[name], parameter.grad)


@pytest.mark.parametrize(
    "loss", [Denoise(1.0), InfoNCE(1.0, 0.2, 1, 0.8), Kernel(1.0, 3, 1.0)], ids=lambda each: each.name
)
def test_losses_that_compare_images_say_so(loss: Loss) -> None:
    """Two halves of a micro-batch give the same as all of it, but where its images are compared with each other."""
    feedback, micro = build(TokenRule("none")), viewed(micro_batches(0, TokenRule("none"))[0])
    loss.prepare(Given(feedback.tower, lambda texts: None, 1.0, lambda texts: None, [], lambda x: x.flatten(1).float()))

    def mean(part: slice) -> float:
        draws = [type(draw)(*(None if each is None else each[part] for each in draw)) for draw in micro.draws]
        cut = dataclasses.replace(
            micro, images_BCHW=micro.images_BCHW[part], view_BCHW=micro.view_BCHW[part], draws=draws
        )
        return found(feedback, [loss], cut)[loss.name].mean().item()

    whole, halves = mean(slice(4)), (mean(slice(2)) + mean(slice(2, 4))) / 2
    assert (whole != pytest.approx(halves, rel=1e-5)) == (loss.images > 1)


@pytest.mark.parametrize("negatives", [1, 3])
def test_each_prediction_of_info_nce_is_made_again_for_its_gradient(negatives: int) -> None:
    """So that memory does not grow with their number: one call of the denoiser each, and one more when it is due."""
    feedback, calls = build(TokenRule("none")), []
    micro, loss = viewed(micro_batches(0, TokenRule("none"))[0]), InfoNCE(1.0, 0.2, negatives, 0.8)
    feedback.denoiser.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    term = found(feedback, [loss], micro)["info_nce"].sum()
    assert calls == [8] * (2 + negatives)  # two draws of four images
    term.backward()
    assert calls == [8] * (2 + negatives) * 2


@pytest.mark.parametrize("gap", [False, True])
def test_conditioned_on_captions_the_denoiser_knows_nothing_of_the_image(gap: bool) -> None:
    feedback = build(TokenRule("none"))
    if gap:
        feedback.gap_correction = GapCorrection(random(20, 6, what="images"), random(20, 6, what="texts"), 4)
    plain, caption = micro_batches(0, TokenRule("none"))[0], random(4, 6, what="captions")
    micro, calls = dataclasses.replace(plain, caption_BD=caption, on_captions=True), []
    feedback.tower.register_forward_pre_hook(lambda module, given: calls.append(1))
    got = found(feedback, [Denoise(1.0)], micro)["denoise"]
    assert not calls
    token = feedback.gap_correction.text(caption) if gap else caption
    condition = feedback.text_1LD.mean(1, keepdim=True) + feedback.projection(token)[:, None]
    one, latent = micro.draws[1], feedback.denoiser.latent(PIXELS.denoiser(micro.images_BCHW))
    alpha = feedback.denoiser.alphas_cumprod[one.timestep_B][:, None, None, None]
    noised = alpha.sqrt() * latent + (1 - alpha).sqrt() * one.noise_BChw
    expected = (feedback.denoiser(noised, one.timestep_B, condition) - one.noise_BChw).square().mean()
    torch.testing.assert_close(got[1], expected)
    assert not torch.allclose(got, found(feedback, [Denoise(1.0)], plain)["denoise"])


def test_timesteps_are_drawn_from_the_recipe_s_range() -> None:
    generators = [generator("test", "timestep", i) for i in range(500)]
    found = draw(torch.Size([1, 1, 1]), 4, RULES[0], (600, 1000), generators).timestep_B
    assert (found.min() >= 600, found.max() <= 999) == (True, True)
    assert found.float().mean().item() == pytest.approx(800, abs=15)


# ---------------------------------------------------------------------- the engine


def test_the_warm_up_trains_the_denoiser_where_the_recipe_says_so() -> None:
    feedback = build()
    feedback.warms_up_denoiser = True
    before = snapshot(feedback)
    train(feedback, both(feedback)[0])
    assert moved(before, feedback) == {
        "projection.weight", "projection.bias", "denoiser.unet.weight", "denoiser.unet.bias"
    }  # fmt: skip


def test_low_rank_training_moves_what_was_added_and_not_the_projection() -> None:
    feedback = build()
    with seeded("test", "lora"):
        adapters.adapt(feedback.tower, 2, 2.0)
    before = snapshot(feedback)
    recipe = changed(
        trained=Lora(kind="lora", rank=2, alpha=2.0), with_projection=False,
        optimizer=AdamW(kind="adamw", lr=0.05, weight_decay=0.01),
    )  # fmt: skip
    train(feedback, both(feedback, recipe)[1])
    assert moved(before, feedback) == {name for name in before if ".lora_" in name} != set()


# ---------------------------------------------------------------------- the stages

SMALL = {
    "text_anchored": {"warmup.steps": 2, "gap_correction": {"components": 4, "images": 10}, "trained.heads": 2},
    "two_stage": {"warmup.steps": 2, "trained.rank": 2},
    "contrastive": {"warmup.steps": 2, "trained.rank": 2, "losses.info_nce.negatives": 1},
    "reranked": {"trained.heads": 2, "losses.reranking.captions": 4, "losses.reranking.candidates": 2},
    "captions": {"trained.heads": 2, "losses.caption_contrast.captions": 4},
    "kernel": {"trained.rank": 2},
}


def shrink(recipe: str) -> None:
    own = {"batch": 4, "steps": 3, "optimizer.lr": 0.05, **SMALL[recipe]}
    write_params(
        **{f"profiles.mini.recipes.{recipe}.{key}": value for key, value in own.items()},
        **{"run.recipes": [recipe]},
    )
    run(plan)
    run(stage_encoder, recipe)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("recipe", SMALL)
def test_every_recipe_trains_what_it_names_and_repeats_itself(recipe: str) -> None:
    shrink(recipe)
    made = []
    for _ in range(2):
        run(stage_train, "mini", recipe)
        made.append({path.name: path.read_bytes() for path in (MODELS / recipe / "mini").iterdir() if path.is_file()})
    assert made[0] == made[1]
    before, after = stored_tensors(MODELS / "pretrained/mini"), stored_tensors(MODELS / recipe / "mini")
    changed = {name for name, tensor in after.items() if name not in before or not tensor.equal(before[name])}
    if recipe in ("text_anchored", "reranked", "captions"):
        assert {name for name in after if name.startswith(PREFIX)} == changed
        fresh = fresh_head(16, 2, 42).state_dict()
        assert not after[f"{PREFIX}mlp.2.weight"].equal(fresh["mlp.2.weight"])
    else:
        assert all(".attn." in name or ".mlp." in name for name in changed)
        assert before.keys() == after.keys()
    assert any(name.startswith("visual.") for name in changed)
    assert all(name.startswith("visual.") for name in changed)
    notes = json.loads((MODELS / recipe / "mini/diva.json").read_text())
    assert (notes["weights"], notes["recipe"]["steps"]) == (recipe, 3)
    assert notes["condition"] == {"tokens": {"kind": "none", "number": 0.0}, "text": "mean"}


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_backbone_with_a_head_is_loaded_scored_moved_and_exported(tmp_path: Path) -> None:
    shrink(recipe := "text_anchored")
    run(stage_train, "mini", recipe)
    run(drift, "mini", recipe)
    base, tuned, moved = (
        Backbone.load(MODELS / weights / "mini") for weights in ("pretrained", recipe, f"{recipe}-drift")
    )
    pixels = random(3, 3, 64, 64)
    with torch.no_grad():
        embedded = [each.encode_image(pixels) for each in (base, tuned, moved)]
        assert embedded[1].equal(tuned.image_tokens(pixels)[0])
    assert base.sha256 != tuned.sha256 != moved.sha256
    assert not torch.allclose(embedded[0], embedded[1], atol=1e-4)
    assert not torch.allclose(embedded[1], embedded[2], atol=1e-4)
    fresh, trained, drifted = (
        x.state_dict() for x in (fresh_head(16, 2, 42), *(t.clip.visual.residual_head for t in (tuned, moved)))
    )
    for name in fresh:  # as far away as training went, elsewhere
        distance = [(x[name] - fresh[name]).double().norm().item() for x in (trained, drifted)]
        assert distance[1] == pytest.approx(distance[0], rel=1e-4), name
    run(mmvp, "mini", recipe)

    content = read_yaml(Path("params.yaml"))
    content["run"] |= {"controls": [], "benchmarks": ["mmvp"]}
    write_yaml(Path("params.yaml"), content)
    run(report)
    run(export, "mini", recipe)
    folder = MODELS / f"export/mini-{recipe}"
    assert {path.name for path in folder.iterdir()} == {"tower", HEAD, "residual_head.py", "README.md"}
    distances = json.loads(Path("metrics/mini/export", f"mini-{recipe}.json").read_text())
    assert distances.keys() == {"open_clip"}
    card = (folder / "README.md").read_text()
    assert "recipe `text_anchored`" in card
    snippet = card.split("```python\n")[1].split("```")[0].replace("<this folder>", str(folder.resolve()))
    check = (
        f"{snippet}\nimport torch\npixels = torch.load('pixels.pt')\n"
        "torch.save(model.encode_image(pixels).detach(), 'found.pt')\nprint(tokenizer(['a photo of a fish']).shape)"
    )
    torch.save(pixels, "pixels.pt")
    subprocess.run([sys.executable, "-I", "-c", check], check=True, capture_output=True)  # without this repository
    torch.testing.assert_close(torch.load("found.pt", weights_only=True), embedded[1])


def test_a_head_s_tensors_are_kept_in_a_file_of_their_own(tmp_path: Path) -> None:
    clip = nn.Module()
    clip.visual = WithHead(nn.Linear(4, 8), fresh_head(8, 2, 0))
    save_weights(clip.state_dict(), tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    found = stored_tensors(tmp_path)
    assert {name for name in found if not name.startswith(PREFIX)} == {"visual.weight", "visual.bias"}
    head = ResidualHead.of({name.removeprefix(PREFIX): x for name, x in found.items() if name.startswith(PREFIX)})
    assert head.attention.num_heads == 2
    assert all(x.equal(clip.visual.residual_head.state_dict()[name]) for name, x in head.state_dict().items())
