"""Lipschitz certificates as an ART estimator, and as an evaluation that compares them with ART's attacks."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from art.evaluations.evaluation import Evaluation
from art.evaluations.security_curve.security_curve import SecurityCurve
from art.metrics import clever_u, loss_sensitivity
from art.utils import check_and_transform_label_format

from robust_spectral import LipschitzBound, certified_radius, lipschitz_bound, lipschitz_estimate

from .art_preprocessing import Standardised, example_of, standardisation, standardising_gain


class LipschitzClassifier(PyTorchClassifier):
    """A ``PyTorchClassifier`` that certifies its predictions by a Lipschitz bound of its model.

    The standardisation that ART applies outside the model, ``preprocessing=(mean, std)``, is part of the bound; radii are in
    the units of the classifier's arrays.
    """

    def lipschitz_bound(self, failure_probability: float = 1e-9) -> LipschitzBound:
        """Proved bound from the classifier's input to its logits, ART's standardisation included.

        Raises:
            NotImplementedError: the classifier has pre- or postprocessing without a known Lipschitz constant.
        """
        gain = standardising_gain("LipschitzClassifier", self)
        mean, std = standardisation(self)
        low, high = (None, None) if self.clip_values is None else (np.asarray(v, dtype=np.float64) for v in self.clip_values)
        box, errors = None, None
        if low is not None and high is not None:
            ends = (low - mean) / std, (high - mean) / std
            box = float(np.minimum(*ends).min()) - 1e-6, float(np.maximum(*ends).max()) + 1e-6
            size = math.sqrt(math.prod(self.input_shape)) * float(
                np.max((np.abs([low, high]).max() + np.abs(mean)) / np.abs(std))
            )
            errors = {dtype: 4 * torch.finfo(dtype).eps * size for dtype in (torch.float32, torch.float64)}
        example = example_of(self) if box is None else example_of(self).clamp(*box)
        bound = lipschitz_bound(self.model, example, failure_probability, box)
        return bound.behind(gain, errors)

    def lipschitz_estimate(self, x: np.ndarray) -> float:
        """Largest Jacobian norm of the logits over images x (n, ...), with standardisation: a lower bound of the constant."""
        images = torch.from_numpy(x.astype(np.float32)).to(self.device)
        return lipschitz_estimate(Standardised(self.model, *standardisation(self)), images)

    def certify(self, x: np.ndarray, batch_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
        """Predicted classes and the L2 radii within which they provably do not change; -1 and 0 where nothing is proved.

        Both are for the forward pass in float64. Its rounding is accounted for where the classifier has ``clip_values``.

        Args:
            x: Images, (n, ...).
            batch_size: Images in a forward pass.

        Raises:
            ValueError: an image is not of the classifier's ``input_shape``.
        """
        x = np.asarray(x)
        if tuple(x.shape[1:]) != tuple(self.input_shape):
            raise ValueError(f"certify: takes a batch of images of shape {tuple(self.input_shape)}; got shape {tuple(x.shape)}")
        mean, std = standardisation(self)
        exact = copy.deepcopy(self.model).double().eval()
        parts = torch.from_numpy((x.astype(np.float64) - mean) / std).split(batch_size)
        with torch.no_grad():
            logits = torch.cat([exact(part.to(self.device)).cpu() for part in parts])
        prediction = logits.argmax(1)
        radius = certified_radius(logits, prediction, self.lipschitz_bound())
        return torch.where(radius > 0, prediction, -1).numpy(), radius.numpy()


class LipschitzReport(Evaluation):
    """Proved and attacked robustness of a classifier: bound, estimate, certified and attacked accuracy.

    Args:
        eps: L2 sizes of perturbation, in the units of the classifier's arrays.
        clever_samples: Number of first images whose CLEVER score, ART's estimate of the minimal perturbation, is computed.
    """

    def __init__(self, eps: Sequence[float], clever_samples: int = 0) -> None:
        self.eps, self.clever_samples = [float(e) for e in eps], clever_samples

    def evaluate(self, classifier: LipschitzClassifier, x: np.ndarray, y: np.ndarray, **pgd: Any) -> dict[str, Any]:
        """Evaluate on images (n, ...) with their labels, one-hot or indices.

        Args:
            classifier: The classifier.
            x: Images.
            y: Labels.
            **pgd: Options of ART's ``ProjectedGradientDescent``, the attack of `SecurityCurve`.

        Returns:
            dict: ``lipschitz_bound`` (proved, to the logits), ``lipschitz_estimate`` (sampled on these images, a lower bound),
            ``accuracy``, and by size of perturbation ``certified`` and ``attacked`` accuracies; ART's ``loss_sensitivity``
            and ``clever`` scores (one for each of the first images).

        Raises:
            TypeError: the classifier is not a `LipschitzClassifier`.
        """
        if not isinstance(classifier, LipschitzClassifier):
            kind = type(classifier).__name__
            raise TypeError(f"LipschitzReport.evaluate: takes a LipschitzClassifier, got {kind}; both take the same arguments")
        y = check_and_transform_label_format(y, nb_classes=classifier.nb_classes)
        prediction, radius = classifier.certify(x)
        _, attacked, accuracy = SecurityCurve(self.eps).evaluate(classifier, x, y, **{"norm": 2, "verbose": False} | pgd)
        right = prediction == y.argmax(1)
        return {
            "lipschitz_bound": classifier.lipschitz_bound().value,
            "lipschitz_estimate": classifier.lipschitz_estimate(x),
            "accuracy": float(accuracy),
            "certified": {eps: float((right & (radius >= eps)).mean()) for eps in self.eps},
            "attacked": dict(zip(self.eps, map(float, attacked), strict=True)),
            "loss_sensitivity": float(loss_sensitivity(classifier, x, y)),
            "clever": [clever_u(classifier, image, 10, 64, max(self.eps), norm=2, verbose=False)
                       for image in x[: self.clever_samples]],
        }  # fmt: skip
