"""A smaller Lipschitz bound of a whole network, by multipliers for all of its activations together.

`lipschitz_bound` multiplies norms, as if every layer could stretch the same direction at the same time. Here the differences of
two inputs' values are followed through the whole network, with a sector for each activation (`GlobalWalk`), and one Lagrangian
bounds the output's difference (`JointMap`). For ReLU networks this is the bound of LipSDP, without matrices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..layers import uncompiled
from ..lipschitz import LipschitzBound, NoClaim, graph_of, lipschitz_bound, operation_of, pair_of, preserved
from ..norms import largest_by_group
from ..operators import LinearOperator, full_precision_no_grad
from .forms import FORMS, move_relu_behind
from .global_errors import GlobalWalk
from .joint_map import JointMap
from .multiplier_tuning import Tuning

aten = torch.ops.aten
_WRITTEN_OUT = (aten.max_pool1d, aten.max_pool3d, aten.maximum, aten.minimum, aten.max, aten.min, aten.amax, aten.amin,
                aten._native_batch_norm_legit_no_training)  # fmt: skip
_FORMS = {operation: form for operation, form in FORMS.items() if operation_of(operation) in _WRITTEN_OUT}
_LEAST_AIM, _LAST_AIM = 0.88, 0.995  # of the squared norm, so that its bound is at most 1, or a little larger
_MOST_IN_FLOAT32 = 1e12  # largest size of an error with which multipliers are tuned in float32
_PARTS = (0.4, 0.8, 1.0)  # of the time, after which bounds are computed
_MOST_OF_TIME = 0.1  # for one bound; if it takes longer, there is one at the end only
_MOST_TRIES = 4
_WARM = 5  # rounds, before times are compared
_MOST_ABOVE = 0.5  # times the number of levels: squared norms from 1 on that are not tuned further
_WIDTH = 1.04  # of the bound of a squared norm, before one is known
_RTOL = 2e-3
_MOST_STEPS = 120  # of Lanczos
_MOST_BYTES = 1.5e9  # of its bases


def refined_bound(
    model: nn.Module, example_input: Tensor, seconds: float | None = 60.0, failure_probability: float = 1e-9,
    box: tuple[float, float] | None = (0.0, 1.0), *, rounds: int | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> LipschitzBound:  # fmt: skip
    """`lipschitz_bound`, and then a smaller bound of the whole network, for all inputs.

    The bound is found by tuning, and becomes smaller with time. With ``seconds`` it depends on the machine and its load; with
    ``rounds`` alone it does not. Tuning needs no proof: the bound is computed from the multipliers that it ends with.

    Args:
        model: As for `lipschitz_bound`; unchanged afterwards.
        example_input: As for `lipschitz_bound`.
        seconds: About how long to tune after `lipschitz_bound`; None for no limit, then give ``rounds``.
        failure_probability: Allowed for each norm's bound, positive; the result has the sum.
        box: As for `lipschitz_bound`.
        rounds: Most rounds of tuning, each of one pass forward and one backward for eight vectors; None for no limit.
        progress: Called after each round with the part of the time that is over and the smallest bound so far.

    Returns:
        LipschitzBound: with ``value``, ``local`` and ``pairs`` never above those of `lipschitz_bound`. Its ``reason`` says why
        they are not refined if an operation has no constant of its own, as sorting.

    Raises:
        ValueError: there is no limit, or it is not positive; or as `lipschitz_bound`.
        TypeError: as `lipschitz_bound`.
    """
    limits = [limit for limit in (seconds, rounds) if limit is not None]
    if not limits or not all(limit > 0 for limit in limits):
        raise ValueError(f"refined_bound(seconds={seconds}, rounds={rounds}): give one of them, or both, above 0")
    if not 0 < failure_probability < 1:
        raise ValueError(f"refined_bound(failure_probability={failure_probability}): give a number between 0 and 1")
    known = lipschitz_bound(model, example_input, failure_probability, box)
    if not (0 < known.value < math.inf and example_input.is_floating_point()):
        return known
    model = uncompiled(model)
    with torch.inference_mode(False), preserved(model), full_precision_no_grad():
        try:
            walk = global_walk(model, example_input.detach(), failure_probability)
            found = Refinement(walk, known.value, seconds, rounds, progress)
            found.run()
        except NoClaim as refused:
            return replace(known, reason=f"not refined: {refused}")
    return _replaced(known, found.value, found.spent + walk.failure_probability)


def global_walk(model: nn.Module, example_input: Tensor, failure_probability: float) -> GlobalWalk:
    """The walk of a model in eval mode, within `preserved`.

    Raises:
        NoClaim: an operation has no constant, or the graph with other forms of operations computes something else.
    """
    pair = pair_of(example_input).clone()
    graph = graph_of(model, pair, _written_out)
    values, same = graph.values(pair), graph_of(model, pair).run(pair)
    for node, wanted in zip(graph.outputs, same, strict=True):
        if not bool(((values[node] - wanted).abs() <= 1e-9 * (1 + wanted.abs().max())).all()):
            raise NoClaim(f"{graph.model} computes something else where its operations are written out")
    walk = GlobalWalk(graph, values, failure_probability)
    walk.run()
    return walk


def _written_out(program: Any) -> Any:
    """An exported program with maxima as sums with ReLUs, each operation once, max-pooling before ReLU, and no assertions."""
    program = program.run_decompositions(dict(_FORMS))
    seen: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if operation_of(node.target) is aten._assert_tensor_metadata:
            program.graph.erase_node(node)
            continue
        first = seen.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            program.graph.erase_node(node)
    for node in list(program.graph.nodes):
        if operation_of(node.target) is aten.max_pool2d:
            move_relu_behind(program.graph, node)
    return program


def _replaced(known: LipschitzBound, value: float, spent: float) -> LipschitzBound:
    """A bound with another one for the whole network where that is smaller."""
    if not value < known.value:
        return known
    pairs = known.pairs
    if pairs is not None:
        pairs = pairs.clamp_max(math.sqrt(2) * value * (1 + 1e-14))  # ‖e_i - e_j‖ = √2
    return replace(
        known, value=value, local=min(known.local, value), pairs=pairs, failure_probability=known.failure_probability + spent
    )


class Refinement:
    """The multipliers of a network, and the bounds that they prove.

    Args:
        walk: The errors of the network's operations, after its run.
        known: A bound of the network.
        seconds: As for `refined_bound`.
        rounds: As for `refined_bound`.
        progress: As for `refined_bound`.

    Attributes:
        value: The smallest bound so far.
        terms: The input and the errors, by node.
        best: The logarithms of their multipliers that ``value`` was computed from.
        levels: The largest number of errors that depend on each other in a row, and one more for the output.
        spent: Failure probability of all bounds that were computed.
    """

    def __init__(
        self, walk: GlobalWalk, known: float, seconds: float | None, rounds: int | None,
        progress: Callable[[float, float], None] | None,
    ) -> None:  # fmt: skip
        self.walk, self.value, self.seconds, self.rounds = walk, known, seconds, rounds
        self.progress, self.spent, self.tries, self.done = progress, 0.0, 0, 0
        self.width, self.reserved, self.quickest = _WIDTH, 0.0, math.inf  # and seconds for a bound, and of a round
        self.outputs = [node for node in walk.graph.outputs if walk.depends(node)]
        for node in self.outputs:
            if walk.env[node].ndim == 0 or walk.env[node].shape[0] % walk.images:
                raise NoClaim("the output is no batch")
        levels = walk.levels()
        self.levels = 1 + max(levels[node] for node in self.outputs)
        self.terms, self.best = walk.needed(), dict[fx.Node, Tensor]()
        self.tuning = Tuning(self._in_precision)
        self.start = time.perf_counter()

    def map(self) -> JointMap:
        """The map from the terms to the output and the errors' energies."""
        return JointMap(self.walk.linear, self.terms, self.outputs, lambda changes: changes, 0)

    def _in_precision(self, dtype: torch.dtype) -> JointMap:
        """The map in another precision, for tuning."""
        joint = self.map()
        if dtype == torch.float64:
            return joint
        if float(max(term.size.max() for term in self.terms.values())) > _MOST_IN_FLOAT32:
            raise OverflowError
        return joint.cast(self.walk.linear.cast(dtype))

    def over(self) -> float:
        """The part of the time that is over."""
        parts = [0.0]
        if self.rounds is not None:
            parts.append(self.done / self.rounds)
        if self.seconds is not None:
            parts.append((time.perf_counter() - self.start + self.reserved) / self.seconds)
        return min(1.0, max(parts))

    def run(self) -> None:
        """Tune and compute bounds in turn, each with an aim that the width of the last one allows, until one holds."""
        if len(self.terms) == 1:
            self._prove()
            return
        for part in _PARTS[:-1]:
            self._tune(part)
            cheap = self.seconds is None or self.reserved < _MOST_OF_TIME * self.seconds
            self._aim(self._settled_and_proved() if cheap and part > _PARTS[0] else self.width * self.tuning.settled())
        self._tune(1.0)
        while self._settled_and_proved() > 1 + _MOST_ABOVE / self.levels and self.tries < _MOST_TRIES:
            self._aim(self.width * self.tuning.settled())
            for _ in range(max(20, self.done // 10)):
                self.tuning.round(0.5)

    def _settled_and_proved(self) -> float:
        """A bound of the squared norm, by which the width of the next one is guessed."""
        settled = self.tuning.settled()
        square = self._prove()
        self.width = max(1.0, square / settled)
        return square

    def _aim(self, square: float) -> None:
        """Aim at the largest squared norm whose bound will be about 1."""
        if self.tuning.rounds:
            self.tuning.aim = min(_LAST_AIM, max(_LEAST_AIM, 0.998 * self.tuning.top / square))

    def _tune(self, until: float) -> None:
        while (over := self.over()) < until:
            before = time.perf_counter()
            self.tuning.round(over)
            self.quickest = min(self.quickest, time.perf_counter() - before)
            self.reserved = self._steps() * self.quickest if self.done >= _WARM else 0.0  # about the time of a bound
            self.done += 1
            if self.progress is not None:
                self.progress(over, self.value)

    def by_levels(self, s: float) -> float:
        """The bound from s ≤ 1, or from a larger s with each error's multiplier divided by s² as often as its level says."""
        total = sum(float(term.log[0, 0].exp()) for term in self.terms.values() if term.fixed)
        square = s * s * (1 + 1e-12)
        return math.sqrt(total * square ** (self.levels if square > 1 else 1)) * (1 + 1e-12)

    def _steps(self) -> int:
        """Lanczos steps whose bases fit into memory."""
        joint = self.tuning.joint
        return int(min(_MOST_STEPS, max(20, _MOST_BYTES / (8 * (joint.given + sum(joint.sizes))))))

    def _prove(self) -> float:
        """Bound the network by the multipliers as they are, from a fresh start; returns the bound of the squared norm."""
        for term, tuned in zip(self.terms.values(), self.tuning.joint.terms.values(), strict=True):
            term.log = tuned.log.double()
        joint = self.map()
        self.tries += 1
        self.spent += self.walk.each
        seed = 1000 + self.tries
        try:
            s = largest_by_group(_first_image(joint), self.walk.each, rtol=_RTOL, max_steps=self._steps(), seed=seed)
        except ValueError as error:
            raise NoClaim(f"bounds overflow: {error}") from error
        found = min(float(joint.bound(s.expand(joint.images))[0]), self.by_levels(float(s)))
        if found < self.value:
            self.value, self.best = found, {node: term.log for node, term in self.terms.items()}
        return float(s) ** 2


def _first_image(joint: JointMap) -> LinearOperator:
    """The map of the first image alone, which the others do not influence."""

    def alone(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda X: function(torch.cat([X, X.new_zeros(len(X), joint.images - 1, X.shape[2])], 1))[:, :1]

    shapes = (1, joint.given), (1, sum(joint.sizes))
    return LinearOperator(*shapes, joint.dtype, joint.device, alone(joint.forward), alone(joint.adjoint))
