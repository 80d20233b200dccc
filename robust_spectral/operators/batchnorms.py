"""The affine part of a batch normalisation in eval mode: each channel times γ / sqrt(running_var + eps), plus an offset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .base import LinearOperator, Shape
from .module_calls import is_overridden
from .through_forward import default_dtype, device_of

_FROZEN = {"FrozenBatchNorm2d", "FrozenBatchNormAct2d"}  # torchvision, timm: not derived from _BatchNorm
_LIBRARIES = ("torch", "timm")  # whose derived classes end in an activation at most
_AXES: dict[type[nn.Module], Shape] = {nn.BatchNorm1d: (1, 2), nn.BatchNorm2d: (3,), nn.BatchNorm3d: (4,)}


def batchnorm_operator(batchnorm: nn.Module, in_shape: Sequence[int], dtype: torch.dtype | None = None) -> LinearOperator:
    """The affine part of a batch normalisation in eval mode: each channel times gamma / sqrt(running_var + eps).

    The module may be any batch normalisation with running statistics, including those of timm that end in an activation
    (which is not part of the operator). ``dtype`` is by default that of the weights, with float32 in place of half precision.

    Raises:
        ValueError: ``in_shape`` does not start with the number of channels, or has a wrong number of axes.
        NotImplementedError: the module keeps no running statistics, so it is not affine in eval mode.
    """
    shape = tuple(in_shape)
    kind = dtype or default_dtype(batchnorm)
    channels = len(batchnorm_scale(batchnorm))
    axes = _AXES.get(type(batchnorm))
    if shape[0] != channels or (axes is not None and len(shape) not in axes):
        raise ValueError(f"linear_operator(in_shape={shape}): {batchnorm} takes {channels} channels on the first axis")

    def times_scale(X: Tensor) -> Tensor:
        return X * batchnorm_scale(batchnorm).to(kind).reshape(-1, *[1] * (len(shape) - 1))

    return LinearOperator(
        shape, shape, kind, device_of(batchnorm), times_scale, times_scale,
        build=lambda other: batchnorm_operator(batchnorm, shape, other),
        groups=shape[0], label=type(batchnorm).__name__, diagonal=True,
    )  # fmt: skip


def batchnorm_scale(batchnorm: nn.Module) -> Tensor:
    """The factor of each channel in eval mode, gamma / sqrt(running_var + eps), shape (channels,), float64.

    Raises:
        NotImplementedError: the module keeps no running statistics.
    """
    variance: Any = getattr(batchnorm, "running_var", None)
    if not isinstance(variance, Tensor):
        raise NotImplementedError(
            f"linear_operator: {type(batchnorm).__name__} keeps no running statistics "
            "(track_running_stats=False), so it is not affine in eval mode"
        )
    eps: Any = batchnorm.eps
    weight: Any = getattr(batchnorm, "weight", None)
    inverse_std = (variance.detach().double() + eps).rsqrt()
    return inverse_std if weight is None else inverse_std * weight.detach().double()


def is_batchnorm(module: nn.Module) -> bool:
    """Whether the module is a batch normalisation, trainable or frozen, with or without a built-in activation."""
    return isinstance(module, _BatchNorm) or type(module).__name__ in _FROZEN


def is_standard_batchnorm(module: nn.Module) -> bool:
    """Whether a call of the module computes its `batchnorm_operator`, an offset and at most an activation.

    False with forward hooks, a replaced ``forward``, or one that a class outside torch and timm defines.
    """
    if not is_batchnorm(module) or is_overridden(module):
        return False
    kind: Any = type(module)
    return kind.__name__ in _FROZEN or kind.forward.__module__.split(".")[0] in _LIBRARIES
