"""The largest value of a linear function on the intersection of a ball and a box, bounded by Lagrange's dual."""

from __future__ import annotations

import torch
from torch import Tensor


def support(c: Tensor, radius: Tensor, above: Tensor, below: Tensor | None = None, rounds: int = 4) -> Tensor:
    """A bound of max ⟨c, d⟩ over ‖d‖ ≤ radius, -below ≤ d ≤ above, from above: for any κ ≥ 0 it is at most

        ½ κ radius² + Σ_i max_d (c_i d - ½ κ d²) = ½ κ radius² + Σ_i c_i d_i - ½ κ d_i²,   d_i = c_i / κ moved into the box.

    The best κ is that for which ‖d‖ is the radius; each round multiplies it by ‖d‖ / radius.

    Args:
        c: (k, images, elements).
        radius: (images,), and nothing larger than the elements' ends is needed.
        above: (images, elements), not negative; may be infinite.
        below: The same for negative d; default ``above``.
        rounds: Values of κ that are tried.
    """
    below = above if below is None else below
    norm = c.norm(dim=2)
    best, kappa = norm * radius, (norm / radius.clamp_min(1e-300)).clamp_max(1e150).detach()
    for _ in range(rounds):
        wide = kappa[..., None].clamp_min(1e-300)
        d = torch.minimum(torch.maximum((c / wide).detach(), -below), above)
        value = (c * d).sum(2) - kappa / 2 * d.square().sum(2) + kappa / 2 * radius.square()
        best = torch.minimum(best, value)
        kappa = (kappa * (d.norm(dim=2) / radius.clamp_min(1e-300))).clamp_max(1e150)
    return best
