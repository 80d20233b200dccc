"""The state of a live model: a snapshot of all that its forward pass may read or change, to compare with and to restore.

Besides parameters and buffers these are the attributes of its modules, and what their hooks and replaced forwards hold: lists,
dictionaries and objects in closures and among the globals that they name.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import re
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

_LIBRARIES = ("torch", "builtins", "functools", "typing", "logging", "numpy")
_MOST = 200_000  # most objects that are followed
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, torch.Size, types.ModuleType)
_UNNAMED = re.compile(r"\.(_parameters|_buffers|_modules|cell_contents|__self__|__func__)\b")  # left out of an object's name


class LiveState:
    """A snapshot of a model's tensors and Python state.

    Args:
        model: The model.
        copies: Whether to copy its tensors, so that `restore` can give them their values back, or to keep a digest of each.
    """

    def __init__(self, model: nn.Module, copies: bool = True) -> None:
        self._copies = copies
        self._kept: dict[int, tuple[str, Any, Any]] = {}  # id -> name, object, its contents
        hooks = [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]
        pending: deque[tuple[str, Any]] = deque([("model", model), ("global hooks", hooks)])
        while pending and len(self._kept) < _MOST:
            name, item = pending.popleft()
            if id(item) not in self._kept and not isinstance(item, _PLAIN):
                self._kept[id(item)] = name, item, self._contents(item)
                pending.extend((_of(name, key), part) for key, part in _followed(item).items())

    def changed(self) -> str | None:
        """The name of the first object whose contents have changed; None if all are as they were."""
        return _first_different((name, before, self._contents(item)) for name, item, before in self._kept.values())

    def differs(self, other: LiveState) -> str | None:
        """The name of the first object that has other contents in another snapshot; None if there is none."""
        one, two = ({name: _values(contents) for name, _, contents in state._kept.values()} for state in (self, other))
        return _first_different((name, one.get(name), two.get(name)) for name in {**one, **two})

    def restore(self) -> None:
        """Give all objects the contents that they had; tensors only where they were copied."""
        for _, item, before in self._kept.values():
            if not isinstance(before, bytes) and not _same(before, self._contents(item), operator.is_):
                _write(item, before)

    def _contents(self, item: Any) -> Any:
        """A copy of what an object holds itself: a tensor's values or their digest, or references to its parts."""
        if isinstance(item, Tensor) and not self._copies:
            return hashlib.blake2b(_bits(item.detach()).cpu().numpy().tobytes()).digest()
        if isinstance(item, Tensor):
            return item.detach().clone()
        return item.copy() if isinstance(item, bytearray | np.ndarray) else _parts(item)


def _of(name: str, key: Any) -> str:
    """The name of an attribute or entry of a named object."""
    return f"{name}.{key}" if isinstance(key, str) else f"{name}[{key!r}]"


def _first_different(contents: Iterable[tuple[str, Any, Any]]) -> str | None:
    """The name of the first object, or of its first attribute or entry, that differs between two contents."""
    for name, before, after in contents:
        if not _same(before, after):
            both = {**before, **after} if isinstance(before, dict) and isinstance(after, dict) else {}
            names = [_of(name, key) for key in both if not _same(before.get(key), after.get(key))]
            return _UNNAMED.sub("", names[0] if names else name)
    return None


def _values(contents: Any) -> Any:
    """Contents as far as they are values: other objects have entries of their own."""
    if not isinstance(contents, dict):
        return contents
    return {key: value if isinstance(value, (*_PLAIN, Tensor)) else type(value) for key, value in contents.items()}


def _parts(item: Any) -> dict[Any, Any] | None:
    """The objects that an object holds and can be given again, by key, position or attribute; None if it holds none."""
    if isinstance(item, dict):
        return dict(item)
    if isinstance(item, list | set | deque):
        return dict(enumerate(item))
    return _attributes(item) if isinstance(item, types.CellType) or _has_attributes(item) else None


def _attributes(item: Any) -> dict[str, Any]:
    """The attributes of an instance, in its dictionary or its slots; the contents of a cell of a closure, if it has any."""
    if isinstance(item, types.CellType):
        return {} if item == types.CellType() else {"cell_contents": item.cell_contents}
    slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
    held = {name: getattr(item, name) for name in slots if isinstance(name, str) and name != "__dict__" and hasattr(item, name)}
    return held | getattr(item, "__dict__", {})


def _same(before: Any, after: Any, parts: Callable[[Any, Any], bool] | None = None) -> bool:
    """Whether two objects are one, or equal numbers, tensors, or containers of them, with ``parts`` compared likewise."""
    if before is after:
        return True
    if type(before) is not type(after):
        return False
    if isinstance(before, Tensor):
        if before.shape != after.shape or before.dtype != after.dtype or before.is_meta:
            return False
        return torch.equal(_bits(before), _bits(after))
    if isinstance(before, dict):
        return list(before) == list(after) and _same([*before.values()], [*after.values()], parts)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(parts or _same, before, after))
    if isinstance(before, np.ndarray):
        return bool(before.shape == after.shape and before.tobytes() == after.tobytes())
    return isinstance(before, (*_PLAIN, bytearray)) and bool(before == after)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals itself."""
    whole = tensor.contiguous()
    return whole.reshape(-1).view(torch.uint8) if whole.is_floating_point() or whole.is_complex() else whole


@torch.no_grad()
def _write(item: Any, before: Any) -> None:
    if isinstance(item, Tensor):
        if item.shape == before.shape:
            item.data.copy_(before)
        else:
            item.data = before.clone()
    elif isinstance(item, bytearray | np.ndarray):
        item[:] = before
    elif isinstance(item, dict):
        item.clear()
        item.update(before)
    elif isinstance(item, set):
        item.clear()
        item.update(before.values())
    elif isinstance(item, list | deque):
        item.clear()
        item.extend(before.values())
    else:
        for name in _attributes(item).keys() - before.keys():
            delattr(item, name)
        own = getattr(item, "__dict__", {})
        for name, value in before.items():
            if name in own:
                own[name] = value
            else:
                setattr(item, name, value)


def _followed(item: Any) -> dict[Any, Any]:
    """The objects that an object refers to, as far as a forward pass may read or change them."""
    if isinstance(item, tuple):
        return dict(enumerate(item))
    if isinstance(item, types.MethodType):
        return {"__self__": item.__self__, "__func__": item.__func__, **_class_stores(item.__self__)}
    if isinstance(item, functools.partial):
        return {"func": item.func, "args": item.args, "keywords": item.keywords}
    if isinstance(item, types.FunctionType):
        known = {name: item.__globals__.get(name) for name in item.__code__.co_names}
        read = {name: part for name, part in known.items() if _is_store(part) or _has_attributes(part)}
        closure = zip(item.__code__.co_freevars, item.__closure__ or (), strict=True)
        return {**dict(enumerate(item.__defaults__ or ())), **read, **dict(closure)}
    return {**(_parts(item) or {}), **(_class_stores(item) if _has_attributes(item) else {})}


def _class_stores(item: Any) -> dict[str, Any]:
    """Lists, dictionaries and the like that are attributes of a class, or an object's class, that is not a library's."""
    kinds = item.__mro__ if isinstance(item, type) else type(item).__mro__
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in _LIBRARIES]
    return {f"{kind.__name__}.{key}": value for kind in own for key, value in vars(kind).items() if _is_store(value)}


def _is_store(value: Any) -> bool:
    return isinstance(value, dict | list | set | deque | bytearray | np.ndarray | Tensor | nn.Module)


def _has_attributes(item: Any) -> bool:
    """Whether an object is an instance with attributes of its own, of a class that is not part of torch or Python."""
    if isinstance(item, nn.Module):
        return True
    has = hasattr(item, "__dict__") or hasattr(type(item), "__slots__")
    return has and type(item).__module__.partition(".")[0] not in _LIBRARIES
