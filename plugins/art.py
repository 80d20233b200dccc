"""Spectral clipping and Lipschitz certificates as defences of the Adversarial Robustness Toolbox (ART).

ART has no plugin registry: a defence is a class that subclasses one of ART's bases and takes and returns ART estimators.
`FastClipTrainer` is a trainer, alone or around another one (Madry PGD, TRADES, AWP, FBF, OAAT); `FastClipTransformer` clips a
classifier that is trained already; `LipschitzClassifier` certifies, and `LipschitzReport` sets what is proved against what
attacks find. `register` makes them reachable where ART's own classes are, for tools that look a defence up by its ART module
and name.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import art.defences.trainer
import art.defences.transformer
import art.estimators.classification
import art.evaluations
import numpy as np
import torch
from art.defences.trainer import Trainer
from art.defences.transformer.transformer import Transformer
from art.estimators.classification import PyTorchClassifier
from art.evaluations.evaluation import Evaluation
from art.evaluations.security_curve.security_curve import SecurityCurve
from art.metrics import clever_u, loss_sensitivity
from art.preprocessing.standardisation_mean_std.numpy import StandardisationMeanStd
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch
from art.utils import check_and_transform_label_format
from torch.optim.lr_scheduler import _LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from robust_spectral import ClipResult, FastClip, LipschitzBound, certified_radius, lipschitz_bound, lipschitz_estimate


class FastClipTrainer(Trainer):
    """Trains a classifier with the spectral norms of its layers held at ``max_norm``, and proves them at the end.

    Args:
        classifier: A ``PyTorchClassifier`` with an optimizer, or another ART trainer around one, whose ``fit`` is used.
        max_norm: The spectral norm allowed.
        **options: For `robust_spectral.FastClip`: ``composites``, ``warmup_steps``, …; a ``lipschitz_target`` is in the units
            of the classifier's arrays, its ``preprocessing`` included.

    Raises:
        TypeError: the estimator is not a ``PyTorchClassifier``.
        ValueError: it has no optimizer, its model is on another device than it says, or ``max_norm`` is not positive.
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
        """Train as the classifier, or the trainer given, does; then clip until every norm is proved.

        Args:
            x: Images in the classifier's units, (n, ...); float64 is cast to float32 with a warning.
            y: Labels, one-hot (n, classes) or indices (n,).
            scheduler: A learning rate schedule of torch or timm, stepped once in an epoch.
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
        """Clip after the steps of the classifier's optimizer, also of one that a trainer puts in its place (OAAT does)."""
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
    """A scheduler of torch or timm with the one call that ART makes at an epoch's end, and of the class that ART asks for."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler, self._epoch = scheduler, 0

    def step(self, epoch: int | None = None) -> None:
        """On to the next epoch."""
        self._epoch += 1
        if isinstance(self._scheduler, torch.optim.lr_scheduler.LRScheduler):
            self._scheduler.step()
        else:
            self._scheduler.step(self._epoch)


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
        gain = _standardising_gain("LipschitzClassifier", self)
        mean, std = _standardisation(self)
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
        return bound.behind(gain, errors)

    def lipschitz_estimate(self, x: np.ndarray) -> float:
        """Largest Jacobian norm of the logits over images (n, ...), standardisation included: a lower bound of the constant."""
        images = torch.from_numpy(x.astype(np.float32)).to(self.device)
        return lipschitz_estimate(_Standardised(self.model, *_standardisation(self)), images)

    def certify(self, x: np.ndarray, batch_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
        """Predicted classes and the L2 radii inside which they provably stay; -1 and 0 where nothing can be promised.

        Both are those of the forward pass in float64. Its rounding is accounted for where the classifier has ``clip_values``.

        Args:
            x: Images, (n, ...).
            batch_size: Images in a forward pass.
        """
        mean, std = _standardisation(self)
        exact = copy.deepcopy(self.model).double().eval()
        parts = torch.from_numpy((x.astype(np.float64) - mean) / std).split(batch_size)
        with torch.no_grad():
            logits = torch.cat([exact(part.to(self.device)).cpu() for part in parts])
        prediction = logits.argmax(1)
        radius = certified_radius(logits, prediction, self.lipschitz_bound())
        return torch.where(radius > 0, prediction, -1).numpy(), radius.numpy()


class _Standardised(torch.nn.Module):
    """A model behind the standardisation that ART applies to its images."""

    def __init__(self, model: torch.nn.Module, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, torch.from_numpy(mean), torch.from_numpy(std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images in the classifier's units."""
        logits: torch.Tensor = self.model((images - self.mean.to(images)) / self.std.to(images))
        return logits


class LipschitzReport(Evaluation):
    """What is proved of a classifier beside what attacks find: bound, estimate, certified and attacked accuracy.

    Args:
        eps: L2 sizes of perturbation, in the units of the classifier's arrays.
        clever_samples: Images whose CLEVER score is taken, ART's own estimate of a minimal perturbation.
    """

    def __init__(self, eps: Sequence[float], clever_samples: int = 0) -> None:
        self.eps, self.clever_samples = [float(e) for e in eps], clever_samples

    def evaluate(self, classifier: LipschitzClassifier, x: np.ndarray, y: np.ndarray, **pgd: Any) -> dict[str, Any]:
        """Evaluate on images (n, ...) with their labels, one-hot or indices.

        Args:
            classifier: The classifier.
            x: Images.
            y: Labels.
            **pgd: For ART's ``ProjectedGradientDescent``, by which `SecurityCurve` attacks.

        Returns:
            dict: ``lipschitz_bound`` (proved, to the logits), ``lipschitz_estimate`` (sampled on these images, a lower bound),
            ``accuracy``, and by size of perturbation ``certified`` and ``attacked`` accuracies; ART's ``loss_sensitivity``
            and ``clever`` scores (one for each of the first images).

        Raises:
            TypeError: the classifier is not a `LipschitzClassifier`.
        """
        if not isinstance(classifier, LipschitzClassifier):
            kind = type(classifier).__name__
            raise TypeError(f"LipschitzReport.evaluate: takes a LipschitzClassifier, got {kind}; it has the same arguments")
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


_HOMES = {
    art.defences.trainer: FastClipTrainer,
    art.defences.transformer: FastClipTransformer,
    art.estimators.classification: LipschitzClassifier,
    art.evaluations: LipschitzReport,
}


def register() -> None:
    """Put the classes here where ART keeps their like: ``art.defences.trainer.FastClipTrainer`` and so on."""
    for package, addition in _HOMES.items():
        setattr(package, addition.__name__, addition)


def unregister() -> None:
    """Undo `register`."""
    for package, addition in _HOMES.items():
        if getattr(package, addition.__name__, None) is addition:
            delattr(package, addition.__name__)


def _check_classifier(call: str, classifier: Any) -> None:
    if not isinstance(classifier, PyTorchClassifier):
        raise TypeError(f"{call}: takes a PyTorchClassifier (or a trainer around one), got {type(classifier).__name__}")
    for parameter in classifier.model.parameters():
        if parameter.device.type != classifier.device.type:
            raise ValueError(
                f"{call}: the model is on {parameter.device}, its classifier works on {classifier.device}; move the model, or "
                "make the classifier with another device_type"
            )


def _clipper(classifier: PyTorchClassifier, max_norm: float, options: dict[str, Any]) -> FastClip:
    if options.get("lipschitz_target") is not None:
        options = options | {"lipschitz_target": options["lipschitz_target"] / _standardising_gain("FastClip", classifier)}
    return FastClip(classifier.model, _example(classifier), max_norm, **options)


def _example(classifier: PyTorchClassifier) -> torch.Tensor:
    return torch.zeros(1, *classifier.input_shape, device=classifier.device)


def _standardising_gain(call: str, classifier: PyTorchClassifier) -> float:
    """Lipschitz constant, rounded up, of what ART does to images in front of the model.

    Raises:
        NotImplementedError: it does more than to standardise them.
    """
    if classifier.preprocessing_defences or classifier.postprocessing_defences:
        raise NotImplementedError(f"{call}: no Lipschitz constant is known of pre- and postprocessing defences")
    known = classifier.preprocessing is None or isinstance(
        classifier.preprocessing, StandardisationMeanStd | StandardisationMeanStdPyTorch
    )
    if not known:
        kind = type(classifier.preprocessing).__name__
        raise NotImplementedError(f"{call}: no Lipschitz constant is known of the preprocessing {kind}")
    _, std = _standardisation(classifier)
    return math.nextafter(1 / float(np.abs(std).min()), math.inf)


def _standardisation(classifier: PyTorchClassifier) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation that ART takes off in front of the model, as they are broadcast against images."""
    given = (getattr(classifier.preprocessing, name, default) for name, default in (("mean", 0.0), ("std", 1.0)))
    mean, std = (np.asarray(value, dtype=np.float64) for value in given)
    if classifier.channels_first and mean.ndim == 1 and len(classifier.input_shape) == 3:
        mean, std = (value.reshape(-1, 1, 1) for value in (mean, std))
    return mean, std
