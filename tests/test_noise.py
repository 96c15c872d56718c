"""Noise: the published generator, keyed so that nothing that should differ is related."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GAMMA, split_mix

from llama_infer import noise
from llama_infer.batch import Batch

PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
"""The first numbers of SplitMix64 seeded with 1234567."""

words = st.integers(0, 2**64 - 1)


def signed(value):
    return (value + 2**63) % 2**64 - 2**63


def test_published_vectors():
    states = torch.tensor([signed(1234567 + n * GAMMA) for n in range(1, 6)])
    assert [value % 2**64 for value in noise.mix(states).tolist()] == PUBLISHED
    assert [split_mix(1234567 + n * GAMMA) for n in range(1, 6)] == PUBLISHED


@settings(deadline=None, max_examples=50)
@given(st.lists(words, min_size=1, max_size=20))
def test_int64_tensors_wrap_as_uint64_does(states):
    mixed = noise.mix(torch.tensor([signed(state) for state in states])).tolist()
    assert [value % 2**64 for value in mixed] == [split_mix(state) for state in states]


@settings(deadline=None, max_examples=50)
@given(st.lists(words, min_size=4, max_size=40))
def test_both_generators_have_the_same_bits(states):
    numbers = torch.tensor([signed(state) for state in states])
    assert torch.equal(
        torch.from_numpy(noise.mix_words(noise.words(numbers.clone())).view("int64")), noise.mix(numbers)
    )
    rows = [numbers[at : len(numbers) - 2 + at] for at in range(3)]
    name = signed(zlib.crc32(b"s") * GAMMA % 2**64)
    keys = noise.key(*rows, "s")
    assert torch.equal(keys, noise.tensor_key(*rows, name))
    index = torch.stack([rows[0], rows[1]], -1)
    assert torch.equal(noise.uniform(keys, index), noise.tensor_uniform(keys, index))


def key(seed=0, branch=0, position=0, stream="s"):
    return noise.key(*(torch.tensor([value]) for value in (seed, branch, position)), stream)


def draws(count=20_000, **named):
    return noise.uniform(key(**named), torch.arange(count)[None])[0].double()


def test_a_draw_is_the_top_half_of_the_next_number():
    """Number i of a stream is SplitMix64's i-th number after the key, as a fraction of 2^32."""
    start = key(seed=5, branch=1, position=7).item()
    expected = [((split_mix(start + (n + 1) * GAMMA) >> 32) + 0.5) / 2**32 for n in range(50)]
    assert draws(50, seed=5, branch=1, position=7).tolist() == pytest.approx(expected, abs=2**-24)


def test_the_interval_is_open():
    """Also at the words that round to 0 and to 1."""

    def unmix(word):
        """The inverse of SplitMix64's output function."""
        for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
            inverse = word
            for _ in range(3):
                inverse = word ^ (inverse >> shift)
            word = inverse * pow(factor, -1, 2**64) % 2**64
        return word

    for word in (0, 2**64 - 1, (2**32 - 1) << 32, (2**32 - 130) << 32):
        state = unmix(word)
        assert split_mix(state) == word
        (drawn,) = noise.uniform(torch.tensor([signed(state - GAMMA)]), torch.tensor([[0]]))[0].tolist()
        assert 0.0 < drawn < 1.0
        assert math.isfinite(noise.gumbel(torch.tensor(drawn)).item())


def test_uniform_and_gumbel_have_their_distributions():
    sample = draws(100_000, seed=3)
    counts = torch.histc(sample, bins=100, min=0, max=1)
    chi_square = ((counts - 1000) ** 2 / 1000).sum().item()
    assert 50 < chi_square < 160  # 99 degrees of freedom: mean 99, deviation 14
    bumps = noise.gumbel(sample.float()).double()
    assert bumps.mean().item() == pytest.approx(0.57722, abs=0.02)
    assert bumps.var().item() == pytest.approx(math.pi**2 / 6, abs=0.04)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 2**62}, {"branch": 1}, {"branch": 2}, {"position": 1}, {"position": 2}, {"stream": "t"}],
)
def test_neighbours_are_uncorrelated(other):
    """Streams, siblings, positions and seeds that differ share nothing, not even shifted by a few places."""
    count = 20_000
    one, two = draws(count) - 0.5, draws(count, **other) - 0.5
    for shift in (0, 1, 2, 5):
        product = (one[shift:] * two[: count - shift]).mean().item() * 12
        assert abs(product) < 5 / math.sqrt(count)
    assert not set(one.tolist()[:100]) & set(two.tolist()[:100])


def test_no_two_keys_coincide():
    """Among many seeds, branches, positions and streams: not by adding up to the same sum either."""
    grid = [
        key(seed, branch, position, stream).item()
        for seed in range(8)
        for branch in range(8)
        for position in range(8)
        for stream in ("categorical", "epsilon.coin", "epsilon.noise")
    ]
    assert len(set(grid)) == len(grid)


def test_a_row_draws_the_same_in_any_table():
    """Order, company, and which indices are asked for do not matter."""
    table = Batch.of([[1, 2], [3], [4, 5, 6], [7]], seeds=[9, 9, 8, 9])
    whole = table.uniform("x", torch.arange(30))
    assert whole.shape == (4, 30)
    assert torch.equal(whole[1], whole[3])  # the same seed, branch and position
    assert not torch.equal(whole[0], whole[1])  # another position
    some = torch.tensor([[29, 3], [0, 1]])
    assert torch.equal(table.select(torch.tensor([2, 0])).uniform("x", some), whole[[2, 0]].gather(1, some))
    assert torch.equal(table.uniform("x", 7), whole[:, 7])
