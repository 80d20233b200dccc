"""Independent references: dumb, dense, float64. Nothing here uses the package under test."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn


def dense(module: nn.Module, in_shape: Sequence[int]) -> Tensor:
    """The matrix of x -> module(x) - module(0) in eval mode, (out elements, in elements), float64."""
    module = without_offsets(copy.deepcopy(module).double().eval())
    size = int(torch.Size(in_shape).numel())
    with torch.no_grad():
        columns = module(torch.eye(size, dtype=torch.float64).reshape(size, *in_shape))
        offset = module(torch.zeros(1, *in_shape, dtype=torch.float64))
    return (columns - offset).flatten(1).T.contiguous()


def map_norm(function: Callable[[Tensor], Tensor], in_shape: Sequence[int], dtype: torch.dtype = torch.float64) -> float:
    """The spectral norm of x -> function(x) - function(0), for any affine function of batches that computes in ``dtype``."""
    size = int(torch.Size(in_shape).numel())
    with torch.no_grad():
        columns = function(torch.eye(size, dtype=dtype).reshape(size, *in_shape))
        offset = function(torch.zeros(1, *in_shape, dtype=dtype))
    return float(torch.linalg.matrix_norm((columns - offset).flatten(1).double(), 2))


def without_offsets(module: nn.Module) -> nn.Module:
    """The module with biases and running means set to zero, which drop out of module(x) - module(0) but for rounding."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.rpartition(".")[2] in ("bias", "running_mean"):
            tensor.detach().zero_()
    return module


def singular_values(module: nn.Module, in_shape: Sequence[int]) -> Tensor:
    """All singular values, descending; scaled so that nothing under- or overflows."""
    matrix, size = _scaled(module, in_shape)
    return torch.linalg.svdvals(matrix) * size


def norm(module: nn.Module, in_shape: Sequence[int]) -> float:
    """The spectral norm, by a singular value decomposition or, of a large matrix, from its smaller Gram matrix or by ARPACK.

    All three give the same value, relative to 1e-14; from 300 rows on the first takes three times the seconds of the second.
    """
    matrix, size = _scaled(module, in_shape)
    if min(matrix.shape) < 300 or size == 0:
        return float(torch.linalg.svdvals(matrix)[0]) * size
    if min(matrix.shape) < 2500:
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        return float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt()) * size
    start = np.random.default_rng(0).standard_normal(min(matrix.shape))
    return float(svds(matrix.numpy(), 1, v0=start, return_singular_vectors=False)[0]) * size


def _scaled(module: nn.Module, in_shape: Sequence[int]) -> tuple[Tensor, float]:
    """The matrix over its largest entry, and that entry."""
    matrix = dense(module, in_shape)
    assert bool(torch.isfinite(matrix).all())
    size = float(matrix.abs().max())
    return matrix / (size or 1.0), size


def jacobian_norm(model: nn.Module, x: Tensor) -> float:
    """Spectral norm of the Jacobian of model at one input x, without its batch axis."""
    matrix = torch.autograd.functional.jacobian(lambda z: model(z[None])[0], x)
    return float(torch.linalg.matrix_norm(matrix.reshape(-1, x.numel()).double(), 2))


def gain(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Largest ||model(x) - model(y)|| / ||x - y|| over the rows of two batches."""
    with torch.no_grad():
        change = (model(x) - model(y)).flatten(1).double().norm(dim=1)
    return float((change / (x - y).flatten(1).double().norm(dim=1)).max())


def tolerance(dtype: torch.dtype) -> float:
    """Relative error allowed to a few hundred roundings."""
    return 300 * torch.finfo(dtype).eps


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two snapshots agree bit by bit, NaNs included."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(_bits(first[name]), _bits(second[name])) for name in first
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
