"""The ART plugin: trainers, transformer and certifying classifier, on small real images."""

import numpy as np
import pytest
import reference
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.defences.trainer import AdversarialTrainerMadryPGD
from art.defences.trainer.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from sklearn.datasets import load_digits
from torch import nn

from robust_spectral import certified_radius, lipschitz_bound
from robust_spectral.plugins.art import FastClipTrainer, FastClipTransformer, LipschitzClassifier, register, unregister


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return (data.images[:256, None] / 16).astype(np.float32), np.eye(10, dtype=np.float32)[data.target[:256]]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def classifier(model=None, kind=PyTorchClassifier, clip_values=(0, 1), **options):
    model = network() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return kind(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer=optimizer, clip_values=clip_values, **options)


def true_norms(model):
    return [reference.norm(model[0], (1, 8, 8)), reference.norm(model[4], (128,))]


def test_trainer_alone_ends_with_every_norm_at_most_the_target(digits):
    trainer = FastClipTrainer(classifier(), max_norm=0.7)
    trainer.fit(*digits, nb_epochs=2, batch_size=64)
    assert max(true_norms(trainer.get_classifier().model)) <= 0.7 * 1.001


def test_trainer_around_madry_pgd_clips_the_inner_classifier(digits):
    inner = AdversarialTrainerMadryPGD(classifier(), nb_epochs=2, batch_size=64, eps=0.1, eps_step=0.05, max_iter=2)
    trainer = FastClipTrainer(inner, max_norm=0.7)
    trainer.fit(*digits)
    assert isinstance(trainer, Trainer)
    assert max(true_norms(trainer.get_classifier().model)) <= 0.7 * 1.001


def test_infinite_target_gives_the_weights_that_art_alone_gives(digits):
    weights = []
    for wrap in (lambda c: c, lambda c: FastClipTrainer(c, max_norm=float("inf"))):
        model = network()
        np.random.seed(0)
        wrap(classifier(model)).fit(*digits, nb_epochs=2, batch_size=64)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_fit_generator_clips_too(digits):
    from art.data_generators import NumpyDataGenerator

    trainer = FastClipTrainer(classifier(), max_norm=0.7)
    trainer.fit_generator(NumpyDataGenerator(*digits, batch_size=64), nb_epochs=1)
    assert max(true_norms(trainer.get_classifier().model)) <= 0.7 * 1.001


def test_trainer_that_takes_no_step_is_an_error(digits):
    with pytest.raises(RuntimeError, match="took no step"):
        FastClipTrainer(classifier()).fit(*digits, nb_epochs=0)


def test_trainer_without_an_optimizer_is_refused():
    without = PyTorchClassifier(network(), nn.CrossEntropyLoss(), (1, 8, 8), 10)
    with pytest.raises(ValueError, match="no optimizer"):
        FastClipTrainer(without)


def test_estimator_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="takes a PyTorchClassifier"):
        FastClipTrainer(object())


def test_transformer_clips_a_copy_and_leaves_the_trained_classifier_alone():
    trained, copy = classifier(), classifier(network(1))
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    transformer = FastClipTransformer(trained, max_norm=0.3)
    assert transformer(None, copy) is copy
    assert max(true_norms(copy.model)) <= 0.3 * 1.001
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.model.state_dict().items())
    assert transformer.is_fitted


def test_certificate_counts_the_standardisation_outside_the_model(digits):
    model = network()
    plain = classifier(model, LipschitzClassifier).lipschitz_bound().value
    scaled = classifier(model, LipschitzClassifier, preprocessing=(0.5, 0.25)).lipschitz_bound().value
    assert scaled == pytest.approx(4 * plain, rel=1e-12)


def test_rounding_is_accounted_for_on_the_range_that_the_standardised_images_have(digits):
    images, _ = digits
    plain = classifier(kind=LipschitzClassifier)
    scaled = classifier(plain.model, kind=LipschitzClassifier, preprocessing=(0.5, 0.1))
    outer, inner = scaled.lipschitz_bound(), plain.lipschitz_bound()
    direct = lipschitz_bound(plain.model, torch.zeros(1, *plain.input_shape), box=(-5.0, 5.0))
    assert outer.errors[torch.float64] >= direct.errors[torch.float64] > 4 * inner.errors[torch.float64]
    assert outer.errors[torch.float64] < 2 * direct.errors[torch.float64]
    assert classifier(kind=LipschitzClassifier, clip_values=None).lipschitz_bound().errors == {}
    _, radii = plain.certify(images[:8])
    with torch.no_grad():
        logits = plain.model.eval()(torch.from_numpy(images[:8]))
    exact = lipschitz_bound(plain.model, torch.zeros(1, *plain.input_shape), box=None)
    assert radii == pytest.approx(certified_radius(logits, logits.argmax(1), exact).numpy(), rel=1e-3)


def test_no_attack_succeeds_inside_a_certified_radius(digits):
    images, labels = digits
    certifying = classifier(kind=LipschitzClassifier)
    FastClipTrainer(certifying, max_norm=1.0).fit(images, labels, nb_epochs=3, batch_size=64)
    prediction, radius = certifying.certify(images[:64])
    assert (prediction >= 0).all() and (radius > 0).all()
    eps = float(np.median(radius))
    attack = ProjectedGradientDescent(certifying, norm=2, eps=eps, eps_step=eps / 4, max_iter=20, verbose=False)
    attacked = certifying.predict(attack.generate(images[:64])).argmax(1)
    assert (attacked == prediction)[radius >= eps].all()


def test_register_makes_the_trainer_reachable_in_art_and_unregister_takes_it_away():
    import art.defences.trainer as home

    register()
    assert home.FastClipTrainer is FastClipTrainer
    unregister()
    assert not hasattr(home, "FastClipTrainer")


def test_preprocessing_of_unknown_gain_is_refused():
    from art.defences.preprocessor import FeatureSqueezing

    squeezing = FeatureSqueezing(clip_values=(0, 1), bit_depth=1)
    with pytest.raises(NotImplementedError, match="FeatureSqueezing"):
        classifier(kind=LipschitzClassifier, preprocessing=squeezing).lipschitz_bound()
