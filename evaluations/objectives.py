"""What fine-tuning minimises: cross-entropy for accuracy, or for accuracy that is certified.

For certificates the loss asks for margins. With K_yj the bound of the Lipschitz constant of z_y - z_j, every other class j gets
a head start of eps K_yj before the cross-entropy is taken, so that a small loss means that most images are certified at eps
(Leino, Wang and Fredrikson 2021, Globally-Robust Neural Networks, whose extra class is a maximum over these scores; a
temperature as in Prach and Lampert 2022). The constants count as numbers, without a gradient, and are renewed as training goes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_spectral import lipschitz_bound


class CrossEntropy:
    """Cross-entropy of a multiple of the logits.

    Args:
        logit_scale: The multiple, an inverse temperature.
    """

    def __init__(self, logit_scale: float) -> None:
        self.logit_scale = logit_scale

    def renew(self, model: nn.Module, example: Tensor, progress: float) -> None:
        """Nothing depends on the model."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch."""
        return F.cross_entropy(self.logit_scale * logits, labels)


class CertifiedCrossEntropy(CrossEntropy):
    """The same after every other class has had a head start, which grows over the first half of training.

    Args:
        logit_scale: Multiple of the logits.
        eps: The L2 radius at which images are to be certified.
    """

    def __init__(self, logit_scale: float, eps: float) -> None:
        super().__init__(logit_scale)
        self.eps, self.head_start = eps, torch.zeros(())

    def renew(self, model: nn.Module, example: Tensor, progress: float) -> None:
        """Take the model's constants as they are now; ``progress`` is the share of training that is done.

        Raises:
            ValueError: no Lipschitz bound of the model is known.
        """
        bound = lipschitz_bound(model, example, box=None)
        if math.isinf(bound.value):
            raise ValueError(f"--objective certified: {bound.reason}")
        with torch.no_grad():
            classes = model(example).shape[1]
        constants = torch.full((classes, classes), math.sqrt(2) * bound.value) if bound.pairs is None else bound.pairs
        constants = constants.float().fill_diagonal_(0.0).to(example.device)
        self.head_start = min(1.0, 2 * progress) * self.eps * constants

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch."""
        return super().__call__(logits + self.head_start[labels], labels)
