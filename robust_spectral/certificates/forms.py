"""Operations written as simpler ones whose local errors are known: a maximum as b + relu(a - b), attention as products.

`torch.export` replaces the operations by these functions, which compute the same values, when it makes the graph. ReLU and the
max-pooling after it are exchanged, which leaves fewer and smaller errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..lipschitz import operation_of

aten = torch.ops.aten
_LONGEST = 64  # most elements of a maximum that is written out


def larger(a: Tensor, b: Tensor) -> Tensor:
    """max(a, b) = b + relu(a - b)."""
    return b + torch.relu(a - b)


def smaller(a: Tensor, b: Tensor) -> Tensor:
    """min(a, b) = a - relu(a - b)."""
    return a - torch.relu(a - b)


def largest(parts: list[Tensor]) -> Tensor:
    """The maximum of several tensors, in pairs."""
    while len(parts) > 1:
        parts = [larger(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


def max_pool(axes: int) -> Callable[..., Any]:
    """Max-pooling over 1, 2 or 3 axes as the maximum along one axis after another.

    A place in the padding is replaced by the nearest one in the input, which lies in the same window.
    """

    def pooled(
        x: Tensor, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
    ) -> Any:
        window, step, margin, spread = (_each(v, axes) for v in (kernel_size, stride or kernel_size, padding, dilation))
        if ceil_mode or any(d != 1 for d in spread) or math.prod(window) > _LONGEST or x.ndim != axes + 2:
            return NotImplemented
        for i in range(axes):
            dim, size = i - axes, x.shape[i - axes]
            starts = torch.arange((size + 2 * margin[i] - window[i]) // step[i] + 1, device=x.device) * step[i] - margin[i]
            x = largest([x.index_select(dim, (starts + j).clamp(0, size - 1)) for j in range(window[i])])
        return x

    return pooled


def _each(setting: Any, axes: int) -> list[int]:
    listed = [setting] if isinstance(setting, int) else list(setting)
    return listed * (axes if len(listed) == 1 else 1)


def largest_along(x: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
    """amax over axes, one after another."""
    axes = [dim] if isinstance(dim, int) else list(dim)
    if not axes or math.prod(x.shape[axis] for axis in axes) > _LONGEST:
        return NotImplemented
    for axis in axes:
        x = largest(list(x.split(1, axis)))
    return x if keepdim else x.squeeze(axes)


def smallest_along(x: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
    """amin over axes."""
    found = largest_along(-x, dim, keepdim)
    return found if found is NotImplemented else -found


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """softmax(Q Kᵀ s + M) V."""
    if is_causal or enable_gqa or dropout_p or (attn_mask is not None and attn_mask.dtype == torch.bool):
        return NotImplemented
    scores = (query * (scale if scale is not None else query.shape[-1] ** -0.5)) @ key.transpose(-2, -1)
    return torch.softmax(scores if attn_mask is None else scores + attn_mask, -1) @ value


def quotient(a: Any, b: Any) -> Any:
    """a / b = a · (1 / b)."""
    return a * torch.reciprocal(b) if isinstance(b, Tensor) and b.is_floating_point() else NotImplemented


def hardsigmoid(x: Tensor) -> Tensor:
    """A clamped line; the derivative that torch has of the operation itself is rounded to float32."""
    return torch.clamp(x + 3, 0, 6) / 6


def hardswish(x: Tensor) -> Tensor:
    """x times a clamped line."""
    return x * hardsigmoid(x)


def gated(x: Tensor, dim: int = -1) -> Tensor:
    """Gated linear units: the first half times the sigmoid of the second."""
    value, gate = x.chunk(2, dim)
    return value * torch.sigmoid(gate)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation by running statistics, as a factor and an offset for each channel."""
    scale = torch.rsqrt(variance + eps) * (1.0 if weight is None else weight)
    offset = (0.0 if bias is None else bias) - mean * scale
    shape = (-1, *[1] * (x.ndim - 2))
    return x * scale.reshape(shape) + offset.reshape(shape), mean[:0], mean[:0]


FORMS: dict[Any, Callable[..., Any]] = {
    aten.max_pool1d.default: max_pool(1), aten.max_pool3d.default: max_pool(3),
    aten.maximum.default: larger, aten.minimum.default: smaller, aten.max.other: larger, aten.min.other: smaller,
    aten.amax.default: largest_along, aten.amin.default: smallest_along, aten.glu.default: gated,
    aten.hardsigmoid.default: hardsigmoid, aten.hardswish.default: hardswish,
    aten.scaled_dot_product_attention.default: attention, aten.div.Tensor: quotient,
    aten._native_batch_norm_legit_no_training.default: batch_norm,
}  # fmt: skip


def written_out(program: Any) -> Any:
    """An exported program without operations whose local errors are not known, where there is another form of them."""
    program = program.run_decompositions(dict(FORMS))
    for node in list(program.graph.nodes):
        if operation_of(node.target) is aten.max_pool2d:
            move_relu_behind(program.graph, node)
    return program


def move_relu_behind(graph: fx.Graph, pool: fx.Node) -> None:
    """Move the ReLU before a max-pooling behind it."""
    relu: Any = pool.args[0]
    if operation_of(relu.target) is not aten.relu or len(relu.users) > 1:
        return
    with graph.inserting_after(pool):
        first = graph.call_function(aten.max_pool2d.default, (relu.args[0], *pool.args[1:]), pool.kwargs)
    with graph.inserting_after(first):
        second = graph.call_function(relu.target, (first,))
    first.meta, second.meta = dict(pool.meta), dict(relu.meta)
    pool.replace_all_uses_with(second)
    graph.erase_node(pool)
    graph.erase_node(relu)
