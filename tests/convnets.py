"""Training of small networks in tests, and the true norms of the network of the fixture ``convnet``."""

import torch
from reference import norm
from torch import Tensor, nn


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, steps: int = 3) -> None:
    """Take steps on a loss that makes the outputs large, with data that depend only on the step."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        optimizer.zero_grad()
        model(x).abs().mean().neg().backward()
        optimizer.step()


def fitted(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    """The model in eval mode, after 40 steps of Adam on the cross entropy of all images."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def true_norms(convnet: nn.Module, *, composites: bool = True) -> list[float]:
    first, second = (convnet[:2], convnet[3:5]) if composites else (convnet[0], convnet[3])
    return [norm(first, (3, 8, 8)), norm(second, (6, 8, 8)), norm(convnet[8], (32,))]
