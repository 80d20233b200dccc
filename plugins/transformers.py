"""`FastClip` as a callback of the ``Trainer`` of transformers.

The trainer makes the optimizer and restores a checkpoint before it calls its callbacks at the start of training, and writes its
checkpoints before it calls them at the end. Therefore a folder ``checkpoint-<step>`` contains the weights after that step and
the clipper's state in ``fastclip.pt``. Norms are proved when ``train`` returns (those of the best weights, with
``load_best_model_at_end``), and ``trainer.save_model`` then writes the weights with proved norms.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from robust_spectral import ClipResult, FastClip
from robust_spectral.layers import example_for

STATE_NAME = "fastclip.pt"


class FastClipCallback(TrainerCallback):
    """A callback that keeps the spectral norms of a model's layers at ``max_norm`` in training, and proves them at the end.

    The largest norm, an estimate from below, is in the trainer's log history as ``spectral/max_norm``. A run that is resumed
    from its own output folder continues exactly. After training, ``clipper`` is the `FastClip` and ``results`` the results of
    its `finish`, by layer.

    Args:
        max_norm: The spectral norm allowed, or norms by name pattern.
        example_input: A batch for the first argument of the model's forward, (n, ...): ``pixel_values``, ``input_ids``, ….
        **options: Options of `robust_spectral.FastClip`: ``composites``, ``warmup_steps``, ….
    """

    def __init__(self, max_norm: float | Mapping[str, float] = 1.0, *, example_input: Tensor, **options: Any) -> None:
        self.max_norm, self.example_input, self.options = max_norm, example_input, options
        self.clipper: FastClip | None = None
        self.results: dict[str, ClipResult] = {}
        self._handle: RemovableHandle | None = None
        self._steps_before = 0, 0  # of the clipper and of the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module,
        optimizer: torch.optim.Optimizer, **_: Any,
    ) -> None:  # fmt: skip
        """Make the clipper, restore its state if the run is resumed, and hook the optimizer that accelerate wraps."""
        self._detach()  # the hook of a run that ended in an error
        self.clipper = FastClip(model, example_for(model, self.example_input), self.max_norm, **self.options)
        if state.global_step:
            _restore(self.clipper, args, state)
        self._steps_before = self.clipper.steps, state.global_step
        self._handle = self.clipper.attach(optimizer)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Add the largest norm to the log of training."""
        if self.clipper is not None and "loss" in logs:
            logs["spectral/max_norm"] = state.log_history[-1]["spectral/max_norm"] = _largest_norm(self.clipper)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the clipper's state into the checkpoint's folder."""
        if self.clipper is not None and args.should_save and (folder := _checkpoint(args, state)).is_dir():
            torch.save(self.clipper.state_dict(), folder / STATE_NAME)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Unhook the optimizer and clip until every norm is proved.

        Raises:
            RuntimeError: the optimizer took steps, but the clipper saw none.
        """
        assert self.clipper is not None
        self._detach()
        seen, taken = self.clipper.steps - self._steps_before[0], state.global_step - self._steps_before[1]
        if taken and not seen:
            raise RuntimeError(
                f"FastClipCallback: the clipper saw none of the {taken} steps of this run, so nothing was clipped in training; "
                "the trainer's optimizer was replaced after on_train_begin, or skipped every step (float16 overflow)"
            )
        self.results = self.clipper.finish()

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _restore(clipper: FastClip, args: TrainingArguments, state: TrainerState) -> None:
    """Load the clipper's state from a checkpoint's folder; the trainer does not tell its callbacks which one it resumed."""
    named = [Path(args.resume_from_checkpoint)] if args.resume_from_checkpoint else []
    for path in (folder / STATE_NAME for folder in (*named, _checkpoint(args, state))):
        if path.is_file():
            clipper.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return
    warnings.warn(
        f"FastClipCallback: the run continues at step {state.global_step} and there is no {path}, so the clipper starts "
        "afresh; to continue exactly, set resume_from_checkpoint of the TrainingArguments to the checkpoint that has one",
        stacklevel=2,
    )


def _largest_norm(clipper: FastClip) -> float:
    try:
        return max(clipper.norms().values())
    except ValueError:  # weights are not finite; the clipper raises an error if they stay so
        return math.nan
