"""The local error of max-pooling, for each window the better of three linear functions in its place.

Let a be the place of the largest value at the centre, Δ_j the change of element j, and g_j its gap to the largest value. The
window's maximum changes by Δ_a + max(0, max_j (Δ_j - Δ_a - g_j)), and an element is a rival if Δ_j - Δ_a can exceed g_j. With
w_j the most that Δ_j - Δ_a can be and h_j = 1 - g_j / w_j, max(0, Δ_j - Δ_a - g_j) ≤ h_j |Δ_j - Δ_a|.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

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
    parts, above, below = (windows(x) for x in (z, high - z, z - low))
    value, best = parts.max(0, keepdim=True)
    own = torch.zeros_like(parts, dtype=torch.bool).scatter(0, best, True)
    gap, width = value - parts, above + below.gather(0, best)
    rival = ~own & (width > gap) & windows.first & (windows.numbers != windows.numbers.gather(0, best))
    if all(operation_of(user.target) is aten.relu for user in n.users):
        rival &= parts + above > 0
        walk.boxes[n] = (torch.minimum(walk.boxes[n][0], (parts - below).gather(0, best)[0]), walk.boxes[n][1])
    h = torch.where(rival, 1 - gap / width.clamp_min(1e-300), 0.0) * _UP
    count = rival.sum(0) + 1.0
    traces = torch.stack([2 * h.square().sum(0), h.sum(0).square() / 2, (count - 1).square() / count])
    choice = traces.argmin(0)
    half, mean = choice == 1, choice == 2
    share = torch.where(half, h / 2, torch.where(mean & rival, 1 / count, 0.0))
    share = share.scatter(0, best, 1 - share.sum(0, keepdim=True))
    apart = torch.where(mean, 0.0, torch.where(half, (h / 2 * (h / 2).sum(0)).sqrt(), h)) * _UP
    around = torch.where(mean & (rival | own), ((count - 1) / count).sqrt() * _UP, 0.0)
    others = torch.where(own, 0.0, share)
    rise = torch.where(rival, width - gap, 0.0).amax(0) + (others * (below + above.gather(0, best))).sum(0)
    reach = torch.maximum(rise, (others * width).sum(0)) * _UP

    def energy(given: list[Any]) -> list[Tensor]:
        x = torch.stack([windows(part) for part in given[0]], 1)  # (window, k, images, ...)
        from_own = (x - x.gather(0, best[:, None].expand(1, *x.shape[1:]))) * apart[:, None]
        from_mean = (x - (x * share[:, None]).sum(0)) * around[:, None]
        return [*from_own, *from_mean]

    return LocalError(None, reach, energy, by_element=True, linear=lambda x: (windows(x) * share).sum(0))


def may_win(n: fx.Node, low: Tensor, high: Tensor) -> Tensor:
    """The elements that may be the largest of a window, and above 0 if only ReLUs follow."""
    windows = Windows(n, low)
    least = windows(low).amax(0)
    if all(operation_of(user.target) is aten.relu for user in n.users):
        least = least.clamp_min(0)
    with torch.enable_grad():
        met = torch.zeros_like(low, requires_grad=True)
        return torch.autograd.grad(windows(met), met, (windows(high) >= least).to(low))[0] > 0


class Windows:
    """The elements of the windows of a max-pooling, on a new first axis; places in the padding are replaced by others."""

    def __init__(self, n: fx.Node, z: Tensor) -> None:
        a = arguments(n)
        settings = [_both(a[name]) for name in ("kernel_size", "stride", "padding", "dilation")]
        kernel, stride, padding, dilation = settings[0], settings[1] or settings[0], settings[2], settings[3]
        if dilation != [1, 1] or a["ceil_mode"] or z.ndim != 4:
            raise NoClaim("with dilation or ceil_mode")
        self.places = [
            [
                (torch.arange((size + 2 * p - k) // s + 1, device=z.device) * s - p + i).clamp(0, size - 1)
                for i in range(k)
            ]
            for size, k, s, p in zip(z.shape[-2:], kernel, stride, padding, strict=True)
        ]  # fmt: skip

        count = z.shape[-2] * z.shape[-1]
        numbers = torch.arange(float(count), dtype=z.dtype, device=z.device).reshape(1, 1, *z.shape[-2:])
        self.numbers = self(numbers.expand(z.shape))
        again = [(self.numbers[:j] == self.numbers[j]).any(0) for j in range(len(self.numbers))]
        self.first = ~torch.stack(again)  # of the places of one element

    def __call__(self, x: Tensor) -> Tensor:
        """(images, channels, height, width) -> (window, images, channels, height, width)."""
        down, across = self.places
        return torch.stack([x.index_select(-2, i).index_select(-1, j) for i in down for j in across])


def _both(setting: Any) -> list[int]:
    listed = [setting] if isinstance(setting, int) else list(setting)
    return listed * 2 if len(listed) == 1 else listed
