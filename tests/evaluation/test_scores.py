"""Losses of documents against transformers (RWKV-4), and against one pass without chunks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rwkv.adapters import state
from rwkv.errors import UserError
from rwkv.evaluation import scores
from rwkv.evaluation.scores import Document, documents, score, token_losses
from tests.models.test_v4 import transformers_model


def texts(*lengths, vocab=50):
    generator = np.random.default_rng(0)
    return [generator.integers(1, vocab, length) for length in lengths]


def test_losses_match_transformers(make_model):
    model = make_model()
    theirs = transformers_model(model).eval()
    given = texts(1, 7, 29, 13)
    losses, best = token_losses(model, given)
    for ids, found, right in zip(given, losses, best, strict=True):
        whole = torch.tensor([[0, *ids.tolist()]])
        with torch.no_grad():
            logits = theirs(whole).logits[0, :-1]
        expected = F.cross_entropy(logits, whole[0, 1:], reduction="none")
        # fp32, different summation order
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
        assert right.tolist() == (logits.argmax(-1) == whole[0, 1:]).tolist()


@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_long_documents_in_chunks_carry_the_state(make_model, version, monkeypatch):
    model, given = make_model(version=version), texts(61, 40, 3)
    with torch.no_grad():
        logits = model(torch.tensor([[0, *given[0].tolist()]]))[0][0, :-1]
    expected = F.cross_entropy(logits, torch.from_numpy(given[0]), reduction="none").numpy()
    monkeypatch.setattr(scores, "CHUNK", 16)
    monkeypatch.setattr(scores, "_SLICE", 7)
    np.testing.assert_allclose(token_losses(model, given)[0][0], expected, rtol=1e-4, atol=1e-5)


def test_windows_have_no_earlier_context(make_model, monkeypatch):
    model, (ids,) = make_model(), texts(25)
    monkeypatch.setattr(scores, "CHUNK", 4)  # smaller than a window
    found = token_losses(model, [ids], window=10)[0][0]
    whole = torch.tensor([0, *ids.tolist()])
    for begin in range(0, 25, 10):
        part = whole[begin : begin + 11]
        with torch.no_grad():
            logits = model(part[None, :-1])[0][0]
        expected = F.cross_entropy(logits, part[1:], reduction="none").numpy()
        np.testing.assert_allclose(found[begin : begin + 10], expected, rtol=1e-4, atol=1e-5)


class Bytes:
    """Decodes an id to as many bytes."""

    def decode_bytes(self, ids):
        return b"".join(b"x" * i for i in ids)


def test_score_is_the_sum_over_counted_tokens(make_model, monkeypatch):
    model, given = make_model(), texts(9, 4, 17, 2, 6)
    masks = [np.arange(len(ids)) % 3 == 1 for ids in given]
    losses, best = token_losses(model, given)
    monkeypatch.setattr(scores, "_POOL", 1)
    found = score(model, map(Document, given, masks), Bytes(), batch=2)
    nats = sum(one[mask].sum() for one, mask in zip(losses, masks, strict=True))
    tokens = sum(int(mask.sum()) for mask in masks)
    size = sum(int(ids[mask].sum()) for ids, mask in zip(given, masks, strict=True))
    assert (found.documents, found.tokens, found.bytes) == (5, tokens, size)
    assert found.correct == sum(int(one[mask].sum()) for one, mask in zip(best, masks, strict=True))
    assert found.nats == pytest.approx(nats, rel=1e-5)  # other batches, so other sums in fp32
    assert found.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    again = score(model, map(Document, given, masks), Bytes(), batch=2)
    assert again == found
    assert score(model, map(Document, given, masks)).bits_per_byte is None


@pytest.mark.parametrize("window", [0, 4])
def test_progress_counts_all_tokens(make_model, monkeypatch, window):
    model, given, scored = make_model(), texts(9, 4, 17, 2, 6), []
    monkeypatch.setattr(scores, "CHUNK", 5)
    for _ in range(2):  # also with a tuned state, after which the first token is not predicted
        score(
            model,
            [Document(ids, np.zeros(len(ids), bool)) for ids in given],
            batch=2,
            window=window,
            progress=scored.append,
        )
        state.attach(model)
    assert sum(scored) == 2 * 38
    assert max(scored) <= 2 * 6  # a chunk of two documents


def test_documents_of_a_stream(make_stream):
    stream = make_stream([[1, 2, 0], [3, 0], [4, 5, 6, 0]], mask=[0, 1, 1, 1, 0, 0, 0, 1, 1])
    found = list(documents(stream))
    assert [document.ids.tolist() for document in found] == [[1, 2, 0], [3, 0], [4, 5, 6, 0]]
    assert [document.loss_mask.tolist() for document in found] == [
        [False, True, True],
        [True, False],
        [False, False, True, True],
    ]


def test_other_vocabulary_and_nan_rejected(make_model):
    model = make_model()
    with pytest.raises(UserError, match="token id 60 is outside the model's vocabulary of 50"):
        token_losses(model, [[60]])
    with torch.no_grad():
        model.ln_out.weight[0] = math.nan
    with pytest.raises(UserError, match="logits are NaN or Inf"):
        token_losses(model, [[4]])


@pytest.mark.parametrize("version", ["4", "7"])
def test_tuned_state_replaces_eod(make_model, version, monkeypatch):
    model, given = make_model(version=version), texts(21, 9, 1)
    state.attach(model)
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.normal_()
        logits = [model(torch.tensor([ids.tolist()]))[0][0] for ids in given]
    monkeypatch.setattr(scores, "CHUNK", 16)
    losses, best = token_losses(model, given)
    for ids, found, right, row in zip(given, losses, best, logits, strict=True):
        assert (found[0], right[0]) == (math.log(50), False)
        expected = F.cross_entropy(row[:-1], torch.from_numpy(ids[1:]), reduction="none")
        np.testing.assert_allclose(found[1:], expected.numpy(), rtol=1e-4, atol=1e-5)  # another order of sums
    total = score(model, [Document(ids, np.ones(len(ids), bool)) for ids in given])
    assert (total.tokens, total.nats) == (28, pytest.approx(sum(float(found[1:].sum()) for found in losses)))
