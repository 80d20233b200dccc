"""Normalisations by the statistics of one sample, whose Lipschitz constant is finite thanks to eps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...numerics import product_up
from ..boxes import Box
from ..table import NoClaim, rule
from ..walk import LipschitzWalk
from .affine_layers import batchnorm, batchnorm_box, batchnorm_rounding
from .node_arguments import SUM_UP, arguments, aten


def normalising_gain(eps: float, weight: Tensor | None) -> float:
    """max |γ| / sqrt(eps), rounded up.

    Raises:
        NoClaim: eps is 0.
    """
    if not eps > 0:
        raise NoClaim("with eps = 0")
    gain = 1.0 if weight is None else float(weight.abs().max())
    return gain / math.sqrt(eps) * (1 + 1e-15)


def normalisation_settings(walk: Any, n: fx.Node) -> tuple[float, Tensor | None, Tensor | None, int]:
    """eps, weight and bias of a normalisation in the shape of the result, and the number of elements of a group."""
    a, value = arguments(n), walk.env[n]
    if any(walk.depends(a.get(name)) for name in ("weight", "bias")):
        raise NoClaim("with weights that depend on the input")
    eps = a["eps"] if a["eps"] is not None else torch.finfo(walk.graph.dtype).eps
    if "normalized_shape" in a:
        count, shape = math.prod(a["normalized_shape"]), tuple(a["normalized_shape"])
    else:
        count = math.prod(value.shape[1:]) // (a["num_groups"] if "num_groups" in a else value.shape[1])
        shape = (-1, *[1] * (value.ndim - 2))
    weight, bias = (None if a.get(name) is None else walk.constant(a[name]).reshape(shape) for name in ("weight", "bias"))
    return float(eps), weight, bias, count


def normalised_box(walk: LipschitzWalk, n: fx.Node) -> Box:
    """A normalised vector of m elements has norm <= sqrt(m), which also bounds each element; then times γ, plus β."""
    _, weight, bias, count = normalisation_settings(walk, n)
    value: Tensor = walk.env[n]
    gain = value.new_ones(()) if weight is None else weight.abs()
    offset = value.new_zeros(()) if bias is None else bias
    reach = gain * count**0.5 * (1 + 1e-12) + (SUM_UP - 1) * offset.abs()
    return (offset - reach).expand_as(value), (offset + reach).expand_as(value)


def normalised_rounding(walk: Any, n: fx.Node) -> tuple[int, float]:
    """z γ / sqrt(v + eps) + β with z = x - mean and v the mean of z² of a group of m elements.

    Whether computed by Welford's method or as the mean of x² less the squared mean, v has an error δ <= 4 γ_k ‖x‖² / m (Chan,
    Golub and LeVeque 1983, Algorithms for computing the sample variance). Since ‖z‖ <= sqrt(m (v + eps)), this error changes
    the value by at most sqrt(m) δ / (2 eps) times γ; all other rounded numbers are at most ‖x‖ / sqrt(eps) times γ.
    """
    eps, weight, bias, count = normalisation_settings(walk, n)
    if arguments(n)["eps"] is None and walk.dtype != walk.graph.dtype:
        raise NoClaim("with an eps that depends on the dtype")
    gain = 1.0 if weight is None else float(weight.abs().max())
    offset = 0.0 if bias is None else float(bias.norm()) * math.sqrt(walk.elements(n) / bias.numel())
    size = walk.size(n.args[0])
    total = gain * (4 * size / math.sqrt(eps) + 2 * size * size / (math.sqrt(count) * eps)) + 2 * offset
    return 4 * count + 16, total * (1 + 1e-9)


@rule(aten.layer_norm, aten.group_norm, aten.rms_norm, box=normalised_box, rounding=normalised_rounding)
def own_statistics(walk: LipschitzWalk, n: fx.Node) -> float:
    """Normalisation by a sample's own mean and variance has Lipschitz constant max |γ| / sqrt(eps) at most.

    With z = x - mean(x), a projection, and var = ‖z‖² / n, the map z -> z / sqrt(var + eps) has the Jacobian
    (I - z zᵀ / (n (var + eps))) / sqrt(var + eps), whose norm is at most 1 / sqrt(eps). γ multiplies each element. The bound
    holds without the mean as well, for x / sqrt(‖x‖² / n + eps).
    """
    eps, weight, _, _ = normalisation_settings(walk, n)
    a = arguments(n)
    if "normalized_shape" in a and len(a["normalized_shape"]) >= walk.env[n].ndim:
        raise NoClaim("over the batch")
    return product_up(walk.bound(n.args[0]), normalising_gain(eps, weight))


def _instances(own: Callable[..., Any], fixed: Callable[..., Any]) -> Callable[..., Any]:
    """A function of nodes for an instance normalisation, which is a batch normalisation if it is by running statistics."""
    return lambda walk, n: (own if arguments(n)["use_input_stats"] else fixed)(walk, n)


rule(
    aten.instance_norm, box=_instances(normalised_box, batchnorm_box),
    rounding=_instances(normalised_rounding, batchnorm_rounding),
)(_instances(own_statistics, batchnorm))  # fmt: skip
