"""The training hook: every linear layer of a model held at a spectral norm, whatever loop trains it."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .clipping import TOLERANCE, ClipResult, TrackedLayer, check_max_norm
from .layers import LinearLayer, linear_layers

Composites = Literal["auto", "always", "never"]

_NON_FINITE = "FastClip.step: the weights of layer '{}' hold NaN or infinite values; training has diverged"


class FastClip:
    """Holds the spectral norms of a model's linear layers at ``max_norm`` while it trains.

    Finds the layers itself, and asks nothing of the training loop: `attach` hooks the optimizer, after each of whose steps
    one warm power step follows the top singular directions of each layer and those above the target are clipped. `finish`
    ends training with every norm proved. Vectors live here, never in the model or its state dict.

    ``composites="auto"`` clips a convolution together with the batch normalisation behind it where that normalises by
    frozen running statistics, and alone (with one warning) where it trains on batch statistics: such a composite does not
    change when a filter is rescaled, so clipping it through the weight would drive the weight to zero. Which of the two
    holds is read off the model's mode at the first step.

    Args:
        model: Any model.
        example_input: A batch the model takes, (n, ...).
        max_norm: The spectral norm allowed, of the composite where one is clipped, else of the layer; inf turns the
            clipper off.
        composites: "auto", "always" or "never".
        warmup_steps: Steps over which the target falls geometrically from each layer's norm at the first step to ``max_norm``.
        vectors: Singular directions followed in each layer (and group).
        every: Clip after every so many optimizer steps.
        failure_probability: Of each layer's proved norm.
        seed: Of the starting vectors.

    Raises:
        ValueError: ``max_norm`` is not positive, or the model applies no linear layer or does not take the input.
        NotImplementedError: a layer cannot be clipped; the message names it.
    """

    def __init__(
        self, model: nn.Module, example_input: Tensor, max_norm: float = 1.0, *, composites: Composites = "auto",
        warmup_steps: int = 0, vectors: int = 4, every: int = 1, failure_probability: float = 1e-9, seed: int = 0,
    ) -> None:  # fmt: skip
        check_max_norm("FastClip", max_norm)
        if composites not in ("auto", "always", "never"):
            raise ValueError(f"FastClip(composites={composites!r}): expected 'auto', 'always' or 'never'")
        self.max_norm = max_norm
        self.steps = 0
        self._composites, self._warmup_steps, self._every = composites, warmup_steps, every
        self._failure_probability = failure_probability
        self._results: dict[str, ClipResult] = {}
        self._tracked = {
            layer.name: TrackedLayer.of(layer, vectors=vectors, composite=None, seed=seed + index)
            for index, layer in enumerate(linear_layers(model, example_input))
        }

    @property
    def layers(self) -> list[LinearLayer]:
        """The layers found, in the order of the forward pass."""
        return [tracked.layer for tracked in self._tracked.values()]

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Clip after every step of an optimizer; ``remove()`` of the handle ends it."""
        handle: RemovableHandle = optimizer.register_step_post_hook(lambda *_: self.step())
        return handle

    def step(self) -> None:
        """One warm power step on every layer, then a clip of the directions above the target.

        Raises:
            ValueError: a layer's weights are not finite; nothing is clipped then.
        """
        self.steps += 1
        if math.isinf(self.max_norm) or self.steps % self._every:
            return
        self._resolve()
        values = []
        for name, tracked in self._tracked.items():
            try:
                values.append(tracked.power_step())
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                raise ValueError(_NON_FINITE.format(name)) from None
        for (name, tracked), norm in zip(self._tracked.items(), torch.stack(values).tolist(), strict=True):
            if not math.isfinite(norm):
                raise ValueError(_NON_FINITE.format(name))
            tracked.estimate, tracked.seen = norm, self.steps
            target = self._target(tracked, norm)
            if norm > target:
                tracked.clip_directions_(target)
                tracked.seen = -1  # measured again when asked for

    def norms(self) -> dict[str, float]:
        """The latest norm of every layer as the training steps see it: estimates from below, {layer name: norm}."""
        self._resolve()
        for tracked in self._tracked.values():
            if tracked.seen != self.steps:
                tracked.estimate, tracked.seen = float(tracked.power_step()), self.steps
        return {name: tracked.estimate for name, tracked in self._tracked.items()}

    def finish(self) -> dict[str, ClipResult]:
        """Clip every layer until its norm is proved to be at most 1.001 ``max_norm``; what moved, by layer name.

        Raises:
            ValueError: a layer's weights are not finite.
        """
        if math.isinf(self.max_norm):
            return {}
        self._resolve()
        first = {name: t.clip_until_proved_(self.max_norm, self._failure_probability) for name, t in self._tracked.items()}
        self._results = first
        if any(result.steps for result in first.values()) and self._shares_weights():
            again = {name: t.clip_until_proved_(self.max_norm, self._failure_probability) for name, t in self._tracked.items()}
            self._results = {
                name: ClipResult(first[name].before, last.after, first[name].distortion, first[name].steps + last.steps)
                for name, last in again.items()
            }
        return dict(self._results)

    def report(self, rtol: float = TOLERANCE / 4) -> list[dict[str, Any]]:
        """A row for each layer: name, kind, lower and upper end of its norm now, target, and what `finish` moved.

        Args:
            rtol: Width upper / lower - 1 asked of the intervals; the default tells whether a target is met.
        """
        self._resolve()
        rows = []
        for name, tracked in self._tracked.items():
            norm = tracked.enclosure(self._failure_probability, rtol)
            moved = self._results[name].distortion if name in self._results else None
            target = None if math.isinf(self.max_norm) else self.max_norm
            rows.append({"name": name, "kind": tracked.kind, "lower": norm.lower, "upper": norm.upper,
                         "target": target, "distortion": moved})  # fmt: skip
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly where this clipper stands: plain values and tensors."""
        return {
            "steps": self.steps,
            "layers": {name: tracked.entry() for name, tracked in self._tracked.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of another clipper of the same model.

        Raises:
            ValueError: the state belongs to a model with other layers.
        """
        if state["layers"].keys() != self._tracked.keys():
            differing = sorted(state["layers"].keys() ^ self._tracked.keys())
            raise ValueError(f"FastClip.load_state_dict: the state is of a model with other layers; they differ in {differing}")
        self.steps = int(state["steps"])
        for name, entry in state["layers"].items():
            self._tracked[name].restore(entry)

    def _resolve(self) -> None:
        """Settle for every layer, once, whether it is clipped together with its batch normalisation."""
        open_layers = [t for t in self._tracked.values() if t.composite is None]
        training = [t.layer.name for t in open_layers if t.layer.batchnorm is not None and t.layer.batchnorm.training]
        for tracked in open_layers:
            frozen = tracked.layer.batchnorm is not None and not tracked.layer.batchnorm.training
            tracked.resolve(self._composites == "always" or (self._composites == "auto" and frozen))
        if training and self._composites == "auto" and not math.isinf(self.max_norm):
            warnings.warn(
                f"FastClip: {len(training)} layers (first: '{training[0]}') feed a batch normalisation that trains on batch "
                "statistics, so the layers alone are clipped and the normalisation can undo it. Freeze its statistics "
                "(put the batch normalisations in eval mode) to clip the composites.",
                stacklevel=3,
            )

    def _target(self, tracked: TrackedLayer, norm: float) -> float:
        if self._warmup_steps <= 0:
            return self.max_norm
        if math.isnan(tracked.initial):
            tracked.initial = max(norm, self.max_norm)
        left = max(0.0, 1 - self.steps / self._warmup_steps)
        return self.max_norm * (tracked.initial / self.max_norm) ** left

    def _shares_weights(self) -> bool:
        return len({id(t.layer.module.weight) for t in self._tracked.values()}) < len(self._tracked)
