"""The Hugging Face Hub, or a mirror: the files of a repository, and a download that resumes."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rwkv.errors import UserError
from rwkv.files import disk_errors

HUB = "https://huggingface.co"
MIRROR = "https://hf-mirror.com"
_TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        path: in the repository.
        size: in bytes.
        sha256: of its content; empty if the hub does not state it (files outside Git LFS).
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Repository:
    """A repository at a commit.

    Attributes:
        name: owner/repo.
        revision: what was asked for: a branch, tag or commit; empty: the default branch.
        commit: its hash.
        files: by path.
    """

    name: str
    revision: str
    commit: str
    files: dict[str, RemoteFile]


def endpoint() -> str:
    """The URL of the hub: HF_ENDPOINT, else huggingface.co. Raises UserError if it is not a URL."""
    url = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    if not urlsplit(url).netloc or urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"HF_ENDPOINT={url}: not a URL; for the mirror set HF_ENDPOINT={MIRROR}")
    return url


def _token() -> str | bool | None:
    """The access token: HF_TOKEN, else None, the one stored on this machine; False for a mirror,
    which does not get that one.
    """
    return os.environ.get("HF_TOKEN") or (None if endpoint() == HUB else False)


def repository(name: str, revision: str = "") -> Repository:
    """Look up a repository. Raises UserError if that fails."""
    from huggingface_hub import HfApi

    with hub_errors(name, revision):
        api = HfApi(endpoint=endpoint(), token=_token())
        found = api.model_info(name, revision=revision or None, files_metadata=True, timeout=_TIMEOUT)
        files = [RemoteFile(x.rfilename, x.size or 0, x.lfs.sha256 if x.lfs else "") for x in found.siblings or ()]
        return Repository(name, revision, found.sha or "main", {file.path: file for file in files})


def with_sha256(found: Repository, file: RemoteFile) -> RemoteFile:
    """The file with its SHA-256, which is asked for if the listing lacks it, as those of some
    mirrors do. Raises UserError if the hub does not state it: the file is not in Git LFS.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if file.sha256:
        return file
    with hub_errors(found.name, found.commit):
        url = hf_hub_url(found.name, file.path, revision=found.commit, endpoint=endpoint())
        stated = get_hf_file_metadata(url, token=_token(), timeout=_TIMEOUT)
    if not re.fullmatch("[0-9a-f]{64}", stated.etag or "") or not stated.size:
        raise UserError(
            f"{found.name}/{file.path}: {endpoint()} states no SHA-256 for it (it is not in Git LFS), so it cannot be a model"
        )
    return RemoteFile(file.path, stated.size, str(stated.etag))


def download(found: Repository, file: RemoteFile, partial: Path) -> None:
    """Download a file to `partial`, continuing what is there.

    huggingface_hub's own hf_hub_download is not used: since version 1 it deletes what was
    downloaded when it is interrupted. Its function http_get retries, and follows redirects to the
    content servers without the access token.

    Raises:
        UserError: the connection failed, or the disk is full; `partial` is kept.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(found.name, file.path, revision=found.commit, endpoint=endpoint())
    with open(partial, "ab") as out:
        begun = out.tell()
        outcome = f"What was downloaded is kept in {partial} and continued"
        with hub_errors(found.name, found.commit, f"{file.path}: "), disk_errors(partial, outcome):
            http_get(
                url,
                out,
                resume_size=begun,
                headers=build_hf_headers(token=_token()),
                expected_size=file.size,
                displayed_filename=Path(file.path).name,
            )
            out.flush()
            os.fsync(out.fileno())


@contextlib.contextmanager
def hub_errors(repo: str, revision: str, what: str = "") -> Iterator[None]:
    """Convert errors of huggingface_hub into UserErrors that say what to do; `what` begins the
    messages of a download.
    """
    from huggingface_hub import errors

    # its base is requests.HTTPError (an OSError), since version 1 httpx's HTTPError
    bases: tuple[Any, ...] = errors.HfHubHTTPError.__mro__
    http_error = next(base for base in bases if base.__name__ == "HTTPError")
    again = "; run the same command again to continue the download" if what else ""
    page = f"{endpoint()}/{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{what}{repo} is gated: accept its conditions at {HUB}/{repo}, and pass your access token as HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{what}{page}: no such repository, or a private one; check the name, or pass an access token as HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what}{page}: no such revision: {revision}; omit --revision for the newest") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"{what}{page}: HF_HUB_OFFLINE is set, so nothing is downloaded; unset it") from error
    except errors.HFValidationError as error:
        raise UserError(f"{repo}: not the name of a repository, such as BlinkDL/rwkv7-g1") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            advice = "access is denied; check the access token (HF_TOKEN), or unset it: official models need none"
        elif status == 404:
            advice = "no such file"
        elif status == 429:
            advice = "too many requests; wait a few minutes"
        else:
            advice = f"the server has a problem; try again later, or a mirror: HF_ENDPOINT={MIRROR}"
        raise UserError(f"{what}{page} answered {status}: {advice}{again}") from error
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{endpoint()} did not answer as a Hugging Face hub does ({type(error).__name__}); check HF_ENDPOINT, a"
            f" proxy or a login page of the network. The mirror: HF_ENDPOINT={MIRROR}"
        ) from error
    except (OSError, http_error) as error:
        local = isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError)
        if local:
            raise
        cause: BaseException = error
        while cause.__context__ is not None:  # the original error has the reason
            cause = cause.__context__
        reason = " ".join(str(cause).split())[:160] or type(cause).__name__
        raise UserError(
            f"{what}{endpoint()} cannot be reached ({reason}); check the network and HTTPS_PROXY. Where it is blocked,"
            f" use a mirror: HF_ENDPOINT={MIRROR} make model ...{again}"
        ) from error
