"""The parameters through which a clip lowers a layer's norm, and the gradients of ⟨u, A v⟩ with respect to them.

A layer of torch.nn itself moves its weight, a parametrised layer the parameters that its weight is computed from, a
``ScaledStdConv2d`` its gain. In a composite (a layer together with the batch normalisation that follows it) the weight may
move, γ, or both. The choice depends on whether the normalisation uses batch statistics while the network trains; each `Move`
says when it applies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ..layers import LinearLayer
from ..operators import batchnorm_scale, convolution_settings, forward_pass, is_batchnorm, is_plain, unchecked_operator

_FIXING = ("_SpectralNorm", "_Orthogonal")  # parametrisations of torch that fix the norm of a weight


class Move(Protocol):
    """The parameters of a layer that a clip changes, and how ⟨u, A v⟩ depends on them."""

    def parameters(self, layer: LinearLayer) -> list[nn.Parameter]:
        """The parameters that move. Raises NotImplementedError, naming the layer, if there are none."""

    def gradients(self, layer: LinearLayer, X: Tensor, U: Tensor, composite: bool) -> list[Tensor]:
        """∂⟨u_i, A v_i⟩/∂parameter for rows X (k, *in_shape) and U (k, *out_shape): (k, *parameter shape) each."""

    def rescaled(self, layer: LinearLayer) -> list[nn.Parameter]:
        """The parameters whose common factor is a factor of the norm."""


@dataclass(frozen=True)
class MoveWeight:
    """A move of the layer's weight. For layers alone, and for composites whose batch normalisation keeps its statistics frozen.

    The composite is then a fixed diagonal times the layer, so the gradients are exact. A normalisation that trains on batch
    statistics undoes every rescaling of a filter; this move ignores that and would drive the weight to zero.
    """

    def parameters(self, layer: LinearLayer) -> list[nn.Parameter]:
        """The weight, or the parameters that it is computed from."""
        return list(weight_parameters(layer.module, layer.name).values())

    def gradients(self, layer: LinearLayer, X: Tensor, U: Tensor, composite: bool) -> list[Tensor]:
        """The gradients with respect to the weight, with the normalisation's factors applied to u."""
        return weight_gradients(layer.applied, X, _through_batchnorm(layer, U) if composite else U, layer.name)

    def rescaled(self, layer: LinearLayer) -> list[nn.Parameter]:
        """All parameters that move."""
        return self.parameters(layer)


@dataclass(frozen=True)
class MoveGamma:
    """A move of γ of the batch normalisation and nothing else. For composites, with frozen or batch statistics.

    Reaches any target exactly, because the composite is proportional to γ. With only one number per channel, it weakens whole
    channels where another move would change single directions. A factor of exactly 0 stays 0.
    """

    def parameters(self, layer: LinearLayer) -> list[nn.Parameter]:
        """γ.

        Raises:
            NotImplementedError: no batch normalisation with a γ follows the layer.
        """
        gamma: Any = getattr(layer.batchnorm, "weight", None)
        if not isinstance(gamma, nn.Parameter):
            raise NotImplementedError(f"clipping '{layer.name}': no batch normalisation with a γ follows it")
        return [gamma]

    def gradients(self, layer: LinearLayer, X: Tensor, U: Tensor, composite: bool) -> list[Tensor]:
        """The gradients with respect to γ: each channel's share of ⟨u, normalised layer v⟩. Costs one application a row."""
        assert layer.batchnorm is not None
        gamma = self.parameters(layer)[0].detach().double()
        inverse_std = torch.where(gamma == 0, 0.0, batchnorm_scale(layer.batchnorm) / torch.where(gamma == 0, 1.0, gamma))
        Y = unchecked_operator(layer.applied, layer.in_shape, X.dtype).matmat(X)
        return [(Y * U).reshape(*Y.shape[:2], -1).sum(2) * inverse_std.to(X.dtype)]

    def rescaled(self, layer: LinearLayer) -> list[nn.Parameter]:
        """γ."""
        return self.parameters(layer)


@dataclass(frozen=True)
class MoveWeightAndGamma:
    """A move of γ and of the weight orthogonally to its filters, for composites that train on batch statistics.

    The running variance follows a change along a filter and so undoes it; γ makes that change instead. A change orthogonal to
    the filter rotates it, which the normalisation does not undo.

    Attributes:
        along: Whether the weight moves along its filters too, as in the published code of the paper, whose composites lose
            their weight while the normalisation trains on batch statistics. For comparison, or with frozen statistics.
    """

    along: bool = False

    def parameters(self, layer: LinearLayer) -> list[nn.Parameter]:
        """The weight and γ."""
        return [*MoveWeight().parameters(layer), *MoveGamma().parameters(layer)]

    def gradients(self, layer: LinearLayer, X: Tensor, U: Tensor, composite: bool) -> list[Tensor]:
        """The gradients with respect to the weight, without its components along the filters (unless ``along``), and to γ."""
        by_weight = MoveWeight().gradients(layer, X, U, composite)
        if not self.along and is_plain(layer.module) and not getattr(layer.module, "transposed", False):
            weight: Any = layer.module.weight
            filters = weight.detach().to(X.dtype).flatten(1)
            along = (by_weight[0].flatten(2) * filters).sum(2) / filters.square().sum(1).clamp_min(torch.finfo(X.dtype).tiny)
            by_weight = [by_weight[0] - (along[..., None] * filters).reshape(by_weight[0].shape)]
        return [*by_weight, *MoveGamma().gradients(layer, X, U, composite)]

    def rescaled(self, layer: LinearLayer) -> list[nn.Parameter]:
        """γ."""
        return MoveGamma().parameters(layer)


def weight_parameters(module: nn.Module, name: str = "") -> dict[str, nn.Parameter]:
    """The parameters through which a layer's weight can move, by name in the module.

    Raises:
        NotImplementedError: the norm follows no parameter of the layer.
    """
    weight: Any = module._parameters.get("weight")
    if is_plain(module) and type(weight) is nn.Parameter:  # the case of nearly every layer, and checked at every step
        return {"weight": weight}
    kind, where = type(module).__name__, f"clipping '{name or type(module).__name__}' ({type(module).__name__})"
    if parametrize.is_parametrized(module, "weight"):
        holding = [type(part).__name__ for part in module.parametrizations.weight if type(part).__name__ in _FIXING]  # type: ignore
        if holding:
            raise NotImplementedError(f"{where}: the parametrisation {holding[0]} fixes its norm; remove that first")
        prefix = "parametrizations.weight."
        return {key: value for key, value in module.named_parameters() if key.startswith(prefix)}
    if is_batchnorm(module):
        raise NotImplementedError(f"{where}: a batch normalisation is clipped only together with the layer before it")
    gain: Any = getattr(module, "gain", None)
    if "ScaledStdConv2d" in kind and isinstance(gain, nn.Parameter):  # by name, as timm is not imported here
        return {"gain": gain}
    if "StdConv2d" in kind:
        raise NotImplementedError(f"{where}: it standardises its weight in forward, so its norm does not follow the weight")
    weight = getattr(module, "weight", None)
    if hasattr(weight, "full_tensor"):  # a DTensor; its package is not imported for this check
        raise NotImplementedError(f"{where}: its weight is sharded (FSDP, tensor parallel); train under DDP to clip")
    if not isinstance(weight, nn.Parameter):
        raise NotImplementedError(f"{where}: it has no weight parameter of its own")
    return {"weight": weight}


def weight_gradients(module: nn.Module, X: Tensor, U: Tensor, name: str = "") -> list[Tensor]:
    """∂⟨u_i, module(x_i)⟩/∂p for each of a layer's `weight_parameters`, for rows of inputs X and outputs U: (k, *p's shape).

    Raises:
        NotImplementedError: the forward pass does not use one of those parameters.
    """
    parameters = weight_parameters(module)
    if is_plain(module):
        found = _plain_gradients(module, parameters["weight"].detach().to(X.dtype), X, U)
        if found is not None:
            return [found]
    variables = {key: value.detach().to(X.dtype).requires_grad_() for key, value in parameters.items()}
    rows = []
    with torch.enable_grad():
        for x, u in zip(X.split(1), U.split(1), strict=True):
            score = (forward_pass(module, x, variables) * u).sum()
            if not score.requires_grad:
                raise _unused(module, name, variables)
            rows.append(torch.autograd.grad(score, list(variables.values()), allow_unused=True))
    if any(gradient is None for row in rows for gradient in row):
        raise _unused(module, name, variables)
    return [torch.stack(by_one) for by_one in zip(*rows, strict=True)]


def _unused(module: nn.Module, name: str, variables: Iterable[str]) -> NotImplementedError:
    return NotImplementedError(
        f"clipping '{name or type(module).__name__}' ({type(module).__name__}): its forward pass does not read all of "
        f"{', '.join(variables)} from the module, and a clip would move them"
    )


def _plain_gradients(module: nn.Module, weight: Tensor, X: Tensor, U: Tensor) -> Tensor | None:
    """The weight gradients without autograd: outer products if the layer is a matrix, else the convolution's weight gradient.

    None if neither applies.
    """
    matrix = (U[0].numel(), X[0].numel(), weight.numel()) == (len(weight), weight.shape[1], len(weight) * weight.shape[1])
    if matrix and not getattr(module, "transposed", False):
        return (U.flatten(1)[:, :, None] * X.flatten(1)[:, None]).reshape(-1, *weight.shape)
    settings = convolution_settings(module) if isinstance(module, _ConvNd) else None
    if settings is None:
        return None
    pairs, only_weight = zip(U.split(1), X.split(1), strict=True), [False, True, False]
    backward = torch.ops.aten.convolution_backward
    found = [backward(u, x, weight, None, *settings, only_weight)[1] for u, x in pairs]
    return torch.stack(found) if len(found) > 1 else found[0][None]


def _through_batchnorm(layer: LinearLayer, U: Tensor) -> Tensor:
    if layer.batchnorm is None:
        return U
    return U * batchnorm_scale(layer.batchnorm).to(U.dtype).reshape(-1, *[1] * (U.ndim - 2))
