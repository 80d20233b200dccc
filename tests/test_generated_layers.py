"""Random layers of every kind: the norm lies inside every interval. The full count: evaluations/benchmarks/fuzz_norms.py."""

import pytest
import torch
from enclosure import verdict
from generated import KINDS, generate_layer
from reference import same_bits, snapshot

PER_KIND = 12
KIND_NUMBERS = range(len(KINDS))
ONCE_WRONG = (2102, 6013, 7206, 7261, 16959, 20367)  # circular windows that wrap onto themselves, by the Frobenius bound


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", KIND_NUMBERS, ids=list(KINDS))
def test_every_bound_encloses_the_norm_of_random_layers(kind: int) -> None:
    for seed in range(kind, PER_KIND * len(KINDS), len(KINDS)):
        layer = generate_layer(seed)
        found = verdict(layer)
        assert (found.refusal, found.failures) == (None, ()), str(layer)
        assert found.ratio <= 1 + 1e-10, str(layer)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("seed", ONCE_WRONG)
def test_layers_that_a_bound_once_missed_are_enclosed(seed: int) -> None:
    layer = generate_layer(seed)
    assert verdict(layer).failures == (), str(layer)


@pytest.mark.parametrize("seed", KIND_NUMBERS, ids=list(KINDS))
def test_a_seed_gives_the_same_layer_every_time(seed: int) -> None:
    before = torch.get_rng_state()
    once, again = generate_layer(seed), generate_layer(seed)
    assert str(once) == str(again)
    assert same_bits(snapshot(once.module), snapshot(again.module))
    assert torch.equal(before, torch.get_rng_state())
