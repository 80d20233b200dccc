"""Spectra of circular convolutions by Fourier transform, against dense decompositions of the layers' matrices."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from reference import same_bits, snapshot, tolerance
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from robust_spectral.operators.from_module import linear_operator
from robust_spectral.singular_values.circular_convolution import (
    circular_singular_values,
    duplicate_structure,
    representation_gap,
)

Build = Callable[[], nn.Module]
Shape = tuple[int, ...]


def conv1d(*args: int, **options: object) -> Build:
    return lambda: nn.Conv1d(*args, **options, padding_mode="circular")  # type: ignore[arg-type]


def conv2d(c_in: int, c_out: int, window: int | Shape, **options: object) -> Build:
    return lambda: nn.Conv2d(c_in, c_out, window, **options, padding_mode="circular")  # type: ignore[arg-type]


UNSTRIDED: dict[str, tuple[Build, Shape]] = {
    "1d, odd": (conv1d(1, 1, 3, padding=1), (1, 7)),
    "1d, even": (conv1d(1, 1, 3, padding=1), (1, 8)),
    "1d, more channels out": (conv1d(2, 5, 3, padding=1), (2, 6)),
    "1d, more channels in": (conv1d(5, 2, 3, padding="same"), (5, 7)),
    "1d, even kernel, same": (conv1d(3, 2, 4, padding="same"), (3, 7)),
    "1d, even kernel, explicit": (conv1d(3, 2, 4, padding=3, dilation=2), (3, 8)),
    "1d, dilation": (conv1d(2, 2, 3, padding=3, dilation=3), (2, 9)),
    "1d, groups": (conv1d(4, 6, 3, padding=1, groups=2), (4, 6)),
    "1d, kernel larger than input": (conv1d(2, 3, 7, padding=3), (2, 3)),
    "1d, even kernel larger than input": (conv1d(2, 3, 8, padding="same"), (2, 5)),
    "1d, dilated kernel wraps onto itself": (conv1d(2, 3, 3, padding=4, dilation=4), (2, 4)),
    "1d, one position": (conv1d(2, 3, 3, padding=1), (2, 1)),
    "1d, two positions": (conv1d(2, 3, 3, padding=1), (2, 2)),
    "1d, no bias": (conv1d(2, 3, 3, padding=1, bias=False), (2, 5)),
    "2d, odd": (conv2d(2, 2, 3, padding=1), (2, 5, 7)),
    "2d, even": (conv2d(2, 3, 3, padding=1), (2, 4, 6)),
    "2d, odd and even": (conv2d(3, 2, 3, padding=1), (3, 5, 4)),
    "2d, even kernel, same": (conv2d(2, 3, (2, 4), padding="same"), (2, 4, 5)),
    "2d, even kernel, explicit": (conv2d(2, 2, (2, 4), padding=(1, 3), dilation=2), (2, 5, 6)),
    "2d, dilation": (conv2d(2, 3, 3, padding=(2, 1), dilation=(2, 1)), (2, 6, 5)),
    "2d, groups": (conv2d(6, 4, 3, padding=1, groups=2), (6, 4, 5)),
    "2d, depthwise": (conv2d(3, 3, 3, padding=1, groups=3), (3, 6, 5)),
    "2d, depthwise with multiplier": (conv2d(3, 6, 5, padding=2, groups=3), (3, 4, 4)),
    "2d, kernel larger than input": (conv2d(2, 2, (5, 7), padding=(2, 3)), (2, 3, 4)),
    "2d, pointwise": (conv2d(3, 4, 1), (3, 4, 3)),
    "3d": (lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"), (2, 3, 4, 2)),
}
STRIDED: dict[str, tuple[Build, Shape]] = {
    "1d": (conv1d(2, 3, 3, padding=1, stride=2), (2, 8)),
    "1d, odd output": (conv1d(3, 2, 3, padding=1, stride=2), (3, 10)),
    "1d, one output": (conv1d(2, 3, 5, padding=2, stride=6), (2, 6)),
    "1d, more rows": (conv1d(1, 5, 3, padding=1, stride=2), (1, 8)),
    "1d, even kernel": (conv1d(2, 3, 4, padding=1, stride=2), (2, 8)),
    "1d, kernel larger than input": (conv1d(2, 3, 9, padding=4, stride=2), (2, 4)),
    "2d": (conv2d(2, 3, 3, padding=1, stride=2), (2, 6, 8)),
    "2d, different strides": (conv2d(2, 3, 3, padding=1, stride=(3, 2)), (2, 6, 4)),
    "2d, along one axis": (conv2d(2, 3, 3, padding=1, stride=(1, 2)), (2, 5, 4)),
    "2d, even kernel": (conv2d(2, 9, 4, padding=1, stride=2), (2, 6, 4)),
    "2d, dilation": (conv2d(2, 3, 3, padding=2, dilation=2, stride=3), (2, 6, 9)),
    "2d, groups": (conv2d(4, 6, 3, padding=1, stride=2, groups=2), (4, 4, 6)),
    "2d, patches": (conv2d(2, 5, 2, stride=2), (2, 4, 6)),
    "3d": (lambda: nn.Conv3d(1, 3, 3, padding=1, stride=(1, 2, 2), padding_mode="circular"), (1, 3, 4, 2)),
}


def dense_singular_values(module: nn.Module, in_shape: Shape) -> Tensor:
    """Singular values of the dense matrix, which is scaled so that nothing under- or overflows."""
    matrix = linear_operator(module, in_shape, torch.float64).to_dense()
    size = matrix.abs().max()
    return torch.linalg.svdvals(matrix / size) * size


def assert_near(found: Tensor, true: Tensor) -> None:
    assert found.shape == true.shape and found.dtype == torch.float64
    assert float((found - true).abs().max()) <= tolerance(torch.float64) * float(true[0])


def multiplicities(values: Tensor) -> Counter[int]:
    """How many clusters of each size there are among values closer than 1e-10 of the largest."""
    ends = (-values.diff() > 1e-10 * values[0]).nonzero()[:, 0] + 1
    bounds = [0, *ends.tolist(), len(values)]
    return Counter(after - before for before, after in pairwise(bounds))


@pytest.mark.parametrize("build, in_shape", UNSTRIDED.values(), ids=UNSTRIDED)
def test_all_singular_values_are_those_of_the_matrix(build: Build, in_shape: Shape) -> None:
    module = build()
    found = circular_singular_values(module, in_shape)
    assert_near(found, dense_singular_values(module, in_shape))
    assert bool((found.diff() <= 0).all())


@pytest.mark.parametrize("build, in_shape", STRIDED.values(), ids=STRIDED)
def test_all_singular_values_of_a_strided_convolution_are_those_of_the_matrix(build: Build, in_shape: Shape) -> None:
    module = build()
    A = linear_operator(module, in_shape, torch.float64)
    found = circular_singular_values(module, in_shape)
    assert_near(found, dense_singular_values(module, in_shape))
    assert len(found) == min(math.prod(A.out_shape), math.prod(A.in_shape))


def test_zero_singular_values_are_counted() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    nn.init.zeros_(module.weight)
    assert torch.equal(circular_singular_values(module, (2, 4, 5)), torch.zeros(40, dtype=torch.float64))
    nn.init.ones_(module.weight)  # nonzero only on the mean over channels at frequency zero
    assert_near(circular_singular_values(module, (2, 3, 3)), dense_singular_values(module, (2, 3, 3)))


def test_a_kernel_that_wraps_more_than_once_is_folded() -> None:
    module = nn.Conv1d(2, 3, 13, padding="same", padding_mode="circular").double()
    folded = nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular").double()
    with torch.no_grad():
        folded.weight.copy_(torch.stack([module.weight[..., i::3].sum(-1) for i in range(3)], dim=-1))
    assert_near(circular_singular_values(module, (2, 3)), dense_singular_values(folded, (2, 3)))


@pytest.mark.parametrize("factor", [1e-30, 1e-200, 1e30, 1e200], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_singular_values_are_accurate_at_any_scale(stride: int, factor: float) -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, stride=stride, padding_mode="circular", bias=False).double()
    with torch.no_grad():
        module.weight.mul_(factor)
    assert_near(circular_singular_values(module, (2, 4, 6)), dense_singular_values(module, (2, 4, 6)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_singular_values_of_weights_of_any_precision_are_computed_in_float64(dtype: torch.dtype) -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", dtype=dtype)
    assert_near(circular_singular_values(module, (2, 4, 6)), dense_singular_values(module, (2, 4, 6)))


STRUCTURES = {
    "1d, odd": ((7,), 1, 1),
    "1d, even": ((8,), 1, 2),
    "1d, odd, channels": ((9,), (4, 3), 3),
    "1d, even, channels": ((6,), (3, 5), 6),
    "1d, one position": ((1,), 4, 4),
    "1d, two positions": ((2,), 3, 6),
    "2d, odd": ((5, 5), 1, 1),
    "2d, even": ((8, 8), 2, 8),
    "2d, odd and even": ((5, 6), (2, 3), 4),
    "2d, even and odd": ((4, 7), 3, 6),
    "2d, two rows": ((2, 5), 2, 4),
    "3d": ((3, 4, 2), 2, 8),
}


@pytest.mark.parametrize("grid, channels, single", STRUCTURES.values(), ids=STRUCTURES)
def test_generic_kernels_have_the_predicted_pairs_of_equal_singular_values(
    grid: Shape, channels: int | Shape, single: int
) -> None:
    structure = duplicate_structure(grid, channels)  # type: ignore[arg-type]
    c_out, c_in = (channels, channels) if isinstance(channels, int) else channels
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(grid) - 1]
    module = kind(c_in, c_out, 3, padding=1, padding_mode="circular")
    values = dense_singular_values(module, (c_in, *grid))
    assert structure.single == single
    assert structure.total == structure.single + 2 * structure.pairs == len(values)
    assert multiplicities(values) == +Counter({1: structure.single, 2: structure.pairs})


@pytest.mark.parametrize("grid", [(7,), (8,), (5, 5), (4, 7), (4, 6), (2, 1)], ids=str)
def test_self_conjugate_frequencies_are_their_own_mirror_images(grid: Shape) -> None:
    every = torch.cartesian_prod(*[torch.arange(n) for n in grid]).reshape(-1, len(grid))
    own = [tuple(w) for w in every.tolist() if all((-i) % n == i for i, n in zip(w, grid, strict=True))]
    assert duplicate_structure(grid, 3).self_conjugate == tuple(own)


def test_unpaired_singular_values_belong_to_self_conjugate_frequencies() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()
    values = dense_singular_values(module, (2, 4, 5))
    symbols = torch.fft.fft2(module.weight.detach(), s=(4, 5))
    own = torch.cat([torch.linalg.svdvals(symbols[:, :, i, j]) for i, j in duplicate_structure((4, 5), (3, 2)).self_conjugate])
    copies = ((values - own[:, None]).abs() <= 1e-10 * values[0]).sum(1)
    assert copies.tolist() == [1] * 4


def test_grouped_and_strided_convolutions_have_the_pairs_of_their_blocks() -> None:
    grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular")
    structure = duplicate_structure((4, 5), (6, 4))
    assert multiplicities(dense_singular_values(grouped, (4, 4, 5))) == {1: structure.single, 2: structure.pairs}
    strided = nn.Conv2d(2, 9, 5, padding=2, stride=(2, 3), padding_mode="circular")
    structure = duplicate_structure((3, 4), (9, 2 * 6))
    assert multiplicities(dense_singular_values(strided, (2, 6, 12))) == {1: structure.single, 2: structure.pairs}


def test_small_windows_have_more_equal_singular_values_than_generic_kernels() -> None:
    module = nn.Conv2d(2, 3, 1, padding_mode="circular")
    assert multiplicities(dense_singular_values(module, (2, 4, 5))) == {20: 2}
    patches = nn.Conv2d(2, 9, 2, stride=2, padding_mode="circular")
    assert multiplicities(dense_singular_values(patches, (2, 4, 6))) == {6: 8}


def dense_gap(module: nn.Module, in_shape: Shape, max_norm: float) -> tuple[float, float, int]:
    """Energy outside, norm after projection and number changed, from the matrices of all unit kernels."""
    M = linear_operator(module, in_shape, torch.float64).to_dense()
    left, values, right = torch.linalg.svd(M, full_matrices=False)
    clipped = (left * values.clamp_max(max_norm)) @ right
    before, units = module.weight.detach().clone(), []
    with torch.no_grad():
        for index in range(before.numel()):
            module.weight.zero_().view(-1)[index] = 1
            units.append(linear_operator(module, in_shape, torch.float64).to_dense().flatten())
        module.weight.copy_(before)
    span, sizes, _ = torch.linalg.svd(torch.stack(units, dim=1), full_matrices=False)
    basis = span[:, sizes > 1e-10 * sizes[0]]
    projected = (basis @ (basis.T @ clipped.flatten())).reshape(M.shape)
    outside = float((clipped - projected).norm() / clipped.norm())
    return outside, float(torch.linalg.matrix_norm(projected, 2)), int((values > max_norm).sum())


GAPS = {
    name: UNSTRIDED[name] for name in UNSTRIDED if "same" not in name and name not in ("2d, depthwise with multiplier", "3d")
}


@pytest.mark.parametrize("build, in_shape", GAPS.values(), ids=GAPS)
def test_the_gap_is_the_distance_to_the_span_of_the_unit_kernels(build: Build, in_shape: Shape) -> None:
    module = build()
    max_norm = 0.6 * float(dense_singular_values(module, in_shape)[0])
    gap = representation_gap(module, in_shape, max_norm)
    outside, norm, changed = dense_gap(module, in_shape, max_norm)
    assert gap.energy_outside == pytest.approx(outside, abs=1e-12)
    assert gap.norm_after_projection == pytest.approx(norm, rel=1e-12)
    assert (gap.changed, gap.total) == (changed, len(circular_singular_values(module, in_shape)))
    assert gap.changed > 0


def test_a_window_smaller_than_the_input_cannot_represent_the_clipped_spectrum() -> None:
    module = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    gap = representation_gap(module, (4, 8, 8), 0.5)
    assert gap.energy_outside > 0.01
    assert gap.norm_after_projection > 0.51


def test_a_window_as_large_as_the_grid_represents_every_clipped_spectrum() -> None:
    module = nn.Conv2d(2, 3, (5, 4), padding="same", padding_mode="circular")
    gap = representation_gap(module, (2, 5, 4), 0.3)
    assert gap.changed > 0 and gap.energy_outside == 0
    assert gap.norm_after_projection == pytest.approx(0.3, rel=1e-12)


def test_the_gap_is_zero_where_no_singular_value_is_above_max_norm() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    largest = float(circular_singular_values(module, (2, 6, 5))[0])
    for max_norm in (1.001 * largest, math.inf):
        gap = representation_gap(module, (2, 6, 5), max_norm)
        assert (gap.energy_outside, gap.norm_after_projection, gap.changed) == (0, largest, 0)


def test_the_gap_of_zero_weights_is_zero() -> None:
    module = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")
    nn.init.zeros_(module.weight)
    gap = representation_gap(module, (2, 6))
    assert (gap.energy_outside, gap.norm_after_projection, gap.changed, gap.total) == (0, 0, 0, 12)


@pytest.mark.parametrize("exponent", [-100, 100])
def test_the_gap_scales_with_the_weights(exponent: int) -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    before = representation_gap(module, (2, 5, 6), 0.5)
    with torch.no_grad():
        module.weight.mul_(2.0**exponent)
    after = representation_gap(module, (2, 5, 6), 0.5 * 2.0**exponent)
    assert (after.energy_outside, after.changed, after.total) == (before.energy_outside, before.changed, before.total)
    assert after.norm_after_projection == before.norm_after_projection * 2.0**exponent


def test_the_module_is_left_unchanged() -> None:
    module = parametrizations.spectral_norm(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()).train()
    before = snapshot(module)
    values = circular_singular_values(module, (2, 4, 5))
    representation_gap(module, (2, 4, 5), 0.5)
    assert module.training and same_bits(before, snapshot(module)) and not values.requires_grad
    assert_near(values, dense_singular_values(module.eval(), (2, 4, 5)))


class Standardised(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def hooked() -> nn.Module:
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    module.register_forward_hook(lambda _m, _i, output: 2 * output)
    return module


REFUSED: dict[str, tuple[Build, Shape, str]] = {
    "zeros": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4), "Conv2d.*pads with 'zeros'"),
    "reflect": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4), "pads with 'reflect'"),
    "too little padding": (conv2d(2, 3, 3), (2, 4, 4), r"Conv2d.* 4 positions to 2 in place of 4.*pad by 2 to 2.* not by 0"),
    "too much padding": (conv1d(2, 3, 3, padding=2), (2, 4), "takes 4 positions to 6"),
    "even kernel": (conv1d(2, 3, 4, padding=1), (2, 8), "takes 8 positions to 7.*padding='same'"),
    "valid": (conv1d(2, 3, 3, padding="valid"), (2, 4), "takes 4 positions to 2"),
    "stride and too much padding": (conv1d(2, 3, 3, padding=2, stride=2), (2, 8), "8 positions to 5.*pad by 1 to 2"),
    "stride does not divide": (conv2d(2, 3, 3, padding=1, stride=2), (2, 4, 5), "a stride of 2, which does not divide 5"),
    "dense": (lambda: nn.Linear(4, 3), (4,), "Linear.*is not a plain nn.Conv1d"),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3), (2, 4, 4), "ConvTranspose2d.*is not a plain"),
    "own forward": (lambda: Standardised(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4), "Standardised.*not a plain"),
    "hooks": (hooked, (2, 4, 4), "forward hooks"),
    "complex": (conv1d(2, 3, 3, padding=1, dtype=torch.complex64), (2, 4), "complex"),
}  # fmt: skip


@pytest.mark.parametrize("call", [circular_singular_values, representation_gap])
@pytest.mark.parametrize("build, in_shape, message", REFUSED.values(), ids=REFUSED)
def test_unsupported_layers_are_refused_by_name(
    call: Callable[[nn.Module, Shape], object], build: Build, in_shape: Shape, message: str
) -> None:
    with pytest.raises(NotImplementedError, match=f"{call.__name__}.*{message}"):
        call(build(), in_shape)


def test_the_gap_refuses_a_stride() -> None:
    with pytest.raises(NotImplementedError, match=r"representation_gap: Conv1d.*stride"):
        representation_gap(conv1d(2, 3, 3, padding=1, stride=2)(), (2, 4))


@pytest.mark.parametrize("call", [circular_singular_values, representation_gap])
@pytest.mark.parametrize("in_shape", [(), (2,), (3, 4, 4), (2, 4), (2, 0, 4), (1, 2, 4, 4)], ids=str)
def test_input_shapes_that_do_not_fit_are_named_in_the_error(
    call: Callable[[nn.Module, Shape], object], in_shape: Shape
) -> None:
    with pytest.raises(ValueError, match=rf"{call.__name__}\(in_shape=.*Conv2d.*takes \(2, 2 spatial axes\)"):
        call(conv2d(2, 3, 3, padding=1)(), in_shape)


@pytest.mark.parametrize("call", [circular_singular_values, representation_gap])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_an_error(call: Callable[[nn.Module, Shape], object], value: float) -> None:
    module = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")
    with torch.no_grad():
        module.weight[1, 0, 2] = value
    with pytest.raises(ValueError, match=rf"{call.__name__}: the weight of Conv1d.*NaN or infinite"):
        call(module, (2, 4))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_the_gap_needs_a_positive_max_norm(max_norm: float) -> None:
    with pytest.raises(ValueError, match=r"representation_gap\(max_norm="):
        representation_gap(conv1d(2, 3, 3, padding=1)(), (2, 4), max_norm)


@pytest.mark.parametrize("grid, channels", [((), 1), ((4, 0), 1), ((4,), 0), ((4,), (2, 0)), ((4,), (1, 2, 3))], ids=str)
def test_duplicate_structure_needs_a_grid_and_channels(grid: Shape, channels: int | Shape) -> None:
    with pytest.raises(ValueError, match=r"duplicate_structure\(in_shape="):
        duplicate_structure(grid, channels)  # type: ignore[arg-type]
