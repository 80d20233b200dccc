"""`FastClip` as a callback of Lightning's ``Trainer``.

The clipper is made when training starts, after the weights are on their device and a checkpoint is restored. It clips after the
steps of every optimizer that trains its layers, whether Lightning or the module calls them. Lightning's checkpoints include its
state, so that a resumed run continues exactly. Checkpoints written during training contain the weights after the last step;
norms are proved when training ends, so that ``trainer.save_checkpoint`` after ``fit`` writes weights with proved norms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from robust_spectral import ClipResult, FastClip
from robust_spectral.layers import example_for


class FastClipCallback(Callback):
    """A callback that keeps the spectral norms of a module's layers at ``max_norm`` in a fit, and proves them at the end.

    The largest norm, an estimate from below, is logged as ``spectral/max_norm`` (``spectral/<module>/max_norm`` where a
    submodule is named) at every ``log_every_n_steps``-th step. After a fit, ``clipper`` is the `FastClip` and ``results``
    the results of its `finish`, by layer. List this callback after those that average weights, so that the norms of the
    averages are proved.

    Args:
        max_norm: The spectral norm allowed, or norms by name pattern.
        example_input: A batch that the module takes, (n, ...); default the ``example_input_array`` of the LightningModule.
        module: Name of the submodule to clip ("discriminator", "net.head"); default the LightningModule itself.
        **options: Options of `robust_spectral.FastClip`: ``composites``, ``warmup_steps``, ….
    """

    def __init__(
        self, max_norm: float | Mapping[str, float] = 1.0, example_input: Tensor | None = None, module: str | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.max_norm, self.example_input, self.module, self.options = max_norm, example_input, module, options
        self.clipper: FastClip | None = None
        self.results: dict[str, ClipResult] = {}
        self._restored: dict[str, Any] | None = None
        self._handles: list[RemovableHandle] = []
        self._steps_before = 0, 0  # of the clipper and of the trainer

    @property
    def state_key(self) -> str:
        """The key of this callback in a checkpoint, different for each submodule."""
        key: str = self._generate_state_key(module=self.module)
        return key

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the clipper and hook the optimizers.

        Raises:
            ValueError: there is no example input, or a callback that averages weights comes after this one.
        """
        self._refuse_averages_behind(trainer.callbacks)
        model = pl_module if self.module is None else pl_module.get_submodule(self.module)
        self.clipper = FastClip(model, example_for(model, self._example(pl_module)), self.max_norm, **self.options)
        if self._restored is not None:
            self.clipper.load_state_dict(self._restored)
            self._restored = None
        self._steps_before = self.clipper.steps, trainer.global_step
        self._handles = [self.clipper.attach(optimizer) for optimizer in _that_train(self.clipper, trainer.optimizers)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the largest norm at the steps at which the trainer logs."""
        every = trainer.log_every_n_steps
        if self.clipper is not None and every and trainer.global_step and trainer.global_step % every == 0:
            name = "max_norm" if self.module is None else f"{self.module}/max_norm"
            pl_module.log(f"spectral/{name}", _largest_norm(self.clipper))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unhook the optimizers and clip until every norm is proved.

        Raises:
            RuntimeError: the optimizers took steps, but the clipper saw none.
        """
        assert self.clipper is not None
        self._detach()
        seen, taken = self.clipper.steps - self._steps_before[0], trainer.global_step - self._steps_before[1]
        if taken and not seen:
            raise RuntimeError(
                f"FastClipCallback: the clipper saw none of the {taken} optimizer steps of this fit, so nothing was clipped in "
                "training; the optimizers were replaced after on_train_start. Replace them before that, in on_fit_start"
            )
        self.results = self.clipper.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unhook the optimizers."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """The clipper's state, which Lightning puts into its checkpoints."""
        return self._restored or ({} if self.clipper is None else self.clipper.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint, now or as soon as training starts."""
        if self._handles and self.clipper is not None:
            self.clipper.load_state_dict(state_dict)
        else:
            self._restored = state_dict

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _example(self, pl_module: LightningModule) -> Tensor:
        given = pl_module.example_input_array if self.example_input is None else self.example_input
        if isinstance(given, Tensor):
            return given
        raise ValueError(
            f"FastClipCallback: needs an example of the tensor {type(pl_module).__name__} takes, got {type(given).__name__}; "
            "give FastClipCallback(example_input=...), a batch of zeros will do, or set self.example_input_array in the module"
        )

    def _refuse_averages_behind(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks[callbacks.index(self) + 1 :]:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ValueError(
                    f"FastClipCallback: {type(callback).__name__} comes after it in the trainer's callbacks, and would replace "
                    "weights with proved norms by their average; list FastClipCallback last"
                )


def _that_train(clipper: FastClip, optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """The optimizers, unwrapped, that have a parameter of the clipper's layers; all if those layers are still frozen."""
    bare = [o.optimizer if isinstance(o, LightningOptimizer) else o for o in optimizers]
    modules = [m for layer in clipper.layers for m in (layer.module, layer.batchnorm) if m is not None]
    held = {id(parameter) for module in modules for parameter in module.parameters()}
    return [o for o in bare if any(id(p) in held for group in o.param_groups for p in group["params"])] or bare


def _largest_norm(clipper: FastClip) -> float:
    try:
        return max(clipper.norms().values())
    except ValueError:  # weights are not finite; the clipper raises an error if they stay so
        return math.nan
