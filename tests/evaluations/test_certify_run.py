"""The benchmark of certified accuracy at given radii."""

import runpy
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[2] / "evaluations" / "benchmarks"


def test_images_are_certified_at_every_radius_below_their_own_unless_an_attack_broke_them(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    certified_at = runpy.run_path(str(FOLDER / "certify_run.py"))["certified_at"]
    line = torch.nn.Linear(1, 2, bias=False).double()  # the difference of the logits is the input
    with torch.no_grad():
        line.weight.copy_(torch.tensor([[0.0], [1.0]]))
    images, labels = torch.tensor([[0.1], [0.3], [0.6], [0.6]], dtype=torch.float64), torch.ones(4, dtype=torch.long)
    survived = torch.tensor([True, True, True, False])
    found = certified_at(line, images, labels, {0.25: survived, 0.5: survived}, steps=0)
    assert found[0.25].tolist() == [False, True, True, False]
    assert found[0.5].tolist() == [False, False, True, False]
