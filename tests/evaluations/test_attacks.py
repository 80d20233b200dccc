"""The attack harness: only images inside the ball count, all adversarial images are kept, a failure is no robustness."""

import math
from dataclasses import dataclass

import eagerpy as ep
import numpy as np
import pytest
import torch
from convnets import fitted
from pyautoattack import AutoAttack as Official
from pyautoattack.square import SquareAttack
from torch import Tensor, nn
from torchattacks.attacks.square import Square

from robust_spectral.evaluations.attacks import HARNESS, Noise, describe, is_minimal, make_attack, run_attack, seeded, size_of
from robust_spectral.plugins import autoattack
from robust_spectral.plugins.art_attacks import ScaleFreeCrossEntropy
from robust_spectral.plugins.foolbox import _L2FMN
from robust_spectral.plugins.registry import names

EVERY = sorted(set(names("attack")))


def net(classes: int = 4) -> nn.Module:
    """Two convolutions trained to classify images by the quarter that contains a bright spot."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, classes),
    )  # fmt: skip
    return fitted(model, *spots(256, classes))


def spots(count: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    images, labels = torch.rand(count, 1, 8, 8, generator=generator) / 2, torch.arange(count) % classes
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, 4 * row : 4 * row + 3, 4 * column : 4 * column + 3] += 0.4
    return images, labels


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    model = net()
    images, labels = spots(24)
    right = model(images).argmax(1) == labels
    return model, images[right], labels[right]


@pytest.fixture
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square attacks of 500 queries, a tenth of the usual number, by AutoAttack and torchattacks alike."""
    for kind in (SquareAttack, Square):
        monkeypatch.setattr(kind, "attack_single_run", with_queries(kind.attack_single_run, 500))


def with_queries(attack_single_run, count: int):
    def attack(self, x: Tensor, y: Tensor):
        assert self.n_queries in (5000, count)  # the budget of the standard version, or of an earlier call here
        self.n_queries = count
        return attack_single_run(self, x, y)

    return attack


@pytest.mark.parametrize("norm, eps", [("l2", 1.5), ("linf", 0.2)])
@pytest.mark.parametrize("name", EVERY)
def test_every_attack_stays_in_ball_and_box_and_leaves_model_and_random_state_unchanged(name, norm, eps, trained) -> None:
    model, images, labels = trained
    if norm == "linf" and ("cw" in name or name == "ddn"):
        with pytest.raises(ValueError, match="in l2, not in linf"):
            make_attack(name, norm, eps)
        return
    state, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    verdict = run_attack(make_attack(name, norm, eps), model, images, labels, seed=0)
    assert verdict.error is None
    size, fooled = size_of(verdict.adversarial.double() - images.double(), norm), verdict.predicted != labels
    assert is_minimal(name) or float(size.max()) <= eps * (1 + 1e-6)
    assert torch.equal(verdict.distance[fooled], size[fooled]) and bool(verdict.distance[~fooled].isinf().all())
    assert float(verdict.adversarial.min()) >= 0 and float(verdict.adversarial.max()) <= 1
    assert torch.equal(model(verdict.adversarial).argmax(1), verdict.predicted)
    assert torch.equal(torch.get_rng_state(), state) and all(map(torch.equal, model.parameters(), weights))
    assert name in ("noise", "torchattacks-cw") or bool(fooled.any())  # every other attack succeeds


@pytest.mark.usefixtures("few_queries")
@pytest.mark.parametrize("name", ["pgd", "autoattack", "square", "torchattacks-autoattack-10", "noise"])
def test_the_same_seed_gives_the_same_adversarial_images(name, trained) -> None:
    first, again = (run_attack(make_attack(name, "linf", 0.1), *trained, seed=3) for _ in range(2))
    assert torch.equal(first.adversarial, again.adversarial)


@pytest.mark.usefixtures("few_queries")
@pytest.mark.parametrize("norm, eps", [("l2", 0.6), ("linf", 0.1)])
def test_autoattack_gives_the_predictions_of_the_official_code(norm, eps, trained) -> None:
    model, images, labels = trained
    direct = Official(model, norm={"l2": "L2", "linf": "Linf"}[norm], eps=eps, seed=5, version="standard")
    direct.apgd_targeted.n_target_classes = direct.fab.n_target_classes = 3
    with seeded(5):
        found, _ = direct.run_standard_evaluation(images, labels, batch_size=len(images))
    ours = run_attack(make_attack("autoattack", norm, eps), model, images, labels, seed=5)
    assert torch.equal(model(found).argmax(1), ours.predicted)
    assert 0 < int((ours.predicted != labels).sum()) < len(labels)


@pytest.mark.usefixtures("few_queries")
def test_autoattack_gives_each_warning_once_and_not_for_every_block(trained, caplog) -> None:
    model, images, labels = trained
    autoattack._said.clear()
    attack = make_attack("square", "l2", 0.5)
    for _ in range(2):
        run_attack(attack, Around(model, lambda z: z.softmax(1)), images, labels, seed=0)
    assert len([record for record in caplog.records if "probability distribution" in record.getMessage()]) == 1


@pytest.mark.parametrize("classes", [2, 3])
def test_autoattack_runs_without_its_targeted_part_where_there_are_too_few_classes(classes) -> None:
    model = net(classes)
    images, labels = spots(12, classes)
    for name in ("autoattack", "apgd-t"):
        verdict = run_attack(make_attack(name, "l2", 2.0), model, images, labels, seed=0)
        assert verdict.error is None and bool((verdict.predicted != labels).any())


@dataclass
class Passing:
    """An attack that queries the model with adversarial images and returns the clean ones."""

    norm: str = "l2"
    eps: float = 1.5

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        found = make_attack("pgd", self.norm, self.eps)(model, images, labels)
        model(found)
        return images


def test_an_adversarial_image_that_an_attack_finds_but_does_not_return_is_kept(trained) -> None:
    model, images, labels = trained
    kept, pgd = (run_attack(attack, model, images, labels, seed=0) for attack in (Passing(), make_attack("pgd", "l2", 1.5)))
    fooled = kept.predicted != labels
    assert bool((fooled >= (pgd.predicted != labels)).all())
    assert float(kept.distance[fooled].max()) <= 1.5 * (1 + 1e-6)


@dataclass
class Returning:
    """An attack that raises an error or returns wrong images, as ``what`` says."""

    what: str
    norm: str = "l2"
    eps: float = 0.5

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        if self.what == "error":
            raise RuntimeError("gradient lost")
        return {"nan": images * math.nan, "fewer": images[1:], "far": 1 - images}[self.what]


@pytest.mark.parametrize("what, words", [("error", "RuntimeError: gradient lost"), ("nan", "NaN"), ("fewer", "of shape")])
def test_a_failed_attack_is_recorded_with_its_error(what, words, trained) -> None:
    verdict = run_attack(Returning(what), *trained, seed=0)
    assert verdict.error is not None and words in verdict.error


def test_an_image_outside_its_ball_is_projected_into_it_before_it_counts(trained) -> None:
    verdict = run_attack(Returning("far"), *trained, seed=0)
    assert verdict.error is None
    assert float(size_of(verdict.adversarial.double() - trained[1].double(), "l2").max()) <= 0.5 * (1 + 1e-6)


MINIMAL = [("ddn", "l2"), ("fmn", "l2"), ("fmn", "linf")]


@pytest.mark.parametrize("name, norm", MINIMAL)
def test_most_distances_of_a_linear_model_are_those_of_the_nearest_hyperplane(name: str, norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    images = 0.4 + 0.2 * torch.rand(40, 1, 6, 6)  # so far from the box that its sides do not matter
    logits = model(images).double()
    labels = logits.argmax(1)
    across = model[1].weight.double()[labels][:, None] - model[1].weight.double()
    steepness = torch.linalg.vector_norm(across, ord={"l2": 2, "linf": 1}[norm], dim=2)  # in the dual norm
    gaps = (logits.amax(1, keepdim=True) - logits) / steepness
    exact = torch.where(torch.arange(5) == labels[:, None], torch.inf, gaps).amin(1).detach()
    far = exact > {"l2": 0.05, "linf": 0.01}[norm]  # in a hundred steps, the ball of DDN shrinks to 0.006
    verdict = run_attack(make_attack(name, norm, None), model, images[far], labels[far], seed=0)
    assert verdict.error is None and bool((verdict.distance >= exact[far] * (1 - 1e-4)).all()) and int(far.sum()) > 9
    assert float((verdict.distance <= 1.01 * exact[far]).double().mean()) >= 0.7


@pytest.mark.parametrize("name, norm", MINIMAL)
def test_images_of_a_constant_model_are_at_an_infinite_distance(name: str, norm: str, trained) -> None:
    model, images, _ = trained
    constant = Around(model, lambda z: z * 0 + torch.arange(4))
    verdict = run_attack(make_attack(name, norm, None), constant, images, torch.full((len(images),), 3), seed=0)
    assert verdict.error is None and bool(verdict.distance.isinf().all())


def test_minimal_distances_are_below_those_of_pgd_at_any_scale_of_the_logits(trained) -> None:
    model, images, labels = trained
    pgd = run_attack(make_attack("pgd", "l2", 1.5), model, images, labels, seed=0).distance
    for name in ("ddn", "fmn"):
        plain, small, large = (run_attack(make_attack(name, "l2", None), Around(model, lambda z, c=c: c * z), images, labels, 0)
                               for c in (1.0, 1e-3, 1e4))  # fmt: skip
        assert float((plain.distance <= pgd).double().mean()) >= 0.95
        assert torch.allclose(small.distance, plain.distance, rtol=0.05)
        assert torch.allclose(large.distance, plain.distance, rtol=0.05)


@dataclass
class Wandering:
    """An attack without a size that tries a near and a far adversarial image, and returns the far one."""

    norm: str = "l2"
    eps: None = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        near, far = (make_attack("pgd", self.norm, eps)(model, images, labels) for eps in (1.5, 3.0))
        model(near)
        return far


def test_the_nearest_adversarial_image_that_an_attack_without_a_size_tries_is_kept(trained) -> None:
    model, images, labels = trained
    verdict = run_attack(Wandering(), model, images, labels, seed=0)
    near = run_attack(make_attack("pgd", "l2", 1.5), model, images, labels, seed=0)
    fell = near.predicted != labels
    assert bool(fell.any()) and bool((verdict.distance <= near.distance * (1 + 1e-6)).all())
    assert torch.equal(model(verdict.adversarial).argmax(1), verdict.predicted)


def test_fmn_projects_onto_the_ball_inside_the_pixel_box(trained) -> None:
    _, images, _ = trained
    x, x0, eps = (ep.astensor(t) for t in (images + torch.randn_like(images), images, torch.linspace(0.1, 9, len(images))))
    found = _L2FMN().project(x, x0, eps).raw
    size = size_of(found.double() - images.double(), "l2")
    reached = size_of(x.raw.clamp(0, 1) - images, "l2").double()
    assert torch.allclose(size, torch.minimum(eps.raw.double(), reached), rtol=1e-4)
    assert float(found.min()) >= 0 and float(found.max()) <= 1


def test_a_model_without_finite_logits_is_an_error_and_not_counted_as_robust(trained) -> None:
    model, images, labels = trained
    assert "NaN or infinite" in str(run_attack(Noise(), nn.Sequential(model, Divided()), images, labels, seed=0).error)


class Divided(nn.Module):
    """Logits divided by zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.zeros(())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_pgd_gives_the_same_predictions_at_any_scale_of_the_logits(scale: float, trained) -> None:
    model, images, labels = trained
    plain, scaled = (
        run_attack(make_attack("pgd", "l2", 0.6), m, images, labels, seed=0)
        for m in (model, Around(model, lambda z: scale * z))
    )
    assert torch.equal(plain.predicted, scaled.predicted)
    assert 0 < int((plain.predicted != labels).sum()) < len(labels)


def test_pgd_is_as_strong_in_the_presence_of_masked_classes(trained) -> None:
    model, images, labels = trained
    masked = Around(model, lambda z: torch.cat([z, z.new_full((len(z), 2), -1e4)], 1))
    plain, beside = (run_attack(make_attack("pgd", "l2", 0.6), m, images, labels, seed=0) for m in (model, masked))
    assert int((beside.predicted == labels).sum()) <= int((plain.predicted == labels).sum()) + 2


class Around(nn.Module):
    """A model followed by a function of its logits."""

    def __init__(self, model: nn.Module, after) -> None:
        super().__init__()
        self.model, self.after = model, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(x))


def test_the_loss_of_pgd_has_gradients_where_those_of_the_cross_entropy_vanish() -> None:
    logits, label = torch.tensor([[3e4, 1.0, 0.0]], requires_grad=True), torch.tensor([0])
    assert float(torch.autograd.grad(nn.functional.cross_entropy(logits, label), logits)[0].abs().max()) == 0
    assert float(torch.autograd.grad(ScaleFreeCrossEntropy()(logits, label), logits)[0].abs().max()) > 0


def test_an_attack_is_described_by_its_class_budget_and_version() -> None:
    told = describe(make_attack("autoattack", "linf", 0.1))
    versions = {"harness": HARNESS, "package": "pyautoattack 0.2.0"}
    assert told == {"class": "robust_spectral.plugins.autoattack.AutoAttack", "norm": "linf", "eps": 0.1, **versions}
    assert describe(make_attack("torchattacks-pgd", "l2", 1.0))["steps"] == 40
    assert describe(make_attack("ddn", "l2", 1.0))["eps"] is None


def test_torchattacks_autoattack_has_ten_or_a_hundred_steps_by_name(trained) -> None:
    model, images, _ = trained
    steps = {
        name: [part.steps for part in make_attack(name, "l2", 0.5)._attack(model, images)._autoattack.attacks[:3]]
        for name in ("torchattacks-autoattack-10", "torchattacks-autoattack-100")
    }
    assert steps == {"torchattacks-autoattack-10": [10] * 3, "torchattacks-autoattack-100": [100] * 3}


def test_an_unknown_attack_or_norm_is_an_error_that_lists_the_alternatives() -> None:
    with pytest.raises(ValueError, match="near: pgd"):
        make_attack("pdg", "l2", 0.5)
    with pytest.raises(ValueError, match="expected one of l2, linf"):
        make_attack("pgd", "l1", 0.5)


def test_seeded_restores_the_random_states() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with seeded(1):
        torch.rand(3), np.random.rand(3)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
