"""Operations that reshape, reorder, select, copy, split or concatenate elements.

Nothing is computed, so that only the number of copies of each element counts; where copies are summed, the number of terms.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import fx

from ...numerics import product_up
from ..boxes import Box
from ..table import NoClaim, operation_of, rule
from ..walk import Affine, LipschitzWalk
from .node_arguments import (
    Function,
    arguments,
    aten,
    counts_of,
    element_numbers,
    exact,
    identity,
    increasing,
    linear_step,
    most_copies,
    node_function,
    root_of_count,
    same,
    source_of,
)

_BATCHNORMS = (aten._native_batch_norm_legit_no_training,)
_SPLITS = (aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.tensor_split, aten.unsafe_split, aten.unsafe_chunk)


@rule(
    aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.unsqueeze, aten.squeeze, aten.flip,
    aten.roll, aten.slice, aten.select, aten.narrow, aten.t, aten.numpy_T, aten.mT, aten.movedim, aten.flatten,
    aten.unflatten, aten.rot90,
    aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle, aten.diagonal, aten.tril, aten.triu,
    box=increasing, rounding=exact,
)  # fmt: skip
def rearranged(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """Elements in another order or shape, or some of them, each at most once: norm 1."""
    return linear_step(walk, n, source_of(walk, n), norm=1.0, selects=True)


@rule(aten.clone, aten.alias, aten.contiguous, aten.detach, aten.lift_fresh_copy, aten.detach_copy, aten.positive,
      box=increasing, rounding=exact)  # fmt: skip
def unchanged(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """The same values."""
    return identity(walk, n, source_of(walk, n))


@rule(
    aten.expand, aten.repeat, aten.tile, aten.repeat_interleave, aten.index, aten.index_select, aten.gather, aten.unfold,
    aten.im2col, aten.broadcast_to, aten.take_along_dim, aten.embedding,
    box=increasing, rounding=exact,
)  # fmt: skip
def copied(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """Indexing, windows and repetition have constant sqrt(k), for k copies of the element that is copied most often."""
    source = n.args[0]
    if any(walk.depends(node) for node in n.all_input_nodes if node is not source):
        raise NoClaim("at places that depend on the input")
    assert isinstance(source, fx.Node)
    return linear_step(walk, n, source, norm=root_of_count(most_copies(walk, n, source)), selects=True)


@rule(*_SPLITS, box=increasing, rounding=exact)
def split(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """The parts of a tensor, together: norm 1. Each part is a step of its own, see `part`, if the first axis is not split."""
    source = n.args[0]
    assert isinstance(source, fx.Node)
    axis = arguments(n)["dim"]
    if axis % walk.env[source].ndim == 0:
        return walk.bound(source)
    return Affine(source, (n,), _never, 1.0)


def _never() -> Any:
    raise AssertionError("the parts of a split are steps, not the split itself")


def part_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """The box of one of several tensors."""
    (low, high), index = walk.box(n.args[0]), n.args[1]
    return low[index], high[index]


def part_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """None for a part that is selected; that of a batch normalisation for its result."""
    whole = n.args[0]
    assert isinstance(whole, fx.Node)
    if operation_of(whole.target) not in _BATCHNORMS:
        return exact(walk, n)
    rounding = walk.row(whole).rounding
    assert rounding is not None
    return rounding(walk, whole)


@rule(operator.getitem, box=part_box, rounding=part_rounding)
def part(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """One of an operation's results: of a split or a batch normalisation a step of its own, else with the bound of all."""
    whole, index = n.args
    assert isinstance(whole, fx.Node) and isinstance(index, int)
    operation = operation_of(whole.target)
    if operation in _BATCHNORMS and index == 0:
        return walk.affine[whole] if whole in walk.affine else walk.bound(whole)
    if operation not in _SPLITS or whole not in walk.affine:
        return walk.bound(whole)
    source = walk.affine[whole].source
    parts = node_function(walk, whole, source)
    return linear_step(walk, n, source, lambda X: parts(X)[index], 1.0, selects=True)


@rule(aten.cat, aten.concat, aten.stack, aten.hstack, aten.vstack, aten.meshgrid, box=increasing, rounding=exact)
def concatenation(walk: LipschitzWalk, n: fx.Node) -> float:
    """The bound of the parts together (see `joint`). No constant along the batch axis."""
    axis = arguments(n).get("dim", 0)
    if axis % walk.env[n].ndim == 0 and (operation_of(n.target) is not aten.stack or len(walk.env[n]) == 2):
        raise NoClaim("along the batch")
    return joint(walk, n.args[0])  # type: ignore[arg-type]


def joint(walk: LipschitzWalk, parts: Sequence[Any]) -> float:
    """The Lipschitz bound of several values together: the squares of their bounds add, ‖(a, b)‖² = ‖a‖² + ‖b‖².

    Parts of one value count once, times the square root of the number of copies of its most copied element. The maximum and the
    minimum of the same elements are a part of these elements sorted, which never increases a distance, so that they count as
    the elements themselves.
    """
    grouped: dict[fx.Node, list[tuple[Any, list[Function]]]] = {}
    for value in _unsorted(walk, [value for value in parts if walk.depends(value)]):
        root, functions = _root(walk, value)
        grouped.setdefault(root, []).append((value, functions))
    return _root_of_squares([_of_one(walk, root, members) for root, members in grouped.items()])


def _of_one(walk: LipschitzWalk, root: fx.Node, members: list[tuple[Any, list[Function]]]) -> float:
    """The bound of parts of one value together."""
    apart = _root_of_squares([walk.bound(value) for value, _ in members])
    if len(members) == 1:
        return apart
    numbers = element_numbers(walk, root)
    found = [reduce(lambda value, function: function(value), functions, numbers) for _, functions in members]
    counts = torch.stack([counts_of(value, numbers.numel()) for value in found]).sum(0)
    return min(apart, product_up(walk.bound(root), root_of_count(float(counts.max()))))


def _root_of_squares(bounds: list[float]) -> float:
    """The root of the sum of squares, rounded up."""
    return sum(bounds) if len(bounds) < 2 else math.nextafter(math.hypot(*bounds) * (1 + 1e-15), math.inf)


_LARGEST, _SMALLEST = (aten.maximum, aten.amax, aten.fmax, aten.max), (aten.minimum, aten.amin, aten.fmin, aten.min)


def _unsorted(walk: LipschitzWalk, parts: list[Any]) -> list[Any]:
    """The parts, with each maximum and minimum of the same elements replaced by these elements."""
    found, waiting = [], list(parts)
    while waiting:
        value = waiting.pop(0)
        of = _extreme(walk, value)
        match = next((other for other in waiting if of is not None and _opposite(of, _extreme(walk, other))), None)
        if match is None or of is None:
            found.append(value)
            continue
        waiting.remove(match)
        found.extend(value for value in of[1] if walk.depends(value))
    return found


def _opposite(one: Any, other: Any) -> bool:
    """Whether one is the maximum and the other the minimum of the same elements along the same axes."""
    if other is None or one[0] == other[0] or one[2] != other[2] or len(one[1]) != len(other[1]):
        return False
    return same(one[1], other[1]) or same(one[1], other[1][::-1])


def _extreme(walk: LipschitzWalk, node: fx.Node) -> tuple[bool, tuple[Any, ...], Any] | None:
    """Whether a node is a maximum or a minimum, of which nodes, along which axes; None if it is neither."""
    while node in walk.affine and operation_of(node.target) is aten.copy:
        node = walk.affine[node].source
    if node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]
    operation = operation_of(node.target)
    if operation not in _LARGEST + _SMALLEST:
        return None
    a = arguments(node)
    if "other" in a:
        pair = {a["self"], a["other"]}
        same = all(isinstance(v, fx.Node) and walk.env[v].shape == walk.env[node].shape for v in pair)
        return (operation in _LARGEST, tuple(sorted(pair, key=str)), None) if same and len(pair) == 2 else None
    dim, ndim = a.get("dim"), walk.env[a["self"]].ndim
    axes = [axis % ndim for axis in ([dim] if isinstance(dim, int) else dim or ())]
    if not axes or 0 in axes:
        return None
    size = math.prod(walk.env[a["self"]].shape[axis] for axis in axes)
    return (operation in _LARGEST, (a["self"],), tuple(axes)) if size > 1 else None


def _root(walk: LipschitzWalk, node: fx.Node) -> tuple[fx.Node, list[Function]]:
    """The node that a node's elements are taken from, and the functions that take them, in order."""
    functions: list[Function] = []
    while node in walk.affine and (picks := walk.affine[node].picks) is not None and walk.passes(node):
        functions.insert(0, picks)
        node = walk.affine[node].source
    return node, functions


@rule(aten.col2im)
def summed_where_they_overlap(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """Sums of disjoint sets of at most k elements have constant sqrt(k) (Cauchy-Schwarz)."""
    source = source_of(walk, n)
    terms = float(walk.rerun(n, lambda node: torch.ones_like(walk.env[node])).max())
    return linear_step(walk, n, source, norm=math.nextafter(math.sqrt(terms), math.inf))
