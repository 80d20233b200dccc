"""Models named on the command line: timm/NAME, or a function of the user's own that makes one.

Any error in the user's code is reported in one line, with its place in that code.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from robust_spectral import plugins
from robust_spectral.plugins.timm import load

TRUSTED = "ROBUST_SPECTRAL_MODEL"  # environment variable: the one specification whose code may be run


def from_spec(
    spec: str, classes: int | None, channels: int, *, pretrained: bool = False, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:  # fmt: skip
    """Make the model of a specification, from pixels in [0, 1] to logits.

    Args:
        spec: ``timm/NAME``, ``module:function`` or ``file.py:function``, a function without arguments.
        classes: Number of classes of a timm model; default: its own.
        channels: Number of input channels of a timm model.
        pretrained: Whether a timm model comes with its published weights.
        mean: Mean for the input of a timm model, in place of timm's own.
        std: Standard deviation, in the same form.

    Raises:
        ValueError: there is no such model, the function failed, or its result is no module.
    """
    if spec.startswith("timm/"):
        return load(
            spec.removeprefix("timm/"), pretrained=pretrained, num_classes=classes, in_chans=channels, mean=mean, std=std
        )
    if mean is not None or std is not None:
        raise ValueError(f"model {spec!r}: takes pixels in [0, 1]; a mean and std go with timm/NAME")
    module, colon, function = spec.rpartition(":")
    if not colon:
        raise ValueError(f"model {spec!r}: expected timm/NAME, module:function or file.py:function")
    try:
        model = _function(module, function)()
    except (Exception, SystemExit) as error:
        raise ValueError(f"model {spec!r}: cannot be made: {told(error)}{_file_instead(module, function)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {spec!r}: gave a {type(model).__name__}, expected a torch.nn.Module")
    return model


def check_trust(spec: str, folder: Path) -> None:
    """Refuse to run code that a run folder names for its model, unless the user has named the same code.

    Raises:
        ValueError: the user has not named it.
    """
    if not spec.startswith("timm/") and os.environ.get(TRUSTED) != spec:
        raise ValueError(
            f"{folder}: its model is made by the code {spec!r}, which is not run unless you ask for it: give "
            f"--model {spec} with --data and --out {folder}, or set {TRUSTED}={spec}"
        )


def told(error: BaseException) -> str:
    """An error of the user's code in one line: its type, its message, and the last line of that code in its traceback."""
    others = (str(Path(__file__).parents[1]), *plugins.__path__, importlib.__file__, "<frozen", "site-packages")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(part in f.filename for part in others)]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


def _function(module: str, function: str) -> Any:
    found = runpy.run_path(module) if module.endswith(".py") else vars(_imported(module))
    if function not in found:
        there = ", ".join(name for name, value in found.items() if callable(value) and not name.startswith("_"))
        raise AttributeError(f"{module} has no {function!r}; it has {there or 'no function'}")
    return found[function]


def _imported(module: str) -> ModuleType:
    """Import a module, also from the current folder, as `python -m` does."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(module)


def _file_instead(module: str, function: str) -> str:
    """A hint at the file to name in place of a module that could not be used, if there is one."""
    files = [f"{name}.py" for name in dict.fromkeys((module, module.replace(".", "/"))) if not module.endswith(".py")]
    taken = getattr(sys.modules.get(module), "__file__", None)
    near = next((f for f in files if Path(f).is_file() and not (taken and Path(f).samefile(taken))), None)
    return f"; did you mean the file, {near}:{function}?" if near else ""
