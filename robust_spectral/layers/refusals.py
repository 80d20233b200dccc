"""Errors of a model's forward pass in words: what came, at which layer, and what to give instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..operators import Shape, check_floating, check_present, check_real, misfit


@dataclass(frozen=True)
class Entered:
    """A linear layer at the moment of its call: its name and module, its input, and the shape of one input."""

    name: str
    module: nn.Module
    input: Tensor
    in_shape: Shape


def refusal(model: nn.Module, example: Tensor, entered: Entered | None, error: Exception) -> Exception:
    """The error to raise for a model that failed on an example, in or outside of a linear layer.

    Returns:
        A ValueError for an input that does not fit or weights without values, a NotImplementedError for weights that are
        complex or integers.
    """
    try:
        _check_weights(model, example, entered)
    except (ValueError, NotImplementedError) as found:
        return found
    kind, shape = type(model).__name__, tuple(example.shape)
    why = _other_kind(model, example, entered) or (_misfit(entered) if entered else None) or _in_its_words(error)
    return ValueError(f"linear_layers: {kind} does not take a batch (n, ...) of shape {shape}: {why}")


def nothing_found(model: nn.Module) -> ValueError:
    """The error for a model that applies no linear layer, which names the kinds of modules that it consists of."""
    quantised = [(name, type(part).__name__) for name, part in model.named_modules() if ".quantized" in type(part).__module__]
    if quantised:
        return ValueError(
            f"linear_layers: {type(model).__name__} applies quantised layers, such as '{quantised[0][0]}' ({quantised[0][1]}), "
            "which are not covered; give the model before its quantisation"
        )
    leaves = {type(part).__name__: name for name, part in model.named_modules() if not list(part.children())}
    listed = ", ".join(f"{kind} ('{name}')" if name else kind for kind, name in list(leaves.items())[:6])
    rest = ", …" if len(leaves) > 6 else ""
    return ValueError(
        f"linear_layers: {type(model).__name__} applies no convolution and no dense layer of torch.nn as a module; "
        f"it consists of {listed}{rest}"
    )


def check_example(example_input: object) -> None:
    """Check that an example is a tensor.

    Raises:
        TypeError: it is not.
    """
    if isinstance(example_input, Tensor):
        return
    advice = "give torch.as_tensor(...) of it" if hasattr(example_input, "__array__") else (
        "a model of several inputs has to be wrapped in a module that takes one tensor"
    )  # fmt: skip
    raise TypeError(
        "linear_layers: example_input must be a batch that the model takes, a tensor; "
        f"got {type(example_input).__name__}; {advice}"
    )


def check_model(model: object) -> None:
    """Check that a model is a module.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"linear_layers: model must be an nn.Module; got {type(model).__name__}")


def _check_weights(model: nn.Module, example: Tensor, entered: Entered | None) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        where = f"linear_layers: '{name}' of {type(model).__name__}"
        if not example.is_meta:
            check_present(where, tensor)
    weight = getattr(entered.module, "weight", None) if entered else None
    if entered and isinstance(weight, Tensor):
        where = f"linear_layers: the weight of '{entered.name}' ({type(entered.module).__name__})"
        check_real(where, weight)
        check_floating(where, weight)


def _other_kind(model: nn.Module, example: Tensor, entered: Entered | None) -> str | None:
    """A difference in device or type between the example and the weights, if there is one."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if weights and example.device not in {p.device for p in weights}:
        return f"it is on {example.device} and the weights are on {weights[0].device}; move one of them"
    came = entered.input.dtype if entered else example.dtype
    wanted: Any = getattr(entered.module, "weight", None) if entered else next(iter(weights), None)
    if not isinstance(wanted, Tensor) or came == wanted.dtype or not (entered or came.is_floating_point):
        return None
    where = f"reaches '{entered.name}' ({type(entered.module).__name__}) as" if entered else "is"
    return f"it {where} {came} and the weights are {wanted.dtype}; give example_input.to({wanted.dtype}) or convert the model"


def _misfit(entered: Entered) -> str | None:
    why = misfit(entered.module, entered.in_shape)
    return None if why is None else f"'{entered.name}', {entered.module}, gets {tuple(entered.input.shape)} and {why}"


def _in_its_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
