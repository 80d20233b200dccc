"""Moving small tensors between the host and a GPU without making either wait."""

from __future__ import annotations

from torch import Tensor


def to_device(tensor: Tensor, like: Tensor) -> Tensor:
    """A small tensor in another's type on its device; of the host without a wait."""
    tensor = tensor.to(like.dtype)
    pinned = like.is_cuda and not tensor.is_cuda
    return tensor.pin_memory().to(like.device, non_blocking=True) if pinned else tensor.to(like.device)
