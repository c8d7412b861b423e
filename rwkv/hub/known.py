"""The official models by name: repository, file names, sizes; and what a user's words refer to."""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

from rwkv.columns import columns
from rwkv.errors import UserError
from rwkv.memory.estimate import estimate
from rwkv.memory.parts import total
from rwkv.memory.plan import Plan
from rwkv.models import Sizes
from rwkv.models.version import VERSIONS

SUFFIXES = (".pth", ".safetensors")


@dataclass(frozen=True)
class Family:
    """The models of one official repository.

    Attributes:
        name: a model's name is NAME-SIZE, such as rwkv7-g1-0.1b.
        repo: the repository on the hub.
        version: the RWKV version.
        begin: how the repository's file names begin.
        files: regular expression of the file names; {} is the size as written there, the group the
            date.
        sizes: the size in file names, by the size's name in the version's PUBLISHED.
        vocab_size: of all its models.
    """

    name: str
    repo: str
    version: str
    begin: str
    files: str
    sizes: dict[str, str]
    vocab_size: int = 65536


FAMILIES = (
    Family(
        "rwkv7-g1", "BlinkDL/rwkv7-g1", "7", "rwkv7-g", r"rwkv7-g1[a-z]?\d*-{}-(\d{{8}})-ctx\d+\.pth",
        {size: size for size in ("0.1b", "0.4b", "1.5b", "2.9b", "7.2b", "13.3b")},
    ),
    Family(
        "rwkv7-world", "BlinkDL/rwkv-7-world", "7", "RWKV-x070-World-", r"RWKV-x070-World-{}-v[\d.]+-(\d{{8}})-ctx\d+\.pth",
        {size: size.upper() for size in ("0.1b", "0.4b", "1.5b", "2.9b")},
    ),
    Family(
        "rwkv7-pile", "BlinkDL/rwkv-7-pile", "7", "RWKV-x070-Pile-", r"RWKV-x070-Pile-{}-(\d{{8}})-ctx\d+\.pth",
        {"0.1b": "168M", "0.4b": "421M", "1.5b": "1.47B"}, vocab_size=50304,
    ),
    Family(
        "rwkv6-world", "BlinkDL/rwkv-6-world", "6", "RWKV-x060-World-", r"RWKV-x060-World-{}-v[\d.]+-(\d{{8}})-ctx\d+\.pth",
        {"1.6b": "1B6", "3b": "3B", "7b": "7B", "14b": "14B"},
    ),
    Family(  # v1 files are RWKV-5.0 and 5.1
        "rwkv5-world", "BlinkDL/rwkv-5-world", "5.2", "RWKV-5-World-", r"RWKV-5-World-{}-v2-(\d{{8}})-ctx\d+\.pth",
        {"0.4b": "0.4B", "1.5b": "1B5", "3b": "3B", "7b": "7B"},
    ),
    Family(
        "rwkv4-world", "BlinkDL/rwkv-4-world", "4", "RWKV-4-World-", r"RWKV-4-World-{}-v1(?:-fixed)?-(\d{{8}})-ctx\d+\.pth",
        {size: size.upper() for size in ("0.1b", "0.4b", "1.5b", "3b", "7b")},
    ),
)  # fmt: skip


def models() -> Iterator[tuple[str, Family, Sizes]]:
    """Name, family and sizes of every known model."""
    for family in FAMILIES:
        for size in family.sizes:
            published = VERSIONS[family.version].PUBLISHED[size]
            yield f"{family.name}-{size}", family, replace(published, vocab_size=family.vocab_size)


@dataclass(frozen=True)
class Source:
    """What to fetch.

    Attributes:
        words: as the user wrote it.
        repo: the repository on the hub.
        revision: branch, tag or commit; empty: the default branch.
        pattern: regular expression of the paths in the repository that match.
        link: file name under which the newest one is linked; empty: none.
        several: whether several paths may match, of which the newest is taken.
    """

    words: str
    repo: str
    revision: str
    pattern: re.Pattern[str]
    link: str = ""
    several: bool = True

    @property
    def official(self) -> bool:
        """Whether the words are, or begin, a file name of an official repository."""
        return "/" not in self.words

    def newest(self, names: Iterable[str]) -> str | None:
        """The newest matching path, by the date in its name; None if none matches.

        Raises:
            UserError: several match, and `several` is False.
        """
        found = sorted((name for name in names if self.pattern.fullmatch(name)), key=lambda name: (_date(name), name))
        if len(found) > 1 and not self.several:
            some = ", ".join(found[-8:])
            raise UserError(
                f"--model {self.words}: {self.repo} has {len(found)} models; name the file: {self.repo}/FILE, such as {some}"
            )
        return found[-1] if found else None


def _date(name: str) -> str:
    dates = re.findall(r"(?<!\d)(20\d{6})(?!\d)", name)
    return dates[-1] if dates else ""


def source_of(words: str, revision: str = "") -> Source:
    """What a user's words refer to: a known model (rwkv7-g1-0.1b), a file name of an official
    repository or its beginning, owner/repo, owner/repo/file, or the file's page on the hub.

    Raises:
        UserError: none of these; the message lists the known models.
    """
    given = words.strip()
    for name, family, _ in models():
        if given.lower().removesuffix(".pth") == name:
            label = re.escape(family.sizes[name.removeprefix(f"{family.name}-")])
            return Source(given, family.repo, revision, re.compile(family.files.format(label)), f"{name}.pth")
    if re.match("https?://", given):
        repo, _, rest = unquote(urlsplit(given).path).strip("/").partition("/blob/")
        repo, rest = (repo, rest) if rest else repo.partition("/resolve/")[::2]
        found, _, path = rest.partition("/")
        return _in_repository(given, f"{repo}/{path}".rstrip("/"), revision or ("" if found == "main" else found))
    if "/" in given:
        return _in_repository(given, given, revision)
    for family in FAMILIES:
        size_unknown = given.lower().startswith(f"{family.name}-") and not _date(given)
        if given.lower().startswith(family.begin.lower()) and not size_unknown:
            pattern = re.escape(given) if given.endswith(SUFFIXES) else rf"{re.escape(given)}(?![\w.])[^/]*\.pth"
            return Source(given, family.repo, revision, re.compile(pattern, re.IGNORECASE))
    names = [name for name, _, _ in models()]
    near = difflib.get_close_matches(given.lower(), names, 1, 0.6)
    hint = f"did you mean {near[0]}? Known: " if near else "known are "
    raise UserError(f"--model {given}: unknown model; {hint}{', '.join(names)}; or pass owner/repo/file of the hub")


def _in_repository(words: str, path: str, revision: str) -> Source:
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    if not re.fullmatch(r"\w[\w.-]*", owner) or not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"--model {words}: expected owner/repo or owner/repo/file, as on the hub; is this a local file?"
        )
    pattern = re.escape(file) if file else rf".*({'|'.join(map(re.escape, SUFFIXES))})"
    return Source(words, f"{owner}/{name}", revision, re.compile(pattern), several=False)


def table() -> str:
    """The known models: version, parameters, size of the file (bf16), and GB of GPU memory that
    training takes at ctx_len 1024, micro_bsz 1, bf16 and --grad_cp 1.
    """
    rows = [["model", "version", "parameters", "file GB", "LoRA GB", "full GB", "repository"]]
    for name, family, sizes in models():
        plan = Plan(sizes, grad_cp=True)
        memory = [f"{estimate(p).total / 1e9:.1f}" for p in (plan, replace(plan, lora=False))]
        count = total(sizes)
        rows.append([name, family.version, f"{count / 1e9:.2f}b", f"{count * 2 / 1e9:.1f}", *memory, family.repo])
    return columns(rows, left={0, len(rows[0]) - 1})
