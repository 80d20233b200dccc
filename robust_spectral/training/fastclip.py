"""The training hook, which clips the spectral norms of a model's linear layers in any training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..clipping import TOLERANCE, ClipResult, Move, MoveWeight, check_max_norm, clip_until_proved_
from ..layers import LinearLayer, linear_layers
from ..lipschitz import lipschitz_bound
from ..operators import full_precision_no_grad
from ..user_warnings import counted, warn_user
from .composites import Choice, Composites
from .followed_layer import FollowedLayer
from .held_layer import HeldLayer
from .layer_targets import Patterns, targets_by_name
from .lipschitz_target import norm_for
from .measurements import NotFiniteError, not_finite
from .optimizer_hooks import alive, captured, dead, hooked
from .step_runner import Turns
from .target_check import check_target

_MOST_SKIPPED = 10  # steps in a row with weights that are not finite, before an error
_MANY_CHANGES = 8  # in-place changes of a weight, more than initialisation and loading make
_HELD_BY: WeakKeyDictionary[nn.Module, ref[FastClip]] = WeakKeyDictionary()  # layers whose clipper is attached to an optimizer


class FastClip:
    """A hook that clips the spectral norms of a model's linear layers to ``max_norm`` while it trains.

    The layers are found in the model, and the training loop stays unchanged. `attach` hooks the optimizer: after each step, one
    warm power step follows the top singular directions of the layers that are due, and values above the target are clipped.
    Short Krylov searches refresh a few layers at a time and measure by how much power steps underestimate the norms. `finish`
    ends training with every norm proved. Singular vectors are stored here, never in the model or its state dict.

    ``composites="auto"`` clips a convolution together with the batch normalisation that follows it (the two are a composite) if
    that normalises by frozen running statistics, and alone (with one warning) if it trains on batch statistics: such a
    composite does not change when a filter is rescaled, so clipping it through the weight would drive the weight to zero. The
    model's mode at the first step decides. A ``move`` of γ clips composites in either case.

    Steps with NaN or infinite weights clip nothing and are counted in ``skipped``; the tenth in a row raises an error.

    Args:
        model: Any model.
        example_input: A batch the model takes, (n, ...).
        max_norm: The spectral norm allowed, of the composite if one is clipped, else of the layer; inf turns the clipper off.
            Or norms by name pattern, {"conv*": 1.0, "fc": 2.0}: the first pattern that matches a layer applies, and layers that
            no pattern matches are left alone.
        composites: "auto", "always" or "never".
        move: The parameters that clip a composite: `MoveWeight` (default), `MoveGamma` or `MoveWeightAndGamma`.
        include: Name patterns (as in shells) of the layers to clip; default all.
        exclude: Name patterns of layers to leave alone.
        relative: Whether ``max_norm`` is a multiple of each layer's own norm at the first step.
        warmup_steps: Steps over which the target falls geometrically from each layer's norm at the first step to its last
            value.
        vectors: Number of singular directions followed in each layer (and group).
        every: Number of optimizer steps in which each layer is due once; the layers are due at different steps.
        sweeps: Power steps and clips of a layer that is due.
        failure_probability: Failure probability of each layer's proved norm.
        seed: Seed of the starting vectors.
        lipschitz_target: A bound for the whole network, spread over its layers: all get the same target, the one with which the
            network's bound is at most this, unless ``max_norm`` is smaller. `finish` lowers the targets until the bound holds.

    Raises:
        ValueError: ``max_norm`` is not positive, a pattern matches no layer, or the model applies no linear layer or does not
            take the input.
        TypeError: ``max_norm`` or ``lipschitz_target`` is not a number, or the input no tensor.
        NotImplementedError: a layer cannot be clipped; the message names it.
    """

    def __init__(
        self, model: nn.Module, example_input: Tensor, max_norm: float | Mapping[str, float] = 1.0, *,
        composites: Composites = "auto", move: Move | None = None, include: Patterns = "*", exclude: Patterns = (),
        relative: bool = False, warmup_steps: int = 0, vectors: int = 1, every: int = 1, sweeps: int = 1,
        failure_probability: float = 1e-9, seed: int = 0, lipschitz_target: float | None = None,
    ) -> None:  # fmt: skip
        self._choice, self._thawed = Choice(composites, move or MoveWeight()), False
        if every < 1 or sweeps < 1 or vectors < 1:
            raise ValueError(f"FastClip(every={every}, sweeps={sweeps}, vectors={vectors}): must be at least 1")
        layers = linear_layers(model, example_input)
        self.max_norm = max_norm
        self.steps = self.skipped = self._skipped_in_a_row = 0
        self._relative, self._warmup_steps, self._failure_probability = relative, warmup_steps, failure_probability
        if lipschitz_target is not None:
            check_max_norm("FastClip", lipschitz_target, "lipschitz_target")
        with full_precision_no_grad():
            self._lipschitz_target, self._network = lipschitz_target, (model, example_input[:1].detach().clone())
        self._results: dict[str, ClipResult] = {}
        self._handles: list[RemovableHandle] = []
        targets = targets_by_name([layer.name for layer in layers], max_norm, include, exclude)
        self._tracked = {
            layer.name: FollowedLayer.of(
                layer, vectors=vectors, composite=None, seed=seed + index, target=targets[layer.name],
                move=self._choice.move if layer.batchnorm is not None else None,
            )
            for index, layer in enumerate(layers)
            if layer.name in targets
        }  # fmt: skip
        self._held = {name: HeldLayer.of(part, number, seed) for number, (name, part) in enumerate(self._tracked.items())}
        self._turns = Turns(list(self._held.values()), self._resolve, every, sweeps, self._target)
        self._note_weights()

    @property
    def layers(self) -> list[LinearLayer]:
        """The layers that the clipper controls, in the order of the forward pass."""
        return [tracked.layer for tracked in self._tracked.values()]

    @property
    def off(self) -> bool:
        """Whether every target is infinite, so that nothing is ever done."""
        return self._lipschitz_target is None and all(math.isinf(tracked.target) for tracked in self._tracked.values())

    @property
    def attached(self) -> bool:
        """Whether an optimizer that still exists calls this clipper."""
        return any(alive(handle) for handle in self._handles)

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, in which no optimizer calls the hooks."""
        return self.__dict__ | {"_handles": dead(len(self._handles))}

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Clip after every step of ``optimizer``; ``remove()`` of the handle ends this. A second call changes nothing.

        A copy of the optimizer, deep or pickled, does not have the hook: attach to the copy again. In a wrapper without hooks
        of its own, such as Accelerate's, the wrapped optimizer is hooked. If the optimizer's step was captured in a CUDA graph,
        replays call no hook: call `step` after each.

        Raises:
            ValueError: another clipper is attached and controls a layer of this one.
            NotImplementedError: a weight has been sharded since the clipper was made.
            TypeError: ``optimizer`` is neither an optimizer nor a wrapper of one.
        """
        for name, tracked in self._tracked.items():
            tracked.move.parameters(tracked.layer)  # raises if a weight has been sharded since
            other = _HELD_BY.get(tracked.layer.module, lambda: None)()
            if other is not None and other is not self and other.attached and not self.off and not other.off:
                raise ValueError(
                    f"FastClip.attach: layer '{name}' is controlled by another clipper already; remove its handle first"
                )
        for tracked in self._tracked.values():
            _HELD_BY[tracked.layer.module] = ref(self)
        handle = hooked(optimizer, self._precede_step, self._follow_step, self._handles)
        self._handles = [*(h for h in self._handles if alive(h) and h is not handle), handle]
        self._note_weights()
        return handle

    def _precede_step(self) -> None:
        with self._skipping():
            self._turns.start_early()

    def _follow_step(self) -> None:
        if not captured():
            self._step(early=True)
            return
        warn_user(
            "FastClip: a step of the optimizer is being captured; call the clipper's step() after each replay of the graph"
        )

    def step(self) -> None:
        """Take one warm power step on every layer that is due, then clip the values above its target.

        On a GPU only layers whose norms grow fast are clipped at once; the others are clipped at the next step, without a wait.

        Raises:
            ValueError: a layer's weights were not finite for the tenth time in a row. Nothing is clipped in such steps.
        """
        self._step(early=False)

    def _step(self, early: bool) -> None:
        self.steps += 1
        if self.off:
            return
        with self._skipping():
            if self._turns.advance(early):
                self._skipped_in_a_row = 0
        self._thawed = self._thawed or self._choice.warn_of_thawed(list(self._tracked.values()))
        self._note_weights()

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """Count a step at which weights are not finite as skipped; raise the error at the tenth in a row."""
        try:
            yield
        except NotFiniteError:
            self.skipped, self._skipped_in_a_row = self.skipped + 1, self._skipped_in_a_row + 1
            if self._skipped_in_a_row >= _MOST_SKIPPED:
                raise

    def norms(self) -> dict[str, float]:
        """The latest estimate of every layer's norm, {layer name: norm}, from below and as accurate as in training steps.

        Raises:
            ValueError: a layer's weights are not finite.
        """
        self._turns.measure(list(self._tracked.values()))
        return {name: tracked.estimate for name, tracked in self._tracked.items()}

    def finish(self) -> dict[str, ClipResult]:
        """Clip every layer until its norm is proved to be at most 1.001 of its target; return the clips by layer name.

        Warns if weights have changed more than once since `attach` or the last step, as happens if the attached optimizer is
        replaced or copied. If neither `attach` nor `step` was called, warns only if they have gradients or changed many times.

        Raises:
            ValueError: a layer's weights are not finite; or the network's bound, for a ``lipschitz_target``, is refuted.
        """
        if self.off:
            return {}
        self._warn_if_dead()
        self._turns.restart(self._turns.count)
        self._resolve()
        first = self._finish_once()
        while self._lipschitz_target is not None and (excess := self._excess(self._lipschitz_target)) > 1:
            for tracked in self._tracked.values():
                tracked.target *= excess ** (-1 / len(self._tracked))
            again = self._finish_once()
            first = {name: first[name].then(last) for name, last in again.items()}
        self._results = first
        if any(result.steps for result in first.values()) and self._shares_weights():
            self._results = {name: first[name].then(last) for name, last in self._finish_once().items()}
        for tracked in self._tracked.values():
            tracked.seen = -1  # so that `norms` measures again
        self._note_weights()
        return dict(self._results)

    def report(self, rtol: float = TOLERANCE / 4) -> list[dict[str, Any]]:
        """A row for each layer: name, kind, lower and upper end of its norm now, target, and the distortion from `finish`.

        Args:
            rtol: Width upper / lower - 1 of the intervals; the default is narrow enough to decide whether a target is met.
        """
        self._resolve()
        rows = []
        for name, tracked in self._tracked.items():
            norm = tracked.enclosure(self._failure_probability, rtol)
            moved = self._results[name].distortion if name in self._results else None
            target = None if math.isinf(tracked.target) else tracked.target
            rows.append({"name": name, "kind": tracked.kind, "lower": norm.lower, "upper": norm.upper,
                         "target": target, "distortion": moved})  # fmt: skip
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The state from which `load_state_dict` continues exactly, except for work under way on a GPU; values and tensors."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "turns": self._turns.count,
            "layers": {name: held.entry() for name, held in self._held.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the ``state`` of another clipper of the same model; the options of this one stay, ``max_norm`` included.

        Raises:
            ValueError: the state belongs to a model with other layers, or is not of a clipper.
        """
        if not isinstance(state, Mapping) or "layers" not in state:
            raise ValueError("FastClip.load_state_dict: takes the state_dict() of a clipper")
        if state["layers"].keys() != self._tracked.keys():
            differing = sorted(state["layers"].keys() ^ self._tracked.keys())
            raise ValueError(f"FastClip.load_state_dict: the state is of a model with other layers; they differ in {differing}")
        self.steps, self.skipped = int(state["steps"]), int(state["skipped"])
        self._turns.restart(int(state.get("turns", self.steps)))
        for name, entry in state["layers"].items():
            asked = self._tracked[name].target
            self._held[name].restore(entry)
            if not self._relative and self._lipschitz_target is None:  # else it follows from the first step's weights
                self._tracked[name].target = asked
        self._note_weights()

    def _excess(self, lipschitz_target: float) -> float:
        """The network's bound divided by ``lipschitz_target``; a bound that meets the target is checked."""
        model, example = self._network
        example = example.to(next(model.parameters()).device)
        bound = lipschitz_bound(model, example, self._failure_probability, None)
        if math.isinf(bound.value):
            raise ValueError(f"FastClip(lipschitz_target={lipschitz_target:g}): {bound.reason}")
        if bound.value <= lipschitz_target:
            check_target(model, example, bound, lipschitz_target)
        return bound.value / lipschitz_target

    def _finish_once(self) -> dict[str, ClipResult]:
        held = {name: tracked for name, tracked in self._tracked.items() if not math.isinf(tracked.target)}
        return {name: clip_until_proved_(t, t.target, self._failure_probability) for name, t in held.items()}

    @full_precision_no_grad()
    def _resolve(self) -> None:
        """Decide for every layer, once, whether it is clipped together with its batch normalisation, and set its target."""
        open_layers = [held for held in self._held.values() if held.whole.composite is None]
        layers = [held.whole.layer for held in open_layers]
        if self._lipschitz_target is not None:
            self._choice.check_bound(self._lipschitz_target, layers)
        for held in open_layers:
            tracked = held.whole
            if not all(bool(torch.isfinite(p).all()) for p in tracked.move.parameters(tracked.layer)):
                raise not_finite(tracked)
            for part in held.parts:
                part.resolve(self._choice.together(tracked.layer))
            if not self.off:
                self._turns.start(held)
            if self._relative and not math.isinf(tracked.target):
                own = tracked.enclosure(self._failure_probability, rtol=1e-2).lower
                tracked.target = tracked.target * own if own > 0 else math.inf  # a zero layer has no norm to multiply
        if open_layers and self._lipschitz_target is not None:
            model, example = self._network
            composites = {name: bool(tracked.composite) for name, tracked in self._tracked.items()}
            example = example.to(next(model.parameters()).device)
            norm = norm_for(model, example, composites, self._lipschitz_target, self._failure_probability)
            for tracked in self._tracked.values():
                tracked.target = min(tracked.target, norm)
        if not self.off:
            self._choice.warn_of_training(layers)

    def _target(self, held: HeldLayer, norm: float) -> float:
        """The norm allowed to a layer at this step; during warm-up it falls from the layer's norm at the first step."""
        tracked = held.whole
        if self._warmup_steps <= 0 or math.isinf(tracked.target):
            return tracked.target
        if math.isnan(tracked.initial):
            tracked.initial = max(norm, tracked.target)
        left = max(0.0, 1 - self.steps / self._warmup_steps)
        return tracked.target * (tracked.initial / tracked.target) ** left

    def _note_weights(self) -> None:
        """Remember how often each weight has been changed in place so far."""
        self._versions = {name: tracked.versions for name, tracked in self._tracked.items()}

    def _warn_if_dead(self) -> None:
        changes = {name: t.changes_since(self._versions[name]) for name, t in self._tracked.items()}
        moved = [name for name, count in changes.items() if count > 1]
        parameters = [p for name in moved for p in self._tracked[name].layer.module.parameters()]
        trained = max(changes.values()) > _MANY_CHANGES or any(p.grad is not None for p in parameters)
        if moved and (self._handles or (trained and not self.steps)):
            warn_user(
                f"FastClip.finish: {counted(moved)} changed more than once since step {self.steps} of this clipper. If "
                "that was training, its optimizer does not call the clipper (replaced, copied or unpickled optimizers lose the "
                "hook); attach the clipper to the one that trains."
            )

    def _shares_weights(self) -> bool:
        return len({id(t.layer.module.weight) for t in self._tracked.values()}) < len(self._tracked)
