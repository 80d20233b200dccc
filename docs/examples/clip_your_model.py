#!/usr/bin/env python3
"""Train the same network without clipping and with every layer's norm clipped to 1, on the digits of scikit-learn."""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import robust_spectral as rs

digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
train, test = slice(0, 1500), slice(1500, None)


def fit(model: nn.Module, max_norm: float, logit_scale: float, epochs: int = 10) -> None:
    """An ordinary training loop, with two lines for the clipper before it and one after it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clipper = rs.FastClip(model, images[:1], max_norm=max_norm)
    clipper.attach(optimizer)
    for _ in range(epochs):
        for batch in torch.randperm(1500).split(100):
            optimizer.zero_grad()
            F.cross_entropy(logit_scale * model(images[batch]), labels[batch]).backward()
            optimizer.step()
    clipper.finish()
    model.eval()


def tell(name: str, model: nn.Module, eps: float = 0.2) -> None:
    """Print the accuracy, the network's Lipschitz bound, and the share of test images certified at an L2 radius."""
    bound = rs.lipschitz_bound(model, images[:1])
    logits = model(images[test])
    radii = rs.certified_radius(logits, labels[test], bound)
    clean = float((logits.argmax(1) == labels[test]).float().mean())
    certified = float((radii >= eps).float().mean())
    print(f"{name:>7}: clean {clean:.3f}, Lipschitz bound {bound.value:.3g}, certified at {eps:g}: {certified:.3f}")


def main() -> None:
    """Train both networks and compare them."""
    torch.manual_seed(0)
    start = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    for name, max_norm, logit_scale in (("plain", float("inf"), 1.0), ("clipped", 1.0, 20.0)):
        model = copy.deepcopy(start)
        fit(model, max_norm, logit_scale)
        tell(name, model)


if __name__ == "__main__":
    main()
