"""Checks of the arguments of `linear_operator`, each with an error that says what came, where, and what to give instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .base import Shape
from .module_calls import is_overridden


def check_module(module: nn.Module) -> None:
    """Check that a module has weights to compute with.

    Raises:
        TypeError: it is no module.
        ValueError: a weight has no values, or values that are not finite.
        NotImplementedError: a weight is complex.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"linear_operator({type(module).__name__}): takes an nn.Module; put a function into one")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        where = f"linear_operator: '{name}' of {type(module).__name__}"
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{where} is not initialised yet; run one forward pass of the lazy module first")
        check_present(where, tensor)
        check_real(where, tensor)
        if tensor.is_floating_point() and not bool(torch.isfinite(_wide(tensor)).all()):
            raise ValueError(f"{where} contains NaN or infinite values")


def check_present(where: str, tensor: Tensor) -> None:
    """Check that a tensor, named by ``where`` in messages, has values.

    Raises:
        ValueError: the tensor is on the meta device.
    """
    if tensor.is_meta:
        raise ValueError(f"{where} is on the meta device and has no values; load the weights first")


def check_real(where: str, tensor: Tensor) -> None:
    """Check that a tensor, named by ``where`` in messages, is not complex.

    Raises:
        NotImplementedError: it is.
    """
    if tensor.is_complex():
        raise NotImplementedError(f"{where} is complex; only real layers are covered")


def check_floating(where: str, weight: Tensor) -> None:
    """Check that the weight of a layer of torch.nn, named by ``where`` in messages, does not consist of integers.

    Raises:
        NotImplementedError: it does.
    """
    if not weight.is_floating_point():
        raise NotImplementedError(
            f"{where} is {weight.dtype}; quantised layers are not covered: give the layer in floating point"
        )


def checked_shape(call: str, in_shape: Sequence[int]) -> Shape:
    """The shape of one input as integers.

    Raises:
        TypeError: it is no sequence of integers.
        ValueError: it is empty or has an axis without entries.
    """
    sizes: Any = in_shape
    if isinstance(sizes, Tensor | str) or not isinstance(sizes, Sequence) or not all(hasattr(n, "__index__") for n in sizes):
        raise TypeError(
            f"{call}(in_shape={type(sizes).__name__}): give the shape of one input without the batch axis, such as (3, 32, 32)"
        )
    shape = tuple(int(n) for n in sizes)
    if not shape or min(shape) < 1:
        raise ValueError(f"{call}(in_shape={shape}): give the shape of one input, without the batch axis")
    return shape


def checked_type(dtype: torch.dtype | None) -> torch.dtype | None:
    """The type to compute in, if one is given.

    Raises:
        TypeError: it is no floating-point type.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"linear_operator(dtype={dtype}): give torch.float32 or torch.float64")
    return dtype


def misfit(module: nn.Module, in_shape: Shape) -> str | None:
    """The words for what a dense or convolutional layer takes, if that is not an input of the given shape; else None.

    A shape that a layer of torch.nn itself does not take although it fits is too small. None for other modules, and for
    replaced forward passes.
    """
    if is_overridden(module):
        return None
    if isinstance(module, nn.Linear):
        return None if in_shape[-1:] == (module.in_features,) else f"takes {module.in_features} features on the last axis"
    if not isinstance(module, _ConvNd):
        return None
    axes = len(module.kernel_size)
    fits = len(in_shape) == axes + 1 and in_shape[0] == module.in_channels
    if not fits:
        return f"takes {module.in_channels} channels and {axes} spatial axes"
    return "needs more positions for its window and padding" if type(module).__module__ == _ConvNd.__module__ else None


def _wide(tensor: Tensor) -> Tensor:
    """A tensor of one byte a number, for which torch has few functions, in float32; any other unchanged."""
    return tensor.float() if tensor.element_size() == 1 else tensor
