"""Check every clipped layer of a finished run against a reference that shares no code with the package's solvers.

    python evaluations/benchmarks/verify_norms.py runs/demo/clipped

Layers of up to 4,096 inputs are assembled as dense float64 matrices; larger ones go through ARPACK (scipy) on the layer's own
forward pass and its vector-Jacobian product in float64, to a residual of 1e-8. Ends with status 1 if a norm exceeds 1.001
times its target.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn

from robust_spectral import linear_layers
from robust_spectral.evaluations.models import load_run


def reference_norm(module: nn.Module, in_shape: tuple[int, ...]) -> tuple[float, str]:
    """The spectral norm of x -> module(x) - module(0) in float64, and the method that computed it."""
    module = module.double().eval()
    n = int(np.prod(in_shape))
    zero = torch.zeros(1, *in_shape, dtype=torch.float64)
    offset = module(zero).detach()
    if n <= 4096:
        eye = torch.eye(n, dtype=torch.float64).reshape(n, *in_shape)
        with torch.no_grad():
            rows = torch.cat([(module(chunk) - offset).flatten(1) for chunk in eye.split(512)])
        gram = rows @ rows.T if n <= rows.shape[1] else rows.T @ rows
        return float(torch.linalg.eigvalsh(gram)[-1].sqrt()), "dense"

    def forward(v: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return (module(torch.from_numpy(v).reshape(1, *in_shape)) - offset).flatten().numpy()

    def adjoint(u: np.ndarray) -> np.ndarray:
        x = zero.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(module(x), x, torch.from_numpy(u).reshape(offset.shape))
        return gradient.flatten().numpy()

    operator = LinearOperator((offset.numel(), n), matvec=forward, rmatvec=adjoint, dtype=np.float64)
    left, values, right = svds(operator, k=1, tol=1e-12, maxiter=100_000, random_state=0)
    residual = float(np.linalg.norm(operator.rmatvec(left[:, 0]) - values[0] * right[0]))
    if residual > 1e-8 * values[0]:
        raise RuntimeError(f"reference did not converge: residual {residual:.1e}")
    return float(values[0]), "arpack"


class Affine(nn.Module):
    """The affine map of a batch normalisation in eval mode, written out."""

    def __init__(self, batchnorm: nn.Module, axes: int) -> None:
        super().__init__()
        self.batchnorm, self.axes = batchnorm, axes

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift every channel."""
        bn = self.batchnorm
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        shape = (-1, *[1] * self.axes)
        return x * scale.reshape(shape) + (bn.bias - bn.running_mean * scale).reshape(shape)


def main(folder: Path) -> int:
    """Print a row for each clipped layer; the exit status depends on the largest ratio of true norm to target."""
    model, data, run = load_run(folder)
    targets = {row["name"]: row["target"] for row in run["layers"]}
    worst = 0.0
    for layer in linear_layers(model, data.example()):
        parts = [layer.module]
        if layer.batchnorm is not None:
            parts.append(Affine(layer.batchnorm, len(layer.in_shape) - 1))
        norm, how = reference_norm(nn.Sequential(*parts), layer.in_shape)
        ratio = norm / targets[layer.name]
        worst = max(worst, ratio)
        print(f"{layer.name:40s} {norm:.6f}  {ratio:.6f} x target  ({how})")
    print(f"largest: {worst:.6f} x target, limit 1.001")
    return int(worst > 1.001)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
