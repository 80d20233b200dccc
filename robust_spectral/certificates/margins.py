"""Lower bounds of a network's margins around images, by a walk back through the linearised network.

Let c be a functional of the output, such as the difference of two logits. The adjoint of the linearised network gives the
functional v of the input and the c_k of the errors with ⟨c, Δ output⟩ = ⟨v, Δ⟩ + Σ_k ⟨c_k, e_k⟩. At an elementwise operation
any slopes g_k may take the place of S: ⟨c_k, Δy⟩ = ⟨g_k, Δz⟩ + h_k, where for any λ, κ ≥ 0, with ‖Δz‖ ≤ ρ and ‖e‖ ≤ ε,

    h_k ≥ Σ_i min (c Δy - g Δz + ½ λ Δz² + ½ κ e²) - ½ λ ρ² - ½ κ ε²,

the minimum being over the graph of the operation, element by element, in its box. Whatever slopes and multipliers are chosen,
the sum is a bound; they are improved by gradient steps (ball: Chiu et al. 2025, SDP-CROWN, Theorem 4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .errors import LocalError
from .linearised import rows
from .local_walk import MOST_NUMBERS, LocalWalk
from .supports import support

_LEAST = 1e-12
_PAIR = math.sqrt(2) * (1 + 1e-9)  # the norm of a difference of two elements, as a functional


def least_margins(
    walk: LocalWalk, node: fx.Node, margins: Tensor, labels: Tensor, others: Tensor, steps: int, until: float
) -> Tensor:
    """A lower bound of each image's smallest margin, (images,).

    Classes are taken by their margins at the image, as many at once as fit. No element of the output's change exceeds its norm,
    so that classes whose margin exceeds the bound found so far by √2 of that cannot lower it.

    Args:
        walk: The bounds of all changes up to the node.
        node: The network's output, (images, classes).
        margins: Of the true class to the others at the images, (images, classes - 1).
        labels: (images,).
        others: The other classes, (images, classes - 1).
        steps: Gradient steps for each class.
        until: The steps end where all bounds exceed this number.
    """
    classes = torch.eye(margins.shape[1] + 1, dtype=margins.dtype, device=margins.device)
    margins, order = margins.sort(dim=1)
    others = others.gather(1, order)
    some = max(1, int(MOST_NUMBERS / walk.linear.numbers(node)))
    found = torch.full_like(walk.radii, torch.inf)
    for i in range(0, margins.shape[1], some):
        if i and bool((margins[:, i] - _PAIR * walk.ball(node) >= found).all()):
            break
        functionals = (classes[labels][:, None] - classes[others[:, i : i + some]]).transpose(0, 1)
        part = Margins(walk, node, functionals, margins[:, i : i + some].mT).improve(steps, until=until)
        found = torch.minimum(found, part.amin(0).nan_to_num(nan=-torch.inf))
    return found


@dataclass
class _Choice:
    """The free numbers of an elementwise operation: slopes (k, images, ...), and the logarithms of λ and κ (k, images)."""

    slope: Tensor
    ball: Tensor
    energy: Tensor


class Margins:
    """The margins of several functionals for each image.

    Args:
        walk: The bounds of all changes up to the node.
        node: A node, such as the network's output.
        functionals: (k, images, elements), each of the node's value.
        centre: (k, images), what is added to their changes.
    """

    def __init__(self, walk: LocalWalk, node: fx.Node, functionals: Tensor, centre: Tensor) -> None:
        self.walk, self.functionals, self.output, self.centre = walk, functionals, node, centre
        v, seen = self._pull(None)
        norm = v.norm(dim=2)
        self.best = (
            self.centre
            - support(-v, walk.radii, *self._span())
            - sum(
                (walk.terms[n].support(rows(c, walk.images, 1)) for n, c in seen.items() if n in walk.terms),
                torch.zeros_like(self.centre),
            )
        )
        self.input = (norm / walk.radii).clamp_min(_LEAST).log()
        self.choices: dict[fx.Node, _Choice] = {}
        for node, c in seen.items():
            slope = walk.linear.slopes[node]
            if node in walk.terms and isinstance(slope, Tensor):
                size = rows(c, walk.images, 1).norm(dim=2)
                ball, energy = (size / bound.clamp_min(1e-30) for bound in (self._ball(node) * 100, walk.sizes[node]))
                self.choices[node] = _Choice(
                    slope.expand_as(c).clone(), ball.clamp_min(_LEAST).log(), energy.clamp_min(_LEAST).log()
                )

    def _ball(self, node: fx.Node) -> Tensor:
        """A bound of ‖Δz‖: of a dense layer, whose elements rarely move their farthest together, by a map of its own."""
        source = self.walk.linear.sources[node][0]
        return self.walk.ball(source, tuned=self.walk.env[source].ndim == 2)

    def _span(self) -> tuple[Tensor, Tensor]:
        low, high = (rows(end, self.walk.images) for end in self.walk.span)
        return high, -low

    def _pull(self, slopes: dict[fx.Node, Tensor] | None) -> tuple[Tensor, dict[fx.Node, Tensor]]:
        shape = self.walk.env[self.output].shape
        v, seen = self.walk.linear.pull({self.output: self.functionals.reshape(-1, *shape)}, slopes)
        x = self.walk.env[self.walk.graph.input]
        return rows(x.new_zeros(len(self.functionals), *x.shape) if v is None else v, self.walk.images, 1), seen

    def improve(self, steps: int, rate: float = 0.1, until: float = 0.0) -> Tensor:
        """Take gradient steps until all bounds exceed ``until``; returns the best bounds, (k, images)."""
        tensors = [self.input, *(t for c in self.choices.values() for t in (c.slope, c.ball, c.energy))]
        for tensor in tensors:
            tensor.requires_grad_()
        optimizer = torch.optim.Adam(tensors, lr=rate, betas=(0.9, 0.99))
        for step in range(steps):
            if bool((self.best > until).all()):
                break
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps) + 1e-3
            with torch.enable_grad():
                value = self.value()
                optimizer.zero_grad()
                (-value.sum()).backward()
            self.best = torch.maximum(self.best, value.detach().nan_to_num(nan=-torch.inf))
            optimizer.step()
        return self.best

    def value(self) -> Tensor:
        """The bounds for the present choices, (k, images)."""
        walk = self.walk
        v, seen = self._pull({node: choice.slope for node, choice in self.choices.items()})
        kappa = self.input.exp()
        low, high = (rows(end, walk.images) for end in walk.span)
        d = torch.minimum(torch.maximum((-v / kappa[..., None]).detach(), low), high)
        total = self.centre + (v * d).sum(2) + kappa / 2 * d.square().sum(2) - kappa / 2 * walk.radii.square()
        for node, c in seen.items():
            if node not in walk.terms:
                continue
            choice, error = self.choices.get(node), walk.errors[node]
            if choice is None:
                total = total - walk.terms[node].support(rows(c, walk.images, 1))
                continue
            lam, kap, slope = choice.ball.exp(), choice.energy.exp(), walk.linear.slopes[node]
            assert isinstance(slope, Tensor)
            least = lowest(error, slope, c, choice.slope * c, _wide(lam, c), _wide(kap, c))
            total = total + rows(least, walk.images, 1).sum(2)
            total = total - lam / 2 * self._ball(node).square() - kap / 2 * walk.sizes[node].square()
        return total


def _wide(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers by vector and image, (k, images), for the elements of a tensor, (k, images times some, ...)."""
    repeated = numbers.repeat_interleave(like.shape[1] // numbers.shape[1], 1)
    return repeated.reshape(*repeated.shape, *[1] * (like.ndim - 2))


def lowest(error: LocalError, slope: Tensor, c: Tensor, g: Tensor, lam: Tensor, kap: Tensor) -> Tensor:
    """min (c Δy - g Δz + ½ λ Δz² + ½ κ e²) for each element, over the graph of the operation in its box."""
    graph = error.pieces
    assert graph is not None
    found: list[Tensor] = []
    if not graph.sector:
        for i, (steep, offset) in enumerate(zip(graph.slopes, graph.offsets, strict=True)):
            tilt = steep - slope
            found.append(_quadratic(
                c * offset + kap / 2 * offset.square(), c * steep - g + kap * tilt * offset, lam + kap * tilt.square(),
                graph.ends[i], graph.ends[i + 1],
            ))  # fmt: skip
        return torch.stack(found).amin(0)
    half, tilt = graph.slopes[0], c * slope - g
    for sign, end in ((1.0, graph.ends[1]), (-1.0, -graph.ends[0])):
        turn = (c.abs() / (kap * half).clamp_min(1e-300)).detach()
        split = torch.minimum(turn, end)
        found.append(
            _quadratic(0.0 * c, sign * tilt - c.abs() * half, lam + kap * half.square(), torch.zeros_like(split), split)
        )
        rest = _quadratic(-c.square() / (2 * kap), sign * tilt, lam + 0 * c, split, end)
        found.append(torch.where(turn < end, rest, torch.inf))
    return torch.stack(found).amin(0)


def _quadratic(constant: Tensor, linear: Tensor, square: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """min over [low, high] of constant + linear Δ + ½ square Δ²."""
    with torch.no_grad():
        at = torch.where(square > 1e-200, -linear / square.clamp_min(1e-200), torch.where(linear > 0, -torch.inf, torch.inf))
        at = torch.minimum(torch.maximum(at, low), high)
    return constant + linear * at + square / 2 * at.square()
