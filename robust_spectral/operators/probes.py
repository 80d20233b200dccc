"""Checks of an operator made from a forward pass: on a few random inputs, from a generator of their own.

A module is affine if its outputs at sums and negatives of inputs are what they would be. Its operator is applied by gradients,
and gradients need not be derivatives: a part that is detached, a reversed gradient or a hook on it leaves the forward pass as
it is. The forward pass is therefore compared with the gradients, in float64 where the device has it, at inputs of many sizes:
next to a large offset, only large inputs show a small linear part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .base import Shape
from .module_calls import is_overridden, overriding, own_pass

Call = Callable[[Tensor], Tensor]

_SIZES = (0, 20, 60, 100, 200)  # exponents of 2 of inputs; float32 holds the first four
_LARGE = 2.0**20  # a second size of output gradients, which a hook that clips gradients would not let through
_ROUNDING = 1e4  # multiple of the type's precision by which forward pass and gradients may differ


def check_affine(module: nn.Module, call: Call, in_shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Check f(x + y) + f(0) = f(x) + f(y) and f(x) + f(-x) = 2 f(0) at 32 points of many sizes. Costs 129 forward passes.

    Raises:
        ValueError: the module returns values that are not finite.
        NotImplementedError: one of the equations fails.
    """
    x, y = _random(2 * 32, in_shape, dtype, device, seed=0).chunk(2)
    scale = (2.0 ** torch.arange(32, dtype=torch.float64) / 2**16).to(device=device, dtype=dtype)
    x, y = (v * scale.reshape(-1, *[1] * len(in_shape)) for v in (x, y))
    out = call(torch.cat([x, y, x + y, -x, torch.zeros_like(x[:1])]))
    fx, fy, fxy, fm = out[:-1].chunk(4)
    f0 = out[-1:]
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"linear_operator: {overriding(module)} returns NaN or infinite values")
    size = (fx.abs() + fy.abs() + fxy.abs() + f0.abs()).flatten(1).amax(1)
    gap = torch.maximum((fxy + f0 - fx - fy).abs(), (fx + fm - 2 * f0).abs()).flatten(1).amax(1)
    limits = torch.finfo(dtype)
    if not bool((gap <= 1e3 * limits.eps * (size + limits.tiny)).all()):  # below tiny, rounding errors stop shrinking
        raise NotImplementedError(
            f"linear_operator: {_not_affine(module)} is not affine; x -> module(x) - module(0) must be linear in eval mode"
        )


def check_gradients(
    module: nn.Module, call: Call, forward: Call, adjoint: Call, in_shape: Shape, out_shape: Shape, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    """Check that ``forward`` and ``adjoint``, which are made of gradients, agree with the forward pass ``call``.

    With A v = call(v) - call(0), forward(v) must be A v, and ⟨A v, u⟩ = ⟨v, adjoint(u)⟩. Costs nine forward passes.

    Raises:
        NotImplementedError: one of the two fails, or the gradients cannot be differentiated.
    """
    v, u = (_random(1, shape, dtype, device, seed=1) for shape in (in_shape, out_shape))
    images, resolved = _images(call, v)
    try:
        by_gradients, back = forward(v), adjoint(torch.cat([u, _LARGE * u]))
    except RuntimeError as error:
        raise _no_derivative(module, f"they cannot be differentiated ({first_line(error)})") from error
    allowed = _ROUNDING * torch.finfo(dtype).eps
    agrees = resolved & (_largest(images - by_gradients) <= allowed * _largest(images))
    if not bool(agrees.any()):
        image = images[int(resolved.nonzero()[-1, 0])]
        raise _no_derivative(
            module, f"they give an output of length {float(by_gradients.norm()):.4g}, not {float(image.norm()):.4g}"
        )
    image = images[int(agrees.nonzero()[-1, 0])]
    back = torch.stack([back[0], back[1] / _LARGE])
    gap = ((image * u).sum() - (v * back).flatten(1).sum(1)).abs()
    if not bool((gap <= allowed * (image.norm() * u.norm() + v.norm() * back.flatten(1).norm(dim=1))).all()):
        raise _no_derivative(module, "⟨A v, u⟩ and ⟨v, Aᵀ u⟩ differ, A v being the forward pass")


def check_own_pass(
    module: nn.Module,
    run: Callable[[nn.Module, Tensor], Tensor],
    in_shape: Shape,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Check that the pass ``run``, with copies of the module's tensors in another type, gives what a call of the module gives.

    ``dtype`` None is the module's own type. In another type the two need to agree roughly only, as a module may overflow in its
    own. Costs two forward passes. A module whose own type does not run on the device is not checked.

    Raises:
        NotImplementedError: the two differ.
    """
    own_dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    x = _random(1, in_shape, own_dtype, device, seed=2)
    try:
        with torch.no_grad():
            own, other = own_pass(module, x), run(module, x.to(dtype or own_dtype))
    except RuntimeError:
        return
    eps = torch.finfo(own_dtype).eps
    allowed = 1e3 * eps if dtype is None else max(0.01, 30 * eps)
    if float((own - other).abs().max()) > allowed * float(own.abs().max()):
        raise NotImplementedError(
            f"linear_operator: {overriding(module)} gives other outputs with copies of its parameters and buffers in "
            "their place; its forward pass may depend on their values only"
        )


def acts_on_groups(
    groups: int, call: Call, in_shape: Shape, out_shape: Shape, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether no output depends on inputs of another group: any two groups differ in a bit of their numbers.

    Costs 2 log2(groups) + 1 forward passes.
    """
    if groups == 1 or in_shape[0] % groups or out_shape[0] % groups:
        return groups == 1
    bits = torch.arange(groups, device=device)[None] >> torch.arange((groups - 1).bit_length(), device=device)[:, None] & 1
    on = torch.cat([bits, 1 - bits]).to(dtype)
    masked = _random(len(on), in_shape, dtype, device, seed=3) * _spread(on, in_shape) * _LARGE
    out = call(torch.cat([torch.zeros_like(masked[:1]), masked]))
    images = out[1:] - out[:1]
    return bool((_largest(images * _spread(1 - on, out_shape)) <= 1e3 * torch.finfo(dtype).eps * _largest(images)).all())


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]


def _images(call: Call, v: Tensor) -> tuple[Tensor, Tensor]:
    """(call(s v) - call(0)) / s for several sizes s, and which of them rounding next to call(0) leaves exact enough.

    The largest size with finite values counts in any case.
    """
    sizes = 2.0 ** torch.tensor(
        [size for size in _SIZES if 2.0**size < torch.finfo(v.dtype).max], dtype=v.dtype, device=v.device
    )
    sizes = sizes.reshape(-1, *[1] * (v.ndim - 1))
    out = call(torch.cat([torch.zeros_like(v), sizes * v]))
    change, finite = out[1:] - out[:1], torch.isfinite(out[1:]).flatten(1).all(1)
    resolved = finite & (_ROUNDING * _largest(change) >= 10 * _largest(out[:1]))
    if bool(finite.any()):
        resolved[finite.nonzero()[-1, 0]] = True
    return change / sizes.reshape(-1, *[1] * (out.ndim - 1)), resolved


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().flatten(1).amax(1)


def _spread(on: Tensor, shape: Shape) -> Tensor:
    """Numbers of groups, (k, groups), as factors of the channels of a batch."""
    return on.repeat_interleave(shape[0] // on.shape[1], dim=1).reshape(len(on), -1, *[1] * (len(shape) - 1))


def _random(count: int, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64, device="cpu").to(device=device, dtype=dtype)


def _no_derivative(module: nn.Module, how: str) -> NotImplementedError:
    return NotImplementedError(
        f"linear_operator: the gradients of {overriding(module)}, from which its norm is computed, are not the derivatives of "
        f"its forward pass: {how}. Take out what changes gradients (a reversal, no_grad, detach or .data inside, a hook), "
        "or what makes an output depend on the other rows of its batch"
    )


def _not_affine(module: nn.Module) -> str:
    """The names of the parts of a module that are not known to be affine, for messages."""
    if isinstance(module, nn.Sequential) and not is_overridden(module):
        parts = [f"{overriding(part)} (at '{name}')" for name, part in module.named_children() if not _known_affine(part)]
        return ", ".join(parts) or "Sequential"
    return overriding(module)


def _known_affine(module: nn.Module) -> bool:
    return (isinstance(module, _AFFINE) or type(module) in _BATCHNORMS) and not is_overridden(module)


_AFFINE = (
    nn.Linear, _ConvNd, nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.Sequential,
)  # fmt: skip
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
