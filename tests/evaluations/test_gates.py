"""Checks (called gates in report.json): each broken defence fails one, and healthy networks pass all."""

import pytest
import torch
from convnets import fitted
from torch import Tensor, nn

from robust_spectral.evaluations.attacking.gates import _sweep, check_attacks, check_model
from robust_spectral.evaluations.records.accuracy_figures import figures


def trained(normalised: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8) if normalised else nn.Identity(), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip
    return fitted(model, *bars(256))


def bars(count: int) -> tuple[Tensor, Tensor]:
    """Images with one bright pair of rows, whose number is the class."""
    generator = torch.Generator().manual_seed(count)
    images, labels = torch.rand(count, 1, 8, 8, generator=generator) / 2, torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.3
    return images, labels


class Around(nn.Module):
    """A model between a function of its input and a function of its output."""

    def __init__(self, model: nn.Module, before=None, after=None) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


class Applied(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class BatchStatistics(nn.Module):
    """A network that puts itself back into training mode whenever it is used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.train()(x)


class Ascending(nn.Module):
    """A network that first moves its input along a gradient of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.model(start).logsumexp(1).sum(), start)
        return self.model(x - 0.01 * slope)


def failing(model: nn.Module) -> list[str]:
    images, labels = bars(48)
    found = check_model(model, images, labels)
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    for norm, eps in (("l2", 0.6), ("linf", 0.1)):
        found += check_attacks(model, images[right], labels[right], norm, eps, seed=0)
    return [gate.name for gate in found if gate.status == "fail"]


@pytest.mark.parametrize("normalised", [False, True])
def test_a_healthy_network_passes_every_check(normalised: bool) -> None:
    assert failing(trained(normalised)) == []


BROKEN = {
    "quantised pixels": (lambda m: Around(m, before=Applied(lambda x: (8 * x).round() / 8)), "gradients are there"),
    "huge logits": (lambda m: Around(m, after=Applied(lambda x: 1e5 * x)), "gradients are there"),
    "random noise": (lambda m: Around(m, before=Applied(lambda x: x + 0.1 * torch.randn_like(x))), "deterministic"),
    "batch statistics": (lambda _: BatchStatistics(trained(True)), "answers do not depend on the batch"),
    "probabilities": (lambda m: Around(m, after=nn.Softmax(1)), "logits, not probabilities"),
    "NaN": (lambda m: Around(m, after=Applied(lambda x: x / 0)), "finite logits"),
    "optimisation": (Ascending, "no optimisation in the forward pass"),
    "detached": (lambda m: Around(m, before=Applied(lambda x: x.detach())), "gradients are there"),
    "training mode": (lambda _: BatchStatistics(trained(True)), "eval mode is kept"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_defence_fails_the_check_for_its_fault(name: str) -> None:
    make, gate = BROKEN[name]
    assert gate in failing(make(trained()))


def test_masked_gradients_fail_the_checks_by_gradient_free_search_and_unlimited_attacks() -> None:
    names = failing(Around(trained(), before=Applied(lambda x: (4 * x).round() / 4)))
    assert "a search without gradients breaks no more at l2 0.6" in names
    assert "without limit in l2, attacks succeed" in names


def test_the_check_of_attacks_on_a_model_that_is_always_wrong_is_skipped() -> None:
    images, labels = bars(8)
    (gate,) = check_attacks(trained(), images[:0], labels[:0], "l2", 0.5, seed=0)
    assert gate.status == "skip" and "no image" in gate.detail


def test_a_check_on_too_few_images_is_skipped_unless_it_fails() -> None:
    images, labels = bars(4)
    for model, attacks in ((trained(), {"skip"}), (Around(trained(), before=Applied(lambda x: (4 * x).round() / 4)), {"fail"})):
        found = [*check_model(model, images, labels), *check_attacks(model, images, labels, "l2", 0.6, seed=0)]
        counted = {gate.status for gate in found if "images" in gate.detail}
        assert attacks <= counted <= {"skip", "fail"}, found
    alone = check_model(trained(), images[:1], labels[:1])
    assert "answers do not depend on the batch" in [gate.name for gate in alone if gate.status == "skip"]


def test_the_check_by_unlimited_attacks_needs_more_images_where_classes_are_few() -> None:
    assert _sweep(Around(trained(), after=Applied(lambda z: z[:, :2])), bars(9)[0], "l2", torch.ones(9)).status == "skip"
    assert _sweep(Around(trained(), after=Applied(lambda z: z[:, :2])), bars(10)[0], "l2", torch.ones(10)).status == "fail"


def test_a_failed_check_makes_every_accuracy_under_attack_invalid_and_gives_the_reason() -> None:
    row = {"sample": 0, "label": 0, "norm": "l2", "predicted": 0, "robust": True, "distance": 0.0, "certified_radius": 0.0}
    rows = [row | {"attack": "none", "eps": 0.0}, row | {"attack": "pgd", "eps": 0.5}]
    run = {"config": {"model": "m", "data": "d"}, "classes": 4, "defence": "none", "seed": 0, "layers": [], "model_sha256": "",
           "test_data_sha256": "", "versions": {}, "hardware": {}, "seconds": 0}  # fmt: skip
    bad = {"name": "deterministic", "status": "fail", "detail": "differs"}
    valid, invalid = (figures(run, rows, {}, 64, gates)["robust"] for gates in ([bad | {"status": "pass"}], [bad]))
    assert all(entry["valid"] and entry["reason"] is None for entry in valid)
    untested = figures(run, rows, {}, 64, [bad | {"status": "skip"}])["robust"]
    assert all(entry["valid"] is None and entry["reason"] == "not tested: deterministic: differs" for entry in untested)
    assert all(not entry["valid"] and entry["reason"] == "deterministic: differs" for entry in invalid)
    (failed, worst) = figures(run, rows, {}, 64, [], {("pgd", "l2", 0.5): "it raised"})["robust"]
    assert failed["reason"] == worst["reason"] == "it raised" and not failed["valid"] and not worst["valid"]
