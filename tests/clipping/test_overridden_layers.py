"""Clips of layers whose forward pass is replaced or has hooks: the norm that is proved is the norm of the call, or none is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import map_norm, same_bits, snapshot
from torch import Tensor, nn

import robust_spectral as rs
from robust_spectral.clipping import TrackedLayer, kernel_map
from robust_spectral.layers import LinearLayer


def with_forward(module: nn.Module, forward: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> nn.Module:
    old = module.forward
    module.forward = lambda input: forward(old, input)  # type: ignore[method-assign]
    return module


def lora(module: nn.Linear) -> nn.Linear:
    A, B = torch.randn(2, module.in_features), torch.randn(module.out_features, 2)
    return with_forward(module, lambda old, x: old(x) + x @ A.T @ B.T)


def with_hook(module: nn.Module, hook: Callable[[Tensor], Tensor]) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: hook(output))
    return module


LAYERS = {
    "LoRA patch": (lambda: lora(nn.Linear(7, 5)), (7,)),
    "convolution times ten": (lambda: with_forward(nn.Conv2d(2, 3, 3, padding=1), lambda old, x: 10 * old(x)), (2, 5, 5)),
    "grouped, groups mixed": (lambda: with_hook(nn.Conv2d(4, 6, 3, groups=2), lambda y: y + y.flip(1)), (4, 5, 5)),
    "positions mixed": (lambda: with_hook(nn.Linear(7, 5), lambda y: y.cumsum(1)), (4, 7)),
    "mirrored image": (lambda: with_forward(nn.Conv2d(2, 3, 3, padding=1), lambda old, x: old(x) + old(x.flip(-1))), (2, 9, 9)),
}  # fmt: skip
every_layer = pytest.mark.parametrize("make, in_shape", LAYERS.values(), ids=list(LAYERS))


@every_layer
def test_a_clipped_layer_obeys_the_norm_in_its_call(make: Callable[[], nn.Module], in_shape: tuple[int, ...]) -> None:
    module = make()
    result = rs.clip_(module, in_shape, 0.5)
    assert result.before.lower > 0.5 and result.after.upper <= 0.5005
    assert 0.49 <= map_norm(module, in_shape, torch.float32) <= 0.501


@every_layer
def test_a_clipper_holds_the_norm_of_the_call(make: Callable[[], nn.Module], in_shape: tuple[int, ...]) -> None:
    module = make()
    model, x = nn.Sequential(nn.Identity(), module), torch.zeros(1, *in_shape)
    clipper = rs.FastClip(model, x, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, *in_shape)).square().mean().backward()
        optimizer.step()
    assert clipper.finish()["1"].after.upper <= 0.5005
    assert map_norm(module, in_shape, torch.float32) <= 0.501


@every_layer
def test_no_kernel_is_known_of_an_overridden_layer(make: Callable[[], nn.Module], in_shape: tuple[int, ...]) -> None:
    assert kernel_map(LinearLayer("", make(), in_shape), False) is None


@pytest.mark.parametrize("method", ["projection"])
def test_an_overridden_layer_is_not_projected(method) -> None:
    module = with_forward(nn.Conv2d(2, 3, 3, padding=1), lambda old, x: 10 * old(x))
    before = snapshot(module)
    with pytest.raises(NotImplementedError, match="projection"):
        rs.clip_(module, (2, 5, 5), 0.5, method=method)
    with pytest.raises(NotImplementedError, match="replaced forward"):
        rs.projected_weight(module, (2, 5, 5), 0.5)
    assert same_bits(before, snapshot(module))


def test_a_layer_whose_call_does_not_use_its_weight_is_refused_before_it_is_clipped() -> None:
    module = nn.Linear(7, 5)
    W = torch.randn(5, 7)
    module.forward = lambda input: F.linear(input, W)  # type: ignore[method-assign]
    for call in (lambda: rs.clip_(module, (7,), 0.5), lambda: rs.FastClip(module, torch.zeros(1, 7), 0.5)):
        with pytest.raises(NotImplementedError, match="does not read all of weight from the module"):
            call()


def test_a_norm_is_proved_again_when_a_tensor_outside_of_the_layer_has_changed() -> None:
    module, factor = nn.Linear(7, 5), torch.ones(1)
    with_forward(module, lambda old, x: old(x) * factor)
    tracked = TrackedLayer.of(LinearLayer("", module, (7,)), vectors=1, composite=False, seed=0)
    first = tracked.enclosure(1e-9)
    factor.mul_(4)
    assert tracked.enclosure(1e-9).lower == pytest.approx(4 * first.lower)


def test_a_clipper_of_a_layer_that_is_patched_later_proves_the_norm_of_its_call() -> None:
    torch.manual_seed(0)
    module = nn.Linear(7, 5)
    clipper = rs.FastClip(nn.Sequential(module), torch.zeros(1, 7), 0.5)
    clipper.finish()
    with_forward(module, lambda old, x: 3 * old(x))
    (row,) = clipper.report()
    assert row["lower"] == pytest.approx(1.5, rel=1e-2)
    assert clipper.finish()["0"].after.upper <= 0.5005
    assert map_norm(module, (7,), torch.float32) <= 0.501


def test_a_sequence_with_a_hook_on_its_batchnorm_is_not_clipped_as_a_composite() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), with_hook(nn.BatchNorm2d(3), lambda y: 2 * y))
    with pytest.raises(NotImplementedError, match="no weight parameter of its own"):
        rs.clip_(model, (2, 5, 5), 0.1)
