"""Spectral clipping and Lipschitz certificates as defences of the Adversarial Robustness Toolbox (ART).

ART has no plugin registry: a defence is a subclass of one of ART's base classes that takes and returns ART estimators.
`FastClipTrainer` is a trainer, alone or around another one (Madry PGD, TRADES, AWP, FBF, OAAT); `FastClipTransformer` clips a
trained classifier; `LipschitzClassifier` certifies predictions, and `LipschitzReport` compares certified and attacked accuracy.
`register` adds these classes to ART's own modules, for tools that look a defence up by its ART module and name.
"""

from __future__ import annotations

from typing import Any

import art.defences.trainer
import art.defences.transformer
import art.estimators.classification
import art.evaluations

from .art_certifying import LipschitzClassifier as LipschitzClassifier
from .art_certifying import LipschitzReport as LipschitzReport
from .art_clipping import FastClipTrainer as FastClipTrainer
from .art_clipping import FastClipTransformer as FastClipTransformer

_HOMES: dict[Any, type] = {
    art.defences.trainer: FastClipTrainer,
    art.defences.transformer: FastClipTransformer,
    art.estimators.classification: LipschitzClassifier,
    art.evaluations: LipschitzReport,
}


def register() -> None:
    """Add these classes to the ART modules of their kind: ``art.defences.trainer.FastClipTrainer`` and so on."""
    for package, addition in _HOMES.items():
        setattr(package, addition.__name__, addition)


def unregister() -> None:
    """Undo `register`."""
    for package, addition in _HOMES.items():
        if getattr(package, addition.__name__, None) is addition:
            delattr(package, addition.__name__)
