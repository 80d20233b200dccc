"""The standardisation that ART applies to a classifier's images before its model, as a module in front of the model.

ART subtracts a mean and divides by a standard deviation, both rounded to float32, outside of the model. `preprocessed` puts the
same function in front of the model, so that bound, estimate and certified logits are all of one network, from the classifier's
arrays to its logits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.standardisation_mean_std.numpy import StandardisationMeanStd
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch
from art.preprocessing.standardisation_mean_std.utils import broadcastable_mean_std


class Standardised(torch.nn.Module):
    """A model preceded by the standardisation that ART applies to its images; mean and std broadcast against a batch."""

    def __init__(self, model: torch.nn.Module, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, torch.nn.Buffer(_float32(mean)), torch.nn.Buffer(_float32(std))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images in the classifier's units."""
        logits: torch.Tensor = self.model((images - self.mean) / self.std)
        return logits


def preprocessed(call: str, classifier: PyTorchClassifier) -> torch.nn.Module:
    """The classifier's model, preceded by the standardisations that ART applies before it to the images of a prediction.

    Raises:
        NotImplementedError: the classifier has other preprocessing, or postprocessing; the message names it.
    """
    model = classifier.model
    for mean, std in reversed(_standardisations(call, classifier)):
        model = Standardised(model, mean, std).to(classifier.device)
    return model


def standardising_gain(call: str, classifier: PyTorchClassifier) -> float:
    """Lipschitz constant, rounded up, of ART's preprocessing of images.

    Raises:
        NotImplementedError: as `preprocessed`.
    """
    gain = 1.0
    for _, std in _standardisations(call, classifier):
        gain = math.nextafter(gain / float(np.abs(std).min()), math.inf)
    return gain


def _standardisations(call: str, classifier: PyTorchClassifier) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of each standardisation that changes images, as ART broadcasts them, in ART's order."""
    if classifier.postprocessing_defences:
        raise _unknown(call, "postprocessing", classifier.postprocessing_defences[0])
    image, found = np.zeros((1, *classifier.input_shape)), []
    for operation in classifier.preprocessing_operations:
        if not isinstance(operation, StandardisationMeanStd | StandardisationMeanStdPyTorch):
            raise _unknown(call, "preprocessing", operation)
        mean, std = broadcastable_mean_std(image, operation.mean, operation.std)
        if operation.apply_predict and bool((mean != 0).any() or (std != 1).any()):
            found.append((mean, std))
    return found


def _unknown(call: str, place: str, operation: Any) -> NotImplementedError:
    kind = type(operation).__name__
    return NotImplementedError(f"{call}: no Lipschitz constant is known for the {place} {kind}; make the classifier without it")


def _float32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))


def example_of(classifier: PyTorchClassifier) -> torch.Tensor:
    """A batch of one zero image for the classifier's model, (1, ...)."""
    return torch.zeros(1, *classifier.input_shape, device=classifier.device)
