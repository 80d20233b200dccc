"""Maxima, minima and sorted values; in overlapping windows an element may be the maximum of several."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from ...numerics import product_up
from ..table import NoClaim, operation_of, rule
from ..walk import LipschitzWalk
from .node_arguments import arguments, aten, axes_of, exact, increasing, repeats
from .rearranging import joint

_POOLS = {
    aten.max_pool1d: 1, aten.max_pool2d: 2, aten.max_pool3d: 3, aten.max_pool1d_with_indices: 1,
    aten.max_pool2d_with_indices: 2, aten.max_pool3d_with_indices: 3,
}  # fmt: skip
_ADAPTIVE = {aten.adaptive_max_pool1d: 1, aten.adaptive_max_pool2d: 2, aten.adaptive_max_pool3d: 3}


@rule(*_POOLS, box=increasing, rounding=exact)
def max_pool(walk: LipschitzWalk, n: fx.Node) -> float:
    """Max-pooling has constant sqrt(k) if an element lies in at most k windows.

    Each output changes by no more than one of the elements in its window. Along each axis an element lies in at most
    ceil(window / stride) windows, or as many as a window has elements if windows are dilated.
    """
    a, axes = arguments(n), _POOLS[operation_of(n.target)]
    window, stride, dilation = (_each(v, axes) for v in (a["kernel_size"], a["stride"] or a["kernel_size"], a["dilation"]))
    most = [w if d > 1 else math.ceil(w / s) for w, s, d in zip(window, stride, dilation, strict=True)]
    return product_up(walk.bound(n.args[0]), math.nextafter(math.sqrt(math.prod(most)), math.inf))


def _each(setting: int | Sequence[int], axes: int) -> list[int]:
    listed = [setting] if isinstance(setting, int) else list(setting)
    return listed * (axes if len(listed) == 1 else 1)


@rule(*_ADAPTIVE, box=increasing, rounding=exact)
def adaptive_max_pool(walk: LipschitzWalk, n: fx.Node) -> float:
    """Windows of an adaptive pool overlap in at most 2 elements an axis, or not at all if the sizes divide each other."""
    value = walk.env[n][0] if isinstance(walk.env[n], tuple) else walk.env[n]
    sizes = zip(walk.env[n.args[0]].shape, value.shape, strict=True)  # type: ignore[index]
    overlaps = [1 if before % after == 0 else -(-after // before) + 1 for before, after in sizes]
    return product_up(walk.bound(n.args[0]), math.nextafter(math.sqrt(math.prod(overlaps)), math.inf))


@rule(aten.amax, aten.amin, aten.max, aten.min, aten.kthvalue, aten.median, aten.nanmedian, box=increasing, rounding=exact)
def ranked(walk: LipschitzWalk, n: fx.Node) -> float:
    """A value of given rank along axes changes by no more than the largest change of an element: constant 1.

    For the maximum or minimum of two tensors see `pairwise_extreme`.
    """
    a = arguments(n)
    if "other" in a:
        return pairwise_extreme(walk, n)
    axes_of(walk, n, a.get("dim"))
    return walk.bound(n.args[0])


@rule(aten.maximum, aten.minimum, aten.fmax, aten.fmin, box=increasing, rounding=exact)
def pairwise_extreme(walk: LipschitzWalk, n: fx.Node) -> float:
    """Each element changes by no more than one of its two arguments, so that the bound is that of both together."""
    parts = [value for value in n.args[:2] if walk.depends(value)]
    copies = max(repeats(walk, n, value) for value in parts)
    return product_up(joint(walk, parts), copies)


@rule(aten.sort, aten.topk, aten.msort, box=increasing, rounding=exact)
def sorted_values(walk: LipschitzWalk, n: fx.Node) -> float:
    """Sorting never increases a distance (rearrangement inequality), nor does a choice of the largest values."""
    dim = arguments(n).get("dim", -1)
    axes_of(walk, n, dim)
    if arguments(n).get("sorted") is False:
        raise NoClaim("in no order")
    if any(walk.depends(value) for value in n.args[1:]):
        raise NoClaim("with settings that depend on the input")
    return walk.bound(n.args[0])
