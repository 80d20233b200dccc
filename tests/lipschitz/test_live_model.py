"""The live model after a bound is bitwise what it was, and its weights are read at the time of the question."""

import copy
import math
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Call
from reference import map_norm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrizations

import robust_spectral as rs

EXAMPLE = torch.zeros(2, 6)
GLOBAL = SimpleNamespace(seen=[], last=None)


def bits(value: Any) -> Any:
    """Contents of a value: identity, and the bits of tensors."""
    if isinstance(value, Tensor):
        grad = None if not value.is_leaf or value.grad is None else (id(value.grad), value.grad.clone().numpy().tobytes())
        return id(value), value.detach().clone().numpy().tobytes(), value.dtype, value.requires_grad, grad
    if isinstance(value, dict):
        return id(value), [(key, bits(part)) for key, part in value.items()]
    if isinstance(value, list | tuple | set | deque):
        return id(value), [bits(part) for part in value]
    return id(value)


def state(model: nn.Module) -> list[Any]:
    """All attributes of all modules, with the identity of values and the bits of tensors, and the random states."""
    return [
        [(name, {key: bits(value) for key, value in vars(module).items()}) for name, module in model.named_modules()],
        torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes(),
    ]  # fmt: skip


def asked(model: nn.Module, example: Any = EXAMPLE) -> rs.LipschitzBound | Exception:
    """The bound of a model, or the error that it ends with."""
    try:
        return rs.lipschitz_bound(model, example)
    except (ValueError, TypeError) as error:
        return error


def branching(m: nn.Module, x: Tensor) -> Tensor:
    return m.f(x) if x.sum() > 0 else -m.f(x)


def failing(m: nn.Module, x: Tensor) -> Tensor:
    m.f.weight.data.zero_()
    raise ValueError("no")


def trained() -> nn.Module:
    """A network in training mode with gradients, frozen parts, and one normalisation in eval mode."""
    parts = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 4), nn.BatchNorm1d(4)
    model = nn.Sequential(*parts).train()
    model(torch.randn(8, 6)).sum().backward()
    model[4].weight.requires_grad_(False)
    model[5].eval()
    return model


def noted(m: nn.Module, x: Tensor) -> Tensor:
    m.counts["calls"] = m.counts.get("calls", 0) + 1
    m.last = m.f(x)
    m.seen.append(m.last)
    return m.last


def noting() -> nn.Module:
    model = Call(noted, f=nn.Linear(6, 4))
    model.counts, model.seen, model.last = {}, [], None
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "finite": trained,
    "infinite": lambda: nn.Sequential(nn.Linear(6, 4), nn.Hardshrink()),
    "refused": lambda: Call(branching, f=nn.Linear(6, 4)),
    "raising": lambda: Call(failing, f=nn.Linear(6, 4)),
    "state": noting,
    "random": lambda: Call(lambda m, x: m.f(x) * torch.rand(4), f=nn.Linear(6, 4)),
    "chance of Python": lambda: Call(lambda m, x: m.f(x) * random.random() * np.random.rand(), f=nn.Linear(6, 4)),
    "written into": lambda: Call(lambda m, x: m.f(x.mul_(2)), f=nn.Linear(6, 4)),
    "weights written": lambda: Call(lambda m, x: [m.f.weight.data.mul_(2), m.f(x)][1], f=nn.Linear(6, 4)),
    "weight norm by hook": lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 4))),
    "spectral norm by hook": lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(6, 4))).train(),
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4))),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 4))).train(),
    "tied": lambda: nn.Sequential(tied := nn.Linear(6, 6), nn.ReLU(), tied),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_live_model_is_what_it_was_before_the_bound(build: Callable[[], nn.Module], called: bool) -> None:
    model = build()
    if called and build is not MODELS["raising"]:
        model(torch.randn(2, 6))
    before = state(model)
    asked(model)
    assert state(model) == before


def test_a_backward_pass_from_before_the_bound_still_runs_afterwards() -> None:
    for build in (trained, MODELS["spectral norm"], MODELS["weight norm"], MODELS["spectral norm by hook"]):
        model = build()
        out = model(torch.randn(3, 6)).square().sum()
        asked(model)
        out.backward()


class Recorder:
    """An object with state, whose methods are hooks."""

    shared: list[Tensor] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.last: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.seen.append(out)
        self.last = out

    @classmethod
    def share(cls, module: nn.Module, args: Any, out: Tensor) -> None:
        cls.shared.append(out)


class Slotted:
    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def hook(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.last = out


def recorders() -> dict[str, tuple[Callable[..., None], Callable[[], list[Any]]]]:
    """Hooks that keep what they see, each with what is kept."""
    GLOBAL.seen.clear()
    Recorder.shared.clear()
    local, one, bound_method, slotted, kept = [], Recorder(), Recorder(), Slotted(), {}  # type: ignore[var-annotated]

    def by_default(module: nn.Module, args: Any, out: Tensor, seen: list[Tensor] = []) -> None:  # noqa: B006
        seen.append(out)

    def into_global(module: nn.Module, args: Any, out: Tensor) -> None:
        GLOBAL.seen.append(out)
        GLOBAL.last = out

    return {
        "list": (lambda m, a, y: local.append(y), lambda: local),
        "dictionary": (lambda m, a, y: kept.update(last=y), lambda: list(kept.values())),
        "object": (one, lambda: [*one.seen, one.last]),
        "method": (bound_method.__call__, lambda: [*bound_method.seen, bound_method.last]),
        "class": (Recorder.share, lambda: Recorder.shared),
        "slots": (slotted.hook, lambda: [slotted.last]),
        "default argument": (by_default, lambda: by_default.__defaults__[0]),  # type: ignore[index]
        "global object": (into_global, lambda: [*GLOBAL.seen, GLOBAL.last]),
    }


TAILS = {"finite": nn.ReLU(), "infinite": nn.Hardshrink(), "refused": Call(branching, f=nn.Linear(4, 4))}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("name", recorders())
def test_no_value_without_numbers_is_left_with_what_a_hook_keeps(name: str, tail: nn.Module) -> None:
    hook, kept = recorders()[name]
    model = nn.Sequential(nn.Linear(6, 4), tail)
    model[0].register_forward_hook(hook)
    asked(model)
    assert not [value for value in kept() if isinstance(value, FakeTensor)]


class Cached(nn.Module):
    """A network with a table in a dictionary of its class, made in the first call."""

    tables: dict[Any, Tensor] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.tables["last"] = self.f(x)
        if x.dtype not in self.tables:
            self.tables[x.dtype] = torch.ones(4, dtype=x.dtype)
        return F.hardshrink(self.f(x) * self.tables[x.dtype])


def test_no_value_without_numbers_is_left_in_a_cache_of_the_class() -> None:
    asked(Cached())
    assert not [value for value in Cached.tables.values() if isinstance(value, FakeTensor)]


def matrix_norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def value(model: nn.Module) -> float:
    return rs.lipschitz_bound(model, EXAMPLE.to(next(model.parameters()).dtype)).value


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "copy_": lambda m: m[0].weight.data.copy_(torch.randn(4, 6)),
    "assigned state": lambda m: m.load_state_dict({"0.weight": 7 * torch.eye(6)[:4], "0.bias": torch.zeros(4)}, assign=True),
    "loaded state": lambda m: m.load_state_dict({"0.weight": 7 * torch.eye(6)[:4], "0.bias": torch.zeros(4)}),
    "double": lambda m: m.double(),
    "double and float": lambda m: m.double().float(),
    "data": lambda m: setattr(m[0].weight, "data", torch.randn(4, 6)),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(4, 6))),
    "module": lambda m: m.__setitem__(0, nn.Linear(6, 4)),
    "step": lambda m: [m(torch.randn(3, 6)).square().sum().backward(), torch.optim.SGD(m.parameters(), 1.0).step()],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_bound_follows_the_weights(change: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    assert value(model) == pytest.approx(matrix_norm(model[0].weight), rel=1e-9)
    change(model)
    assert value(model) == pytest.approx(matrix_norm(model[0].weight), rel=1e-9)


def test_weights_in_lists_and_dictionaries_of_python_are_read_when_asked() -> None:
    model = Call(lambda m, x: x @ m.weights[0] + m.offsets["b"])
    model.weights, model.offsets = [torch.randn(6, 4)], {"b": nn.Parameter(torch.randn(4))}
    for weight in (model.weights[0], 2 * torch.randn(6, 4), nn.Parameter(torch.randn(6, 4))):
        model.weights[0] = weight
        assert rs.lipschitz_bound(model, EXAMPLE).value == pytest.approx(matrix_norm(weight), rel=1e-9)


def test_tied_weights_count_in_every_place() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    assert value(model) == pytest.approx(matrix_norm(model[0].weight) ** 2, rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrap", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm, parametrizations.weight_norm,
                                  parametrizations.spectral_norm, parametrizations.orthogonal])  # fmt: skip
def test_a_layer_with_a_normed_weight_has_the_norm_that_it_runs_with(wrap: Callable[[nn.Module], nn.Module]) -> None:
    layer = wrap(nn.Linear(6, 4))
    for name, tensor in layer.named_parameters():
        tensor.data.mul_(3 if name.endswith(("_g", "original0")) else 1)
    model = nn.Sequential(layer).eval()
    true = map_norm(model, (6,), torch.float32)
    assert rs.lipschitz_bound(model, EXAMPLE).value == pytest.approx(true, rel=1e-5)


def test_a_model_is_bounded_inside_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(4, 3)))
    outside = rs.lipschitz_bound(model, EXAMPLE).value
    with torch.inference_mode():
        assert rs.lipschitz_bound(model, EXAMPLE).value == rs.lipschitz_bound(model, torch.rand(2, 6)).value == outside


def test_a_model_made_in_inference_mode_is_told_so() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
        with pytest.raises(ValueError, match=r"'0.weight' was made inside torch.inference_mode\(\)"):
            value(model)
    with pytest.raises(ValueError, match="make the model outside"):
        value(model)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["compile", "call", "part", "own", "function"])
def test_a_compiled_model_has_the_bound_of_the_model(form: str) -> None:
    plain = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    model: nn.Module = copy.deepcopy(plain)
    if form == "compile":
        model = torch.compile(model, backend="eager")
    elif form == "call":
        model.compile(backend="eager")
    elif form == "part":
        model[0] = torch.compile(model[0], backend="eager")  # type: ignore[operator]
    elif form == "own":
        model[0].compile(backend="eager")  # type: ignore[operator]
    else:
        model = Call(torch.compile(lambda m, x: m.f(x), backend="eager"), f=model)
    model(torch.randn(3, 6))
    assert rs.lipschitz_bound(model, EXAMPLE).value == pytest.approx(value(plain), rel=1e-12)


WRONG: dict[str, tuple[Callable[[], Any], Any, type[Exception]]] = {
    "model without values": (lambda: nn.Linear(6, 4, device="meta"), EXAMPLE, ValueError),
    "lazy model": (lambda: nn.LazyLinear(4), EXAMPLE, ValueError),
    "example without values": (lambda: nn.Linear(6, 4), torch.zeros(2, 6, device="meta"), ValueError),
    "numpy": (lambda: nn.Linear(6, 4), np.zeros((2, 6)), TypeError),
    "tuple": (lambda: nn.Linear(6, 4), (EXAMPLE,), TypeError),
    "dictionary": (lambda: nn.Linear(6, 4), {"x": EXAMPLE}, TypeError),
    "None": (lambda: nn.Linear(6, 4), None, TypeError),
    "empty": (lambda: nn.Linear(6, 4), torch.zeros(0, 6), ValueError),
    "single number": (lambda: nn.Linear(6, 4), torch.tensor(1.0), ValueError),
    "sparse": (lambda: nn.Linear(6, 4), EXAMPLE.to_sparse(), ValueError),
    "whole numbers": (lambda: nn.Linear(6, 4), EXAMPLE.int(), ValueError),
    "other type": (lambda: nn.Linear(6, 4), EXAMPLE.double(), ValueError),
    "other width": (lambda: nn.Linear(6, 4), torch.zeros(2, 5), ValueError),
    "function": (lambda: F.relu, EXAMPLE, TypeError),
    "division by zero": (lambda: Call(lambda m, x: 1 // 0), EXAMPLE, ValueError),
    "missing key": (lambda: Call(lambda m, x: {}["a"]), EXAMPLE, ValueError),
}


@pytest.mark.parametrize("build, example, kind", WRONG.values(), ids=WRONG)
def test_an_example_or_a_model_that_cannot_be_used_is_told_in_one_sentence(
    build: Callable[[], Any], example: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=r"^lipschitz_bound: [^\n]{20,300}$"):
        rs.lipschitz_bound(build(), example)


def test_an_example_that_requires_gradients_gets_none() -> None:
    example = torch.zeros(2, 6, requires_grad=True)
    assert math.isfinite(rs.lipschitz_bound(nn.Sequential(nn.Linear(6, 4)), example).value) and example.grad is None
