"""Shards of a conversion on several machines: their names, manifests and merging."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv.config import ConvertConfig
from rwkv.data import binidx, binidx_writer, provenance
from rwkv.data.convert import report
from rwkv.data.convert.source_file import Source
from rwkv.errors import UserError


def parse(shard: str) -> tuple[int, int] | None:
    """Parse `i/n`, with i from 0, to (i, n); None for an empty string. Raises UserError."""
    if not shard:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"--shard {shard}: expected i/n with i from 0 to n - 1, such as 0/4")
    return int(match[1]), int(match[2])


def prefix(output_prefix: str, shard: tuple[int, int] | None) -> str:
    """Output prefix of a shard: `P.00000-of-00004`."""
    return f"{output_prefix}.{shard[0]:05d}-of-{shard[1]:05d}" if shard else output_prefix


def keys(jsonl_keys: str) -> list[str]:
    """The different keys of a comma-separated list. Raises UserError if there are none."""
    found = list(dict.fromkeys(key.strip() for key in jsonl_keys.split(",") if key.strip()))
    if not found:
        raise UserError("--jsonl-keys is empty: pass the key or column of the text, such as text, or omit the flag")
    return found


def manifest_path(shard_prefix: str) -> Path:
    """Path of a shard's manifest."""
    return Path(f"{shard_prefix}.shard")


def manifest(config: ConvertConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """What all shards of a conversion must have in common: flags, and names and sizes of the
    inputs.
    """
    return {"flags": provenance.flags_of(config), "inputs": [[source.path.name, source.size] for source in sources]}


def merge(output_prefix: str, force: bool) -> list[tuple[str, int, int]]:
    """Merge finished shards into the files that a single run would have written. The shards are
    kept.

    Returns:
        (prefix, documents, tokens) of each pair of files.

    Raises:
        UserError: no shards, a missing one, shards of different conversions, or existing output
            without `force`.
    """
    folder, name = Path(output_prefix).parent, Path(output_prefix).name
    pattern = re.compile(re.escape(name) + r"\.(\d{5})-of-(\d{5})\.shard")
    found = sorted(
        (int(match[2]), int(match[1])) for path in folder.glob("*.shard") if (match := pattern.fullmatch(path.name))
    )
    if not found:
        raise UserError(
            f"{output_prefix}: no finished shards; create them with --shard 0/n, --shard 1/n, … and the same --output-prefix"
        )
    if len({count for count, _ in found}) > 1:
        raise UserError(
            f"{output_prefix}: shards of {' and of '.join(str(n) for n in sorted({n for n, _ in found}))} are mixed; remove the old ones"
        )
    count = found[0][0]
    if missing := sorted(set(range(count)) - {i for _, i in found}):
        raise UserError(
            f"{output_prefix}: shard {', '.join(f'{i}/{count}' for i in missing)} is missing; run it with --shard, then merge again"
        )
    parts = [prefix(output_prefix, (i, count)) for i in range(count)]
    manifests = [_read(manifest_path(part)) for part in parts]
    for part, other in zip(parts, manifests, strict=True):
        if other != manifests[0]:
            what = "other flags" if other["flags"] != manifests[0]["flags"] else "other inputs"
            raise UserError(f"{part}: was created with {what} than {parts[0]}; run it again")
    names = keys(manifests[0]["flags"]["jsonl_keys"])
    masked = binidx.mask_path(binidx.document_prefix(parts[0], names[0])).is_file()
    rejects = Path(f"{output_prefix}.rejects.jsonl")
    prefixes = [binidx.document_prefix(output_prefix, key) for key in names]
    with binidx_writer.exclusive(output_prefix, prefixes):
        return _merge(parts, manifests[0]["flags"]["dtype"], names, prefixes, masked, rejects, force)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if (
            isinstance(found["flags"]["jsonl_keys"], str)
            and found["flags"]["dtype"] in ("uint16", "int32")
            and "inputs" in found
        ):
            return found
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: is corrupt; run this shard again")


def _merge(
    parts: Sequence[str],
    dtype: str,
    names: Sequence[str],
    prefixes: Sequence[str],
    masked: bool,
    rejects: Path,
    force: bool,
) -> list[tuple[str, int, int]]:
    if not force:
        binidx_writer.reject_existing(prefixes, [rejects])
    with binidx_writer.writers(prefixes, dtype, masked, [rejects]) as (out, (rejected,)):
        for key, writer in zip(names, out, strict=True):
            for part in parts:
                writer.add_file(binidx.document_prefix(part, key))
            described = [provenance.read(binidx.document_prefix(part, key)) for part in parts]
            if described[0]:  # older shards have none
                contents = report.add_summaries([other.get("contents") for other in described if other])
                provenance.write(
                    writer.manifest,
                    {**described[0], "contents": contents},
                    writer.documents,
                    writer.tokens,
                    writer.counted,
                )
        with open(rejected, "wb") as target:
            for part in parts:
                if (path := Path(f"{part}.rejects.jsonl")).is_file():
                    with open(path, "rb") as file:
                        shutil.copyfileobj(file, target)
        if not rejected.stat().st_size:
            rejected.unlink()
    return [(path, writer.documents, writer.tokens) for path, writer in zip(prefixes, out, strict=True)]
