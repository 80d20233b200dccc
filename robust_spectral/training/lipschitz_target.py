"""One Lipschitz bound for a whole network, spread over its layers: the common norm of the layers with which it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..clipping import TOLERANCE
from ..layers import uncompiled
from ..lipschitz import Affine, Graph, Key, LipschitzWalk, NoClaim, graph_of, pair_of, preserved
from ..norms import NormInterval

_SMALLEST = 1e-6  # smallest norm that is tried
_HALVINGS = 30


def norm_for(
    model: nn.Module, example_input: Tensor, held: Mapping[str, bool], lipschitz_target: float, failure_probability: float
) -> float:
    """The largest norm at which the network's bound is at most ``lipschitz_target``.

    Every layer that the clipper controls is taken to have that norm, or its own if it is smaller.

    Args:
        model: A model with a global Lipschitz bound.
        example_input: A batch it takes, (n, ...).
        held: Names of the layers that the clipper controls, and whether each is clipped together with its batch normalisation.
        lipschitz_target: The bound allowed, for the network from L2 to L2.
        failure_probability: Failure probability of each computed norm.

    Returns:
        The norm; if the network's bound is below the target already, the largest norm of all layers.

    Raises:
        ValueError: no norm suffices: the network has no bound, or its other layers keep the bound above the target.
    """
    example, model = pair_of(example_input), uncompiled(model)
    with preserved(model), torch.no_grad():
        try:
            graph = graph_of(model, example)
            values = graph.values(example)
        except NoClaim as refused:
            raise ValueError(f"lipschitz_target={lipschitz_target:g}: {refused}") from refused
        norms: dict[Key, NormInterval] = {}

        def bound(norm: float) -> float:
            walk = _Capped(graph, values, failure_probability, norms, held, norm)
            walk.run()
            if walk.reason is not None and math.isinf(walk.value):
                raise ValueError(f"lipschitz_target={lipschitz_target:g}: {walk.reason}")
            return walk.value

        below = bound(math.inf) <= lipschitz_target
        largest = max(interval.upper for interval in norms.values())
        if below:
            return largest
        least = bound(_SMALLEST)
        if least > lipschitz_target:
            raise ValueError(
                f"lipschitz_target={lipschitz_target:g}: with the clipped layers at norm {_SMALLEST:g} the bound is still "
                f"{least:g}; clip more layers, or raise the target"
            )
        low, high = math.log(_SMALLEST), math.log(largest)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if bound(math.exp(middle)) <= lipschitz_target else (low, middle)
    return math.exp(low)


class _Capped(LipschitzWalk):
    """A walk in which the layers that the clipper controls have at most a given norm.

    Stretches of several layers count as unbounded, since their own norms do not follow from the given one.
    """

    def __init__(
        self, graph: Graph, values: Mapping[Any, Any], failure_probability: float, norms: dict[Key, NormInterval],
        held: Mapping[str, bool], norm: float,
    ) -> None:  # fmt: skip
        super().__init__(graph, values, failure_probability, norms)
        self._held, self._cap = {name.split("#")[0]: composite for name, composite in held.items()}, norm * (1 + TOLERANCE)

    def step_norm(self, step: Affine) -> float:
        """The norm found by the base class, capped for the layers that the clipper controls."""
        norm = super().step_norm(step)
        composite = len(step.layers) == 2
        return min(norm, self._cap) if step.layers and self._held.get(step.layers[0]) == composite else norm

    def whole_norm(self, steps: list[Affine]) -> float:
        """Unknown: the norm of a stretch does not follow from those of its layers."""
        return math.inf
