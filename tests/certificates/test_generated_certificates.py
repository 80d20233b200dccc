"""Random networks: no margin exceeds one that a search finds. Trained networks: no attack breaks an image within its radius."""

import runpy
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from generated_certificates import RULES, case, check, lowest, wrong
from networks import Call
from radius_attacks import Witness, apgd_targeted, broken_by, ddn, pgd, rounding_search
from radius_networks import FAMILIES
from torch import Tensor, nn

aten = torch.ops.aten
SCRIPT = Path(__file__).parents[2] / "evaluations" / "benchmarks" / "fuzz_certificates.py"
PLANTED = {aten.abs: 0, aten.clamp_max: 0, aten.sigmoid: 1}  # a case of each that shows a rule with small errors


def assert_sound(seed: int) -> None:
    verdict = check(case(seed))
    assert verdict.result in ("proved", "refused"), verdict


@pytest.mark.parametrize("seed", range(1, 4))
def test_no_margin_of_a_random_network_exceeds_one_that_is_found(seed: int) -> None:
    assert_sound(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 24))
def test_no_margin_of_more_random_networks_exceeds_one_that_is_found(seed: int) -> None:
    assert_sound(seed)


@pytest.mark.parametrize("operation", PLANTED, ids=str)
def test_errors_that_are_too_small_are_found(operation: Any) -> None:
    right = RULES[operation]
    with wrong(operation):
        assert check(case(PLANTED[operation], operation)).result == "unsound"
    assert RULES[operation] is right
    assert check(case(PLANTED[operation], operation)).result == "proved"


def test_the_search_finds_the_smallest_margin_of_an_affine_network_in_a_ball() -> None:
    layer, images = nn.Linear(6, 2).double(), torch.randn(3, 6, dtype=torch.float64)
    labels, radii = layer(images).argmax(1), torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    top = layer(images).topk(2, 1)[0]
    steep = (layer.weight[0] - layer.weight[1]).norm()
    found, _, points = lowest(layer, images, labels, radii, None)
    torch.testing.assert_close(found, top[:, 0] - top[:, 1] - radii * steep, rtol=1e-3, atol=1e-3)
    assert bool(((points - images[:, None]).norm(dim=2) <= radii[:, None] * (1 + 1e-12)).all())


def halves(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network with a plane between two classes, two images in the box, their classes and distances from the plane."""
    model = Call(lambda m, x: torch.stack([x.flatten(1).sum(1) - 2, 2 - x.flatten(1).sum(1)], 1))
    images = torch.full((2, 1, 2, 4), 0.3, dtype=dtype)
    images[0] += 0.125
    return model, images, model(images).argmax(1), (images.double().flatten(1).sum(1) - 2).abs() / 8**0.5


@pytest.mark.parametrize("attack", [pgd, apgd_targeted, ddn])
def test_an_attack_breaks_images_beyond_their_distance_and_none_within(attack: Any) -> None:
    model, images, labels, distances = halves()
    for factor, wanted in ((0.99, False), (1.02, True)):
        witness = Witness(model, images, labels, factor * distances)
        attack(witness)
        assert witness.broken.tolist() == [wanted] * 2


def test_the_distance_of_a_minimal_attack_is_that_of_the_plane() -> None:
    model, images, labels, distances = halves()
    torch.testing.assert_close(ddn(Witness(model, images, labels, distances)), distances, rtol=1e-3, atol=0)


def test_a_witness_keeps_no_point_outside_the_ball_or_the_box() -> None:
    model, images, labels, distances = halves()
    witness = Witness(model, images, labels, distances)
    witness(1 - images.round())
    witness(images + 1)
    assert bool((witness.best == torch.inf).all())


def test_the_search_for_rounding_errors_finds_a_class_that_only_float32_predicts() -> None:
    model, images, _, _ = halves()
    rough = Call(lambda m, x: model(x) + 4096 - 4096 + torch.tensor([0.0, 1e-4], dtype=x.dtype), c=nn.Linear(1, 1))
    labels = torch.zeros(2, dtype=torch.long)
    images = torch.full_like(images, 0.25 + 1.2e-4 / 16 + 1e-6)
    exact = (images.flatten(1).sum(1) - 2) * 2 - 1e-4
    witness = Witness(rough, images.float().double(), labels, exact / 2 / 8**0.5 * 0.9)
    pgd(witness)
    assert not bool(witness.broken.any()) and bool(rounding_search(rough.float(), witness, torch.float32).all())


def test_radii_that_are_too_large_are_found() -> None:
    model, images, labels, distances = halves(torch.float32)
    assert all(bool(flags.all()) for flags in broken_by(model, images, labels, 1.1 * distances).values())


def test_the_benchmark_finds_no_fault_in_a_few_networks_and_none_within_radii() -> None:
    script = runpy.run_path(str(SCRIPT))
    options = Namespace(seed=0, networks=1, processes=1, planted=0, only=["dense, SiLU"], images=2)
    (result,) = script["random_networks"](options)
    assert result["right"] and result["networks"] == 1 and result["unsound"] == result["raised"] == 0 == len(result["failures"])
    assert script["table"](result).splitlines()[-1].startswith("all")
    assert script["planted"](aten.clamp_max, 1) == {"found": True, "factor": 0.3, "networks": 1}
    (radii,) = script["attacked_radii"](options)
    assert radii["right"] and radii["broken"] == 0 < radii["proved"] and radii["least share found beyond"] == 1.0
    assert len(FAMILIES) >= 20 and all("broken" in row for row in radii["networks"])
