"""Writes into part of a tensor, which a graph without mutation expresses as a new tensor of old elements and written ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ...numerics import product_up
from ..boxes import Box
from ..table import NoClaim, operation_of, rule
from ..walk import Affine, LipschitzWalk
from .node_arguments import UP, arguments, aten, exact, identity, increasing, linear_step, repeats, selected
from .rearranging import joint

_WRITES = (aten.slice_scatter, aten.select_scatter, aten.diagonal_scatter)


@rule(*_WRITES, box=increasing, rounding=exact)
def written(walk: LipschitzWalk, n: fx.Node) -> float:
    """The bound of all that was written, and of what it was written into, together."""
    return joint(walk, _written(walk, n))


def _written(walk: LipschitzWalk, node: Any) -> list[Any]:
    """The values written one after the other into a constant or another value, and that value."""
    if isinstance(node, fx.Node) and operation_of(node.target) in _WRITES:
        return [*_written(walk, node.args[0]), node.args[1]]
    return [node]


def copy_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """One rounding, to the first argument's type."""
    return 1, walk.size(n.args[1]) * repeats(walk, n, n.args[1])


@rule(aten.copy, box=increasing, rounding=copy_rounding)
def copied_over(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """The values of the second argument, in the first one's type, copied where it is broadcast."""
    source = n.args[1]
    if not walk.depends(source):
        return 0.0
    if repeats(walk, n, source) == 1 and walk.env[n].ndim == walk.env[source].ndim:  # type: ignore[index]
        return identity(walk, n, source)  # type: ignore[arg-type]
    return product_up(walk.bound(source), repeats(walk, n, source))


def _constant_places(walk: LipschitzWalk, n: fx.Node, *names: str) -> dict[str, Any]:
    a = arguments(n)
    if any(walk.depends(a[name]) for name in names if name in a):
        raise NoClaim("at places that depend on the input, where it may jump")
    return a


def either_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """By a known condition the ends of the value that it chooses, else the lowest and the highest of both."""
    condition, one, other = n.args
    if not walk.depends(condition):
        return increasing(walk, n)
    (low, high), (other_low, other_high) = walk.box(one), walk.box(other)
    shape = walk.env[n].shape
    return torch.minimum(low, other_low).expand(shape), torch.maximum(high, other_high).expand(shape)


@rule(aten.where, box=either_box, rounding=selected)
def either(walk: LipschitzWalk, n: fx.Node) -> float:
    """By a constant condition each element is one of the first value or one of the second: the bound of both together."""
    a = _constant_places(walk, n, "condition")
    parts = [value for value in (a["self"], a["other"]) if walk.depends(value)]
    return product_up(joint(walk, parts), max(repeats(walk, n, value) for value in parts))


@rule(aten.masked_fill, box=increasing, rounding=selected)
def filled(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """Constants in some places: the identity elsewhere."""
    a = _constant_places(walk, n, "mask", "value")
    keep = ~walk.env[a["mask"]]
    by_sample = keep.ndim == walk.env[n].ndim and keep.shape[0] != 1
    if by_sample or walk.env[n].shape != walk.env[a["self"]].shape:
        return product_up(walk.bound(a["self"]), repeats(walk, n, a["self"]))
    return linear_step(walk, n, a["self"], lambda X: X * keep.to(X.dtype), 1.0, diagonal=True)


@rule(aten.fill, box=increasing, rounding=exact)
def constant(walk: LipschitzWalk, n: fx.Node) -> float:
    """One value in every place."""
    return product_up(walk.bound(n.args[1]), math.sqrt(walk.env[n].numel()) * UP) if walk.depends(n.args[1]) else 0.0


@rule(aten.scatter, aten.index_put, aten.index_copy, aten.masked_scatter, aten.scatter_add, aten.index_add, aten.scatter_reduce)
def placed(walk: LipschitzWalk, n: fx.Node) -> float:
    """Values written or added at constant places: the bound of both together, or the sum of their bounds.

    Copies of one value, and sums of several, count by the norm of the map from the values to the result.
    """
    a = _constant_places(walk, n, "index", "indices", "mask")
    value = next(a[name] for name in ("src", "source", "values", "value") if name in a)
    if operation_of(n.target) in (aten.scatter_reduce, aten.masked_scatter) or a.get("reduce") is not None:
        raise NoClaim("that reduces values")
    adds = operation_of(n.target) in (aten.scatter_add, aten.index_add) or bool(a.get("accumulate"))
    gain = _gain(walk, n, value)
    if not adds:
        return product_up(joint(walk, [a["self"], value]), max(1.0, gain) if walk.depends(value) else 1.0)
    return math.nextafter(walk.bound(a["self"]) + product_up(walk.bound(value), gain), math.inf)


def _gain(walk: LipschitzWalk, n: fx.Node, value: Any) -> float:
    """Norm of the map from the values to the result, at most, by its row and column sums (Schur)."""
    if not isinstance(value, fx.Node):
        return 1.0
    shape = walk.env[value].shape
    with torch.enable_grad():
        ones = torch.ones(shape, dtype=torch.float64, device=walk.env[value].device, requires_grad=True)
        result = walk.rerun(n, lambda node: ones if node is value else _blank(walk.env[node]))
        copies = torch.autograd.grad(result.sum(), ones)[0]
    return math.sqrt(float(result.detach().abs().max()) * float(copies.abs().max())) * UP


def _blank(value: Any) -> Any:
    """Zeros in place of numbers; places stay."""
    return torch.zeros_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value
