"""The pins of pyproject.toml agree with the locks, with environment.yml and with the installed
packages.
"""

import importlib.metadata
import os
import re
from pathlib import Path

import pytest
import tomli
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYPROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


STACKS = ("cu117", "modern")
BESIDE = ("lm-eval", "ray")  # extras that are installed into folders of their own
HERE = "cu117" if importlib.metadata.version("torch").startswith("1.") else "modern"


def pins(stack: str) -> dict[str, str]:
    if stack == "tools":
        requirements = PYPROJECT["dependency-groups"]["tools"]
    else:
        requirements = (
            PROJECT["dependencies"] + PROJECT["optional-dependencies"][stack] + PROJECT["optional-dependencies"]["dev"]
        )
    return dict(line.split("==") for line in requirements)


def locked(stack: str) -> dict[str, str]:
    """Versions that the locks of a stack install on this machine and Python."""
    names = [stack] if stack == "tools" else [stack, f"{stack}-deepspeed"]
    text = "".join((ROOT / f"env/locks/{name}.txt").read_text() for name in names)
    entries = re.findall(r"^([\w.-]+)===?([^\s;]+)(?: ; (.*))? \\$", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^\w", text, re.MULTILINE))
    return {name: version for name, version, marker in entries if not marker or Marker(marker).evaluate()}


def required_by(stack: str) -> dict[tuple[str, str], set[str]]:
    """The packages that require each (package, version) of a stack's locks, from uv's `# via`
    comments.
    """
    names = [stack] if stack == "tools" else [stack, f"{stack}-deepspeed"]
    text = "".join((ROOT / f"env/locks/{name}.txt").read_text() for name in names)
    entries = re.findall(
        r"^([\w.-]+)===?([^\s;]+)[^\n]*\n(?: +--hash=\S+(?: \\)?\n)+ +# via((?:\n? +(?:#   )?\S+(?: \(\S+\))?)+)",
        text,
        re.MULTILINE,
    )
    assert len(entries) == len(re.findall(r"^\w", text, re.MULTILINE))
    return {
        (name, version): set(re.findall(r"([\w.-]+)(?: \(\S+\))?$", via, re.MULTILINE))
        for name, version, via in entries
    }


@pytest.mark.parametrize("stack", [*STACKS, "tools"])
def test_lock_matches_pins(stack):
    required = required_by(stack)
    ours = {name: version for (name, version), by in required.items() if "rwkv-training" in by}
    assert ours == pins(stack)
    assert set().union(*required.values()) <= {name for name, _ in required} | {"rwkv-training"}


@pytest.mark.skipif(bool(os.environ.get("PY")), reason="PY selects another Python")
def test_lock_is_complete_and_minimal():
    """Resolve the pins again from the metadata of the installed packages, without a network."""
    lock, extras = locked(HERE), {name: {""} for name in pins(HERE)}
    queue = list(extras)
    while queue:
        name = queue.pop()
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            other = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras[name]):
                continue
            assert requirement.specifier.contains(lock[other], prereleases=True), f"{name} asks for {line}"
            if not extras.get(other, set()) >= {"", *requirement.extras}:
                extras[other] = extras.get(other, set()) | {"", *requirement.extras}
                queue.append(other)
    assert set(lock) == set(extras)


def test_locked_files_have_hashes():
    locks = [f"env/locks/{stack}{part}.txt" for stack in STACKS for part in ("", "-deepspeed")]
    locks += [f"env/locks/{extra}-{stack}.txt" for extra in BESIDE for stack in STACKS]
    locks += ["env/locks/tools.txt", "env/locks/uv.txt"]
    npm = {"env/locks/package.json", "env/locks/package-lock.json"}  # integrity in place of hashes
    assert {path.name for path in (ROOT / "env/locks").iterdir()} == {Path(name).name for name in [*locks, *npm]}
    for name in [*locks, "tests/oracle.txt", "tests/oracle-modern.txt"]:
        entries = re.split(r"^(?=[\w.-]+==)", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]
        assert entries
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries), name


@pytest.mark.skipif(bool(os.environ.get("PY")), reason="PY selects another Python")
def test_installed_versions_match_lock():
    for name, version in locked(HERE).items():
        assert importlib.metadata.version(name).split("+")[0] == version, name


@pytest.mark.parametrize("extra", BESIDE)
@pytest.mark.parametrize("stack", STACKS)
def test_lock_is_beside_the_stack(stack, extra):
    """It is installed into a separate folder, and must not replace packages of the stack."""
    text = (ROOT / f"env/locks/{extra}-{stack}.txt").read_text()
    found = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))
    assert [f"{extra}=={found[extra]}"] == PROJECT["optional-dependencies"][extra]
    stacks = (ROOT / f"env/locks/{stack}.txt").read_text()
    everywhere = re.findall(r"^([\w.-]+)===?\S+ \\$", stacks, re.MULTILINE)  # without a marker
    assert len(everywhere) > 50
    assert set(found) & set(everywhere) <= {"fsspec"}


def test_documented_stack_versions():
    documented = {"torch": "1.13.1", "deepspeed": "0.7.0", "pytorch-lightning": "1.9.5"}
    assert documented.items() <= pins("cu117").items()
    assert pins("cu117")["numpy"] < "2"
    modern = {"torch": "2.13.0", "deepspeed": "0.19.8", "pytorch-lightning": "2.6.6"}
    assert modern.items() <= pins("modern").items()
    for page in ("README.md", "README.zh.md"):
        text = (ROOT / page).read_text(encoding="utf-8").lower()
        assert all(f"{name} {version}" in text for stack in (documented, modern) for name, version in stack.items()), (
            page
        )


def test_exact_version_pins():
    """With `==`, pip would accept torch 2.13.0+cpu of a user's find-links folder as 2.13.0, and
    fail on its hash.
    """
    for name in ("modern", "modern-deepspeed"):
        assert not re.findall(r"^[\w.-]+==(?!=).*", (ROOT / f"env/locks/{name}.txt").read_text(), re.MULTILINE)


def test_conda_environment_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r env/locks/cu117.txt"]
    assert [entry for entry in conda if "=" in entry] == ["python=3.10", "cuda-toolkit=11.7"]  # the documented commands


def test_no_package_index_urls():
    for path in [
        *ROOT.glob("docker/**/*"),
        *ROOT.glob("env/**/*"),
        ROOT / "pyproject.toml",
        *ROOT.glob("tests/oracle*.txt"),
    ]:
        if path.is_file():
            assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host", path.read_text()), path


def test_versions_agree():
    import rwkv

    assert rwkv.__version__ == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
