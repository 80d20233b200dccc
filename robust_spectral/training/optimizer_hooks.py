"""The hooks that an optimizer calls before and after each of its steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

Hook = Callable[[], None]


def hooked(optimizer: Any, before: Hook, behind: Hook, known: Sequence[RemovableHandle] = ()) -> RemovableHandle:
    """Call ``before`` and ``behind`` around every step of an optimizer, or of the optimizer inside a wrapper without hooks.

    Returns one handle that removes both hooks. If one of the handles ``known`` is of this optimizer already, nothing is added
    and that handle is returned. ``before`` is not called at steps that are being captured in a CUDA graph, nor by wrappers that
    only have `register_step_post_hook`.

    Raises:
        TypeError: ``optimizer`` has no such hooks.
    """
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer):
            return hooked(inner, before, behind, known)
        if not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(f"FastClip.attach: takes an optimizer, or a wrapper of one; got {type(optimizer).__name__}")
        return _unless_known(optimizer.register_step_post_hook(lambda *_: behind()), known)
    hooks = optimizer._optimizer_step_post_hooks, optimizer._optimizer_step_pre_hooks
    handle = RemovableHandle(hooks[0], extra_dict=hooks[1])
    hooks[0][handle.id], hooks[1][handle.id] = lambda *_: behind(), lambda *_: None if captured() else before()
    return _unless_known(handle, known)


def _unless_known(handle: RemovableHandle, known: Sequence[RemovableHandle]) -> RemovableHandle:
    """The handle; if a living handle ``known`` is of the same optimizer, remove the new one and return the known one."""
    for other in known:
        if alive(other) and other.hooks_dict_ref() is handle.hooks_dict_ref():
            handle.remove()
            return other
    return handle


def alive(handle: RemovableHandle) -> bool:
    """Whether the optimizer of a handle still exists and still has the hooks."""
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


def dead(count: int) -> list[RemovableHandle]:
    """A number ``count`` of handles of optimizers that no longer exist."""
    return [RemovableHandle(OrderedDict()) for _ in range(count)]


def captured() -> bool:
    """Whether calls are being captured in a CUDA graph, that is, recorded and not executed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
