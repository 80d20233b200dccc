"""`projected_weight` against the norms of dense matrices and alternating projections of these matrices."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import dense, norm, same_bits, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from robust_spectral.clipping.projection import projected_weight

Build = Callable[[], nn.Module]
Shape = tuple[int, ...]


def conv(axes: int, *args: object, mode: str = "circular", **options: object) -> Build:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return lambda: kind(*args, padding_mode=mode, **options)


CIRCULAR: dict[str, tuple[Build, Shape]] = {
    "1d, odd": (conv(1, 2, 2, 3, padding=1), (2, 7)),
    "1d, even": (conv(1, 2, 2, 3, padding=1), (2, 6)),
    "1d, one channel": (conv(1, 1, 1, 3, padding=1), (1, 8)),
    "1d, one channel in": (conv(1, 1, 3, 3, padding=1), (1, 6)),
    "1d, more channels out": (conv(1, 2, 4, 3, padding=1), (2, 5)),
    "1d, more channels in": (conv(1, 4, 2, 3, padding=1), (4, 6)),
    "1d, even window": (conv(1, 2, 3, 4, padding="same"), (2, 7)),
    "1d, dilation": (conv(1, 2, 2, 3, padding=2, dilation=2), (2, 7)),
    "1d, groups": (conv(1, 4, 6, 3, padding=1, groups=2), (4, 5)),
    "1d, depthwise": (conv(1, 3, 3, 3, padding=1, groups=3), (3, 6)),
    "2d, odd": (conv(2, 2, 2, 3, padding=1), (2, 5, 5)),
    "2d, odd and even": (conv(2, 2, 3, 3, padding=1), (2, 5, 4)),
    "2d, even window": (conv(2, 2, 2, 2, padding="same"), (2, 4, 3)),
    "2d, dilation": (conv(2, 2, 2, (3, 2), padding="same", dilation=(1, 3)), (2, 4, 5)),
    "2d, along one axis": (conv(2, 2, 2, (3, 1), padding=(1, 0)), (2, 6, 3)),
    "2d, groups": (conv(2, 4, 2, 3, padding=1, groups=2), (4, 4, 4)),
    "2d, depthwise with multiplier": (conv(2, 2, 4, 3, padding=1, groups=2), (2, 4, 5)),
    "3d": (conv(3, 2, 2, 2, padding="same"), (2, 3, 2, 3)),
}
FILLED: dict[str, tuple[Build, Shape]] = {
    "dense layer": (lambda: nn.Linear(5, 4), (5,)),
    "dense layer, on rows": (lambda: nn.Linear(3, 4), (2, 3)),
    "pointwise": (conv(2, 3, 4, 1), (3, 2, 3)),
    "pointwise, zeros and groups": (conv(1, 4, 6, 1, mode="zeros", padding=1, groups=2), (4, 3)),
    "1d": (conv(1, 2, 3, 5, padding="same"), (2, 5)),
    "2d": (conv(2, 2, 2, (3, 4), padding="same"), (2, 3, 4)),
    "2d, filled along one axis": (conv(2, 2, 3, (1, 5), padding="same"), (2, 3, 5)),
    "1d, wraps onto itself": (conv(1, 2, 3, 6, padding="same"), (2, 3)),
    "1d, one position": (conv(1, 2, 2, 3, padding=1), (2, 1)),
}
ZEROS: dict[str, tuple[Build, Shape]] = {
    "1d": (conv(1, 2, 3, 3, mode="zeros", padding=1), (2, 8)),
    "1d, even window": (conv(1, 2, 2, 4, mode="zeros", padding=1), (2, 7)),
    "1d, no padding": (conv(1, 2, 2, 3, mode="zeros"), (2, 9)),
    "1d, wide padding": (conv(1, 2, 2, 3, mode="zeros", padding=5), (2, 4)),
    "1d, dilation": (conv(1, 2, 2, 3, mode="zeros", padding=3, dilation=3), (2, 8)),
    "2d": (conv(2, 2, 3, 3, mode="zeros", padding=1), (2, 6, 5)),
    "2d, groups": (conv(2, 4, 2, 3, mode="zeros", padding=1, groups=2), (4, 5, 5)),
    "2d, depthwise": (conv(2, 3, 3, 3, mode="zeros", padding=1, groups=3), (3, 6, 6)),
    "3d": (conv(3, 1, 2, 3, mode="zeros", padding=1), (1, 3, 4, 3)),
}
WRAPPED = FILLED["1d, wraps onto itself"]


def with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """A float64 copy of the module with the weight given."""
    other = copy.deepcopy(module).double()
    other.weight = nn.Parameter(weight.clone())
    return other


def original(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().double()


def dense_projection(module: nn.Module, in_shape: Shape, max_norm: float, rounds: int = 3000) -> Tensor:
    """The matrix of the nearest layer, by Dykstra's alternating projections onto matrices of at most this norm and of kernels.

    Nearest matrices are nearest kernels, as every entry of the kernel appears equally often in the matrix.
    """
    units = torch.eye(original(module).numel(), dtype=torch.float64).reshape(-1, *original(module).shape)
    span = torch.stack([dense(with_weight(module, unit), in_shape).flatten() for unit in units], dim=1)
    span = span / span[:, 0].norm()
    torch.testing.assert_close(span.T @ span, torch.eye(len(units), dtype=torch.float64))
    start = dense(module, in_shape)
    found, correction = start, torch.zeros_like(start)
    for _ in range(rounds):
        left, values, right = torch.linalg.svd(found + correction, full_matrices=False)
        clipped = (left * values.clamp_max(max_norm)) @ right
        correction = found + correction - clipped
        found = (span @ (span.T @ clipped.flatten())).reshape(start.shape)
    return found


def feasible_weights(module: nn.Module, in_shape: Shape, near: Tensor, max_norm: float) -> Iterator[Tensor]:
    """Weights of the given norm: random ones, perturbations of ``near``, and points between it and the module's own weight."""
    own = original(module)
    for step in (0.01, 0.1, 0.5, 1.0):
        for candidate in (near + step * (own - near), near + step * own.std() * torch.randn_like(near), torch.randn_like(near)):
            yield candidate * (max_norm / norm(with_weight(module, candidate), in_shape))


@pytest.mark.parametrize("build, in_shape", [*CIRCULAR.values(), *FILLED.values()], ids=[*CIRCULAR, *FILLED])
@pytest.mark.parametrize("fraction", [0.4, 0.9])
def test_the_projected_weight_has_the_requested_norm(build: Build, in_shape: Shape, fraction: float) -> None:
    module = build()
    max_norm = fraction * norm(module, in_shape)
    weight = projected_weight(module, in_shape, max_norm)
    assert weight.dtype == torch.float64 and weight.shape == original(module).shape
    found = norm(with_weight(module, weight), in_shape)
    assert (1 - 1e-4) * max_norm <= found <= (1 + 1e-12) * max_norm


@pytest.mark.parametrize("build, in_shape", ZEROS.values(), ids=ZEROS)
def test_with_zero_padding_the_norm_is_slightly_below_the_target(build: Build, in_shape: Shape) -> None:
    module = build()
    max_norm = 0.5 * norm(module, in_shape)
    weight = projected_weight(module, in_shape, max_norm)
    found = norm(with_weight(module, weight), in_shape)
    assert 0.8 * max_norm <= found <= (1 + 1e-12) * max_norm


@pytest.mark.parametrize("build, in_shape", ZEROS.values(), ids=ZEROS)
def test_with_zero_padding_the_result_is_that_of_a_larger_circular_grid(build: Build, in_shape: Shape) -> None:
    module = build()
    around: Any = copy.deepcopy(module)
    reach = [d * (k - 1) for d, k in zip(around.dilation, around.kernel_size, strict=True)]
    around.padding_mode, around.padding = "circular", "same"
    larger = (in_shape[0], *[n + r for n, r in zip(in_shape[1:], reach, strict=True)])
    assert torch.equal(projected_weight(module, in_shape, 0.3), projected_weight(around, larger, 0.3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1d, odd", "1d, more channels in", "1d, groups", "1d, depthwise", "2d, even window", "3d"])
@pytest.mark.parametrize("fraction", [0.3, 0.8])
def test_the_result_agrees_with_dense_alternating_projections(name: str, fraction: float) -> None:
    build, in_shape = CIRCULAR[name]
    module = build()
    max_norm = fraction * norm(module, in_shape)
    found = dense(with_weight(module, projected_weight(module, in_shape, max_norm, rtol=1e-8)), in_shape)
    nearest, start = dense_projection(module, in_shape, max_norm), dense(module, in_shape)
    assert float((found - nearest).norm()) <= 1e-3 * float((start - nearest).norm())


@pytest.mark.parametrize("build, in_shape", CIRCULAR.values(), ids=CIRCULAR)
def test_no_feasible_weight_is_nearer_than_the_projection(build: Build, in_shape: Shape) -> None:
    module = build()
    max_norm, own = 0.5 * norm(module, in_shape), original(module)
    nearest = projected_weight(module, in_shape, max_norm, rtol=1e-8)
    change = own - nearest
    for other in feasible_weights(module, in_shape, nearest, max_norm):
        assert float((change * (other - nearest)).sum()) <= 1.1e-4 * float(change.norm() * (other - nearest).norm())
        assert float((own - other).norm()) >= (1 - 1e-8) * float(change.norm())


@pytest.mark.parametrize("build, in_shape", FILLED.values(), ids=FILLED)
def test_a_window_as_large_as_the_grid_gets_clipped_singular_values_in_one_round(build: Build, in_shape: Shape) -> None:
    module = build()
    matrix, max_norm = dense(module, in_shape), 0.5 * norm(module, in_shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = dense(with_weight(module, projected_weight(module, in_shape, max_norm, max_rounds=1)), in_shape)
    torch.testing.assert_close(found, (left * values.clamp_max(max_norm)) @ right, rtol=0, atol=1e-12 * max_norm)


def test_kernel_entries_that_wrap_onto_the_same_position_change_equally() -> None:
    module, in_shape = WRAPPED[0]().double(), WRAPPED[1]
    change = projected_weight(module, in_shape, 0.5 * norm(module, in_shape)) - original(module)
    torch.testing.assert_close(change[..., :3], change[..., 3:])


@pytest.mark.parametrize("name", ["1d, even", "2d, odd", "2d, depthwise with multiplier", "2d, groups"])
def test_projecting_twice_is_projecting_once(name: str) -> None:
    build, in_shape = CIRCULAR[name]
    module = build()
    max_norm = 0.6 * norm(module, in_shape)
    once = projected_weight(module, in_shape, max_norm)
    assert torch.equal(projected_weight(with_weight(module, once), in_shape, max_norm), once)


@pytest.mark.parametrize("build, in_shape", [CIRCULAR["2d, odd"], ZEROS["2d"], FILLED["dense layer"], WRAPPED])
def test_a_weight_below_its_target_is_returned_unchanged(build: Build, in_shape: Shape) -> None:
    module = build()
    for max_norm in (2 * norm(module, in_shape), math.inf):
        weight = projected_weight(module, in_shape, max_norm)
        assert torch.equal(weight, original(module))
        weight.zero_()
        assert bool(original(module).any())


def test_a_circular_weight_changes_only_for_a_target_below_its_norm() -> None:
    module, in_shape = CIRCULAR["2d, odd and even"][0](), CIRCULAR["2d, odd and even"][1]
    assert torch.equal(projected_weight(module, in_shape, norm(module, in_shape)), original(module))
    assert not torch.equal(projected_weight(module, in_shape, 0.999 * norm(module, in_shape)), original(module))


def test_zero_weights_stay_zero() -> None:
    module = nn.Conv1d(2, 3, 3, padding=1)
    nn.init.zeros_(module.weight)
    assert torch.equal(projected_weight(module, (2, 5), 1.0), original(module))


@pytest.mark.parametrize("name", ["1d, groups", "1d, depthwise"])
def test_only_groups_above_the_target_change_and_each_as_if_alone(name: str) -> None:
    build, in_shape = CIRCULAR[name]
    module = build()
    groups: int = module.groups  # type: ignore[assignment]
    with torch.no_grad():
        module.weight.unflatten(0, (groups, -1))[0].mul_(0.1)  # type: ignore[operator]
    own = original(module).chunk(groups)
    parts = projected_weight(module, in_shape, 0.3, rtol=1e-8).chunk(groups)
    assert torch.equal(parts[0], own[0])
    for before, after in zip(own[1:], parts[1:], strict=True):
        alone = nn.Conv1d(before.shape[1], before.shape[0], 3, padding=1, padding_mode="circular").double()
        single = projected_weight(with_weight(alone, before), (before.shape[1], *in_shape[1:]), 0.3, rtol=1e-8)
        assert float((after - single).norm()) <= 1e-3 * float((before - single).norm())


@pytest.mark.parametrize("rounds", [0, 1, 4, 30])
@pytest.mark.parametrize("fraction", [0.1, 0.8])
def test_a_projection_stopped_early_is_feasible_and_no_farther_than_rescaling(rounds: int, fraction: float) -> None:
    module, in_shape = nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular"), (3, 20)
    max_norm, own = fraction * norm(module, in_shape), original(module)
    weight = projected_weight(module, in_shape, max_norm, rtol=1e-12, max_rounds=rounds)
    assert norm(with_weight(module, weight), in_shape) <= (1 + 1e-12) * max_norm
    distance, rescaled = float((weight - own).norm()), (1 - fraction) * float(own.norm())
    assert distance <= (0.999 if rounds > 1 else 1 + 1e-12) * rescaled
    if rounds == 0:
        torch.testing.assert_close(weight, fraction * own)


@pytest.mark.parametrize("fraction", [1e-2, 1e-4, 1e-8])
def test_a_target_far_below_the_norm_is_met(fraction: float) -> None:
    build, in_shape = CIRCULAR["1d, odd"]
    module = build()
    max_norm, own = fraction * norm(module, in_shape), original(module)
    weight = projected_weight(module, in_shape, max_norm)
    assert norm(with_weight(module, weight), in_shape) <= (1 + 1e-12) * max_norm
    for other in feasible_weights(module, in_shape, weight, max_norm):
        assert float((own * (other - weight)).sum()) <= 0.01 * float(own.norm() * weight.norm())


@pytest.mark.parametrize("exponent", [-300, -100, 100, 300])
@pytest.mark.parametrize("name", ["1d, odd", "2d, groups"])
def test_the_result_scales_with_the_weights(name: str, exponent: int) -> None:
    build, in_shape = CIRCULAR[name]
    module = build().double()
    weight = projected_weight(module, in_shape, 0.3)
    larger = projected_weight(with_weight(module, original(module) * 2.0**exponent), in_shape, 0.3 * 2.0**exponent)
    assert torch.equal(larger, weight * 2.0**exponent)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_tiny_and_huge_weights_are_projected(factor: float) -> None:
    build, in_shape = CIRCULAR["2d, odd and even"]
    module = build()
    with torch.no_grad():
        module.weight.mul_(factor)  # type: ignore[operator]
    max_norm = 0.5 * norm(module, in_shape)
    found = norm(with_weight(module, projected_weight(module, in_shape, max_norm)), in_shape)
    assert found == pytest.approx(max_norm, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_precision_are_projected_in_float64(dtype: torch.dtype) -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", dtype=dtype)
    expected = projected_weight(with_weight(module, original(module)), (2, 4, 4), 0.3)
    assert torch.equal(projected_weight(module, (2, 4, 4), 0.3), expected)


def test_weights_in_channels_last_format_give_the_same_result() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1)
    expected = projected_weight(module, (2, 4, 4), 0.3)
    module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    assert torch.equal(projected_weight(module, (2, 4, 4), 0.3), expected)


def test_the_module_is_left_unchanged() -> None:
    module = parametrizations.spectral_norm(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()).train()
    before = snapshot(module)
    weight = projected_weight(module, (2, 4, 5), 0.5)
    assert module.training and same_bits(before, snapshot(module)) and not weight.requires_grad
    plain = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    assert norm(with_weight(plain, weight), (2, 4, 5)) == pytest.approx(0.5, rel=1e-4)


class Standardised(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def hooked() -> nn.Module:
    module = nn.Linear(2, 3)
    module.register_forward_hook(lambda _m, _i, output: 2 * output)
    return module


REFUSED: dict[str, tuple[Build, Shape, str]] = {
    "stride": (conv(2, 2, 3, 3, mode="zeros", padding=1, stride=2), (2, 4, 4), "Conv2d.*stride"),
    "stride, circular": (conv(1, 2, 3, 3, padding=1, stride=2), (2, 4), "Conv1d.*stride"),
    "reflect": (conv(1, 2, 3, 3, mode="reflect", padding=1), (2, 4), "Conv1d.*pads with 'reflect'"),
    "replicate": (conv(2, 2, 3, 3, mode="replicate", padding=1), (2, 4, 4), "Conv2d.*pads with 'replicate'"),
    "too little circular padding": (conv(2, 2, 3, 3), (2, 4, 4), "Conv2d.*4 positions to 2"),
    "too much circular padding": (conv(1, 2, 3, 3, padding=2), (2, 4), "Conv1d.*4 positions to 6"),
    "pointwise, circular padding": (conv(1, 2, 3, 1, padding=1), (2, 4), "Conv1d.*4 positions to 6"),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3), (2, 4, 4), "ConvTranspose2d"),
    "normalisation": (lambda: nn.BatchNorm1d(2), (2, 4), "BatchNorm1d"),
    "own forward": (lambda: Standardised(2, 3, 3, padding=1), (2, 4, 4), "Standardised"),
    "hooks": (hooked, (2,), "Linear.*forward hooks"),
    "complex": (conv(1, 2, 3, 3, padding=1, dtype=torch.complex64), (2, 4), "Conv1d.*complex"),
}  # fmt: skip


@pytest.mark.parametrize("build, in_shape, message", REFUSED.values(), ids=REFUSED)
def test_unsupported_layers_are_refused_by_name(build: Build, in_shape: Shape, message: str) -> None:
    with pytest.raises(NotImplementedError, match=f"projected_weight.*{message}"):
        projected_weight(build(), in_shape, 0.5)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("in_shape", [(), (2,), (3, 4, 4), (2, 4), (2, 0, 4), (1, 2, 4, 4)], ids=str)
def test_input_shapes_that_do_not_fit_are_named_in_the_error(in_shape: Shape, mode: str) -> None:
    with pytest.raises(ValueError, match=r"projected_weight\(in_shape=.*Conv2d.*takes \(2, 2 spatial axes\)"):
        projected_weight(conv(2, 2, 3, 3, mode=mode, padding=1)(), in_shape, 0.5)


@pytest.mark.parametrize("in_shape", [(), (3,), (2, 3)], ids=str)
def test_features_that_do_not_fit_are_named_in_the_error(in_shape: Shape) -> None:
    with pytest.raises(ValueError, match=r"projected_weight\(in_shape=.*Linear.*takes 2 features"):
        projected_weight(nn.Linear(2, 4), in_shape, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_an_error(value: float) -> None:
    module = nn.Conv1d(2, 3, 3, padding=1)
    with torch.no_grad():
        module.weight[1, 0, 2] = value
    with pytest.raises(ValueError, match=r"projected_weight: the weight of Conv1d.*NaN or infinite"):
        projected_weight(module, (2, 4), 0.5)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_max_norm_must_be_positive(max_norm: float) -> None:
    with pytest.raises(ValueError, match=r"projected_weight\(max_norm="):
        projected_weight(nn.Linear(2, 3), (2,), max_norm)
