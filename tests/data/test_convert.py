"""jsonl to binidx: the tokens of every document, whole or not at all."""

import numpy as np
import pytest

from rwkv.data.binidx import Dataset
from rwkv.data.convert import convert
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError

TEXTS = ["Hello", "你好，世界", "User: 1\n\nAssistant: 2"]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_are_tokenised_in_order(write_jsonl, tmp_path, dtype, append_eod):
    first = write_jsonl(*({"text": text} for text in TEXTS), name="a.jsonl")
    second = write_jsonl({"text": "more"}, name="b.jsonl")
    done = convert([first, second], tmp_path / "new" / "out", dtype=dtype, append_eod=append_eod)
    assert done.prefix == str(tmp_path / "new" / "out_text_document")
    data, tokenizer = Dataset(done.prefix), WorldTokenizer()
    expected = [tokenizer.encode(text) + [0] * append_eod for text in [*TEXTS, "more"]]
    assert [data.document(i).tolist() for i in range(len(data))] == expected
    assert data.tokens.dtype == np.dtype(dtype)
    assert (done.documents, done.tokens) == (4, sum(map(len, expected)))


def test_more_documents_than_a_batch_stay_in_order(write_jsonl, tmp_path):
    done = convert([write_jsonl(*({"text": f"{i}"} for i in range(2500)))], tmp_path / "out", append_eod=False)
    data, tokenizer = Dataset(done.prefix), WorldTokenizer()
    assert [tokenizer.decode(data.document(i)) for i in range(2500)] == [str(i) for i in range(2500)]


def test_a_bad_line_leaves_no_file(write_jsonl, tmp_path):
    good, bad = write_jsonl({"text": "a"}), write_jsonl({"text": "a"}, {"wrong": "b"}, name="bad.jsonl")
    with pytest.raises(UserError, match=r"bad.jsonl, line 2"):
        convert([good, bad], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "text.jsonl"]


def test_existing_output_is_kept_unless_forced(write_jsonl, tmp_path):
    done = convert([write_jsonl({"text": "old"})], tmp_path / "out")
    new = write_jsonl({"text": "new and longer"})
    with pytest.raises(UserError, match="exist already; give --force"):
        convert([new], tmp_path / "out")
    tokenizer = WorldTokenizer()
    assert tokenizer.decode(Dataset(done.prefix).tokens) == "old"
    convert([new], tmp_path / "out", force=True)
    assert tokenizer.decode(Dataset(done.prefix).tokens) == "new and longer"
