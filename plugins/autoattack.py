"""AutoAttack (Croce and Hein 2020): the authors' own code, as packaged in pyautoattack, with its standard budget."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from pyautoattack import AutoAttack as Official
from torch import Tensor, nn

_NORM = {"l2": "L2", "linf": "Linf"}
_MOST_TARGETS = 9
_said: set[str] = set()


def _once(record: logging.LogRecord) -> bool:
    """Whether no message with this text, apart from numbers, was logged before."""
    text = re.sub(r"\d+", "", record.getMessage())
    new = text not in _said
    _said.add(text)
    return new


@dataclass(frozen=True)
class AutoAttack:
    """Standard version: APGD-CE, targeted APGD-DLR, targeted FAB and Square; 100 iterations, 9 targets, 5,000 queries.

    The loss of targeted APGD is not defined for fewer than four classes; then only the other three attacks run. The seed is
    `torch.initial_seed`, that of torch's global state. A warning is logged once in a process, not for every block of images.
    """

    norm: str = "l2"
    eps: float = 0.5
    package: ClassVar[str] = "pyautoattack"
    parts: ClassVar[tuple[str, ...]] = ("apgd-ce", "apgd-t", "fab-t", "square")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (n, channels, height, width) in [0, 1]; the original image where none was found."""
        with torch.no_grad():
            classes = model(images[:1]).shape[1]
        parts = [part for part in self.parts if part != "apgd-t" or classes >= 4] or ["apgd-ce"]
        attack = Official(
            model, norm=_NORM[self.norm], eps=self.eps, seed=torch.initial_seed(), version="standard", device=images.device
        )
        attack.attacks_to_run = parts
        self._set_budget(attack, classes)
        tracer = sys.gettrace()
        attack.logger.addFilter(_once)
        try:
            found, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
        finally:
            attack.logger.removeFilter(_once)
            sys.settrace(tracer)  # removed by a check in AutoAttack
        return found.detach()

    def _set_budget(self, attack: Official, classes: int) -> None:
        """Set the budget of the standard version, with no more targets than there are other classes."""
        for targeted in (attack.apgd_targeted, attack.fab):
            targeted.n_target_classes = min(_MOST_TARGETS, classes - 1)


@dataclass(frozen=True)
class Square(AutoAttack):
    """The random search of AutoAttack alone, without gradients (Andriushchenko et al. 2020)."""

    queries: int = 5000
    parts: ClassVar[tuple[str, ...]] = ("square",)

    def _set_budget(self, attack: Official, classes: int) -> None:
        attack.square.n_queries = self.queries


@dataclass(frozen=True)
class Gradients(AutoAttack):
    """The gradient attacks of AutoAttack at a fixed eps: APGD-CE, and targeted APGD-DLR from four classes on."""

    steps: int = 100
    targets: int = _MOST_TARGETS
    parts: ClassVar[tuple[str, ...]] = ("apgd-ce", "apgd-t")

    def _set_budget(self, attack: Official, classes: int) -> None:
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = self.steps
        attack.apgd_targeted.n_target_classes = min(self.targets, classes - 1)


@dataclass(frozen=True)
class TargetedGradients(Gradients):
    """Targeted APGD on the DLR loss alone; for fewer than four classes, where it is not defined, APGD on the cross-entropy."""

    parts: ClassVar[tuple[str, ...]] = ("apgd-t",)


@dataclass(frozen=True)
class FewTargets(TargetedGradients):
    """Targeted APGD with 50 steps towards each of three classes, a sixth of AutoAttack's budget."""

    steps: int = 50
    targets: int = 3
