"""Batch normalisations folded into the layers before them, for fine-tuning without normalisation.

With fixed statistics, a composite (a layer together with the batch normalisation that follows it) is one affine layer. After
folding, a clip acts on this layer's weight alone, and neither training of the normalisation nor a later change of its
statistics can undo it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..operators import batchnorm_scale, is_plain
from .discovery import LinearLayer, linear_layers


@torch.no_grad()
def fold_batchnorms_(model: nn.Module, example_input: Tensor) -> list[str]:
    """Fold each batch normalisation into the convolution or dense layer of torch.nn itself whose output it takes, in place.

    The model's output in eval mode is unchanged, up to rounding. Each batch normalisation is replaced by an ``nn.Identity``,
    or by its activation and dropout where these are part of the module (timm).

    Args:
        model: Any model; its batch normalisations are folded with their running statistics.
        example_input: A batch the model takes, (n, ...).

    Returns:
        The names of the folded batch normalisations. Others, for instance one before its layer, are left unchanged.

    Raises:
        ValueError: as `linear_layers`.
        NotImplementedError: a layer has a forward pass of its own or is transposed and grouped, a batch normalisation has no
            running statistics, or either is used more than once; the message names it. The model is then unchanged.
    """
    composites = [layer for layer in linear_layers(model, example_input) if layer.batchnorm is not None]
    for layer in composites:
        _check(layer, composites)
    for layer in composites:
        _fold_(layer)
        assert layer.batchnorm_name is not None
        _replace_(model, layer.batchnorm_name)
    return [layer.batchnorm_name for layer in composites if layer.batchnorm_name is not None]


def _check(layer: LinearLayer, composites: list[LinearLayer]) -> None:
    where = f"fold_batchnorms_: '{layer.name}' ({type(layer.module).__name__})"
    if not is_plain(layer.module) or (isinstance(layer.module, nn.Linear) and len(layer.in_shape) > 1):
        raise NotImplementedError(
            f"{where} has a forward pass of its own, into which '{layer.batchnorm_name}' cannot be folded"
        )
    if isinstance(layer.module, _ConvTransposeNd) and layer.module.groups > 1:
        raise NotImplementedError(f"{where} is transposed and grouped; folding '{layer.batchnorm_name}' into it is not covered")
    assert layer.batchnorm is not None
    batchnorm_scale(layer.batchnorm)  # raises if there are no running statistics
    sharing = [other for other in composites if other.module is layer.module or other.batchnorm is layer.batchnorm]
    if len(sharing) > 1:
        raise NotImplementedError(f"{where} or its batch normalisation '{layer.batchnorm_name}' is used more than once")


def _fold_(layer: LinearLayer) -> None:
    module: Any = layer.module
    batchnorm: Any = layer.batchnorm
    scale, axis = batchnorm_scale(batchnorm), 1 if isinstance(module, _ConvTransposeNd) else 0
    shape = [1] * module.weight.ndim
    shape[axis] = -1
    offset = (0 if module.bias is None else module.bias) - batchnorm.running_mean.double()
    offset = offset * scale + (0 if batchnorm.bias is None else batchnorm.bias)
    module.weight.copy_(module.weight * scale.reshape(shape))
    module.bias = nn.Parameter(offset.to(module.weight), requires_grad=module.weight.requires_grad)


def _replace_(model: nn.Module, name: str) -> None:
    parent = model.get_submodule(name.rpartition(".")[0])
    batchnorm: Any = model.get_submodule(name)
    rest = [part for part in (getattr(batchnorm, "drop", None), getattr(batchnorm, "act", None)) if part is not None]
    replacement = nn.Sequential(*rest) if rest else nn.Identity()
    setattr(parent, name.rpartition(".")[2], replacement.train(batchnorm.training))
