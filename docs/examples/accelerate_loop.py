#!/usr/bin/env python3
"""FastClip in a training loop of Hugging Face Accelerate: a small network on the handwritten digits of scikit-learn.

The clipper takes the unwrapped model. `attach` takes Accelerate's optimizer and finds torch's optimizer inside it. The rest of
the loop does not change, on one device or, under ``accelerate launch``, on several.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import robust_spectral as rs


def main() -> None:
    """Train with every layer's norm clipped to 1, and print the proved norms."""
    set_seed(0)
    accelerator = Accelerator()
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=128, shuffle=True))

    example = torch.zeros(1, 1, 8, 8, device=accelerator.device)
    clipper = rs.FastClip(accelerator.unwrap_model(model), example, max_norm=1.0)
    clipper.attach(optimizer)

    for epoch in range(3):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(20 * model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

    clipper.finish()
    for row in clipper.report():
        accelerator.print("{name:>4} {kind:<6} norm in [{lower:.4f}, {upper:.4f}], target {target:g}".format(**row))


if __name__ == "__main__":
    main()
