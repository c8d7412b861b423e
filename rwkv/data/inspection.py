"""Statistics and problems of a binidx, for scripts/inspect_data.py."""

import codecs
import hashlib
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rwkv.data import histogram, offsets, provenance
from rwkv.data.binidx import Dataset, mask_path
from rwkv.data.progress_bar import progress_bar
from rwkv.data.tokenizer import EOD, LARGEST_ID, VOCAB_SIZE, HFTokenizer, WorldTokenizer
from rwkv.errors import UserError

LARGEST_20B = 50279  # with the ChatML tokens added to its 50277 tokens
_CHUNK = 1 << 22  # tokens, documents or hashes processed at a time
_VOCABULARY_SAMPLES = 200  # documents from which the vocabulary is guessed


@dataclass
class Inspection:
    """Result of `inspect`. Lengths are in tokens; `problems` should be fixed before training,
    `remarks` may be intended.
    """

    prefix: str
    dtype: str
    documents: int
    tokens: int
    smallest_id: int = 0
    largest_id: int = 0
    vocabulary: str = ""  # World, 20B or unknown
    crlf: int = 0  # of `looked_at` documents, those with CRLF line endings; known for World only
    looked_at: int = 0
    with_eod: int = 0  # documents that end with token 0
    empty: int = 0  # documents without tokens, or with EOD alone
    too_long: int = 0  # documents longer than ctx_len + 1
    longest: int = 0
    repeated: int = 0  # documents that equal an earlier one
    # pairs of document numbers, from 1
    repeated_examples: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # documents per bin of rwkv.data.histogram
    counted: int | None = None  # tokens that contribute to the loss; None: no mask
    uncounted_documents: int | None = None  # documents without such a token
    paired: bool = False  # preference pairs: chosen and rejected documents alternate
    answers: list[int] = field(default_factory=list)  # of pairs: tokens of all chosen, and rejected answers
    fitting: int = 0  # pairs whose documents are not longer than ctx_len + 1
    ctx_len: int = 0
    micro_bsz: int = 0
    contexts: int = 0  # non-overlapping windows of ctx_len tokens
    steps: int = 0  # of micro_bsz contexts (or pairs), to see each once
    magic_prime: int = 0
    samples: list[str] = field(default_factory=list)
    verified: int | None = None  # documents that decode to the source; None: not requested
    manifest: dict | None = None  # of rwkv.data.provenance; None: there is none
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def inspect(
    data: Dataset, ctx_len: int, micro_bsz: int, samples: int = 3, tokenizer: HFTokenizer | None = None
) -> Inspection:
    """Read every token once; peak memory does not grow with the data.

    Args:
        ctx_len: context length in tokens; used to compute epoch size and to flag over-long
            documents.
        micro_bsz: samples per step, for the epoch size.
        samples: number of documents, or of pairs, to decode.
        tokenizer: decodes the ids if they are not World's.
    """
    found = Inspection(
        str(data.prefix), str(data.tokens.dtype), len(data), len(data.tokens), ctx_len=ctx_len, micro_bsz=micro_bsz
    )
    found.manifest = _manifest(data, found)
    found.paired = bool((found.manifest or {}).get("paired"))
    with tempfile.TemporaryFile() as spill, progress_bar(len(data.tokens), "inspect", " tokens", 0.5) as bar:
        hashes = np.memmap(spill, np.uint64, "w+", shape=len(data))
        _scan(data, found, hashes, bar)
        found.repeated, found.repeated_examples = _count_duplicates(hashes)
    found.vocabulary = _vocabulary(data, found)
    if known := tokenizer or (WorldTokenizer() if found.vocabulary == "World" else None):
        shown = _evenly_spaced(len(data), samples)
        if found.paired:
            shown = (2 * i + side for i in _evenly_spaced(len(data) // 2, samples) for side in (0, 1))
        found.samples = [known.decode(_first_tokens(data, i, 200)) for i in shown]
    found.contexts = offsets.slots(found.tokens, ctx_len)
    if found.paired:
        found.fitting = _fitting_pairs(data, ctx_len)
    found.steps = math.ceil((found.fitting if found.paired else found.contexts) / micro_bsz)
    found.magic_prime = offsets.magic_prime(found.tokens, ctx_len)
    _find_problems(found, data)
    return found


def verify(
    data: Dataset, texts: Iterable[tuple[str, int]], size: int, found: Inspection, tokenizer: HFTokenizer | None = None
) -> None:
    """Compare every decoded document with its source, byte for byte; adds a problem for the first
    that differs.

    Args:
        texts: the source's documents with the number of bytes read so far
            (rwkv.data.convert.pipeline.texts).
        size: bytes of the source.
        tokenizer: the tokenizer of the data, if it is not World's.
    """
    if found.vocabulary != "World" and not tokenizer:
        found.problems.append(
            f"cannot be verified: the ids are not World's, but {found.vocabulary}; pass the tokenizer.json as --vocab_file"
        )
        return
    known, number, before = tokenizer or WorldTokenizer(), 0, 0
    with progress_bar(size, "verify", "B", 0.5) as bar:
        for text, done in texts:
            bar.update(done - before)
            before = done
            if number == len(data):
                found.problems.append(f"the source has more documents than the {number:,} of the data")
                return
            ids = data.document(number)
            written = known.decode_bytes(ids.tolist())
            if written != (expected := known.as_decoded(text).encode("utf-8")):
                at = next(
                    (i for i, (a, b) in enumerate(zip(written, expected, strict=False)) if a != b),
                    min(len(written), len(expected)),
                )
                found.problems.append(
                    f"document {number + 1:,} differs from the source at byte {at:,}: the source has {expected[at : at + 20]!r}, the data {written[at : at + 20]!r}"
                )
                return
            number += 1
    if number < len(data):
        found.problems.append(f"the source has {number:,} documents, the data {len(data):,}")
        return
    found.verified = number


def format_report(found: Inspection) -> str:
    """The result as text for a terminal."""
    mean = found.tokens / max(1, found.documents)
    lines = [
        f"data:       {found.prefix}, {found.dtype}",
        f"size:       {found.documents:,} documents, {found.tokens:,} tokens, {mean:,.0f} per document on average, {found.longest:,} in the longest",
        f"source:     {provenance.summary(found.manifest)}",
        f"vocabulary: {found.vocabulary}, inferred from the ids ({found.smallest_id} to {found.largest_id})",
        f"EOD:        {found.with_eod:,} of {found.documents:,} documents end with token {EOD}",
        f"duplicates: {found.repeated:,} documents equal an earlier one"
        + "".join(f"; {b:,} equals {a:,}" for a, b in found.repeated_examples[:3]),
        f"mask:       {_format_mask(found)}",
        "lengths in tokens:",
        histogram.bars(np.array(found.lengths)),
        f"epoch:      {_format_epoch(found)}",
    ]
    if found.paired:
        lines.insert(2, f"pairs:      {_format_pairs(found)}")
    names = ("chosen:  ", "rejected:") if found.paired else ("sample:  ",)
    lines += [f"{names[i % len(names)]}   {text!r}" for i, text in enumerate(found.samples)]
    if found.verified is not None:
        lines.append(f"verified:   all {found.verified:,} documents decode to the source, byte for byte")
    lines += [f"remark:     {text}" for text in found.remarks]
    lines += [f"PROBLEM:    {text}" for text in found.problems] or ["no problem found"]
    return "\n".join(lines)


def _format_mask(found: Inspection) -> str:
    if found.counted is None:
        return "none: every token contributes to the loss"
    return (
        f"{found.counted:,} of {found.tokens:,} tokens contribute to the loss ({found.counted / found.tokens:.1%});"
        f" none in {found.uncounted_documents:,} documents"
    )


def _format_pairs(found: Inspection) -> str:
    pairs = found.documents // 2
    chosen, rejected = (f"{tokens / max(1, pairs):,.0f}" for tokens in found.answers)
    return f"{pairs:,}, with answers of {chosen} tokens (chosen) and {rejected} (rejected) on average"


def _format_epoch(found: Inspection) -> str:
    if found.paired:
        return (
            f"{found.fitting:,} pairs fit --ctx_len {found.ctx_len}. With --micro_bsz {found.micro_bsz} on one device, one pass takes"
            f" {found.steps:,} steps: --epoch_steps {found.steps}"
        )
    if not found.contexts:
        return f"none: {found.tokens:,} tokens are less than one context of {found.ctx_len}"
    prime = (
        f"--magic_prime {found.magic_prime} samples {found.magic_prime:,} of them once each"
        if found.magic_prime
        else "too short for prime sampling"
    )
    return (
        f"{found.contexts:,} contexts of {found.ctx_len:,} tokens. With --micro_bsz {found.micro_bsz} on one device, one pass takes"
        f" {found.steps:,} steps: --epoch_steps {found.steps}. {prime}"
    )


def _scan(data: Dataset, found: Inspection, hashes: np.ndarray, bar: Any) -> None:
    low, high, counted, wrong_mask = math.inf, -math.inf, 0, False
    lengths, uncounted, read = np.zeros(histogram.BINS, np.int64), 0, 0
    answers = [0, 0]
    for first in range(0, len(data), _CHUNK):
        sizes = np.array(data.sizes[first : first + _CHUNK], dtype=np.int64)
        lengths += histogram.count(sizes)
        found.too_long += int((sizes > found.ctx_len + 1).sum())
        found.longest = max(found.longest, int(sizes.max()))
    for i in range(len(data)):
        begin, end = data.span(i)
        digest, counts = hashlib.blake2b(digest_size=8), 0
        for a in range(begin, end, _CHUNK):
            b = min(end, a + _CHUNK)
            ids = np.asarray(data.tokens[a:b])
            digest.update(ids.data)
            low, high = min(low, ids.min()), max(high, ids.max())
            if data.mask is not None:
                mask = np.asarray(data.mask[a:b])
                counts += int(np.count_nonzero(mask))
                wrong_mask = wrong_mask or bool(mask.max() > 1)
            bar.update(b - a)
            read += b - a
            if read > _CHUNK:
                data.release()
                read = 0
        hashes[i] = int.from_bytes(digest.digest(), "little")
        has_eod = end > begin and ids[-1] == EOD
        found.with_eod += int(has_eod)
        found.empty += int(end - begin - has_eod == 0)
        counted, uncounted = counted + counts, uncounted + (counts == 0)
        answers[i % 2] += counts
    found.answers = answers if found.paired else []
    found.smallest_id, found.largest_id, found.lengths = int(low), int(high), lengths.tolist()
    if data.mask is not None:
        found.counted, found.uncounted_documents = counted, uncounted
        if wrong_mask:
            found.problems.append(f"{mask_path(data.prefix)}: contains bytes other than 0 and 1; convert again")


def _fitting_pairs(data: Dataset, ctx_len: int) -> int:
    count, pairs = 0, data.sizes[: len(data) // 2 * 2]
    for first in range(0, len(pairs), 2 * _CHUNK):
        sizes = np.array(pairs[first : first + 2 * _CHUNK]).reshape(-1, 2)
        count += int((sizes.max(1) <= ctx_len + 1).sum())
    return count


def _count_duplicates(hashes: np.ndarray) -> tuple[int, list[list[int]]]:
    """Number of hashes equal to an earlier one, and examples as pairs of document numbers (from 1).

    Works on one partition of the hash values at a time, to bound memory.
    """
    parts = max(1, len(hashes) // _CHUNK)
    repeated, examples = 0, []
    for part in range(parts):
        chosen = [i + np.flatnonzero(hashes[i : i + _CHUNK] % parts == part) for i in range(0, len(hashes), _CHUNK)]
        places = np.concatenate(chosen)
        _, firsts, inverse = np.unique(hashes[places], return_index=True, return_inverse=True)
        again = np.flatnonzero(firsts[inverse] != np.arange(len(places)))
        repeated += len(again)
        examples += [[int(places[firsts[inverse[j]]]) + 1, int(places[j]) + 1] for j in again[:5]]
    return repeated, sorted(examples, key=lambda pair: pair[1])[:5]


def _vocabulary(data: Dataset, found: Inspection) -> str:
    """World, 20B or unknown, inferred from the range of ids, and from whether documents decoded as
    World are valid UTF-8.

    20B documents are not: their line break decodes to an incomplete sequence.
    """
    if found.smallest_id < 0 or found.largest_id > LARGEST_ID:
        return "unknown"
    tokenizer, readable, read = WorldTokenizer(), 0, 0
    for i in _evenly_spaced(len(data), _VOCABULARY_SAMPLES):
        ids = _first_tokens(data, i, 4096)
        if ids:
            read += 1
            text = tokenizer.decode_bytes(ids)
            readable += _is_utf8(text)
            found.crlf += b"\r\n" in text
    found.looked_at = read
    if readable >= 0.9 * read:
        return "World"
    found.crlf = 0
    return "20B" if found.largest_id <= LARGEST_20B else "unknown"


def _manifest(data: Dataset, found: Inspection) -> dict | None:
    try:
        return provenance.load(data)
    except UserError as error:
        found.problems.append(str(error))
        return None


def _is_utf8(text: bytes) -> bool:
    """Whether bytes are valid UTF-8, except that the last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text)
    except UnicodeDecodeError:
        return False
    return True


def _first_tokens(data: Dataset, i: int, length: int) -> list[int]:
    begin, end = data.span(i)
    return data.tokens[begin : min(end, begin + length)].tolist()


def _evenly_spaced(count: int, chosen: int) -> Iterator[int]:
    chosen = min(chosen, count)
    return (offsets.spread(i, chosen, count) for i in range(chosen))


def _find_problems(found: Inspection, data: Dataset) -> None:
    problems, remarks = found.problems, found.remarks
    if found.smallest_id < 0 or found.largest_id >= VOCAB_SIZE:
        wrong = found.smallest_id if found.smallest_id < 0 else found.largest_id
        problems.append(
            f"token id {wrong} is not in any RWKV vocabulary (World has {VOCAB_SIZE}); convert with the model's tokenizer"
        )
    elif found.vocabulary == "unknown":
        problems.append(
            "the ids are neither World's nor 20B's: decoded as either, most documents are not text; convert with the model's tokenizer"
        )
    if found.paired:
        _find_problems_of_pairs(found, data)
    elif found.tokens < found.ctx_len + 2:
        problems.append(
            f"{found.tokens:,} tokens, but one sample of ctx_len {found.ctx_len} needs {found.ctx_len + 2}; use more text or a smaller --ctx_len"
        )
    if found.with_eod < found.documents:
        problems.append(
            f"{found.documents - found.with_eod:,} documents do not end with token {EOD}, so nothing separates them from the next; convert with --append-eod"
        )
    if found.empty:
        problems.append(f"{found.empty:,} documents are empty; remove them from the source")
    if found.counted == 0:
        problems.append(
            f"{mask_path(data.prefix)}: no token contributes to the loss; convert again, or remove it to train on all tokens"
        )
    if found.repeated:
        remarks.append(
            f"{found.repeated / found.documents:.1%} of the documents repeat an earlier one: they are trained on more often, and --val_split may put copies of training documents into the validation set"
        )
    if found.crlf:
        remarks.append(
            f"{found.crlf:,} of {found.looked_at:,} documents sampled have CRLF line endings, which the model will learn to write; convert"
            " txt without --keep_crlf, or replace them in the source"
        )
    if found.too_long and not found.paired:
        remarks.append(
            f"{found.too_long:,} documents are longer than ctx_len {found.ctx_len} + 1: --doc_training would skip them"
        )
    if found.uncounted_documents and not found.paired:
        remarks.append(f"{found.uncounted_documents:,} documents have no token that contributes to the loss")


def _find_problems_of_pairs(found: Inspection, data: Dataset) -> None:
    if found.documents % 2:
        found.problems.append(f"{found.documents:,} documents, but pairs have an even number; convert again")
    if data.mask is None:
        found.problems.append("no loss mask, which marks the answers of the pairs; convert again")
    if found.uncounted_documents:
        found.problems.append(f"{found.uncounted_documents:,} documents have no answer in the loss mask; convert again")
    pairs = found.documents // 2
    if not found.fitting:
        found.problems.append(f"no pair fits --ctx_len {found.ctx_len}; use a larger one")
    elif found.fitting < pairs:
        found.remarks.append(
            f"{pairs - found.fitting:,} of {pairs:,} pairs have a document longer than ctx_len {found.ctx_len} + 1: DPO skips them"
        )
