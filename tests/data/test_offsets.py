"""Prime sampling matches upstream and covers every slot; random sampling is reproducible; shuffling
is a permutation.
"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv.data.offsets import is_prime, magic_prime, prime_offset, random_offset, shuffled, slots, spread


def sieve(limit):
    prime = [False, False] + [True] * (limit - 1)
    for n in range(2, limit + 1):
        if prime[n]:
            prime[n * n :: n] = [False] * len(prime[n * n :: n])
    return prime


def test_is_prime_matches_sieve():
    assert [is_prime(n) for n in range(20001)] == sieve(20000)


def test_is_prime_on_pseudoprimes():
    assert all(
        is_prime(p) and p % 3 == 2 for p in (324331313, 162165671, 81082817, 40541399)
    )  # upstream's, for ctx 1024 … 8192
    assert not any(is_prime(n) for n in (3215031751, 3825123056546413051, 341550071728321, 324331313 * 162165671))


@pytest.mark.parametrize("prime", [2, 5, 11, 1013])
def test_prime_offsets_cover_every_slot(prime):
    assert sorted(prime_offset(n, prime, 16, 3) for n in range(1, prime + 1)) == [16 * i + 3 for i in range(prime)]


def test_prime_offsets_example():
    # p = 11: f = int(11 · 0.618…) = 6; 6·1 = 6, 6·8 = 48 ≡ 4, 6·27 = 162 ≡ 8 (mod 11)
    assert [prime_offset(n, 11, 10) for n in (1, 2, 3)] == [60, 40, 80]


@given(size=st.integers(3, 10**6), ctx_len=st.integers(1, 2000))
def test_magic_prime_is_largest_valid(size, ctx_len):
    prime, most = magic_prime(size, ctx_len), slots(size, ctx_len)
    if prime:
        assert is_prime(prime)
        assert prime % 3 == 2
        assert (prime - 1) * ctx_len + ctx_len + 1 <= size
    assert not any(n % 3 == 2 and is_prime(n) for n in range(prime + 1, most + 1))


@given(seed=st.integers(0, 2**32), sample=st.integers(0, 2**40), size=st.integers(12, 1000))
def test_random_offsets_reproducible_and_in_range(seed, sample, size):
    offset = random_offset(seed, sample, size, 10)
    assert offset == random_offset(seed, sample, size, 10)
    assert 0 <= offset < size - 11


def test_random_offsets_uniform():
    counts = [0] * 10
    for sample in range(5000):
        counts[random_offset(0, sample, 21, 10)] += 1
    assert min(counts) > 400  # 500 expected, standard deviation 21
    assert max(counts) < 600


@given(seed=st.integers(0, 2**64), turn=st.integers(0, 2**40), count=st.integers(1, 300))
def test_shuffled_is_permutation(seed, turn, count):
    assert sorted(shuffled(seed, turn, i, count) for i in range(count)) == list(range(count))


def test_shuffled_is_uniform():
    counts = [[0] * 7 for _ in range(7)]
    for turn in range(2000):
        for i in range(7):
            counts[i][shuffled(turn % 10, turn, i, 7)] += 1
    for row in counts:
        assert min(row) > 210  # 286 expected, standard deviation 16
        assert max(row) < 360
    assert len({tuple(shuffled(0, turn, i, 50) for i in range(50)) for turn in range(100)}) == 100


@given(count=st.integers(1, 10**6), data=st.data())
def test_spread_is_even(count, data):
    chosen = data.draw(st.integers(1, min(count, 500)))
    found = [spread(i, chosen, count) for i in range(chosen)]
    assert found[0] == 0
    assert found[-1] < count
    assert {b - a for a, b in itertools.pairwise(found)} <= {count // chosen, count // chosen + 1}
