"""Stage train@<backbone>: post-train an image tower by diffusion feedback, from images alone.

models/<profile>/diva/<backbone>/               the backbone's folder with the tuned weights, and diva.json
metrics/<profile>/train/<backbone>/             metrics.json and the curves of both phases (DVCLive)
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from dvclive import Live
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from pipeline import params
from pipeline.adapters.backbones import Backbone
from pipeline.adapters.denoisers import Denoiser
from pipeline.adapters.shards import Shards
from pipeline.diva import diffusion, pixels, training
from pipeline.diva.condition import TokenRule
from pipeline.diva.objective import Feedback
from pipeline.params import Condition, Train
from pipeline.runtime import UserError, device, generator, progress, remove, seeded, stage, whole, write_json


class Batches:
    """The images of each step with their draws; step s of a phase is a pure function of the seed, given the stream."""

    def __init__(
        self, stream: Iterator[tuple[str, Image.Image]], backbone: Backbone, denoiser: Denoiser, rule: TokenRule,
        p: Train, seed: int, phase: str, compute: torch.device,
    ) -> None:  # fmt: skip
        self.stream, self.denoiser, self.rule, self.p = stream, denoiser, rule, p
        self.seed, self.phase, self.compute = seed, phase, compute
        self.image_size, self.patches = backbone.image_size, backbone.patches
        own = pixels.Statistics(backbone.mean, backbone.std)
        self.tower_statistics = pixels.OPENAI if p.pixels.tower_statistics == "openai" else own
        published = p.pixels.generator_statistics == "imagenet"
        self.undone_by = pixels.IMAGENET if published else self.tower_statistics

    def __call__(self, step: int) -> list[training.MicroBatch]:
        size = self.p.micro_batch
        return [self._micro_batch(step, range(first, first + size)) for first in range(0, self.p.batch, size)]

    def _micro_batch(self, step: int, samples: range) -> training.MicroBatch:
        raw_BCHW = torch.stack([self._crop(next(self.stream)[1], step, i) for i in samples]).to(self.compute)
        latent = self.denoiser.latent(pixels.generator_pixels(raw_BCHW, self.tower_statistics, self.undone_by))
        draws = []
        for k in range(len(self.p.draw_weights)):
            generators = [generator(self.seed, "draw", self.phase, step, i, k) for i in samples]
            low, high = self.p.timesteps
            draw = diffusion.draw(latent.shape[1:], self.patches, self.rule, (low, high), generators)
            draws.append(draw.to(self.compute))
        seen = pixels.tower_pixels(raw_BCHW, self.tower_statistics, self.image_size, self.p.pixels.tower_antialias)
        return training.MicroBatch(seen, latent, draws)

    def _crop(self, image: Image.Image, step: int, sample: int) -> torch.Tensor:
        """A random crop, resized to the generator's size: float [3, size, size] in 0..1."""
        crop, draws = self.p.crop, generator(self.seed, "crop", self.phase, step, sample)
        width, height = image.size
        box = pixels.crop_box(
            width, height, scale=(crop.scale[0], crop.scale[1]), ratio=(crop.ratio[0], crop.ratio[1]), generator=draws
        )
        cropped = image.crop(box).resize((self.p.size, self.p.size), Image.Resampling.BICUBIC)
        return pil_to_tensor(cropped).float() / 255


def build_feedback(backbone: Backbone, denoiser: Denoiser, condition: Condition, prompt: str, seed: int) -> Feedback:
    """The frozen parts, the tower, and a fresh projection initialised from the seed."""
    width, wanted = backbone.width, denoiser.unet.config.cross_attention_dim
    with seeded(seed, "projection"):
        projection = torch.nn.Linear(width, wanted)
    backbone.clip.requires_grad_(False)
    return Feedback(
        backbone, projection, denoiser, denoiser.text([prompt]),
        TokenRule(**condition.tokens.model_dump()), condition.text,
    )  # fmt: skip


def train(
    feedback: Feedback, backbone: Backbone, denoiser: Denoiser, stream: Iterator[tuple[str, Image.Image]], p: Train,
    seed: int, curves: Path, compute: torch.device,
) -> list[training.Record]:  # fmt: skip
    """Run both phases, drawing the curves; returns every step's record. Raises training.NotFiniteError."""
    recipe = training.Recipe(**{name: getattr(p, name) for name in training.Recipe.__dataclass_fields__})
    records: list[training.Record] = []
    with Live(str(curves), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False) as live:
        for phase in training.phases(feedback, list(backbone.tower.parameters()), recipe):
            batches = Batches(stream, backbone, denoiser, feedback.tokens, p, seed, phase.name, compute)
            steps = training.run(feedback, phase, batches, getattr(torch, p.precision))
            for record in progress(steps, f"{phase.name} steps", phase.steps):
                records.append(record)
                live.step = record.step
                for curve in ("loss", "lr", "gradient_norm"):
                    live.log_metric(f"{phase.name}/{curve}", getattr(record, curve))
    return records


def summary(records: list[training.Record], p: Train, undecodable: int) -> dict[str, float]:
    """What stands in metrics.json: both ends of the tower's loss curve, and what it was fed."""
    tower = [record.loss for record in records if record.phase == "tower"]
    window = max(1, len(tower) // 10)
    return {
        "steps": p.steps,
        "images": len(records) * p.batch,
        "undecodable_images": undecodable,
        "loss_first_tenth": round(sum(tower[:window]) / window, 5),
        "loss_last_tenth": round(sum(tower[-window:]) / window, 5),
    }


@stage
def main() -> None:
    p, name, compute = params.load(), sys.argv[1], device()
    profile, section = p.run.profile, p.profile.train
    original = Path("models", profile, "pretrained", name)
    outputs = Path("models", profile, "diva", name), Path("metrics", profile, "train", name)
    with whole(*outputs) as (folder, curves):
        backbone = Backbone.load(original).to(compute)
        denoiser = Denoiser.load(Path("models", profile, "denoiser")).to(compute)
        if section.timesteps[1] > len(denoiser.alphas_cumprod):
            raise UserError(
                f"profiles.{profile}.train.timesteps ends at {section.timesteps[1]}, but the denoiser has "
                f"{len(denoiser.alphas_cumprod)} timesteps. Lower it."
            )
        feedback = build_feedback(backbone, denoiser, p.backbones[name].condition, section.prompt, p.seed).to(compute)
        shards = Shards(Path("data", profile, "images"), section.max_undecodable)
        try:
            records = train(feedback, backbone, denoiser, shards.stream(p.seed), section, p.seed, curves, compute)
        except training.NotFiniteError as error:
            kept = outputs[0].with_name(f"{name}.last-good")
            remove(kept)
            backbone.save_like(original, kept)
            raise UserError(
                f"{error}. Training stopped; the weights before that step are in {kept}. "
                f"Lower profiles.{profile}.train.lr (now {section.lr:g}), or use precision float32."
            ) from None
        result = summary(records, section, len(shards.undecodable))
        backbone.save_like(original, folder)
        write_json(
            folder / "diva.json",
            {
                "backbone": name,
                "seed": p.seed,
                "recipe": section.model_dump(),
                **p.backbones[name].condition.model_dump(),
                "result": result,
            },
        )
        write_json(curves / "metrics.json", result)


if __name__ == "__main__":
    main()
