"""The losses of fine-tuning: cross-entropy for accuracy, and cross-entropy with margins for certified accuracy.

With K_yj the bound of the Lipschitz constant of z_y - z_j, the certified loss adds eps K_yj to the logit of every other class j
before the cross-entropy is taken, so that a small loss means that most images are certified at eps (Leino, Wang and Fredrikson
2021, Globally-Robust Neural Networks, whose extra class is a maximum over these scores; a temperature as in Prach and Lampert
2022). The constants enter without a gradient and are recomputed during training.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from robust_spectral import lipschitz_bound


class CrossEntropy:
    """Cross-entropy of the scaled logits.

    Args:
        logit_scale: The scale, an inverse temperature.
    """

    def __init__(self, logit_scale: float) -> None:
        self.logit_scale = logit_scale

    def renew(self, model: nn.Module, example: Tensor, progress: float) -> None:
        """Do nothing, because this loss does not depend on the model."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch.

        Raises:
            ValueError: the model gives one logit for an image, whose cross-entropy is 0.
        """
        _check_classes(logits)
        return F.cross_entropy(self.logit_scale * logits, labels)


class CertifiedCrossEntropy(CrossEntropy):
    """Cross-entropy with a head start for every other class, which grows over the first half of training.

    Args:
        logit_scale: Scale of the logits.
        eps: The L2 radius at which images are to be certified.
    """

    def __init__(self, logit_scale: float, eps: float) -> None:
        super().__init__(logit_scale)
        self.eps = eps
        self.head_start: Tensor | float = 0.0  # for each pair of classes, or one for all

    def renew(self, model: nn.Module, example: Tensor, progress: float) -> None:
        """Recompute the model's Lipschitz constants; ``progress`` is the share of training that is done.

        Raises:
            ValueError: no Lipschitz bound of the model is known.
        """
        bound = lipschitz_bound(model, example, box=None)
        if math.isinf(bound.value):
            raise ValueError(f"--objective certified: {bound.reason}")
        constants = math.sqrt(2) * bound.value if bound.pairs is None else bound.pairs.float().to(example.device)
        self.head_start = min(1.0, 2 * progress) * self.eps * constants

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch.

        Raises:
            ValueError: as `CrossEntropy`.
        """
        _check_classes(logits)
        start = self.head_start[labels] if isinstance(self.head_start, Tensor) else self.head_start
        return super().__call__(logits + start * (1 - F.one_hot(labels, logits.shape[1])), labels)


def _check_classes(logits: Tensor) -> None:
    if logits.shape[1] == 1:
        raise ValueError(
            "fine-tuning needs a logit for each class, and the model gives one for an image; give two classes or more"
        )
