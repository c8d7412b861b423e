"""Normalise a command line before parsing: accept upstream's spellings, and explain every invalid
argument.
"""

import contextlib
import dataclasses
import difflib
import itertools
import math
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from rwkv import config as flags
from rwkv.errors import UserError
from rwkv.legacy_flags import ALIASES, EQUIVALENT, IGNORED, LISTS, NOT_SUPPORTED

PROGRAMS = {
    "TrainConfig": "scripts/finetune.py and scripts/pretrain.py",
    "FinetuneConfig": "scripts/finetune.py",
    "StateConfig": "scripts/state.py",
    "LoRAConfig": "scripts/lora.py",
    "DPOConfig": "scripts/dpo.py",
    "ConvertConfig": "scripts/convert.py",
    "InspectConfig": "scripts/inspect_data.py",
    "FetchConfig": "scripts/fetch.py",
    "MergeConfig": "scripts/merge_lora.py",
    "GenerateConfig": "scripts/generate.py",
    "ServeConfig": "scripts/serve.py",
    "EvaluateConfig": "scripts/evaluate.py",
    "ExportConfig": "scripts/export.py",
    "EstimateConfig": "scripts/estimate.py",
    "DoctorConfig": "scripts/doctor.py",
}
"""Scripts by the dataclass of their flags."""
_FREE_TEXT = ("prompt", "ask")  # flags whose values may be blank or begin with dashes
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_DASHES = "-–—−‐‑"
_FLAG = re.compile(r"--[A-Za-z][\w-]*(=|$)")
_LARGEST = 1 << 62  # integers beyond it overflow in numpy and torch
_MIN_SIMILARITY = 0.85  # minimum similarity of a suggested flag


class UsageError(UserError):
    """An invalid command line; the message has one line per error. Scripts exit with status 2."""


def read(argv: Sequence[str], config: type[Any], passed: Sequence[str] = ()) -> list[str]:
    """Normalise arguments to `--name=value`, with the dataclass's names and values; flags of a
    --config YAML file come first.

    Upstream's spellings are accepted: `--output-prefix` is `--output_prefix`, a switch alone
    (`--lora`) is true, `--grad_cp true` is `--grad_cp 1`, `--vocab` is `--vocab_file`,
    `--jsonl-keys a b` is `--jsonl_keys a,b`.

    Args:
        passed: flags that are returned unchanged.

    Raises:
        UserError: flags of upstream programs that have no counterpart here, unless their value
            turns them off.
        UsageError: all other errors.
    """
    reader = _Reader(config, passed)
    reader.read([_without_carriage_return(argument) for argument in argv])
    if reader.errors or reader.unsupported:
        raise (UsageError if reader.errors else UserError)("\nerror: ".join([*reader.errors, *reader.unsupported]))
    return [*reader.configured, *reader.found]


def value(argv: Sequence[str], config: type[Any], name: str) -> str:
    """The value of one flag, empty if it is not given; mistakes are left to `read`."""
    reader = _Reader(config, ())
    with contextlib.suppress(UserError):
        reader.read(list(argv))
    found = [word for word in (*reader.configured, *reader.found) if word.startswith(f"--{name}=")]
    return found[-1].partition("=")[2] if found else ""


def convert(field: "dataclasses.Field[Any]", text: str) -> str:
    """Normalise the value of a flag for the parser.

    Raises:
        ValueError: the value is invalid; the message is what was expected.
    """
    kind, word = field.type, text.strip().lower()
    if kind is str:
        return text
    if kind is bool:
        if word in _TRUE + _FALSE:
            return "true" if word in _TRUE else "false"
        raise ValueError("true or false")
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        if set(choices) == {"0", "1"} and word in _TRUE + _FALSE:
            return "1" if word in _TRUE else "0"
        found = next((name for name in choices if name.lower() == word), None)
        if found is None:
            raise ValueError(f"{'0 or 1' if set(choices) == {'0', '1'} else 'one of ' + ', '.join(choices)}")
        return found
    if kind is int:
        try:
            number = int(text)
        except ValueError:
            raise ValueError("an integer, such as 8 or 1000") from None
        if abs(number) > _LARGEST:
            raise ValueError("an integer of at most 2^62")
        return str(number)
    try:
        real = float(text)
    except ValueError:
        raise ValueError("a number, such as 0.01 or 1e-4") from None
    if not math.isfinite(real):
        raise ValueError("a finite number, such as 0.01 or 1e-4")
    return repr(real)


class _Reader:
    def __init__(self, config: type[Any], passed: Sequence[str]):
        self.fields = {field.name: field for field in dataclasses.fields(config)}
        self.config, self.passed = config, {flag.removeprefix("--") for flag in passed}
        self.found: list[str] = []
        self.configured: list[str] = []
        self.errors: list[str] = []
        self.unsupported: list[str] = []

    def read(self, argv: list[str]) -> None:
        """Read all arguments into `found`, `errors` and `unsupported`."""
        position = 0
        while position < len(argv):
            argument = argv[position]
            position += 1
            if not _FLAG.match(argument):
                self.errors.append(self.explain_stray(argument, argv[: position - 1]))
                # the shell ended the command here: later errors are consequences
                if _blank(argument):
                    self.errors, self.unsupported = self.errors[-1:], []
                    return
                if argument[0] in _DASHES:  # meant as a flag
                    position += len(_until_blank(_values(argv, position)))
                continue
            name, equals, value = argument.partition("=")
            flag, following = _flag_name(name), _values(argv, position)
            field = self.fields.get(ALIASES.get(flag, flag))
            if flag == "config":
                position += not equals
                self.read_file(value if equals else "".join(argv[position - 1 : position]))
            elif field is None and flag in self.passed:
                self.found.append(argument)
            elif field is None:
                taken = [] if equals else _until_blank(following)
                self.unknown_flag(name, flag, value if equals else " ".join(taken))
                position += len(taken)
            elif equals:
                self.set_value(name, field, value)
            elif field.type is bool:
                switched = bool(following) and following[0].strip().lower() in _TRUE + _FALSE
                self.set_value(name, field, following[0] if switched else "true")
                position += switched
            elif field.name in LISTS and (words := _until_blank(following)):
                self.set_value(name, field, ",".join(words))
                position += len(words)
            elif position < len(argv) and (
                following or (field.name in _FREE_TEXT and not self.mentions_flag(argv[position]))
            ):
                self.set_value(name, field, argv[position])
                position += 1
            else:
                self.errors.append(f"{name}: needs a value{_example(field)}")

    def set_value(self, name: str, field: "dataclasses.Field[Any]", value: str, where: str = "") -> None:
        """Record the value of a known flag, or an error if it is invalid."""
        _, value = EQUIVALENT.get((field.name, value), (field.name, value))
        if value and _blank(value) and (field.name not in _FREE_TEXT or value.strip(" ") in ("\r", "\\")):
            self.errors.append(f"{where}{name}: instead of a value {_explain_blank(value)}")
            return
        try:
            (self.configured if where else self.found).append(f"--{field.name}={convert(field, value)}")
        except ValueError as error:
            entry = NOT_SUPPORTED.get(field.name)
            if entry and any(value.startswith(begin) for begin in entry.values):
                self.unsupported.append(where + entry.message(name, value))
            else:
                self.errors.append(f"{where}{name}: expected {error}; got {value or 'an empty value'}")

    def unknown_flag(self, name: str, flag: str, value: str, where: str = "") -> None:
        """Record an error for an unknown flag; names the program that has it, or a similar flag."""
        lowered = flag.lower()
        near = difflib.get_close_matches(lowered, self.fields, 1, _MIN_SIMILARITY)
        entry = NOT_SUPPORTED.get(flag) or NOT_SUPPORTED.get(lowered)
        others = [program for kind, program in PROGRAMS.items() if flag in getattr(flags, kind).__dataclass_fields__]
        if flag in IGNORED or (entry and value in entry.off and entry.except_with not in self.fields):
            return
        same, meant = EQUIVALENT.get((flag, value), ("", ""))
        if same in self.fields:
            self.set_value(name, self.fields[same], meant, where)
            return
        if lowered in self.fields:
            self.errors.append(f"{where}{name}: flags are lower case: --{lowered}")
        elif others and not (
            entry and (issubclass(self.config, flags.TrainConfig) or self.mentions_flag(entry.advice))
        ):
            self.errors.append(f"{where}{name}: not a flag of this program, but of {others[0]}")
        elif entry:
            answer = entry.message(name, value)
            self.unsupported.append(where + answer + self.other_program(entry.advice))
        else:
            hint = f"did you mean --{near[0]}?" if near else f"see {Path(sys.argv[0]).name} --help"
            self.errors.append(f"{where}unknown flag {name}: {hint}")

    def other_program(self, advice: str) -> str:
        """` (in PROGRAM)`, the program whose flags the advice names; empty if it is this one."""
        named = re.findall(r"--(\w+)", advice)
        if not named or any(word in self.fields for word in named):
            return ""
        if named[0] in flags.LoRAConfig.__dataclass_fields__:
            return " (in the training scripts)"
        return (
            f" (in {next(x for kind, x in PROGRAMS.items() if named[0] in getattr(flags, kind).__dataclass_fields__)})"
        )

    def mentions_flag(self, text: str) -> bool:
        """Whether the text contains a flag of this program."""
        return any(word.replace("-", "_") in self.fields for word in re.findall(r"--([A-Za-z][\w-]*)", text))

    def explain_stray(self, argument: str, before: list[str]) -> str:
        """Explain an argument that belongs to no flag."""
        after = f" after {' '.join(before[-2:])}" if before else ""
        if _blank(argument):
            return f"argument {len(before) + 1}{after}: {_explain_blank(argument)}"
        if hidden := next((letter for letter in argument if unicodedata.category(letter) == "Cf"), ""):
            return (
                f"argument {len(before) + 1}{after}: {argument.replace(hidden, '') or 'it'} contains an invisible character (U+{ord(hidden):04X},"
                " copied from a web page?); type it again"
            )
        if argument.lstrip("-")[:1] in tuple(_DASHES):
            return f'{argument}: the dash is not the ASCII "-" (copied from a web page?); type --{argument.lstrip(_DASHES)}'
        if argument.startswith("-") and _flag_name(argument.lstrip("-").split("=")[0]) in self.fields:
            return f"{argument}: flags begin with two dashes: --{argument.lstrip('-')}"
        if argument.split("=")[0] in self.fields:
            return f"{argument}: flags begin with two dashes: --{argument}"
        if argument.startswith("#"):
            return (
                f'{argument}{after}: a comment cannot follow the "\\" that continues a line; remove it from the script'
            )
        return f'unexpected argument {argument}{after}: every value needs its flag before it, and one with spaces needs quotes, such as "my data.jsonl"'

    def read_file(self, path: str) -> None:
        """Read the flags of a YAML file."""
        for key, value in _yaml(path).items():
            name, where = f"--{_flag_name(str(key))}", f"{path}: "
            field = self.fields.get(ALIASES.get(name[2:], name[2:]))
            if isinstance(value, list) and not any(isinstance(word, list | dict) for word in value):
                value = ",".join(value)
            if not isinstance(value, str):
                self.errors.append(
                    f"{where}{key}: expected one value, not a {'list' if isinstance(value, list) else 'mapping'}"
                )
            elif field is None:
                self.unknown_flag(str(key), name[2:], value, where)
            elif value not in ("null", "~"):
                self.set_value(str(key), field, value, where)


def _flag_name(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _values(argv: list[str], position: int) -> list[str]:
    """The arguments from `position` up to the next flag."""
    end = next((i for i in range(position, len(argv)) if _FLAG.match(argv[i])), len(argv))
    return argv[position:end]


def _until_blank(words: list[str]) -> list[str]:
    """The words before the first blank one."""
    return list(itertools.takewhile(lambda word: not word or not _blank(word), words))


def _blank(argument: str) -> bool:
    return not argument.strip() or argument.strip() == "\\"


def _without_carriage_return(argument: str) -> str:
    """Remove the trailing carriage return that a script with CRLF line endings leaves, and print a
    note.
    """
    if len(argument) > 1 and argument.endswith("\r") and argument.strip():
        print(
            f"note: a carriage return was removed from the end of {argument.strip()}: the script has Windows line endings (CRLF);"
            " save it with Unix ones: sed -i 's/\\r$//' SCRIPT",
            file=sys.stderr,
        )
        return argument.rstrip("\r")
    return argument


def _explain_blank(argument: str) -> str:
    if "\r" in argument:
        return (
            "there is a carriage return: the script has Windows line endings (CRLF), so the command ends here and its other lines are lost;"
            " save it with Unix line endings: sed -i 's/\\r$//' SCRIPT"
        )
    if not argument:
        return 'there is an empty argument: is a variable of the script empty, or a pair of quotes ("") left over? Remove it'
    return (
        f'there is a {"lone backslash" if chr(92) in argument else "blank"}: in the script a space follows the "\\" at the end of a line, so the command ends here and its other lines are lost;'
        " remove trailing spaces (and carriage returns): sed -i 's/[[:space:]]*$//' SCRIPT"
    )


def _example(field: "dataclasses.Field[Any]") -> str:
    if get_origin(field.type) is Literal:
        return f": {', '.join(map(str, get_args(field.type)))}"
    return ", an integer" if field.type is int else ", a number" if field.type is float else ""


def _yaml(path: str) -> dict[Any, Any]:
    """The keys and values of a YAML file, as strings."""
    if not path or _blank(path):
        raise UserError("--config: needs a value, a YAML file")
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        seems = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") or content[1:2] == b"\0" else "another encoding"
        raise UserError(f"--config {path}: not UTF-8 but {seems}; save it as UTF-8") from None
    try:
        node = yaml.compose(text, yaml.BaseLoader)
        found = yaml.load(text, yaml.BaseLoader) or {}
    except RecursionError:
        raise UserError(f'--config {path}: nested too deeply; expected lines such as "n_layer: 12"') from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"--config {path}{line}: not YAML ({getattr(error, 'problem', None) or 'a character that YAML does not allow'});"
            ' expected lines such as "n_layer: 12"'
        ) from None
    if not isinstance(found, dict):
        raise UserError(f'--config {path}: expected lines such as "n_layer: 12"')
    lines: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        name, line = _flag_name(str(key.value)), key.start_mark.line + 1
        if name in lines:  # YAML would use the last
            raise UserError(f"--config {path}, line {line}: {name} is also in line {lines[name]}; remove one of them")
        lines[name] = line
    return found
