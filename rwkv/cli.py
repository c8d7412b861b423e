"""Build a command line from a dataclass, and print errors as one line."""

import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from rwkv import arguments
from rwkv.errors import UserError, printable
from rwkv.streams import silence

Config = TypeVar("Config")
ESSENTIAL = (
    "load_model", "data_file", "proj_dir", "epoch_steps", "epoch_count", "lr_init", "lr_final", "input", "output_prefix",
    "adapter", "base", "model", "output", "prompt", "ask", "card", "method",
)  # fmt: skip
"""Flags that --help shows first, in programs that have them."""
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(config: type[Config], description: str, argv: Sequence[str] | None = None) -> Config:
    """Parse a command line (default: sys.argv) into a dataclass: --name value, --config file.yaml,
    --print_config.

    Mistakes exit with status 2 and print one line each; `rwkv.arguments.read` describes the
    accepted syntax.

    Raises:
        UserError: flags of upstream programs that are not supported here.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        description=description, usage="%(prog)s [--flag value ...]", allow_abbrev=False, formatter_class=_Help
    )
    parser.add_argument(
        "--config", action="config", help="Read flags from a YAML file; those of the command line take precedence."
    )
    parser.add_class_arguments(config)
    _group(parser, config)
    if {"-h", "--help"} & set(argv):
        argv = ["--help"]
    else:
        try:
            argv = arguments.read(
                argv, config, [option for action in parser._actions for option in action.option_strings]
            )
        except arguments.UsageError as error:
            parser.error(str(error))
    values = vars(parser.parse_args(argv))
    values.pop("config", None)
    return config(**values)


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Print a UserError or OSError as one line on stderr and exit with status 1; Ctrl-C exits with
    status 130.

    Other errors print a traceback; with RWKV_TRACEBACK=1 all errors do. Characters that stdout's
    encoding lacks are printed as "?".
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout has exited, such as `head`
        silence(sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _exit(format_os_error(error))
    except MemoryError as error:
        _exit(
            f"out of memory on the host{f' ({error})' if str(error) else ''}; close other programs, or use a smaller model or input"
        )


_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk, and run the same command again",
    errno.EDQUOT: "free some space, or write to another disk, and run the same command again",
    errno.EROFS: "write to another folder",
    errno.EACCES: "change its permissions, or use another file or folder",
    errno.EPERM: "change its permissions, or use another file or folder",
    errno.EISDIR: "pass a file",
    errno.ENOTDIR: "use another file or folder",
    errno.EEXIST: "use another name",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EMFILE: "raise the limit: ulimit -n 65536",
    errno.EIO: "check the disk or network drive",
}


def format_os_error(error: OSError) -> str:
    """Format an error as one line: the files, the operating system's message, and what to do."""
    files = " -> ".join(
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
    )
    if error.errno == errno.ENOENT and not files and not _has_current_folder():
        return "the current folder was deleted; change to another one (cd), and run the same command again"
    what = error.strerror or " ".join(str(error).split()) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0)
    return ": ".join(filter(None, [files[:300], what])) + (f"; {remedy}" if remedy else "")


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _exit(message: str) -> NoReturn:
    if os.environ.get("RWKV_TRACEBACK"):
        traceback.print_exc()
    sys.exit(printable(f"error: {message}"))


def _group(parser: ArgumentParser, config: type[Any]) -> None:
    """Group the flags in --help: essential flags, those of `config` itself, then those of each
    dataclass that it inherits from, with its docstring as the title.
    """
    groups = {"Essential": [name for name in ESSENTIAL if name in config.__dataclass_fields__]}
    for part in (config, *reversed(config.__mro__[1:])):
        inherited = {name for base in part.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
        names = [name for name in vars(part).get("__annotations__", ()) if name not in {*ESSENTIAL, *inherited}]
        groups[(part.__doc__ or "").strip().rstrip(".")] = names
    actions = {action.dest: action for action in parser._actions}
    for title, names in groups.items():
        members = [actions[name] for name in names]
        for group in parser._action_groups:
            group._group_actions = [action for action in group._group_actions if action not in members]
        if members:
            parser.add_argument_group(title)._group_actions.extend(members)


class _Help(DefaultHelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text.strip()  # do not wrap: a script's docstring contains commands


class _Parser(ArgumentParser):
    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:
        self.exit(2, printable(f"error: {' '.join(message.split()) if 'error: ' not in message else message}\n"))
