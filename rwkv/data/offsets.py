"""Offsets of samples in the token stream, as pure functions of (seed, sample number), so that runs
are reproducible.
"""

import hashlib
import math

import numpy as np

_ROUNDS = 6  # of the Feistel network; four suffice for large counts, small ones need more


def random_offset(seed: int, sample: int, size: int, ctx_len: int) -> int:
    """Offset of sample `sample`, uniform over [0, size − ctx_len − 1) (upstream's stages 0 and 4).

    Args:
        sample: number of the sample, unique within the run.
        size: tokens in the stream; at least ctx_len + 2.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed & (2**64 - 1), sample], np.uint64)))
    return int(generator.integers(0, size - ctx_len - 1))


def prime_offset(number: int, prime: int, ctx_len: int, shift: int = 0) -> int:
    """Offset of sample `number` (from 1) in upstream's prime sampling: (f · number³ mod p) ·
    ctx_len + shift, f = ⌊p (√5 − 1) / 2⌋.

    p ≡ 2 (mod 3) makes cubing a bijection mod p, so p consecutive samples visit each of the p slots
    once.
    """
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    return (factor * number**3 % prime) * ctx_len + shift


def shuffled(seed: int, pass_number: int, position: int, count: int) -> int:
    """Element `position` of a pseudorandom permutation of 0 … count − 1 keyed by (seed,
    pass_number), computed without storing it.

    A Feistel network over the next power of four, iterated until the result is below count (cycle
    walking; fewer than four iterations on average).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    key = hashlib.blake2b(f"{seed} {pass_number} {count}".encode(), digest_size=16).digest()
    while True:
        left, right = position >> half, position & low
        for step in range(_ROUNDS):
            mixed = hashlib.blake2b(right.to_bytes(8, "little"), digest_size=8, key=key, salt=bytes([step])).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & low)
        position = left << half | right
        if position < count:
            return position


def spread(i: int, chosen: int, count: int) -> int:
    """The i-th of `chosen` numbers spread evenly over 0 … count − 1."""
    return i * count // chosen


def slots(size: int, ctx_len: int) -> int:
    """Number of non-overlapping contexts in the stream, each with one more token as the last
    target.
    """
    return (size - 1) // ctx_len


def magic_prime(size: int, ctx_len: int) -> int:
    """The largest prime p ≡ 2 (mod 3) with p ≤ slots; 0 if there is none (fewer than two slots)."""
    return next((n for n in range(slots(size, ctx_len), 1, -1) if n % 3 == 2 and is_prime(n)), 0)


def is_prime(n: int) -> bool:
    """Miller-Rabin test; exact for n < 3.3e24 with these bases (Sorenson and Webster 2015)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n < 2 or any(n % q == 0 for q in bases):
        return n in bases
    odd, twos = n - 1, 0  # n − 1 = odd · 2^twos
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        x = pow(base, odd, n)
        if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
            return False
    return True
