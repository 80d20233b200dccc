"""Values for the weights of a random layer: of many orders of magnitude, in patterns on which norm bounds tend to fail."""

import random

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def fill(module: nn.Module, rng: random.Random) -> None:
    """Give weights, biases and running statistics values of many sizes and patterns."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            fill_batchnorm(part, rng)
            continue
        for name, tensor in [*part.named_parameters(recurse=False)]:
            if name == "weight":
                tensor.data.copy_(pattern(tensor, rng) * scale(rng))
            elif name in ("bias", "original0"):  # original0: the magnitudes of weight_norm
                tensor.data.normal_().mul_(scale(rng))
            else:
                tensor.data.normal_()


def fill_batchnorm(part: nn.Module, rng: random.Random) -> None:
    part.eps = rng.choice((1e-5, 1e-3, 1e-12))
    part.running_var.uniform_(0.1, 3.0).mul_(rng.choice((1.0, 1.0, 1e-8, 1e-30, 1e6)))
    part.running_mean.normal_()
    if part.affine:
        part.bias.data.normal_()
        part.weight.data.normal_().mul_(torch.rand_like(part.weight) < rng.choice((1.0, 0.6, 0.0)))


def scale(rng: random.Random) -> float:
    return 10.0 ** rng.choice((0.0, 0.0, -30.0, 30.0, rng.uniform(-30, 30), rng.uniform(-3, 3)))


def pattern(like: Tensor, rng: random.Random) -> Tensor:
    """A float64 tensor of the shape given: normal, of low rank, sparse, with repeated or very unequal values."""
    W = torch.randn(len(like), like[0].numel(), dtype=torch.float64)
    return PATTERNS[rng.choice([*PATTERNS, *["normal"] * 6])](W).reshape(like.shape)


def _one_entry(W: Tensor, factor: float, others: float) -> Tensor:
    factors = torch.full((W.numel(),), others, dtype=W.dtype)
    factors[torch.randint(W.numel(), ())] = factor
    return W * factors.reshape(W.shape)


def _orthogonal(W: Tensor) -> Tensor:
    return torch.linalg.qr(W).Q if len(W) >= W.shape[1] else torch.linalg.qr(W.T).Q.T


PATTERNS = {
    "normal": lambda W: W,
    "zero": torch.zeros_like,
    "rank one": lambda W: W[:, :1] * W[:1],
    "constant": lambda W: W[0, 0].expand_as(W),
    "signs": torch.sign,
    "repeated filters": lambda W: W[:1].expand_as(W),
    "sparse": lambda W: W * (torch.rand_like(W) < 0.1),
    "dead filters": lambda W: W * (torch.rand(len(W), 1) < 0.5),
    "unequal filters": lambda W: W * 10.0 ** torch.empty(len(W), 1, dtype=W.dtype).uniform_(-9, 0),
    "huge entry": lambda W: _one_entry(W, 1.0, 1e-7),
    "one entry": lambda W: _one_entry(W, 1.0, 0.0),
    "orthogonal": _orthogonal,
}
