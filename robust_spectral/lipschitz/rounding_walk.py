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
from .constants import computed_constant, held
from .graph import where
from .table import PATTERNS, NoClaim, operation_of
from .walk import Affine, LipschitzWalk, named

aten = torch.ops.aten
_NO_ERROR = 1e-290  # error of the input: pixels are exact, but a node of bound 0 would count as a constant


class RoundingWalk(LipschitzWalk):
    """A walk whose bounds are the rounding errors of a forward pass in one dtype, in L2, for any single input in a box.

    After a cast, operations count as rounded to float32: they may be, in whatever dtype the model is run.

    Args:
        walk: The network's Lipschitz walk for all inputs (not local).
        values: The value of each node, in float64, at the centre of the box.
        dtype: The dtype of the forward pass.
        radius: Half the diagonal of the box.
    """

    def __init__(self, walk: LipschitzWalk, values: Mapping[fx.Node, Any], dtype: torch.dtype, radius: float) -> None:
        super().__init__(walk.graph, values, walk.each, walk.norms)
        self.lipschitz, self.dtype, self._radius = walk.bounds, dtype, radius
        self._cast = self._in_float32()
        self._together: dict[fx.Node, Any] = {}  # rounding of the patterns that apply
        self._own: dict[fx.Node, float] = {}  # rounding error that a node adds
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
            casts = operation in _CASTS or node.kwargs.get("dtype") is not None or _given_dtype(node)
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

    def passes(self, node: fx.Node) -> bool:
        """Only parts that are selected without rounding."""
        return self._own.get(node, 0.0) == 0

    def bound_at(self, node: fx.Node) -> float:
        """Error of an affine node: the propagated error of its stretch's input, plus the rounding errors of all its steps."""
        return self.bound_of(self.affine[node]) + self._own[node]

    def bound_of(self, last: float | Affine) -> float:
        """Error of a step's result, without the rounding error of the step itself."""
        total = super().bound_of(last)
        if not isinstance(last, Affine):
            return total
        node, later = last.source, [last]
        while node in self.affine:
            total += product_up(self._own[node], self.product(later)) * (1 + 1e-15)
            later.insert(0, self.affine[node])
            node = later[0].source
        return total

    def _found(self, n: fx.Node) -> float | Affine:
        """The bound by a pattern whose rounding is known, else by the row: other patterns pass over operations that round."""
        for bound, rounding in PATTERNS.get(operation_of(n.target), ()):
            found = None if rounding is None or self._half else bound(self, n)
            if found is not None and self.depends(list(n.all_input_nodes)):
                self._together[n] = rounding
                return found
        return super()._found(n)

    def patterns(self, n: fx.Node) -> list[Any]:
        """None: see `_found`."""
        return []

    def _bound(self, n: fx.Node) -> float | Affine:
        if n.op == "placeholder":
            return _NO_ERROR
        found = super()._bound(n)
        if isinstance(found, float) and (found == math.inf or not self.depends(list(n.all_input_nodes))):
            return found
        if isinstance(found, Affine):
            self.affine[n] = found
        rounded = self._claimed(n, lambda: self._rounded(n))
        self._own[n], self._sums[n] = (math.inf, math.inf) if rounded == math.inf else rounded
        return found if isinstance(found, Affine) else found + self._own[n]

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


def _given_dtype(node: fx.Node) -> bool:
    """Whether a call has a dtype among its positional arguments."""
    return any(isinstance(value, torch.dtype) for value in node.args)


_CASTS = (aten._assert_tensor_metadata, aten._to_copy, aten.to, aten.copy)


def forward_error(
    walk: LipschitzWalk, values: Mapping[fx.Node, Any], dtype: torch.dtype, low: float, high: float
) -> tuple[float, str | None]:
    """A bound of the L2 distance between a network's output in a dtype and in real arithmetic, for an input in [low, high].

    Args:
        walk: The network's Lipschitz walk, with a finite bound.
        values: The value of each node at the centre of the box, in float64.
        dtype: float32 or float64.
        low: Least value of an input's elements.
        high: Largest value of an input's elements.

    Returns:
        The bound, and the reason if it is infinite.
    """
    radius = math.sqrt(2 * prod(walk.shape(walk.graph.input))) * (high - low) / 2 * (1 + 1e-14)
    if dtype == torch.float32 and not all(map(held, walk.graph.constants.values())):
        return math.inf, "the model has numbers that float32 does not hold: in float32 it is another network"
    if dtype == torch.float32 and (computed := computed_constant(walk)) is not None:
        return math.inf, f"it is not known how {named(computed, '')} of constants rounds (at {where(computed)})"
    rounding = RoundingWalk(walk, values, dtype, radius)
    rounding.run()
    return rounding.value * (1 + 1e-9), rounding.reason if math.isinf(rounding.value) else None
