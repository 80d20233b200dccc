"""Spectral clipping as ART defences: during training, alone or inside another trainer, and of trained classifiers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from art.defences.trainer import Trainer
from art.defences.transformer.transformer import Transformer
from art.estimators.classification import PyTorchClassifier
from art.utils import check_and_transform_label_format
from torch.optim.lr_scheduler import _LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from robust_spectral import ClipResult, FastClip
from robust_spectral.clipping import check_max_norm

from .art_preprocessing import example_of, standardising_gain


class FastClipTrainer(Trainer):
    """A trainer that keeps the spectral norms of a classifier's layers at ``max_norm``, and proves them at the end.

    Args:
        classifier: A ``PyTorchClassifier`` with an optimizer, or another ART trainer around one, whose ``fit`` is used.
        max_norm: The spectral norm allowed.
        **options: For `robust_spectral.FastClip`: ``composites``, ``warmup_steps``, …; a ``lipschitz_target`` is in the units
            of the classifier's arrays, its ``preprocessing`` included.

    Raises:
        TypeError: the estimator is not a ``PyTorchClassifier``.
        ValueError: the classifier has no optimizer, its model is on another device than its ``device_type``, or
            ``max_norm`` is not positive.
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

    def fit(self, x: np.ndarray, y: np.ndarray, scheduler: Any = None, **kwargs: Any) -> None:
        """Train with the ``fit`` of the classifier or trainer given; then clip until every norm is proved.

        Args:
            x: Images in the classifier's units, (n, ...); float64 is cast to float32 with a warning.
            y: Labels, one-hot (n, classes) or indices (n,).
            scheduler: A learning rate scheduler of torch or timm, stepped once per epoch.
            **kwargs: For the inner ``fit``: ``batch_size``, ``nb_epochs``, ….

        Raises:
            ValueError: a scheduler is given and the trainer's ``fit`` takes none.
            RuntimeError: the classifier's optimizer never took a step.
        """
        fit = (self._trainer or self.classifier).fit
        if scheduler is not None:
            if self._trainer is not None and "scheduler" not in inspect.signature(fit).parameters:
                raise ValueError(f"FastClipTrainer.fit: {type(self._trainer).__name__}.fit takes no scheduler")
            kwargs["scheduler"] = _EpochScheduler(scheduler)
        if x.dtype == np.float64:
            warnings.warn("FastClipTrainer.fit: float64 images are cast to float32, the type of the weights", stacklevel=2)
            x = x.astype(np.float32)
        self._train(fit, x, check_and_transform_label_format(y, nb_classes=self.classifier.nb_classes), **kwargs)

    def fit_generator(self, generator: Any, nb_epochs: int = 20, **kwargs: Any) -> None:
        """Train from an ART data generator; then clip until every norm is proved.

        Raises:
            NotImplementedError: the trainer given has no ``fit_generator``.
            RuntimeError: the classifier's optimizer never took a step.
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
        before = self.clipper.steps
        with self._following():
            fit(*args, **kwargs)
        if self.clipper.steps == before:
            raise RuntimeError("FastClipTrainer: the classifier's optimizer took no step, so nothing was clipped in training")
        self.results = self.clipper.finish()

    @contextmanager
    def _following(self) -> Iterator[None]:
        """Clip after each step of the classifier's optimizer, also when a trainer replaces it (as OAAT does)."""
        followed = self.classifier.optimizer
        handle = self.clipper.attach(followed)

        def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            nonlocal followed, handle
            if optimizer is not followed and optimizer is self.classifier.optimizer:
                handle.remove()
                followed, handle = optimizer, self.clipper.attach(optimizer)
                self.clipper.step()  # this step was taken without the hook

        watch = register_optimizer_step_post_hook(follow)
        try:
            yield
        finally:
            watch.remove()
            handle.remove()


class _EpochScheduler(_LRScheduler):
    """A scheduler of torch or timm as the class that ART requires, with the one call that ART makes after each epoch."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler, self._epoch = scheduler, 0

    def step(self, epoch: int | None = None) -> None:
        """Advance to the next epoch."""
        self._epoch += 1
        if isinstance(self._scheduler, torch.optim.lr_scheduler.LRScheduler):
            self._scheduler.step()
        else:
            self._scheduler.step(self._epoch)


class FastClipTransformer(Transformer):
    """A transformer that clips the layers of a trained classifier.

    Args:
        classifier: The trained ``PyTorchClassifier``; it is not changed unless it is passed to be transformed.
        max_norm: The spectral norm allowed.
        **options: For `robust_spectral.FastClip`.

    Raises:
        TypeError: the estimator is not a ``PyTorchClassifier``, or ``max_norm`` is not a number.
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
        """Load the trained weights into ``transformed_classifier`` and clip them; ``x`` is not needed.

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
        """Do nothing: clipping needs no data."""

    def _check_params(self) -> None:
        check_max_norm("FastClipTransformer", self.max_norm)


def _check_classifier(call: str, classifier: Any) -> None:
    """Refuse anything but a PyTorch classifier with its model on its own device; errors begin with ``call``."""
    if not isinstance(classifier, PyTorchClassifier):
        raise TypeError(f"{call}: takes a PyTorchClassifier (or a trainer around one), got {type(classifier).__name__}")
    for parameter in classifier.model.parameters():
        if parameter.device.type != classifier.device.type:
            raise ValueError(
                f"{call}: the model is on {parameter.device}, its classifier works on {classifier.device}; move the model, or "
                "make the classifier with another device_type"
            )


def _clipper(classifier: PyTorchClassifier, max_norm: float, options: dict[str, Any]) -> FastClip:
    """A clipper of the classifier's model; a ``lipschitz_target`` is converted to the units of the model's input."""
    if options.get("lipschitz_target") is not None:
        options = options | {"lipschitz_target": options["lipschitz_target"] / standardising_gain("FastClip", classifier)}
    return FastClip(classifier.model, example_of(classifier), max_norm, **options)
