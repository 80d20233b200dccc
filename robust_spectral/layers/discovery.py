"""The linear layers that a model applies, found during one forward pass.

Shapes and composites come from the pass itself. A composite is a convolution or dense layer together with the batch
normalisation that takes its output tensor, whatever their names. If the batch normalisation includes an activation (timm), only
its affine part belongs to the composite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..norms import NormInterval, norm_intervals
from ..operators import LinearOperator, Shape, convolution_then_batchnorm, is_overridden, linear_operator, norm_shape
from .forward_pass import Application, Normalisation, watched_pass
from .refusals import check_example, check_model, nothing_found


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer of a model, as applied in a forward pass.

    Attributes:
        name: Name of the layer in the model. "#2", "#3", … is added where one module is applied to inputs of several shapes,
            with several output sizes, or followed by several batch normalisations.
        module: The convolution or dense layer.
        in_shape: Shape of the input, without the batch axis; of a single position where all positions are treated alike
            (dense layers, pointwise convolutions).
        batchnorm: The batch normalisation that takes the layer's output, or None.
        batchnorm_name: Name of the batch normalisation in the model.
        output_padding: Output padding of a transposed convolution as applied, if an ``output_size`` in the call changes it.
        further_arguments: Names of other arguments of the call, which no operator takes into account.
    """

    name: str
    module: nn.Module
    in_shape: Shape
    batchnorm: nn.Module | None = None
    batchnorm_name: str | None = None
    output_padding: Shape | None = None
    further_arguments: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of layer: "conv" or "dense", with "+bn" where a batch normalisation follows."""
        return ("dense" if isinstance(self.module, nn.Linear) else "conv") + ("+bn" if self.batchnorm is not None else "")

    def operator(self, *, composite: bool = True, dtype: torch.dtype | None = None) -> LinearOperator:
        """The operator of the layer, or of its composite with the batch normalisation in eval mode.

        Args:
            composite: Whether to include the batch normalisation that follows the layer, if any.
            dtype: Type to compute in; by default that of the weights, with float32 in place of half precision.

        Raises:
            NotImplementedError: the layer is not affine, or was called with ``further_arguments``.
        """
        if composite and self.batchnorm is not None:
            return convolution_then_batchnorm(self.applied, self.batchnorm, self.in_shape, dtype)
        return linear_operator(self.applied, self.in_shape, dtype)

    @property
    def applied(self) -> nn.Module:
        """The module, or a view of it on the same weights, whose call with an input alone is the layer as applied.

        Raises:
            NotImplementedError: the layer was called with ``further_arguments``.
        """
        if self.further_arguments:
            named = ", ".join(f"'{name}'" for name in self.further_arguments)
            raise NotImplementedError(
                f"layer '{self.name}' ({type(self.module).__name__}) is called with {named}, of which its norm may depend; "
                "only calls with the input alone, and output_size of torch's transposed convolutions, are covered"
            )
        if self.output_padding is None:
            return self.module
        view = object.__new__(type(self.module))
        view.__dict__ = vars(self.module) | {"output_padding": self.output_padding}  # shares the parameters and their changes
        return view


def linear_layers(model: nn.Module, example_input: Tensor) -> list[LinearLayer]:
    """The convolutions and dense layers that a forward pass applies, in order, with their input shapes and composites.

    Args:
        model: Any model; it runs once in eval mode, without gradients, and is left unchanged. A compiled model runs uncompiled.
        example_input: A batch the model takes, (n, ...).

    Raises:
        ValueError: the model applies no linear layer, does not take the input, or has weights without values.
        TypeError: the model is no module, or the input no tensor.
        NotImplementedError: the model's weights are complex or integers, and it does not take the input.
    """
    check_model(model)
    check_example(example_input)
    model = uncompiled(model)
    found: dict[tuple[Any, ...], LinearLayer] = {}
    keys: dict[int, tuple[Any, ...]] = {}  # of an application: the key of its layer
    for event in watched_pass(model, example_input):
        if isinstance(event, Application):
            keys[id(event)] = _add(found, event)
            continue
        for source in event.sources:
            if not isinstance(source.module, nn.Linear) or source.output.ndim == 2:
                _compose(found, keys[id(source)], event)
    if not found:
        raise nothing_found(model)
    return list(found.values())


def _add(found: dict[tuple[Any, ...], LinearLayer], event: Application) -> tuple[Any, ...]:
    """Add the layer of an application, unless it is there already; return its key."""
    shape, padding = norm_shape(event.module, event.in_shape), _output_padding(event)
    further = tuple(name for name in event.further if name != "output_size" or padding is None)
    if padding == getattr(event.module, "output_padding", None):
        padding = None
    key = id(event.module), shape, padding, further
    if key not in found:
        name = _next_name(found, event.name, event.module)
        found[key] = LinearLayer(name, event.module, shape, output_padding=padding, further_arguments=further)
    return key


def _compose(found: dict[tuple[Any, ...], LinearLayer], key: tuple[Any, ...], event: Normalisation) -> None:
    """Make a layer a composite; another composite of the same layer is a layer of its own."""
    layer = found[key]
    if layer.batchnorm is not None and layer.batchnorm is not event.module:
        key = (*key, id(event.module))
        layer = replace(layer, name=_next_name(found, layer.name.split("#")[0], layer.module))
    found[key] = replace(layer, batchnorm=event.module, batchnorm_name=event.name)


def _next_name(found: dict[tuple[Any, ...], LinearLayer], name: str, module: nn.Module) -> str:
    seen = sum(layer.module is module for layer in found.values())
    return f"{name}#{seen + 1}" if seen else name


def _output_padding(event: Application) -> Shape | None:
    """The output padding of a call with an ``output_size`` of a transposed convolution with torch's own forward pass."""
    module: Any = event.module
    plain = not is_overridden(module) and type(module).forward.__module__ == _ConvTransposeNd.__module__
    if not isinstance(module, _ConvTransposeNd) or "output_size" not in event.further or not plain:
        return None
    sizes: Any = zip(event.in_shape[1:], module.stride, module.padding, module.dilation, module.kernel_size, strict=True)
    least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in sizes]
    return tuple(m - n for m, n in zip(event.output.shape[-len(least) :], least, strict=True))


def spectral_norms(
    model: nn.Module, example_input: Tensor, failure_probability: float = 1e-9, *, composites: bool = True, rtol: float = 1e-2
) -> dict[str, NormInterval]:
    """An interval around the spectral norm of every linear layer, {layer name: interval}.

    Args:
        model: Any model.
        example_input: A batch the model takes, (n, ...).
        failure_probability: Probability that a layer's Lanczos bound fails; 0 for deterministic bounds only.
        composites: Whether to take a layer together with the batch normalisation that follows it.
        rtol: Relative width, upper / lower - 1, at which the Lanczos run of a layer stops; a smaller one costs more.

    Raises:
        ValueError: as `linear_layers` and `spectral_norm`.
        TypeError: as `linear_layers`.
        NotImplementedError: a layer is not affine, has gradients that are not derivatives, or is called with more arguments.
    """
    layers = linear_layers(model, example_input)
    norms = norm_intervals([layer.operator(composite=composites) for layer in layers], failure_probability, rtol=rtol)
    return {layer.name: norm for layer, norm in zip(layers, norms, strict=True)}


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that was given to ``torch.compile``, with the same weights; any other model is returned unchanged."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def example_for(model: nn.Module, example: Tensor) -> Tensor:
    """The example on the device of the model's weights, and in their type unless it consists of integers (indices)."""
    parameter = next(model.parameters())
    return example.to(parameter) if example.is_floating_point() else example.to(parameter.device)
