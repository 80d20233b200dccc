"""Copies of small tensors from the host to a GPU that neither of them waits for."""

from __future__ import annotations

from torch import Tensor


def to_device(tensor: Tensor, like: Tensor) -> Tensor:
    """Copy a small tensor to the type and device of ``like``. A copy from the host to a GPU is asynchronous."""
    tensor = tensor.to(like.dtype)
    pinned = like.is_cuda and not tensor.is_cuda
    return tensor.pin_memory().to(like.device, non_blocking=True) if pinned else tensor.to(like.device)
