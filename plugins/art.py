"""Spectral clipping and Lipschitz certificates as defences of the Adversarial Robustness Toolbox (ART).

ART has no plugin registry: a defence is a class that subclasses one of ART's bases and takes and returns ART estimators.
`FastClipTrainer` is a trainer, alone or around another one (Madry PGD, TRADES, …); `FastClipTransformer` clips a classifier
that is trained already; `LipschitzClassifier` certifies. `register` makes them reachable where ART's own classes are, for
tools that look a defence up by its ART module and name.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, ClassVar

import art.defences.trainer
import art.defences.transformer
import art.estimators.classification
import numpy as np
import torch
from art.defences.trainer import Trainer
from art.defences.transformer.transformer import Transformer
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.standardisation_mean_std.numpy import StandardisationMeanStd
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch

from robust_spectral import ClipResult, FastClip, LipschitzBound, certified_radius, lipschitz_bound


class FastClipTrainer(Trainer):
    """Trains a classifier with the spectral norms of its layers held at ``max_norm``, and proves them at the end.

    Args:
        classifier: A ``PyTorchClassifier`` with an optimizer, or another ART trainer around one, whose ``fit`` is used.
        max_norm: The spectral norm allowed.
        **options: For `robust_spectral.FastClip`: ``composites``, ``warmup_steps``, ….

    Raises:
        TypeError: the estimator is not a ``PyTorchClassifier``.
        ValueError: it has no optimizer, or ``max_norm`` is not positive.
    """

    def __init__(self, classifier: Any, max_norm: float = 1.0, **options: Any) -> None:
        self._trainer: Trainer | None = classifier if isinstance(classifier, Trainer) else None
        inner = classifier.get_classifier() if self._trainer is not None else classifier
        _check_classifier("FastClipTrainer", inner)
        if inner.optimizer is None:
            raise ValueError("FastClipTrainer: the classifier has no optimizer to follow; give PyTorchClassifier one")
        super().__init__(inner)
        self.clipper = _clipper(inner, max_norm, options)
        self.results: dict[str, ClipResult] = {}

    def fit(self, x: np.ndarray, y: np.ndarray, **kwargs: Any) -> None:
        """Train as the classifier, or the trainer given, does; then clip until every norm is proved.

        Args:
            x: Images in the classifier's units, (n, ...).
            y: Labels, one-hot or indices as the inner ``fit`` takes them.
            **kwargs: For the inner ``fit``: ``batch_size``, ``nb_epochs``, ….

        Raises:
            RuntimeError: the optimizer that was followed never took a step.
        """
        self._train((self._trainer or self.classifier).fit, x, y, **kwargs)

    def fit_generator(self, generator: Any, nb_epochs: int = 20, **kwargs: Any) -> None:
        """Train from an ART data generator; then clip until every norm is proved.

        Raises:
            NotImplementedError: the trainer given has no ``fit_generator``.
            RuntimeError: the optimizer that was followed never took a step.
        """
        source = self._trainer or self.classifier
        if not hasattr(source, "fit_generator"):
            raise NotImplementedError(f"FastClipTrainer.fit_generator: {type(source).__name__} has no fit_generator")
        self._train(source.fit_generator, generator, nb_epochs=nb_epochs, **kwargs)

    def predict(self, x: np.ndarray, **kwargs: Any) -> np.ndarray:
        """The classifier's predictions."""
        predictions: np.ndarray = self.classifier.predict(x, **kwargs)
        return predictions

    def _train(self, fit: Any, *args: Any, **kwargs: Any) -> None:
        optimizer, before = self.classifier.optimizer, self.clipper.steps
        handle = self.clipper.attach(optimizer)
        try:
            fit(*args, **kwargs)
        finally:
            handle.remove()
        if self.clipper.steps == before:
            raise RuntimeError("FastClipTrainer: the classifier's optimizer took no step, so nothing was clipped in training")
        if self.classifier.optimizer is not optimizer:
            warnings.warn("FastClipTrainer: the optimizer was replaced during fit; steps after that were not clipped, "
                          "the final clip was", stacklevel=3)  # fmt: skip
        self.results = self.clipper.finish()


class FastClipTransformer(Transformer):
    """Clips the layers of a classifier that is trained already, after the fact.

    Args:
        classifier: The trained ``PyTorchClassifier``; it is left as it is.
        max_norm: The spectral norm allowed.
        **options: For `robust_spectral.FastClip`.

    Raises:
        TypeError: the estimator is not a ``PyTorchClassifier``.
        ValueError: ``max_norm`` is not positive.
    """

    params: ClassVar[list[str]] = ["max_norm"]

    def __init__(self, classifier: Any, max_norm: float = 1.0, **options: Any) -> None:
        _check_classifier("FastClipTransformer", classifier)
        super().__init__(classifier)
        self.max_norm, self._options = max_norm, options
        self.results: dict[str, ClipResult] = {}
        self._check_params()

    def __call__(self, x: np.ndarray, transformed_classifier: Any) -> Any:
        """Give ``transformed_classifier`` the trained weights, clipped; ``x`` is not needed.

        Args:
            x: Ignored; part of ART's interface.
            transformed_classifier: A ``PyTorchClassifier`` around a model of the same architecture; may be the trained one.
        """
        _check_classifier("FastClipTransformer", transformed_classifier)
        if transformed_classifier is not self.classifier:
            transformed_classifier.model.load_state_dict(self.classifier.model.state_dict())
        transformed_classifier.model.eval()
        self.results = _clipper(transformed_classifier, self.max_norm, self._options).finish()
        self._is_fitted = True
        return transformed_classifier

    def fit(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> None:
        """Nothing to fit: the clip needs no data."""

    def _check_params(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"FastClipTransformer(max_norm={self.max_norm}): must be positive")


class LipschitzClassifier(PyTorchClassifier):
    """A ``PyTorchClassifier`` that certifies its predictions by a Lipschitz bound of its model.

    The standardisation that ART applies outside the model, ``preprocessing=(mean, std)``, is part of the bound; radii are in
    the units of the arrays given.
    """

    def lipschitz_bound(self, failure_probability: float = 1e-9) -> LipschitzBound:
        """Proved bound from the classifier's input to its logits, ART's standardisation included.

        Raises:
            NotImplementedError: pre- or postprocessing defences are set, of which no Lipschitz constant is known.
        """
        if self.preprocessing_defences or self.postprocessing_defences:
            raise NotImplementedError("LipschitzClassifier: no Lipschitz constant is known of pre- and postprocessing defences")
        if not (
            self.preprocessing is None or isinstance(self.preprocessing, StandardisationMeanStd | StandardisationMeanStdPyTorch)
        ):
            kind = type(self.preprocessing).__name__
            raise NotImplementedError(f"LipschitzClassifier: no Lipschitz constant is known of the preprocessing {kind}")
        mean, std = self._standardisation()
        low, high = (None, None) if self.clip_values is None else (np.asarray(v, dtype=np.float64) for v in self.clip_values)
        box, errors = None, None
        if low is not None and high is not None:
            ends = (low - mean) / std, (high - mean) / std
            box = float(np.minimum(*ends).min()) - 1e-6, float(np.maximum(*ends).max()) + 1e-6
            size = math.sqrt(math.prod(self.input_shape)) * float(
                np.max((np.abs([low, high]).max() + np.abs(mean)) / np.abs(std))
            )
            errors = {dtype: 4 * torch.finfo(dtype).eps * size for dtype in (torch.float32, torch.float64)}
        bound = lipschitz_bound(self.model, _example(self), failure_probability, box)
        return bound.behind(1 / float(np.abs(std).min()), errors)

    def _standardisation(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation that ART takes off in front of the model, as they are broadcast against images."""
        given = (getattr(self.preprocessing, name, default) for name, default in (("mean", 0.0), ("std", 1.0)))
        mean, std = (np.asarray(value, dtype=np.float64) for value in given)
        if self.channels_first and mean.ndim == 1 and len(self.input_shape) == 3:
            mean, std = (value.reshape(-1, 1, 1) for value in (mean, std))
        return mean, std

    def certify(self, x: np.ndarray, batch_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
        """Predicted classes and the L2 radii inside which they provably stay; -1 and 0 where nothing can be promised.

        Both are those of the forward pass in float64. Its rounding is accounted for where the classifier has ``clip_values``.

        Args:
            x: Images, (n, ...).
            batch_size: Images in a forward pass.
        """
        mean, std = self._standardisation()
        exact = copy.deepcopy(self.model).double().eval()
        parts = torch.from_numpy((x.astype(np.float64) - mean) / std).split(batch_size)
        with torch.no_grad():
            logits = torch.cat([exact(part.to(self.device)).cpu() for part in parts])
        prediction = logits.argmax(1)
        radius = certified_radius(logits, prediction, self.lipschitz_bound())
        return torch.where(radius > 0, prediction, -1).numpy(), radius.numpy()


_HOMES = {
    art.defences.trainer: FastClipTrainer,
    art.defences.transformer: FastClipTransformer,
    art.estimators.classification: LipschitzClassifier,
}


def register() -> None:
    """Put the classes here where ART keeps their like: ``art.defences.trainer.FastClipTrainer`` and so on."""
    for package, defence in _HOMES.items():
        setattr(package, defence.__name__, defence)


def unregister() -> None:
    """Undo `register`."""
    for package, defence in _HOMES.items():
        if getattr(package, defence.__name__, None) is defence:
            delattr(package, defence.__name__)


def _check_classifier(call: str, classifier: Any) -> None:
    if not isinstance(classifier, PyTorchClassifier):
        raise TypeError(f"{call}: takes a PyTorchClassifier (or a trainer around one), got {type(classifier).__name__}")


def _clipper(classifier: PyTorchClassifier, max_norm: float, options: dict[str, Any]) -> FastClip:
    return FastClip(classifier.model, _example(classifier), max_norm, **options)


def _example(classifier: PyTorchClassifier) -> torch.Tensor:
    return torch.zeros(1, *classifier.input_shape, device=classifier.device)
