"""Random programs: no sampled gain exceeds a bound, a refusal has a reason, and nothing else is raised."""

import math
import random
from collections.abc import Callable

import pytest
import torch
from generated_programs import KINDS, Program, program
from networks import Call
from program_gains import check, judge
from program_patches import tensor_of
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

import robust_spectral as rs

MISSED = {  # programs of one kind each, of which a graph by symbolic tracing with torch.fx has a bound below a gain
    "write into a fresh tensor": 245, "write into a buffer": 36, "Fourier transform": 3, "tensor guard": 39,
    "branch on the batch size": 76, "branch on the gradient mode": 7, "normalisation in front": 204, "hook on the model": 208,
    "forward of the model": 559, "forward of a layer": 203,
}  # fmt: skip


def assert_sound(seed: int, kind: str | None = None) -> list[str]:
    verdict = check(seed, kind)
    assert verdict.result in ("finite", "refused"), verdict
    return verdict.kinds


@pytest.mark.parametrize("kind", MISSED)
def test_no_sampled_gain_exceeds_the_bound_of_a_program_with_another_symbolic_trace(kind: str) -> None:
    assert assert_sound(MISSED[kind], kind) == [kind]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(KINDS), 3 * len(KINDS)))
def test_no_sampled_gain_exceeds_the_bound_of_a_random_program(seed: int) -> None:
    assert_sound(seed)


@pytest.mark.parametrize("seed", [1, 8, 14, 25])
def test_a_hook_on_all_modules_is_part_of_a_program_only_while_it_is_in_use(seed: int) -> None:
    made = program(random.Random(seed), "hook on all modules")
    plain = tensor_of(made.model(x := made.example()))
    with made.hooked():
        assert not torch.equal(tensor_of(made.model(x)), plain)
    assert torch.equal(tensor_of(made.model(x)), plain)
    assert assert_sound(seed, "hook on all modules") == ["hook on all modules"]
    assert not _global_forward_hooks and not _global_forward_pre_hooks


def linear() -> tuple[nn.Linear, float]:
    layer = nn.Linear(6, 4).double()
    return layer, float(torch.linalg.matrix_norm(layer.weight.detach(), 2))


def judged(model: nn.Module, bound: float) -> str:
    made = Program(model.double().eval(), (6,), torch.float64, [], 0.0)
    return judge(made, rs.LipschitzBound(bound, local=bound))[0]


def test_the_check_finds_a_bound_one_in_ten_thousand_too_small() -> None:
    layer, norm = linear()
    assert judged(layer, norm * 0.9999) == "unsound"
    assert judged(layer, norm * 1.000001) == "finite"


DISTURBED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "in batches of one": lambda self, x: 9 * self.fc(x) if len(x) == 1 else self.fc(x),
    "in batches of seven": lambda self, x: 9 * self.fc(x) if len(x) == 7 else self.fc(x),
    "with gradients": lambda self, x: 9 * self.fc(x) if torch.is_grad_enabled() else self.fc(x),
    "for an input with gradient": lambda self, x: 9 * self.fc(x) if x.requires_grad else self.fc(x),
    "beside other inputs": lambda self, x: self.fc(x + 1e-3 * x.mean(0)),
    "in the next call": lambda self, x: self.fc(x) + 1e-6 * torch.rand(len(x), 1),
    "across a step": lambda self, x: self.fc(x) + (x[:, :1] > 0.5),
}


@pytest.mark.parametrize("function", DISTURBED.values(), ids=DISTURBED)
def test_the_check_finds_a_change(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    layer, norm = linear()
    assert judged(Call(function, fc=layer), 1.01 * norm) == "unsound"


def test_a_bound_needs_a_reason_where_it_is_infinite() -> None:
    assert judged(linear()[0], math.inf) == "raised"


@pytest.mark.parametrize("kind", MISSED)
def test_a_program_is_the_same_for_the_same_seed(kind: str) -> None:
    first, second = (program(random.Random(5), kind) for _ in range(2))
    x = first.example()
    assert (first.shape, first.dtype, first.kinds) == (second.shape, second.dtype, second.kinds)
    assert torch.equal(tensor_of(first.model(x)), tensor_of(second.model(x)))
