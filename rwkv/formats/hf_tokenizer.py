"""The World tokenizer as files of a transformers folder: AutoTokenizer loads it without code from
the folder.

The World tokenizer always takes the longest token that fits. tokenizer.json describes this with
parts of the `tokenizers` library: bytes become letters, a regular expression of all tokens, as a
tree, splits the text, and a dictionary gives the ids.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

END = "<|endoftext|>"
VOCABULARY = "rwkv_vocab_v20230424.txt"
"""The vocabulary's own file. The tokenizers of rwkv7-hf and fla-hub and llama.cpp's converter read
it.
"""


def files(tokens: Sequence[bytes], vocab_size: int) -> dict[str, str]:
    """The contents of tokenizer.json, tokenizer_config.json and the vocabulary, by file name.

    Args:
        tokens: the bytes of every id; empty for ids that are not used.
        vocab_size: of the model.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": END for name in ("bos", "eos", "pad", "unk")},
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],  # no token_type_ids, which generate() rejects
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": _tokenizer(tokens, vocab_size),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        VOCABULARY: "".join(f"{i} {_literal(token)} {len(token)}\n" for i, token in enumerate(tokens) if token),
    }


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'user': 'User', 'assistant': 'Assistant', 'system': 'System'}.get(message['role'], message['role']) }}: "
    "{{ message['content'] | trim"
    r"""| replace("\r\n", "\n") | replace("\n\n", "\n") | replace("\n\n", "\n") | replace("\n\n", "\n") }}"""
    "\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Chats in the World models' format: "User: …", blank line, "Assistant: …", blank line. Up to seven
consecutive blank lines in a message become one line break, as in rwkv.data.convert.roles.fold."""


def _tokenizer(tokens: Sequence[bytes], vocab_size: int) -> str:
    """tokenizer.json, without the library, which would take seconds because it compiles the
    expression.
    """
    letters = _letters()
    vocabulary = {"".join(letters[byte] for byte in token): i for i, token in enumerate(tokens) if token}
    pattern = _longest_of(list(vocabulary))
    vocabulary[END] = 0
    used = set(vocabulary.values())
    vocabulary.update({f"[PAD{i}]": i for i in range(vocab_size) if i not in used})
    end = {"id": 0, "content": END, "special": True, "normalized": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [bytewise, split]},
        "post_processor": None,
        "decoder": bytewise,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": END},
    }
    return json.dumps(described, ensure_ascii=False)


def _letters() -> dict[int, str]:
    """The letter of each byte in byte-level tokenizers (GPT-2's table): printable bytes of Latin-1
    are themselves, the others follow U+0100.
    """
    same = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in same]
    return {byte: chr(byte) for byte in same} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _longest_of(words: Sequence[str]) -> str:
    """A regular expression that matches the longest of the words, all single letters among them."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}  # a word ends here
    return _expression(tree)


def _expression(node: dict[str, Any]) -> str:
    branches = [re.escape(letter) + _expression(below) for letter, below in node.items() if letter]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if "" in node else "")


def _literal(token: bytes) -> str:
    """A token as in the vocabulary's file: a Python literal, of a string if it is UTF-8."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)
