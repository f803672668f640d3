"""Low-rank adaptation (arXiv 2106.09685) of any module's weight matrices, by torch's own parametrizations.

peft replaces modules, and an attention that holds its three matrices as one parameter is not among those that it
replaces cleanly; a parametrization takes any weight, and leaves the module as it is.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """W + alpha / rank x up down; `up` starts at zero, so that nothing changes before training."""

    def __init__(self, weight_OI: torch.Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = weight_OI.shape
        self.scale = alpha / rank
        self.lora_down_RI = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.lora_up_OR = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight_OI: torch.Tensor) -> torch.Tensor:
        return weight_OI + self.scale * self.lora_up_OR @ self.lora_down_RI


def adapt(module: nn.Module, rank: int, alpha: float) -> None:
    """Adapt every weight matrix of the linear layers and attentions below `module`; torch's generator draws `down`."""
    for layer in list(module.modules()):
        if isinstance(layer, nn.Linear | nn.MultiheadAttention):
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if parameter.ndim == 2:
                    parametrize.register_parametrization(layer, name, LowRank(parameter, rank, alpha), unsafe=True)


def merge(module: nn.Module) -> None:
    """Write what was learnt into the weights; the module is again as it was before `adapt`, but for their values."""
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer):
            for name in list(layer.parametrizations):
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
