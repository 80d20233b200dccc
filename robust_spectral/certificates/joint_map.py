"""All that moves a node, as one linear map of unit size: the input's change and the errors, each divided by its largest norm.

With weights w_j of sum 1 and (δ, e_1, …) = (r u_0 / √w_0, ε_1 u_1 / √w_1, …), the changes with ‖δ‖ ≤ r and ‖e_j‖ ≤ ε_j have
‖(u_0, u_1, …)‖ ≤ 1, so that the norm of the map bounds any linear function of them, and the norm of a row an element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..operators import LinearOperator
from .linearised import Linearised, rows

Energy = Callable[[list[Any]], list[Tensor]]


class JointMap:
    """The map from (u_0, u_1, …) to a linear function of the changes of some nodes, by image.

    Args:
        linear: The linearised network.
        scales: The largest norm of the input's change and of each error, (images,), by node.
        sources: The nodes.
        energy: The function: takes their changes, (k, images, ...) each, and gives tensors.
        seed: Of the vector that the weights are balanced with.
    """

    def __init__(
        self, linear: Linearised, scales: dict[fx.Node, Tensor], sources: list[fx.Node], energy: Energy, seed: int
    ) -> None:
        self.linear, self.scales, self.sources, self.energy = linear, scales, sources, energy
        self.last = max(sources, key=linear.order.__getitem__)
        self.images, self.device = linear.images, linear.values[linear.graph.input].device
        self.shapes = {node: linear.values[node].shape for node in scales}
        self.counts = [shape.numel() // self.images for shape in self.shapes.values()]
        share = torch.full((self.images,), 1 / len(scales), dtype=torch.float64, device=self.device)
        self.weights = dict.fromkeys(scales, share)
        self._balance(seed)

    def forward(self, X: Tensor) -> Tensor:
        """(k, images, inputs and errors) -> (k, images, outputs)."""
        changes = {}
        for (node, shape), part in zip(self.shapes.items(), X.split(self.counts, dim=2), strict=True):
            changes[node] = (part * self._factor(node)).reshape(len(X), *shape)
        start = {self.linear.graph.input: changes.pop(self.linear.graph.input)}
        found = self.linear.push(start, self.last, changes)
        return self._joined([found.get(source) for source in self.sources])

    def adjoint(self, Y: Tensor) -> Tensor:
        """(k, images, outputs) -> (k, images, inputs and errors)."""
        with torch.enable_grad():
            given = [Y.new_zeros(len(Y), *self.linear.values[source].shape, requires_grad=True) for source in self.sources]
            cotangents = torch.autograd.grad(self._joined(given), given, Y)
        back, found = self.linear.pull(dict(zip(self.sources, cotangents, strict=True)))
        if back is not None:
            found[self.linear.graph.input] = back
        parts = [
            rows(found[node], self.images, 1) * self._factor(node) if node in found else Y.new_zeros(len(Y), self.images, count)
            for node, count in zip(self.shapes, self.counts, strict=True)
        ]
        return torch.cat(parts, 2)

    def operator(self) -> LinearOperator:
        """The map as an operator with a group for each image."""
        outputs = self.forward(torch.zeros(1, self.images, sum(self.counts), dtype=torch.float64, device=self.device))
        shapes = (self.images, sum(self.counts)), tuple(outputs.shape[1:])
        return LinearOperator(*shapes, torch.float64, self.device, self.forward, self.adjoint, groups=self.images)

    def _factor(self, node: fx.Node) -> Tensor:
        return (self.scales[node] / self.weights[node].sqrt())[:, None]

    def _joined(self, given: list[Any]) -> Tensor:
        return torch.cat([rows(part, self.images, 1) for part in self.energy(given)], 2)

    def _balance(self, seed: int, rounds: int = 2, steps: int = 4) -> None:
        """Move the weights towards the shares that the top singular vector has of the input and the errors."""
        if len(self.scales) == 1:
            return
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, self.images, sum(self.counts), generator=generator, dtype=torch.float64).to(self.device)
        for _ in range(rounds):
            for _ in range(steps):
                x = self.adjoint(self.forward(x / x.norm(dim=2, keepdim=True).clamp_min(1e-300)))
            shares = torch.stack([part.square().sum(2)[0] for part in x.split(self.counts, dim=2)])
            shares = shares / shares.sum(0).clamp_min(1e-300)
            kept = (torch.stack(list(self.weights.values())) * shares).sqrt() + 1e-3
            self.weights = dict(zip(self.scales, kept / kept.sum(0), strict=True))
