"""The documentation's code does what it says."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from reference import norm
from torch import nn

from robust_spectral.evaluations.attacks import run_attack

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The blocks of the page on defences and attacks, as a module."""
    module = types.ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", module)
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "plugins.md").read_text(), re.DOTALL):
        exec(compile(block, "plugins.md", "exec"), vars(module))
    return module


def test_the_defence_of_the_page_holds_norms(plugins: types.ModuleType) -> None:
    model, images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4)), torch.rand(4, 1, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    defence = plugins.Shrink(0.5)
    defence.prepare(model, images)
    defence.attach(optimizer)
    model(images).sum().backward()
    optimizer.step()
    assert max(norm(model[0], (1, 8, 8)), norm(model[2], (144,))) <= 0.5 * 1.001


def test_the_attack_of_the_page_runs_in_the_harness(plugins: types.ModuleType) -> None:
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval(), torch.rand(6, 1, 8, 8)
    verdict = run_attack(plugins.Stripes(), model, images, model(images).argmax(1), seed=0)
    assert verdict.error is None and 0 < float(verdict.distance.max()) <= 0.1 * (1 + 1e-6)
