"""The token stream, its train/validation split, and the ChatML loss mask."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rwkv.data import token_stream as module
from rwkv.data.token_stream import Stream, split
from rwkv.errors import UserError

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1).filter(any)


def flat(documents):
    return [token for document in documents for token in document]


@given(documents=DOCUMENTS, separator=st.sampled_from([-1, 0]), chunk=st.integers(1, 20), data=st.data())
def test_read_matches_plain_lists(make_stream, monkeypatch_module, documents, separator, chunk, data):
    monkeypatch_module.setattr(module, "_CHUNK", chunk)
    ids = flat(documents)
    mask = data.draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    stream = make_stream(documents, mask, separator=separator)
    numbers = [i for i, document in enumerate(documents) for _ in document]
    starts = [t == 0 or numbers[t] != numbers[t - 1] or (separator == 0 and ids[t - 1] == 0) for t in range(len(ids))]
    begin = data.draw(st.integers(0, len(ids) - 1))
    end = data.draw(st.integers(begin + 1, len(ids)))
    part = stream.read(begin, end)
    assert part.ids.tolist() == stream.ids(begin, end).tolist() == ids[begin:end]
    assert part.loss_mask.tolist() == [bool(m) for m in mask[begin:end]]
    assert part.starts.tolist() == starts[begin:end]
    assert stream.document_starts().tolist() == [*np.flatnonzero(starts), len(ids)]


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@given(seed=st.integers(0, 1000), share=st.floats(0.05, 0.9), chunk=st.integers(3, 100))
def test_split_partitions_documents(make_stream, monkeypatch_module, seed, share, chunk):
    monkeypatch_module.setattr(module, "_CHUNK", chunk)
    sizes = np.random.default_rng(seed).integers(0, 6, 60)
    documents = [[i] * size for i, size in enumerate(sizes)]
    data = make_stream(documents)._data
    try:
        sides = split(data, share, 0)
    except UserError:  # all documents are on one side
        assume(False)
    seen = []
    for spans in sides:
        stream = Stream(data, spans)
        ids = stream.ids(0, len(stream)).tolist()
        numbers = sorted(set(ids))
        assert ids == [i for i in numbers for _ in documents[i]], "in the order of the file"
        starts = stream.document_starts()
        assert [ids[t] for t in starts[:-1]] == numbers
        assert starts[-1] == len(ids)
        seen += numbers
    assert sorted(seen) == [i for i, size in enumerate(sizes) if size]


def test_split_is_stable_when_documents_are_appended(make_stream):
    validation = []
    for count in (2000, 3000):
        data = make_stream([[i, i] for i in range(count)])._data
        stream = Stream(data, split(data, 0.1, 10)[1])
        validation.append(set(stream.ids(0, len(stream)).tolist()))
    assert validation[0] == {i for i in validation[1] if i < 2000}
    assert 220 < len(validation[1]) < 380  # 300 expected, standard deviation 16


def test_split_of_few_documents(make_stream):
    data = make_stream([range(60), range(60, 100)])._data
    train, validation = (Stream(data, spans) for spans in split(data, 0.2, 10))
    assert train.ids(0, len(train)).tolist() == list(range(80))
    assert validation.ids(0, len(validation)).tolist() == list(range(80, 100))
    assert validation.document_starts().tolist() == [0, 20]


def test_split_too_small(make_stream):
    data = make_stream([range(100)])._data
    with pytest.raises(
        UserError, match=r"--val_split 0.1: leaves 10 tokens for validation, but one sample of ctx_len 9 needs 11"
    ):
        split(data, 0.1, 9)
    with pytest.raises(UserError, match=r"--val_split 0.95: leaves 5 tokens for training"):
        split(data, 0.95, 9)


OPEN, BREAK, CLOSE = module.CHATML


@given(ids=st.lists(st.sampled_from([OPEN, OPEN, BREAK, BREAK, CLOSE, 1, 2]), min_size=1, max_size=60), data=st.data())
def test_chatml_mask_at_any_offset(make_stream, ids, data):
    cut = data.draw(st.integers(0, len(ids)))
    expected = []
    for document in (ids[:cut], ids[cut:]):
        inside = False
        for t, token in enumerate(document):
            inside = inside or document[max(0, t - 2) : t] == [OPEN, BREAK]
            expected.append(inside)
            inside = inside and token != CLOSE
    stream = make_stream([ids[:cut], ids[cut:]], chatml=True)
    begin = data.draw(st.integers(0, len(ids) - 1))
    assert stream.read(begin, len(ids)).loss_mask.tolist() == expected[begin:]
