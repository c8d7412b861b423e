"""World ids against the tokenizer of the PyPI package `rwkv`, which is installed separately."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv.data.tokenizer import LARGEST_ID, VOCAB_SIZE, HFTokenizer, WorldTokenizer
from rwkv.errors import UserError
from tests.oracle import ask, needs_oracle

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
tokenizer = TRIE_TOKENIZER(sys.argv[1] + "/rwkv/rwkv_vocab_v20230424.txt")
json.dump([tokenizer.encode(text) for text in json.load(sys.stdin)], sys.stdout)
"""
TEXTS = [
    "Hello, world!", "  two spaces\n\n\ttab", "你好，世界。RWKV 是一种语言模型。", "🤖👩‍👩‍👧 emoji ﷽", "naïve café Ünï", "\x00\x01\x7f\u0080\uffff", "a" * 1000,
    " " * 300, "def f(x):\n    return x ** 2\n", "日本語テキスト、한국어, العربية, Русский, ελληνικά", "User: 1+1=?\n\nAssistant: 2", "\r\n\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return WorldTokenizer()


@needs_oracle
def test_ids_match_reference_tokenizer(tokenizer, root):
    texts = TEXTS + [
        json.loads(line)["text"] for line in (root / "data/example.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    texts += [(root / page).read_text(encoding="utf-8") for page in ("README.md", "README.zh.md", "rwkv/checkpoint.py")]
    expected = json.loads(ask(PROGRAM, stdin=json.dumps(texts)))
    assert [tokenizer.encode(text) for text in texts] == expected


@given(text=st.text(st.characters(blacklist_categories=["Cs"])))
def test_text_roundtrip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(1 <= i <= LARGEST_ID for i in ids)


def test_every_id_decodes(tokenizer):
    assert (
        len(tokenizer.decode_bytes(range(1, LARGEST_ID + 1))) > 300_000
    )  # the library's decoder panics on a single byte of a character
    half = "好".encode()[:2]
    assert tokenizer.decode_bytes([half[0] + 1, half[1] + 1]) == half  # ids 1 … 256 are the bytes
    assert tokenizer.decode([half[0] + 1]) == "\ufffd"


def test_eod_unused_and_invalid_ids(tokenizer):
    assert tokenizer.decode_bytes([0, *range(LARGEST_ID + 1, VOCAB_SIZE)]) == b""
    for wrong in (-1, VOCAB_SIZE):
        with pytest.raises(ValueError, match="not a World token id"):
            tokenizer.decode([wrong])


def test_missing_tokenizer_file(tmp_path):
    with pytest.raises(
        UserError, match="^--vocab_file is missing: --tokenizer_type HFTokenizer needs a tokenizer.json"
    ):
        HFTokenizer("")
    with pytest.raises(UserError, match="none.json: no such file"):
        HFTokenizer(tmp_path / "none.json")
