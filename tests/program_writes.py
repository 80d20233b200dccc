"""Steps of a program that write in place: into fresh tensors, into own buffers, into views, and into a Fourier spectrum.

A tracer that misses a write takes the tensor for the constant that it was before.
"""

from typing import Any

import torch
import torch.nn.functional as F
from program_twists import Draft, square, step
from torch import Tensor


def columns(draft: Draft) -> Tensor:
    return torch.randperm(draft.size + 3)[: draft.size]


def blank(self: Any, x: Tensor) -> Tensor:
    """A tensor to write into, three columns wider than x."""
    return torch.zeros(x.shape[0], self.fc.out_features + 3, dtype=x.dtype)


def by_slice(self: Any, x: Tensor) -> Tensor:
    y = blank(self, x)
    y[:, : self.fc.out_features] = self.fc(x)
    return y


def by_columns(self: Any, x: Tensor) -> Tensor:
    y, z = blank(self, x), self.fc(x)
    for i in range(self.fc.out_features):
        y[:, i + 1] = z[:, i]
    return y


def by_copy(self: Any, x: Tensor) -> Tensor:
    y = torch.empty(x.shape[0], self.fc.out_features, dtype=x.dtype)
    y.copy_(self.fc(x))
    return y


def by_addition(self: Any, x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape)
    y.add_(self.fc(x))
    y -= 2 * x
    return y


def by_sum(self: Any, x: Tensor) -> Tensor:
    y = torch.ones(x.shape[0], self.fc.out_features, dtype=x.dtype)
    y.add_(self.fc(x), alpha=2)
    return y


def by_scatter(self: Any, x: Tensor) -> Tensor:
    return blank(self, x).scatter_(1, self.index.expand(x.shape[0], -1), self.fc(x))


def by_index_addition(self: Any, x: Tensor) -> Tensor:
    y = blank(self, x)
    y.index_add_(1, self.index, self.fc(x))
    return y


def by_index_put(self: Any, x: Tensor) -> Tensor:
    y = blank(self, x)
    y.index_put_((torch.arange(x.shape[0])[:, None], self.index[None]), self.fc(x), accumulate=True)
    return y


def by_index(self: Any, x: Tensor) -> Tensor:
    y = blank(self, x)
    y[:, self.index] = self.fc(x)
    return y


def by_narrow(self: Any, x: Tensor) -> Tensor:
    y = blank(self, x)
    y.narrow(1, 1, self.fc.out_features).copy_(self.fc(x))
    return y


def by_select(self: Any, x: Tensor) -> Tensor:
    y = blank(self, x)
    y.select(1, 0).add_(self.fc(x)[:, 0])
    y.select(1, 2).sub_(3 * x[:, -1])
    return y


def by_two_writes(self: Any, x: Tensor) -> Tensor:
    y, half = blank(self, x), self.fc.out_features // 2
    y[:, :half] = x[:, :half]
    y[:, half : self.fc.out_features] = 5 * self.fc(x)[:, half:]
    return y


def by_out(self: Any, x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    torch.add(x, self.fc(x), out=y)
    return y


FRESH = [step("flat", f, fc=square) for f in (
    by_slice, by_columns, by_copy, by_addition, by_sum, by_narrow, by_select, by_two_writes, by_out,
)] + [step("flat", f, fc=square, index=columns) for f in (by_scatter, by_index_addition, by_index_put, by_index)]  # fmt: skip


def held_slice(self: Any, x: Tensor) -> Tensor:
    self.held[: x.shape[0]] = self.fc(x)
    return 2 * self.held[: x.shape[0]]


def held_copy(self: Any, x: Tensor) -> Tensor:
    self.held[: x.shape[0]].copy_(self.fc(x))
    return self.held[: x.shape[0]]


def held_sum(self: Any, x: Tensor) -> Tensor:
    self.held.zero_()
    self.held[: x.shape[0]].add_(self.fc(x))
    return self.held[: x.shape[0]] + 0.0


def held_without_gradient(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.held.narrow(0, 0, x.shape[0]).copy_(self.fc(x))
    return self.held[: x.shape[0]] + x


def held_anew(self: Any, x: Tensor) -> Tensor:
    self.held = self.fc(x)
    return 3 * self.held


HELD = [
    step("flat", f, fc=square, held=lambda d: torch.zeros(128, d.size))
    for f in (held_slice, held_copy, held_sum, held_without_gradient, held_anew)
]


def scaled_select(self: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0].mul_(20)
    return y


def scaled_view(self: Any, x: Tensor) -> Tensor:
    y = 1.0 * x
    y.flatten(1)[:, ::2].mul_(-15)
    return y


def shifted_view(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y[:, 1:] += 10 * y[:, :-1].clone()
    return y


def scaled_transpose(self: Any, x: Tensor) -> Tensor:
    y = x + 0
    first = y.transpose(0, 1)
    first[-1] *= 12
    return y


def folded_halves(self: Any, x: Tensor) -> Tensor:
    y, half = self.fc(x), x.shape[1] // 2
    first, second = y[:, :half], y[:, -half:]
    first.sub_(8 * second)
    return F.relu_(y)


def rectified_column(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y[:, :1].relu_().mul_(30)
    return y


def widened_halves(self: Any, x: Tensor) -> Tensor:
    y, half = 1.0 * x, (x.shape[1] + 1) // 2
    y[:, :half].add_(9 * x[:, :1])
    y[:, -half:].sub_(9 * x[:, :1])
    return y


def written_input(self: Any, x: Tensor) -> Tensor:
    x.mul_(20)
    return x.sub_(0.5)


def written_columns(self: Any, x: Tensor) -> Tensor:
    y, z = self.fc(x), x.flip(1)
    y[:, :2] = 20 * z[:, :2]
    return y


VIEWS = [step("any", f) for f in (scaled_select, scaled_view, scaled_transpose, widened_halves, written_input)] + [
    step("flat", f, fc=square) for f in (shifted_view, folded_halves, rectified_column, written_columns)
]


def spectrum_written(self: Any, x: Tensor) -> Tensor:
    """The low frequencies, weighted and written into an empty spectrum, as Fourier neural operators do."""
    z = torch.fft.rfft2(x)
    y = torch.zeros(x.shape[0], *z.shape[1:], dtype=z.dtype)
    y[..., :2] = z[..., :2] * self.weight[..., :2]
    return torch.fft.irfft2(y, s=x.shape[-2:])


def half_spectrum(d: Draft) -> Tensor:
    return 3 * torch.randn(d.shape[0], d.shape[1], d.shape[2] // 2 + 1)


def complex_weight(d: Draft) -> Tensor:
    return torch.complex(half_spectrum(d), half_spectrum(d))


FOURIER = [
    step("map", spectrum_written, weight=half_spectrum),
    step("map", spectrum_written, weight=half_spectrum),
    step("map", lambda self, x: torch.fft.irfft2(torch.fft.rfft2(x) * self.weight, s=x.shape[-2:]), weight=half_spectrum),
    step("any", lambda self, x: 5 * torch.fft.fft(x, dim=1).real),
    step("map", spectrum_written, weight=complex_weight),
    step("map", lambda self, x: torch.fft.irfft2(torch.fft.rfft2(x) * self.weight, s=x.shape[-2:]), weight=complex_weight),
]
