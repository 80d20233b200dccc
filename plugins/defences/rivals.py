"""Rival defences that bound or lower spectral norms, each as published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from robust_spectral import linear_layers
from robust_spectral.clipping import TrackedLayer, Transform, by_entries, cut, kernel_map
from robust_spectral.layers import LinearLayer
from robust_spectral.operators import batchnorm_scale, is_batchnorm

from .base import NoDefence


class _Parametrised(NoDefence):
    """A defence that parametrises weights."""

    def finish(self, model: nn.Module) -> None:
        """Replace every parametrisation by the value of its weight in eval mode."""
        model.eval()
        for module in [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


class _OnLayers(NoDefence):
    """A defence that acts on all linear layers."""

    def prepare(self, model: nn.Module, example_input: Tensor) -> None:
        """Find the linear layers."""
        self.layers = linear_layers(model, example_input)


class Miyato(_Parametrised):
    """torch's spectral normalisation: a weight, reshaped to a matrix, over a running estimate of its norm, times ``max_norm``.

    Source: Miyato et al. (2018), Spectral normalization for generative adversarial networks.
    """

    def prepare(self, model: nn.Module, example_input: Tensor) -> None:
        """Parametrise every convolution and dense layer.

        Raises:
            ValueError: a layer's weight is zero, as in a zero-initialised residual branch, and so is the norm to divide by.
        """
        for module, name in _modules(model, example_input).items():
            if not bool(module.weight.any()):  # type: ignore[operator]
                raise ValueError(f"Miyato: the weight of '{name}' is zero and cannot be divided by its norm; train it first")
            parametrizations.spectral_norm(module)
            parametrize.register_parametrization(module, "weight", _Times(self.max_norm))


class Gouk(NoDefence):
    """Divide each weight by its norm over ``max_norm`` after every step, if that is above 1; batch normalisations likewise.

    The norm is the operator's, estimated by one power iteration after every step.

    Source: Gouk et al. (2021), Regularisation of neural networks by enforcing Lipschitz continuity.
    """

    def prepare(self, model: nn.Module, example_input: Tensor) -> None:
        """Find the layers and the batch normalisations."""
        layers = linear_layers(model, example_input)
        self.tracked = [TrackedLayer.of(layer, vectors=1, composite=False, seed=i) for i, layer in enumerate(layers)]
        self.normalisations: list[Any] = [m for m in model.modules() if is_batchnorm(m) and m.weight is not None]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide after every step of the optimizer."""
        optimizer.register_step_post_hook(lambda *_: self.step())

    @torch.no_grad()
    def step(self) -> None:
        """Do one power iteration and one division for every layer, without waiting for a device."""
        for tracked in self.tracked:
            for _ in range(2):  # a call is half an iteration
                norm = tracked.power_step().max()
            weight: Any = tracked.layer.module.weight
            weight.div_((norm / self.max_norm).clamp_min(1))
        for module in self.normalisations:
            module.weight.div_((batchnorm_scale(module).abs().max() / self.max_norm).clamp_min(1))

    def state(self) -> dict[str, Any]:
        """The vectors of the power iterations."""
        return {"vectors": [tracked.vectors for tracked in self.tracked]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue with saved vectors."""
        for tracked, vectors in zip(self.tracked, state["vectors"], strict=True):
            tracked.vectors = vectors.to(tracked.vectors)


class Delattre(_OnLayers):
    """A penalty on norms above ``max_norm``, with bounds from Gram iterations on the Fourier symbols of circular convolutions.

    Args:
        max_norm: The norm above which a layer is penalised.
        strength: Factor of the sum of the norms' excesses over ``max_norm``.
        iterations: Squarings of each Gram matrix.

    Source: Delattre et al. (2023), Efficient bound of Lipschitz constant for convolutional layers by Gram iteration.
    """

    def __init__(self, max_norm: float = 1.0, strength: float = 0.1, iterations: int = 5) -> None:
        super().__init__(max_norm)
        self.strength, self.iterations = strength, iterations

    def penalty(self) -> Tensor | float:
        """The strength times the sum of the norms' excesses over ``max_norm``."""
        above = [(gram_bound(layer, self.iterations) - self.max_norm).clamp_min(0) for layer in self.layers]
        return self.strength * torch.stack(above).sum()


class Senderovich(_OnLayers):
    """Clip the singular values of the Fourier symbols at regular steps, and cut the kernel back to its window.

    The cut raises some singular values again, so that the norm comes near ``max_norm`` and seldom below.

    Args:
        max_norm: The value that singular values are clipped to.
        every: Optimizer steps from one clip to the next.

    Source: Sedghi, Gupta and Long (2019), The singular values of convolutional layers; Senderovich et al. (2022), Towards
    practical control of singular values of convolutional layers, which splits strided convolutions into phases.
    """

    def __init__(self, max_norm: float = 1.0, every: int = 50) -> None:
        super().__init__(max_norm)
        self.every, self.steps = every, 0

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip after every ``every``-th step of the optimizer."""
        optimizer.register_step_post_hook(lambda *_: self.step())

    def step(self) -> None:
        """Count a step, and clip if their number is a multiple of ``every``."""
        self.steps += 1
        if self.steps % self.every == 0:
            for layer in self.layers:
                clip_symbols_(layer, self.max_norm)

    def finish(self, model: nn.Module) -> None:
        """Clip once more."""
        for layer in self.layers:
            clip_symbols_(replace(layer, module=model.get_submodule(layer.name.partition("#")[0])), self.max_norm)

    def state(self) -> dict[str, Any]:
        """The number of steps."""
        return {"steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved number of steps."""
        self.steps = int(state["steps"])


class Bjorck(_Parametrised):
    """Dense layers orthogonalised: torch's spectral normalisation to norm 1, then Björck iterations of deel-torchlip.

    Convolutions are not changed, and ``max_norm`` must be 1. Needs the package deel-torchlip.

    Source: Anil, Lucas and Grosse (2019), Sorting out Lipschitz function approximation.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        super().__init__(max_norm)
        if max_norm != 1:
            raise ValueError(f"Bjorck(max_norm={max_norm}): orthogonal matrices have a norm of 1; give 1")

    def prepare(self, model: nn.Module, example_input: Tensor) -> None:
        """Parametrise every dense layer.

        Raises:
            ValueError: deel-torchlip is not installed, or the model has no dense layer.
        """
        try:
            from deel.torchlip.utils import bjorck_norm
        except ImportError as error:
            raise ValueError(f"Bjorck: needs the package deel-torchlip ({error})") from error
        dense = [module for module in _modules(model, example_input) if isinstance(module, nn.Linear)]
        if not dense:
            raise ValueError(f"Bjorck: {type(model).__name__} has no dense layer")
        for module in dense:
            parametrizations.spectral_norm(module)
            bjorck_norm(module)


def gram_bound(layer: LinearLayer, iterations: int) -> Tensor:
    """A differentiable upper bound of a layer's norm with circular padding, a scalar.

    With G_0 a symbol and G_{t+1} = G_t* G_t the norm is at most ‖G_t‖_F^(2^-t), the Schatten norm of G_0 of order 2^(t+1),
    which decreases to the spectral norm. The matrices are divided by their Frobenius norms, so that none overflows.
    """
    kernel = _kernel_of(layer)(layer.module.weight)  # type: ignore[arg-type]
    groups, axes = int(getattr(layer.module, "groups", 1)), tuple(range(2, kernel.ndim))
    symbols = torch.fft.rfftn(kernel, s=_grid(layer, kernel), dim=axes) if axes else kernel
    matrices = symbols.reshape(groups, len(kernel) // groups, kernel.shape[1], -1).movedim(-1, 0).flatten(0, 1)
    logarithm: Tensor | float = 0.0
    for step in range(iterations + 1):
        size = matrices.flatten(1).norm(dim=1).clamp_min(torch.finfo(kernel.dtype).tiny)
        logarithm = logarithm + size.log() / 2**step
        matrices = matrices / size[:, None, None]
        matrices = matrices.mH @ matrices if matrices.shape[1] > matrices.shape[2] else matrices @ matrices.mH
    assert isinstance(logarithm, Tensor)
    return logarithm.max().exp()


@torch.no_grad()
def clip_symbols_(layer: LinearLayer, max_norm: float) -> None:
    """Clip the singular values of a layer's Fourier symbols on its own grid, and cut the kernel to its window, in place."""
    weight: Any = layer.module.weight
    kernel, pull = torch.func.vjp(_kernel_of(layer), weight.detach().double())[:2]
    grid = _grid(layer, kernel)
    transform = Transform.of(kernel.shape[2:], [1] * len(grid), grid, kernel.device)
    symbols = transform.symbols(by_entries(kernel, int(getattr(layer.module, "groups", 1))))
    excess = transform.kernel(cut(symbols, max_norm / transform.places**0.5)[0])
    weight.sub_(pull(excess.movedim(0, -1).reshape(kernel.shape))[0].to(weight))


def _kernel_of(layer: LinearLayer) -> Callable[[Tensor], Tensor]:
    to_kernel = kernel_map(layer, False)
    if to_kernel is None:
        raise NotImplementedError(f"layer '{layer.name}' ({type(layer.module).__name__}): its kernel is unknown; use fastclip")
    return to_kernel


def _grid(layer: LinearLayer, kernel: Tensor) -> list[int]:
    """Grid points along each axis for the phases of a convolution, no fewer than its window has."""
    module: Any = layer.module
    sizes = zip(kernel.shape[2:], layer.in_shape[1:], getattr(module, "stride", (1,) * (kernel.ndim - 2)), strict=False)
    return [max(window, ceil(size / stride)) for window, size, stride in sizes] or [1] * (kernel.ndim - 2)


def _modules(model: nn.Module, example_input: Tensor) -> dict[nn.Module, str]:
    """The modules of the linear layers, each once, with their names."""
    return {layer.module: layer.name.partition("#")[0] for layer in linear_layers(model, example_input)}


class _Times(nn.Module):
    """A parametrisation: a weight times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight
