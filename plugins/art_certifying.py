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
from robust_spectral.certificates import largest_radii
from robust_spectral.lipschitz import ESTIMATE_ROUNDING, disagreement
from robust_spectral.user_warnings import warn_user

from .art_preprocessing import example_of, preprocessed

_COMPARED = 16  # number of images on which the bound's graph is compared with the model


class LipschitzClassifier(PyTorchClassifier):
    """A ``PyTorchClassifier`` that certifies its predictions by a Lipschitz bound of its model.

    Bound, estimate and certificates are of one network, from the classifier's arrays to its logits: the model behind the
    standardisation ``preprocessing=(mean, std)``, which ART applies outside of it. Radii are in the units of the arrays.
    """

    def lipschitz_bound(self, failure_probability: float = 1e-9) -> LipschitzBound:
        """Proved bound from the classifier's input to its logits, ART's standardisation included.

        Its box is that of ``clip_values``, enlarged by the rounding of its ends to float32.

        Raises:
            NotImplementedError: the classifier has pre- or postprocessing without a known Lipschitz constant.
        """
        network, box = preprocessed("LipschitzClassifier", self), self._box()
        example = example_of(self) if box is None else example_of(self).clamp(*box)
        return lipschitz_bound(network, example, failure_probability, box)

    def lipschitz_estimate(self, x: np.ndarray) -> float:
        """Largest Jacobian norm of the logits over images x (n, ...), with standardisation: a lower bound of the constant."""
        images = self._images("lipschitz_estimate", x).float().to(self.device)
        return lipschitz_estimate(preprocessed("LipschitzClassifier", self), images)

    def certify(self, x: np.ndarray, batch_size: int = 32, local: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Predicted classes and the L2 radii within which they provably do not change; -1 and 0 where nothing is proved.

        Both are for the network in float64: a float64 copy of the model behind ART's standardisation. (``predict`` computes in
        float32, whose rounding may change a class inside a radius.) With ``clip_values``, the radii account for rounding, and
        hold for images inside ``clip_values``. A model with one logit predicts class 1 where it is positive, else class 0.

        Args:
            x: Images, (n, ...), within ``clip_values``.
            batch_size: Images in a forward pass.
            local: Also prove a radius around each image (`robust_spectral.local_radius`), and return the larger one. Such a
                radius is of the same network, holds for perturbed images inside ``clip_values`` if there are any, fails with a
                probability of at most 1e-9, and takes seconds to minutes an image. If none can be proved for the network, there
                is a warning with the reason, and the radii are those of the Lipschitz bound.

        Returns:
            tuple[np.ndarray, np.ndarray]: The classes, (n,) int64, and the radii, (n,) float64, in the units of x.

        Raises:
            TypeError: x is no array of numbers.
            ValueError: an image is not of the classifier's ``input_shape`` or has values outside ``clip_values``, or the model
                does not give logits: one for each class, or one for two classes (not with ``local``).
            NotImplementedError: as `lipschitz_bound`.
        """
        return self._certify(x, self.lipschitz_bound(), batch_size, local)

    def _certify(
        self, x: Any, bound: LipschitzBound, batch_size: int = 32, local: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        images = self._images("certify", x)
        self._check_range(images)
        exact = copy.deepcopy(preprocessed("LipschitzClassifier", self)).double().eval()
        if not len(images):
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        with torch.no_grad():
            logits = torch.cat([self._logits(exact(part.to(self.device))) for part in images.split(batch_size)])
        prediction = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
        radius = certified_radius(logits, prediction, bound)
        if local and logits.shape[1] == 1:
            raise ValueError(
                "certify(local=True): the model gives one logit, and radii around images need one for each class; give a model "
                "with two, such as torch.cat([-z, z], 1) / 2, or local=False"
            )
        if local:
            radius = torch.maximum(radius, self._local_radius(exact, images, prediction))
        return torch.where(radius > 0, prediction, -1).numpy(), radius.numpy()

    def _local_radius(self, network: torch.nn.Module, images: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """The radii proved around images (n, ...) for a network in float64, on the CPU; a warning if there are none."""
        found = largest_radii(network.cpu(), images, prediction, self._box())
        if found.reason is not None and not bool(found.local.any()):
            warn_user(
                f"certify(local=True): nothing is proved around images, radii are those of the Lipschitz bound: {found.reason}"
            )
        return found.radii

    def refutation(self, x: np.ndarray, bound: LipschitzBound | None = None) -> str | None:
        """A sentence if images refute the bound or its graph, so that no certificate is valid; else None.

        The largest Jacobian norm, sampled in float32, must be at most 1.001 times the bound, and the graph that the bound was
        computed from must give the logits of the model.

        Args:
            x: Images, (n, ...).
            bound: The result of `lipschitz_bound`; default: it is computed.
        """
        bound = self.lipschitz_bound() if bound is None else bound
        box, network = self._box(), preprocessed("LipschitzClassifier", self)
        images = self._images("refutation", x).float().to(self.device)
        inside = box is not None and bool(((images >= box[0]) & (images <= box[1])).all())
        proved = min(bound.value, bound.local) if inside else bound.value
        if math.isinf(proved):
            return None  # nothing is certified
        sampled = lipschitz_estimate(network, images)
        if sampled > (1 + ESTIMATE_ROUNDING) * proved:
            return f"a sampled Jacobian norm, {sampled:.4g}, is above the proved bound, {proved:.4g}"
        rounding = 2 * bound.errors.get(images.dtype, math.inf) if inside else math.inf
        return disagreement(network, images[:_COMPARED], rounding)

    def _box(self) -> tuple[float, float] | None:
        """The range of ``clip_values``, which ART rounds to float32, one float32 further out at each end."""
        if self.clip_values is None:
            return None
        low, high = (np.asarray(value, dtype=np.float32) for value in self.clip_values)
        ends = np.nextafter(low.min(), np.float32(-np.inf)), np.nextafter(high.max(), np.float32(np.inf))
        return float(ends[0]), float(ends[1])

    def _images(self, call: str, x: Any) -> torch.Tensor:
        """A batch of images in float64; errors begin with ``call``."""
        given = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x
        shape, batch = tuple(self.input_shape), f"(n, {', '.join(map(str, self.input_shape))})"
        if not isinstance(given, np.ndarray) or given.dtype.kind not in "biuf":
            kind = f"an array of {given.dtype}" if isinstance(given, np.ndarray) else type(x).__name__
            raise TypeError(f"{call}: takes an array of images {batch}, got {kind}; give one numpy array of numbers")
        if given.shape[1:] != shape:
            advice = "one image: give x[None]" if given.shape == shape else "images of another size: input_shape differs"
            raise ValueError(f"{call}: takes a batch of images {batch}; got {given.shape}, {advice}")
        return torch.from_numpy(given.astype(np.float64))

    def _check_range(self, images: torch.Tensor) -> None:
        box = self._box()
        if box is not None and not bool(((images >= box[0]) & (images <= box[1])).all()):
            low, high = (np.asarray(ends) for ends in self.clip_values)
            raise ValueError(
                f"certify: images have values from {float(images.min()):g} to {float(images.max()):g}, clip_values are from "
                f"{low.min():g} to {high.max():g}, and radii are proved only for images inside; scale the images, or give the "
                "classifier their range"
            )

    def _logits(self, outputs: Any) -> torch.Tensor:
        """The model's output as logits (n, classes) on the CPU, or (n, 1) for two classes."""
        if not isinstance(outputs, torch.Tensor) or outputs.ndim not in (1, 2):
            kind = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise ValueError(
                f"certify: the model gives {kind}; make the classifier with a model that gives logits, (n, classes)"
            )
        logits = outputs.cpu().reshape(len(outputs), -1)
        if logits.shape[1] == 1 and self.nb_classes != 2:
            raise ValueError(
                f"certify: the model gives one logit, nb_classes is {self.nb_classes}; one logit distinguishes two classes only"
            )
        if logits.shape[1] == 1 and isinstance(self.loss, torch.nn.BCELoss):
            raise ValueError(
                "certify: a model for BCELoss gives probabilities, whose classes are separated at 0.5; remove its sigmoid, and "
                "make the classifier with BCEWithLogitsLoss"
            )
        return logits


class LipschitzReport(Evaluation):
    """Proved and attacked robustness of a classifier: bound, estimate, certified and attacked accuracy.

    Args:
        eps: L2 sizes of perturbation, in the units of the classifier's arrays.
        clever_samples: Number of first images whose CLEVER score, ART's estimate of the minimal perturbation, is computed.
        local: Certify also by radii around each image, as `LipschitzClassifier.certify` does; seconds to minutes an image.
    """

    def __init__(self, eps: Sequence[float], clever_samples: int = 0, local: bool = False) -> None:
        self.eps, self.clever_samples, self.local = [float(e) for e in eps], clever_samples, local

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
            and ``clever`` scores (one for each of the first images); and ``refuted``, None, or why these images refute the
            bound (there is a warning, the bound is then infinite, and nothing is certified).

        Raises:
            TypeError: the classifier is not a `LipschitzClassifier`.
            ValueError: the model gives one logit only, which ART's attacks do not know.
        """
        if not isinstance(classifier, LipschitzClassifier):
            kind = type(classifier).__name__
            raise TypeError(f"LipschitzReport.evaluate: takes a LipschitzClassifier, got {kind}; both take the same arguments")
        y = check_and_transform_label_format(y, nb_classes=classifier.nb_classes)
        if classifier.predict(x[:1]).shape[1] == 1:
            raise ValueError(
                "LipschitzReport.evaluate: the model gives one logit, and ART's attacks need one for each class; give a model "
                "with two, such as torch.cat([-z, z], 1) / 2"
            )
        bound = classifier.lipschitz_bound()
        if (refuted := classifier.refutation(x, bound)) is not None:
            warn_user(f"LipschitzReport.evaluate: nothing is certified: {refuted}")
            bound = LipschitzBound(math.inf, reason=refuted)
        prediction, radius = classifier._certify(x, bound, local=self.local and refuted is None)
        _, attacked, accuracy = SecurityCurve(self.eps).evaluate(classifier, x, y, **{"norm": 2, "verbose": False} | pgd)
        right = prediction == y.argmax(1)
        return {
            "lipschitz_bound": bound.value,
            "lipschitz_estimate": classifier.lipschitz_estimate(x),
            "accuracy": float(accuracy),
            "certified": {eps: float((right & (radius >= eps)).mean()) for eps in self.eps},
            "attacked": dict(zip(self.eps, map(float, attacked), strict=True)),
            "loss_sensitivity": float(loss_sensitivity(classifier, x, y)),
            "clever": [clever_u(classifier, image, 10, 64, max(self.eps), norm=2, verbose=False)
                       for image in x[: self.clever_samples]],
            "refuted": refuted,
        }  # fmt: skip
