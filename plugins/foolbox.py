"""Attacks of Foolbox that search for the smallest perturbation, so that one run gives the robust accuracy at every size.

Foolbox needs GitPython for its model zoo, which raises an error where there is no git, and imports SciPy by a deprecated name.
Neither concerns the attacks. Foolbox sees scaled logits, from which the predictions are the same. Its L2 version of FMN
(3.3.4) projects onto no ball, because the factor is 1 for every radius; here it projects, inside the pixel box.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from robust_spectral.plugins.logit_scale import scale_free

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Please import", DeprecationWarning)
    from foolbox import PyTorchModel
    from foolbox.attacks import DDNAttack, L2FMNAttack, LInfFMNAttack


class _L2FMN(L2FMNAttack):
    """FMN of Foolbox, projected onto the part of the L2 ball inside the pixel box.

    Clipping to the box after the projection instead leaves perturbations shorter than their radius, and on images with many
    black pixels most of them then never reach the boundary.
    """

    def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
        """Move images x (n, channels, height, width) into the box and towards x0, to distances of at most epsilon (n,)."""
        delta = x.clip(0, 1) - x0
        factor = (epsilon / delta.flatten(1).norms.l2(axis=-1).maximum(1e-12)).minimum(1)
        return x0 + delta * factor.reshape((-1, *[1] * (x.ndim - 1)))


class _ScaleFree(nn.Module):
    """A model with its logits scaled, for attacks on the cross-entropy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return scale_free(self.model(x))


@dataclass(frozen=True)
class _MinimalNorm:
    """An attack of Foolbox without a limit on the size of its perturbation, which it minimises."""

    norm: str = "l2"
    eps: None = None
    package: ClassVar[str] = "foolbox"
    minimal: ClassVar[bool] = True

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (n, channels, height, width) in [0, 1]; the original image where none was found."""
        attacked = PyTorchModel(_ScaleFree(model).eval(), bounds=(0, 1), device=images.device)
        found: Tensor = self._attack().run(attacked, images, labels)
        return found.detach()

    def _attack(self) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class DDN(_MinimalNorm):
    """Decoupled direction and norm (Rony et al. 2019): steps along the gradient, and an L2 ball that shrinks at a success.

    Raises:
        ValueError: the norm is not l2.
    """

    steps: int = 100

    def __post_init__(self) -> None:
        if self.norm != "l2":
            raise ValueError(f"ddn: is an attack in l2, not in {self.norm}; give norm l2, or another attack, such as fmn")

    def _attack(self) -> Any:
        return DDNAttack(steps=self.steps)


@dataclass(frozen=True)
class FMN(_MinimalNorm):
    """Fast minimum norm (Pintor et al. 2021): a ball resized by a linear estimate of the boundary's distance; l2 or linf."""

    steps: int = 100

    def _attack(self) -> Any:
        kind = _L2FMN if self.norm == "l2" else LInfFMNAttack
        return kind(steps=self.steps)
