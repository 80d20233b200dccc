"""Which linear layers a model applies, found by watching one forward pass.

Names and shapes come from the pass itself, and so do composites: a batch normalisation belongs to the convolution or dense
layer whose output tensor it was given, whatever either is called. Of a batch normalisation that ends in an activation (timm)
the affine part belongs to the composite.
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
    """One linear layer of a model as it was applied.

    Attributes:
        name: Its name in the model; "#2", "#3", … is added where one module is applied to inputs of several shapes.
        module: The convolution or dense layer.
        in_shape: Shape of its input, without the batch axis; of one position where all positions are alike (dense layers,
            pointwise convolutions).
        batchnorm: The batch normalisation that takes its output, if any.
        batchnorm_name: That module's name in the model.
    """

    name: str
    module: nn.Module
    in_shape: Shape
    batchnorm: nn.Module | None = None
    batchnorm_name: str | None = None

    @property
    def kind(self) -> str:
        """ "conv" or "dense", with "+bn" where a batch normalisation follows."""
        return ("dense" if isinstance(self.module, nn.Linear) else "conv") + ("+bn" if self.batchnorm is not None else "")

    def operator(self, *, composite: bool = True, dtype: torch.dtype | None = None) -> LinearOperator:
        """The layer's operator, with its batch normalisation in eval mode where there is one and ``composite`` is set.

        Args:
            composite: Whether the batch normalisation behind the layer is part of it.
            dtype: Type to compute in; default that of the weights, half precision being raised to float32.

        Raises:
            NotImplementedError: the layer is not affine.
        """
        if composite and self.batchnorm is not None:
            return convolution_then_batchnorm(self.module, self.batchnorm, self.in_shape, dtype)
        return linear_operator(self.module, self.in_shape, dtype)


def linear_layers(model: nn.Module, example_input: Tensor) -> list[LinearLayer]:
    """The convolutions and dense layers a forward pass applies, in order, with their input shapes and composites.

    Args:
        model: Any model; it runs once in eval mode, without gradients, and is left as it was. A compiled one runs as written.
        example_input: A batch the model takes, (n, ...).

    Raises:
        ValueError: the model applies no linear layer, or does not take the input.
        TypeError: the input is no tensor.
    """
    if not isinstance(example_input, Tensor):
        raise TypeError(f"linear_layers: takes a batch that the model takes, a tensor; got {type(example_input).__name__}")
    model = uncompiled(model)
    found: dict[tuple[Any, ...], LinearLayer] = {}
    outputs: list[tuple[Tensor, int, tuple[Any, ...]]] = []  # keeps the tensors alive, so that identity means something

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
                if layer.batchnorm is not None and layer.batchnorm is not module:  # one more composite of the same layer
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
        failure_probability: Of each layer's upper bound; 0 for deterministic bounds only.
        composites: Whether a layer is taken together with the batch normalisation behind it.
        rtol: Width upper / lower - 1 asked of the intervals; closer ones cost more.

    Raises:
        ValueError: as `linear_layers` and `spectral_norm`.
        NotImplementedError: a layer is not affine.
    """
    layers = linear_layers(model, example_input)
    norms = norm_intervals([layer.operator(composite=composites) for layer in layers], failure_probability, rtol=rtol)
    return {layer.name: norm for layer, norm in zip(layers, norms, strict=True)}


def uncompiled(model: nn.Module) -> nn.Module:
    """The model as it was written, which a compiled one holds with the same weights."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def example_for(model: nn.Module, example: Tensor) -> Tensor:
    """An example where the model's weights are, and of their type unless it holds indices."""
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
