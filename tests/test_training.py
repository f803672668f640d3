"""The training loop on a tower and a denoiser small enough to check by hand."""

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from pipeline.core.compute import generator
from pipeline.core.stages import UserError
from pipeline.diva import step as step_
from pipeline.diva.condition import condition, recap
from pipeline.diva.diffusion import draw
from pipeline.diva.feedback import Feedback
from pipeline.diva.losses import Loss, Made, known
from pipeline.diva.pixels import IMAGENET, OPENAI, PixelRule
from pipeline.diva.rules import TokenRule
from pipeline.diva.schedule import Phase
from pipeline.diva.step import MicroBatch, NotFiniteError, Record, run
from pipeline.engine.assemble import phases
from pipeline.engine.losses import losses_of
from pipeline.sections.recipe import Recipe

WIDTH, CONTEXT, PATCHES, LATENT = 6, 5, 16, torch.Size([2, 3, 3])
RULES = [
    TokenRule("none"), TokenRule("all"), TokenRule("random", 7), TokenRule("random_fraction", 0.3),
    TokenRule("windows", 3),
]  # fmt: skip
RECIPE = Recipe(
    condition="backbone", batch=8, steps=3, warmup_ratio=0.0, clip_norm=1.0, draw_weights=[5.0, 1.0],
    warmup={"source": "image_embeddings", "denoiser": False, "steps": 2, "lr": 0.01}, trained={"kind": "tower"},
    with_projection=True, timesteps=[0, 1000], losses={"denoise": {"weight": 1.0}},
    optimizer={"kind": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0},
)  # fmt: skip
PIXELS = PixelRule(OPENAI, IMAGENET, 8, False)


def changed(**update: object) -> Recipe:
    return RECIPE.model_copy(update=update)


class Tower(nn.Module):
    """8 x 8 pixels to 16 patches and a pooled token that looks at all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.pool = nn.Conv2d(3, WIDTH, 2, stride=2), nn.Linear(WIDTH, WIDTH)

    def forward(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.patch(pixels_BCHW).tanh().flatten(2).transpose(1, 2)
        return self.pool(patches.mean(1)), patches


class LinearDenoiser(nn.Module):
    """Predicts from latent, time and the condition's mean; one tanh lets its gradient depend on them."""

    prediction_type = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alphas_cumprod", torch.linspace(0.999, 0.01, 1000))
        self.unet = nn.Linear(CONTEXT, LATENT.numel())

    def latent(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(pixels_BCHW, LATENT[1:])[:, : LATENT[0]]

    def forward(self, noised: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return noised * (timestep / 1000)[:, None, None, None] + self.unet(context).mean(1).tanh().view(noised.shape)


def build(rule: TokenRule = RULES[1]) -> Feedback:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Feedback(
            Tower(), nn.Linear(WIDTH, CONTEXT), LinearDenoiser(), torch.randn(1, 4, CONTEXT), rule, "mean", PIXELS
        )


def micro_batches(step: int, rule: TokenRule = RULES[1]) -> list[MicroBatch]:
    batches = []
    for micro in range(2):
        purposes = [(step, micro, image) for image in range(4)]
        draws = [
            draw(LATENT, PATCHES, rule, (0, 1000), [generator("draw", k, *purpose) for purpose in purposes])
            for k in range(2)
        ]
        images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator("images", step, micro))
        batches.append(MicroBatch(images, draws))
    return batches


def both(feedback: Feedback, recipe: Recipe = RECIPE) -> tuple[Phase, Phase]:
    projection, tower = phases(feedback, recipe, losses_of("test", recipe))
    return projection, tower


def train(
    feedback: Feedback, phase: Phase, batch: Callable[[int], list[MicroBatch]] = micro_batches, precision=torch.float32
) -> list[Record]:
    return [record for record, _ in run(feedback, phase, batch, precision, Accelerator(cpu=True))]


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


def test_without_a_warmup_there_is_one_phase() -> None:
    recipe = changed(warmup=None)
    assert [phase.name for phase in phases(build(), recipe, losses_of("test", recipe))] == ["tower"]


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
        draws = [draw._replace(noise_BChw=draw.noise_BChw + poison) for draw in last.draws]
        return [good, dataclasses.replace(last, draws=draws)]

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
    recipe = changed(steps=1, draw_weights=weights, clip_norm=math.inf)
    (record,) = train(feedback, both(feedback, recipe)[1], lambda step: micro_batches(step, rule))

    losses = []
    for micro in micro_batches(0, rule):
        latent = reference.denoiser.latent(PIXELS.denoiser(micro.images_BCHW))
        for k, drawn in enumerate(micro.draws):
            pooled, patches = reference.tower(PIXELS.tower(micro.images_BCHW))
            tokens = recap(pooled, patches, rule, drawn.positions_BK)
            context = condition(reference.text_1LD, reference.projection(tokens), "mean")
            alpha = reference.denoiser.alphas_cumprod[drawn.timestep_B].view(-1, 1, 1, 1)
            noised = alpha.sqrt() * latent + (1 - alpha).sqrt() * drawn.noise_BChw
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
    """What `Accelerator` is to one of two processes; that their gradients are added up is left to the test."""

    num_processes = 2

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


def test_the_sum_of_two_processes_gradients_is_that_of_the_step() -> None:
    gradients, recipe = [], changed(steps=1, clip_norm=math.inf)
    for processes, own in ((Accelerator(cpu=True), slice(2)), (OneOfTwo(), slice(1)), (OneOfTwo(), slice(1, 2))):
        feedback, batch = build(), micro_batches(0)[own]
        _, phase = both(feedback, recipe)
        assert len(list(run(feedback, phase, lambda step, batch=batch: batch, torch.float32, processes))) == 1
        gradients.append(feedback.projection.weight.grad)
    alone, first, second = gradients
    torch.testing.assert_close(first + second, alone)


class AddsUp:
    """Two processes of which the other is the same: gradients and values are twice one's own."""

    num_processes = 2

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return 2 * tensor


def test_gradients_and_values_of_all_processes_are_added_up() -> None:
    recipe = changed(steps=1, clip_norm=math.inf)
    feedback, half = build(), build()
    (whole,) = train(feedback, both(feedback, recipe)[1], lambda step: 2 * micro_batches(step)[:1])
    ((record, _),) = run(half, both(half, recipe)[1], lambda step: micro_batches(step)[:1], torch.float32, AddsUp())
    torch.testing.assert_close(half.projection.weight.grad, feedback.projection.weight.grad)
    assert (record.loss, record.gradient_norm) == pytest.approx((whole.loss, whole.gradient_norm))


def test_clipping_bounds_the_step_and_the_record_tells_the_norm_before_it() -> None:
    feedback = build()
    (record,) = train(feedback, both(feedback, changed(steps=1, clip_norm=1e-3))[1])
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


# ------------------------------------------------------------------------------------------------------------ the queue


def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop treat the CPU as a device with a queue."""
    monkeypatch.setattr(step_, "waits", lambda device: False)


def test_with_a_queue_the_last_good_parameters_are_kept_though_a_step_went_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the loss of step 1 is known to be nan, step 2 has been computed: it must have changed nothing."""

    def batch(step: int) -> list[MicroBatch]:
        micro, *rest = micro_batches(step)
        poison = math.nan if step == 1 else 0.0
        draws = [draw._replace(noise_BChw=draw.noise_BChw + poison) for draw in micro.draws]
        asked.append(step)
        return [dataclasses.replace(micro, draws=draws), *rest]

    asked: list[int] = []
    good, feedback = build(), build()
    train(good, dataclasses.replace(both(good)[1], steps=1))
    lagging(monkeypatch)
    with pytest.raises(NotFiniteError, match="step 1"):
        train(feedback, both(feedback)[1], batch)
    assert asked == [0, 1, 2]
    assert moved(snapshot(good), feedback) == set()


@pytest.mark.parametrize("queue", [False, True])
def test_a_rest_comes_with_the_record_of_the_step_that_the_parameters_have_gone(
    queue: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, alone = changed(steps=8), build()
    if queue:
        lagging(monkeypatch)
    asks = iter([False, True, False, False, False, True, False, False])
    rests = {}
    for record, at_rest in run(
        alone, both(alone, recipe)[1], micro_batches, torch.float32, Accelerator(cpu=True), pause=lambda: next(asks)
    ):
        if at_rest:
            rests[record.step] = snapshot(alone)
    assert list(rests) == ([3, 7] if queue else [1, 5])
    for last, parameters in rests.items():
        other = build()
        phase = both(other, recipe)[1]
        train(other, dataclasses.replace(phase, steps=last + 1))
        assert moved(parameters, other) == set()


# ------------------------------------------------------------------------------------------------------------- a loss


@dataclasses.dataclass
class Throwaway(Loss):
    """A class, and an entry in a recipe: that is all a loss takes."""

    power: int
    name = "throwaway"

    def __call__(self, made: Made) -> torch.Tensor:
        assert made.pooled_BD is not None
        return made.pooled_BD.pow(self.power).mean()


def test_a_loss_is_one_class_and_one_entry() -> None:
    """Its term is trained by its weight, recorded and named, and no other file knows of it."""
    assert set(known()) >= {"denoise", "info_nce", "self_distillation", "throwaway"}
    recipe = changed(steps=1, losses={"denoise": {"weight": 1.0}, "throwaway": {"weight": 2.0, "power": 2}})
    feedback = build()
    (record,) = train(feedback, both(feedback, recipe)[1])
    assert list(record.terms) == ["denoise", "throwaway"]
    pooled = torch.cat([build().tower(PIXELS.tower(micro.images_BCHW))[0] for micro in micro_batches(0)])
    assert record.terms["throwaway"] == pytest.approx(pooled.square().mean().item())
    assert record.loss == pytest.approx(record.terms["denoise"] + 2 * record.terms["throwaway"])
    plain = build()
    (without,) = train(plain, both(plain, changed(steps=1))[1])
    assert without.terms == {"denoise": pytest.approx(record.terms["denoise"])}
    assert not feedback.tower.pool.weight.grad.equal(plain.tower.pool.weight.grad)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            {"denoize": {"weight": 1.0}},
            r"^params\.yaml:\n  x\.losses\.denoize: unknown loss\. Known: denoise, info_nce, self_dist",
        ),
        ({"denoise": {}}, r"x\.losses\.denoise\.weight: missing"),
        ({"denoise": {"weight": "1"}}, r"x\.losses\.denoise\.weight: found '1'. Input should be a valid number"),
        ({"denoise": {"weight": 1.0, "power": 2}}, r"x\.losses\.denoise\.power: unknown key"),
        (
            {"throwaway": {"weight": 1.0, "power": 1.5}},
            r"x\.losses\.throwaway\.power: found 1\.5\. Input should",
        ),
    ],
)
def test_wrong_settings_of_a_loss_name_their_key(losses: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        losses_of("x", changed(losses=losses))
