"""Fetch a model: find it here or on the hub, download, verify, and record where it came from."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from rwkv import checkpoint
from rwkv.config import FetchConfig
from rwkv.errors import UserError, printable
from rwkv.files import sha256, write_json
from rwkv.hub import known, remote
from rwkv.locks import exclusive
from rwkv.models.version import version_of
from rwkv.weights import manifest


def fetch(config: FetchConfig) -> Path:
    """Fetch a model into a folder, unless it is there. Prints progress.

    The download is `.NAME.SHA256.part` until its SHA-256 is verified; then it is renamed, so that
    it takes its size on disk once.

    Returns:
        the model's path; for a known model, a link that names it without its date.

    Raises:
        UserError: unknown model, no network, not enough disk space, wrong SHA-256 (see
            rwkv.hub.remote).
    """
    wanted, folder = known.source_of(config.model, config.revision), Path(config.output)
    if not (config.newest or config.force) and (path := _local(wanted, folder)):
        how = (
            "" if _source(path) else "; not verified, as no manifest says where it is from (--newest true compares it)"
        )
        print(printable(f"{wanted.words}: {path} is here{how}"))
        return _linked(path, wanted)
    found = remote.repository(wanted.repo, wanted.revision)
    name = wanted.newest(found.files)
    if name is None:
        there = [name for name in found.files if name.endswith(known.SUFFIXES)]
        listed = f"; it has {', '.join(sorted(there)[:12])}" if there else "; it has no .pth or .safetensors file"
        raise UserError(f"--model {wanted.words}: no such file in {remote.endpoint()}/{wanted.repo}{listed}")
    file, target = remote.with_sha256(found, found.files[name]), folder / Path(name).name
    print(printable(f"{wanted.words}: {name}, {file.size / 1e9:.2f} GB, of {found.name} at {remote.endpoint()}"))
    print(f"revision: {found.commit}", flush=True)
    with exclusive(folder / f".{target.name}.lock", target):
        _download(found, file, target, config.force)
    return _linked(target, wanted)


def _local(wanted: known.Source, folder: Path) -> Path | None:
    """The newest complete file in the folder that matches, unless it is from another repository or
    revision.
    """
    paths: dict[str, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        ours = path.is_symlink() and path.resolve().parent == folder.resolve()  # see _linked
        if path.name.endswith(known.SUFFIXES) and path.is_file() and not ours:
            source = _source(path)
            if source.get("size", path.stat().st_size) != path.stat().st_size:
                continue  # changed or truncated since
            repo = source.get("repo", wanted.repo if wanted.official else "")
            revisions = ("", source.get("revision"), source.get("asked_revision"))
            if repo == wanted.repo and wanted.revision in revisions:
                paths[str(source.get("file", path.name))] = path
    name = wanted.newest(paths)
    return paths[name] if name else None


def _source(path: Path) -> dict[str, Any]:
    """Where a model is from, by its manifest; empty if unknown."""
    try:
        source = manifest.read(path).get("source")
    except UserError:
        return {}
    return source if isinstance(source, dict) else {}


def _download(found: remote.Repository, file: remote.RemoteFile, target: Path, force: bool) -> None:
    """Download and verify `target`, unless it is there with this SHA-256."""
    if target.exists() and not force:
        if target.stat().st_size == file.size and sha256(target) == file.sha256:
            print(printable(f"{target} is here, and its SHA-256 is that of the hub"))
            return _record(found, file, target)
        raise UserError(
            f"{target} exists and differs from {found.name}/{file.path}: pass --force true to replace it, or another --output"
        )
    partial = target.with_name(f".{target.name}.{file.sha256[:16]}.part")
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    begun = partial.stat().st_size if partial.exists() else 0
    free = shutil.disk_usage(target.parent).free
    if free < file.size - begun:
        raise UserError(
            f"{target.parent}: {(file.size - begun) / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; free some"
            " space, or pass --output FOLDER on another disk"
        )
    if begun:
        print(f"continuing at {begun / 1e9:.2f} GB", flush=True)
    try:
        remote.download(found, file, partial)
    except KeyboardInterrupt:
        print(f"\nstopped; run the same command again to continue, or delete {partial}")
        raise
    if (actual := sha256(partial)) != file.sha256:
        partial.unlink()
        raise UserError(
            f"{found.name}/{file.path}: the download is corrupt and was deleted: its SHA-256 is {actual}, expected"
            f" {file.sha256}. Run the same command again; if it happens again, check the proxy or the mirror"
        )
    manifest.path_of(target).unlink(missing_ok=True)
    os.replace(partial, target)
    print(f"verified: SHA-256 {file.sha256}")
    _record(found, file, target)
    for stale in target.parent.glob(f".{target.name}.*.part"):  # of earlier versions of the file
        stale.unlink()


def _record(found: remote.Repository, file: remote.RemoteFile, target: Path) -> None:
    """Write the model's manifest: what it is, and where it is from."""
    source = {"repo": found.name, "file": file.path, "revision": found.commit, "asked_revision": found.revision}
    verified = {"sha256": file.sha256, "size": file.size}
    described: dict[str, Any] = {}
    try:
        tensors = checkpoint.read_tensors(target)
        sizes = checkpoint.sizes_of(tensors, target)
        checkpoint.check_shapes(tensors, sizes, target)
        described = {"kind": "model", "version": version_of(sizes).NAME, "sizes": vars(sizes)}
        print(f"model:    RWKV-{version_of(sizes).NAME}, L{sizes.n_layer} D{sizes.n_embd} V{sizes.vocab_size}")
    except UserError as error:
        print(f"warning: it cannot be trained here: {error}")
    write_json(manifest.path_of(target), {**described, "source": {**source, **verified}})


def _linked(path: Path, wanted: known.Source) -> Path:
    """Link the file and its manifest under the model's name; returns the link. If the file system
    has no links, the file itself.
    """
    link = path.with_name(wanted.link or path.name)
    if link == path or (os.path.lexists(link) and not link.is_symlink()):
        return path
    try:
        for new, old in ((manifest.path_of(link), manifest.path_of(path)), (link, path)):
            temporary = new.with_name(f".{new.name}.link")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(re.sub(r"^.*/", "", str(old)))
            os.replace(temporary, new)
    except OSError:
        return path
    return link
