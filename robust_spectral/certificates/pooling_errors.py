"""The local error of max-pooling, for each window the better of three linear functions in its place.

Let a be the place of the largest value at the centre, Δ_j the change of element j, and g_j its gap to the largest value. The
window's maximum changes by Δ_a + max(0, max_j (Δ_j - Δ_a - g_j)), and an element is a rival if Δ_j - Δ_a can exceed g_j. With
w_j the most that Δ_j - Δ_a can be and h_j = 1 - g_j / w_j, max(0, Δ_j - Δ_a - g_j) ≤ h_j |Δ_j - Δ_a|.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ..lipschitz import NoClaim, arguments, operation_of
from .errors import LocalError, local

aten = torch.ops.aten
_UP = 1 + 1e-9


@local(aten.max_pool2d)
def max_pool(walk: Any, n: fx.Node) -> LocalError:
    """The change is Σ_j s_j Δ_j + e, with one of these for each window, the one whose bound of e² has the smallest trace:

    - s selects a: e² ≤ Σ_j h_j² (Δ_j - Δ_a)²;
    - s_j = h_j / 2 for rivals: |e| ≤ Σ_j h_j / 2 |Δ_j - Δ_a|, whose square is ≤ (Σ_j h_j / 2) Σ_j h_j / 2 (Δ_j - Δ_a)²;
    - s is the mean over a and its n - 1 rivals: e² ≤ (1 - 1 / n) Σ (Δ_j - mean)², as for the largest of n numbers.

    Where only ReLUs follow, an element that stays below 0 is no rival: whatever stands in its place, a ReLU gives the same. The
    box then has to contain what stands in the place of the maximum, which may be the element of the centre's maximum.
    """
    windows, (low, high), z = Windows(n, walk.env[n.args[0]]), walk.box(n.args[0]), walk.env[n.args[0]]
    parts, above, below = windows(z, -math.inf), windows(high - z), windows(z - low)
    value, best = parts.max(1, keepdim=True)
    own = torch.zeros_like(parts, dtype=torch.bool).scatter(1, best, True)
    gap, width = value - parts, above + below.gather(1, best)
    rival = ~own & (width > gap)
    if all(operation_of(user.target) is aten.relu for user in n.users):
        rival &= parts + above > 0
        walk.boxes[n] = (torch.minimum(walk.boxes[n][0], (parts - below).gather(1, best)[:, 0]), walk.boxes[n][1])
    h = torch.where(rival, 1 - gap / width.clamp_min(1e-300), 0.0) * _UP
    count = rival.sum(1, keepdim=True) + 1.0
    traces = torch.stack(
        [2 * h.square().sum(1, keepdim=True), h.sum(1, keepdim=True).square() / 2, (count - 1).square() / count]
    )
    choice = traces.argmin(0)
    half, mean = choice == 1, choice == 2
    share = torch.where(half, h / 2, torch.where(mean & rival, 1 / count, 0.0))
    share = share.scatter(1, best, 1 - share.sum(1, keepdim=True))
    apart = torch.where(half, (h / 2 * (h / 2).sum(1, keepdim=True)).sqrt(), h)
    apart = torch.where(mean, torch.where(rival | own, ((count - 1) / count).sqrt(), 0.0), apart) * _UP
    middle = torch.where(mean, share, own.to(share))  # what ``apart`` is the distance from
    others = torch.where(own, 0.0, share)
    rise = torch.where(rival, width - gap, 0.0).amax(1) + (others * (below + above.gather(1, best))).sum(1)
    reach = torch.maximum(rise, (others * width).sum(1)) * _UP
    factors: dict[torch.dtype, tuple[Tensor, ...]] = {z.dtype: (share, middle, apart)}

    def cast(x: Tensor) -> tuple[Tensor, ...]:
        if x.dtype not in factors:
            factors[x.dtype] = tuple(factor.to(x) for factor in factors[z.dtype])
        return factors[x.dtype]

    def energy(given: list[Any]) -> list[Tensor]:
        _, middle, apart = cast(given[0])
        x = windows.of_changes(given[0])
        return [(x - (x * middle).sum(2, keepdim=True)) * apart]

    return LocalError(None, reach, energy, by_element=True, linear=lambda x: (windows(x) * cast(x)[0]).sum(1))


def may_win(n: fx.Node, low: Tensor, high: Tensor) -> Tensor:
    """The elements that may be the largest of a window, and above 0 if only ReLUs follow."""
    windows = Windows(n, low)
    least = windows(low, -math.inf).amax(1, keepdim=True)
    if all(operation_of(user.target) is aten.relu for user in n.users):
        least = least.clamp_min(0)
    with torch.enable_grad():
        met = torch.zeros_like(low, requires_grad=True)
        return torch.autograd.grad(windows(met), met, (windows(high, -math.inf) >= least).to(low))[0] > 0


class Windows:
    """The elements of the windows of a max-pooling, on a new axis."""

    def __init__(self, n: fx.Node, z: Tensor) -> None:
        a = arguments(n)
        kernel, stride, padding, dilation = (_both(a[name]) for name in ("kernel_size", "stride", "padding", "dilation"))
        if dilation != [1, 1] or a["ceil_mode"] or z.ndim != 4:
            raise NoClaim("with dilation or ceil_mode")
        self.kernel, self.stride, self.padding = kernel, stride or kernel, padding
        self.shape = [
            (size + 2 * p - k) // s + 1
            for size, k, s, p in zip(z.shape[-2:], self.kernel, self.stride, self.padding, strict=True)
        ]

    def __call__(self, x: Tensor, outside: float = 0.0) -> Tensor:
        """(images, channels, height, width) -> (images, window, channels, height, width); ``outside`` is in the padding."""
        down, across = self.padding
        if outside:
            x = functional.pad(x, (across, across, down, down), value=outside)
        padding = (0, 0) if outside else (down, across)
        found = functional.unfold(x, tuple(self.kernel), padding=padding, stride=tuple(self.stride))
        return found.reshape(*x.shape[:2], -1, *self.shape).transpose(1, 2)

    def of_changes(self, x: Tensor) -> Tensor:
        """(k, images, channels, height, width) -> (k, images, window, channels, height, width)."""
        return self(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _both(setting: Any) -> list[int]:
    listed = [setting] if isinstance(setting, int) else list(setting)
    return listed * 2 if len(listed) == 1 else listed
