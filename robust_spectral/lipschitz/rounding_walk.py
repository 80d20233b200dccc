"""The rounding error of a forward pass: the distance between its output and the network's value in real arithmetic.

Errors propagate by the same rules as Lipschitz bounds: a rule that bounds the distance of a node's values by the distance of
its arguments applies to errors as well. Each node adds its own rounding error: a sum of k terms, in any order, errs by at most
γ_k = k u / (1 - k u) times the sum of the terms' absolute values, where u is the unit roundoff (Higham, Accuracy and Stability
of Numerical Algorithms, 2nd ed., 3.1 and 4.2). Each rounding rule gives k and a bound of that sum, in the L2 norm over a node's
elements, for all inputs in a box. Covered are sums of products in any order, with or without fused multiply-add; Winograd and
Fourier convolutions and TF32 are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ..numerics import product_up
from .graph import where
from .table import NoClaim, operation_of
from .walk import CONSTANTS, Affine, LipschitzWalk, named

aten = torch.ops.aten


class RoundingWalk(LipschitzWalk):
    """A walk whose bounds are the rounding errors of a forward pass in one dtype, in L2, for any single input in a box.

    After a cast, operations count as rounded to float32: they may be, in whatever dtype the model is run.

    Args:
        walk: The network's Lipschitz walk for all inputs (not local).
        values: The value of each node, in float64, at the centre of the box.
        dtype: The dtype of the forward pass.
        radius: Half the diagonal of the box.
    """

    _of_input = 1e-290  # the input's error: pixels are exact, but a node of bound 0 would count as a constant

    def __init__(self, walk: LipschitzWalk, values: Mapping[fx.Node, Any], dtype: torch.dtype, radius: float) -> None:
        super().__init__(walk.graph, values, walk.each, walk.norms)
        self.lipschitz, self.dtype, self._radius = walk.bounds, dtype, radius
        self._cast = self._in_float32()
        self._together: dict[fx.Node, Any] = {}  # rounding of the patterns that apply
        self._sums: dict[fx.Node, float] = {}  # bounds of the computed values' norms, from the terms summed
        self.unit, self._tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).tiny

    def _in_float32(self) -> set[fx.Node]:
        """The nodes that may be computed in float32 whatever the dtype of the forward pass: casts, constants, and all after."""
        if self.graph.dtype == torch.float64:
            return {n for n in self.graph.nodes if isinstance(v := n.meta.get("val"), Tensor) and v.dtype == torch.float32}
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            operation = operation_of(node.target)
            casts = operation in _CASTS or any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
            source = node.args[operation is aten.copy] if casts and node.args else None
            made = node not in self.graph.moving and not self._from_weights(node)
            if isinstance(source, fx.Node) and (source in self.graph.moving or not held(self.env[source])):
                found |= {source, node}
            elif (made and not held(self.env[node])) or any(argument in found for argument in node.all_input_nodes):
                found.add(node)
        return found

    def _from_weights(self, node: fx.Node) -> bool:
        """Whether a constant is computed from tensors of the model, whose dtype it follows."""
        return node in self.graph.constants or any(map(self._from_weights, node.all_input_nodes))

    def size(self, node: Any) -> float:  # type: ignore[override]
        """An upper bound of the L2 norm of an argument's computed value, for two inputs."""
        if not self.depends(node):
            return float(self.constant(node).norm()) * (1 + 1e-12)
        sizes = [self._sums.get(node, math.inf)]
        if node in self.lipschitz and isinstance(self.env[node], Tensor):
            centre = float(self.env[node].double().norm()) * (1 + 1e-9)
            sizes.append(centre + product_up(self.lipschitz[node], self._radius) + self.bound(node))
        return min(sizes)

    def elements(self, node: Any) -> float:
        """The number of elements of a node's value for two inputs, summed over the tensors of a tuple."""
        value = self.env[node]
        return float(sum(part.numel() for part in ([value] if isinstance(value, Tensor) else value)))

    def bound_of(self, last: float | Affine) -> float:
        """Error of a step's result, without the rounding error of the step itself."""
        total = super().bound_of(last)
        if not isinstance(last, Affine):
            return total
        node, later = last.source, [last]
        while node in self.affine:
            total += product_up(self.added[node], self.product(later)) * (1 + 1e-15)
            later.insert(0, self.affine[node])
            node = later[0].source
        return total

    def by_rules(self, n: fx.Node) -> float | Affine:
        """The bound by a pattern whose rounding is known, else by the row: other patterns pass over operations that round."""
        for bound, rounding in self.patterns(n):
            if rounding is not None and (found := bound(self, n)) is not None:
                self._together[n] = rounding
                return found
        return self.row(n).bound(self, n)

    def _bound(self, n: fx.Node) -> float | Affine:
        found = super()._bound(n)
        if isinstance(found, Affine):
            self.affine[n], self.added[n] = found, math.inf  # until its rounding is known
        elif found == math.inf or self.env[n] is None or not self.depends(list(n.all_input_nodes)):
            return found
        rounded = self._claimed(n, lambda: self._rounded(n))
        self.added[n], self._sums[n] = (math.inf, math.inf) if rounded == math.inf else rounded
        return found if isinstance(found, Affine) else found + self.added[n]

    def unknown(self, n: fx.Node, what: str) -> float:
        """Record, if it is the first, that the rounding of a node is not known; returns inf."""
        self.reason = self.reason or f"it is not known how {named(n, what)} rounds (at {where(n)})"
        return math.inf

    def _rounded(self, n: fx.Node) -> tuple[float, float]:
        """The rounding error that a node adds, and a bound of the norm of its computed value."""
        rounding = self._together.get(n) or self.row(n).rounding
        if rounding is None:
            raise NoClaim
        terms, total = rounding(self, n)
        unit, tiny = (2.0**-24, 2.0**-126) if n in self._cast else (self.unit, self._tiny)
        if terms * unit > 0.5:
            raise NoClaim(f"a sum of {terms} terms")
        if terms == 0:
            return 0.0, total
        share = terms * unit / (1 - terms * unit) * (1 + 1e-12)
        underflow = terms * tiny * math.sqrt(self.elements(n))
        return share * total + underflow, total * (1 + share) * (1 + 1e-12) + underflow


_CASTS = (aten._assert_tensor_metadata, aten._to_copy, aten.to, aten.copy)
_MADE_EXACTLY = (
    aten.zeros, aten.ones, aten.eye, aten.full, aten.empty, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros,
    aten.new_ones, aten.lift_fresh_copy, aten.clone, aten.alias, aten.detach, aten.contiguous, aten.copy,
    aten.slice_scatter, aten.select_scatter, aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.expand,
    aten.slice, aten.select, aten.unsqueeze, aten.squeeze, aten.permute, aten.transpose, aten.t, aten.cat, aten.stack,
    aten.index, aten.fill, aten.repeat, aten.to, aten._to_copy, aten.type_as,
)  # fmt: skip


def _rounds(node: fx.Node) -> bool:
    """Whether a constant node, or one that it is made of, computes floating-point numbers."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float) and math.isfinite(a)]
    if not held(torch.tensor(numbers, dtype=torch.float64)):
        return True
    if operation_of(node.target) in CONSTANTS:
        return False
    return operation_of(node.target) not in _MADE_EXACTLY or any(map(_rounds, node.all_input_nodes))


def held(value: Any) -> bool:
    """Whether float32 holds all numbers of a value."""
    return not isinstance(value, Tensor) or not value.is_floating_point() or torch.equal(value.float().double(), value.double())


def _other_in_float32(walk: LipschitzWalk) -> str | None:
    """Why float32 does not hold a network's constants, or may round those that it computes and uses together with the input."""
    if not all(map(held, walk.graph.constants.values())):
        return "the model has numbers that float32 does not hold: in float32 it is another network"
    moving = {node for node in walk.graph.nodes if walk.depends(node)}
    used = {argument for node in moving for argument in node.all_input_nodes if argument not in moving}
    for node in walk.graph.nodes:
        if node in used and node.op == "call_function" and (_rounds(node) or not held(walk.env[node])):
            return f"it is not known how {named(node, '')} of constants rounds (at {where(node)})"
    return None


def forward_errors(
    walk: LipschitzWalk, values: Mapping[fx.Node, Any], low: float, high: float
) -> tuple[dict[torch.dtype, float], str | None]:
    """Bounds of the L2 distance between a network's output in float32 or float64 and in real arithmetic, for inputs in a box.

    Args:
        walk: The network's Lipschitz walk, with a finite bound.
        values: The value of each node at the centre of the box, in float64.
        low: Least value of an input's elements.
        high: Largest value of an input's elements.

    Returns:
        The bounds by dtype, and the reason of the first that is infinite.
    """
    radius = math.sqrt(2 * prod(walk.shape(walk.graph.input))) * (high - low) / 2 * (1 + 1e-14)
    errors, reason = {torch.float32: math.inf, torch.float64: math.inf}, _other_in_float32(walk)
    for dtype in (torch.float32, torch.float64) if reason is None else (torch.float64,):
        rounding = RoundingWalk(walk, values, dtype, radius)
        rounding.run()
        errors[dtype] = rounding.value * (1 + 1e-9)
        if math.isinf(rounding.value):
            reason = reason or rounding.reason
    if walk.env[walk.graph.input].device.type != "cpu":  # convolutions may be Winograd's, which no rule covers
        errors[torch.float32] = math.inf
    return errors, reason
