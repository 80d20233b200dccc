"""Arguments from which no certificate or estimate follows: one sentence on what came and what to do."""

import math

import numpy as np
import pytest
import torch
from networks import Call
from reference import jacobian_norm, norm
from torch import Tensor, nn

import robust_spectral as rs

BOUND = rs.LipschitzBound(1.0)
LOGITS, LABELS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 1])

WRONG = {
    "numpy logits": (LOGITS.numpy(), LABELS, TypeError, r"\(logits\): .*, got numpy.ndarray; give torch.from_numpy\(logits\)"),
    "numpy labels": (LOGITS, LABELS.numpy(), TypeError, r"\(labels\): .*, got numpy.ndarray; give torch.from_numpy\(labels\)"),
    "list of labels": (LOGITS, [0, 1], TypeError, r"takes a torch tensor, got list; give torch.tensor of the classes"),
    "tuple of outputs": ((LOGITS, LOGITS), LABELS, TypeError, r"takes a torch tensor, got tuple; give the logits alone"),
    "dict of outputs": ({"logits": LOGITS}, LABELS, TypeError, r"got dict; give the logits alone"),
    "integer logits": (LOGITS.long(), LABELS, TypeError, r"in int64 prove nothing; give the model's own output, in float32"),
    "half precision": (LOGITS.half(), LABELS, TypeError, r"in float16 prove nothing; run the model in float32 or float64"),
    "complex logits": (LOGITS.to(torch.complex64), LABELS, TypeError, r"in complex64 prove nothing; give the model's own"),
    "label below 0": (LOGITS, torch.tensor([0, -1]), ValueError, r"label at index 1 is -1; the classes are 0 to 2"),
    "label above all": (LOGITS, torch.tensor([3, 1]), ValueError, r"label at index 0 is 3; the classes are 0 to 2"),
    "no whole number": (LOGITS, torch.tensor([0.0, 1.5]), ValueError, r"label at index 1 is 1.5; the classes are 0 to 2"),
    "one image": (LOGITS[0], LABELS[0], ValueError, r"got \(3,\) and \(\); for one image give logits\[None\] and labels.resh"),
    "one logit, flat": (LOGITS[:, 0], LABELS, ValueError, r"got \(2,\) and \(2,\); .*for one logit an image logits\[:, None\]"),
    "column of labels": (LOGITS, LABELS[:, None], ValueError, r"got \(2, 3\) and \(2, 1\); give labels\[:, 0\]"),
    "one-hot labels": (LOGITS, torch.eye(3)[LABELS], ValueError, r"got \(2, 3\) and \(2, 3\); give labels.argmax\(1\)"),
    "no class": (LOGITS[:, :0], LABELS, ValueError, r"got \(2, 0\) and \(2,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_that_proves_nothing_is_refused_with_advice(name: str) -> None:
    logits, labels, error, message = WRONG[name]
    with pytest.raises(error, match="certified_radius.*" + message):
        rs.certified_radius(logits, labels, BOUND)


def test_the_advice_on_an_argument_leads_to_its_radii() -> None:
    expected = rs.certified_radius(LOGITS, LABELS, BOUND)
    assert torch.equal(expected[:1], rs.certified_radius(LOGITS[0][None], LABELS[0].reshape(1), BOUND))
    again = rs.certified_radius(torch.from_numpy(LOGITS.numpy()), torch.eye(3)[LABELS].argmax(1), BOUND)
    assert torch.equal(expected, again) and bool((expected > 0).all())


def test_whole_labels_in_floating_point_are_classes() -> None:
    assert torch.equal(rs.certified_radius(LOGITS, LABELS.float(), BOUND), rs.certified_radius(LOGITS, LABELS, BOUND))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


IMAGES = torch.rand(3, 4)
WRONG_FOR_ESTIMATES = {
    "numpy images": (nn.Linear(4, 2), IMAGES.numpy(), TypeError, r"takes a floating-point tensor \(n, \.\.\.\), got ndarray"),
    "integer images": (nn.Identity(), IMAGES.long(), TypeError, r"got int64; give float32 images"),
    "tuple of outputs": (Pair(), IMAGES, TypeError, r"the model returns tuple; give a model that returns its logits alone"),
    "one output for all": (Call(lambda m, x: x.sum()), IMAGES, ValueError, r"output for 3 images has shape \(\)"),
    "no images": (nn.Linear(4, 2), IMAGES[:0], ValueError, r"output for 0 images has shape \(0, 2\); give at least one image"),
    "detached": (Call(lambda m, x: m.f(x.detach()), f=nn.Linear(4, 2)), IMAGES, RuntimeError, r"no gradient .* reaches"),
    "constant": (Call(lambda m, x: torch.ones(len(x), 2)), IMAGES, RuntimeError, r"no gradient .* reaches"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FOR_ESTIMATES)
def test_images_or_a_model_without_an_estimate_are_refused(name: str) -> None:
    model, images, error, message = WRONG_FOR_ESTIMATES[name]
    with pytest.raises(error, match="lipschitz_estimate.*" + message):
        rs.lipschitz_estimate(model, images)


def test_the_estimate_of_one_logit_is_the_norm_of_its_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.rand(3, 4, dtype=torch.float64)
    largest = max(jacobian_norm(model, point) for point in x)
    assert rs.lipschitz_estimate(model, x) == pytest.approx(largest, rel=1e-9)
    assert rs.lipschitz_estimate(nn.Sequential(model, nn.Flatten(0)), x) == pytest.approx(largest, rel=1e-9)  # outputs (n,)


def test_the_estimate_of_many_outputs_is_a_weaker_lower_bound() -> None:
    model = nn.Conv2d(2, 8, 3, padding=1)  # 8 x 6 x 6 outputs
    x, true = torch.rand(2, 2, 6, 6), norm(model, (2, 6, 6))
    assert rs.lipschitz_estimate(model, x) == pytest.approx(true, rel=1e-4)
    assert 0.1 * true < rs.lipschitz_estimate(model, x, most_outputs=100) < true


def test_the_estimate_is_in_full_precision_under_autocast_and_in_inference_mode() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(3, 4)
    expected = rs.lipschitz_estimate(model, x)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert rs.lipschitz_estimate(model, x) == expected
        assert rs.lipschitz_estimate(model, x + 0) == expected and math.isfinite(expected)


def test_numpy_scalars_of_a_bound_are_no_bound() -> None:
    with pytest.raises(TypeError, match="takes the result of lipschitz_bound"):
        rs.certified_radius(LOGITS, LABELS, np.float64(1.0))
