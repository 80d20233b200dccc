"""How far what a forward pass computes in floating point can be from the network's value in real arithmetic.

The same walk that carries Lipschitz bounds carries errors: a rule that turns distances between arguments into a distance
between values does so with errors too. To these each node adds what it rounds itself: of a sum of k terms, whatever their
order, at most γ_k = k u / (1 - k u) times the sum of their absolute values, u being the unit roundoff (Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., 3.1 and 4.2). So every rule here tells k and a bound of that sum, in the L2 norm
over a node's elements, for all inputs in a box. Covered are sums of products in any order, with or without fused multiply-add;
not Winograd's or Fourier convolutions, and no TF32.
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

_NO_ERROR = 1e-290  # of the input: its pixels are exact, but a node whose bound is 0 would count as a constant
Terms = tuple[int, float]  # how many terms are summed, and a bound of their absolute values' sum, in L2


class RoundingWalk(LipschitzWalk):
    """A walk whose bounds are errors, in L2 and for any single input of a box, of a forward pass in one dtype.

    Args:
        walk: The same network's Lipschitz bounds, in which no node is local.
        module: Its graph in float64.
        dtype: That of the forward pass.
        radius: Half the diagonal of the box, whose centre the walk is run on.
    """

    def __init__(self, walk: LipschitzWalk, module: fx.GraphModule, dtype: torch.dtype, radius: float) -> None:
        super().__init__(module, walk.each, walk.norms)
        twins = zip(module.graph.nodes, walk.graph.nodes, strict=True)
        self.lipschitz = {node: walk.bounds[twin] for node, twin in twins if twin in walk.bounds}
        self._unit, self._tiny, self._radius = torch.finfo(dtype).eps / 2, torch.finfo(dtype).tiny, radius
        self._own: dict[fx.Node, float] = {}  # what a node adds
        self._sums: dict[fx.Node, float] = {}  # bounds of the values computed, from the terms they are summed of

    def size(self, node: Any) -> float:  # type: ignore[override]
        """L2 norm of an argument's computed values, at most, for one input."""
        if not self.depends(node):
            values = self.env[node] if isinstance(node, fx.Node) else torch.as_tensor(float(node))
            return float(values.double().norm()) * (1 + 1e-12)
        sizes = [self._sums.get(node, math.inf)]
        if node in self.lipschitz and node not in self.changed:
            centre = float(self.env[node].double().norm()) / math.sqrt(len(self.env[node])) * (1 + 1e-9)
            sizes.append(centre + product_up(self.lipschitz[node], self._radius) + self.bound(node))
        return min(sizes)

    def elements(self, node: Any) -> float:
        """How many numbers a node's value has for one input; a value in parts counts all."""
        value = self.env[node]
        parts = [value] if isinstance(value, Tensor) else list(value)
        return sum(part.numel() for part in parts) / len(parts[0]) if parts[0].ndim else 1.0

    def bound_at(self, node: fx.Node) -> float:
        """Error of an affine node: what its stretch makes of the error it is given, and all that its steps round."""
        return self.bound_of(self.affine[node]) + self._own[node]

    def bound_of(self, last: float | Affine) -> float:
        """The same of a step's result, without what the step itself rounds."""
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
            return self._unknown(n, f"{n.target}, of constants,") if constant else found
        if isinstance(found, Affine):
            self.affine[n] = found
        self._own[n], self._sums[n] = self._rounded(n)
        return found if isinstance(found, Affine) else found + self._own[n]

    def _unknown(self, n: fx.Node, what: str) -> float:
        self.reason = self.reason or f"it is not known how {what} rounds (at '{where(n)}')"
        return math.inf

    def _rounded(self, n: fx.Node) -> tuple[float, float]:
        """What a node adds to the error, and a bound of the values that it computes."""
        module = self.called(n)
        rule = ROUNDINGS.get(type(module) if module is not None else n.target)
        if rule is None or (module is not None and is_overridden(module)):
            return self._unknown(n, self.kinds[n]), math.inf
        try:
            terms, total = rule(self, n)
        except Exception as error:  # noqa: BLE001 - a call the rule does not understand is no claim, whatever it trips over
            return self._unknown(n, f"{self.kinds[n]} as it is called here ({error})"), math.inf
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
    """L2 distance, at most, between a network's output computed in a dtype and its value, for one input in [low, high].

    Args:
        walk: Its Lipschitz bounds, finite.
        module: Its graph in float64.
        dtype: float32 or float64.
        low: Least value of an input's elements.
        high: Largest.
        shape: Of an example with its batch axis.

    Returns:
        The bound, and why it is infinite if it is.
    """
    radius = math.sqrt(prod(shape[1:])) * (high - low) / 2 * (1 + 1e-14)
    rounding = RoundingWalk(walk, module, dtype, radius)
    parameter = next(iter([*module.parameters(), *module.buffers()]), torch.zeros(()))
    rounding.run(torch.full(shape, (low + high) / 2, dtype=torch.float64, device=parameter.device))
    return rounding.value * (1 + 1e-9), rounding.reason if math.isinf(rounding.value) else None
