"""One Lipschitz constant for a whole network, spread over its layers: which norm, held by each, keeps the bound below it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..clipping import TOLERANCE
from ..layers import uncompiled
from ..lipschitz import Build, Key, LipschitzWalk, pair_of, traced_at
from ..norms import NormInterval
from ..operators import evaluating

_SMALLEST = 1e-6  # norm that is tried
_HALVINGS = 30


def norm_for(
    model: nn.Module, example_input: Tensor, held: Mapping[str, bool], lipschitz_target: float, failure_probability: float
) -> float:
    """The largest norm with which the network's bound is at most a target, if every held layer has that norm or its own.

    Args:
        model: A model with a global Lipschitz bound.
        example_input: A batch it takes, (n, ...).
        held: Names of the layers held, and whether each is held together with its batch normalisation.
        lipschitz_target: The bound allowed, for the network from L2 to L2.
        failure_probability: Of each norm that is not held.

    Returns:
        The norm; the largest of all layers' where the bound is below the target as it is.

    Raises:
        ValueError: no norm does it: the network has no bound, or what is not held keeps it above.
    """
    example, model = pair_of(example_input), uncompiled(model)
    with evaluating(model), torch.no_grad():
        traced = traced_at(model, example)
        norms: dict[Key, NormInterval] = {}

        def bound(norm: float) -> float:
            walk = _Capped(traced, failure_probability, norms, held, norm)
            walk.run(example)
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
                f"lipschitz_target={lipschitz_target:g}: with the held layers at norm {_SMALLEST:g} the bound is still "
                f"{least:g}; hold more layers, or allow more"
            )
        low, high = math.log(_SMALLEST), math.log(largest)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if bound(math.exp(middle)) <= lipschitz_target else (low, middle)
    return math.exp(low)


class _Capped(LipschitzWalk):
    """A walk in which held layers have at most a given norm; longer stretches, of which nothing is known then, do not count."""

    def __init__(
        self, module: fx.GraphModule, failure_probability: float, norms: dict[Key, NormInterval], held: Mapping[str, bool],
        norm: float,
    ) -> None:  # fmt: skip
        super().__init__(module, failure_probability, norms)
        self._held, self._cap = {name.split("#")[0]: composite for name, composite in held.items()}, norm * (1 + TOLERANCE)

    def operator_norm(self, key: Key, build: Build) -> float:
        """As the walk's, but capped."""
        if isinstance(key[0], tuple):
            return math.inf
        norm, composite = super().operator_norm(key, build), _is_composite(key)
        return min(norm, self._cap) if self._held.get(str(key[0])) == composite else norm


def _is_composite(key: tuple[Any, ...]) -> bool:
    """Whether a key names a layer and its batch normalisation."""
    return len(key) == 3
