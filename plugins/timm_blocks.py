"""Changes of timm's architectures for certificates and for small images: averaged residual blocks, a stem without strides.

A residual block x + f(x) with a 1-Lipschitz f has the Lipschitz bound 2, so that the bound of a network doubles with every
block. Half of the block's output has the bound 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.models.convnext
import timm.models.dla
import timm.models.regnet
import timm.models.resnet
from timm.models import _efficientnet_blocks as efficientnet
from torch import Tensor, nn


class Averaged(nn.Module):
    """Half of a residual block's output: the mean of its branches if no activation, or a ReLU, follows their sum."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The block's output times 1/2."""
        halved: Tensor = self.block(*args, **kwargs) * 0.5
        return halved


def _always(block: Any) -> bool:
    return True


def _with_skip(block: Any) -> bool:
    return bool(block.has_skip)


_RESIDUAL: dict[type[nn.Module], Callable[[Any], bool]] = {
    **dict.fromkeys((timm.models.resnet.BasicBlock, timm.models.resnet.Bottleneck), _always),
    **dict.fromkeys((timm.models.dla.DlaBasic, timm.models.dla.DlaBottleneck), _always),
    **dict.fromkeys((timm.models.regnet.Bottleneck, timm.models.convnext.ConvNeXtBlock), _always),
    efficientnet.DepthwiseSeparableConv: _with_skip,
    efficientnet.InvertedResidual: _with_skip,
    efficientnet.EdgeResidual: _with_skip,
}


def average_residuals_(model: nn.Module) -> list[str]:
    """Put every residual block of a timm model into an `Averaged`, in place; return the blocks' names.

    Raises:
        NotImplementedError: the model has no residual block of a known kind.
    """
    found = [name for name, block in model.named_modules() if _RESIDUAL.get(type(block), lambda _: False)(block)]
    if not found:
        kinds = ", ".join(sorted({f"{kind.__module__.split('.')[-1]}.{kind.__name__}" for kind in _RESIDUAL}))
        raise NotImplementedError(f"average_residuals_: {type(model).__name__} has no residual block of the kinds {kinds}")
    for name in found:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], Averaged(model.get_submodule(name)))
    return found


def small_stem_(model: nn.Module) -> None:
    """Adapt a timm ResNet to images of 28 or 32 pixels, in place: no stride in its first convolution, no pooling after it.

    The names and shapes of the weights do not change.

    Raises:
        NotImplementedError: the model is not a ResNet of timm.
    """
    if not isinstance(model, timm.models.resnet.ResNet):
        raise NotImplementedError(f"small_stem_: {type(model).__name__} is not of timm's ResNets")
    first: Any = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.stride = (1, 1)
    model.maxpool = nn.Identity()
