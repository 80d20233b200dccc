"""How large a linear function of a network's changes can be, by one Lagrangian for the input's ball and all errors before it.

Let δ be the input's change and e_j the error of operation j, for which a rule gives |e_ji| ≤ |(G_j Δ)_i|, where the Δ are the
changes of its arguments, linear in δ and the earlier errors. For a linear function F of changes and any positive λ and D_ji,

    ‖F Δ‖² + Σ_ji D_ji (G_j Δ)_i² ≤ s² (λ ‖δ‖² + Σ_ji D_ji e_ji²)  for all δ, e    implies    ‖F Δ‖² ≤ s² λ r²

if s ≤ 1; otherwise (s² - 1) Σ D_ji e_ji² is added. The least s is the norm of a map: from δ and e_j, multiplied by the roots of
λ and D_j, to F Δ and to G_j Δ, multiplied by the roots of D_j. No proof is needed for λ and D: they are tuned, then fixed, and
s is bounded by Lanczos. For global sectors this is the condition of LipSDP (Fazlyab et al. 2019), without its matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..lipschitz import NoClaim
from ..operators import LinearOperator
from .energies import Energy as Energy
from .energies import Scaled, in_precision
from .linearised import Linearised, rows, zeros
from .supports import support

_AIM = 0.95  # of s², so that its bound is below 1
_NEAR = 1.03  # times the aim: near enough to stop
_BLOCK = 8  # vectors that follow the top singular space
_LEAST_ROUNDS, _MOST_ROUNDS = 14, 40
_FIRST_RATE, _LEAST_RATE, _DECAY = 0.5, 0.05, 0.9  # of the logarithms' steps; 0.5 is a whole step to equal shares
_SCALE_RATE = 0.5  # of the step to the aim
_LEAST_SHARE = 1e-2  # of the mean share: added to those of elements, so that none has none


@dataclass
class Term:
    """The input's change or an error: ‖e‖ ≤ size, and |e_i| at most what ``energy`` gives of the changes of ``sources``.

    Attributes:
        size: (images,).
        reach: Largest |e_i|, (images, elements); of the input, its size.
        log: Logarithm of the multiplier times size², (images, elements) or (images, 1).
        energy: None of the input, and of an error that only its size is known of.
        sources: The nodes whose changes ``energy`` takes.
    """

    size: Tensor
    reach: Tensor
    log: Tensor
    energy: Energy | None
    sources: list[fx.Node]

    def __post_init__(self) -> None:
        moves = (self.reach > 0) & (self.size[:, None] > 0)  # where an error is 0, its energy is left out
        self.moves = moves.to(self.reach)
        self.places = moves.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(moves.sum(1).max())]
        self.reach_there = self.reach.gather(1, self.places)
        self._factors: tuple[Tensor, Tensor, Tensor] | None = None  # logarithms, and the factors that these give

    def cast(self, dtype: torch.dtype) -> Term:
        """The same in another precision."""
        energy = None if self.energy is None else in_precision(self.energy, dtype)
        return Term(self.size.to(dtype), self.reach.to(dtype), self.log.to(dtype), energy, self.sources)

    def support(self, c: Tensor) -> Tensor:
        """The largest value of functionals of it, (k, images, elements)."""
        return support(c.gather(2, self.places.expand(len(c), -1, -1)), self.size, self.reach_there)

    @property
    def fixed(self) -> bool:
        """Whether the energy is no function of changes: a part of the budget."""
        return self.energy is None

    @property
    def scale(self) -> Tensor:
        """The change that an input of the map at 1 stands for."""
        return self._scale_and_weight()[0]

    @property
    def weight(self) -> Tensor:
        """The factor of what ``energy`` gives, (images, elements) or (images, 1)."""
        return self._scale_and_weight()[1]

    def _scale_and_weight(self) -> tuple[Tensor, Tensor]:
        if self._factors is None or self._factors[0] is not self.log:
            root, size = (self.log / 2).exp(), self.size[:, None]
            moves = self.moves if self.log.shape[1] > 1 else self.moves.amax(1, keepdim=True)
            least = torch.finfo(size.dtype).tiny
            self._factors = self.log, size * self.moves / root, moves * root / size.clamp_min(least)
        return self._factors[1:]

    def slack(self, factor: Tensor) -> Tensor:
        """A bound of factor × Σ D_i e_i², (images,)."""
        numbers = self.log.exp() * factor.clamp_min(0)[:, None]
        share = self.moves * (self.reach / self.size.clamp_min(1e-300)[:, None]).clamp_max(1.0).square()
        by_element = (numbers * share).sum(1) if numbers.shape[1] > 1 else numbers[:, 0]
        return torch.minimum(by_element, numbers.amax(1)) * (1 + 1e-9)

    def equalise(self, given: Tensor, met: Tensor, rate: float) -> None:
        """Move the logarithms towards equal shares of the map's inputs and of what ``energy`` gives.

        Args:
            given: Shares of the inputs, (images, elements).
            met: Shares of the outputs, (images, outputs).
            rate: Of the step; at 0.5 it is a whole one.
        """
        if self.log.shape[1] > 1:
            met = met.reshape(len(met), -1, given.shape[1]).sum(1)
        else:
            met, given = met.sum(1, keepdim=True), given.sum(1, keepdim=True)
        least = _LEAST_SHARE * (given.mean(1, keepdim=True) + met.mean(1, keepdim=True)) + 1e-30
        self.log = self.log + (rate * ((given + least) / (met + least)).log()).clamp(-1, 1)


class JointMap:
    """The map whose norm bounds a linear function of the changes of some nodes, by image.

    Args:
        linear: The linearised network.
        terms: The input's change and the errors before the nodes, by node.
        sources: The nodes.
        energy: The function: takes their changes, (k, images, ...) each, and gives tensors.
        seed: Of the vectors that the multipliers are tuned with.
    """

    def __init__(
        self, linear: Linearised, terms: dict[fx.Node, Term], sources: list[fx.Node], energy: Energy, seed: int
    ) -> None:
        self.linear, self.terms, self.sources, self.energy, self.seed = linear, terms, sources, energy, seed
        self.last = max(sources, key=linear.order.__getitem__)
        self.images, self.device = linear.images, linear.values[linear.graph.input].device
        self.dtype = linear.values[linear.graph.input].dtype
        self.shapes = {node: linear.values[node].shape for node in terms}
        self.counts = [shape.numel() // self.images for shape in self.shapes.values()]
        self.given = sum(self.counts)
        nothing = torch.zeros(1, self.images, self.given, dtype=self.dtype, device=self.device)
        self.sizes = [part.shape[2] for part in self.parts(nothing)]

    def _energies(self) -> Iterator[tuple[list[fx.Node], Energy, Tensor | None]]:
        """The function and those of the errors: of which changes, and by which factor."""
        yield self.sources, self.energy, None
        for term in self.terms.values():
            if term.energy is not None:
                yield term.sources, term.energy, term.weight

    def parts(self, X: Tensor) -> list[Tensor]:
        """(k, images, given) -> the function and the energies of the errors, (k, images, elements) each."""
        changes = {}
        for (node, shape), part in zip(self.shapes.items(), X.split(self.counts, dim=2), strict=True):
            changes[node] = (part * self.terms[node].scale).reshape(len(X), *shape)
        start = {self.linear.graph.input: changes.pop(self.linear.graph.input)}
        found = self.linear.push(start, self.last, changes)
        return [
            self._joined(energy, [self._change(found, source, len(X)) for source in sources], weight)
            for sources, energy, weight in self._energies()
        ]

    def _change(self, found: dict[fx.Node, Any], source: fx.Node, count: int) -> Any:
        change = found.get(source)
        return zeros(self.linear.values[source], count) if change is None else change

    def forward(self, X: Tensor) -> Tensor:
        """(k, images, given) -> (k, images, outputs)."""
        return torch.cat(self.parts(X), 2)

    def adjoint(self, Y: Tensor) -> Tensor:
        """(k, images, outputs) -> (k, images, given)."""
        cotangents: dict[fx.Node, Tensor] = {}
        for (sources, energy, weight), y in zip(self._energies(), Y.split(self.sizes, dim=2), strict=True):
            found: Sequence[Any]
            if isinstance(energy, Scaled):
                y = y if weight is None else y * weight
                found = energy([y.reshape(len(y), *self.linear.values[sources[0]].shape)])
            else:
                with torch.enable_grad():
                    given = [zeros(self.linear.values[source], len(y)).requires_grad_() for source in sources]
                    found = torch.autograd.grad(self._joined(energy, given, weight), given, y)
            for source, part in zip(sources, found, strict=True):
                cotangents[source] = cotangents[source] + part if source in cotangents else part
        back, seen = self.linear.pull(cotangents)
        if back is not None:
            seen[self.linear.graph.input] = back
        parts = [
            rows(seen[node], self.images, 1) * term.scale if node in seen else Y.new_zeros(len(Y), self.images, count)
            for (node, term), count in zip(self.terms.items(), self.counts, strict=True)
        ]
        return torch.cat(parts, 2)

    def cast(self, linear: Linearised) -> JointMap:
        """The same map of the network in another precision."""
        dtype = linear.values[linear.graph.input].dtype
        terms = {node: term.cast(dtype) for node, term in self.terms.items()}
        return JointMap(linear, terms, self.sources, in_precision(self.energy, dtype), self.seed)

    def _joined(self, energy: Energy, given: list[Any], weight: Tensor | None) -> Tensor:
        parts = [rows(part, self.images, 1).to(self.dtype) for part in energy(given)]
        if weight is not None:
            parts = [(part.unflatten(2, (-1, weight.shape[1])) * weight[:, None]).flatten(2) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def operator(self) -> LinearOperator:
        """The map as an operator with a group for each image."""
        shapes = (self.images, self.given), (self.images, sum(self.sizes))
        return LinearOperator(*shapes, self.dtype, self.device, self.forward, self.adjoint, groups=self.images)

    def bound(self, s: Tensor) -> Tensor:
        """A bound of the function's norm from one of the map's, (images,)."""
        square = s.square() * (1 + 1e-12)
        total = torch.zeros_like(s)
        for term in self.terms.values():
            total = total + (square * term.log.exp().amax(1) if term.fixed else term.slack(square - 1))
        return total.sqrt() * (1 + 1e-12)

    def tune_by(self, linear: Linearised, near: bool = False) -> None:
        """Tune with the network in another precision where that works; arguments as of `tune`."""
        try:
            other = self.cast(linear)
            other.tune(near)
            found = {node: term.log.to(self.dtype) for node, term in other.terms.items()}
        except (NoClaim, RuntimeError):  # numbers too large, or an operation that casts
            self.tune(near)
            return
        for node, log in found.items():
            self.terms[node].log = log

    def tune(self, near: bool = False) -> None:
        """Move the multipliers towards those with the least bound.

        There each element of an error has the same share of the top singular vectors on both sides of the map. A round is one
        step of a power iteration, and one step of each multiplier.

        Args:
            near: Whether they are nearly there, such as those of a similar radius.
        """
        least, first = (_LEAST_ROUNDS // 3, _FIRST_RATE / 3) if near else (_LEAST_ROUNDS, _FIRST_RATE)
        generator = torch.Generator().manual_seed(self.seed)
        X = torch.randn(_BLOCK, self.images, self.given, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        self.fit_scale(X)
        settled = 0
        for done in range(_MOST_ROUNDS):
            X = torch.linalg.qr(X.permute(1, 2, 0)).Q.permute(2, 0, 1)
            Y = self.forward(X)
            gram = torch.einsum("kid,lid->ikl", Y, Y)
            if not bool(torch.isfinite(gram).all()):
                raise NoClaim("bounds around the images overflow")
            top = torch.linalg.eigvalsh(gram.double())[:, -1].to(X).clamp_min(torch.finfo(X.dtype).tiny)
            settled = settled + 1 if bool((top <= _AIM * _NEAR).all()) else 0
            if done >= least and settled >= 3:
                break
            X, rate = self.adjoint(Y), max(_LEAST_RATE, first * _DECAY**done)
            self._step(self._shares(X, self.counts), self._shares(Y, self.sizes), top, rate)

    @staticmethod
    def _shares(vectors: Tensor, counts: list[int]) -> list[Tensor]:
        squares = vectors.square().sum(0)
        return list((squares / squares.sum(1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)).split(counts, dim=1))

    def _step(self, ins: list[Tensor], outs: list[Tensor], top: Tensor, rate: float) -> None:
        """Change the multipliers by the elements' shares of the map's inputs and outputs, and its largest squared norm."""
        budget = [(term, part.sum(1)) for term, part in zip(self.terms.values(), ins, strict=True) if term.fixed]
        share = sum((part for _, part in budget), torch.zeros_like(top))
        total = sum((term.log[:, 0].exp() for term, _ in budget), torch.zeros_like(top))
        rise = _SCALE_RATE * (top / _AIM).log() / share.clamp_min(0.2)
        for term, part in budget:
            wanted = (part / share.clamp_min(1e-30) * total).clamp_min(1e-6 * total).log()
            term.log = term.log + (2 * rate * (wanted - term.log[:, 0]) + rise).clamp(-1, 1)[:, None]
        energies = iter(outs[1:])
        for term, given in zip(self.terms.values(), ins, strict=True):
            if term.fixed:
                continue
            term.equalise(given, next(energies), rate)

    def fit_scale(self, X: Tensor) -> None:
        """Add to all logarithms what makes the function alone as large as is aimed at."""
        for _ in range(3):
            Y = self.parts(X / X.norm(dim=2, keepdim=True).clamp_min(torch.finfo(X.dtype).tiny))
            alone = torch.cat([Y[0], *(torch.zeros_like(part) for part in Y[1:])], 2)
            X = self.adjoint(alone)
        size = Y[0].norm(dim=2).amax(0)
        size = torch.where(size > 1e-100, (size.clamp_min(1e-100).square() * 2).log(), 0.0)[:, None]
        for term in self.terms.values():
            term.log = term.log + size
