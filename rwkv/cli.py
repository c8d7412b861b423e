"""The command line out of a dataclass, with errors as sentences."""

import contextlib
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from rwkv.errors import UserError
from rwkv.upstream import ALIASES, LISTS, NOT_SUPPORTED, PASSED_OVER

Config = TypeVar("Config")
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(config: type[Config], description: str, argv: Sequence[str] | None = None) -> Config:
    """Parse a command line (sys.argv by default) into the dataclass: --name value, --config file.yaml, --print_config.

    A flag alone (`--lora`) means true, and dashes are as good as underscores. An unknown flag exits with status 2 and names the nearest one.
    """
    argv = _without_unsupported(_spelled_as_here(list(sys.argv[1:] if argv is None else argv), config))
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=_Help)
    parser.add_argument("--config", action="config", help="Read flags from a YAML file; the command line comes on top.")
    parser.add_class_arguments(config)
    values = vars(parser.parse_args(argv))
    values.pop("config", None)
    return config(**values)


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Print a UserError, or a path that cannot be used, as one line on stderr and exit with status 1; Ctrl-C exits with 130. Other errors keep their traceback."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class _Help(DefaultHelpFormatter):
    def _fill_text(self, text, width, indent):  # a script's docstring has lines of commands: kept as they are
        return text.strip()


class _Parser(ArgumentParser):
    def error(self, message, *args, **kwargs):
        known = [option for action in self._actions for option in action.option_strings]
        wrong = message.removeprefix("unrecognized arguments: ").split()[0] if message.startswith("unrecognized arguments: ") else ""
        nearest = difflib.get_close_matches(wrong.split("=")[0], known, 1, 0.5) if wrong else []
        super().error(message + (f"; did you mean {nearest[0]}?" if nearest else ""), *args, **kwargs)


def _without_unsupported(argv: list[str]) -> list[str]:
    """Drop upstream's flags that we do not have where their value means "off"; refuse them otherwise."""
    kept, rest = [], iter(enumerate(argv))
    for i, word in rest:
        name, equals, value = word.partition("=")
        flag = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        entry = NOT_SUPPORTED.get(flag)
        if entry is None and flag not in PASSED_OVER:
            kept.append(word)
            continue
        if not equals and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            _, value = next(rest)
        if entry and value != entry[0]:
            raise UserError(f"{name} {value}: a flag of the upstream programs that is not supported here; {entry[1]}")
    return kept


_SWITCH = {"0": "false", "1": "true"}


def _is_switch(fields: dict[str, Any], word: str) -> bool:
    field = fields.get(word.removeprefix("--"))
    return field is not None and field.type is bool


def _spelled_as_here(argv: list[str], config: type[Any]) -> list[str]:
    """Upstream's spellings: `--output-prefix` is `--output_prefix`, a switch alone (`--lora`) is `--lora=true`, and so are `--lora 1` and
    `--lora=1`; `--vocab` is `--vocab_file`, and `--jsonl-keys a b` is `--jsonl_keys a,b`."""
    fields = config.__dataclass_fields__
    words: list[str] = []
    for word, after in zip(argv, [*argv[1:], "--"], strict=False):
        name, equals, value = word.partition("=")
        flag = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        field = fields.get(ALIASES.get(flag, flag))
        if field:
            if field.type is bool:
                equals, value = ("=", _SWITCH.get(value, value)) if equals else ("=", "true") if after.startswith("--") else ("", "")
            word = f"--{field.name}{equals}{value}"
        elif words and not name.startswith("--") and _is_switch(fields, words[-1]):
            word = _SWITCH.get(word, word)
        listed = len(words) > 1 and words[-2].removeprefix("--") in LISTS and words[-2].startswith("--") and not word.startswith("-")
        if listed:
            words[-1] += f",{word}"
        else:
            words.append(word)
    return words
