"""Samples: windows, whole documents, sharding over ranks, validation; invalid settings."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from rwkv.data.dataset import Contexts, Documents, ValidationSamples, pack
from rwkv.data.offsets import prime_offset
from rwkv.errors import UserError

SIZES = [3, 12, 5, 30, 1, 9, 2, 11, 7]  # of documents


@pytest.fixture(scope="module")
def stream(make_stream):
    return make_stream([range(1000)])


@pytest.fixture(scope="module")
def documents():
    """Ids that encode their position: 100 · document + position."""
    return [[100 * (i + 1) + t for t in range(size)] for i, size in enumerate(SIZES)]


def test_y_is_x_shifted(stream):
    data = Contexts(stream, 7, 20, seed=3)
    for index in range(20):
        x, y = data[index]
        assert x.tolist() == list(range(x[0], x[0] + 7))
        assert y.tolist() == [i + 1 for i in x.tolist()]


def test_prime_order_matches_upstream(stream):
    # upstream: ii = 1 + epoch · samples_per_epoch + idx · world + rank, samples_per_epoch over all
    # ranks
    samples, world = 6, 3
    for epoch in range(3):
        for rank in range(world):
            data = Contexts(stream, 10, samples, prime=89, rank=rank, world_size=world, epoch=epoch)
            expected = [prime_offset(1 + epoch * samples * world + i * world + rank, 89, 10) for i in range(samples)]
            assert [data.offset(i) for i in range(samples)] == expected


def test_random_first_precedes_prime_sampling(stream):
    # upstream: random offsets while ii = 1, 2, … is less than my_random_steps, then the prime
    # offsets of ii − my_random_steps
    data = Contexts(stream, 10, 12, seed=5, prime=89, random_first=4)
    random = Contexts(stream, 10, 12, seed=5)
    assert [data.offset(i) for i in range(12)] == [
        *map(random.offset, range(3)),
        *(prime_offset(i, 89, 10) for i in range(9)),
    ]


@pytest.mark.parametrize("prime", [0, 89])
def test_ranks_shard_single_process_order(stream, prime):
    single = Contexts(stream, 10, 12, seed=5, prime=prime)
    sharded = [Contexts(stream, 10, 6, seed=5, prime=prime, rank=rank, world_size=2) for rank in (0, 1)]
    for epoch in (0, 1):
        for data in (single, *sharded):
            data.epoch = epoch
        assert [single.offset(i) for i in range(12)] == [sharded[i % 2].offset(i // 2) for i in range(12)]


def test_data_shorter_than_ctx_len(make_stream):
    with pytest.raises(
        UserError,
        match=r"has 9 tokens, but one sample of ctx_len 8 needs 10; use more text, or --ctx_len 7 or less",
    ):
        Contexts(make_stream([range(9)]), 8, 1)
    Contexts(make_stream([range(10)]), 8, 1)


@pytest.mark.parametrize("prime", [97, 91, 101])  # 97 ≡ 1 (mod 3); 91 = 7 · 13; 101 > 99 slots
def test_invalid_magic_prime(stream, prime):
    with pytest.raises(UserError, match=rf"magic_prime {prime} .* <= 99, .* the largest is 89"):
        Contexts(stream, 10, 1, prime=prime)


KINDS = {
    "random": lambda stream, **flags: Contexts(stream, 10, **flags),
    "prime": lambda stream, **flags: Contexts(stream, 10, prime=89, **flags),
    "documents": lambda stream, **flags: Documents(stream, 12, min_tokens=6, **flags),
    "documents in order": lambda stream, **flags: Documents(stream, 12, min_tokens=6, sequential=True, **flags),
}


@pytest.fixture(scope="module")
def kinds(make_stream, stream):
    many = make_stream([[i % 50 + 1] * (1 + i * 7 % 12) for i in range(150)])
    return {name: (make, many if "documents" in name else stream) for name, make in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**31),
    world=st.integers(1, 4),
    batch=st.integers(1, 3),
    steps=st.integers(1, 5),
    epoch=st.integers(0, 50),
    stop=st.integers(0, 4),
)
def test_resume_yields_same_batches(kinds, kind, seed, world, batch, steps, epoch, stop):
    make, stream = kinds[kind]
    for rank in range(world):
        flags = {"samples": steps * batch, "seed": seed, "rank": rank, "world_size": world}
        complete, resumed = make(stream, **flags), make(stream, **flags)
        for data in (complete, resumed):
            _ = data[0]  # earlier reads have no effect
            data.epoch = epoch
        first = min(stop, steps - 1) * batch
        expected = list(DataLoader(complete, batch))[first // batch :]
        actual = list(DataLoader(Subset(resumed, range(first, len(resumed))), batch))
        assert len(expected) == len(actual)
        for ours, theirs in zip(actual, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31), world=st.integers(1, 5), samples=st.integers(1, 7), epochs=st.integers(1, 4))
def test_sample_numbers_are_unique(kinds, kind, seed, world, samples, epochs):
    make, stream = kinds[kind]
    numbers, windows = [], []
    for rank in range(world):
        data = make(stream, samples=samples, seed=seed, rank=rank, world_size=world)
        for epoch in range(epochs):
            data.epoch = epoch
            numbers += [data.number(i) for i in range(samples)]
            windows += [data.window(data.number(i)) for i in range(samples)]
    assert sorted(numbers) == list(range(epochs * samples * world))
    if kind != "random":  # random sampling may draw the same position twice, as upstream
        for turn in range(0, len(numbers), period := 89 if kind == "prime" else data.per_pass):
            in_pass = [w for n, w in zip(numbers, windows, strict=True) if turn <= n < turn + period]
            assert len(set(in_pass)) == len(in_pass)


def test_reset_at_document_starts(make_stream, documents):
    data = Contexts(make_stream(documents), 20, 30, seed=1, reset=True)
    seen = 0
    for i in range(30):
        x, y, loss_mask, reset = data[i]
        assert reset.tolist() == [token % 100 == 0 for token in x.tolist()]
        assert loss_mask.tolist() == [token % 100 != 0 for token in y.tolist()]
        seen += int(reset.sum())
    assert seen > 30
    plain = Contexts(make_stream(documents), 20, 30, seed=1)
    assert all(torch.equal(a, b) for i in range(30) for a, b in zip(plain[i], data[i], strict=False))


def test_loss_mask_aligned_with_targets(make_stream, documents):
    ids = [token for document in documents for token in document]
    data = Contexts(make_stream(documents, mask=[token % 3 == 0 for token in ids]), 20, 30, seed=1)
    for i in range(30):
        _, y, loss_mask, reset = data[i]
        assert loss_mask.tolist() == [token % 3 == 0 for token in y.tolist()]
        assert not reset.any()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("sequential", [False, True])
def test_documents_once_per_pass_with_masked_padding(make_stream, documents, sequential, reset):
    data = Documents(make_stream(documents), 12, 0, min_tokens=6, sequential=sequential, reset=reset)
    data.samples = 3 * data.per_pass
    passes = []
    for turn in range(3):
        seen = []
        for i in range(data.per_pass):
            x, y, loss_mask, starts = data[turn * data.per_pass + i]
            whole = [x[0].item(), *y.tolist()]
            length = len(whole) - whole[::-1].index(next(token for token in reversed(whole) if token))
            assert whole[length:] == [0] * (13 - length)
            assert not loss_mask[length - 1 :].any()
            assert loss_mask[: length - 1].tolist() == [not reset or token % 100 != 0 for token in whole[1:length]]
            assert starts.tolist() == [reset and token % 100 == 0 and token > 0 for token in x.tolist()]
            seen.append(tuple(whole[:length]))
        passes.append(seen)
        fitting = [document for document in documents if len(document) <= 13]
        assert sorted(token for sample in seen for token in sample) == [
            token for document in fitting for token in document
        ]
    assert (passes[0] == passes[1] == sorted(passes[0])) == sequential
    assert data.packed.too_long == 1


def test_no_document_fits(make_stream, documents):
    with pytest.raises(
        UserError,
        match=r"none of 2 documents has 2 to 5 tokens.*--ctx_len 4 needs; use a larger --ctx_len, the correct --doc_sep",
    ):
        Documents(make_stream([range(6), [1]]), 4, 1)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("count", [0, 5, 1000])
def test_validation_samples_spread_and_sharded(stream, world, count):
    source = Contexts(stream, 10, 1)
    ranks = [list(ValidationSamples(source, count, rank, world)) for rank in range(world)]
    # under ZeRO-3 each forward pass waits for the other ranks
    assert len({len(items) for items in ranks}) == 1
    items = [item for items in ranks for item in items if len(item) == 2 or item[2].any()]
    assert all(len(item) == 2 or (item[2].all() and not item[3].any()) for item in items)
    begins = sorted(int(item[0][0]) for item in items)
    assert begins == [10 * i for i in (range(99) if count != 5 else (0, 19, 39, 59, 79))]


def as_starts(sizes):
    return np.cumsum([0, *sizes]).astype(np.int64)


@given(sizes=st.lists(st.integers(1, 30)), ctx_len=st.integers(1, 20), data=st.data())
def test_pack_keeps_documents_whole_and_within_ctx_len(sizes, ctx_len, data):
    min_tokens = data.draw(st.integers(1, ctx_len))
    edges = as_starts(sizes).tolist()
    packed = pack(as_starts(sizes), ctx_len, min_tokens)
    covered = set()
    for begin, end in packed.windows.tolist():
        assert begin in edges
        assert end in edges
        assert 2 <= end - begin <= ctx_len + 1
        inside = [edge for edge in edges if begin < edge < end]
        assert all(edge - begin < min_tokens for edge in inside), "contains a document more than needed"
        after = [edge for edge in edges if edge > end]
        if end - begin < min_tokens and after:
            assert after[0] - begin > ctx_len + 1, "stopped too early"
        assert not covered & set(range(begin, end))
        covered |= set(range(begin, end))
    dropped = [size for size, begin in zip(sizes, edges, strict=False) if begin not in covered]
    assert packed.too_long == sum(size > ctx_len + 1 for size in sizes)
    assert sorted(dropped) == sorted([size for size in sizes if size > ctx_len + 1] + [1] * packed.too_short)


def test_pack_example():
    # 2 + 3 reach 5; 4 stays alone, as 20 does not fit with it; 20 is skipped; 5 reaches 5 alone; 1
    # has no target
    packed = pack(as_starts([2, 3, 4, 20, 5, 1]), ctx_len=10, min_tokens=5)
    assert packed.windows.tolist() == [[0, 5], [5, 9], [29, 34]]
    assert (packed.too_long, packed.too_short) == (1, 1)
