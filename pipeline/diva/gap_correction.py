"""The gap between a CLIP's image and text embeddings, and the map that corrects it.

The denoiser's visual projection may be warmed up on text embeddings of captions; then what it is given in their place,
image embeddings, must look like them. CLIP's two kinds of embeddings lie in two narrow cones apart from each other
("Mind the Gap", arXiv 2203.02053), and an image's holds much that no text says.
"""

import torch
from torch import nn
from torch.nn import functional as F


class GapCorrection(nn.Module):
    """P [(e - mean_image) sd_text / sd_image] + mean_text of a unit embedding e.

    P projects on the first principal components of text embeddings; sd is the root mean square distance of unit
    embeddings from their mean. Nothing here is trained.
    """

    def __init__(self, image_ND: torch.Tensor, text_ND: torch.Tensor, components: int) -> None:
        """Measured on embeddings of images and of their captions. Raises ValueError for too many components."""
        super().__init__()
        image_ND, text_ND = F.normalize(image_ND.double(), dim=-1), F.normalize(text_ND.double(), dim=-1)
        if components > min(text_ND.shape):
            raise ValueError(
                f"gap_correction.components is {components}, but {len(text_ND)} embeddings of width "
                f"{text_ND.shape[1]} have {min(text_ND.shape)} at most. Lower it, or raise gap_correction.images."
            )
        _, _, axes_KD = torch.linalg.svd(text_ND - text_ND.mean(0), full_matrices=False)
        axes_KD = axes_KD[:components]
        spread = [(each - each.mean(0)).square().sum(1).mean().sqrt() for each in (image_ND, text_ND)]
        self.register_buffer("mean_image_D", image_ND.mean(0).float(), persistent=False)
        self.register_buffer("mean_text_D", text_ND.mean(0).float(), persistent=False)
        self.register_buffer("scale", (spread[1] / spread[0]).float(), persistent=False)
        self.register_buffer("onto_DD", (axes_KD.T @ axes_KD).float(), persistent=False)

    def forward(self, image_XD: torch.Tensor) -> torch.Tensor:
        """Image embeddings of any length, as if they were text's."""
        return (F.normalize(image_XD, dim=-1) - self.mean_image_D) * self.scale @ self.onto_DD + self.mean_text_D

    def text(self, text_XD: torch.Tensor) -> torch.Tensor:
        """Text embeddings of any length, made unit: they are where they should be but for what P leaves out."""
        return (F.normalize(text_XD, dim=-1) - self.mean_text_D) @ self.onto_DD + self.mean_text_D
