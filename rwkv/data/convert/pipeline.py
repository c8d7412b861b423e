"""Convert files of documents to binidx, in parallel, in order, and written atomically."""

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rwkv.config import ConvertConfig
from rwkv.data import binidx, binidx_writer, provenance
from rwkv.data.convert import encodings, inputs, report, schemas, shards, sources
from rwkv.data.convert.detection import template_for
from rwkv.data.convert.encode import Encoder
from rwkv.data.convert.inputs import Chunk
from rwkv.data.convert.jsonl import BadRecord
from rwkv.data.convert.pool import Pool
from rwkv.data.convert.ray_pool import RayPool
from rwkv.data.convert.source_file import Source
from rwkv.data.progress_bar import progress_bar
from rwkv.data.tokenizer import HFTokenizer, WorldTokenizer, same_vocabulary
from rwkv.errors import UserError

_MAX_WORKERS = 1024  # more would exhaust memory and process ids
_WORLD = "rwkv_vocab_v20230424.txt"


@dataclass(frozen=True)
class Converted:
    """Result of a conversion.

    Attributes:
        pairs: (prefix, documents, tokens) of each pair of files.
        masked: whether loss masks were written.
        rejects: number of bad records, which were skipped and written to rejects_file.
        counts: statistics, see rwkv.data.convert.report.
        values: the value of the field `by` for each document.
    """

    pairs: list[tuple[str, int, int]]
    masked: bool
    rejects: int
    rejects_file: Path
    counts: Counter = field(default_factory=Counter)
    values: list[str] = field(default_factory=list)

    @property
    def report(self) -> list[str]:
        """Report lines: roles, tokens that contribute to the loss, skipped records, warnings."""
        documents, tokens = sum(pair[1] for pair in self.pairs), sum(pair[2] for pair in self.pairs)
        return report.lines(self.counts, documents, tokens, self.masked)


def convert(config: ConvertConfig, by: str = "") -> Converted:
    """Tokenise the input files into `P_<key>_document.bin` and `.idx` for each key, with
    `P_<key>_mask.bin` for chats.

    The output does not depend on the number of workers.

    Args:
        by: a field of the records; its values are returned. A record without it is a bad record.

    Raises:
        UserError: a bad record (with file and number), a corrupt file, existing output without
            `force`, a full disk. Nothing is written.
    """
    found = find(config)
    keys = shards.keys(config.jsonl_keys)
    shard = shards.parse(config.shard)
    prefix = shards.prefix(config.output_prefix or default_prefix(config.input, found.sources), shard)
    with (
        binidx_writer.exclusive(prefix, [binidx.document_prefix(prefix, key) for key in keys]),
        _explain_errors(found.sources),
    ):
        return _convert(config, found, keys, shard, prefix, by)


def find(config: ConvertConfig) -> sources.Found:
    """The input files of a conversion. Raises UserError if there are none, or a flag about them is
    invalid.
    """
    if not config.input.strip():
        raise UserError("--input is missing: one or more files, globs or folders, separated by commas")
    for name, low, high in (("max_record_mb", 1, 1 << 30), ("workers", 0, _MAX_WORKERS)):
        if not low <= (value := getattr(config, name)) <= high:
            raise UserError(f"--{name} {value}: must be from {low} to {high:,}")
    found = sources.find(config.input, config.split_lines, config.split, config.encoding, config.input_format)
    if not found.sources:
        raise UserError(f"--input {config.input}: no such file")
    found.sources = [
        replace(source, keep_crlf=config.keep_crlf, max_record=config.max_record_mb << 20) for source in found.sources
    ]
    return found


@contextlib.contextmanager
def _explain_errors(source_list: Sequence[Source]) -> Iterator[None]:
    """Explain errors of a conversion where possible: a file changed meanwhile, or its encoding is
    not UTF-8.
    """
    try:
        yield
    except Exception as error:
        sources.check_unchanged(source_list)
        message = str(error)
        failed = next(
            (source for source in source_list if message.startswith((f"{source.path}, ", f"{source.path}:"))), None
        )
        if failed and ": not UTF-8 (" in message:
            raise UserError(message + encodings.advice(failed, source_list)) from error
        raise


def _convert(
    config: ConvertConfig,
    found: sources.Found,
    keys: Sequence[str],
    shard: tuple[int, int] | None,
    prefix: str,
    by: str,
) -> Converted:
    encoder = replace(_encoder(config, found.sources, keys), by=by)
    tokenizer = encoder.tokenizer
    if config.dtype == "uint16" and tokenizer.vocab_size > 1 << 16:
        raise UserError(f"{tokenizer.name} has {tokenizer.vocab_size} tokens, too many for uint16; pass --dtype int32")
    prefixes = [binidx.document_prefix(prefix, key) for key in keys]
    rejects_path = Path(f"{prefix}.rejects.jsonl")
    outputs = [Path(f"{name}{end}") for name in prefixes for end in (".bin", ".idx", ".json")] + [rejects_path]
    existing = [os.stat(path) for path in outputs if path.exists()]
    if same := next(
        (
            source.path
            for source in found.sources
            if existing and any(os.path.samestat(os.stat(source.stored), x) for x in existing)
        ),
        None,
    ):
        raise UserError(f"{same}: the conversion would overwrite its own input; use another --output-prefix")
    beside = [rejects_path, *([shards.manifest_path(prefix)] if shard else [])]
    if not config.force:
        binidx_writer.reject_existing(prefixes, beside)

    for note in found.notes:
        print(note, file=sys.stderr, flush=True)
    workers = config.workers or len(os.sched_getaffinity(0))
    fields = list(dict.fromkeys([*keys, *(schemas.FIELDS if encoder.template else ()), *([by] if by else [])]))
    locations = _Locations()
    count = 0
    counts: Counter = Counter()
    values: list[str] = []
    with (
        # an error that is kept would keep its file open, and csv's limit of a field changed
        contextlib.closing(inputs.chunks(found.sources, fields, shard or (0, 1))) as feed,
        RayPool(encoder, config.ray, keys, config.workers) if config.ray else Pool(encoder, workers) as pool,
        binidx_writer.writers(prefixes, config.dtype, encoder.masked, beside) as (out, (rejects, *manifest)),
        progress_bar(_bytes(found.sources, shard), "convert", "B") as bar,
    ):
        # backslashreplace turns lone surrogates into JSON escapes
        with open(rejects, "w", encoding="utf-8", errors="backslashreplace") as rejected:
            for chunk, encoded in pool.map(feed):
                for number, wrong, record in encoded.rejects:
                    place = locations.of(chunk, number)
                    if encoder.stop:
                        raise UserError(f"{place}: {wrong}{_remedy(wrong)}")
                    line = {"place": place, "error": wrong, "record": record}
                    rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
                    count += 1
                locations.passed(chunk, encoded.lines)
                counts.update(encoded.counts)
                values += encoded.values
                for output, *parts in zip(out, encoded.tokens, encoded.sizes, encoded.masks, strict=True):
                    output.add_packed(*parts)
                bar.update(chunk.size)
                bar.set_postfix_str(
                    f"{out[0].documents:,} documents, {sum(output.tokens for output in out):,} tokens", refresh=False
                )
        pairs = [(name, output.documents, output.tokens) for name, output in zip(prefixes, out, strict=True)]
        if not shard and (empty := [key for key, pair in zip(keys, pairs, strict=True) if not pair[1]]):
            skipped = f" that can be read: {count} bad records were skipped" if count else ""
            blank = "".join(f". Skipped {key[1]}: {number}" for key, number in counts.items() if key[0] == "skipped")
            raise UserError(
                f'{config.input}: contains no document{skipped}. Expected records such as {{"{empty[0]}": "..."}}, or another key with --jsonl-keys{blank}'
            )
        if (
            config.mask == "answers"
            and not shard
            and not counts["role", "assistant"]
            and counts["plain", ""] == sum(pair[1] for pair in pairs)
        ):
            raise UserError(
                f"--mask answers: no document of {config.input} has turns such as User: and Assistant:; omit the flag"
            )
        if not count:
            rejects.unlink()
        tokenizer_entry = provenance.tokenizer_of(tokenizer, config.vocab_file)
        described = provenance.describe(
            tokenizer_entry, found.sources, provenance.flags_of(config), sources.splits_of(found)
        )
        sources.check_unchanged(found.sources)
        for key, output in zip(keys, out, strict=True):
            provenance.write(
                output.manifest,
                {**described, "key": key, "paired": encoder.paired, "contents": report.summary(counts)},
                output.documents,
                output.tokens,
                output.counted,
            )
        if shard:
            manifest[0].write_text(
                json.dumps(shards.manifest(config, found.sources), indent=2) + "\n", encoding="utf-8"
            )
    return Converted(pairs, encoder.masked, count, rejects_path, counts, values)


def texts(config: ConvertConfig) -> tuple[Iterator[tuple[str, int]], int]:
    """The documents that `convert` would tokenise for the first key, for verification.

    Returns:
        An iterator over (document, input bytes read so far), and the total number of input bytes.

    Raises:
        UserError: as `convert`; while iterating, for a bad record unless they are skipped.
    """
    source_list, keys = find(config).sources, shards.keys(config.jsonl_keys)[:1]
    encoder = _encoder(config, source_list, keys)

    def read() -> Iterator[tuple[str, int]]:
        done, locations = 0, _Locations()
        for chunk in inputs.chunks(source_list, [*keys, *(schemas.FIELDS if encoder.template else ())]):
            done, lines = done + chunk.size, inputs.lines_of(chunk)
            for number, record in inputs.records(chunk, lines, keys):
                try:
                    if isinstance(record, BadRecord):
                        raise record
                    documents = encoder.documents(record, keys[0])
                except BadRecord as error:
                    if encoder.stop:
                        raise UserError(f"{locations.of(chunk, number)}: {error}{_remedy(str(error))}") from error
                    continue
                for segments in documents:
                    yield "".join(text for text, _ in segments), done
            locations.passed(chunk, len(lines))

    return read(), sum(source.size for source in source_list)


def _remedy(wrong: str) -> str:
    """What to do about an invalid record, to append to its error."""
    if wrong.startswith("not UTF-8"):
        return ""  # _explain_errors appends the likely encoding
    return ". Correct this record, or skip it: scripts/convert.py --on_error skip"


def default_prefix(spec: str, source_list: Sequence[Source]) -> str:
    """Default output prefix: the input folder, or the first file without its suffixes. Raises
    UserError for a pipe.
    """
    first = Path(os.path.expanduser(sources.split_paths(spec)[0]))
    path = first if first.exists() else source_list[0].path
    if path.is_dir():
        return str(path if path.name else path.resolve())
    if source_list[0].spool:
        raise UserError(f"{path}: the input is a pipe, so there is no default for the output; pass --output_prefix")
    while path.suffix.lower() in sources.SUFFIXES:
        path = path.with_suffix("")
    return str(path)


def _encoder(config: ConvertConfig, source_list: Sequence[Source], keys: Sequence[str]) -> Encoder:
    (template, kind), stop = template_for(config, source_list, keys), config.on_error == "stop"
    return Encoder(
        _tokenizer(config),
        keys,
        config.dtype,
        config.append_eod,
        config.ftfy,
        template,
        stop,
        kind,
        config.mask,
    )


def _tokenizer(config: ConvertConfig) -> WorldTokenizer | HFTokenizer:
    if config.tokenizer_type == "HFTokenizer":
        return HFTokenizer(config.vocab_file)
    if config.vocab_file and not (
        same_vocabulary(config.vocab_file)
        if Path(config.vocab_file).is_file()
        else Path(config.vocab_file).name == _WORLD
    ):
        raise UserError(
            f"{config.vocab_file}: not the World vocabulary, which is built in and need not be given;"
            " for a tokenizer.json pass --tokenizer_type HFTokenizer"
        )
    return WorldTokenizer()


def _bytes(source_list: Sequence[Source], shard: tuple[int, int] | None) -> int:
    total = sum(source.size for source in source_list)
    return total if shard is None else total * (shard[0] + 1) // shard[1] - total * shard[0] // shard[1]


class _Locations:
    """Locations of records for messages; counts the lines of the chunks processed so far."""

    def __init__(self):
        self._source: Source | None = None
        self._start, self._lines = 0, 0

    def of(self, chunk: Chunk, number: int) -> str:
        self._enter(chunk)
        return inputs.place(chunk, number, lambda: inputs.count_lines(chunk.source.stored, self._start) + self._lines)

    def passed(self, chunk: Chunk, lines: int) -> None:
        self._enter(chunk)
        self._lines += lines

    def _enter(self, chunk: Chunk) -> None:
        if chunk.source is not self._source:  # a shard may begin inside a file
            self._source, self._lines, self._start = chunk.source, 0, chunk.span[0] if chunk.span else 0
