"""A sampled lower bound of a network's Lipschitz constant: the largest Jacobian norm over a batch of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import uncompiled
from ..operators import evaluating
from .precision import full_precision

_COMBINATIONS = 16
ESTIMATE_ROUNDING = 1e-3  # share by which an estimate, computed in the model's dtype, may exceed a bound


def lipschitz_estimate(model: nn.Module, images: Tensor, most_outputs: int = 1000) -> float:
    """The largest Jacobian norm over a batch: a lower bound of the Lipschitz constant, never an upper one.

    Jacobians are computed backwards, without autocast or TF32; for a model whose backward pass is not the derivative of its
    forward pass, the result is no lower bound.

    Args:
        model: A model from images to outputs (n, ...), each row depending on its image only; it runs in eval mode.
        images: (n, ...) floating point, the points to sample. Costs one backward pass for every output of an image.
        most_outputs: If an image has more outputs, the Jacobian is that of 16 random orthonormal combinations of them, whose
            norm is a weaker lower bound.

    Raises:
        TypeError: the images are no floating-point tensor, or the model's output is no tensor.
        ValueError: there are no images, or the model does not give an output for each.
        RuntimeError: no gradient reaches the images.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.") if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"lipschitz_estimate(images): takes a floating-point tensor (n, ...), got {kind}; give float32 images")
    model = uncompiled(model)
    with torch.inference_mode(False), evaluating(model), torch.enable_grad(), full_precision(images.device):
        x = images.detach().clone().requires_grad_()
        rows = [_gradient(column, x).flatten(1) for column in _columns(model(x), len(x), most_outputs)]
    jacobians = torch.stack(rows, dim=1).double()  # (n, outputs, pixels)
    return float(torch.linalg.eigvalsh(jacobians @ jacobians.mT)[:, -1].clamp_min(0).sqrt().max())


def _gradient(column: Tensor, x: Tensor) -> Tensor:
    found = torch.autograd.grad(column.sum(), x, retain_graph=True, allow_unused=True)[0] if column.requires_grad else None
    if found is None:
        raise RuntimeError("lipschitz_estimate: no gradient of the model's output reaches the images")
    return found


def _columns(outputs: Any, n: int, most: int) -> tuple[Tensor, ...]:
    """The outputs of n images to differentiate, each (n,): all of them, or orthonormal combinations where there are many."""
    if not isinstance(outputs, Tensor):
        kind = type(outputs).__name__
        raise TypeError(f"lipschitz_estimate: the model returns {kind}; give a model that returns its logits alone")
    if n == 0 or outputs.ndim == 0 or len(outputs) != n:
        raise ValueError(
            f"lipschitz_estimate: the model's output for {n} images has shape {tuple(outputs.shape)}; give at least one image, "
            "with its batch axis, and a model that returns a row for each"
        )
    flat = outputs.reshape(n, -1)
    if flat.shape[1] <= max(most, _COMBINATIONS):
        return flat.unbind(1)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(flat.shape[1], _COMBINATIONS, generator=generator))[0]
    return (flat @ mixing.to(flat)).unbind(1)
