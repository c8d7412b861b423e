"""Documents side by side: none cut, none lost but those that cannot serve."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rwkv.data.packing import pack


def starts(sizes):
    return np.cumsum([0, *sizes]).astype(np.int64)


@given(sizes=st.lists(st.integers(1, 30)), ctx_len=st.integers(1, 20), data=st.data())
def test_samples_are_runs_of_whole_documents_that_fit(sizes, ctx_len, data):
    enough = data.draw(st.integers(1, ctx_len))
    edges = starts(sizes).tolist()
    packed = pack(starts(sizes), ctx_len, enough)
    covered = set()
    for begin, end in packed.windows.tolist():
        assert begin in edges
        assert end in edges
        assert 2 <= end - begin <= ctx_len + 1
        inside = [edge for edge in edges if begin < edge < end]
        assert all(edge - begin < enough for edge in inside), "took a document more than it needed"
        after = [edge for edge in edges if edge > end]
        if end - begin < enough and after:
            assert after[0] - begin > ctx_len + 1, "stopped too early"
        assert not covered & set(range(begin, end))
        covered |= set(range(begin, end))
    left = [size for size, begin in zip(sizes, edges, strict=False) if begin not in covered]
    assert packed.too_long == sum(size > ctx_len + 1 for size in sizes)
    assert sorted(left) == sorted([size for size in sizes if size > ctx_len + 1] + [1] * packed.too_short)


def test_by_hand():
    # 2 + 3 reach 5; 4 alone, as 20 does not fit beside it; 20 is left out; 5 is enough by itself; 1 holds no target
    packed = pack(starts([2, 3, 4, 20, 5, 1]), ctx_len=10, enough=5)
    assert packed.windows.tolist() == [[0, 5], [5, 9], [29, 34]]
    assert (packed.too_long, packed.too_short) == (1, 1)
