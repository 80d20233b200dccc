"""The linear layers that a model applies, found during one forward pass.

Shapes and composites come from the pass itself. A composite is a convolution or dense layer together with the batch
normalisation that takes its output tensor, whatever their names. If the batch normalisation includes an activation (timm), only
its affine part belongs to the composite.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..norms import NormInterval, norm_intervals
from ..operators import LinearOperator, Shape, convolution_then_batchnorm, evaluating, is_batchnorm, linear_operator, norm_shape


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer of a model, as applied in a forward pass.

    Attributes:
        name: Name of the layer in the model. "#2", "#3", … is added where one module is applied to inputs of several shapes or
            followed by several batch normalisations.
        module: The convolution or dense layer.
        in_shape: Shape of the input, without the batch axis; of a single position where all positions are treated alike
            (dense layers, pointwise convolutions).
        batchnorm: The batch normalisation that takes the layer's output, or None.
        batchnorm_name: Name of the batch normalisation in the model.
    """

    name: str
    module: nn.Module
    in_shape: Shape
    batchnorm: nn.Module | None = None
    batchnorm_name: str | None = None

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
            NotImplementedError: the layer is not affine.
        """
        if composite and self.batchnorm is not None:
            return convolution_then_batchnorm(self.module, self.batchnorm, self.in_shape, dtype)
        return linear_operator(self.module, self.in_shape, dtype)


def linear_layers(model: nn.Module, example_input: Tensor) -> list[LinearLayer]:
    """The convolutions and dense layers that a forward pass applies, in order, with their input shapes and composites.

    Args:
        model: Any model; it runs once in eval mode, without gradients, and is left unchanged. A compiled model runs uncompiled.
        example_input: A batch the model takes, (n, ...).

    Raises:
        ValueError: the model applies no linear layer, or does not take the input.
        TypeError: the input is not a tensor.
    """
    if not isinstance(example_input, Tensor):
        raise TypeError(
            f"linear_layers: example_input must be a batch that the model takes, a tensor; got {type(example_input).__name__}"
        )
    model = uncompiled(model)
    found: dict[tuple[Any, ...], LinearLayer] = {}
    outputs: list[tuple[Tensor, int, tuple[Any, ...]]] = []  # references keep the tensors, and so their identities, alive

    def see_linear(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        shape = norm_shape(module, inputs[0].shape[1:])
        key = id(module), shape
        if key not in found:
            seen = sum(layer.module is module for layer in found.values())
            found[key] = LinearLayer(name if not seen else f"{name}#{seen + 1}", module, shape)
        if not isinstance(module, nn.Linear) or output.ndim == 2:
            outputs.append((output, output._version, key))

    def see_batchnorm(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for output, version, key in outputs:
            if output is inputs[0] and output._version == version:
                layer = found[key]
                if layer.batchnorm is not None and layer.batchnorm is not module:  # another composite of the layer
                    seen = sum(other.module is layer.module for other in found.values())
                    key = (*key, id(module))
                    layer = LinearLayer(f"{layer.name.split('#')[0]}#{seen + 1}", layer.module, layer.in_shape)
                found[key] = LinearLayer(layer.name, layer.module, layer.in_shape, module, name)

    with evaluating(model), _watching(model, see_linear, see_batchnorm), torch.no_grad():
        try:
            model(example_input)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shape = tuple(example_input.shape)
            raise ValueError(
                f"linear_layers: {type(model).__name__} does not take a batch (n, ...) of shape {shape}: {error}"
            ) from error
    if not found:
        raise ValueError(f"linear_layers: {type(model).__name__} applies no convolution and no dense layer")
    return list(found.values())


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
        NotImplementedError: a layer is not affine.
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


@contextmanager
def _watching(model: nn.Module, see_linear: Any, see_batchnorm: Any) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd):
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: see_linear(name, m, i, o)))
        elif is_batchnorm(module):
            handles.append(module.register_forward_pre_hook(lambda m, i, name=name: see_batchnorm(name, m, i)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
