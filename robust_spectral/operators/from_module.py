"""The operator of a module, ``x -> module(x) - module(0)`` in eval mode, and its adjoint.

Any affine module is applied through its own forward pass and vector-Jacobian products, so that one function covers every
padding mode, stride and weight computed in ``forward``. Dense layers, zero-padded convolutions and batch normalisations of
torch.nn itself are applied directly, without autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .base import LinearOperator, Shape, compose
from .convolution import bounding_kernel, convolution_settings, symmetric_padding

_FROZEN_BATCHNORMS = {"FrozenBatchNorm2d", "FrozenBatchNormAct2d"}  # torchvision, timm: not derived from _BatchNorm


def linear_operator(module: nn.Module, in_shape: Sequence[int], dtype: torch.dtype | None = None) -> LinearOperator:
    """The linear part ``x -> module(x) - module(0)`` of an affine module in eval mode.

    The operator follows later changes of the weights, except for its ``kernel``, which ``to`` recomputes.
    The module's training mode, gradients and buffers and the global random state are left unchanged.

    Args:
        module: Any affine module; an ``nn.Sequential`` of affine modules is composed.
        in_shape: Shape of one input, without the batch axis.
        dtype: Type to compute in; by default the type of the weights, with float32 in place of half precision.

    Raises:
        ValueError: ``in_shape`` is empty or does not fit the module, or the weights are not finite or have no values.
        NotImplementedError: the module is not affine (the message names the part that is not) or has complex weights.
    """
    shape = tuple(int(n) for n in in_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"linear_operator(in_shape={tuple(in_shape)}): give the shape of one input, without the batch axis")
    _check_weights(module)
    return unchecked_operator(module, shape, dtype)


def unchecked_operator(module: nn.Module, in_shape: Shape, dtype: torch.dtype | None = None) -> LinearOperator:
    """`linear_operator` without its checks of the shape and of the weights' values, which would wait for a GPU."""
    builder = _module_operator if has_forward_hooks(module) else _BUILDERS.get(type(module), _module_operator)
    return builder(module, in_shape, dtype or _default_dtype(module))


def batchnorm_operator(batchnorm: nn.Module, in_shape: Sequence[int], dtype: torch.dtype | None = None) -> LinearOperator:
    """The affine part of a batch normalisation in eval mode: each channel times gamma / sqrt(running_var + eps).

    The module may be any batch normalisation with running statistics, including those of timm that end in an activation
    (which is not part of the operator). ``dtype`` is by default that of the weights, with float32 in place of half precision.

    Raises:
        ValueError: ``in_shape`` does not start with the number of channels, or has a wrong number of axes.
        NotImplementedError: the module keeps no running statistics, so it is not affine in eval mode.
    """
    shape = tuple(in_shape)
    kind = dtype or _default_dtype(batchnorm)
    channels = len(batchnorm_scale(batchnorm))
    axes = _BATCHNORM_AXES.get(type(batchnorm))
    if shape[0] != channels or (axes is not None and len(shape) not in axes):
        raise ValueError(f"linear_operator(in_shape={shape}): {batchnorm} takes {channels} channels on the first axis")

    def times_scale(X: Tensor) -> Tensor:
        return X * batchnorm_scale(batchnorm).to(kind).reshape(-1, *[1] * (len(shape) - 1))

    return LinearOperator(
        shape, shape, kind, _device(batchnorm), times_scale, times_scale,
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
    return isinstance(module, _BatchNorm) or type(module).__name__ in _FROZEN_BATCHNORMS


def convolution_then_batchnorm(
    convolution: nn.Module, batchnorm: nn.Module, in_shape: Sequence[int], dtype: torch.dtype | None = None
) -> LinearOperator:
    """The operator of a convolution or dense layer followed by the affine part of a batch normalisation in eval mode."""
    first = linear_operator(convolution, in_shape, dtype)
    composite = compose(first, batchnorm_operator(batchnorm, first.out_shape, first.dtype))
    build = lambda other: convolution_then_batchnorm(convolution, batchnorm, in_shape, other)  # noqa: E731
    if first.kernel is None or isinstance(convolution, _ConvTransposeNd):
        return replace(composite, build=build)
    weight = first.kernel.weight
    scaled = weight * batchnorm_scale(batchnorm).to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
    return replace(composite, build=build, kernel=replace(first.kernel, weight=scaled))


def is_plain(module: nn.Module) -> bool:
    """Whether the module is a dense or convolutional layer of torch.nn itself, not of a derived class."""
    return type(module) in _PLAIN


def norm_shape(module: nn.Module, in_shape: Sequence[int]) -> Shape:
    """The input shape to compute a layer's norm at: a single position if it treats all positions alike, else ``in_shape``.

    A dense layer applies one matrix to the features at every position, a pointwise convolution without padding to the channels.
    """
    if isinstance(module, nn.Linear):
        return tuple(in_shape[-1:])
    pointwise = type(module) in _CONVOLUTIONS and isinstance(module, _ConvNd) and set(module.kernel_size) == {1}
    if pointwise and not any(symmetric_padding(module) or ()):  # type: ignore[arg-type]
        return (in_shape[0], *[1] * (len(in_shape) - 1))
    return tuple(in_shape)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode and restore the mode of every submodule afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _module_operator(module: nn.Module, in_shape: Shape, dtype: torch.dtype) -> LinearOperator:
    """The operator of any affine module, through its own forward pass and vector-Jacobian products."""
    device = _device(module)

    def call(X: Tensor) -> Tensor:
        state = {
            name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach().clone()
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
        with evaluating(module), torch.autocast(device.type, enabled=False):
            output: Tensor = torch.func.functional_call(module, state, (X,))
        return output

    def forward(X: Tensor) -> Tensor:
        """Apply the adjoint's adjoint: in module(x) - module(0), rounding would lose a small x next to a large offset."""
        with torch.enable_grad():
            Z = X.new_zeros(len(X), *in_shape, requires_grad=True)
            output = call(Z)
            if not output.requires_grad or not len(X):
                return torch.zeros_like(output)
            Y = torch.zeros_like(output, requires_grad=True)
            back = torch.autograd.grad(output, Z, Y, create_graph=True)[0]
            return torch.autograd.grad(back, Y, X)[0]

    def adjoint(Y: Tensor) -> Tensor:
        with torch.enable_grad():
            X = Y.new_zeros(len(Y), *in_shape, requires_grad=True)
            output = call(X)
            return torch.autograd.grad(output, X, Y)[0] if output.requires_grad and len(X) else torch.zeros_like(X)

    out_shape = _probe_affine(module, call, in_shape, dtype, device)
    return LinearOperator(
        in_shape, out_shape, dtype, device, forward, adjoint,
        build=lambda other: _module_operator(module, in_shape, other), groups=_groups(module), label=type(module).__name__,
    )  # fmt: skip


def _probe_affine(
    module: nn.Module, call: Callable[[Tensor], Tensor], in_shape: Shape, dtype: torch.dtype, device: torch.device
) -> Shape:
    """Check f(x + y) + f(0) = f(x) + f(y) and f(x) + f(-x) = 2 f(0) at 32 points of many sizes; return the output's shape."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 32, *in_shape, generator=generator, dtype=torch.float64, device="cpu").to(device=device, dtype=dtype)
    scale = (2.0 ** torch.arange(32, dtype=torch.float64) / 2**16).to(device=device, dtype=dtype)
    x, y = (v * scale.reshape(-1, *[1] * len(in_shape)) for v in (x, y))
    try:
        with torch.no_grad():
            out = call(torch.cat([x, y, x + y, -x, torch.zeros_like(x[:1])]))
            fx, fy, fxy, fm = out[:-1].chunk(4)
            f0 = out[-1:]
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"linear_operator(in_shape={in_shape}): {type(module).__name__} rejects it: {error}") from error
    size = (fx.abs() + fy.abs() + fxy.abs() + f0.abs()).flatten(1).amax(1)
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"linear_operator: {type(module).__name__} returns NaN or infinite values")
    gap = torch.maximum((fxy + f0 - fx - fy).abs(), (fx + fm - 2 * f0).abs()).flatten(1).amax(1)
    limits = torch.finfo(dtype)
    if not bool((gap <= 1e3 * limits.eps * (size + limits.tiny)).all()):  # below tiny, rounding errors stop shrinking
        raise NotImplementedError(
            f"linear_operator: {_not_affine(module)} is not affine; x -> module(x) - module(0) must be linear in eval mode"
        )
    return tuple(fx.shape[1:])


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether the module has forward hooks, which may change its inputs and outputs."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _not_affine(module: nn.Module) -> str:
    """The names of the parts of a module that are not known to be affine, for messages."""
    if isinstance(module, nn.Sequential):
        parts = [f"{type(part).__name__} (at '{name}')" for name, part in module.named_children() if not _known_affine(part)]
        return ", ".join(parts) or "Sequential"
    return type(module).__name__


def _known_affine(module: nn.Module) -> bool:
    return type(module) in _BUILDERS or isinstance(module, _AFFINE)


def _dense_operator(module: nn.Module, in_shape: Shape, dtype: torch.dtype) -> LinearOperator:
    weight = _weight(module)
    if in_shape[-1] != weight.shape[1]:
        raise ValueError(f"linear_operator(in_shape={in_shape}): {module} takes {weight.shape[1]} features on the last axis")

    def current_weight() -> Tensor:
        return _weight(module).to(dtype)

    return LinearOperator(
        in_shape, (*in_shape[:-1], weight.shape[0]), dtype, weight.device,
        forward=lambda X: F.linear(X, current_weight()),
        adjoint=lambda Y: F.linear(Y, current_weight().T),
        build=lambda other: _dense_operator(module, in_shape, other), label="Linear",
    )  # fmt: skip


def _convolution_operator(module: nn.Module, in_shape: Shape, dtype: torch.dtype) -> LinearOperator:
    """The operator of a convolution, transposed or not; without autograd where it pads symmetrically by zeros."""
    assert isinstance(module, _ConvNd)
    settings = convolution_settings(module)
    if settings is None:
        operator = _module_operator(module, in_shape, dtype)
        build = lambda other: _convolution_operator(module, in_shape, other)  # noqa: E731
        return replace(operator, kernel=bounding_kernel(module, _weight(module).to(dtype), in_shape), build=build)
    axes = len(module.kernel_size)
    if len(in_shape) != axes + 1 or in_shape[0] != module.in_channels:
        raise ValueError(f"linear_operator(in_shape={in_shape}): {module} takes ({module.in_channels}, {axes} spatial axes)")

    def forward(X: Tensor) -> Tensor:
        return torch.convolution(X, _weight(module).to(dtype), None, *settings)

    def adjoint(Y: Tensor) -> Tensor:
        X = Y.new_empty(1).expand(len(Y), *in_shape)  # only its shape is read
        only_input = [True, False, False]
        return torch.ops.aten.convolution_backward(Y, X, _weight(module).to(dtype), None, *settings, only_input)[0]

    return LinearOperator(
        in_shape, _out_shape(forward, in_shape, dtype, module), dtype, _device(module), forward, adjoint,
        build=lambda other: _convolution_operator(module, in_shape, other),
        groups=module.groups, kernel=bounding_kernel(module, _weight(module).to(dtype), in_shape), label=type(module).__name__,
    )  # fmt: skip


def _out_shape(forward: Callable[[Tensor], Tensor], in_shape: Shape, dtype: torch.dtype, module: nn.Module) -> Shape:
    try:
        with torch.no_grad():
            return tuple(forward(torch.zeros(1, *in_shape, dtype=dtype, device=_device(module))).shape[1:])
    except RuntimeError as error:
        raise ValueError(f"linear_operator(in_shape={in_shape}): {module} rejects it: {error}") from error


def _batchnorm_module(module: nn.Module, in_shape: Shape, dtype: torch.dtype) -> LinearOperator:
    return batchnorm_operator(module, in_shape, dtype)


def _sequential_operator(module: nn.Module, in_shape: Shape, dtype: torch.dtype) -> LinearOperator:
    """The composition of the parts in order; two parts, a convolution and a batch normalisation, keep a scaled kernel."""
    assert isinstance(module, nn.Sequential)
    parts = list(module)
    if not parts:
        return _module_operator(nn.Identity(), in_shape, dtype)
    if len(parts) == 2 and isinstance(parts[0], nn.Linear | _ConvNd) and type(parts[1]) in _BATCHNORMS:
        return convolution_then_batchnorm(parts[0], parts[1], in_shape, dtype)
    operator = linear_operator(parts[0], in_shape, dtype)
    for part in parts[1:]:
        operator = compose(operator, linear_operator(part, operator.out_shape, dtype))
    return operator


def _groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, _ConvNd) else 1


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    tensor: Tensor = weight.detach()
    return tensor


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


def _default_dtype(module: nn.Module) -> torch.dtype:
    found = [t.dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()]
    dtype = found[0] if found else torch.get_default_dtype()
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _check_weights(module: nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        where = f"linear_operator: '{name}' of {type(module).__name__}"
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{where} is not initialised yet; run one forward pass of the lazy module first")
        if tensor.is_meta:
            raise ValueError(f"{where} is on the meta device and has no values; load the weights first")
        if tensor.is_complex():
            raise NotImplementedError(f"{where} is complex; only real layers are covered")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where} contains NaN or infinite values")


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = {nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED}
_BATCHNORM_AXES: dict[type[nn.Module], Shape] = {nn.BatchNorm1d: (1, 2), nn.BatchNorm2d: (3,), nn.BatchNorm3d: (4,)}
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_AFFINE = (
    nn.Linear, _ConvNd, nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle,
)  # fmt: skip
_BUILDERS: dict[type[nn.Module], Callable[[nn.Module, Shape, torch.dtype], LinearOperator]] = {
    nn.Linear: _dense_operator,
    **dict.fromkeys((*_CONVOLUTIONS, *_TRANSPOSED), _convolution_operator),
    nn.Sequential: _sequential_operator,
    **dict.fromkeys(_BATCHNORMS, _batchnorm_module),
}
