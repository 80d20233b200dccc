"""The ART plugin: trainers, transformer and certifying classifier, on small real images."""

import numpy as np
import pytest
import reference
import timm.scheduler
import torch
import torch.nn.functional as F
from art.attacks.evasion import ProjectedGradientDescent
from art.defences.trainer import (
    AdversarialTrainer,
    AdversarialTrainerAWPPyTorch,
    AdversarialTrainerFBFPyTorch,
    AdversarialTrainerMadryPGD,
    AdversarialTrainerOAATPyTorch,
    AdversarialTrainerTRADESPyTorch,
)
from art.defences.trainer.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from sklearn.datasets import load_digits
from torch import nn

from robust_spectral import certified_radius, lipschitz_bound
from robust_spectral.plugins.art import (
    FastClipTrainer,
    FastClipTransformer,
    LipschitzClassifier,
    LipschitzReport,
    register,
    unregister,
)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return (data.images[:256, None] / 16).astype(np.float32), np.eye(10, dtype=np.float32)[data.target[:256]]


class Network(nn.Module):
    """A network that is no ``nn.Sequential``, on whose list of activations TRADES and FBF of ART fail."""

    def __init__(self):
        super().__init__()
        self.conv, self.dense = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(128, 10)

    def forward(self, x):
        return self.dense(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))


def network(seed=0):
    torch.manual_seed(seed)
    return Network()


def classifier(model=None, kind=PyTorchClassifier, clip_values=(0, 1), **options):
    model = network() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return kind(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer=optimizer, clip_values=clip_values, **options)


def true_norms(model):
    return [reference.norm(model.conv, (1, 8, 8)), reference.norm(model.dense, (128,))]


def test_trainer_alone_ends_with_every_norm_at_most_the_target(digits):
    trainer = FastClipTrainer(classifier(), max_norm=0.7)
    trainer.fit(*digits, nb_epochs=2, batch_size=64)
    assert max(true_norms(trainer.get_classifier().model)) <= 0.7 * 1.001


def attack(inner):
    return ProjectedGradientDescent(inner, eps=0.1, eps_step=0.05, max_iter=2, verbose=False)


OAAT = {
    "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "lr_schedule": "cosine", "oaat_warmup": 0, "max_iter": 2, "norm": np.inf,
    "epsilon": 0.1, "i_epsilon": 0.05, "mixup_epsilon": 0.1, "mixup_alpha": 1.0, "alpha": 0.5, "beta": 1.0, "beta_final": 1.0,
    "awp_gamma": 0.01, "awp_warmup": 1, "alternate_iter_eps": 99, "lpips_weight": 1.0, "i_lpips_weight": 1.0,
    "layer_names_activation": ["conv"], "list_swa_epoch": [0], "list_swa_tau": [0.5], "load_swa_model_tau": 0.5,
    "swa_save_epoch": 99, "models_path": None,
}  # fmt: skip
TRAINERS = {
    "alone": lambda inner: inner,
    "adversarial": lambda inner: AdversarialTrainer(inner, attack(inner), ratio=0.5),
    "madry": lambda inner: AdversarialTrainerMadryPGD(inner, eps=0.1, eps_step=0.05, max_iter=2),
    "trades": lambda inner: AdversarialTrainerTRADESPyTorch(inner, attack(inner), beta=1.0),
    "awp": lambda inner: AdversarialTrainerAWPPyTorch(inner, classifier(network(7)), attack(inner), "PGD", 0.01, 1.0, 0),
    "fbf": lambda inner: AdversarialTrainerFBFPyTorch(inner, eps=0.1),
    "oaat": lambda inner: AdversarialTrainerOAATPyTorch(
        inner, classifier(network(7)), classifier(network(8)), [classifier(network(9))], attack(inner), dict(OAAT)
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_of_art_ends_with_every_norm_at_most_the_target(digits, name):
    trainer = FastClipTrainer(TRAINERS[name](classifier()), max_norm=0.7)
    trainer.fit(*digits, nb_epochs=2, batch_size=64)
    assert isinstance(trainer, Trainer) and trainer.clipper.steps >= 8
    assert max(true_norms(trainer.get_classifier().model)) <= 0.7 * 1.001


@pytest.mark.parametrize("name", TRAINERS)
def test_an_infinite_target_gives_the_weights_of_art_alone(digits, name):
    weights = []
    for wrap in (lambda trainer: trainer, lambda trainer: FastClipTrainer(trainer, max_norm=float("inf"))):
        np.random.seed(0)
        inner = classifier()
        torch.manual_seed(0)
        wrap(TRAINERS[name](inner)).fit(*digits, nb_epochs=2, batch_size=64)
        weights.append(inner.model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_an_optimizer_replaced_by_the_trainer_still_calls_the_clipper(digits):
    trainer = FastClipTrainer(TRAINERS["oaat"](classifier()), max_norm=0.7)
    first = trainer.classifier.optimizer
    trainer.fit(*digits, nb_epochs=4, batch_size=64)
    assert trainer.classifier.optimizer is not first
    assert trainer.clipper.steps == 4 * 4


def test_the_optimizer_of_a_proxy_classifier_does_not_call_the_clipper(digits):
    trainer = FastClipTrainer(TRAINERS["awp"](classifier()), max_norm=0.7)
    trainer.fit(*digits, nb_epochs=1, batch_size=64)
    assert trainer.clipper.steps == 4


SCHEDULERS = {
    "torch": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    "timm": lambda optimizer: timm.scheduler.StepLRScheduler(optimizer, decay_t=1, decay_rate=0.5),
}


@pytest.mark.parametrize("trainer", ["alone", "trades", "awp"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_of_torch_and_timm_step_once_in_an_epoch(digits, trainer, kind):
    inner = classifier()
    FastClipTrainer(TRAINERS[trainer](inner)).fit(
        *digits, nb_epochs=2, batch_size=64, scheduler=SCHEDULERS[kind](inner.optimizer)
    )
    assert inner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 4)


def test_a_scheduler_for_a_trainer_that_would_step_it_with_every_batch_is_refused(digits):
    inner = classifier()
    with pytest.raises(ValueError, match=r"AdversarialTrainerMadryPGD\.fit takes no scheduler"):
        FastClipTrainer(TRAINERS["madry"](inner)).fit(*digits, scheduler=SCHEDULERS["torch"](inner.optimizer), batch_size=64)


@pytest.mark.parametrize("name", TRAINERS)
def test_labels_may_be_indices(digits, name):
    images, labels = digits
    weights = []
    for given in (labels, labels.argmax(1)):
        np.random.seed(0)
        inner = classifier()
        torch.manual_seed(0)
        FastClipTrainer(TRAINERS[name](inner), max_norm=0.7).fit(images, given, nb_epochs=1, batch_size=64)
        weights.append(inner.model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_float64_images_are_cast_with_a_warning(digits):
    images, labels = digits
    with pytest.warns(UserWarning, match="cast to float32"):
        FastClipTrainer(classifier(), max_norm=0.7).fit(images.astype(np.float64), labels, nb_epochs=1, batch_size=64)


def test_a_model_on_another_device_than_its_classifier_says_is_refused():
    inner = classifier()
    inner.model.to("meta")
    with pytest.raises(ValueError, match="the model is on meta, its classifier works on cpu"):
        FastClipTrainer(inner)


def test_a_lipschitz_target_counts_the_standardisation_outside_the_model(digits):
    inner = classifier(kind=LipschitzClassifier, preprocessing=(0.5, 0.25))
    FastClipTrainer(inner, max_norm=float("inf"), lipschitz_target=3.0).fit(*digits, nb_epochs=1, batch_size=64)
    assert 1 < inner.lipschitz_bound().value <= 3


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
    with pytest.raises(TypeError, match="must be a number"):
        FastClipTransformer(trained, max_norm="1")
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


def test_rounding_errors_are_bounded_on_the_range_of_the_standardised_images(digits):
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


def test_the_report_orders_certified_attacked_and_clean_accuracies(digits):
    images, labels = digits
    certifying = classifier(kind=LipschitzClassifier, preprocessing=(0.5, 0.5))
    FastClipTrainer(certifying, max_norm=1.0).fit(images, labels, nb_epochs=3, batch_size=64)
    report = LipschitzReport([0.05, 0.5, 5.0], clever_samples=1)
    found = report.evaluate(certifying, images[:48], labels[:48].argmax(1), eps_step=0.5, max_iter=10)
    assert 0 < found["lipschitz_estimate"] <= found["lipschitz_bound"]
    assert 0 < found["certified"][0.05] <= found["attacked"][0.05] <= found["accuracy"]
    assert found["certified"][0.5] <= found["attacked"][0.5] < found["accuracy"]
    assert found["loss_sensitivity"] > 0 and 0 < found["clever"][0] <= 5
    with pytest.raises(TypeError, match="takes a LipschitzClassifier"):
        report.evaluate(classifier(), images, labels)


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


def test_a_model_that_is_a_sequential_is_clipped_and_certified(digits):
    images, labels = digits
    certifying = classifier(sequential(), kind=LipschitzClassifier, preprocessing=(0.5, 0.25))
    FastClipTrainer(certifying, max_norm=0.7).fit(images, labels, nb_epochs=2, batch_size=64)
    assert max(reference.norm(certifying.model[0], (1, 8, 8)), reference.norm(certifying.model[3], (512,))) <= 0.7 * 1.001
    assert 0 < certifying.lipschitz_bound().value <= 4 * 0.49 * 1.01  # 1 / std is outside the model
    assert (certifying.certify(images[:8])[1] > 0).any()


def test_a_clone_for_refitting_of_a_certifying_classifier_certifies(digits):
    again = classifier(kind=LipschitzClassifier).clone_for_refitting()
    assert type(again) is LipschitzClassifier and again.lipschitz_bound().value > 0
    FastClipTrainer(again, max_norm=0.7).fit(*digits, nb_epochs=1, batch_size=64)
    assert max(true_norms(again.model)) <= 0.7 * 1.001


def test_predictions_before_training_do_not_change_the_training(digits):
    weights = []
    for looks in (False, True):
        np.random.seed(0)
        inner = classifier()
        trainer = FastClipTrainer(inner, max_norm=0.7)
        if looks:
            trainer.predict(digits[0])
        torch.manual_seed(0)
        trainer.fit(*digits, nb_epochs=1, batch_size=64)
        weights.append(inner.model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_register_adds_the_trainer_to_art_and_unregister_removes_it():
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
