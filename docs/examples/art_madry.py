#!/usr/bin/env python3
"""ART's adversarial training of Madry et al. with every layer's norm clipped to 1, on the digits of scikit-learn."""

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.defences.trainer import AdversarialTrainerMadryPGD
from sklearn.datasets import load_digits
from torch import nn

from robust_spectral.plugins.art import FastClipTrainer, LipschitzClassifier

EPS = 0.2  # L2, pixels in [0, 1]


def main() -> None:
    """Train, certify and attack the classifier, and print both accuracies."""
    torch.manual_seed(0)
    np.random.seed(0)
    digits = load_digits()
    x, y = (digits.images[:, None] / 16).astype(np.float32), digits.target
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    classifier = LipschitzClassifier(
        model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer=torch.optim.Adam(model.parameters(), lr=3e-3),
        clip_values=(0.0, 1.0), device_type="cpu",
    )  # fmt: skip

    madry = AdversarialTrainerMadryPGD(classifier, nb_epochs=6, batch_size=100, eps=0.1, eps_step=0.05, max_iter=3)
    trainer = FastClipTrainer(madry, max_norm=1.0)
    trainer.fit(x[:1500], y[:1500])

    prediction, radius = classifier.certify(x[1500:])
    attack = ProjectedGradientDescent(classifier, norm=2, eps=EPS, eps_step=EPS / 8, max_iter=20, verbose=False)
    stands = classifier.predict(attack.generate(x[1500:])).argmax(1) == y[1500:]
    certified = (prediction == y[1500:]) & (radius >= EPS)
    print(f"Lipschitz bound {classifier.lipschitz_bound().value:.3g}")
    print(f"at L2 {EPS:g}: {certified.mean():.3f} certified, {stands.mean():.3f} stand PGD")
    assert not np.any(certified & ~stands), "what is certified cannot be broken"


if __name__ == "__main__":
    main()
