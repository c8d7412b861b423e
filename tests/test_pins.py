"""Pins are written once, in pyproject.toml; the locks and environment.yml agree with them, and so does what is installed."""

import importlib.metadata
import re
from pathlib import Path

import tomli
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    return dict(line.split("==") for line in wanted)


def locked() -> dict[str, str]:
    text = "".join((ROOT / f"docker/locks/{name}.txt").read_text() for name in ("cu117", "cu117-deepspeed"))
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def test_every_pin_is_exact_and_locked():
    assert pins().items() <= locked().items()


def test_every_locked_file_has_a_hash():
    for name in ("docker/locks/cu117.txt", "docker/locks/cu117-deepspeed.txt", "tests/oracle.txt"):
        entries = re.split(r"^(?=[\w.-]+==)", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]
        assert entries
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries), name


def test_what_is_installed_is_what_is_locked():
    for name, version in locked().items():
        assert importlib.metadata.version(name).split("+")[0] == version, name


def test_the_documented_stack_is_the_documented_one():
    documented = {"torch": "1.13.1", "deepspeed": "0.7.0", "pytorch-lightning": "1.9.5"}
    assert documented.items() <= pins().items()
    assert pins()["numpy"] < "2"


def test_the_conda_environment_adds_no_pins_of_its_own():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r docker/locks/cu117.txt"]
    assert [entry for entry in conda if "=" in entry] == ["python=3.10"]
    assert PROJECT["requires-python"] == ">=3.10,<3.11"


def test_no_registry_or_index_is_named():
    for path in [*ROOT.glob("docker/**/*"), ROOT / "pyproject.toml", ROOT / "tests/oracle.txt"]:
        if path.is_file():
            assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host", path.read_text()), path


def test_versions_agree():
    import rwkv

    assert rwkv.__version__ == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
