"""The training loop on a tower and a denoiser small enough to check by hand."""

import copy
import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from pipeline.core.compute import generator
from pipeline.diva.condition import TokenRule, condition, recap
from pipeline.diva.diffusion import draw
from pipeline.diva.objective import Feedback
from pipeline.diva.training import MicroBatch, NotFiniteError, Phase, Recipe, Record, phases, run

WIDTH, CONTEXT, PATCHES, LATENT = 6, 5, 16, torch.Size([2, 3, 3])
RULES = [
    TokenRule("none"), TokenRule("all"), TokenRule("random", 7), TokenRule("random_share", 0.3), TokenRule("windows", 3)
]  # fmt: skip
RECIPE = Recipe(
    batch=8, steps=3, lr=0.05, momentum=0.9, weight_decay=0.0, warmup_ratio=0.0, clip_norm=1.0,
    draw_weights=[5.0, 1.0], projection_steps=2, projection_lr=0.01,
)  # fmt: skip


class Tower(nn.Module):
    """8 x 8 pixels to 16 patches and a pooled token that looks at all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.pool = nn.Conv2d(3, WIDTH, 2, stride=2), nn.Linear(WIDTH, WIDTH)

    def image_tokens(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.patch(pixels_BCHW).tanh().flatten(2).transpose(1, 2)
        return self.pool(patches.mean(1)), patches


class LinearDenoiser(nn.Module):
    """Predicts from latent, time and the condition's mean; one tanh lets its gradient depend on them."""

    prediction_type = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alphas_cumprod", torch.linspace(0.999, 0.01, 1000))
        self.unet = nn.Linear(CONTEXT, LATENT.numel())

    def forward(self, noised: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return noised * (timestep / 1000)[:, None, None, None] + self.unet(context).mean(1).tanh().view(noised.shape)


def build(rule: TokenRule = RULES[1]) -> Feedback:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Feedback(
            Tower(), nn.Linear(WIDTH, CONTEXT), LinearDenoiser(), torch.randn(1, 4, CONTEXT), rule, text_rule="mean"
        )


def micro_batches(step: int, rule: TokenRule = RULES[1]) -> list[MicroBatch]:
    batches = []
    for micro in range(2):
        purposes = [(step, micro, image) for image in range(4)]
        draws = [
            draw(LATENT, PATCHES, rule, (0, 1000), [generator("draw", k, *purpose) for purpose in purposes])
            for k in range(2)
        ]
        noise = generator("images", step, micro)
        pixels, latent = (torch.randn(4, *shape, generator=noise) for shape in ((3, 8, 8), LATENT))
        batches.append(MicroBatch(pixels, latent, draws, last=micro == 1))
    return batches


def both(feedback: Feedback, recipe: Recipe = RECIPE) -> tuple[Phase, Phase]:
    projection, tower = phases(feedback, recipe)
    return projection, tower


def train(
    feedback: Feedback, phase: Phase, batch: Callable[[int], list[MicroBatch]] = micro_batches, precision=torch.float32
) -> list[Record]:
    return list(run(feedback, phase, batch, precision, Accelerator(cpu=True)))


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    """Names of the tensors that are not bitwise what they were."""
    return {name for name, tensor in module.state_dict().items() if not tensor.equal(before[name])}


def test_the_projection_phase_moves_the_projection_alone() -> None:
    feedback = build()
    before = snapshot(feedback)
    train(feedback, both(feedback)[0])
    assert moved(before, feedback) == {"projection.weight", "projection.bias"}
    assert all(parameter.grad is None for parameter in feedback.tower.parameters())


def test_the_tower_phase_moves_tower_and_projection_but_not_the_denoiser() -> None:
    feedback = build()
    before = snapshot(feedback)
    records = train(feedback, both(feedback)[1])
    trained = {name for name, _ in feedback.named_parameters() if not name.startswith("denoiser.")}
    assert moved(before, feedback) == trained
    for name, parameter in feedback.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name
    assert [(record.phase, record.step) for record in records] == [("tower", 0), ("tower", 1), ("tower", 2)]
    assert [record.lr for record in records] == pytest.approx([0.05, 0.0375, 0.0125])


def test_a_phase_without_steps_is_skipped() -> None:
    feedback = build()
    before = snapshot(feedback)
    projection, _ = both(feedback, dataclasses.replace(RECIPE, projection_steps=0))
    assert train(feedback, projection, batch=lambda step: pytest.fail("no batch is wanted")) == []
    assert moved(before, feedback) == set()


def test_steps_at_rate_zero_on_one_batch_are_alike() -> None:
    """The phase's rate is obeyed, and no gradient outlives its step."""
    feedback = build()
    before = snapshot(feedback)
    phase = dataclasses.replace(both(feedback)[1], lr=lambda step: 0.0)
    records = train(feedback, phase, batch=lambda step: micro_batches(0))
    assert {(record.loss, record.gradient_norm) for record in records} == {(records[0].loss, records[0].gradient_norm)}
    assert moved(before, feedback) == set()


def test_two_runs_are_bitwise_equal() -> None:
    first, second = build(), build()
    records = [
        [record for phase in both(feedback) for record in train(feedback, phase)] for feedback in (first, second)
    ]
    assert records[0] == records[1]
    assert moved(snapshot(first), second) == set()


def test_a_loss_that_is_not_finite_leaves_the_last_good_parameters() -> None:
    def batch(step: int) -> list[MicroBatch]:
        good, last = micro_batches(step)
        poison = math.nan if step == 2 else 0.0
        return [good, dataclasses.replace(last, latent_BChw=last.latent_BChw + poison)]

    feedback = build()
    steps = run(feedback, both(feedback)[1], batch, torch.float32, Accelerator(cpu=True))
    next(steps), next(steps)
    good = snapshot(feedback)
    with pytest.raises(NotFiniteError, match="the loss is nan in step 2 of phase 'tower'"):
        next(steps)
    assert moved(good, feedback) == set()


def test_a_gradient_that_is_not_finite_leaves_the_last_good_parameters() -> None:
    feedback = build()
    before = snapshot(feedback)
    phase = dataclasses.replace(both(feedback)[1], draw_weights=[1e38, 1e38])
    with pytest.raises(NotFiniteError, match="gradient's norm is inf"):
        train(feedback, phase)
    assert moved(before, feedback) == set()


@pytest.mark.parametrize("weights", [[2.0, 1.0], [1.0, 1.0]], ids=["published", "symmetric"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_one_tower_run_serves_all_draws(rule: TokenRule, weights: list[float]) -> None:
    """Against the plain reference: the tower run once per draw, and each loss back-propagated by itself.

    As published, the first loss is not divided by the accumulation steps, of which there are two here.
    """
    feedback, reference = build(rule), build(rule)
    recipe = dataclasses.replace(RECIPE, steps=1, draw_weights=weights, clip_norm=math.inf)
    (record,) = train(feedback, both(feedback, recipe)[1], lambda step: micro_batches(step, rule))

    losses = []
    for micro in micro_batches(0, rule):
        for k, drawn in enumerate(micro.draws):
            pooled, patches = reference.tower.image_tokens(micro.pixels_BCHW)
            tokens = recap(pooled, patches, rule, drawn.positions_BK)
            context = condition(reference.text_1LD, reference.projection(tokens), "mean")
            alpha = reference.denoiser.alphas_cumprod[drawn.timestep_B].view(-1, 1, 1, 1)
            noised = alpha.sqrt() * micro.latent_BChw + (1 - alpha).sqrt() * drawn.noise_BChw
            loss = (reference.denoiser(noised, drawn.timestep_B, context) - drawn.noise_BChw).square().mean()
            undivided = weights[0] == 2 and k == 0
            (loss if undivided else loss / 2).backward()
            losses.append(loss.item())

    assert record.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    trained = [name for name, _ in feedback.named_parameters() if not name.startswith("denoiser.")]
    found, expected = dict(feedback.named_parameters()), dict(reference.named_parameters())
    for name in trained:
        assert (found[name].grad - expected[name].grad).norm() <= 1e-5 * expected[name].grad.norm(), name
    total = torch.cat([expected[name].grad.flatten() for name in trained]).norm().item()
    assert record.gradient_norm == pytest.approx(total, rel=1e-5)


class OneOfTwo:
    """What `Accelerator` is to one of two processes; that their gradients are averaged is left to the test."""

    num_processes = 2

    def prepare(self, model: nn.Module) -> nn.Module:
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor

    def free_memory(self) -> None:
        pass


def test_the_mean_of_two_processes_gradients_is_that_of_the_step() -> None:
    gradients, recipe = [], dataclasses.replace(RECIPE, steps=1, clip_norm=math.inf)
    for processes, own in ((Accelerator(cpu=True), slice(2)), (OneOfTwo(), slice(1)), (OneOfTwo(), slice(1, 2))):
        feedback, batch = build(), micro_batches(0)[own]
        _, phase = both(feedback, recipe)
        assert len(list(run(feedback, phase, lambda step, batch=batch: batch, torch.float32, processes))) == 1
        gradients.append(feedback.projection.weight.grad)
    alone, first, second = gradients
    torch.testing.assert_close((first + second) / 2, alone)


def test_clipping_bounds_the_step_and_the_record_tells_the_norm_before_it() -> None:
    feedback = build()
    (record,) = train(feedback, both(feedback, dataclasses.replace(RECIPE, steps=1, clip_norm=1e-3))[1])
    gradients = torch.cat([p.grad.flatten() for p in feedback.parameters() if p.grad is not None])
    assert gradients.norm().item() == pytest.approx(1e-3, rel=1e-4)
    assert record.gradient_norm > 1e-2


def test_autocast_keeps_parameters_in_float32_and_the_loss_nearby() -> None:
    feedback = build()
    other = copy.deepcopy(feedback)
    exact, rough = (
        train(f, both(f)[1], precision=precision)
        for f, precision in ((feedback, torch.float32), (other, torch.bfloat16))
    )
    assert all(parameter.dtype == torch.float32 for parameter in other.parameters())
    assert exact != rough
    assert [record.loss for record in rough] == pytest.approx([record.loss for record in exact], rel=1e-2)
