"""The command line: types, config files, help, and errors with suggestions."""

import ast
import dataclasses
import errno
import os
import re

import pytest

from rwkv import config as flags
from rwkv.cli import parse, printable, report_errors
from rwkv.config import FinetuneConfig, GenerateConfig, LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.legacy_flags import NOT_SUPPORTED


def parse_error(argv, capsys, config=LoRAConfig):
    with pytest.raises(SystemExit) as caught:
        parse(config, "", argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


CONFIGS = [c for c in vars(flags).values() if dataclasses.is_dataclass(c)]
NAMES = {field.name for config in CONFIGS for field in dataclasses.fields(config)}


def test_defaults_match_dataclass():
    assert parse(LoRAConfig, "", []) == LoRAConfig()


def test_unknown_flag_suggests_nearest(capsys):
    assert "did you mean --n_layer?" in parse_error(["--n_layers", "3"], capsys)


def test_wrong_type_or_choice(capsys):
    assert "n_layer" in parse_error(["--n_layer", "many"], capsys)
    assert "grad_cp" in parse_error(["--grad_cp", "2"], capsys)


def test_command_line_overrides_config_file(tmp_path):
    (tmp_path / "c.yaml").write_text("n_layer: 3\nn_embd: 32\n")
    config = parse(TrainConfig, "", ["--config", str(tmp_path / "c.yaml"), "--n_embd", "64"])
    assert (config.n_layer, config.n_embd) == (3, 64)


@pytest.mark.parametrize("config", CONFIGS)
def test_help_describes_every_flag(config, capsys):
    with pytest.raises(SystemExit):
        parse(config, "", ["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(config):
        line = text[text.index(f"--{field.name} ") :].split("(type")[0]
        assert len(line.split()) > 3, f"--{field.name} has no explanation"


def test_user_error_has_no_traceback():
    with pytest.raises(SystemExit) as caught, report_errors():
        raise UserError("what, where, what to do")
    assert caught.value.code == "error: what, where, what to do"


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_flags_named_in_advice_exist(name):
    entry = NOT_SUPPORTED[name]
    for advice in (entry.advice, *entry.values.values()):
        assert set(re.findall(r"--(\w+)", advice)) <= NAMES, advice


def test_all_mistakes_reported_together(capsys):
    lines = parse_error(
        ["--n_layers", "3", "--micro_bsz", "two", "--peft", "bone", "--lora_r", "8"], capsys
    ).splitlines()
    assert [line.split(":")[0] for line in lines] == ["error"] * 3
    assert "usage" not in "".join(lines)


@pytest.mark.parametrize(
    "flag", ["--quark", "--lora_a", "--top_kk", "--loss", "--vocabulary_hash", "--emb_dim", "--beta3", "--head_scale"]
)
def test_no_suggestion_for_distant_name(flag, capsys):
    assert "did you mean" not in parse_error([flag, "1"], capsys)


def test_flag_of_another_script(capsys):
    assert "not a flag of this program, but of scripts/generate.py" in parse_error(["--ask", "x"], capsys)
    assert "but of scripts/lora.py" in parse_error(["--lora_r", "8"], capsys, TrainConfig)
    assert "but of scripts/merge_lora.py" in parse_error(["--adapter", "a.pth"], capsys, GenerateConfig)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        # a script with CRLF, or with a space after the backslash:
        # https://github.com/community-scripts/ProxmoxVE/issues/14362
        (["\r"], r"sed -i 's/\\r\$//' SCRIPT"),
        (["--n_layer", "3", "\r"], "argument 3 after --n_layer 3: there is a carriage return"),
        (["--overwrite", "\r"], "carriage return"),
        (["--proj_dir", "\r"], "--proj_dir: instead of a value there is a carriage return"),
        (["--proj_dir= "], "--proj_dir: instead of a value there is a blank"),
        (["--n_layer", "3", " ", "--foo"], "there is a blank: .* a space follows"),
        (["--overwrite", "\\"], "lone backslash"),
        (["--overwrite", "\\ "], "lone backslash"),
        (["\t"], "there is a blank"),
        ([""], "there is an empty argument"),
        (["--overwrite", ""], "there is an empty argument"),
        (["--peft", "lora", "\r"], "carriage return"),
        (["--load_model", "my", "model.pth"], "unexpected argument model.pth after --load_model my: .*needs quotes"),
        (["\u2013lora_r", "8"], "not the ASCII .*; type --lora_r"),
        (["-lora_r", "8"], "two dashes: --lora_r"),
        (["lora_r=8"], "two dashes: --lora_r=8"),
        (["--lora_r", "8", "\u200b"], r"argument 3 .*: it contains an invisible character \(U\+200B"),
        (["\ufeff--lora"], r"--lora contains an invisible character \(U\+FEFF"),
        (["--LORA_R", "8"], "lower case: --lora_r"),
        (["--n_layer"], "--n_layer: needs a value, an integer"),
        (["--precision", "--lora"], "--precision: needs a value: auto, fp32"),
    ],
)
def test_stray_argument(argv, expected, capsys):
    message = parse_error(argv, capsys)
    assert re.search(expected, message), message
    assert len(message.splitlines()) == 1


def test_trailing_carriage_return_removed(capsys):
    assert parse(LoRAConfig, "", ["--proj_dir", "out\r", "--n_layer", "3\r", "--overwrite\r"]) == LoRAConfig(
        proj_dir="out", n_layer=3, overwrite=True
    )
    assert capsys.readouterr().err.count("Windows line endings (CRLF)") == 3


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--n_layer", "two"], "--n_layer: expected an integer, such as 8 or 1000; got two"),
        (["--n_layer", "1e3"], "--n_layer: expected an integer"),
        (["--ctx_len", "4611686018427387905"], "--ctx_len: expected an integer of at most 2^62"),
        (["--n_layer", ""], "--n_layer: expected an integer, such as 8 or 1000; got an empty value"),
        (["--lr_init", "1,5"], "--lr_init: expected a number, such as 0.01 or 1e-4; got 1,5"),
        (["--lr_init", "nan"], "--lr_init: expected a finite number"),
        (["--precision", "16"], "--precision: expected one of auto, fp32, tf32, bf16, fp16; got 16"),
        (["--grad_cp", "2"], "--grad_cp: expected 0 or 1; got 2"),
        (["--overwrite=maybe"], "--overwrite: expected true or false; got maybe"),
    ],
)
def test_wrong_value_type(argv, expected, capsys):
    message = parse_error(argv, capsys)
    assert message.startswith(f"error: {expected}")
    assert len(message.splitlines()) == 1


def test_switch_spellings_and_choice_case():
    for yes, no in (("1", "0"), ("true", "false"), ("True", "False"), ("yes", "no"), ("on", "off")):
        for flag in ("--grad_cp", "--auto"):
            assert [bool(getattr(parse(LoRAConfig, "", [flag, value]), flag[2:])) for value in (yes, no)] == [
                True,
                False,
            ]
    assert parse(LoRAConfig, "", ["--precision", "BF16", "--lr_init=1E-4"]) == LoRAConfig(
        precision="bf16", lr_init=1e-4
    )


@pytest.mark.parametrize(
    "text", ["null", "007", "[a", "1: 2", "{x}", "yes", "~", "a=b", "# c", " ", "-5 degrees", "--- a", "é\n你好"]
)
def test_text_values_verbatim(text):
    assert parse(GenerateConfig, "", ["--prompt", text]).prompt == text
    assert parse(GenerateConfig, "", [f"--prompt={text}"]).prompt == text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"n_layers: 3\n", "c.yaml: unknown flag n_layers: did you mean --n_layer?"),
        (b"n_layer: two\n", "c.yaml: n_layer: expected an integer, such as 8 or 1000; got two"),
        (b"n_layer: {a: 1}\n", "c.yaml: n_layer: expected one value, not a mapping"),
        (b"peft: bone\n", "c.yaml: peft bone: a flag of RWKV-PEFT"),
        ("n_layer: 3\n".encode("utf-16"), "c.yaml: not UTF-8 but UTF-16; save it as UTF-8"),
        (b"proj_dir: \xb5\xc8\n", "c.yaml: not UTF-8"),
        (b"a: [\n", "c.yaml, line 2: not YAML"),
        (b"- n_layer\n", "c.yaml: expected lines such as"),
        (b"n_layer: 3\n\nn-layer: 4\n", "c.yaml, line 3: n_layer is also in line 1; remove one of them"),
        (b"{n_layer: 3, n_layer: 3}\n", "c.yaml, line 1: n_layer is also in line 1"),
        (b"n_layer: " + b"[" * 20000, "c.yaml: nested too deeply"),
        (None, "c.yaml: No such file or directory"),
    ],
)
def test_invalid_config_file(content, expected, tmp_path, capsys):
    if content is not None:
        (tmp_path / "c.yaml").write_bytes(content)
    try:
        parse(LoRAConfig, "", ["--config", str(tmp_path / "c.yaml")])
    except UserError as error:
        message = str(error)
    except SystemExit:
        message = capsys.readouterr().err
    assert expected in message


def test_print_config_roundtrip(tmp_path, capsys):
    argv = [
        "--proj_dir",
        "007",
        "--lr_init",
        "1e-4",
        "--overwrite",
        "--wandb",
        "",
        "--precision",
        "bf16",
        "--lora_parts",
        "att,ffn",
    ]
    with pytest.raises(SystemExit):
        parse(LoRAConfig, "", [*argv, "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parse(LoRAConfig, "", ["--config", str(tmp_path / "c.yaml")]) == parse(LoRAConfig, "", argv)


def test_help_starts_with_essential_flags(capsys):
    with pytest.raises(SystemExit):
        parse(LoRAConfig, "", ["--help"])
    text = capsys.readouterr().out
    headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert headings[:2] == ["options", "Essential"]
    essential = text.split("Essential:")[1].split("\n\n")[0]
    assert re.findall(r"^  --(\w+)", essential, re.MULTILINE)[:5] == [
        "load_model",
        "data_file",
        "proj_dir",
        "epoch_steps",
        "epoch_count",
    ]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("shared library missing"), "error: shared library missing"),
        (FileNotFoundError(), "error: FileNotFoundError"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "data"), "error: data: Is a directory; pass a file"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 999),
            f"error: {'x' * 300}: File name too long; use a shorter name",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", b"a"),
            "error: a: Permission denied; change its permissions, or use another file or folder",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "f/x"),
            "error: f/x: Not a directory; use another file .*",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "f"), "error: f: File exists; use another name"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; free some space, .*"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "error: a -> b: Invalid cross-device link"),
        (MemoryError(), "error: out of memory on the host; .*"),
    ],
)
def test_os_error_message(error, expected):
    with pytest.raises(SystemExit) as caught, report_errors():
        raise error
    assert re.fullmatch(expected, caught.value.code)


def test_deleted_current_folder(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as caught, report_errors():
        os.path.abspath("file")
    assert caught.value.code.startswith("error: the current folder was deleted; change to another one")


def test_control_characters_escaped():
    with pytest.raises(SystemExit) as caught, report_errors():
        raise UserError("bad\x1b]0;owned\x07\x9b31m name")
    assert caught.value.code == r"error: bad\x1b]0;owned\x07\x9b31m name"
    assert printable("好\n\té") == "好\n\té"


OTHER_PROGRAMS = {"--config", "--help", "--flag"} | {
    # flags of other programs: nvidia-smi, git, nvcc, docker, tensorboard, srun, ray
    "--version", "--porcelain", "--untracked_files", "--std", "--ptxas_options", "--gpu_architecture", "--ipc", "--shm_size", "--gpus", "--logdir",
    "--ntasks_per_node", "--num_cpus", "--address",
}  # fmt: skip
UPSTREAM_FLAGS = {"--my_sample_len"}
# modules that print commands of other scripts
PRINT_COMMANDS = {"finish.py", "samples.py", "data_source.py", "setup.py"}


def messages(path):
    """All string literals of a module except docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)
    }
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [node.value for node in strings if id(node) not in docstrings]


def test_flags_named_in_messages_exist(root):
    training = {field.name for config in (LoRAConfig, FinetuneConfig) for field in dataclasses.fields(config)}
    for path in [*(root / "rwkv").rglob("*.py"), *(root / "scripts").glob("*.py")]:
        # modules that name flags of other trainers
        if path.name in ("legacy_flags.py", "arguments.py"):
            continue
        known = training if "train" in path.parts and path.name not in PRINT_COMMANDS else NAMES
        for text in messages(path):
            named = {
                flag.replace("-", "_").replace("__", "--", 1)
                for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text)
            }
            unknown = {flag for flag in named if flag[2:] not in known} - OTHER_PROGRAMS - UPSTREAM_FLAGS
            assert not unknown, f"{path.relative_to(root)}: {text}"
