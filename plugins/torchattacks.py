"""Attacks of torchattacks, under separate names so that their results are not mistaken for those of other implementations.

The AutoAttack of torchattacks runs each part for 10 iterations, the authors' code for 100: it is named
``torchattacks-autoattack-10`` here, and ``torchattacks-autoattack-100`` is the same code with 100 iterations and at most nine
targets. Only the authors' own code is named ``autoattack``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torchattacks
from torch import Tensor, nn

_NORM = {"l2": "L2", "linf": "Linf"}


@dataclass(frozen=True)
class _TorchAttack:
    """An attack of torchattacks, with the norm and size of its perturbation."""

    norm: str = "l2"
    eps: float = 0.5
    package: ClassVar[str] = "torchattacks"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (n, channels, height, width) in [0, 1] for images with labels (n,)."""
        found: Tensor = self._attack(model, images)(images, labels)
        return found.detach()

    def _attack(self, model: nn.Module, images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class PGD(_TorchAttack):
    """Projected gradient descent of torchattacks, in l2 or linf, with steps of 2.5 eps / steps from a random start."""

    steps: int = 40

    def _attack(self, model: nn.Module, images: Tensor) -> Any:
        kind = torchattacks.PGDL2 if self.norm == "l2" else torchattacks.PGD
        return kind(model, eps=self.eps, alpha=2.5 * self.eps / self.steps, steps=self.steps, random_start=True)


@dataclass(frozen=True)
class CarliniWagner(_TorchAttack):
    """Carlini and Wagner's l2 attack in torchattacks, with one constant c; only results within eps count.

    Raises:
        ValueError: the norm is not l2.
    """

    c: float = 1.0
    steps: int = 50
    lr: float = 0.01

    def __post_init__(self) -> None:
        if self.norm != "l2":
            raise ValueError(f"torchattacks-cw: is an attack in l2, not in {self.norm}; give norm l2, or another attack")

    def _attack(self, model: nn.Module, images: Tensor) -> Any:
        return torchattacks.CW(model, c=self.c, steps=self.steps, lr=self.lr)


@dataclass(frozen=True)
class AutoAttack10(_TorchAttack):
    """AutoAttack of torchattacks with its own budget: 10 iterations per part, every class a target; at least four classes."""

    steps: ClassVar[int] = 10
    most_classes: ClassVar[int | None] = None

    def _attack(self, model: nn.Module, images: Tensor) -> Any:
        with torch.no_grad():
            classes = model(images[:1]).shape[1]
        if classes < 4:
            raise ValueError(f"torchattacks-autoattack: needs at least 4 classes, the model has {classes}")
        attack = torchattacks.AutoAttack(
            model, norm=_NORM[self.norm], eps=self.eps, n_classes=min(classes, self.most_classes or classes),
            seed=torch.initial_seed(),
        )  # fmt: skip
        for part in attack._autoattack.attacks[:3]:
            part.steps = self.steps
        return attack


@dataclass(frozen=True)
class AutoAttack100(AutoAttack10):
    """AutoAttack of torchattacks with the budget of the authors' code: 100 iterations per part, at most nine targets."""

    steps: ClassVar[int] = 100
    most_classes: ClassVar[int | None] = 10
