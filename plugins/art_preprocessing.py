"""The standardisation that ART applies to a classifier's images before its model, and its Lipschitz constant.

ART subtracts a mean and divides by a standard deviation. The Lipschitz constant of the classifier, in the units of its arrays,
is the product of this constant and the model's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.standardisation_mean_std.numpy import StandardisationMeanStd
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch


def standardisation(classifier: PyTorchClassifier) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation that ART standardises images with, in shapes that broadcast against images."""
    given = (getattr(classifier.preprocessing, name, default) for name, default in (("mean", 0.0), ("std", 1.0)))
    mean, std = (np.asarray(value, dtype=np.float64) for value in given)
    if classifier.channels_first and mean.ndim == 1 and len(classifier.input_shape) == 3:
        mean, std = (value.reshape(-1, 1, 1) for value in (mean, std))
    return mean, std


def standardising_gain(call: str, classifier: PyTorchClassifier) -> float:
    """Lipschitz constant, rounded up, of ART's preprocessing of images.

    Raises:
        NotImplementedError: the preprocessing is more than a standardisation, or there are postprocessing defences.
    """
    if classifier.preprocessing_defences or classifier.postprocessing_defences:
        raise NotImplementedError(f"{call}: no Lipschitz constant is known for pre- and postprocessing defences")
    known = classifier.preprocessing is None or isinstance(
        classifier.preprocessing, StandardisationMeanStd | StandardisationMeanStdPyTorch
    )
    if not known:
        kind = type(classifier.preprocessing).__name__
        raise NotImplementedError(f"{call}: no Lipschitz constant is known for the preprocessing {kind}")
    _, std = standardisation(classifier)
    return math.nextafter(1 / float(np.abs(std).min()), math.inf)


class Standardised(torch.nn.Module):
    """A model preceded by the standardisation that ART applies to its images."""

    def __init__(self, model: torch.nn.Module, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, torch.from_numpy(mean), torch.from_numpy(std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images in the classifier's units."""
        logits: torch.Tensor = self.model((images - self.mean.to(images)) / self.std.to(images))
        return logits


def example_of(classifier: PyTorchClassifier) -> torch.Tensor:
    """A batch of one zero image for the classifier's model, (1, ...)."""
    return torch.zeros(1, *classifier.input_shape, device=classifier.device)
