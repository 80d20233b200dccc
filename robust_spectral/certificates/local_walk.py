"""The walk over a graph that bounds, for each of several images, how far every node moves when the image moves in a ball.

At each non-linear operation the walk first finds how far its arguments move: each element (by the row of the linearised network
before it, from the ball of images and the balls of errors), and all together (by Lanczos). The operation's rule then gives the
error of its linearisation, whose L2 norm is bounded by Lanczos again: a perturbation that is small in L2 cannot push all
elements to their ends at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ..lipschitz import Box, Graph, LipschitzWalk, NoClaim, named, operation_of, where
from ..norms import largest_by_group
from . import pooling_errors as pooling_errors
from .errors import RULES, LocalError
from .joint_map import Energy, JointMap, Term
from .linear_operations import is_linear
from .linearised import Linearised, cast, rows
from .supports import support

aten = torch.ops.aten
_UP = 1 + 1e-9
_FEW = 256  # elements up to which rows are computed without a sketch first
_MOST_ROWS = 8192  # most elements of a node for which each has a row of its own
_SKETCH = 128  # Gaussian vectors that bound all rows of a node
_RTOL, _MOST_STEPS = 0.01, 60  # of norms
MOST_NUMBERS = 2e7  # in the tensors of one pass


Kept = dict[Any, dict[fx.Node, Tensor]]  # by what is bounded, the logarithms of the multipliers of all terms


class LocalWalk(LipschitzWalk):
    """The bounds of every node's change, by image.

    Args:
        graph: The network's graph, for as many images as there are.
        values: The value of each node at the images, in float64.
        radii: (images,), L2 radius around each image.
        box: Lowest and highest values of the input, (images, ...); infinite where it has no limits.
        failure_probability: Allowed for each norm.
        norms: Norms of layers that are known.
        seed: Of the random starts.
        start: The multipliers of another walk around the same images, its attribute ``kept``.
    """

    def __init__(
        self, graph: Graph, values: Mapping[fx.Node, Any], radii: Tensor, box: Box, failure_probability: float,
        norms: Any = None, seed: int = 0, start: Kept | None = None,
    ) -> None:  # fmt: skip
        x, self._limits = values[graph.input], box
        wide = radii.reshape(-1, *[1] * (x.ndim - 1))
        self.span = (torch.maximum(box[0] - x, -wide), torch.minimum(box[1] - x, wide))
        super().__init__(graph, values, failure_probability, norms, (x + self.span[0], x + self.span[1]), float(radii.max()))
        self.linear, self.radii, self.seed = Linearised(graph, values), radii, seed
        self.quick = self.linear.cast(torch.float32)  # for what no proof rests on
        self.images = len(radii)
        self.errors: dict[fx.Node, LocalError] = {}
        self.sizes: dict[fx.Node, Tensor] = {}  # bound of each error's norm, (images,)
        self.balls: dict[fx.Node, Tensor] = {}  # bound of the norm of the change of a node, (images,)
        self.tight: set[fx.Node] = set()  # nodes with exact boxes
        x = rows(values[graph.input], self.images)
        size = radii[:, None]
        self.terms = {graph.input: Term(radii, size.expand_as(x), torch.zeros_like(size), None, [])}
        self.start: Kept = start or {}
        self.kept: Kept = {}
        self.spent = 0.0  # failure probability of this walk's own bounds

    def run(self) -> None:
        """Bound every node, in order."""
        for node in self.graph.nodes:
            sources = self.linear.sources.get(node, [])
            curved = bool(sources) and not is_linear(node, sources)
            if curved:
                for source in sources:
                    self._tighten(source)
            self.visit(node)
            if sources:
                self._check(node, sources, curved)
            if curved or (node in self.linear.sources and len(sources) < sum(map(self.depends, node.all_input_nodes))):
                self._linearise(node)

    def _check(self, node: fx.Node, sources: list[fx.Node], curved: bool) -> None:
        """Refuse a node that mixes images, or whose change is not the linear function that stands for it.

        Tried with other images: in the place of some, each two of which differ in this in one of the trials, or of all.
        """
        value, trials = self.env[node], self._trials
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return
        size = 1e-9 * (1 + value.abs().max())
        if value.ndim and value.shape[0] % self.images == 0 and (curved or node in self.graph.outputs):
            for other, kept in trials:
                for tried in (node, *sources) if curved else (node,):
                    change = rows(other[tried] - self.env[tried], self.images)[kept]
                    if not bool((change.abs() <= 1e-9 * (1 + self.env[tried].abs().max())).all()):
                        raise NoClaim(f"{named(node, 'across the batch')} has no local error")
        if not curved:
            other = trials[-1][0]
            steps = [minus(other[source], self.env[source]) for source in sources]
            wanted, found = self.linear.linear_function(node)(*steps), other[node] - value
            apart = (found - wanted).abs() > 1e-7 * wanted.abs() + size
            if bool((apart & found.isfinite() & wanted.isfinite()).any()):
                raise NoClaim(f"{named(node, 'is not linear')} has no local error")

    @cached_property
    def _trials(self) -> list[tuple[dict[fx.Node, Any], Tensor]]:
        """The values of all nodes with other images in the place of some, and which images are kept; of all in the last."""
        x, found = self.env[self.graph.input], []
        generator = torch.Generator().manual_seed(1)
        drawn = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
        low, high = self._limits
        others = torch.where(torch.isfinite(high - low), low + drawn * (high - low).nan_to_num(0, 0, 0), x + 2 * drawn - 1)
        numbers = torch.arange(self.images, device=x.device)
        bits = [(numbers >> bit) & 1 == 1 for bit in range(max(1, (self.images - 1).bit_length()))]
        for kept in [*bits, *(~bit for bit in bits), torch.zeros_like(numbers, dtype=torch.bool)]:
            found.append((self.graph.values(torch.where(self._wide(kept, x), x, others)), kept))
        return found

    def furthest(self, value: Any) -> Tensor:
        """How far each element of an argument moves at most."""
        low, high = self.box(value)
        centre = self.env[value] if isinstance(value, fx.Node) else torch.as_tensor(value)
        return torch.maximum(high - centre, centre - low).clamp_min(0)

    def ball(self, node: fx.Node, tuned: bool = True) -> Tensor:
        """Bound of the L2 norm of an argument's change, (images,); ``tuned``: by a map of its own, if it has none yet."""
        if node not in self.balls:
            far = rows(self.furthest(node), self.images).norm(dim=1) * _UP
            if not tuned:
                return far
            far = torch.minimum(far, self.radii * (self.bound(node) * _UP))
            if node is not self.graph.input:
                far = torch.minimum(far, self._norm(self._joint([node], lambda changes: [changes[0]]), (node, "ball")))
            self.balls[node] = far
        return self.balls[node]

    def _wide(self, by_image: Tensor, like: Tensor) -> Tensor:
        """Numbers by image, for the rows of a tensor."""
        per = like.shape[0] // self.images
        return by_image.repeat_interleave(per).reshape(-1, *[1] * (like.ndim - 1))

    def _tighten(self, node: fx.Node) -> None:
        """Bound how far a non-linear operation's argument moves: all elements together, and each."""
        if node in self.tight or node is self.graph.input:
            return
        self.tight.add(node)
        value, (low, high) = self.env[node], self.boxes[node]
        if not isinstance(value, Tensor) or value.shape[0] % self.images:
            raise NoClaim(f"{named(node, 'with the images on another axis than the first')} has no local error")
        if not bool(torch.isfinite(value).all()):
            raise NoClaim(f"{named(node, 'is not finite')} at an image")
        if value.numel() // self.images > _FEW:
            reach = self._sketched(node, value).reshape(value.shape)
            low, high = torch.fmax(low, value - reach), torch.fmin(high, value + reach)
        self.boxes[node] = self._exact_rows(node, low, high)
        self.bounds[node] = float((self.ball(node, tuned=False) / self.radii).max()) * _UP

    def _sketched(self, node: fx.Node, value: Tensor) -> Tensor:
        """A bound of each row's norm: of m Gaussian vectors g, Σ (row · g)² is the squared norm times a χ² variable of m."""
        generator = torch.Generator().manual_seed(self._fresh_seed())
        elements = value.numel() // self.images
        squares, left = torch.zeros(self.images, elements, dtype=torch.float64, device=value.device), _SKETCH
        terms = self._terms_before(node)
        factors = {n: term.size[:, None] * term.moves * math.sqrt(len(terms)) for n, term in terms.items()}
        given = sum(term.reach.shape[1] for term in terms.values())
        while left:
            some = min(left, max(1, int(MOST_NUMBERS / (given * self.images * 4))))
            changes = {}
            for n, factor in factors.items():
                g = torch.randn(some, *factor.shape, generator=generator, dtype=torch.float64).to(value.device)
                changes[n] = (g * factor).reshape(some, *self.env[n].shape)
            start = {self.graph.input: changes.pop(self.graph.input)}
            squares += rows(self.linear.push(start, node, changes)[node], self.images, 1).square().sum(0)
            left -= some
        self.spent += self.each
        return (squares / _quantile(self.each / elements)).sqrt() * _UP

    def _exact_rows(self, node: fx.Node, low: Tensor, high: Tensor) -> Box:
        """Tighten the box of the elements that may meet a kink of what follows, by their rows of the linearised network."""
        value = self.env[node]
        wanted = rows(meets_kink(node, low, value, high), self.images)
        most = int(wanted.sum(1).max())
        if most > _MOST_ROWS or most == 0:
            return low, high
        order = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        below, above = (rows(end, self.images).clone() for end in (value - low, high - value))
        for places in order.split(max(1, int(MOST_NUMBERS / self.linear.numbers(node))), dim=1):
            down, up = self._row_ends(node, places)
            below.scatter_(1, places, torch.minimum(below.gather(1, places), down))
            above.scatter_(1, places, torch.minimum(above.gather(1, places), up))
        return value - below.reshape(value.shape), value + above.reshape(value.shape)

    def _row_ends(self, node: fx.Node, places: Tensor) -> tuple[Tensor, Tensor]:
        """How far elements of a node move down and up at most, (images, k); ``places`` are their numbers in each image."""
        value, k = self.env[node], places.shape[1]
        one = torch.zeros(k, self.images, value.numel() // self.images, dtype=value.dtype, device=value.device)
        one.scatter_(2, places.T[:, :, None], 1.0)
        cotangent, errors = self.linear.pull({node: one.reshape(k, *value.shape)})
        around = torch.zeros(k, self.images, dtype=value.dtype, device=value.device)
        for error, seen in errors.items():
            if error in self.terms:
                around = around + self.terms[error].support(rows(seen, self.images, 1))
        ends = [around, around]
        if cotangent is not None:
            v = rows(cotangent, self.images, 1)
            low, high = (rows(end, self.images) for end in self.span)
            ends = [around + support(-v, self.radii, high, -low), around + support(v, self.radii, high, -low)]
        down, up = (end.T * _UP + 1e-300 for end in ends)
        return down, up

    def _linearise(self, node: fx.Node) -> None:
        """Find a node's error, and how large it is."""
        rule, value = RULES.get(operation_of(node.target)), self.env[node]
        if not isinstance(value, Tensor):
            raise NoClaim(f"no local error is known for {named(node, '')} (at {where(node)}), which gives several values")
        if value.ndim == 0 or value.shape[0] % self.images:
            raise NoClaim(f"{named(node, 'with the images on another axis than the first')} has no local error")
        try:
            if rule is None or len(self.linear.sources[node]) < sum(map(self.depends, node.all_input_nodes)):
                raise NoClaim
            error = rule(self, node)
        except NoClaim:
            known = self.bound(node)
            if known == math.inf:
                raise NoClaim(self.reason or f"no local error is known for {named(node, '')} (at {where(node)})") from None
            size = self.radii * (known * _UP)
            error = LocalError(0.0, torch.minimum(self._wide(size, value), self.furthest(node)).expand_as(value), None, size)
        if error.linear is not None:
            self.linear.replaced[node] = self.quick.replaced[node] = error.linear
        size = rows(error.reach, self.images).norm(dim=1) * _UP
        if error.size is not None:
            size = torch.minimum(size, error.size)
        if error.energy is not None and bool((size > 0).any()):
            size = torch.minimum(size, self._norm(self._joint(self.linear.sources[node], error.energy), (node, "error")))
        if not bool(torch.isfinite(size).all() and torch.isfinite(error.reach).all()):
            raise NoClaim(f"{named(node, 'with an unlimited error')} has no local error")
        self.linear.slopes[node], self.errors[node], self.sizes[node] = error.slope, error, size
        self.quick.slopes[node] = cast(error.slope, torch.float32)
        self._add_term(node, error, size)
        low, high = self.boxes[node]
        if error.slope is not None and not isinstance(error.slope, float):
            below, above = (end for end in self._source_span(node))
            down, up = (
                torch.minimum(error.slope * below, error.slope * above),
                torch.maximum(error.slope * below, error.slope * above),
            )
            self.boxes[node] = torch.maximum(low, value + down - error.reach), torch.minimum(high, value + up + error.reach)

    def _source_span(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        source = self.linear.sources[node][0]
        low, high = self.box(source)
        return low - self.env[source], high - self.env[source]

    def _joint(self, sources: list[fx.Node], energy: Energy) -> JointMap:
        """The map from the input's change and the errors before some nodes to a linear function of the nodes' changes."""
        last = max(sources, key=self.linear.order.__getitem__)
        return JointMap(self.linear, self._terms_before(last), sources, energy, self._fresh_seed())

    def _terms_before(self, last: fx.Node) -> dict[fx.Node, Term]:
        steps = {self.graph.input, *self.linear.steps(last)}
        return {node: term for node, term in self.terms.items() if node in steps}

    def _fresh_seed(self) -> int:
        """A seed that nothing else of this walk is drawn with."""
        self.seed += 1
        return self.seed

    def _add_term(self, node: fx.Node, error: LocalError, size: Tensor) -> None:
        if bool((size > 0).any()):
            reach = rows(error.reach.expand_as(self.env[node]), self.images)
            log = torch.zeros_like(reach) if error.by_element else torch.zeros_like(reach[:, :1])
            self.terms[node] = Term(size, reach, log, error.energy, self.linear.sources[node])

    def _norm(self, joint: JointMap, of: Any) -> Tensor:
        """A bound of the norm of what a joint map gives, (images,); ``of`` says what that is, for walks that start from it."""
        known = self.start.get(of, {})
        for node, term in joint.terms.items():
            if node in known and known[node].shape == term.log.shape:
                term.log = known[node]
        self.spent += self.each
        try:
            if len(joint.terms) > 1:
                joint.tune_by(self.quick, near=bool(known))
            else:
                joint.terms[self.graph.input].log = torch.zeros_like(self.radii[:, None])
            s = largest_by_group(joint.operator(), self.each, rtol=_RTOL, max_steps=_MOST_STEPS, seed=self._fresh_seed())
        except ValueError as error:
            raise NoClaim(f"bounds around the images overflow: {error}") from error
        found = joint.bound(s)
        scale = torch.where(found > 1e-100, 2 * found.clamp_min(1e-100).log(), 0.0)[:, None]
        for term in joint.terms.values():
            term.log = term.log - scale
        self.kept[of] = {node: term.log for node, term in joint.terms.items()}
        return found * _UP


def minus(one: Any, other: Any) -> Any:
    """The difference of tensors, or of those of tuples."""
    if isinstance(one, tuple | list):
        return type(one)(minus(a, b) for a, b in zip(one, other, strict=True))
    return one - other


def meets_kink(node: fx.Node, low: Tensor, value: Tensor, high: Tensor) -> Tensor:
    """The elements of a node whose exact range matters: not those on one side of 0, if only ReLUs follow."""
    found = torch.zeros_like(value, dtype=torch.bool)
    for user in node.users:
        operation = operation_of(user.target)
        if operation in (aten.relu, aten.leaky_relu):
            found |= (low < 0) & (high > 0)
        elif operation is aten.max_pool2d and value.ndim == 4:
            found |= pooling_errors.may_win(user, low, high)
        else:
            return high > low
    return found


@cache
def _quantile(probability: float) -> float:
    """The number that a χ² variable, of as many degrees as a sketch has vectors, falls below with this probability."""
    from scipy.special import gammaincinv

    return 2 * float(gammaincinv(_SKETCH / 2, probability))
