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
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ..numerics import product_up
from .registry import ROUNDINGS
from .walk import Affine, LipschitzWalk, is_overridden, where

_NO_ERROR = 1e-290  # error of the input: pixels are exact, but a node of bound 0 would count as a constant
Terms = tuple[int, float]  # number of terms summed, and a bound of the sum of their absolute values, in L2


class RoundingWalk(LipschitzWalk):
    """A walk whose bounds are the rounding errors of a forward pass in one dtype, in L2, for any single input in a box.

    Args:
        walk: The network's Lipschitz walk for all inputs (not local).
        module: The network's graph in float64.
        dtype: The dtype of the forward pass.
        radius: Half the diagonal of the box; the walk is run on the centre of the box.
    """

    def __init__(self, walk: LipschitzWalk, module: fx.GraphModule, dtype: torch.dtype, radius: float) -> None:
        super().__init__(module, walk.each, walk.norms)
        twins = zip(module.graph.nodes, walk.graph.nodes, strict=True)
        self.lipschitz = {node: walk.bounds[twin] for node, twin in twins if twin in walk.bounds}
        self._unit, self._tiny, self._radius = torch.finfo(dtype).eps / 2, torch.finfo(dtype).tiny, radius
        self._own: dict[fx.Node, float] = {}  # rounding error that a node adds
        self._sums: dict[fx.Node, float] = {}  # bounds of the computed values' norms, from the terms summed

    def size(self, node: Any) -> float:  # type: ignore[override]
        """An upper bound of the L2 norm of an argument's computed value, for one input."""
        if not self.depends(node):
            values = self.env[node] if isinstance(node, fx.Node) else torch.as_tensor(float(node))
            return float(values.double().norm()) * (1 + 1e-12)
        sizes = [self._sums.get(node, math.inf)]
        if node in self.lipschitz and node not in self.changed:
            centre = float(self.env[node].double().norm()) / math.sqrt(len(self.env[node])) * (1 + 1e-9)
            sizes.append(centre + product_up(self.lipschitz[node], self._radius) + self.bound(node))
        return min(sizes)

    def elements(self, node: Any) -> float:
        """The number of elements of a node's value for one input, summed over the tensors of a tuple."""
        value = self.env[node]
        parts = [value] if isinstance(value, Tensor) else list(value)
        return sum(part.numel() for part in parts) / len(parts[0]) if parts[0].ndim else 1.0

    def bound_at(self, node: fx.Node) -> float:
        """Error of an affine node: the propagated error of its stretch's input, plus the rounding errors of all its steps."""
        return self.bound_of(self.affine[node]) + self._own[node]

    def bound_of(self, last: float | Affine) -> float:
        """Error of a step's result, without the rounding error of the step itself."""
        total = super().bound_of(last)
        if not isinstance(last, Affine):
            return total
        node, later = last.source, [last]
        while node in self.affine and node not in self.changed:
            total += product_up(self._own[node], self.product(later)) * (1 + 1e-15)
            later.insert(0, self.affine[node])
            node = later[0].source
        return total

    def _bound(self, n: fx.Node, result: Any) -> float | Affine:
        found = super()._bound(n, result)
        if n.op == "placeholder":
            return _NO_ERROR
        if n.op in ("output", "get_attr") or (isinstance(found, float) and found == math.inf):
            return found
        if not any(self.depends(a) for a in n.all_input_nodes):
            constant = isinstance(result, Tensor) and result.is_floating_point() and n.all_input_nodes
            return self._unknown(n, f"{n.target} of constants") if constant else found
        if isinstance(found, Affine):
            self.affine[n] = found
        self._own[n], self._sums[n] = self._rounded(n)
        return found if isinstance(found, Affine) else found + self._own[n]

    def _unknown(self, n: fx.Node, what: str) -> float:
        self.reason = self.reason or f"it is not known how {what} rounds (at '{where(n)}')"
        return math.inf

    def _rounded(self, n: fx.Node) -> tuple[float, float]:
        """The rounding error that a node adds, and a bound of the norm of its computed value."""
        module = self.called(n)
        rule = ROUNDINGS.get(type(module) if module is not None else n.target)
        if rule is None or (module is not None and is_overridden(module)):
            return self._unknown(n, self.kinds[n]), math.inf
        try:
            terms, total = rule(self, n)
        except Exception as error:  # noqa: BLE001 - an unsupported call has no bound, whatever error it raises
            return self._unknown(n, f"this call of {self.kinds[n]} ({error})"), math.inf
        if terms * self._unit > 0.5:
            return self._unknown(n, f"a sum of {terms} terms"), math.inf
        if terms == 0:
            return 0.0, total
        share = terms * self._unit / (1 - terms * self._unit) * (1 + 1e-12)
        underflow = terms * self._tiny * math.sqrt(self.elements(n))
        return share * total + underflow, total * (1 + share) * (1 + 1e-12) + underflow


def forward_error(
    walk: LipschitzWalk, module: fx.GraphModule, dtype: torch.dtype, low: float, high: float, shape: torch.Size
) -> tuple[float, str | None]:
    """A bound of the L2 distance between a network's output in a dtype and in real arithmetic, for an input in [low, high].

    Args:
        walk: The network's Lipschitz walk, with a finite bound.
        module: The network's graph in float64.
        dtype: float32 or float64.
        low: Least value of an input's elements.
        high: Largest value of an input's elements.
        shape: Shape of an example with its batch axis.

    Returns:
        The bound, and the reason if it is infinite.
    """
    radius = math.sqrt(prod(shape[1:])) * (high - low) / 2 * (1 + 1e-14)
    rounding = RoundingWalk(walk, module, dtype, radius)
    parameter = next(iter([*module.parameters(), *module.buffers()]), torch.zeros(()))
    rounding.run(torch.full(shape, (low + high) / 2, dtype=torch.float64, device=parameter.device))
    return rounding.value * (1 + 1e-9), rounding.reason if math.isinf(rounding.value) else None
