"""Attacks of the Adversarial Robustness Toolbox (ART) on a PyTorch model that takes pixels in [0, 1].

Each attack has a threat model and a budget, and maps images and labels to adversarial images in the same order. Random starts
depend on torch's and numpy's global random states, which the caller seeds. No attack is trusted to stay inside its ball or to
return its best image: the harness of the evaluations enforces both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from art.attacks.evasion import AutoProjectedGradientDescent, CarliniL2Method, DeepFool, FastGradientMethod
from art.attacks.evasion import ProjectedGradientDescent as ArtPGD
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from robust_spectral.plugins.logit_scale import scale_free

_ORDER: dict[str, float | int] = {"l2": 2, "linf": np.inf}


class ScaleFreeCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of logits that are scaled as `scale_free` does."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean loss of logits (n, classes) with their target classes."""
        return F.cross_entropy(scale_free(input), target)


@dataclass(frozen=True)
class _ArtAttack:
    """An attack of ART, with the norm and size of its perturbation."""

    norm: str = "l2"
    eps: float = 0.5
    package: ClassVar[str] = "adversarial-robustness-toolbox"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (n, channels, height, width) in [0, 1] for images with labels (n,)."""
        with _current(images), torch.no_grad():
            classes = model(images[:1]).shape[1]
        device = "gpu" if images.is_cuda else "cpu"
        classifier = PyTorchClassifier(
            model, ScaleFreeCrossEntropy(), tuple(images.shape[1:]), classes, clip_values=(0.0, 1.0), device_type=device
        )
        with _current(images):
            found = self._attack(classifier, len(images)).generate(images.cpu().numpy(), labels.cpu().numpy())
        return torch.from_numpy(found).to(images)

    def _attack(self, classifier: PyTorchClassifier, batch: int) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class PGD(_ArtAttack):
    """Projected gradient descent (Madry et al. 2018): steps of 2.5 eps / steps from random starts."""

    steps: int = 40
    restarts: int = 1

    def _attack(self, classifier: PyTorchClassifier, batch: int) -> Any:
        return ArtPGD(
            classifier, norm=_ORDER[self.norm], eps=self.eps, eps_step=2.5 * self.eps / self.steps, max_iter=self.steps,
            num_random_init=self.restarts, batch_size=batch, verbose=False,
        )  # fmt: skip


@dataclass(frozen=True)
class APGD(_ArtAttack):
    """Auto-PGD on the cross-entropy (Croce and Hein 2020) as ART implements it, with a first step of 2 eps."""

    steps: int = 100
    restarts: int = 1

    def _attack(self, classifier: PyTorchClassifier, batch: int) -> Any:
        return AutoProjectedGradientDescent(
            classifier, norm=_ORDER[self.norm], eps=self.eps, eps_step=2 * self.eps, max_iter=self.steps,
            nb_random_init=self.restarts, batch_size=batch, loss_type="cross_entropy", verbose=False,
        )  # fmt: skip


@dataclass(frozen=True)
class FGSM(_ArtAttack):
    """One step of length eps along the gradient, or its sign (Goodfellow et al. 2015): a control, no measure of robustness."""

    def _attack(self, classifier: PyTorchClassifier, batch: int) -> Any:
        return FastGradientMethod(classifier, norm=_ORDER[self.norm], eps=self.eps, batch_size=batch)


@dataclass(frozen=True)
class CarliniWagner(_ArtAttack):
    """Carlini and Wagner's L2 attack (2017), which minimises the perturbation; only results within eps count.

    Raises:
        ValueError: the norm is not l2.
    """

    steps: int = 20
    searches: int = 9

    def __post_init__(self) -> None:
        if self.norm != "l2":
            raise ValueError(f"cw: is an attack in l2, not in {self.norm}; give norm l2, or another attack, such as apgd")

    def _attack(self, classifier: PyTorchClassifier, batch: int) -> Any:
        return CarliniL2Method(
            classifier, max_iter=self.steps, binary_search_steps=self.searches, batch_size=batch, verbose=False
        )


@dataclass(frozen=True)
class DeepFoolAttack(_ArtAttack):
    """DeepFool (Moosavi-Dezfooli et al. 2016): steps to linearised decision boundaries; only results within eps count."""

    steps: int = 50

    def _attack(self, classifier: PyTorchClassifier, batch: int) -> Any:
        return DeepFool(classifier, max_iter=self.steps, batch_size=batch, verbose=False)


@contextmanager
def _current(images: Tensor) -> Iterator[None]:
    """Make the images' GPU the current device, which ART uses for "gpu"."""
    if images.is_cuda:
        with torch.cuda.device(images.device):
            yield
    else:
        yield
