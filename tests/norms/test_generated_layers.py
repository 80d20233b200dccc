"""Random layers of every kind: the norm lies inside every interval. Many more seeds: evaluations/benchmarks/fuzz_norms.py."""

import random

import pytest
import torch
from enclosure import verdict
from generated import KINDS, draw_layer, generate_layer
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference import same_bits, snapshot

PER_KIND = 12
EXAMPLES = 25
KIND_NUMBERS = range(len(KINDS))
ONCE_WRONG = (
    2102, 6013, 7206, 7261, 16959, 20367,  # circular windows that wrap onto themselves, by the Frobenius bound
    8118,  # weights of the size of the smallest float32 numbers, refused as not affine
)  # fmt: skip


@pytest.mark.slow
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
def test_every_bound_encloses_the_norm_of_the_regression_seeds(seed: int) -> None:
    layer = generate_layer(seed)
    found = verdict(layer)
    assert (found.refusal, found.failures) == (None, ()), str(layer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", KINDS)
def test_hypothesis_finds_no_layer_outside_a_bound(kind: str) -> None:
    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False), st.integers(0, 2**32 - 1))
    def search(rng: random.Random, seed: int) -> None:
        layer = draw_layer(kind, rng, seed, tries=5)
        assume(layer is not None)
        found = verdict(layer)
        assert (found.refusal, found.failures) == (None, ()), str(layer)

    search()


@pytest.mark.parametrize("seed", KIND_NUMBERS, ids=list(KINDS))
def test_a_seed_gives_the_same_layer_every_time(seed: int) -> None:
    before = torch.get_rng_state()
    once, again = generate_layer(seed), generate_layer(seed)
    assert str(once) == str(again)
    assert same_bits(snapshot(once.module), snapshot(again.module))
    assert torch.equal(before, torch.get_rng_state())
