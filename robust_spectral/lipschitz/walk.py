"""The walk over a network's graph that computes the Lipschitz bound of each node from those of its arguments.

A node's bound is a Lipschitz constant of its value as a function of the network's input, all samples of a batch taken together.
Consecutive affine nodes (an affine stretch) are one operator, whose norm is computed only when a non-affine node needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ..norms import NormInterval, spectral_norm
from ..numerics import product_up
from ..operators import LinearOperator, Shape, compose
from .boxes import Box, box_intersection, rounded_outward, shifted
from .graph import Graph, where
from .table import PATTERNS, TABLE, NoClaim, Pattern, Row, operation_of, row_of

_LARGEST_STRETCH = 3e5  # most elements in a step's argument for which a stretch of several layers is bounded as a whole
aten = torch.ops.aten
Key = tuple[Any, ...]
Build = Callable[[], LinearOperator]


@dataclass(frozen=True)
class Affine:
    """A node's value as an affine function of another node's value.

    Attributes:
        source: The other node.
        key: Identifies the operator, so that its norm is computed once.
        build: Makes the operator at the node's full shape, without the batch axis.
        norm: The operator's norm, rounded up, if it is known; or a key and a builder of a smaller operator of the same norm.
        layers: Names of the modules that the operator is made of: a layer, or one with the batch normalisation that follows.
        joined: Makes one operator of this one and the one before it, where that has tighter bounds; None where it has none.
        part: The module or padding of this step, for ``joined`` of the next one.
        uneven: Whether it multiplies elements by numbers of several sizes, so that its norm is more than it does to some.
        picks: The function itself, where it only selects elements, copies them, or adds constants; else None.
    """

    source: fx.Node
    key: Key
    build: Build
    norm: float | tuple[Key, Build] | None = None
    layers: tuple[str, ...] = ()
    joined: Callable[[Affine], Affine | None] | None = field(default=None, compare=False)
    part: Any = field(default=None, compare=False)
    uneven: bool = False
    picks: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)


class LipschitzWalk:
    """A traversal of a graph that computes the Lipschitz bound of every node from the network's input.

    With a ``box`` of inputs the walk is local: the values are those at the centre of the box, ``radius`` is half its diagonal,
    and every node has a box that contains its values, so that rules may use their size.

    Args:
        graph: The network's graph.
        values: The value of each node, in float64.
        failure_probability: Allowed for each computed norm.
        norms: Norms that are known already, by key; the walk adds those that it computes.
        box: Lowest and highest values of the input.
        radius: Half the diagonal of the box of one input.
    """

    _of_input = 1.0  # the input's bound

    def __init__(
        self, graph: Graph, values: Mapping[fx.Node, Any], failure_probability: float,
        norms: dict[Key, NormInterval] | None = None, box: Box | None = None, radius: float = math.inf,
    ) -> None:  # fmt: skip
        self.graph, self.env = graph, values
        self.bounds: dict[fx.Node, float] = {}
        self.affine: dict[fx.Node, Affine] = {}
        self.boxes: dict[fx.Node, Box] = {}
        self.added: dict[fx.Node, float] = {}  # rounding error of a node's own; none in real arithmetic
        self.reason: str | None = None
        self.norms = {} if norms is None else norms
        self.local = box is not None
        self.each = failure_probability  # of each norm
        self._input_box, self._radius = box, radius
        self._half = any(is_half(values[node]) for node in graph.moving)  # then no pattern applies: a step of it may round

    def run(self) -> None:
        """Bound every node, in order."""
        for node in self.graph.nodes:
            self.visit(node)

    def visit(self, node: fx.Node) -> None:
        """Bound a node, whose arguments are bounded."""
        found = self._bound(node)
        if isinstance(found, Affine):
            self.affine[node] = found
        else:
            self.bounds[node] = found
        if self.local and node in self.graph.moving and is_numbers(self.env[node]):
            self.boxes[node] = self._box(node)

    @property
    def failure_probability(self) -> float:
        """A bound of the probability that any of the norms used is wrong."""
        return sum(interval.failure_probability for interval in self.norms.values())

    @property
    def value(self) -> float:
        """Bound of the network's output, all its tensors together."""
        bounds = [self.bound(node) for node in self.graph.outputs]
        return bounds[0] if len(bounds) == 1 else math.nextafter(math.hypot(*bounds), math.inf)

    def depends(self, value: Any) -> bool:
        """Whether an argument depends on the network's input."""
        if isinstance(value, tuple | list):
            return any(self.depends(part) for part in value)
        return isinstance(value, fx.Node) and (value in self.affine or self.bounds.get(value, 0.0) != 0)

    def bound(self, value: Any) -> float:
        """Bound of an argument: its node's bound, or 0 for a constant."""
        if not isinstance(value, fx.Node):
            return 0.0
        if value not in self.bounds:
            self.bounds[value] = self._claimed(value, lambda: self.bound_of(self.affine[value]) + self.added.get(value, 0.0))
        return self.bounds[value]

    def shape(self, node: Any) -> Shape:
        """Shape of a node's value, without the batch axis."""
        return tuple(self.env[node].shape[1:])

    def constant(self, value: Any) -> Tensor:
        """The value of an argument that does not depend on the input, in float64.

        Raises:
            NoClaim: it is not finite.
        """
        held = self.env[value] if isinstance(value, fx.Node) else value
        found = torch.as_tensor(held, dtype=torch.float64 if isinstance(held, float) else None)
        if found.is_complex() or not bool(torch.isfinite(found).all()):
            raise NoClaim("with a constant that is complex or not finite")
        return found.detach().double()

    def box(self, value: Any) -> Box:
        """Lowest and highest values of an argument's elements; only in a local walk."""
        if isinstance(value, fx.Node):
            return self.boxes[value] if value in self.boxes else (self.env[value], self.env[value])
        number = torch.as_tensor(value, dtype=torch.float64)
        return number, number

    def size(self, value: Any) -> Tensor:
        """Largest absolute values of an argument's elements; only in a local walk."""
        low, high = (torch.as_tensor(end).double().abs() for end in self.box(value))
        return torch.maximum(low, high)

    def operator_norm(self, key: Key, build: Build) -> float:
        """A proved upper bound of an operator's norm, computed once for each key."""
        if key not in self.norms:
            self.norms[key] = spectral_norm(build(), self.each)
        return self.norms[key].upper

    def rerun(self, n: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """Compute a node's value for other values of its arguments."""
        return self.graph.rerun(n, value_of)

    def stretch(self, last: Affine) -> tuple[fx.Node, list[Affine]]:
        """The input node of the affine stretch that ends with a step, and all steps of the stretch."""
        steps = [last]
        while steps[0].source in self.affine:
            steps.insert(0, self.affine[steps[0].source])
        return steps[0].source, joined(steps)

    def bound_of(self, last: float | Affine) -> float:
        """Bound of the stretch's input times the smaller of the whole stretch's norm and the product of its steps' norms."""
        if not isinstance(last, Affine):
            return last
        root, steps = self.stretch(last)
        alone = product_up(self.bound(root), self.product(steps))
        layers = [step for step in steps if step.uneven or not isinstance(step.norm, float)]
        if len(layers) < 2 or max(prod(self.shape(step.source)) for step in steps) > _LARGEST_STRETCH:
            return alone
        return min(alone, product_up(self.bound(root), self.whole_norm(steps)))

    def whole_norm(self, steps: list[Affine]) -> float:
        """The norm of a stretch of several layers as one operator."""
        return self.operator_norm(tuple(step.key for step in steps), lambda: composed(steps))

    def product(self, steps: list[Affine]) -> float:
        """Product of the norms of steps, joined where that is tighter."""
        return product_up(*(self.step_norm(step) for step in joined(steps)))

    def step_norm(self, step: Affine) -> float:
        """The norm of one step."""
        return step.norm if isinstance(step.norm, float) else self.operator_norm(*(step.norm or (step.key, step.build)))

    def row(self, n: fx.Node) -> Row:
        """The row of a node's operation in the table.

        Raises:
            NoClaim: the operation has none, or the node's value is no tensor of real floating-point numbers.
        """
        row, value = row_of(n.target), self.env[n]
        if is_decision(value):
            return _DECISION
        if isinstance(value, Tensor) and value.dtype not in (torch.float32, torch.float64):
            raise NoClaim(f"to {value.dtype}")
        if row is None:
            raise NoClaim
        return row

    def _constant(self, n: fx.Node) -> float:
        """0, or inf for random numbers and what is made of them."""
        if is_random(n):
            return self.unknown(n, _RANDOM)
        return math.inf if any(self.bounds[a] > 0 for a in n.all_input_nodes) else 0.0

    def _bound(self, n: fx.Node) -> float | Affine:
        if n is self.graph.input:
            return self._of_input
        if n not in self.graph.moving:
            return self._constant(n)
        return 0.0 if self.env[n] is None else self._claimed(n, lambda: self._found(n))  # None is an assertion's

    def _found(self, n: fx.Node) -> float | Affine:
        if is_random(n) and operation_of(n.target) not in TABLE:
            raise NoClaim(_RANDOM)
        if not self.depends(list(n.all_input_nodes)):
            return 0.0
        if operation_of(n.target) in CONSTANTS and not self.depends(list(n.args[1:])):
            return 0.0
        for value in map(self.env.__getitem__, n.all_input_nodes):
            if isinstance(value, Tensor) and value.is_complex():
                raise NoClaim("of complex numbers")
        if any(self.depends(a) and isinstance(self.env[a], int | float) for a in n.all_input_nodes):
            raise NoClaim("of a number read off the input")
        value = self.by_rules(n)
        if not isinstance(value, Affine) and not value < math.inf and not is_decision(self.env[n]):
            raise NoClaim("with a constant above 1e308")
        return value

    def passes(self, node: fx.Node) -> bool:
        """Whether parts of a node's value are those of the value that they were selected from, not rounded."""
        return self.added.get(node, 0.0) == 0

    def patterns(self, n: fx.Node) -> list[Pattern]:
        """Patterns that may end in a node."""
        return [] if self._half else PATTERNS.get(operation_of(n.target), [])

    def by_rules(self, n: fx.Node) -> float | Affine:
        """The smallest bound by the row of a node's operation and by patterns."""
        together = [found for bound, _ in self.patterns(n) if (found := bound(self, n)) is not None]
        try:
            value = self.row(n).bound(self, n)
        except NoClaim:
            if not together:
                raise
            return min(together)
        return value if isinstance(value, Affine) else min([value, *together])

    def _claimed(self, n: fx.Node, found: Callable[[], Any]) -> Any:
        try:
            return found()
        except NoClaim as unknown:
            return self.unknown(n, str(unknown))

    def _box(self, n: fx.Node) -> Box:
        """The box of a node's values, from its row and from its Lipschitz bound around its value at the centre."""
        if n is self.graph.input and self._input_box is not None:
            return self._input_box
        row, found, values = row_of(n.target), None, [self.env[node] for node in (n, *n.all_input_nodes)]
        others = any(is_half(value) or (isinstance(value, Tensor) and value.is_complex()) for value in values)
        if row is not None and row.box is not None and not others and self.bounds.get(n) != math.inf:
            with suppress(NoClaim):
                found = row.box(self, n)
        if found is not None and (n in self.affine or not isinstance(self.env[n], Tensor)):
            return rounded_outward(found)
        reach = product_up(self.bound(n), self._radius)
        around = shifted(self.env[n], -reach), shifted(self.env[n], reach)
        return rounded_outward(around if found is None else box_intersection(found, around))

    def unknown(self, n: fx.Node, what: str) -> float:
        """Record, if it is the first, that nothing is known of a node; returns inf."""
        if self.reason is None:
            hint = "; use model.float()" if what.endswith(("torch.float16", "torch.bfloat16")) else ""
            self.reason = f"no Lipschitz constant is known for {named(n, what)} (at {where(n)}){hint}"
        return math.inf


def named(n: fx.Node, what: str) -> str:
    """An operation by name, and what is special about its use."""
    name = getattr(operation_of(n.target), "__name__", str(n.target))
    return f"{name} {what}" if what.startswith("to ") else f"{name} ({what})" if what else name


def composed(steps: list[Affine]) -> LinearOperator:
    """The operator of a stretch: the composition of its steps."""
    return reduce(compose, [step.build() for step in steps])


def joined(steps: list[Affine]) -> list[Affine]:
    """The steps, with each joined to the one before it where both have tighter bounds together."""
    found: list[Affine] = []
    for step in steps:
        both = step.joined(found[-1]) if found and step.joined is not None else None
        found[-1:] = [both] if both is not None else [*found[-1:], step]
    return found


def is_random(n: fx.Node) -> bool:
    """Whether an operation may draw random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())


_RANDOM = "which may draw random numbers"
CONSTANTS = (aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_ones, aten.new_full)


def is_decision(value: Any) -> bool:
    """Whether a node's value is a comparison's, which jumps; operations that use it say what is not known."""
    return isinstance(value, Tensor) and value.dtype == torch.bool


_DECISION = Row(lambda walk, n: math.inf)


def is_half(value: Any) -> bool:
    """Whether a node's value is in half precision."""
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def is_numbers(value: Any) -> bool:
    """Whether a node's value is a tensor of floating-point numbers, or a sequence of tensors that starts with one."""
    first = value[0] if isinstance(value, tuple | list) and value else value
    return isinstance(first, Tensor) and first.is_floating_point()
