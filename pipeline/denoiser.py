"""Stage denoiser: the frozen text-to-image model, in the layout of stable-diffusion-2-1-base.

data/<profile>/denoiser/{vae,unet,text_encoder,tokenizer,scheduler}/
metrics/<profile>/denoiser.json     parameters; its source or, if it was trained here, its validation loss under the
                                    right, an empty and a wrong caption (and reconstructions.png beside the model)
"""

from pathlib import Path

from pipeline.core import config
from pipeline.core.compute import deterministic_device
from pipeline.core.outputs import atomic, write_json
from pipeline.core.stages import UserError, stage
from pipeline.data import downloads
from pipeline.mini.denoiser import make
from pipeline.models.stable_diffusion import Denoiser
from pipeline.sections import denoiser as sections
from pipeline.sections.denoiser import MiniDenoiser


@stage
def main() -> None:
    profile, compute = config.profile(), deterministic_device()
    section: MiniDenoiser | sections.PublishedDenoiser = config.read(
        sections.DenoiserSource, f"profiles.{profile}.denoiser"
    )
    outputs = Path("data", profile, "denoiser"), Path("metrics", profile, "denoiser.json")
    with atomic(*outputs) as (folder, metrics_file):
        if isinstance(section, MiniDenoiser):
            metrics = make(section, folder, compute)
        else:
            metrics = {"origin": downloads.fetch(section.download, folder)}
        denoiser = Denoiser.load(folder)  # fail here if later stages could not load it
        if (tokens := denoiser.text_encoder.config.max_position_embeddings) != section.text_tokens:
            raise UserError(
                f"the denoiser's text has {tokens} tokens, but profiles.{profile}.denoiser.text_tokens is "
                f"{section.text_tokens}, which every condition is checked against. Set it to {tokens} in params.yaml."
            )
        write_json(metrics_file, {"unet_parameters": sum(q.numel() for q in denoiser.unet.parameters()), **metrics})


if __name__ == "__main__":
    main()
