"""Dataset splits: which files are training data, by the metadata of the datasets library or, as on
the Hub, by file names.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv.data.convert import natural_order
from rwkv.errors import UserError

_FAMILIES = {
    "train": ("train", "training", "训练", "訓練", "学習", "훈련"),
    "validation": ("validation", "valid", "val", "dev", "heldout", "holdout", "验证", "驗證", "検証", "검증"),
    "test": ("test", "testing", "eval", "evaluation", "测试", "測試", "评估", "評估", "テスト", "평가"),
}
_FAMILY = {keyword: family for family, keywords in _FAMILIES.items() for keyword in keywords}
# also trainset, test_data and held-out; not latest or strain
_KEYWORD = re.compile(
    rf"(?:^|[^a-z])({'|'.join(sorted(_FAMILY, key=len, reverse=True))})(?:[ _-]?(?:set|data|split|集))?(?:$|[^a-z])"
)
_SHARDED = re.compile(r"(?:.*[-./])?([\w+]+)-\d{5}-of-\d{5}")


def parse(split: str) -> list[str]:
    """The names in --split, in lower case."""
    return [name.strip().casefold() for name in split.split(",") if name.strip()]


def family(name: str) -> str:
    """train, validation or test; "" for a split of another name."""
    found = _keywords(name)
    return _FAMILY[found[0]] if found else ""


def _keywords(name: str) -> list[str]:
    """The words of a name that indicate a split, such as train in TrainData.json."""
    return _KEYWORD.findall(_separated(name))


def _separated(name: str) -> str:
    """A name in lower case, with its words separated by spaces."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).casefold().replace("_", " ")
    return re.sub(r"\b(held|hold)[ -]out", r"\1out", name)


def choose(names: Sequence[str], requested: Sequence[str], where: Path) -> list[str]:
    """The splits to convert: those requested by name or family (dev for validation), by default the
    training split.

    Raises:
        UserError: there is no training split, or several.
    """
    if "all" in requested:
        return list(names)
    if requested:
        return [
            name
            for name in names
            if name.casefold() in requested
            or (_KEYWORD.fullmatch(_separated(name)) and family(name) in map(family, requested))
        ]
    if "train" in names:
        return ["train"]
    training = [name for name in names if family(name) == "train"] or (list(names) if len(names) == 1 else [])
    if len(training) != 1:
        what = "several splits for training" if training else "no split for training"
        raise UserError(f"{where}: has {what} ({', '.join(names)}); choose with --split NAME, or --split all")
    return training


def of_files(paths: Sequence[Path], root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Group files by split, and list those without one. There are no splits unless names indicate
    training and another split.

    As on the Hub: by README.md (`configs: … data_files:`) if it lists them; otherwise
    `NAME-00000-of-00003` belongs to split NAME, and train, test, dev and the like as a word in a
    file or folder name indicate a split.
    """
    if described := _described(paths, root):
        return described
    found: dict[str, list[Path]] = {}
    rest, sharded = [], False
    for path in paths:
        name, by_shard = _split_of(path.relative_to(root))
        sharded = sharded or (by_shard and bool(family(name)))
        found.setdefault(name, []).append(path) if name else rest.append(path)
    families = {family(name) for name in found}
    if not sharded:
        rest += [path for name, members in found.items() if not family(name) for path in members]
        found = {name: members for name, members in found.items() if family(name)}
        if len(rest) > len(paths) / 2 or (rest and "train" not in families):
            return {}, list(paths)  # probably titles that contain such words
    if not families & {"validation", "test"}:
        return {}, list(paths)
    return found, natural_order.natural(rest)


def _split_of(path: Path) -> tuple[str, bool]:
    """The split that a path indicates ("" for none), and whether it is a numbered shard
    (`NAME-00000-of-00003`).
    """
    stem = path.name.split(".")[0] if not path.name.startswith(".") else path.name
    if match := _SHARDED.fullmatch(stem):
        return match[1], True
    for part in (path.name, *reversed(path.parts[:-1])):
        if found := _keywords(part):
            return found[-1], False
    return "", False


def _described(paths: Sequence[Path], root: Path) -> tuple[dict[str, list[Path]], list[Path]] | None:
    """The splits listed in the front matter of a Hub folder's README.md; None if there are none."""
    try:
        text = (root / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if not text.startswith("---") or "data_files" not in text:
        return None
    import yaml

    try:
        front = yaml.safe_load(text.split("---")[1])
        entries = [entry for config in front["configs"] for entry in _entries(config["data_files"])]
        patterns = [
            (str(split), pattern)
            for split, paths in entries
            for pattern in ([paths] if isinstance(paths, str) else paths)
        ]
        found: dict[str, list[Path]] = {}
        for name, pattern in patterns:
            matched = set(root.glob(pattern))
            found.setdefault(name, []).extend(path for path in paths if path in matched and path not in found[name])
    except (yaml.YAMLError, KeyError, TypeError, IndexError, ValueError, NotImplementedError):
        return None
    found = {name: members for name, members in found.items() if members}
    used = {path for members in found.values() for path in members}
    return (found, [path for path in paths if path not in used]) if found else None


def _entries(data_files: Any) -> list[tuple[str, Any]]:
    """(split, patterns) of data_files, in all forms of the Hub; patterns alone are train."""
    if isinstance(data_files, dict):
        return list(data_files.items())
    if isinstance(data_files, list) and all(isinstance(entry, dict) for entry in data_files):
        return [(entry["split"], entry["path"]) for entry in data_files]
    return [("train", data_files)]


def dataset(folder: Path) -> dict[str, list[Path]]:
    """The arrow files, by split, of a folder written by save_to_disk of the datasets library; empty
    for other folders.

    Raises:
        UserError: its metadata is corrupt, or refers to files outside it.
    """
    description = folder / "dataset_dict.json"
    if description.is_file():
        names = _json(description, "splits")
        return {name: _files(folder / _inside(name, description, "")) for name in names}
    if (folder / "state.json").is_file() and (files := _files(folder)):
        name = _json(folder / "state.json", "_split", optional=True)
        return {name if isinstance(name, str) and name else folder.name or "train": files}
    return {}


def _files(folder: Path) -> list[Path]:
    state = folder / "state.json"
    if not state.is_file():
        raise UserError(
            f"{state}: no such file; the datasets folder is corrupt, or its download is not complete; download it again"
        )
    entries = _json(state, "_data_files")
    if not all(isinstance(entry, dict) for entry in entries):
        raise UserError(
            f"{state}: _data_files is not a list of objects; the datasets folder is corrupt: download it again"
        )
    return [folder / _inside(entry.get("filename"), state, ".arrow") for entry in entries]


def _inside(name: Any, where: Path, ending: str) -> str:
    """Validate a name read from downloaded metadata. Raises UserError unless it is a plain file or
    folder name.
    """
    if (
        not isinstance(name, str)
        or not name
        or name in (".", "..")
        or any(x in name for x in "/\\\0")
        or not name.endswith(ending)
    ):
        raise UserError(
            f"{where}: names {name!r}, which is not {f'an {ending} file' if ending else 'a folder'} beside it; the datasets folder is corrupt: download it again"
        )
    return name


def _json(path: Path, key: str, optional: bool = False) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); the datasets folder is corrupt: download it again") from error
    value = found.get(key) if isinstance(found, dict) else None
    if not optional and not isinstance(value, list):
        raise UserError(f"{path}: has no list {key}; the datasets folder is corrupt: download it again")
    return value
