"""Flags of the conversion to binidx and of the inspection of a binidx."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ConvertConfig:
    """Conversion to binidx."""

    input: str = ""
    """Files, globs and folders, separated by commas: jsonl, json (an array), txt, csv, tsv,
    parquet, arrow, each optionally compressed (.gz, .zst); dataset folders of the datasets library
    and of the Hugging Face Hub; - for stdin, or a pipe, with input_format. Files of a folder are
    read in natural order: ch2 before ch10, 第二章 before 第十章."""
    input_format: Literal["", "jsonl", "json", "txt", "csv", "tsv", "parquet", "arrow"] = ""
    """Format of the input if the file name does not determine it, such as for a pipe.
    Compression is detected."""
    split: str = ""
    """Splits of a dataset to convert, separated by commas: train, validation, test or other names;
    or all. Omitted: train."""
    encoding: str = ""
    """Encoding of text files that are not UTF-8, such as gb18030 (also for GBK), big5, shift_jis,
    utf-16. UTF-8 files are read as UTF-8 in any case."""
    max_record_mb: int = 1024
    """Largest record (line, element, row, text file) in MiB; a larger one is an error. Converting a
    record takes several times its size in memory."""
    output_prefix: str = ""
    """P of P_text_document.bin and .idx. Omitted: the input without its file extension."""
    jsonl_keys: str = "text"
    """Key or column of the text. With several keys, separated by commas, each is written to its own
    binidx. (Upstream's tool always uses "text".)"""
    append_eod: bool = True
    """End every document with the tokenizer's end-of-document token, as training expects.
    (Upstream's tool does so only with --append-eod.)"""
    dtype: Literal["uint16", "int32"] = "uint16"
    """uint16 can represent all ids of World and 20B; int32 writes the same bytes as
    upstream's tool for World, at twice the size."""
    tokenizer_type: Literal["RWKVTokenizer", "HFTokenizer"] = "RWKVTokenizer"
    """RWKVTokenizer: the World vocabulary of 65536 tokens. HFTokenizer: the tokenizer.json given as
    vocab_file, such as 20B_tokenizer.json."""
    vocab_file: str = ""
    """tokenizer.json for HFTokenizer (upstream's spelling: vocab). The World vocabulary is built
    in.
    """
    split_lines: bool = False
    """Convert every line of a txt file to a document. By default the file is one document, which
    must fit into memory."""
    keep_crlf: bool = False
    r"""Keep Windows line ends (\r\n) in txt files. By default they are converted to \n."""
    ftfy: bool = False
    """Repair broken Unicode (mojibake) with the ftfy library before tokenising."""
    format: Literal[
        "auto",
        "text",
        "messages",
        "moss",
        "preference",
        "alpaca",
        "dolly",
        "firefly",
        "prompt_completion",
        "prompt_response",
        "query_response",
        "question_answer",
    ] = "auto"
    """Format of the records. auto: detected from the keys of the first records. text: only the text
    under jsonl_keys. messages: conversations, as lists of {role, content} or {from, value}.
    preference: prompt, chosen and rejected, as for DPO (scripts/dpo.py); every record becomes two
    documents. alpaca (also BELLE): instruction, input, output. The others have the keys in their
    name."""
    chat_template: str = ""
    """Template that turns conversations into text: world ("User: …", blank line, "Assistant: …";
    blank lines inside a message become line breaks), g1 (for RWKV-7 G1 models: answers begin with
    the thoughts in the data, "Assistant: <think>…</think>", the last answer with empty ones if it
    has none), chatml, or a Jinja file. A loss mask is written to P_text_mask.bin. Default for
    conversations: world, or chatml for HFTokenizer."""
    mask: Literal["auto", "answers", "none"] = "auto"
    """Tokens that contribute to the loss. auto: the answers of conversations, and all of plain
    text. answers: only answers, also in plain text, where they follow "Assistant:", "Answer:",
    "Response:" or similar at the start of a line. none: all tokens; no mask is written."""
    on_error: Literal["stop", "skip"] = "stop"
    """stop: an invalid record ends the conversion, and no output is written. skip: invalid records
    are counted and written to P.rejects.jsonl. A corrupt or truncated file always ends it."""
    workers: int = 0
    """Number of processes for tokenisation; the output does not depend on it. 0: one per core."""
    ray: str = ""
    """Convert on a Ray cluster (make ray). auto: the cluster that this machine is a node of,
    or RAY_ADDRESS; HOST:PORT: the address of its head node; local: start one on this machine. This
    machine reads the input and writes the output; the nodes need no shared file system, but the
    same Python and packages. The output is the same as without, also if a worker or node is
    lost."""
    shard: str = ""
    """i/n, from 0/n to n-1/n: convert only part i of n, to divide the work among machines; input
    and output_prefix must be the same for all parts. jsonl, split lines, parquet and arrow files
    are divided among the parts, other files are not."""
    merge: bool = False
    """Join the finished parts of output_prefix; the result equals a conversion in one part."""
    force: bool = False
    """Replace existing output."""


@dataclass
class InspectConfig:
    """Inspection of a binidx before training."""

    data_file: str = ""
    """Prefix P of the binidx (P.bin and P.idx). Its loss mask, if any, is inspected too."""
    ctx_len: int = 1024
    """Context length in tokens; used to compute epoch size and to flag over-long documents."""
    micro_bsz: int = 12
    """Samples per batch; used to compute epoch size."""
    verify: str = ""
    """The source that was converted (the converter's input): check that every document decodes to
    its source, byte for byte."""
    jsonl_keys: str = "text"
    """verify: key of the text in the source. This and the following flags are only needed if the
    binidx has no manifest, which stores them."""
    split_lines: bool = False
    """verify: every line of a txt file was converted to a document."""
    ftfy: bool = False
    """verify: broken Unicode was repaired."""
    format: str = "auto"
    """verify: format of the source's records, the value of the conversion's --format."""
    chat_template: str = ""
    """verify: template of the conversations, the value of the conversion's --chat_template."""
    mask: str = "auto"
    """verify: which tokens contribute to the loss, the value of the conversion's --mask."""
    on_error: Literal["stop", "skip"] = "stop"
    """verify: skip, if invalid records were skipped in the conversion."""
    vocab_file: str = ""
    """The tokenizer.json used in the conversion. Omitted: from the manifest, else World."""
    samples: int = 3
    """Number of documents to print as text, evenly spaced (World, or with vocab_file)."""
    png: str = ""
    """File for a histogram of document lengths. Omitted: P_lengths.png."""
    json: bool = False
    """Print the findings as JSON."""
