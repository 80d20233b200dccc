"""The operator of a module, ``x -> module(x) - module(0)`` in eval mode, and its adjoint.

Dense layers, convolutions and batch normalisations of torch.nn itself are applied directly. Any other affine module, and
those with hooks or a replaced ``forward``, are applied through their forward pass and its gradients (`module_operator`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .arguments import check_floating, check_module, checked_shape, checked_type, misfit
from .base import LinearOperator, Shape, compose, full_precision_no_grad
from .batchnorms import batchnorm_operator, batchnorm_scale, is_standard_batchnorm
from .convolution import bounding_kernel, convolution_settings, symmetric_padding
from .module_calls import is_overridden, ordinary
from .through_forward import default_dtype, device_of, module_operator


@full_precision_no_grad()
def linear_operator(module: nn.Module, in_shape: Sequence[int], dtype: torch.dtype | None = None) -> LinearOperator:
    """The linear part ``x -> module(x) - module(0)`` of an affine module in eval mode.

    The operator follows later changes of the weights, except for its ``kernel``, which ``to`` recomputes.
    The module's training mode, gradients and buffers and the global random state are left unchanged.

    Args:
        module: Any affine module; an ``nn.Sequential`` of affine modules is composed. Hooks and a replaced ``forward`` are part
            of the module. It is run uncompiled.
        in_shape: Shape of one input, without the batch axis.
        dtype: Type to compute in; by default the type of the weights, with float32 in place of half precision.

    Raises:
        TypeError: ``module`` is no module, ``in_shape`` no sequence of numbers, or ``dtype`` no floating-point type.
        ValueError: ``in_shape`` is empty or does not fit the module, or the weights are not finite or have no values.
        NotImplementedError: the module is not affine (the message names the part that is not), its gradients are not the
            derivatives of its forward pass, or its weights are complex or integers.
    """
    check_module(module)
    return _operator(module, checked_shape("linear_operator", in_shape), checked_type(dtype) or default_dtype(module))


def unchecked_operator(module: nn.Module, in_shape: Shape, dtype: torch.dtype | None = None) -> LinearOperator:
    """`linear_operator` without its checks, which would wait for a GPU."""
    return _operator(module, in_shape, dtype or default_dtype(module), checked=False)


def _operator(module: nn.Module, in_shape: Shape, dtype: torch.dtype, checked: bool = True) -> LinearOperator:
    build = None if is_overridden(module) else _BUILDERS.get(type(module))
    return module_operator(module, in_shape, dtype, checked=checked) if build is None else build(module, in_shape, dtype)


def weights_operator(module: nn.Module, in_shape: Sequence[int], dtype: torch.dtype | None = None) -> LinearOperator:
    """The operator of the weights of a dense or convolutional layer of torch.nn, as torch computes it.

    Unlike in `linear_operator`, hooks and replaced methods are no part of it, not even those of all modules or of a class.
    """
    made = _BUILDERS[type(module)](module, tuple(in_shape), dtype or default_dtype(module))
    return replace(made, build=lambda other: weights_operator(module, in_shape, other))


def convolution_then_batchnorm(
    convolution: nn.Module, batchnorm: nn.Module, in_shape: Sequence[int], dtype: torch.dtype | None = None
) -> LinearOperator:
    """The operator of a convolution or dense layer followed by the affine part of a batch normalisation in eval mode.

    If hooks or a ``forward`` of its own may change what the batch normalisation computes, its own operator is used.
    """
    first = linear_operator(convolution, in_shape, dtype)
    if is_standard_batchnorm(batchnorm):
        composite = then_batchnorm(first, batchnorm, convolution)
    else:
        composite = compose(first, linear_operator(batchnorm, first.out_shape, first.dtype))
    return replace(composite, build=lambda other: convolution_then_batchnorm(convolution, batchnorm, in_shape, other))


def then_batchnorm(first: LinearOperator, batchnorm: nn.Module, layer: nn.Module) -> LinearOperator:
    """The operator of a layer, then of a batch normalisation, whose factors scale the kernel of a convolution."""
    both = compose(first, batchnorm_operator(batchnorm, first.out_shape, first.dtype))
    if first.kernel is None or isinstance(layer, _ConvTransposeNd):
        return both
    weight = first.kernel.weight
    scaled = weight * batchnorm_scale(batchnorm).to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
    return replace(both, kernel=replace(first.kernel, weight=scaled))


def is_plain(module: nn.Module) -> bool:
    """Whether the module is a dense or convolutional layer of torch.nn itself, and nothing overrides its forward pass."""
    return type(module) in _PLAIN and not is_overridden(module)


def norm_shape(module: nn.Module, in_shape: Sequence[int]) -> Shape:
    """The input shape to compute a layer's norm at: a single position if it treats all positions alike, else ``in_shape``.

    A dense layer applies one matrix to the features at every position, a pointwise convolution without padding to the channels.
    Hooks, a replaced ``forward`` and that of a derived class may do anything.
    """
    if is_overridden(module):
        return tuple(in_shape)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return tuple(in_shape[-1:])
    pointwise = type(module) in _CONVOLUTIONS and isinstance(module, _ConvNd) and set(module.kernel_size) == {1}
    if pointwise and not any(symmetric_padding(module) or ()):  # type: ignore[arg-type]
        return (in_shape[0], *[1] * (len(in_shape) - 1))
    return tuple(in_shape)


def _dense_operator(module: nn.Module, in_shape: Shape, dtype: torch.dtype) -> LinearOperator:
    weight = _weight(module)
    check_floating("linear_operator: 'weight' of Linear", weight)
    if in_shape[-1] != weight.shape[1]:
        raise ValueError(f"linear_operator(in_shape={in_shape}): {module} takes {weight.shape[1]} features on the last axis")

    def current_weight() -> Tensor:
        return _weight(module).to(dtype)

    return LinearOperator(
        in_shape, (*in_shape[:-1], weight.shape[0]), dtype, weight.device,
        forward=lambda X: F.linear(X, current_weight()),
        adjoint=lambda Y: F.linear(Y, current_weight().T),
        build=lambda other: _operator(module, in_shape, other), label="Linear",
    )  # fmt: skip


def _convolution_operator(module: nn.Module, in_shape: Shape, dtype: torch.dtype) -> LinearOperator:
    """The operator of a convolution, transposed or not; without autograd where it pads symmetrically by zeros."""
    assert isinstance(module, _ConvNd)
    check_floating(f"linear_operator: 'weight' of {type(module).__name__}", _weight(module))
    if len(in_shape) != len(module.kernel_size) + 1 or in_shape[0] != module.in_channels:
        raise ValueError(f"linear_operator(in_shape={in_shape}): {module} {misfit(module, in_shape)}")
    settings = convolution_settings(module)
    maps = _otherwise_padded(module, in_shape, dtype) if settings is None else _zero_padded(module, in_shape, dtype, settings)
    return LinearOperator(
        in_shape, _out_shape(maps[0], in_shape, dtype, module), dtype, device_of(module), *maps,
        build=lambda other: _operator(module, in_shape, other),
        groups=module.groups, kernel=bounding_kernel(module, _weight(module).to(dtype), in_shape), label=type(module).__name__,
    )  # fmt: skip


def _zero_padded(module: _ConvNd, in_shape: Shape, dtype: torch.dtype, settings: tuple[Any, ...]) -> tuple[_Map, _Map]:
    """The convolution without its bias, and its adjoint, by the functions of torch."""

    def forward(X: Tensor) -> Tensor:
        return torch.convolution(X, _weight(module).to(dtype), None, *settings)

    def adjoint(Y: Tensor) -> Tensor:
        X = Y.new_empty(1).expand(len(Y), *in_shape)  # only its shape is read
        only_input = [True, False, False]
        return torch.ops.aten.convolution_backward(Y, X, _weight(module).to(dtype), None, *settings, only_input)[0]

    return forward, adjoint


def _otherwise_padded(module: Any, in_shape: Shape, dtype: torch.dtype) -> tuple[_Map, _Map]:
    """The convolution without its bias, and its adjoint by autograd; no hook takes part in either."""

    def forward(X: Tensor) -> Tensor:
        output: Tensor = module._conv_forward(X, _weight(module).to(dtype), None)
        return output

    def adjoint(Y: Tensor) -> Tensor:
        with torch.enable_grad():
            X = Y.new_zeros(len(Y), *in_shape, requires_grad=True)
            return torch.autograd.grad(forward(X), X, ordinary(Y, Y.dtype))[0] if len(Y) else torch.zeros_like(X)

    return forward, adjoint


def _out_shape(forward: _Map, in_shape: Shape, dtype: torch.dtype, module: nn.Module) -> Shape:
    try:
        with torch.no_grad():
            return tuple(forward(torch.zeros(1, *in_shape, dtype=dtype, device=device_of(module))).shape[1:])
    except RuntimeError as error:
        raise ValueError(f"linear_operator(in_shape={in_shape}): {module} {misfit(module, in_shape)}") from error


def _batchnorm_module(module: nn.Module, in_shape: Shape, dtype: torch.dtype) -> LinearOperator:
    return batchnorm_operator(module, in_shape, dtype)


def _sequential_operator(module: nn.Module, in_shape: Shape, dtype: torch.dtype) -> LinearOperator:
    """The composition of the parts in order; two parts, a convolution and a batch normalisation, keep a scaled kernel."""
    assert isinstance(module, nn.Sequential)
    parts = list(module)
    if not parts:
        return module_operator(nn.Identity(), in_shape, dtype)
    if len(parts) == 2 and isinstance(parts[0], nn.Linear | _ConvNd) and type(parts[1]) in _BATCHNORMS:
        return convolution_then_batchnorm(parts[0], parts[1], in_shape, dtype)
    operator = linear_operator(parts[0], in_shape, dtype)
    for part in parts[1:]:
        operator = compose(operator, linear_operator(part, operator.out_shape, dtype))
    return operator


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    tensor: Tensor = weight.detach()
    return tensor


_Map = Callable[[Tensor], Tensor]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = {nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED}
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BUILDERS: dict[type[nn.Module], Callable[[nn.Module, Shape, torch.dtype], LinearOperator]] = {
    nn.Linear: _dense_operator,
    **dict.fromkeys((*_CONVOLUTIONS, *_TRANSPOSED), _convolution_operator),
    nn.Sequential: _sequential_operator,
    **dict.fromkeys(_BATCHNORMS, _batchnorm_module),
}
