"""MAITE's protocols: a torch model as a MAITE image classifier, and certified accuracy as a MAITE metric.

MAITE passes anything that numpy can read between models and metrics, so that two conditions of a certificate are easily lost:
the dtype that the logits were computed in, and that they are logits at all. `ImageClassifier` preserves both, and
`CertifiedAccuracy` refuses predictions that have visibly lost them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from maite.protocols import ArrayLike, MetricMetadata, ModelMetadata
from torch import Tensor, nn

from robust_spectral import LipschitzBound, certified_radius
from robust_spectral.lipschitz import full_precision
from robust_spectral.operators import evaluating


class ImageClassifier:
    """A torch model that takes pixels in [0, 1], as MAITE's ``image_classification.Model``.

    Args:
        model: From images (n, channels, height, width) to logits (n, classes), in float32 or float64.
        id: The model's name in MAITE's records.
        index2label: Names of the classes by their index.
        device: The device to move the model to; default its current device.

    Raises:
        TypeError: the model's weights are in another dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        id: str,
        index2label: Mapping[int, str] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.model = model if device is None else model.to(device)
        self.metadata = ModelMetadata(id=id) if index2label is None else ModelMetadata(id=id, index2label=dict(index2label))
        tensors = (t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point())
        first = next(tensors, torch.empty(0, device=device))
        self.device, self.dtype = first.device, first.dtype
        if self.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"ImageClassifier(model): its weights are in {self.dtype}; call model.float() or model.double()")

    def __call__(self, batch: Sequence[ArrayLike], /) -> Sequence[np.ndarray]:
        """Logits of a batch, in eval mode and the full precision of the model's dtype: no autocast, no TF32.

        Args:
            batch: Images of one shape (channels, height, width), floating point, in [0, 1].

        Returns:
            Sequence[np.ndarray]: One array (classes,) for each image, in the model's dtype.

        Raises:
            ValueError: the images differ in shape, have another number of axes, are integers, or have values outside [0, 1].
        """
        if len(batch) == 0:
            return []
        images = [_image(i, image).to(self.device, self.dtype) for i, image in enumerate(batch)]
        if any(image.shape != images[0].shape for image in images):
            shapes = sorted({tuple(image.shape) for image in images})
            raise ValueError(f"ImageClassifier: images of a batch have shapes {shapes}; resize them to one")
        with evaluating(self.model), torch.no_grad(), full_precision(self.device):
            logits: Tensor = self.model(torch.stack(images))
        return list(logits.cpu().numpy())


class CertifiedAccuracy:
    """Clean accuracy and certified accuracy, as MAITE's ``image_classification.Metric``.

    An image is certified at ``eps`` if ``certified_radius(logits, label, bound) >= eps``; `certified_radius` says what this
    proves. Predictions must be logits, not probabilities: the bound is for the model without a softmax. Their dtype must be the
    one that the model computed in, without autocast or TF32. An array does not show this; `ImageClassifier` ensures it.

    A metric sees no images, so radii proved around them are given to it: ``local_radius(model.double(), images.double(),
    labels)`` of the images in the order of the updates. An image is then certified by the larger of the two radii.

    Args:
        bound: The result of ``lipschitz_bound`` for the same model.
        eps: L2 sizes of perturbation, in the units of the model's input.
        id: The metric's name in MAITE's records.
        local_radii: L2 radii proved around the images of all updates, (n,), 0 for misclassified images; default: none.

    Raises:
        TypeError: ``bound`` is not a `LipschitzBound`.
        ValueError: ``eps`` is empty, an eps is not positive and finite, or a local radius is negative or not a number.
    """

    def __init__(
        self, bound: LipschitzBound, eps: Sequence[float], id: str = "certified_accuracy", local_radii: ArrayLike | None = None
    ) -> None:
        if not isinstance(bound, LipschitzBound):
            raise TypeError(f"CertifiedAccuracy(bound={bound!r}): takes the result of lipschitz_bound")
        if not len(eps) or not all(0 < e < math.inf for e in eps):
            raise ValueError(f"CertifiedAccuracy(eps={eps}): give at least one size, each positive and finite")
        self.metadata = MetricMetadata(id=id)
        self.bound, self.eps = bound, [float(e) for e in eps]
        given = local_radii.detach().cpu() if isinstance(local_radii, Tensor) else local_radii
        self.local_radii = None if given is None else torch.as_tensor(given, dtype=torch.float64)
        if self.local_radii is not None and (self.local_radii.ndim != 1 or not bool((self.local_radii >= 0).all())):
            raise ValueError(
                f"CertifiedAccuracy(local_radii): got shape {tuple(self.local_radii.shape)}; give one radius for each image, "
                "(n,), none of them negative or NaN, as local_radius returns them"
            )
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._right, self._radii = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.float64)

    def update(
        self, pred_batch: Sequence[ArrayLike], target_batch: Sequence[ArrayLike], metadata_batch: Sequence[Any] = (), /
    ) -> None:
        """Add a batch.

        Args:
            pred_batch: Logits (classes,) of each image, float32 or float64 arrays.
            target_batch: The true class of each image, one-hot or as the largest score, (classes,).
            metadata_batch: Ignored; MAITE before 0.9 does not pass it.

        Raises:
            TypeError: the predictions are not arrays of one dtype, float32 or float64.
            ValueError: the predictions are probabilities, predictions and targets do not fit, or the local radii are too few or
                of other images: one is positive for a misclassified image.
        """
        if len(pred_batch) != len(target_batch):
            raise ValueError(f"CertifiedAccuracy.update: {len(pred_batch)} predictions for {len(target_batch)} targets")
        if len(pred_batch) == 0:
            return
        logits = _logits(pred_batch)
        labels = torch.tensor([_label(i, target, logits.shape[1]) for i, target in enumerate(target_batch)])
        right = (logits.argmax(1) == labels) & torch.isfinite(logits).all(1)
        radii = torch.maximum(certified_radius(logits, labels, self.bound), self._local(right))
        self._right, self._radii = torch.cat([self._right, right]), torch.cat([self._radii, radii])

    def _local(self, right: Tensor) -> Tensor:
        """The radii proved around the next images, of which some are classified correctly; 0 without such radii."""
        if self.local_radii is None:
            return torch.zeros(len(right), dtype=torch.float64)
        seen, found = len(self._right), self.local_radii[len(self._right) :][: len(right)]
        if len(found) < len(right) or bool((found[~right] > 0).any()):
            what = f"{len(self.local_radii)} radii for {seen + len(right)} images"
            if len(found) == len(right):
                what = f"image {seen + int(((found > 0) & ~right).nonzero()[0])} is misclassified and has a positive radius"
            raise ValueError(
                f"CertifiedAccuracy.update: {what}; give local_radii of all images in the order of the updates, and call reset "
                "before the first image again"
            )
        return found

    def compute(self) -> dict[str, Any]:
        """The accuracies over all batches since the last reset.

        Returns:
            dict: ``accuracy``, ``certified_accuracy_l2_<eps>`` for each eps, the number of ``images``, and the
            ``failure_probability`` of the bound.

        Raises:
            ValueError: no image was added.
        """
        if not len(self._right):
            raise ValueError("CertifiedAccuracy.compute: no image was added; call update first")
        shares = {f"certified_accuracy_l2_{eps}": float((self._radii >= eps).double().mean()) for eps in self.eps}
        return {"accuracy": float(self._right.double().mean()), **shares, "images": len(self._right),
                "failure_probability": self.bound.failure_probability}  # fmt: skip


def _image(index: int, image: ArrayLike) -> Tensor:
    """One image (channels, height, width) with its values checked."""
    pixels = image.detach() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if pixels.ndim != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"ImageClassifier: image {index} of the batch is {pixels.dtype} of shape {tuple(pixels.shape)}; give "
            "floating-point (channels, height, width) in [0, 1], bytes divided by 255"
        )
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError(
            f"ImageClassifier: image {index} of the batch has values from {float(pixels.min()):g} to {float(pixels.max()):g}; "
            "give pixels in [0, 1], not standardised: the normalisation belongs in the model"
        )
    return pixels


def _logits(predictions: Sequence[ArrayLike]) -> Tensor:
    """Predictions as one tensor of logits (n, classes) on the CPU, after checks."""
    rows = [torch.from_numpy(np.array(row)) if isinstance(row, np.ndarray) else row for row in predictions]
    if not all(isinstance(row, Tensor) for row in rows) or len({row.dtype for row in rows}) > 1:
        kinds = sorted({type(row).__name__ if not isinstance(row, Tensor) else str(row.dtype) for row in rows})
        raise TypeError(
            f"CertifiedAccuracy.update: predictions are {', '.join(kinds)}; give arrays in the dtype that the model computed in"
        )
    if any(row.ndim != 1 or row.shape != rows[0].shape for row in rows):
        shapes = sorted({tuple(row.shape) for row in rows})
        raise ValueError(f"CertifiedAccuracy.update: predictions have shapes {shapes}; each must be (classes,)")
    if len(rows[0]) == 1:
        raise ValueError(
            "CertifiedAccuracy.update: predictions have one logit each, MAITE's targets a score for each class; give a model "
            "with two logits, such as torch.cat([-z, z], 1) / 2"
        )
    logits = torch.stack([row.detach().cpu() for row in rows])
    if bool((logits >= 0).all() & ((logits.double().sum(1) - 1).abs() < 1e-5).all()):
        raise ValueError(
            "CertifiedAccuracy.update: predictions are probabilities (none negative, each row sums to 1); the bound is for "
            "logits: leave out the softmax"
        )
    return logits


def _label(index: int, target: ArrayLike, classes: int) -> int:
    scores = target.detach().cpu() if isinstance(target, Tensor) else torch.from_numpy(np.array(target))
    if scores.shape != (classes,) or int((scores == scores.max()).sum()) != 1:
        raise ValueError(
            f"CertifiedAccuracy.update: target {index} of the batch has shape {tuple(scores.shape)}; give ({classes},) scores "
            "of which one is the largest, such as a one-hot vector"
        )
    return int(scores.argmax())
