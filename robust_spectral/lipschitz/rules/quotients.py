"""Quotients of functions of the input, which are bounded on a box where the divisor is not 0."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from ...numerics import product_up
from ..boxes import Box, box_intersection
from ..table import NoClaim, rule
from ..walk import Affine, LipschitzWalk
from .arithmetic import most_met, product_rounding, scale
from .node_arguments import UP, arguments, aten, calls
from .patterns import plus

_NOT_NEGATIVE = (aten.relu, aten.relu6, aten.sigmoid, aten.hardsigmoid, aten.softmax, aten.abs, aten.square, aten.exp)
_REARRANGED = (aten.transpose, aten.permute, aten.mT, aten.view, aten.reshape, aten.to, aten._to_copy)


def quotient_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The smallest and the largest quotient are quotients of ends, if the divisor's interval excludes 0."""
    (low, high), (least, most) = walk.box(n.args[0]), map(torch.as_tensor, walk.box(n.args[1]))
    if arguments(n).get("rounding_mode") is not None or not bool((least * most > 0).all()):
        raise NoClaim("by what may be 0")
    ends = [torch.as_tensor(x / y) for x in (low, high) for y in (least, most)]
    found = reduce(torch.minimum, ends), reduce(torch.maximum, ends)
    average = _average_box(walk, n)
    return found if average is None else box_intersection(found, average)


def _average_box(walk: LipschitzWalk, n: Any) -> Box | None:
    """The box of Σ w v / (Σ w u + eps) with weights w >= 0: with u >= l > 0, it lies between 0 and the extremes of v / l.

    Linear attention is such an average, of columns of Q (K V) by the last column, where Q and K are not negative.
    """
    above, (below, eps) = n.args[0], plus(n.args[1])
    if not eps > 0 or not calls(above, aten.slice) or not calls(below, aten.slice) or above.args[0] is not below.args[0]:
        return None
    whole: Any = above.args[0]
    last = walk.env[whole].ndim - 1
    if above.args[1] != last or below.args[1:3] != (last, -1) or not calls(whole, aten.matmul) or last < 2:
        return None
    if not calls(inner := whole.args[1], aten.matmul) or not all(map(_not_negative, (whole.args[0], inner.args[0]))):
        return None
    low, high = walk.box(inner.args[1])
    least = float(low[..., -1].min())
    if low.ndim < 2 or not least > 0:
        return None
    ends = low.amin(-2, keepdim=True).clamp_max(0) / least, high.amax(-2, keepdim=True).clamp_min(0) / least
    one, other = (above.target(end.expand(walk.env[whole].shape), *above.args[1:]) for end in ends)
    return one, other


def _not_negative(node: Any) -> bool:
    while calls(node, *_REARRANGED):
        node = node.args[0]
    return calls(node, *_NOT_NEGATIVE)


@rule(aten.div, aten.true_divide, box=quotient_box, rounding=product_rounding)
def quotient(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """d(x / y) = (dx - (x / y) dy) / y, with the extreme values of y and x / y on a box where y is not 0: local only.

    An element that broadcasting puts into several quotients counts with the square root of the sum of their squared factors.
    """
    x, y = n.args[:2]
    if not walk.depends(y):
        return scale(walk, n)
    if not walk.local or arguments(n).get("rounding_mode") is not None:
        raise NoClaim("by a function of the input")
    shape, (low, high), (smallest, largest) = walk.env[n].shape, walk.box(y), quotient_box(walk, n)
    least: Tensor = torch.maximum(low, -high).double().expand(shape)  # the smallest absolute value
    met = most_met(torch.maximum(largest, -smallest) / least, walk.env[y].shape)  # type: ignore[index]
    part = product_up(walk.bound(y), met * UP)
    if walk.depends(x):
        part += product_up(walk.bound(x), most_met(1 / least, walk.env[x].shape) * UP)  # type: ignore[index]
    return math.nextafter(part, math.inf)
