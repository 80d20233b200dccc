"""The arguments of `certify`: errors say what is wrong, unknown operations give a reason, and the model is left as it was."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from local_networks import network, some_images
from networks import Call, seeded
from torch import Tensor, nn

import robust_spectral as rs

MODEL = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
IMAGES = torch.linspace(0, 1, 24, dtype=torch.float64).reshape(4, 6)
LABELS = MODEL(IMAGES).argmax(1)

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "negative radius": (lambda: rs.certify(MODEL, IMAGES, LABELS, -0.1), "radius"),
    "one negative radius": (lambda: rs.certify(MODEL, IMAGES, LABELS, torch.tensor([0.1, 0.1, -0.1, 0.1])), "radius"),
    "radius that is no number": (lambda: rs.certify(MODEL, IMAGES, LABELS, float("nan")), "radius"),
    "too few radii": (lambda: rs.certify(MODEL, IMAGES, LABELS, torch.tensor([0.1, 0.1])), "radi"),
    "image above the box": (lambda: rs.certify(MODEL, IMAGES + 0.5, LABELS, 0.1), "box"),
    "image below the box": (lambda: rs.local_radius(MODEL, IMAGES, LABELS, (0.5, 1.0)), "box"),
    "image that is no number": (lambda: rs.certify(MODEL, IMAGES * float("nan"), LABELS, 0.1), "image"),
    "too few labels": (lambda: rs.certify(MODEL, IMAGES, LABELS[:2], 0.1), "labels"),
    "labels of two axes": (lambda: rs.local_radius(MODEL, IMAGES, LABELS[:, None]), "labels"),
    "label above the classes": (lambda: rs.certify(MODEL, IMAGES, LABELS * 0 + 3, 0.1), "label"),
    "negative label": (lambda: rs.certify(MODEL, IMAGES, LABELS * 0 - 1, 0.1), "label"),
    "labels that are not whole": (lambda: rs.certify(MODEL, IMAGES, LABELS + 0.5, 0.1), "label"),
    "one image without a batch": (lambda: rs.certify(MODEL, IMAGES[0], LABELS[0], 0.1), "images"),
    "images of another size": (lambda: rs.certify(MODEL, IMAGES[:, :4], LABELS, 0.1), "."),
    "output of three axes": (lambda: rs.certify(Call(lambda m, x: x[:, None]).double(), IMAGES, LABELS, 0.1), "logits|classes"),
}  # fmt: skip


@pytest.mark.parametrize("call, what", WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_an_error_with_a_sentence(call: Callable[[], Any], what: str) -> None:
    with pytest.raises((ValueError, TypeError), match=what) as raised:
        call()
    assert len(str(raised.value)) > 30


@pytest.mark.parametrize("images, labels", [(IMAGES.tolist(), LABELS), (IMAGES, LABELS.tolist())], ids=["images", "labels"])
def test_lists_in_place_of_tensors_are_a_type_error(images: Any, labels: Any) -> None:
    with pytest.raises(TypeError, match="tensors"):
        rs.certify(MODEL, images, labels, 0.1)


def test_no_images_have_no_certificates() -> None:
    found = rs.certify(MODEL, IMAGES[:0], LABELS[:0], 0.1)
    assert found.margins.shape == found.certified.shape == (0,)


UNKNOWN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "rounding": lambda m, x: m.b(torch.round(m.a(x))),
    "jump": lambda m, x: m.b(torch.where(m.a(x) > 0, m.a(x), m.a(x) - 1)),
    "square root at 0": lambda m, x: m.b(F.relu(m.a(x)).sqrt()),
    "over a number that may be 0": lambda m, x: m.b(1 / m.a(x)),
    "power of a number": lambda m, x: m.b(2.0 ** m.a(x)),
    "across the batch": lambda m, x: m.b(m.a(x)) + m.b(m.a(x)).mean(0, keepdim=True),
    "sorted across the batch": lambda m, x: m.b(m.a(x).sort(0)[0]),
    "soft choice across the batch": lambda m, x: m.b(m.a(x).softmax(0)),
    "order of the batch": lambda m, x: m.b(m.a(x).flip(0)),
    "cumulative maximum": lambda m, x: m.b(m.a(x).cummax(1)[0]),
    "images on another axis": lambda m, x: m.b(torch.tanh(m.a(x).T).T),
    "number read off the input": lambda m, x: m.b(m.a(x)) * float(x.sum()),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_network_with_an_operation_that_has_no_bound_gets_a_reason_and_no_certificate(name: str) -> None:
    model = seeded(lambda: Call(UNKNOWN[name], a=nn.Linear(6, 5), b=nn.Linear(5, 3)))
    scores = model(IMAGES)
    found = rs.certify(model, IMAGES, scores.argmax(1), 0.5)
    provable = name in ("power of a number", "cumulative maximum", "images on another axis")
    assert provable or (not bool(found.certified.any()) and found.reason not in (None, "None"))
    assert bool(torch.isfinite(found.margins).any()) or len(str(found.reason)) > 20


@pytest.mark.parametrize("name", ["across the batch", "order of the batch", "soft choice across the batch"])
def test_a_network_that_mixes_the_images_of_a_batch_is_refused(name: str) -> None:
    model = seeded(lambda: Call(UNKNOWN[name], a=nn.Linear(6, 5), b=nn.Linear(5, 3)))
    found = rs.certify(model, IMAGES, model(IMAGES).argmax(1), 1e-6)
    assert not bool(found.certified.any()) and found.reason is not None
    assert bool((rs.local_radius(model, IMAGES, model(IMAGES).argmax(1), rounds=1) == 0).all())


def test_an_operation_with_a_global_constant_alone_keeps_the_global_bound_and_gives_no_error() -> None:
    model = seeded(lambda: Call(lambda m, x: m.b(F.softshrink(m.a(x), 0.1)), a=nn.Linear(6, 5), b=nn.Linear(5, 3)))
    found = rs.certify(model, IMAGES, model(IMAGES).argmax(1), torch.tensor([0.0, 1e-4, 1e-3, 5.0]))
    assert found.certified.tolist() == [True, True, True, False] and bool(torch.isfinite(found.margins).all())
    assert found.reason is None or len(found.reason) > 20


@pytest.mark.parametrize("run", [rs.certify, lambda *given: rs.local_radius(*given[:3], rounds=1)], ids=["certify", "radius"])
def test_the_model_and_the_random_states_are_bitwise_unchanged(run: Callable[..., Any]) -> None:
    model = network("batch norm").train()
    model[2].eval()
    images, labels = some_images(copy.deepcopy(model).eval(), 2)
    state, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    drawn, by_numpy, before = torch.get_rng_state(), np.random.get_state()[1].copy(), (images.clone(), labels.clone())
    run(model, images, labels, 0.4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn) and bool((np.random.get_state()[1] == by_numpy).all())
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1]) and torch.is_grad_enabled()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_certificates_are_the_same_in_any_gradient_mode(context: Callable[[], Any]) -> None:
    wanted = rs.certify(MODEL, IMAGES, LABELS, 0.3).margins
    with context():
        assert torch.equal(rs.certify(MODEL, IMAGES.clone(), LABELS.clone(), 0.3).margins, wanted)
        assert bool((rs.local_radius(MODEL, IMAGES.clone(), LABELS.clone(), rounds=1) > 0).all())


def test_a_float32_network_allows_for_its_rounding() -> None:
    model = copy.deepcopy(MODEL).float()
    found, exact = rs.certify(model, IMAGES.float(), LABELS, 0.1), rs.certify(MODEL, IMAGES.float().double(), LABELS, 0.1)
    assert found.margins.dtype == torch.float64
    assert bool((found.margins < exact.margins).all()) and bool((found.margins > exact.margins - 1e-4).all())


def test_progress_ends_with_all_images() -> None:
    seen: list[tuple[int, int]] = []
    rs.certify(MODEL, IMAGES, LABELS, 3.0, steps=0, progress=lambda done, count: seen.append((done, count)))
    assert seen[-1] == (4, 4)
