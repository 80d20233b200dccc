"""The check of a network's bound before a Lipschitz target counts as met: by a sampled Jacobian, and by the model itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..layers import uncompiled
from ..lipschitz import ESTIMATE_ROUNDING, LipschitzBound, disagreement, lipschitz_estimate

_MOST_OUTPUTS = 100  # so that the check costs at most this many backward passes


def check_target(model: nn.Module, example: Tensor, bound: LipschitzBound, lipschitz_target: float) -> None:
    """Check a bound that meets a target: against the Jacobian at an example, and its graph against the model's outputs there.

    Args:
        model: The network.
        example: A batch of one input, (1, ...).
        bound: The network's proved bound.
        lipschitz_target: The target, for messages.

    Raises:
        ValueError: the bound is refuted, so that nothing is known about the target.
    """
    pair = torch.cat([example, example])
    refuted = disagreement(uncompiled(model), pair)
    sampled = _sampled(model, pair)
    if sampled > (1 + ESTIMATE_ROUNDING) * bound.value:
        refuted = f"a sampled Jacobian norm, {sampled:.4g}, is above the bound of the network, {bound.value:.4g}"
    if refuted is not None:
        raise ValueError(
            f"FastClip(lipschitz_target={lipschitz_target:g}): not known to be met, since the bound is refuted: {refuted}; "
            "either gradients of the model are not its derivatives, or this is a fault of robust_spectral: please report it"
        )


def _sampled(model: nn.Module, images: Tensor) -> float:
    """The estimate; NaN where no gradient reaches the inputs."""
    if not images.is_floating_point():
        return math.nan
    try:
        return lipschitz_estimate(model, images, _MOST_OUTPUTS)
    except RuntimeError:
        return math.nan
