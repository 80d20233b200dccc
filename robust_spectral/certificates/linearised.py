"""A network's graph, linearised around each of several inputs, with an error added where an operation is not linear.

Let Δ be a change of the input and e_k errors. The linearised network maps (Δ, e_1, …, e_K) to the changes of all nodes: an
operation that is linear in its moving arguments maps their changes exactly; another one, y = φ(z), gets the change S Δz + e,
where S is a slope for each element, the derivative at the centre, or 0. With the true errors this is the network itself. `push`
applies the linearised network to many changes at once, `pull` its adjoint; both take one pass over the graph.

All tensors have the images of a batch on their first axis, after an axis of vectors: (k, images, ...).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..lipschitz import Graph
from .linear_operations import is_identity, without_constants


class Linearised:
    """The linearised network of a graph at the values of its nodes.

    Args:
        graph: The network's graph, for as many images as a batch has.
        values: The value of each node, in float64.

    Attributes:
        slopes: By non-linear node, the slope for each element, None for the derivative of the operation at the centre, or 0.0
            where the whole change is the error.
        replaced: By non-linear node, a linear function in place of the derivative.
    """

    def __init__(self, graph: Graph, values: Mapping[fx.Node, Any]) -> None:
        with warnings.catch_warnings():  # torch's own use of torch.jit.script, in the first derivative
            warnings.simplefilter("ignore")
            importlib.import_module("torch._decomp.decompositions_for_jvp")
        self.graph, self.values = graph, values
        self.slopes: dict[fx.Node, Tensor | float | None] = {}
        self.images = len(values[graph.input])
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        moving = [node for node in graph.nodes if node in graph.moving and node is not graph.input]
        self.sources = {node: self._sources(node) for node in moving if values[node] is not None}
        self.replaced: dict[fx.Node, Callable[..., Any]] = {}
        self._functions: dict[fx.Node, Callable[..., Any]] = {}
        self._adjoints: dict[fx.Node, Callable[..., Any]] = {}

    def cast(self, dtype: torch.dtype) -> Linearised:
        """The same in another precision, for changes of that precision."""
        other = Linearised(self.graph, {node: cast(value, dtype) for node, value in self.values.items()})
        other.slopes, other.replaced = {node: cast(slope, dtype) for node, slope in self.slopes.items()}, dict(self.replaced)
        return other

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The arguments whose changes a node's change depends on: moving ones of floating-point numbers."""
        return [a for a in node.all_input_nodes if a in self.graph.moving and _is_float(self.values[a])]

    def function(self, node: fx.Node) -> Callable[..., Any]:
        """A node's value as a function of its sources, or the linear function in its place."""
        if node in self.replaced:
            return self.replaced[node]
        places = {source: i for i, source in enumerate(self.sources[node])}
        return lambda *given: self.graph.rerun(node, lambda a: given[places[a]] if a in places else self.values[a])

    def linear_function(self, node: fx.Node) -> Callable[..., Any]:
        """The change of a linear node as a function of those of its sources."""
        if is_identity(node):
            return lambda given: given
        places = {source: i for i, source in enumerate(self.sources[node])}
        arguments = without_constants(node, self.sources[node], self.values)

        def value_of(given: tuple[Any, ...]) -> Callable[[fx.Node], Any]:
            return lambda a: given[places[a]] if a in places else self.values[a]

        return lambda *given: self.graph.rerun(node, value_of(given), arguments)

    def push(
        self, changes: dict[fx.Node, Any], last: fx.Node, errors: Mapping[fx.Node, Tensor] | None = None
    ) -> dict[fx.Node, Any]:
        """The changes of all nodes up to ``last``, from those of the input and the errors.

        Args:
            changes: Known changes of some nodes, (k, images, ...), among them the input; the result extends it.
            last: The last node.
            errors: By non-linear node, (k, images, ...).
        """
        for node in self.steps(last):
            if node not in changes:
                changes[node] = self.change(node, changes, (errors or {}).get(node))
        return changes

    def change(self, node: fx.Node, changes: Mapping[fx.Node, Any], error: Tensor | None = None) -> Any:
        """The change of one node from those of its sources; None is no change."""
        given = [changes.get(source) for source in self.sources[node]]
        slope = self.slopes.get(node)
        if isinstance(slope, float) or all(part is None for part in given):
            moved = None
        elif slope is not None:
            moved = slope * given[0]  # type: ignore[operator]
        else:
            moved = self._derivative(node, given)
        if error is None or moved is None:
            return error if moved is None else moved
        return moved + error

    def _derivative(self, node: fx.Node, given: list[Any]) -> Any:
        centres = tuple(self.values[source] for source in self.sources[node])
        count = next(_first(part).shape[0] for part in given if part is not None)
        tangents = tuple(zeros(centre, count) if part is None else part for part, centre in zip(given, centres, strict=True))
        if node not in self._functions:
            self._functions[node] = self._change_function(node, centres)
        function = self._functions[node]
        if count == 1:
            return _map(lambda t: t[None], function(*_map(lambda t: t[0], tangents)))
        return torch.func.vmap(function, randomness="same")(*tangents)

    def _change_function(self, node: fx.Node, centres: tuple[Any, ...]) -> Callable[..., Any]:
        if node in self.replaced:
            return self.replaced[node]
        if node not in self.slopes:
            return self.linear_function(node)
        function = self.function(node)
        return lambda *tangents: torch.func.jvp(function, centres, tangents)[1]

    def pull(
        self, cotangents: dict[fx.Node, Any], slopes: Mapping[fx.Node, Tensor] | None = None
    ) -> tuple[Tensor | None, dict[fx.Node, Tensor]]:
        """The adjoint: the cotangent of the input, and those of the values of non-linear nodes.

        Args:
            cotangents: By node, (k, images, ...).
            slopes: Slopes in place of the usual ones, also for each vector.
        """
        found, seen = dict(cotangents), {}
        for node in reversed(self.steps(max(cotangents, key=self.order.__getitem__))):
            cotangent = found.pop(node, None)
            if cotangent is None:
                continue
            if node in self.slopes:
                seen[node] = cotangent
            slope = (slopes or {}).get(node, self.slopes.get(node))
            if isinstance(slope, float):
                continue
            parts = [slope * cotangent] if slope is not None else self._adjoint(node, cotangent)
            for source, part in zip(self.sources[node], parts, strict=True):
                found[source] = part if source not in found else _sum(found[source], part)
        return found.get(self.graph.input), seen

    def _adjoint(self, node: fx.Node, cotangent: Any) -> Any:
        if node not in self._adjoints:
            centres = tuple(self.values[source] for source in self.sources[node])
            function = self.function(node) if node in self.slopes else self.linear_function(node)
            with torch.enable_grad():
                self._adjoints[node] = torch.func.vjp(function, *centres)[1]
        if _first(cotangent).shape[0] == 1:
            return [_map(lambda t: t[None], part) for part in self._adjoints[node](_map(lambda t: t[0], cotangent))]
        return torch.func.vmap(self._adjoints[node])(cotangent)

    def numbers(self, last: fx.Node) -> int:
        """How many numbers a pass up to a node has, for one vector of each image."""
        values = (self.values[node] for node in (self.graph.input, *self.steps(last)))
        return sum(value.numel() for value in values if isinstance(value, Tensor))

    def steps(self, last: fx.Node) -> list[fx.Node]:
        """The moving nodes up to one, in order, without the input and nodes without floating-point numbers."""
        return [node for node in self.graph.nodes[: self.order[last] + 1] if self.sources.get(node)]


def _is_float(value: Any) -> bool:
    first = _first(value)
    return isinstance(first, Tensor) and first.is_floating_point()


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) and value else value


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(_map(function, part) for part in value) if isinstance(value, tuple | list) else function(value)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of floating-point numbers, or those of a tuple, in a precision; anything else as it is."""
    if isinstance(value, tuple | list):
        return type(value)(cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def zeros(centre: Any, count: int) -> Any:
    """No change of a value, or of the tensors of a tuple: (count, ...)."""
    if isinstance(centre, tuple | list):
        return type(centre)(zeros(part, count) for part in centre)
    return centre.new_zeros(count, *centre.shape)


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, tuple | list):
        return type(one)(a + b for a, b in zip(one, other, strict=True))
    return one + other


def rows(values: Tensor, images: int, axis: int = 0) -> Tensor:
    """A tensor with the elements of each image on the last axis: (..., images, elements)."""
    return values.reshape(*values.shape[:axis], images, -1)


def norms(values: Tensor, images: int, axis: int = 0) -> Tensor:
    """The L2 norm of each image's part, (..., images)."""
    return rows(values, images, axis).norm(dim=-1)
