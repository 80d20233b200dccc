"""Rules of normalisations by the statistics of one sample, whose Lipschitz constant is finite thanks to eps."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...numerics import product_up
from ..registry import rule
from ..walk import LipschitzWalk
from .node_arguments import given, source_of


@rule(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def own_statistics(walk: LipschitzWalk, n: fx.Node) -> float:
    """Normalisation by a sample's own mean and variance has Lipschitz constant max |γ| / sqrt(eps) at most.

    With z = x - mean(x), a projection, and var = ‖z‖² / n, the map z -> z / sqrt(var + eps) has the Jacobian
    (I - z zᵀ / (n (var + eps))) / sqrt(var + eps), whose norm is at most 1 / sqrt(eps). γ multiplies each element.
    """
    module: Any = walk.called(n)
    if getattr(module, "track_running_stats", False):
        return math.inf
    return product_up(walk.bound(source_of(walk, n)), normalising_gain(module.eps, module.weight))


@rule(nn.RMSNorm)
def root_mean_square_bound(walk: LipschitzWalk, n: fx.Node) -> float:
    """x -> x / sqrt(‖x‖² / n + eps) has constant max |γ| / sqrt(eps) at most, as `own_statistics` without the mean."""
    module: Any = walk.called(n)
    eps = torch.finfo(walk.env[n].dtype).eps if module.eps is None else module.eps
    return product_up(walk.bound(source_of(walk, n)), normalising_gain(eps, module.weight))


@rule(F.layer_norm, F.group_norm)
def own_statistics_function(walk: LipschitzWalk, n: fx.Node) -> float:
    """The bound of `own_statistics`, for the functions layer_norm and group_norm."""
    source = source_of(walk, n)
    names = ("normalized_shape" if n.target is F.layer_norm else "num_groups", "weight", "bias", "eps")
    told = given(n, *names)
    weight = told.get("weight")
    gain = normalising_gain(float(told.get("eps", 1e-5)), None if weight is None else walk.env[weight])
    return product_up(walk.bound(source), gain)


def normalising_gain(eps: float, weight: Tensor | None) -> float:
    """max |γ| / sqrt(eps), rounded up; inf where eps is 0."""
    gain = 1.0 if weight is None else float(weight.detach().double().abs().max())
    return gain / math.sqrt(eps) * (1 + 1e-15) if eps > 0 else math.inf
