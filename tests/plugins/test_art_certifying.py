"""Certificates of ART classifiers: of the model behind ART's standardisation, for images inside ``clip_values``."""

import copy
import math

import numpy as np
import pytest
import torch
from art.defences.postprocessor import Rounded
from art.defences.preprocessor import FeatureSqueezing
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.standardisation_mean_std.numpy import StandardisationMeanStd
from reference import norm
from torch import nn

from robust_spectral import LipschitzBound, certified_radius, lipschitz_bound, local_radius
from robust_spectral.certificates import Radii
from robust_spectral.plugins import art_certifying
from robust_spectral.plugins.art import LipschitzClassifier, LipschitzReport

MEAN, STD = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.25, 0.9])


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, outputs))


def classifier(model=None, loss=None, classes=3, clip_values=(0, 1), **options):
    model, loss = network() if model is None else model, loss or nn.CrossEntropyLoss()
    return LipschitzClassifier(
        model, loss, (3, 5, 5), classes, clip_values=clip_values, **{"preprocessing": (MEAN, STD), **options}
    )


def images(count=12):
    return np.random.default_rng(0).random((count, 3, 5, 5)).astype(np.float32)


def by_hand(model, x):
    """Logits in float64 of the model behind ART's standardisation, whose mean and standard deviation ART rounds to float32."""
    mean, std = (torch.from_numpy(v.astype(np.float32)).double().reshape(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        return copy.deepcopy(model).double()((torch.from_numpy(x).double() - mean) / std)


def test_the_bound_is_that_of_the_standardisation_and_the_model_together():
    layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten())
    found = classifier(layer, classes=100).lipschitz_bound().value
    scaled = copy.deepcopy(layer)
    scaled[0].weight.data /= torch.from_numpy(STD.astype(np.float32)).reshape(1, 3, 1, 1)
    true, apart = norm(scaled, (3, 5, 5)), norm(layer, (3, 5, 5)) / STD.min()
    assert true * (1 - 1e-6) <= found <= apart * (1 + 1e-5) and true < 0.95 * apart


def test_classes_and_radii_are_those_of_the_float64_network_behind_the_standardisation():
    given = classifier()
    prediction, radius = given.certify(images(), batch_size=5)
    logits = by_hand(given.model, images())
    assert prediction.tolist() == logits.argmax(1).tolist() and (radius > 0).all()
    expected = certified_radius(logits, logits.argmax(1), given.lipschitz_bound())
    assert radius == pytest.approx(expected.numpy(), rel=1e-9)


def test_the_bound_of_rounding_covers_the_standardisation():
    errors = classifier().lipschitz_bound().errors
    x = images(64)
    with torch.no_grad():
        single = classifier().predict(x)
    exact = by_hand(network(), x).numpy()
    assert np.linalg.norm(single - exact, axis=1).max() <= errors[torch.float32]
    assert 0 < errors[torch.float64] < 1e-6 * errors[torch.float32]


def test_a_classifier_without_standardisation_has_the_bound_of_its_model():
    plain = classifier(preprocessing=(0.0, 1.0))
    assert plain.lipschitz_bound().value == lipschitz_bound(plain.model, torch.zeros(1, 3, 5, 5)).value
    assert classifier(preprocessing=None).lipschitz_bound().value == plain.lipschitz_bound().value


def test_a_standardisation_among_the_defences_counts_and_one_for_training_only_does_not():
    double, single = StandardisationMeanStd(0.5, 0.5), classifier().lipschitz_bound().value
    assert classifier(preprocessing_defences=double).lipschitz_bound().value == pytest.approx(2 * single, rel=1e-6)
    training = StandardisationMeanStd(0.5, 0.5, apply_predict=False)
    assert classifier(preprocessing=training).lipschitz_bound().value == classifier(preprocessing=None).lipschitz_bound().value


@pytest.mark.parametrize(
    "options, name",
    [
        ({"preprocessing_defences": FeatureSqueezing((0, 1), bit_depth=1)}, "preprocessing FeatureSqueezing"),
        ({"preprocessing": FeatureSqueezing((0, 1), bit_depth=1)}, "preprocessing FeatureSqueezing"),
        ({"postprocessing_defences": Rounded(2)}, "postprocessing Rounded"),
    ],
    ids=["defence", "preprocessing", "postprocessing"],
)
def test_other_processing_is_refused_by_name(options, name):
    given = classifier(**options)
    for call in (given.lipschitz_bound, lambda: given.lipschitz_estimate(images()), lambda: given.certify(images())):
        with pytest.raises(
            NotImplementedError, match=f"no Lipschitz constant is known for the {name}; make the classifier with"
        ):
            call()


WRONG = {
    "one image": (images()[0], ValueError, r"batch of images \(n, 3, 5, 5\); got \(3, 5, 5\), one image: give x\[None\]"),
    "another size": (images()[:, :, :4], ValueError, r"got \(12, 3, 4, 5\), images of another size: input_shape differs"),
    "channels last": (images().transpose(0, 2, 3, 1), ValueError, r"got \(12, 5, 5, 3\), images of another size"),
    "a tuple": ((images(), np.zeros(12)), TypeError, r"takes an array of images \(n, 3, 5, 5\), got tuple; give one"),
    "a list": (list(images()), TypeError, r"got list; give one numpy array of numbers"),
    "text": (np.full((2, 3, 5, 5), "a"), TypeError, r"got an array of <U1; give one numpy array of numbers"),
    "bytes": ((255 * images()).astype(np.uint8), ValueError, r"values from \d+ to 2\d\d, clip_values are from 0 to 1, and"),
    "standardised": (2 * images() - 1, ValueError, r"values from -0\.99\d+ to 0\.99\d+, clip_values are from 0 to 1"),
    "not a number": (images() * np.nan, ValueError, r"values from nan to nan, clip_values are"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_images_that_are_not_certified_are_refused_with_advice(name):
    given, error, message = WRONG[name]
    with pytest.raises(error, match="certify: .*" + message):
        classifier().certify(given)


def test_torch_images_an_empty_batch_and_bytes_in_their_own_range_are_certified():
    given = classifier()
    for one, other in zip(given.certify(images()), given.certify(torch.from_numpy(images())), strict=True):
        assert np.array_equal(one, other)
    prediction, radius = given.certify(images(0))
    assert prediction.shape == radius.shape == (0,) and prediction.dtype == np.int64
    coded = (255 * images()).astype(np.uint8)
    bytes_wise = classifier(clip_values=(0, 255), preprocessing=(255 * MEAN, 255 * STD))
    alike = given.certify(coded.astype(np.float64) / 255)
    assert bytes_wise.certify(coded)[0].tolist() == alike[0].tolist()
    assert bytes_wise.certify(coded)[1] == pytest.approx(255 * alike[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_images_at_the_rounded_ends_of_clip_values_are_inside(dtype):
    low, high = 0.1, 0.7  # neither is a float32 number
    given = classifier(clip_values=(low, high))
    x = np.clip(images(), low, high).astype(dtype)
    x[0, 0, 0, :2] = low, high
    assert (given.certify(x)[1] > 0).all()
    box = given._box()
    assert box[0] < min(low, float(np.float32(low))) and box[1] > max(high, float(np.float32(high)))
    assert box == pytest.approx((low, high), rel=1e-6)
    for value in (low - 1e-6, high + 1e-6):
        x[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match="radii are proved only for images inside"):
            given.certify(x)


def test_without_clip_values_images_may_have_any_finite_values():
    given = classifier(clip_values=None)
    x = 1e3 * images()
    x[0, 0, 0, 0] = np.nan
    prediction, radius = given.certify(x)
    assert prediction[0] == -1 and radius[0] == 0 and (radius[1:] > 0).all()


def binary(model=None, loss=None, classes=2):
    return classifier(network(1) if model is None else model, loss or nn.BCEWithLogitsLoss(), classes)


def test_one_logit_is_certified_by_its_sign():
    given = binary()
    given.model[3].bias.data -= float(by_hand(given.model, images(40)).median())
    logits = by_hand(given.model, images(40))[:, 0].numpy()
    prediction, radius = given.certify(images(40))
    assert prediction.tolist() == (logits > 0).astype(int).tolist() and 15 <= prediction.sum() <= 25
    bound = given.lipschitz_bound()
    assert radius == pytest.approx(np.abs(logits) / bound.value, rel=1e-6) and (radius < np.abs(logits) / bound.value).all()
    rows = nn.Sequential(given.model, nn.Flatten(0))  # outputs (n,), which ART takes as one column
    again = binary(rows).certify(images(40))
    assert again[0].tolist() == prediction.tolist() and again[1] == pytest.approx(radius, rel=1e-6)


def test_no_step_against_one_logit_changes_its_sign_inside_the_radius():
    given = binary()
    given.model[3].bias.data -= float(by_hand(given.model, images(40)).median())
    prediction, radius = given.certify(images(40))
    slopes = given.class_gradient(images(40))[:, 0]
    towards = np.where(prediction == 1, -1.0, 1.0)[:, None, None, None] * slopes
    towards /= np.linalg.norm(towards.reshape(40, -1), axis=1)[:, None, None, None]
    for size, changed in ((1 - 1e-6, 0), (50, 10)):
        moved = by_hand(given.model, images(40) + size * radius[:, None, None, None] * towards)[:, 0].numpy() > 0
        assert (moved != (prediction == 1)).sum() >= changed and (changed or (moved == (prediction == 1)).all())


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: binary(nn.Sequential(network(1), nn.Sigmoid()), nn.BCELoss()),
            "BCELoss gives probabilities.*remove its sigmoid",
        ),
        (lambda: binary(classes=10), "one logit, nb_classes is 10; one logit distinguishes two classes only"),
        (
            lambda: classifier(network()[:1]),
            r"the model gives \(12, 4, 5, 5\); make the classifier with a model that gives logits",
        ),
    ],
    ids=["probability", "ten classes", "feature map"],
)
def test_outputs_that_are_not_logits_are_refused(make, message):
    with pytest.raises(ValueError, match="certify: .*" + message):
        make().certify(images())


def labels(count=12):
    return np.eye(3, dtype=np.float32)[np.arange(count) % 3]


def evaluated(given):
    return LipschitzReport([0.01]).evaluate(given, images(), labels(), eps_step=0.01, max_iter=2)


def test_the_report_of_one_logit_is_refused():
    with pytest.raises(
        ValueError, match=r"LipschitzReport.evaluate: the model gives one logit, .* such as torch.cat\(\[-z, z\], 1\)"
    ):
        LipschitzReport([0.01]).evaluate(binary(), images(), np.arange(12) % 2)


def test_the_report_of_a_bound_that_nothing_refutes_says_so(monkeypatch):
    asked = []
    monkeypatch.setattr(art_certifying, "disagreement", lambda model, x, errors: asked.append((len(x), errors)))
    found = evaluated(classifier())
    assert found["refuted"] is None and found["lipschitz_estimate"] <= found["lipschitz_bound"] < math.inf
    assert asked == [(12, 2 * classifier().lipschitz_bound().errors[torch.float32])]


def test_a_bound_below_the_sampled_slope_is_refuted_and_certifies_nothing(monkeypatch):
    monkeypatch.setattr(art_certifying, "lipschitz_bound", lambda *_: LipschitzBound(1e-3, local=1e-3))
    with pytest.warns(UserWarning, match="nothing is certified: a sampled Jacobian norm, .* is above the proved bound, 0.001"):
        found = evaluated(classifier())
    assert found["lipschitz_bound"] == math.inf and found["certified"] == {0.01: 0.0}
    assert found["refuted"].startswith("a sampled Jacobian norm")


def test_a_graph_that_is_not_the_model_certifies_nothing(monkeypatch):
    monkeypatch.setattr(art_certifying, "disagreement", lambda model, x, errors: "logits differ by 3 at batch size 2")
    with pytest.warns(UserWarning, match="nothing is certified: logits differ by 3"):
        found = evaluated(classifier())
    assert found["lipschitz_bound"] == math.inf and found["certified"] == {0.01: 0.0}


def test_art_itself_predicts_the_sign_of_one_logit():
    """Check the convention against ART's own array of predictions, whose one column is the logit."""
    given = binary()
    plain = PyTorchClassifier(given.model, nn.BCEWithLogitsLoss(), (3, 5, 5), 2, preprocessing=(MEAN, STD))
    assert given.certify(images())[0].tolist() == (plain.predict(images())[:, 0] > 0).astype(int).tolist()


@pytest.mark.parametrize("clip_values", [(0, 1), None])
def test_radii_around_images_are_of_the_standardised_network_in_its_box_and_at_least_the_global_ones(clip_values):
    given = classifier(clip_values=clip_values)
    prediction, radius = given.certify(images(4))
    nearer, larger = given.certify(images(4), local=True)
    assert (nearer == prediction).all() and (larger >= radius).all() and (larger > 1.2 * radius).all()
    box = None if clip_values is None else (-1e-40, 1 + 1e-6)
    by_itself = nn.Sequential(Standardise(), copy.deepcopy(given.model)).double()
    x = torch.from_numpy(images(4)).double()
    wanted = local_radius(by_itself, x, torch.from_numpy(prediction), box)
    assert larger == pytest.approx(wanted.numpy(), rel=0.05)


class Standardise(nn.Module):
    """The standardisation that ART applies, by hand."""

    def forward(self, x):
        mean, std = (torch.from_numpy(v.astype(np.float32)).to(x.dtype).reshape(1, 3, 1, 1) for v in (MEAN, STD))
        return (x - mean) / std


def test_attacks_inside_a_radius_around_an_image_do_not_change_its_class():
    given = classifier()
    x = images(4)
    prediction, radius = given.certify(x, local=True)
    for scale in (0.5, 0.999):
        steps = given.loss_gradient(x, np.eye(3, dtype=np.float32)[prediction])
        steps *= (scale * radius / np.linalg.norm(steps.reshape(4, -1), axis=1))[:, None, None, None]
        assert by_hand(given.model, np.clip(x + steps, 0, 1)).argmax(1).tolist() == prediction.tolist()


def test_a_network_without_radii_around_images_keeps_the_global_ones_with_a_warning_that_says_why(monkeypatch):
    def none(model, x, prediction, box):
        nothing = torch.zeros(len(x), dtype=torch.float64)
        return Radii(nothing, nothing > 0, 0.0, "cummax has no bound")

    monkeypatch.setattr(art_certifying, "largest_radii", none)
    with pytest.warns(UserWarning, match=r"certify\(local=True\): nothing is proved around images, .*: cummax has no bound"):
        _, radius = classifier().certify(images(), local=True)
    assert (radius == classifier().certify(images())[1]).all()


def test_radii_around_images_of_one_logit_or_behind_unknown_preprocessing_are_refused():
    with pytest.raises(ValueError, match=r"certify\(local=True\): the model gives one logit, .* or local=False"):
        binary().certify(images(), local=True)
    squeezing = FeatureSqueezing(clip_values=(0, 1), bit_depth=4)
    with pytest.raises(NotImplementedError, match="FeatureSqueezing"):
        classifier(preprocessing_defences=[squeezing]).certify(images(), local=True)


def test_the_report_certifies_by_radii_around_images_if_asked():
    x, y = images(4), labels(4)
    options = {"eps_step": 0.01, "max_iter": 2}
    given = classifier()
    prediction, radius = given.certify(x, local=True)
    level = float(np.median(radius))
    right = prediction == y.argmax(1)
    found = LipschitzReport([level], local=True).evaluate(given, x, y, **options)
    assert found["certified"] == {level: float((right & (radius >= level)).mean())}
    assert found["certified"][level] >= LipschitzReport([level]).evaluate(given, x, y, **options)["certified"][level]
