"""One forward pass of a model, watched: the linear layers it applies, and the batch normalisations that take their outputs.

The pass runs in eval mode, uncompiled and without gradients. An error in it is told by the layer that did not take its input.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..operators import Shape, evaluating, full_precision_no_grad, is_standard_batchnorm, running_eagerly
from .refusals import Entered, refusal


@dataclass(frozen=True)
class Application:
    """One application of a linear layer.

    Attributes:
        name: Name of the layer in the model.
        module: The layer.
        in_shape: Shape of one input, without the batch axis.
        output: The layer's output, with hooks applied; a reference to it keeps its identity alive.
        version: How often the output had been changed in place.
        further: The arguments of the call besides the input, by name, if they are not None.
    """

    name: str
    module: nn.Module
    in_shape: Shape
    output: Any
    version: int
    further: dict[str, Any]


@dataclass(frozen=True)
class Normalisation:
    """One application of a batch normalisation to the outputs of earlier applications of linear layers."""

    name: str
    module: nn.Module
    sources: list[Application]


@dataclass
class ForwardPass:
    """The events of a forward pass in their order, and the linear layer that is running, if any."""

    events: list[Application | Normalisation] = field(default_factory=list)
    entered: Entered | None = None

    def enter(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Note that a linear layer is called."""
        X, _ = input_and_further(module, args, kwargs)
        self.entered = Entered(name, module, X, shape_of_one(module, X)) if isinstance(X, Tensor) else None

    def leave(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        """Note that a linear layer has been applied."""
        self.entered = None
        X, further = input_and_further(module, args, kwargs)
        if isinstance(X, Tensor):
            version = output._version if isinstance(output, Tensor) else 0
            self.events.append(Application(name, module, shape_of_one(module, X), output, version, further))

    def normalise(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Note that a batch normalisation is called."""
        X, _ = input_and_further(module, args, kwargs)
        linear = [event for event in self.events if isinstance(event, Application)]
        taken = [event for event in linear if event.output is X and X._version == event.version]
        self.events.append(Normalisation(name, module, taken))


def watched_pass(model: nn.Module, example_input: Tensor) -> list[Application | Normalisation]:
    """Run a model once and return what happened; the model is left unchanged.

    Raises:
        ValueError: the model does not take the input, or its weights have no values.
        NotImplementedError: its weights are complex or integers.
    """
    seen = ForwardPass()
    try:
        with full_precision_no_grad(), evaluating(model), running_eagerly(), _watching(model, seen):
            model(example_input.clone() if example_input.is_inference() else example_input)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        raise refusal(model, example_input, seen.entered, error) from error
    return seen.events


def input_and_further(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The first tensor among the arguments of a call, and the other arguments by name, without those that are None."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    names += [f"argument {place + 1}" for place in range(len(names), len(args))]
    named = dict(zip(names, args, strict=False)) | kwargs
    first = next((name for name in [*names, *kwargs] if isinstance(named.get(name), Tensor)), "")
    return named.get(first), {name: value for name, value in named.items() if name != first and value is not None}


def shape_of_one(module: nn.Module, X: Tensor) -> Shape:
    """The shape of an input without its batch axis, which a layer may be called without."""
    unbatched = len(module.kernel_size) + 1 if isinstance(module, _ConvNd) else 1
    return tuple(X.shape if X.ndim == unbatched else X.shape[1:])


@contextmanager
def _watching(model: nn.Module, seen: ForwardPass) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd):
            enter = lambda m, a, k, name=name: seen.enter(name, m, a, k)  # noqa: E731
            leave = lambda m, a, k, o, name=name: seen.leave(name, m, a, k, o)  # noqa: E731
            handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, with_kwargs=True),
            ]
        elif is_standard_batchnorm(module):
            normalise = lambda m, a, k, name=name: seen.normalise(name, m, a, k)  # noqa: E731
            handles.append(module.register_forward_pre_hook(normalise, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
