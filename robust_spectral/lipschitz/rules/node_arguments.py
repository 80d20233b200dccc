"""Parts of rules: a node's arguments by name, affine steps of linear operations, boxes of monotone ones, no rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...numerics import product_up
from ...operators import LinearOperator, Shape
from ..boxes import Box
from ..table import NoClaim, operation_of
from ..walk import Affine, LipschitzWalk, is_numbers

aten = torch.ops.aten
UP = 1 + 1e-12  # exceeds the rounding error of a short float64 computation
SUM_UP = 1 + 1e-10  # and of a sum of up to 1e5 numbers of one sign
Function = Callable[[Tensor], Tensor]
_VIEWS = (aten.view, aten._unsafe_view, aten.reshape, aten.squeeze)


def arguments(n: fx.Node) -> dict[str, Any]:
    """All arguments of a call by the names in the operation's schema, defaults included."""
    schema: Any = n.target
    return {
        a.name: n.args[i] if i < len(n.args) else n.kwargs.get(a.name, a.default_value if a.has_default_value() else None)
        for i, a in enumerate(schema._schema.arguments)
    }


def calls(node: Any, *operations: Any) -> bool:
    """Whether a value is the result of one of some operations."""
    return isinstance(node, fx.Node) and operation_of(node.target) in operations


def same(a: Any, b: Any, depth: int = 6) -> bool:
    """Whether two values are known to be equal, as one node or as a few operations of equal values."""
    if a is b:
        return True
    if depth == 0:
        return False
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return (
            a.op == b.op == "call_function" and a.target == b.target and same((a.args, a.kwargs), (b.args, b.kwargs), depth - 1)
        )
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same(one, other, depth) for one, other in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], depth) for key in a)
    return not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and type(a) is type(b) and bool(a == b)


def source_of(walk: LipschitzWalk, n: fx.Node) -> fx.Node:
    """The one argument that depends on the network's input.

    Raises:
        NoClaim: there is not exactly one.
    """
    depending = [node for node in n.all_input_nodes if walk.depends(node)]
    if len(depending) != 1:
        raise NoClaim("several arguments depend on the input")
    return depending[0]


def axes_of(walk: LipschitzWalk, n: fx.Node, dim: Any) -> list[int]:
    """The axes of a reduction, counted from the front.

    Raises:
        NoClaim: it is over what may be the batch of two, or over everything.
    """
    listed = [dim] if isinstance(dim, int) else list(dim or ())
    axes = [a % walk.env[n.args[0]].ndim for a in listed]  # type: ignore[index]
    if not axes or (0 in axes and len(walk.env[n.args[0]]) == 2):  # type: ignore[index]
        raise NoClaim("over the batch")
    return axes


def repeats(walk: LipschitzWalk, n: fx.Node, argument: Any) -> float:
    """Square root of the number of copies that broadcasting makes of each element of an argument, rounded up."""
    return root_of_count(walk.env[n].numel() / max(1, walk.env[argument].numel()))


def root_of_count(count: float) -> float:
    """Square root of a number of copies, rounded up: the norm of the operator x -> (x, ..., x)."""
    return 1.0 if count <= 1 else math.nextafter(math.sqrt(count), math.inf)


def element_numbers(walk: LipschitzWalk, node: fx.Node) -> Tensor:
    """A tensor of the shape of a node's value with the numbers 1, 2, …."""
    value = walk.env[node]
    return torch.arange(1.0, value.numel() + 1, dtype=torch.float64, device=value.device).reshape(value.shape)


def counts_of(found: Tensor, size: int) -> Tensor:
    """How often each of the numbers 1 to ``size`` was found; a constant among them only raises a count."""
    places = found[(found >= 1) & (found <= size)].long()
    return torch.bincount(places, minlength=size + 1)


def most_copies(walk: LipschitzWalk, n: fx.Node, source: fx.Node) -> int:
    """How often a node's value contains the element of an argument that it contains most often."""
    numbers = element_numbers(walk, source)
    found = walk.rerun(n, lambda node: numbers if node is source else walk.env[node])
    return int(counts_of(found, numbers.numel()).max())


def node_function(walk: LipschitzWalk, n: fx.Node, source: fx.Node) -> Function:
    """The node's value as a function of one argument, for any batch size; other arguments keep their values."""

    def call(X: Tensor) -> Tensor:
        def value_of(node: fx.Node) -> Any:
            value = X if node is source else walk.env[node]
            return value.to(X.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        if operation_of(n.target) in _VIEWS:
            return X.reshape(len(X) if len(walk.env[n]) == len(walk.env[source]) else -1, *walk.env[n].shape[1:])
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), value_of)
        if operation_of(n.target) is aten.expand and len(X) != len(walk.env[source]):
            args = (args[0], [len(X), *walk.env[n].shape[1:]])
        return n.target(*args, **kwargs)  # type: ignore[operator]

    return call


def linear_step(
    walk: LipschitzWalk, n: fx.Node, source: fx.Node, function: Function | None = None, norm: float | None = None,
    small: Shape | None = None, diagonal: bool = False, selects: bool = False, groups: int = 1,
) -> float | Affine:  # fmt: skip
    """The affine step of a node whose value is a linear function of one argument, plus a constant.

    Args:
        walk: The walk.
        n: The node.
        source: The argument.
        function: The linear function on a batch of any size; default the node's own.
        norm: Its norm, rounded up, if it is known.
        small: A smaller input shape with the same norm.
        diagonal: Whether it multiplies each element by a number.
        selects: Whether each element of the value is an element of the argument, or constant.
        groups: Number of groups of channels that it treats separately.
    """
    before, after = walk.env[source].shape, walk.env[n].shape
    call = function or node_function(walk, n, source)
    if before[:1] != after[:1] or len(before) < 2 or len(after) < 2 or not _by_sample(walk, source, call):
        if norm is None:
            raise NoClaim("across the batch")
        return product_up(walk.bound(source), norm)

    def at(shape: Shape) -> Callable[[], LinearOperator]:
        return lambda: linear_map(call, shape, walk.env[source].device, diagonal=diagonal, groups=groups)

    known: Any = norm if norm is not None else ((n, small), at(small)) if small is not None else None
    return Affine(source, (n, tuple(before[1:])), at(tuple(before[1:])), known, picks=call if selects else None)


def _by_sample(walk: LipschitzWalk, source: fx.Node, call: Function) -> bool:
    """Whether a linear function treats each sample alone, for any batch size: tried on batches of 1, 3 and the graph's own."""
    value = walk.env[source]
    inputs = torch.arange(1.0, value.numel() + 1, dtype=torch.float64, device=value.device).reshape(value.shape)
    whole = call(inputs)
    try:
        parts = call(inputs[:1]), call(torch.cat([inputs[-1:], inputs[:1], inputs[:1]]))
    except (RuntimeError, IndexError):
        return False
    wanted = whole[:1], torch.cat([whole[-1:], whole[:1], whole[:1]])
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-9) for a, b in zip(parts, wanted, strict=True))


def linear_map(
    call: Function, in_shape: Shape, device: torch.device, diagonal: bool = False, groups: int = 1
) -> LinearOperator:
    """The operator of a linear function of tensors, with its adjoint from the vector-Jacobian product; in float64."""

    def adjoint(Y: Tensor) -> Tensor:
        with torch.enable_grad():
            X = Y.new_zeros(len(Y), *in_shape, requires_grad=True)
            return torch.autograd.grad(call(X), X, Y)[0]

    with torch.no_grad():
        out_shape = tuple(call(torch.zeros(1, *in_shape, dtype=torch.float64, device=device)).shape[1:])
    return LinearOperator(
        in_shape, out_shape, torch.float64, device, call, adjoint,
        build=lambda dtype: linear_map(call, in_shape, device, diagonal, groups),
        diagonal=diagonal, groups=groups if in_shape[0] % groups == 0 and out_shape[0] % groups == 0 else 1,
    )  # fmt: skip


def identity(walk: LipschitzWalk, n: fx.Node, source: fx.Node) -> float | Affine:
    """The affine step of a node whose value is another node's value, or differs from it by a constant."""
    return linear_step(walk, n, source, lambda X: X, 1.0, diagonal=True, selects=True)


def increasing(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The box of a function that increases with every argument: its values at the ends of their boxes."""
    return at_end(walk, n, 0), at_end(walk, n, 1)


def between(low: float, high: float) -> Callable[[LipschitzWalk, fx.Node], Box]:
    """The box of a function with values between two numbers."""
    return lambda walk, n: (torch.full_like(walk.env[n], low), torch.full_like(walk.env[n], high))


def sums(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The box of sums of elements of the first argument with weights >= 0."""
    at = lambda end: walk.rerun(n, lambda node: end if node is n.args[0] else walk.env[node])  # noqa: E731
    return sum_of_ends(at, walk.box(n.args[0]))


def sum_of_ends(function: Function, box: Box) -> Box:
    """The box of a sum with weights >= 0: its values at the ends, and their rounding errors, relative to absolute values."""
    low, high = (function(end) for end in box)
    least, most = ((SUM_UP - 1) * function(end.abs()) for end in box)
    return low - least, high + most


def at_end(walk: LipschitzWalk, n: fx.Node, end: int) -> Any:
    """The node's value at one end of its arguments' boxes."""
    return walk.rerun(n, lambda node: walk.box(node)[end])


def rounded_numbers(*numbers: Any) -> int:
    """The roundings of numbers that are elements of a result, to the type of the forward pass: 0 if float32 holds them all."""
    given = [float(value) for value in numbers if isinstance(value, int | float) and math.isfinite(value)]
    return int(any(float(torch.tensor(value, dtype=torch.float32)) != value for value in given))


def exact(walk: Any, n: fx.Node) -> tuple[int, float]:
    """The rounding of selections, comparisons and changes of sign: none; an affine one has the elements of its argument."""
    step = walk.affine.get(n)
    return 0, walk.size(step.source) * step.norm * UP if step is not None and isinstance(step.norm, float) else math.inf


def selected(walk: Any, n: fx.Node) -> tuple[int, float]:
    """The rounding of selections from arguments and numbers: none but that of the numbers, to the type of the forward pass."""
    given = [*n.args, *n.kwargs.values()]
    numbers = [float(value) for value in given if isinstance(value, int | float) and math.isfinite(value)]
    nodes = [value for value in given if isinstance(value, fx.Node) and is_numbers(walk.env[value])]
    size = sum(walk.size(value) * repeats(walk, n, value) for value in nodes)
    return rounded_numbers(*numbers), size + sum(map(abs, numbers)) * math.sqrt(walk.elements(n)) * UP
