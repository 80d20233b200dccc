"""Properties of a node that rules use: its module, the argument that depends on the input, axes and numbers of copies.

Also two operators that several rules share: that of a function of tensors with a known adjoint, and the identity.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...operators import LinearOperator, Shape
from ..walk import Affine, LipschitzWalk

_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def module_of(walk: LipschitzWalk, n: fx.Node) -> nn.Module:
    """The module that a node calls."""
    module = walk.called(n)
    assert module is not None
    return module


def source_of(walk: LipschitzWalk, n: fx.Node) -> fx.Node:
    """The one argument that depends on the network's input.

    Raises:
        ValueError: there is not exactly one.
    """
    depending = [node for node in n.all_input_nodes if walk.depends(node)]
    if len(depending) != 1:
        raise ValueError("several arguments depend on the input")
    return depending[0]


def given(n: fx.Node, *names: str) -> dict[str, Any]:
    """A call's arguments after the first, by name, whether they are positional or keyword arguments."""
    return dict(zip(names, n.args[1:], strict=False)) | dict(n.kwargs)


def axes_of(walk: LipschitzWalk, n: fx.Node) -> list[int]:
    """The axes of a reduction, counted from the front; an empty list for a reduction over all axes."""
    axes = given(n, "dim").get("dim")
    listed = [axes] if isinstance(axes, int) else list(axes) if axes is not None else []
    return [a % walk.env[source_of(walk, n)].ndim for a in listed]


def axes_named(name: str) -> int:
    """The number of spatial axes in the name of a module or function: 2 for MaxPool2d and avg_pool2d."""
    return int(name[-2])


def in_place(n: fx.Node) -> bool:
    """Whether a node overwrites its first argument with its result."""
    return n.target in _IN_PLACE or (isinstance(n.target, str) and n.target.endswith("_"))


def repeats(walk: LipschitzWalk, n: fx.Node, argument: Any) -> float:
    """Square root of the number of copies that broadcasting makes of each element of an argument, rounded up."""
    return root_of_count(walk.env[n].numel() / walk.env[argument].numel())


def root_of_count(count: float) -> float:
    """Square root of a number of copies, rounded up: the norm of the operator x -> (x, ..., x)."""
    return 1.0 if count == 1 else math.nextafter(math.sqrt(count), math.inf)


def operator_of(
    walk: LipschitzWalk, source: fx.Node, out_shape: Shape, forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor], diagonal: bool = False,
) -> Callable[[], LinearOperator]:  # fmt: skip
    """A function that makes the operator of a linear function of tensors and its adjoint."""
    in_shape, device = walk.shape(source), walk.env[source].device

    def build(dtype: torch.dtype = torch.float64) -> LinearOperator:
        return LinearOperator(in_shape, out_shape, dtype, device, forward, adjoint, build, diagonal=diagonal)

    return build


def identity(walk: LipschitzWalk, n: fx.Node, source: Any) -> Affine:
    """The affine step of a node whose value is another node's value, or differs from it by a constant."""
    shape = walk.shape(source)
    return Affine(source, (n.name, shape), operator_of(walk, source, shape, lambda X: X, lambda Y: Y, diagonal=True), 1.0)
