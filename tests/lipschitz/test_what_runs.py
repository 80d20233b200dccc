"""The bound is of what runs: transforms, guards, hooks, replaced forwards and writes in place; else a refusal says why."""

import math
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision.transforms
from networks import Call, Scaled, bounded, sampled, seeded
from reference import gain, map_norm
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from torchvision.transforms import v2

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SHAPE = (3, 4, 4)


def dense(inputs: int = 6, outputs: int = 4) -> nn.Module:
    return nn.Linear(inputs, outputs)


def calling(function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> Callable[[], nn.Module]:
    """A network of a function and, besides the parts, one dense layer f."""
    return lambda: Call(function, f=dense(), **parts)


def behind(transform: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(transform, nn.Flatten(), dense(48))


def guarded(condition: Callable[[Tensor], bool]) -> Callable[[], nn.Module]:
    """Ten times a dense layer where a condition of the input holds, else the layer."""
    return calling(lambda m, x: 10 * m.f(x) if condition(x) else m.f(x))


def hooked(kind: str, hook: Callable[..., object], on: str = "") -> nn.Module:
    model = nn.Sequential(dense(), nn.Identity())
    getattr(model.get_submodule(on), kind)(hook)
    return model


def replaced(on: str) -> nn.Module:
    """A model of which one module has another forward than its class."""
    model = nn.Sequential(dense(), nn.Identity())
    module = model.get_submodule(on)
    before = module.forward
    module.forward = lambda x: 3 * before(x)  # type: ignore[method-assign]
    return model


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x - x.flip(1)


def into(write: Callable[[nn.Module, Tensor, Tensor], object], *size: int) -> Callable[[], nn.Module]:
    """The tensor of zeros that a function writes f(x) into."""

    def written(m: nn.Module, x: Tensor) -> Tensor:
        y = x.new_zeros(len(x), *size or (4,))
        write(m, y, m.f(x))
        return y

    return calling(written, i=torch.tensor([3, 0, 2, 1]), some=torch.tensor([1, 1, 0, 2]), rows=torch.tensor([[3, 0, 2, 1]]))


def put(y: Tensor, place: object, value: Tensor) -> None:
    y[place] = value  # type: ignore[index]


def added(y: Tensor, place: object, value: Tensor) -> None:
    y[place] += value  # type: ignore[index]


FOLLOWED = {
    "v2 Normalize": (behind(v2.Normalize(MEAN, STD)), SHAPE),
    "v1 Normalize": (behind(torchvision.transforms.Normalize(MEAN, STD)), SHAPE),
    "v2 Normalize of small deviations": (behind(v2.Normalize([0.5] * 3, [0.02] * 3)), SHAPE),
    "v2 Compose": (lambda: Call(lambda m, x: m.g(m.t(x)), g=nn.Sequential(nn.Flatten(), dense(48)),
                                t=v2.Compose([v2.Normalize(MEAN, STD), v2.Identity()])), SHAPE),
    "instance of a tensor": (guarded(lambda x: isinstance(x, Tensor)), (6,)),
    "is_tensor": (guarded(torch.is_tensor), (6,)),
    "has the attribute of a tensor": (guarded(lambda x: hasattr(x, "device")), (6,)),
    "type": (guarded(lambda x: x.is_floating_point() and x.dtype == torch.float64), (6,)),
    "number of axes": (guarded(lambda x: x.ndim == 2 and x.shape[1] == 6), (6,)),
    "forward hook on the model": (lambda: hooked("register_forward_hook", lambda m, a, y: 3 * y), (6,)),
    "forward pre-hook on the model": (lambda: hooked("register_forward_pre_hook", lambda m, a: 3 * a[0]), (6,)),
    "forward hook on a layer": (lambda: hooked("register_forward_hook", lambda m, a, y: 3 * y, "0"), (6,)),
    "forward pre-hook on a layer": (lambda: hooked("register_forward_pre_hook", lambda m, a: (3 * a[0],), "0"), (6,)),
    "replaced forward of the model": (lambda: replaced(""), (6,)),
    "replaced forward of a layer": (lambda: replaced("0"), (6,)),
    "slice of zeros": (into(lambda m, y, z: put(y, (slice(None), slice(0, 4)), z), 6), (6,)),
    "every second": (into(lambda m, y, z: put(y, (slice(None), slice(0, 8, 2)), z), 8), (6,)),
    "copy_": (into(lambda m, y, z: y.copy_(z)), (6,)),
    "copy_ into a part": (into(lambda m, y, z: y[:, 1:5].copy_(z), 6), (6,)),
    "add_": (into(lambda m, y, z: y.add_(z)), (6,)),
    "scatter_": (into(lambda m, y, z: y.scatter_(1, m.rows.expand(len(y), 4), z)), (6,)),
    "scatter_add_": (into(lambda m, y, z: y.scatter_add_(1, m.rows.expand(len(y), 4), z)), (6,)),
    "index_add_": (into(lambda m, y, z: y.index_add_(1, m.i, z)), (6,)),
    "index_copy_": (into(lambda m, y, z: y.index_copy_(1, m.i, z)), (6,)),
    "index_put_": (into(lambda m, y, z: put(y, (slice(None), m.i), z)), (6,)),
    "functional_call": (calling(lambda m, x: functional_call(m.f, {"weight": 2 * m.f.weight}, x)), (6,)),
    "gradient that is no derivative": (calling(lambda m, x: Scaled.apply(m.f(x), 3, -0.1)), (6,)),
    "detached": (calling(lambda m, x: m.f(x) + 2 * m.f(x.detach()).detach()), (6,)),
    "without gradients": (calling(torch.no_grad()(lambda m, x: 3 * m.f(x))), (6,)),
    "checkpoint": (calling(lambda m, x: torch.utils.checkpoint.checkpoint(m.f, x, use_reentrant=False)), (6,)),
    "partial": (calling(lambda m, x: partial(F.linear, weight=m.f.weight)(3 * x)), (6,)),
    "weights changed in forward": (calling(lambda m, x: F.linear(x, m.f.weight.T.contiguous().T.clone().mul_(3))), (6,)),
    "double in between": (calling(lambda m, x: m.f(x.double().mul(3)).double()), (6,)),
}  # fmt: skip


@pytest.mark.parametrize("build, shape", FOLLOWED.values(), ids=FOLLOWED)
def test_the_bound_of_a_linear_network_is_the_norm_of_what_runs(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = seeded(build)
    found, true = bounded(model, *shape), map_norm(model, shape)
    assert found.reason is None
    assert true * (1 - 1e-12) <= found.value <= true * 1.001


PIECES = {
    "elements one by one": (into(lambda m, y, z: [put(y, (..., i), z[:, i]) for i in range(4)]), (6,)),
    "add_ into a part": (into(lambda m, y, z: added(y, (slice(None), slice(1, 5)), z), 6), (6,)),
}


@pytest.mark.parametrize("build, shape", PIECES.values(), ids=PIECES)
def test_writes_that_count_apart_have_a_larger_bound_that_holds(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = seeded(build)
    assert map_norm(model, shape) <= bounded(model, *shape).value <= 2.001 * map_norm(model, shape)


def test_a_hook_on_all_modules_counts_once() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)))
    plain = bounded(model, 6).value
    hook = register_module_forward_hook(lambda module, args, out: 0.1 * out if isinstance(module, nn.Linear) else None)
    try:
        assert bounded(model, 6).value == pytest.approx(0.01 * plain, rel=1e-9)
    finally:
        hook.remove()


def test_a_replaced_forward_of_a_class_of_torch_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)))
    plain, forward = bounded(model, 6).value, nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 0.1 * forward(self, x))
    assert bounded(model, 6).value == pytest.approx(0.01 * plain, rel=1e-9)


def test_imagenet_constants_multiply_the_norm_of_a_dense_layer_as_its_jacobian_says() -> None:
    model = seeded(behind(v2.Normalize(MEAN, STD)))
    weight = model[2].weight.detach() / torch.tensor(STD, dtype=torch.float64).repeat_interleave(16)  # type: ignore[operator, union-attr]
    assert bounded(model, *SHAPE).value == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-6)


def repeated(m: nn.Module, x: Tensor) -> Tensor:
    y = x.new_zeros(len(x), 3)
    return y.scatter_add_(1, m.some.expand(len(x), 4), m.f(x))


SOUND = {
    "sums in one place": (calling(repeated, some=torch.tensor([[1, 1, 0, 2]])), (6,)),
    "sums of rows": (into(lambda m, y, z: y.index_add_(1, m.some, z), 3), (6,)),
    "the same place twice": (into(lambda m, y, z: put(y, (slice(None), m.some), z), 3), (6,)),
    "accumulated": (into(lambda m, y, z: y.index_put_((torch.arange(len(y))[:, None], m.some[None]), z, True), 3), (6,)),
    "written twice": (into(lambda m, y, z: [put(y, (..., slice(0, 3)), z[:, :3]), put(y, (..., slice(1, 4)), z[:, 1:])]), (6,)),
    "a part of itself": (calling(lambda m, x: m.f(x).add_(m.f(x).flip(1)).mul_(2)), (6,)),
    "in place through a view": (calling(lambda m, x: [y := m.f(x), y[:, :2].mul_(5), y.view(-1)[::4].add_(y[:, 1])][0]), (6,)),
    "Fourier layer": (calling(lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.w, n=6), w=torch.rand(4)), (6,)),
    "Fourier layer in two dimensions": 
        (calling(lambda m, x: torch.fft.ifft2(torch.fft.fft2(x) * m.w).real, w=torch.rand(4, 4)), (4, 4)),
    "absolute values of frequencies": (calling(lambda m, x: torch.fft.rfft(m.f(x)).abs()), (6,)),
    "Fourier neural operator": (calling(lambda m, x: torch.fft.irfft(torch.einsum("bix,iox->box", torch.fft.rfft(x), m.w), n=8),
                                        w=torch.randn(2, 3, 5, dtype=torch.complex128)), (2, 8)),
}  # fmt: skip


@pytest.mark.parametrize("build, shape", SOUND.values(), ids=SOUND)
def test_no_sampled_gain_exceeds_the_bound_of_what_runs(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = seeded(build)
    found = bounded(model, *shape)
    assert sampled(model, *shape) <= found.value * (1 + 1e-12)
    assert found.reason is None or "\n" not in found.reason


class Stateful(nn.Module):
    """A dense layer with a place for state, which a function of the module and its input changes."""

    def __init__(self, function: Callable[..., Tensor], state: object) -> None:
        super().__init__()
        self.f, self.function = dense(), function
        if isinstance(state, Tensor):
            self.register_buffer("state", state)
        else:
            self.state = state

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def counted(m: nn.Module, x: Tensor) -> Tensor:
    m.state += 1  # type: ignore[operator]
    return m.f(x) * m.state


def cached(m: nn.Module, x: Tensor) -> Tensor:
    if "factor" not in m.state:  # type: ignore[operator]
        m.state["factor"] = x.norm()  # type: ignore[index, operator]
    return m.f(x) * m.state["factor"]  # type: ignore[index, operator]


def noted(m: nn.Module, x: Tensor) -> Tensor:
    m.state.append(x.shape)  # type: ignore[union-attr, operator]
    return m.f(x) * len(m.state)  # type: ignore[arg-type]


def stateful(function: Callable[..., Tensor], state: Callable[[], object]) -> Callable[[], nn.Module]:
    return lambda: Stateful(function, state())


def global_hook() -> nn.Module:
    calls: list[int] = []
    return hooked("register_forward_hook", lambda m, a, y: [calls.append(1), y * len(calls)][1])


def own_buffer(m: nn.Module, x: Tensor) -> Tensor:
    m.state[: len(x)] = m.f(x)  # type: ignore[index]
    return 2 * m.state[: len(x)]  # type: ignore[index]


def branching(m: nn.Module, x: Tensor) -> Tensor:
    if m.f(x).sum() > 0:
        return m.f(x)
    return 10 * m.f(x)


def through_numpy(m: nn.Module, x: Tensor) -> Tensor:
    return torch.from_numpy(3 * m.f(x).detach().numpy())


def test_a_branch_that_torch_cannot_follow_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    bounded(seeded(calling(branching)), 6)
    assert capfd.readouterr() == ("", "")


class Raising(nn.Module):
    """A failure for values that have no numbers, in several lines."""

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            raise KeyError("missing\nkey")
        return x


REFUSED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "gradients on": (guarded(lambda x: torch.is_grad_enabled()), ["gradient"]),
    "input that requires gradients": (guarded(lambda x: x.requires_grad), ["gradient"]),
    "exactly the type of a tensor": (guarded(lambda x: type(x) is Tensor), ["is another than"]),
    "while compiling": (guarded(lambda x: torch.compiler.is_compiling()), ["is another than"]),
    "a single input": (guarded(lambda x: len(x) == 1), ["batch of 1"]),
    "more than two inputs": (guarded(lambda x: x.shape[0] > 2), ["batch of 3"]),
    "an odd number of inputs": (guarded(lambda x: x.size(0) % 2 == 1), ["batch"]),
    "an even number of inputs": (guarded(lambda x: x.size(0) % 2 == 0), ["batch"]),
    "many inputs": (guarded(lambda x: x.size(0) > 8), ["batch"]),
    "exactly two inputs": (guarded(lambda x: x.size(0) == 2), ["batch"]),
    "batch statistics": (lambda: nn.Sequential(dense(), nn.BatchNorm1d(4, track_running_stats=False)), ["batch"]),
    "the first of its batch": (calling(lambda m, x: m.f(x) * m.f(x)[:1].sigmoid()), ["batch"]),
    "active dropout": (calling(lambda m, x: F.dropout(m.f(x), 0.5, True)), ["random"]),
    "active dropout layer": (calling(lambda m, x: nn.Dropout().train()(m.f(x))), ["random"]),
    "uniform factors": (calling(lambda m, x: m.f(x) * torch.rand(4)), ["random"]),
    "noise": (calling(lambda m, x: m.f(x) + torch.randn_like(x[:, :4])), ["random"]),
    "noise of a generator": (calling(lambda m, x: m.f(x) * torch.empty(4).normal_()), ["random"]),
    "chance of Python": (calling(lambda m, x: m.f(x) * random.random()), ["chance"]),
    "chance of numpy": (calling(lambda m, x: m.f(x) * float(np.random.rand())), ["chance"]),
    "a counter": (stateful(counted, lambda: 0), ["state"]),
    "a counting buffer": (stateful(counted, lambda: torch.zeros(())), ["state"]),
    "a cache": (stateful(cached, dict), ["state"]),
    "a growing list": (stateful(noted, list), ["state"]),
    "a counter of a hook": (global_hook, ["state"]),
    "an own buffer": (stateful(own_buffer, lambda: torch.zeros(9, 4)), ["state"]),
    "an input written into": (calling(lambda m, x: m.f(x.mul_(3))), ["its input"]),
    "an input with a part written into": (calling(lambda m, x: [x[:, :2].zero_(), m.f(x)][1]), ["its input"]),
    "a branch on values": (calling(branching), ["test_what_runs.py, line", "`if m.f(x).sum() > 0:`", "torch.where"]),
    "a number read off values": (calling(lambda m, x: m.f(x) * x.max().item()), ["max"]),
    "a loop over values": (calling(lambda m, x: m.f(x) * sum(x[0].tolist())), [""]),
    "a comparison as output": (calling(lambda m, x: m.f(x) > 0), ["output"]),
    "a class as output": (calling(lambda m, x: m.f(x).argmax(1)), ["argmax"]),
    "a scripted part": (lambda: nn.Sequential(torch.jit.script(Scripted()), dense()), ["script"]),
    "data": (calling(lambda m, x: 3 * m.f(x).data), [".data"]),
    "numpy": (calling(through_numpy), ["numpy", "test_what_runs.py, line"]),
    "an error in several lines": (lambda: nn.Sequential(Raising(), dense()), ["KeyError"]),
    "no tensor": (calling(lambda m, x: 3.0), ["no tensor"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("build, words", REFUSED.values(), ids=REFUSED)
def test_a_model_that_is_no_function_of_one_input_is_refused_by_name(build: Callable[[], nn.Module], words: list[str]) -> None:
    found = bounded(seeded(build), 6)
    assert found.value == found.local == math.inf
    assert found.reason is not None and not [word for word in words if word not in found.reason]
    assert not [raw for raw in ("\n", "torch.fx", "fake tensor", "file an issue", "TORCH_LOGS") if raw in found.reason]


def test_a_refusal_names_the_state_that_changes() -> None:
    for function, state in ((counted, 0), (counted, torch.zeros(())), (cached, {}), (noted, [])):
        reason = bounded(Stateful(function, state).double(), 6).reason
        assert reason is not None and ".state" in reason


def test_a_gradient_that_is_no_derivative_does_not_lower_the_bound() -> None:
    model = seeded(FOLLOWED["gradient that is no derivative"][0])
    x, y = torch.randn(2, 8, 6, dtype=torch.float64)
    assert gain(model, x, y) <= bounded(model, 6).value
