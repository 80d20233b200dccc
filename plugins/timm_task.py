"""FastClip as a timm training task: timm's own train.py, or a loop like it, with one class exchanged.

`FastClipTask` replaces `ClassificationTask`. It clips in `update_ema`, which timm's loop calls after every update, with or
without a moving average: after the optimizer, its gradient scaler and Lookahead's averaging, so that no hook on it is needed.
timm's checkpoints contain the clipper's state as task state, separate from the weights.

    python -m robust_spectral.plugins.timm_task --max-norm 1 train.py --model resnet18 …

runs a train.py unchanged, under torchrun as well, with that class in it, and at its end writes the weights, clipped to proved
norms: those of the moving average if there is one.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import timm.task
import torch
from timm.data import resolve_model_data_config
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from robust_spectral import ClipResult, FastClip
from robust_spectral.layers import example_for


class FastClipTask(ClassificationTask):
    """timm's classification task with the spectral norms of the model's layers kept at ``max_norm``.

    Args:
        model: A timm model, or any other with ``example_input``; not yet compiled or distributed, as in timm's train.py.
        criterion: The loss, as for ``ClassificationTask``.
        max_norm: The spectral norm allowed in every layer.
        example_input: A batch in the shape that the model is trained on; default one of timm's input size for the model.
        spectral: Options for `robust_spectral.FastClip`: ``composites``, ``warmup_steps``, …
        **kwargs: Further arguments of ``ClassificationTask`` (``device``, ``dtype``, …).

    Raises:
        ValueError: see `robust_spectral.FastClip`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any = None,
        *,
        max_norm: float = 1.0,
        example_input: Tensor | None = None,
        spectral: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, criterion, **kwargs)
        if example_input is None:
            example_input = torch.zeros(1, *resolve_model_data_config(model)["input_size"])
        self._example = example_for(model, example_input)
        self.max_norm, self._options = max_norm, spectral or {}
        self.clipper = FastClip(model, self._example, max_norm, **self._options)

    def update_ema(self, step: int | None = None) -> None:
        """Clip after an update, then update the moving average, whose norms stay within ``max_norm`` as norms are convex."""
        self.clipper.step()
        super().update_ema(step)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The clipper's state: plain values and tensors, loadable with ``weights_only``."""
        return {} if ema else {"fastclip": self.clipper.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Continue from a checkpoint's state; if it has no clipper's state, as after a run without clipping, start afresh.

        Raises:
            ValueError: the state belongs to a model with other layers.
        """
        if state and "fastclip" in state and not ema:
            self.clipper.load_state_dict(state["fastclip"])

    def finish(self) -> dict[str, ClipResult]:
        """Clip until every norm is proved, in the model and its moving average; return the model's results by layer.

        Raises:
            ValueError: a layer's weights are not finite.
        """
        results = self.clipper.finish()
        if self.has_ema():
            average = unwrap_model(self.get_trainable_module(ema=True))
            clipper = FastClip(average, self._example, self.max_norm, **self._options)
            clipper.load_state_dict(self.clipper.state_dict())  # the same composites and singular vectors
            clipper.finish()
        return results


def main(arguments: list[str]) -> FastClipTask:
    """Run a train.py with `FastClipTask` in place of timm's ``ClassificationTask``; return the task that it trained.

    Args:
        arguments: ``--max-norm``, ``--composites``, ``--image-size`` and ``--out``, then train.py and its own arguments.

    Raises:
        RuntimeError: the script made no ``ClassificationTask``.
    """
    what = "Run timm's train.py with its layers' spectral norms kept at --max-norm, and write the weights with proved norms."
    parser = argparse.ArgumentParser("python -m robust_spectral.plugins.timm_task", description=what)
    parser.add_argument("--max-norm", type=float, default=1.0, help="spectral norm allowed in every layer")
    parser.add_argument("--composites", default="auto", help="clip a layer with its batch normalisation: auto, always or never")
    parser.add_argument("--image-size", type=int, help="height and width in training; default timm's for the model")
    parser.add_argument("--out", type=Path, default=Path("clipped.safetensors"), help="file for the weights with proved norms")
    parser.add_argument("script", help="timm's train.py, or one that uses timm.task in the same way")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of the script")
    ours = parser.parse_args(arguments)
    ours.out.parent.mkdir(parents=True, exist_ok=True)
    made: list[FastClipTask] = []

    def task(model: nn.Module, *args: Any, **kwargs: Any) -> FastClipTask:
        _, *usual = resolve_model_data_config(model)["input_size"]
        channels = next((p.shape[1] for p in model.parameters() if p.ndim == 4), 3)  # of the first convolution
        example = torch.zeros(1, channels, *(usual if ours.image_size is None else [ours.image_size] * 2))
        spectral = {"composites": ours.composites}
        made.append(FastClipTask(model, *args, max_norm=ours.max_norm, example_input=example, spectral=spectral, **kwargs))
        return made[-1]

    before = sys.argv, sys.path, timm.task.ClassificationTask
    sys.argv, sys.path = [ours.script, *ours.rest], [str(Path(ours.script).parent), *sys.path]
    timm.task.ClassificationTask = task
    try:
        runpy.run_path(ours.script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv, sys.path, timm.task.ClassificationTask = before
    if not made:
        raise RuntimeError(f"{ours.script}: made no timm.task.ClassificationTask, so nothing was clipped")
    made[-1].finish()
    if os.environ.get("RANK", "0") == "0":
        trained = unwrap_model(made[-1].get_trainable_module(ema=made[-1].has_ema()))
        scratch = ours.out.with_suffix(".part")
        safetensors.torch.save_file({key: value.contiguous() for key, value in trained.state_dict().items()}, scratch)
        scratch.replace(ours.out)
    return made[-1]


if __name__ == "__main__":
    for row in main(sys.argv[1:]).clipper.report():
        print(f"{row['name']}: {row['upper']:.5g}")  # noqa: T201
