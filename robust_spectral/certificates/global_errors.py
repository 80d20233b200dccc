"""Errors of operations between any two inputs of a network, and the walk that finds them.

Let Δ be the difference of a node's values at two inputs. An operation y = φ(z) is written as Δy = S Δz + e, where a bound of e
by Δz holds wherever the two inputs are: a sector of slopes, a global Lipschitz constant, or what is known of a maximum.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..lipschitz import Affine, Graph, LipschitzWalk, NoClaim, arguments, elementwise_slope, named, operation_of, where
from .errors import CURVED, KINKS
from .joint_map import Energy, Term
from .linearised import Linearised, rows
from .local_walk import LocalWalk
from .pooling_errors import Windows

aten = torch.ops.aten
_UP = 1 + 1e-9
_RISING = {aten.softplus, aten.celu, aten.softshrink, aten.asinh, aten.selu}
_RANGES = {**{operation: ends[1:] for operation, ends in CURVED.items()}, aten.hardswish: (-0.5, 1.5)}


@dataclass(frozen=True)
class GlobalError:
    """An operation as S Δz + e, for any two values of its argument.

    Attributes:
        slope: S for each element; None where ``linear`` is S; 0.0 where e is the whole change.
        gain: ‖e‖ ≤ gain ‖Δz‖.
        energy: Maps Δz, in a list, to tensors whose joint norm is at least ‖e‖.
        by_element: Whether the energy's tensors have the shape of y, with |e_i|² at most the sum of their squares at i.
        linear: The linear function S, of a batch of arguments.
    """

    slope: Tensor | float | None
    gain: float
    energy: Energy
    by_element: bool = True
    linear: Callable[[Tensor], Tensor] | None = None


class GlobalWalk(LocalWalk):
    """A walk over a graph that collects the errors of all operations between any two inputs.

    Linear operations are checked as around images. An operation of which only a Lipschitz constant from the network's input is
    known has an error of limited size, as the input's change has.

    Args:
        graph: The network's graph.
        values: The value of each node for a batch of equal inputs, in float64.
        failure_probability: Allowed for each norm.
    """

    def __init__(self, graph: Graph, values: Mapping[fx.Node, Any], failure_probability: float) -> None:
        LipschitzWalk.__init__(self, graph, values, failure_probability)
        self.linear, x = Linearised(graph, values), values[graph.input]
        self.images = self.linear.images
        self._limits = torch.full_like(x, -math.inf), torch.full_like(x, math.inf)
        self.terms: dict[fx.Node, Term] = {}
        self._add(graph.input, 1.0, None, one=True)

    def _add(self, node: fx.Node, size: float, energy: Energy | None, *, one: bool) -> None:
        """Add a node's term; with ``one`` multiplier for all its elements."""
        reach = torch.full_like(rows(self.env[node], self.images), size)
        log = torch.zeros_like(reach[:, :1] if one else reach)
        self.terms[node] = Term(reach[:, 0].clone(), reach, log, energy, self.linear.sources.get(node, []))

    def _tighten(self, node: fx.Node) -> None:
        """Between any two inputs an argument's change has no bound but that of the walk."""

    def _linearise(self, node: fx.Node) -> None:
        """Find a node's error."""
        value, sources, known = self.env[node], self.linear.sources[node], self.bound(node)
        if isinstance(value, Tensor) and not value.is_floating_point():
            return  # a comparison's; an operation that uses it depends on more than its sources
        if not isinstance(value, Tensor) or value.shape[0] % self.images:
            raise NoClaim(f"nothing is known of {named(node, 'with several results')} alone (at {where(node)})")
        try:
            if len(sources) != 1 or sum(map(self.depends, node.all_input_nodes)) != 1:
                raise NoClaim
            error = global_error(self, node, sources[0])
        except NoClaim:
            if known == math.inf:
                raise NoClaim(self.reason or f"no Lipschitz constant is known for {named(node, '')}") from None
            self.linear.slopes[node] = 0.0
            if known > 0:
                self._add(node, known * _UP, None, one=True)
            return
        self.linear.slopes[node] = error.slope
        if error.linear is not None:
            self.linear.replaced[node] = error.linear
        size = error.gain * self.bound(sources[0]) * _UP
        if size > 0:
            self._add(node, size, error.energy, one=not error.by_element)

    def needed(self) -> dict[fx.Node, Term]:
        """The terms that the output depends on."""
        due, seen = list(self.graph.outputs), set()
        while due:
            node = due.pop()
            if node in seen:
                continue
            seen.add(node)
            if node not in self.terms or not self.terms[node].fixed:
                due += self.linear.sources.get(node, [])
        return {node: term for node, term in self.terms.items() if node in seen or node is self.graph.input}

    def levels(self) -> dict[fx.Node, int]:
        """By node, the largest number of errors up to its value that depend on each other in a row."""
        found = {self.graph.input: 0}
        for node, sources in self.linear.sources.items():
            if node in self.terms and self.terms[node].fixed:
                found[node] = 0
            else:
                found[node] = max((found[source] for source in sources), default=0) + (node in self.terms)
        return found


def global_error(walk: LipschitzWalk, n: fx.Node, source: fx.Node) -> GlobalError:
    """The error of an operation of one argument.

    Raises:
        NoClaim: nothing is known of the operation alone.
    """
    if operation_of(n.target) is aten.max_pool2d:
        try:
            return _max_pool(walk, n)
        except NoClaim:  # of dilation, for example
            return _constant(walk, n, source)
    if n.args[0] is source and walk.env[n].shape == walk.env[source].shape:
        try:
            least, most = _slopes(walk, n)
        except NoClaim:
            return _constant(walk, n, source)
        half = (most - least) / 2 * _UP
        return GlobalError((least + most) / 2, float(half.max()), lambda given: [half.to(given[0].dtype) * given[0]])
    return _constant(walk, n, source)


def _slopes(walk: LipschitzWalk, n: fx.Node) -> tuple[Tensor, Tensor]:
    """Least and largest slope of an elementwise operation, for each element."""
    operation, z = operation_of(n.target), walk.env[n]
    most: Any
    if operation in KINKS:
        _, least, most = KINKS[operation](walk, n)
    elif operation in _RANGES:
        least, most = _RANGES[operation]
    else:
        most = elementwise_slope(walk, n)
        numbers = [a for name, a in arguments(n).items() if name != "self"]
        rising = operation in _RISING or (operation is aten.elu and all(a >= 0 for a in numbers))
        least = 0.0 if rising else -most
    first, second = (torch.as_tensor(end, dtype=z.dtype, device=z.device).expand_as(z) for end in (least, most))
    return first, second


def _constant(walk: LipschitzWalk, n: fx.Node, source: fx.Node) -> GlobalError:
    """The whole change as the error, of which only the Lipschitz constant of the operation alone is known.

    The constant is the row's bound for an argument with the bound 1. All other nodes that move have an infinite one, so that a
    bound that rests on more than the argument is infinite.
    """
    alone = copy.copy(walk)
    alone.affine, alone.reason = {}, None
    alone.bounds = {node: math.inf if node in walk.graph.moving else bound for node, bound in walk.bounds.items()}
    alone.bounds[source] = 1.0
    found = walk.row(n).bound(alone, n)
    if isinstance(found, Affine) and found.source is source:
        found = alone.step_norm(found)
    if not isinstance(found, float) or not found < math.inf:
        raise NoClaim
    constant = found * _UP
    return GlobalError(0.0, constant, lambda given: [given[0] * constant], by_element=False)


def _max_pool(walk: LipschitzWalk, n: fx.Node) -> GlobalError:
    """The change of a maximum of n elements is their mean change + e, with e² ≤ (1 - 1 / n) Σ_j (Δ_j - mean)².

    The maximum's change lies between the least and the largest Δ_j, since no element exceeds the maximum at either input.
    """
    z = walk.env[n.args[0]]  # type: ignore[index]
    windows = Windows(n, z)
    inside = windows(torch.ones_like(z[:1, :1]))  # the same for all images
    share = inside / inside.sum(1, keepdim=True)
    around = inside * (1 - share).sqrt() * _UP
    with torch.enable_grad():
        met = torch.zeros_like(z, requires_grad=True)
        windows_of_each = torch.autograd.grad(windows(met), met, torch.ones_like(windows(z)))[0]

    def mean(x: Tensor) -> Tensor:
        return (windows(x) * share.to(x.dtype)).sum(1)

    def energy(given: list[Any]) -> list[Tensor]:
        x = windows.of_changes(given[0])
        return [(x - (x * share.to(x.dtype)).sum(2, keepdim=True)) * around.to(x.dtype)]

    return GlobalError(None, math.sqrt(float(windows_of_each.max())) * _UP, energy, linear=mean)
