"""One thread and one seed for every test."""

import json
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Write the settings file of ART before there are workers: two that import ART at once in a fresh home may fail."""
    folder = Path.home() / ".art"
    if not hasattr(config, "workerinput") and find_spec("art") and not (folder / "config.json").exists():
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"ART_DATA_PATH": str(folder / "data")}))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest: two processes that share the files then end at about the same time."""
    first = ("evaluations", "plugins", "training", "test_docs.py", "norms")
    items.sort(key=lambda item: min((place for place, name in enumerate(first) if name in item.path.parts), default=len(first)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def convnet() -> nn.Module:
    """conv -> BN -> ReLU -> conv -> BN -> ReLU -> dense, with the normalisations away from their initial values."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    for part in model:
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.2, 2.0)
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.weight, 0.5, 2.0)
    return model.eval()


@pytest.fixture
def deadline() -> Iterator[None]:
    """Fail a test that runs for more than 10 seconds, as its loop might not end."""

    def expire(*_: object) -> None:
        raise TimeoutError("still running after 10 seconds")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
