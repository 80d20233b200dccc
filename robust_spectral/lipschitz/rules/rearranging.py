"""Rules of operations that reshape, reorder, concatenate, select, copy or pad elements.

Nothing is computed, so that only the number of copies of each element counts; where copies are summed, the number of terms.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...numerics import product_up
from ..registry import rule
from ..walk import Affine, LipschitzWalk
from .node_arguments import given, operator_of, root_of_count, source_of


@rule(torch.cat, torch.concat, torch.stack)
def cat(walk: LipschitzWalk, n: fx.Node) -> float:
    """‖(a, b)‖² = ‖a‖² + ‖b‖²: the squares of the branches' bounds add. No constant along the batch axis."""
    parts: Any = n.args[0] if n.args else n.kwargs["tensors"]
    axis = given(n, "dim").get("dim", 0)
    if axis % walk.env[n].ndim == 0:
        return math.inf
    if isinstance(parts, fx.Node):  # a node whose value is a tuple of tensors
        return walk.bound(parts)
    return math.nextafter(math.hypot(*(walk.bound(part) for part in parts)), math.inf)


@rule(
    nn.Flatten, nn.Unflatten, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze,
    "flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten",
)  # fmt: skip
def rearranged(walk: LipschitzWalk, n: fx.Node) -> float | Affine:
    """The same elements in another shape: an operator of norm 1."""
    source = source_of(walk, n)
    before, after = tuple(walk.env[source].shape), tuple(walk.env[n].shape)
    if after[0] != before[0] or not before[1:] or not after[1:]:
        return walk.bound(source)
    build = operator_of(
        walk, source, after[1:], lambda X: X.reshape(len(X), *after[1:]), lambda Y: Y.reshape(len(Y), *before[1:])
    )
    return Affine(source, (n.name, before[1:]), build, 1.0)


@rule(
    torch.permute, torch.transpose, torch.roll, torch.chunk, torch.split, torch.unbind, torch.tensor_split, torch.flip,
    "permute", "transpose", "roll", "chunk", "split", "unbind", "tensor_split", "flip", "t", "movedim", "narrow", "select",
    "swapaxes", "clone", "masked_fill", nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
)  # fmt: skip
def picked(walk: LipschitzWalk, n: fx.Node) -> float:
    """Constant 1 for elements in another order, split into parts (bounded together), selected, or padded by constants."""
    return walk.bound(source_of(walk, n))


@rule("type_as", "reshape_as", "view_as")
def like_another(walk: LipschitzWalk, n: fx.Node) -> float:
    """Constant 1 for a change to the type or shape of another value, whose elements have no effect."""
    return walk.bound(n.args[0])


@rule(
    operator.getitem, F.pad, nn.Unfold, F.unfold, "unfold", "expand", "expand_as", "repeat", torch.tile, "repeat_interleave",
)  # fmt: skip
def copied(walk: LipschitzWalk, n: fx.Node) -> float:
    """Indexing, padding and repetition have constant sqrt(k), for k copies of the element that is copied most often.

    k is counted by running the node on the numbers 1, 2, ….
    """
    source: Any = n.args[0]
    value = walk.env[source]
    if n.target != "expand_as" and any(walk.depends(node) for node in n.all_input_nodes if node is not source):
        return math.inf
    if not isinstance(value, Tensor):  # one tensor of a tuple
        return walk.bound(source)
    numbers = torch.arange(1.0, value.numel() + 1, dtype=torch.float64, device=value.device).reshape(value.shape)
    found = walk.rerun(n, lambda node: numbers if node is source else walk.env[node]).flatten()
    places = found[(found >= 1) & (found <= value.numel())].long()  # a constant among them only raises the count
    most = int(torch.bincount(places).max()) if places.numel() else 1
    return product_up(walk.bound(source), root_of_count(most))


@rule(nn.Fold, F.fold)
def summed_where_they_overlap(walk: LipschitzWalk, n: fx.Node) -> float:
    """Sums of disjoint sets of at most k elements have constant sqrt(k) (Cauchy-Schwarz)."""
    source = source_of(walk, n)
    terms = float(walk.rerun(n, lambda node: torch.ones_like(walk.env[node])).max())
    return product_up(walk.bound(source), math.nextafter(math.sqrt(terms), math.inf))


@rule(getattr)
def attribute(walk: LipschitzWalk, n: fx.Node) -> float:
    """A transpose has constant 1; other attributes have none."""
    return walk.bound(n.args[0]) if n.args[1] in ("T", "mT", "H", "mH") else math.inf
