"""Changes of a program from outside: hooks, a replaced forward, other weights, a part in front, and outputs in containers.

A patch of a layer takes one convolution or dense layer of the program. The other patches take the whole program, and return it
or a module around it.
"""

import types
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from program_twists import Draft, Twist, square, step
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

PLACES = (
    "map",
    "flat",
    "any",
    "layer",
    "front",
    "weights",
    "output",
    "root",
    "everywhere",
)  # in the order in which a program has them


class ModelOutput(OrderedDict):
    """A dictionary whose entries are attributes as well, as the models of transformers return it."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


@dataclass
class Logits:
    """An output with one field."""

    logits: Tensor


class Named(NamedTuple):
    """An output with one named entry."""

    logits: Tensor


def tensor_of(output: Any) -> Tensor:
    """The only tensor of an output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Logits):
        return output.logits
    (tensor,) = output.values() if isinstance(output, dict) else output
    return tensor


def mapped(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """The output with a function applied to its tensor."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, dict):
        return type(output)({key: function(value) for key, value in output.items()})
    if isinstance(output, Logits):
        return Logits(**{field.name: function(getattr(output, field.name)) for field in fields(output)})
    return type(output)(*map(function, output)) if isinstance(output, Named) else type(output)(map(function, output))


class Around(nn.Module):
    """A module around a program, given by a function of both."""

    def __init__(self, function: Callable[..., Any], inner: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, inner

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def around(place: str, function: Callable[..., Any]) -> Twist:
    return Twist(place, lambda inner, draft: Around(function, inner))


def hooked(place: str, register: str, hook: Callable[..., Any], **options: Any) -> Twist:
    """A hook on a layer or on the program."""

    def make(module: nn.Module, draft: Draft) -> nn.Module:
        getattr(module, register)(hook, **options)
        return module

    return Twist(place, make)


def on_input(factor: float) -> Callable[..., Any]:
    return lambda module, args: (factor * args[0],)


def on_output(factor: float) -> Callable[..., Any]:
    return lambda module, args, output: mapped(lambda y: factor * y, output)


def hooks(place: str) -> list[Twist]:
    return [
        hooked(place, "register_forward_hook", on_output(20)),
        hooked(place, "register_forward_pre_hook", on_input(20)),
        hooked(place, "register_forward_hook", lambda module, args, output: mapped(lambda y: 10 * y.cumsum(1), output)),
        hooked(place, "register_forward_hook", lambda m, args, kwargs, y: on_output(15)(m, args, y), with_kwargs=True),
        hooked(place, "register_forward_pre_hook", lambda module, args: 20 * args[0]),
        hooked(place, "register_forward_hook", on_output(30), always_call=True),
    ]


ROOT_HOOKS, LAYER_HOOKS = hooks("root"), hooks("layer")


def on_all_modules(register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> Twist:
    """A hook on all modules, of which the program's are only some; it is registered while the program is in use."""

    def make(model: nn.Module, draft: Draft) -> nn.Module:
        draft.everywhere.append(lambda: register(hook, **options))
        return model

    return Twist("everywhere", make)


def on_layers(module: nn.Module, args: Any, output: Any = None) -> Any:
    """A hook that multiplies the input or the output of dense layers and convolutions."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        return tuple(5 * x for x in args) if output is None else -5 * output
    return None


def on_outermost(module: nn.Module, args: Any, output: Any) -> Any:
    """A hook that multiplies the output of modules with parts, whatever their class."""
    return mapped(lambda y: 4 * y, output) if next(module.children(), None) is not None else None


EVERYWHERE = [
    on_all_modules(register_module_forward_hook, on_output(1.5)),
    on_all_modules(register_module_forward_pre_hook, on_input(1.5)),
    on_all_modules(register_module_forward_hook, on_output(0.5)),
    on_all_modules(register_module_forward_pre_hook, lambda module, args: 0.5 * args[0]),
    on_all_modules(register_module_forward_hook, on_layers),
    on_all_modules(register_module_forward_pre_hook, on_layers),
    on_all_modules(register_module_forward_hook, on_outermost, always_call=True),
    on_all_modules(register_module_forward_hook, lambda m, args, kwargs, y: on_output(2)(m, args, y), with_kwargs=True),
    on_all_modules(register_module_forward_hook, lambda module, args, output: mapped(lambda y: 2 * y.flip(1), output)),
]


def low_rank(layer: nn.Module, draft: Draft) -> nn.Module:
    """A patch like LoRA: the layer plus 10 times a layer of its own type, added by the layer's own ``forward``."""
    original, other = layer.forward, deepcopy(layer)
    layer.forward = lambda x: original(x) + 10 * other(x.flip(1))
    return layer


def scaled_closure(module: nn.Module, draft: Draft) -> nn.Module:
    original, factor = module.forward, draft.draw.choice([-20, 15])

    def forward(*args: Any, **kwargs: Any) -> Any:
        return mapped(lambda y: factor * y, original(*args, **kwargs))

    module.forward = forward
    return module


def scaled_method(module: nn.Module, draft: Draft) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Any:
        return type(self).forward(self, 20 * x)

    module.forward = types.MethodType(forward, module)
    return module


def scaled_lambda(module: nn.Module, draft: Draft) -> nn.Module:
    module.forward = lambda x, original=module.forward: mapped(lambda y: 25 * y, original(x))
    return module


def method_of_another(layer: nn.Module, draft: Draft) -> nn.Module:
    """A layer that runs the ``forward`` of another layer, with larger weights."""
    other = deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(20)
    layer.forward = other.forward
    return layer


def called_otherwise(module: nn.Module, draft: Draft) -> nn.Module:
    """A program whose class overrides ``__call__``, which runs before ``forward`` does."""

    def call(self: nn.Module, x: Tensor) -> Any:
        return nn.Module.__call__(self, 20 * x)

    module.__class__ = type(type(module).__name__, (type(module),), {"__call__": call})
    return module


ROOT_FORWARDS = [Twist("root", f) for f in (scaled_closure, scaled_method, scaled_lambda, called_otherwise)]
LAYER_FORWARDS = [
    Twist("layer", f) for f in (low_rank, scaled_closure, scaled_method, scaled_lambda, method_of_another)
]  # fmt: skip


def with_scaled_weights(self: Any, x: Tensor) -> Any:
    weights = {name: 5 * weight for name, weight in self.inner.named_parameters()}
    return torch.func.functional_call(self.inner, weights, (x,))


def with_stored_weights(inner: nn.Module, draft: Draft) -> nn.Module:
    weights = {name: 4 * weight.detach() + 0.1 for name, weight in inner.named_parameters()}
    return Around(lambda self, x: torch.func.functional_call(self.inner, weights, (x,)), inner)


WEIGHTS = [
    around("weights", with_scaled_weights),
    Twist("weights", with_stored_weights),
    around("weights", lambda self, x: torch.func.functional_call(self.inner, dict(self.inner.named_parameters()), x)),
]

OUTPUTS = [
    around("output", lambda self, x: {"logits": self.inner(x)}),
    around("output", lambda self, x: ModelOutput(logits=self.inner(x))),
    around("output", lambda self, x: Logits(self.inner(x))),
    around("output", lambda self, x: (self.inner(x),)),
    around("output", lambda self, x: [self.inner(x)]),
    around("output", lambda self, x: Named(self.inner(x))),
]


def in_front(version: int, **options: Any) -> Twist:
    """Normalisation by torchvision, with a mean and a standard deviation for each channel."""

    def make(inner: nn.Module, draft: Draft) -> nn.Module:
        from torchvision.transforms import Normalize, v2

        channels = draft.shape[0]
        statistics = [draft.draw.uniform(0.2, 0.6) for _ in range(channels)], [draft.draw.choice([0.02, 0.1])] * channels
        return nn.Sequential((v2.Normalize if version == 2 else Normalize)(*statistics, **options), inner)

    return Twist("front", make)


NORMALISED = [in_front(2), in_front(2), in_front(1)]


def scripted(d: Draft) -> nn.Module:
    return torch.jit.script(nn.Sequential(square(d), nn.ReLU(), square(d)))


def recorded(d: Draft) -> nn.Module:
    return torch.jit.trace(nn.Sequential(square(d), nn.Tanh()).eval(), torch.zeros(2, d.size))


def eight_times(x: Tensor) -> Tensor:
    return 8 * torch.relu(x)


SCRIPTED = [
    step("flat", lambda self, x: 5 * self.part(x), part=scripted),
    step("flat", lambda self, x: 5 * self.part(x), part=recorded),
    step("any", lambda self, x: torch.jit.script(eight_times)(x)),
]
