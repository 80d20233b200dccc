"""The MAITE plugin: its model and its metric, run by MAITE's own tasks."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from robust_spectral import LipschitzBound, certified_radius, lipschitz_bound, local_radius

pytest.importorskip("maite")

import maite.protocols.image_classification as ic
from maite import tasks

from robust_spectral.plugins.maite import CertifiedAccuracy, ImageClassifier

ONE = LipschitzBound(1.0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 4))


class Images:
    """Random images labelled by a model, the first three of them wrongly."""

    def __init__(self, model: nn.Module, count: int = 25) -> None:
        self.metadata = {"id": "random images"}
        self.images = torch.rand(count, 1, 6, 6)
        with torch.no_grad():
            self.labels = model.eval()(self.images).argmax(1)
        self.labels[:3] = (self.labels[:3] + 1) % 4

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple:
        return self.images[index].numpy(), np.eye(4)[int(self.labels[index])], {"id": index}


class Loader:
    """Batches of torch tensors, the last one smaller."""

    def __init__(self, data: Images, size: int) -> None:
        self.data, self.size = data, size

    def __iter__(self):
        for start in range(0, len(self.data), self.size):
            stop = min(start + self.size, len(self.data))
            targets = [torch.eye(4)[label] for label in self.data.labels[start:stop]]
            yield list(self.data.images[start:stop]), targets, [{"id": i} for i in range(start, stop)]


def test_model_metric_and_dataset_conform_to_the_protocols() -> None:
    assert isinstance(ImageClassifier(network(), "net"), ic.Model)
    assert isinstance(CertifiedAccuracy(ONE, [0.5]), ic.Metric)
    assert isinstance(Images(network()), ic.Dataset)


def test_evaluate_gives_the_same_certified_accuracies_at_any_batch_size() -> None:
    model = network()
    data = Images(model)
    bound = lipschitz_bound(model, data.images[:1])
    with torch.no_grad():
        radii = certified_radius(model(data.images), data.labels, bound)
    low, high = radii.sort().values[12:14]
    eps = [float(low + high) / 2, 1e9]
    metric = CertifiedAccuracy(bound, eps)
    wrapped = ImageClassifier(model, "net", {i: f"class {i}" for i in range(4)})
    for batch in ({"dataset": data, "batch_size": 1}, {"dataset": data, "batch_size": 8}, {"dataloader": Loader(data, 10)}):
        found, predictions, _ = tasks.evaluate(model=wrapped, metric=metric, return_preds=True, **batch)
        assert sum(map(len, predictions)) == found["images"] == len(data)
        assert found["accuracy"] == pytest.approx(22 / 25)
        assert found[f"certified_accuracy_l2_{eps[0]}"] == 12 / 25
        assert found["certified_accuracy_l2_1000000000.0"] == 0
        assert found["failure_probability"] == bound.failure_probability
    assert wrapped.metadata == {"id": "net", "index2label": {i: f"class {i}" for i in range(4)}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_computes_in_its_own_dtype_whatever_the_dtype_of_the_images(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    batch = [np.full((1, 6, 6), 0.5, np.float64), torch.full((1, 6, 6), 0.5, requires_grad=True), [[[0.5] * 6] * 6]]
    first, *others = ImageClassifier(model, "net")(batch)
    assert first.shape == (4,) and torch.from_numpy(first).dtype == dtype
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5)


def test_the_model_predicts_in_eval_mode_and_its_training_mode_is_restored() -> None:
    model = network().train()
    wrapped = ImageClassifier(model, "net", device="cpu")
    one, two = wrapped([np.ones((1, 6, 6))]), wrapped([np.ones((1, 6, 6))])
    np.testing.assert_array_equal(one, two)
    assert model.training and wrapped([]) == []


def test_the_model_runs_without_autocast_and_tf32() -> None:
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
            seen.append((torch.is_autocast_enabled("cpu"), *flags))
            return super().forward(x.flatten(1))

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast("cpu"):
            (logits,) = ImageClassifier(Spy(4, 3), "spy")([np.ones((1, 2, 2))])
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert seen == [(False, False, False)] and logits.dtype == np.float32


@pytest.mark.parametrize(
    "batch, message",
    [
        ([np.full((1, 6, 6), 1.5)], "image 0 .* 1.5 to 1.5"),
        ([np.zeros((1, 6, 6)), np.full((1, 6, 6), -0.1)], "image 1 .* -0.1"),
        ([np.full((1, 6, 6), np.nan)], "image 0 .* nan"),
        ([np.zeros((1, 6, 6), np.uint8)], "uint8 .* divided by 255"),
        ([np.zeros((6, 6))], r"shape \(6, 6\)"),
        ([np.zeros((1, 6, 6)), np.zeros((1, 6, 7))], "resize"),
    ],
    ids=["above", "below", "nan", "bytes", "no channels", "two shapes"],
)
def test_the_model_refuses_images_that_are_not_pixels_in_0_1(batch: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageClassifier(network(), "net")(batch)


def test_the_model_refuses_half_precision() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        ImageClassifier(network().bfloat16(), "net")


def rows(*logits: list[float], dtype: type = np.float64) -> list[np.ndarray]:
    return [np.array(row, dtype) for row in logits]


def test_certified_accuracy_counts_radii_of_at_least_eps_and_reset_clears_the_counts() -> None:
    metric = CertifiedAccuracy(ONE, [0.5, 1.5])
    metric.update(rows([3, 0], [3, 2], [0, 3]), rows([1, 0], [0.9, 0.1], [1, 0]), [{"id": i} for i in range(3)])
    metric.update(rows([math.nan, 9]), rows([1, 0]), [{"id": 3}])
    expected = {"accuracy": 0.5, "certified_accuracy_l2_0.5": 0.5, "certified_accuracy_l2_1.5": 0.25, "images": 4}
    assert metric.compute() == {**expected, "failure_probability": 0.0}
    metric.reset()
    with pytest.raises(ValueError, match="no image"):
        metric.compute()


def test_rounding_errors_are_those_of_the_dtype_of_the_predictions() -> None:
    bound = LipschitzBound(1.0, errors={torch.float32: 10.0, torch.float64: 0.0})
    metric = CertifiedAccuracy(bound, [0.5])
    with pytest.warns(UserWarning, match="rounding of float32"):
        metric.update(rows([3, 0], dtype=np.float32), rows([1, 0]), [{}])
    metric.update([torch.tensor([3.0, 0.0], dtype=torch.float64)], rows([1, 0]), [{}])
    assert metric.compute()["certified_accuracy_l2_0.5"] == 0.5


def test_an_infinite_bound_certifies_no_image() -> None:
    metric = CertifiedAccuracy(LipschitzBound(math.inf, reason="unknown"), [1e-9])
    metric.update(rows([3, 0]), rows([1, 0]), [{}])
    assert metric.compute()["certified_accuracy_l2_1e-09"] == 0 and metric.compute()["accuracy"] == 1


@pytest.mark.parametrize(
    "predictions, targets, error, message",
    [
        (rows([0.9, 0.1], [0.4, 0.6]), rows([1, 0], [0, 1]), ValueError, "leave out the softmax"),
        ([[3.0, 0.0]], rows([1, 0]), TypeError, "are list"),
        (rows([3, 0], dtype=np.float32) + rows([3, 0]), rows([1, 0], [1, 0]), TypeError, "float32, torch.float64"),
        (rows([3, 0], dtype=np.float16), rows([1, 0]), TypeError, "float16"),
        (rows([3, 0], [3, 0, 0]), rows([1, 0], [1, 0]), ValueError, r"\(2,\), \(3,\)"),
        (rows([3, 0]), [1], ValueError, r"target 0 .* shape \(\)"),
        (rows([3, 0]), rows([0, 0]), ValueError, "one is the largest"),
        (rows([3, 0]), rows([1, 0, 0]), ValueError, r"give \(2,\) scores"),
        (rows([3, 0]), [], ValueError, "1 predictions for 0 targets"),
    ],
    ids=["softmax", "list", "two types", "half", "two shapes", "index", "empty target", "classes", "counts"],
)
def test_the_metric_refuses_invalid_predictions_and_targets(
    predictions: list, targets: list, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        CertifiedAccuracy(ONE, [0.5]).update(predictions, targets, [{}] * len(predictions))


@pytest.mark.parametrize("eps", [[], [0.0], [math.inf], [math.nan], [0.5, -1.0]], ids=str)
def test_the_metric_refuses_eps_that_are_missing_or_not_positive_and_finite(eps: list[float]) -> None:
    with pytest.raises(ValueError, match="eps"):
        CertifiedAccuracy(ONE, eps)


def test_the_metric_refuses_an_estimate() -> None:
    with pytest.raises(TypeError, match="lipschitz_bound"):
        CertifiedAccuracy(1.0, [0.5])


def test_predictions_of_one_logit_are_refused() -> None:
    metric = CertifiedAccuracy(ONE, [0.5])
    with pytest.raises(ValueError, match=r"one logit each.*two logits, such as torch.cat\(\[-z, z\], 1\) / 2"):
        metric.update([torch.tensor([3.0])], [torch.tensor([1.0])])


def test_an_image_is_certified_by_the_larger_of_its_radius_and_the_global_one() -> None:
    model = network().eval()
    data = Images(model, 6)
    x, y = data.images.double(), data.labels
    local = local_radius(copy.deepcopy(model).double(), x, y, rounds=2, steps=2)
    bound = lipschitz_bound(model, data.images)
    alone = certified_radius(model(data.images).detach(), y, bound)
    assert bool((local[3:] > alone[3:]).all())
    eps = [float(alone[3:].max()) * 1.001, float(local.max())]
    metric = CertifiedAccuracy(bound, eps, local_radii=local)
    for _ in range(2):
        found, _, _ = tasks.evaluate(model=ImageClassifier(model, "net"), dataloader=Loader(data, 4), metric=metric)
        for size in eps:
            wanted = float((torch.maximum(alone, local) >= size).double().mean())
            assert found[f"certified_accuracy_l2_{size}"] == wanted > 0
        metric.reset()


@pytest.mark.parametrize(
    "radii, message",
    [
        ([0.5], "1 radii for 2 images; give local_radii of all images in the order of the updates"),
        ([0.5, 0.5], "image 1 is misclassified and has a positive radius"),
    ],
)
def test_local_radii_of_other_images_are_refused(radii: list[float], message: str) -> None:
    metric = CertifiedAccuracy(ONE, [0.5], local_radii=radii)
    with pytest.raises(ValueError, match=message):
        metric.update(rows([3, 0], [3, 0]), rows([1, 0], [0, 1]))


@pytest.mark.parametrize("radii", [[-1.0], [math.nan], [[0.5]]])
def test_local_radii_that_are_none_are_refused(radii: list) -> None:
    with pytest.raises(ValueError, match="give one radius for each image"):
        CertifiedAccuracy(ONE, [0.5], local_radii=radii)
