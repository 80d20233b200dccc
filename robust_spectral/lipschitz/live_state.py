"""The state of a live model: a snapshot of all that its forward pass may read or change, to compare with and to restore.

Besides parameters and buffers these are the attributes of its modules, and what their hooks and replaced forwards hold: lists,
dictionaries and objects in closures and among the globals that they name.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

_LIBRARIES = ("torch", "builtins", "functools", "typing", "logging", "numpy")
_MOST = 200_000  # most objects that are followed
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, torch.Size, types.ModuleType)


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
            if id(item) in self._kept or isinstance(item, _PLAIN):
                continue
            self._kept[id(item)] = name, item, self._contents(item)
            pending.extend(_parts(name, item))

    def changed(self) -> str | None:
        """The name of the first object whose contents have changed; None if all are as they were."""
        for name, item, before in self._kept.values():
            after = self._contents(item)
            if not _same(before, after):
                return _place(name, before, after)
        return None

    def differs(self, other: LiveState) -> str | None:
        """The name of the first object that has other contents in another snapshot; None if there is none."""
        one, two = ({name: contents for name, _, contents in state._kept.values()} for state in (self, other))
        for name in [*one, *(name for name in two if name not in one)]:
            before, after = (_values(found.get(name)) for found in (one, two))
            if not _same(before, after):
                return _place(name, before, after)
        return None

    def restore(self) -> None:
        """Give all objects the contents that they had; tensors only where they were copied."""
        for _, item, before in self._kept.values():
            if not isinstance(before, _Digest) and not _identical(before, self._contents(item)):
                _write(item, before)

    def _contents(self, item: Any) -> Any:
        if isinstance(item, Tensor) and not self._copies:
            return _Digest(hashlib.blake2b(_bits(item.detach()).cpu().numpy().tobytes()).digest())
        return _contents(item)


class _Digest(bytes):
    """A digest of a tensor's values."""


def _place(name: str, before: Any, after: Any) -> str:
    """The name of an object, or of the first of its attributes or entries that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *after]:
            if key not in before or key not in after or not _same(before[key], after[key]):
                return f"{name}.{key}" if isinstance(key, str) else f"{name}[{key!r}]"
    return name


def _values(contents: Any) -> Any:
    """Contents as far as they are values: other objects have entries of their own."""
    if isinstance(contents, dict):
        return {key: value if isinstance(value, (*_PLAIN, Tensor)) else type(value) for key, value in contents.items()}
    if isinstance(contents, list):
        return [value if isinstance(value, (*_PLAIN, Tensor)) else type(value) for value in contents]
    return contents


def _identical(before: Any, after: Any) -> bool:
    """Whether contents are the same objects, or tensors and arrays of the same values."""
    if isinstance(before, dict):
        return list(before) == list(after) and all(before[key] is after[key] for key in before)
    if isinstance(before, list):
        return len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
    return _same(before, after)


def _contents(item: Any) -> Any:
    """A copy of what an object holds itself: a tensor's values, or references to the parts of a container."""
    if isinstance(item, Tensor):
        return item.detach().clone()
    if isinstance(item, bytearray) or is_array(item):
        return item.copy()
    if isinstance(item, dict):
        return dict(item)
    if isinstance(item, list | set | deque):
        return list(item)
    if isinstance(item, types.CellType):
        return [item.cell_contents] if _filled(item) else []
    return _attributes(item) if _has_attributes(item) else None


def _attributes(item: Any) -> dict[str, Any]:
    """The attributes of an instance, in its dictionary or its slots."""
    slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
    held = {name: getattr(item, name) for name in slots if isinstance(name, str) and name != "__dict__" and hasattr(item, name)}
    return held | getattr(item, "__dict__", {})


def _same(before: Any, after: Any) -> bool:
    """Whether two objects are one, or equal numbers, tensors, or containers of them."""
    if before is after:
        return True
    if type(before) is not type(after):
        return False
    if isinstance(before, Tensor):
        if before.shape != after.shape or before.dtype != after.dtype or before.is_meta:
            return False
        return torch.equal(_bits(before), _bits(after))
    if isinstance(before, dict):
        return list(before) == list(after) and all(_same(before[key], after[key]) for key in before)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(_same(a, b) for a, b in zip(before, after, strict=True))
    if is_array(before):
        return before.shape == after.shape and bool(before.tobytes() == after.tobytes())
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
    elif isinstance(item, dict | set):
        item.clear()
        item.update(before)
    elif isinstance(item, list | deque):
        item.clear()
        item.extend(before)
    elif isinstance(item, types.CellType):
        item.cell_contents = before[0]
    elif isinstance(item, bytearray) or is_array(item):
        item[:] = before
    else:
        for name in _attributes(item).keys() - before.keys():
            delattr(item, name)
        own = getattr(item, "__dict__", {})
        for name, value in before.items():
            if name in own:
                own[name] = value
            else:
                setattr(item, name, value)


def _parts(name: str, item: Any) -> Iterator[tuple[str, Any]]:
    """The named objects that an object refers to, as far as a forward pass may read or change them."""
    if isinstance(item, Tensor):
        return
    if isinstance(item, dict):
        yield from ((f"{name}[{key!r}]", part) for key, part in item.items())
    elif isinstance(item, list | tuple | set | deque):
        yield from ((f"{name}[{i}]", part) for i, part in enumerate(item))
    elif isinstance(item, types.CellType):
        yield from ((name, part) for part in _contents(item))
    elif isinstance(item, types.MethodType):
        yield from ((name, part) for part in (item.__self__, item.__func__))
        yield from _class_stores(item.__self__) if isinstance(item.__self__, type) else ()
    elif isinstance(item, types.FunctionType):
        yield from ((f"{name} of {item.__name__}", part) for part in (*(item.__closure__ or ()), *(item.__defaults__ or ())))
        known = {name: item.__globals__.get(name) for name in item.__code__.co_names}
        yield from ((name, part) for name, part in known.items() if _is_store(part) or _has_attributes(part))
    elif isinstance(item, functools.partial):
        yield from ((name, part) for part in (item.func, item.args, item.keywords))
    elif isinstance(item, nn.Module) or _has_attributes(item):
        yield from _class_stores(type(item))
        for key, part in _attributes(item).items():
            if key in ("_parameters", "_buffers", "_modules"):
                yield f"{name}.{key}", part
                yield from ((f"{name}.{inner}", value) for inner, value in part.items())
            else:
                yield f"{name}.{key}", part


def _class_stores(kind: type) -> Iterator[tuple[str, Any]]:
    """Lists, dictionaries and the like that are attributes of a class that is not a library's."""
    for part in kind.__mro__:
        if part.__module__.partition(".")[0] not in _LIBRARIES:
            yield from ((f"{part.__name__}.{key}", value) for key, value in vars(part).items() if _is_store(value))


def is_array(item: Any) -> bool:
    """Whether an object is a numpy array, without an import of numpy."""
    return type(item).__name__ == "ndarray" and hasattr(item, "tobytes")


def _is_store(value: Any) -> bool:
    return isinstance(value, dict | list | set | deque | bytearray | Tensor | nn.Module) or is_array(value)


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _has_attributes(item: Any) -> bool:
    """Whether an object is an instance with attributes of its own, of a class that is not part of torch or Python."""
    if isinstance(item, nn.Module):
        return True
    has = hasattr(item, "__dict__") or hasattr(type(item), "__slots__")
    return has and type(item).__module__.partition(".")[0] not in _LIBRARIES
