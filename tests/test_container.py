"""Compose services, workflows and their pins agree with the rest of the project."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import rwkv

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SCRIPTS = {"inspect_data": "inspect", "merge_lora": "merge", "fetch": "model"}
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_services_match_scripts():
    jobs = {SCRIPTS.get(path.stem, path.stem) for path in (ROOT / "scripts").glob("*.py")} - {"demo_corpus"}
    assert set(COMPOSE["services"]) - {"shell", "test"} == jobs
    for name, service in COMPOSE["services"].items():
        assert service["entrypoint"][-2:] == ["docker/entrypoint.sh", name]


def test_services_are_read_only():
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert [volume.split(":")[-1] == "ro" for volume in service["volumes"]] == [True, False, False]
        assert service["user"] == "${UID:-1000}:${GID:-1000}"


def entries(node: yaml.MappingNode) -> dict[str, yaml.Node]:
    return {key.value: value for key, value in node.value}


def overrides(path: str) -> dict[str, dict[str, yaml.Node]]:
    """Services of an override file: their nodes, as SafeLoader does not support !reset."""
    services = entries(yaml.compose((ROOT / path).read_text()))["services"]
    return {name: entries(service) for name, service in entries(services).items()}


def test_cpu_compose_removes_gpu():
    services = overrides("compose.cpu.yaml")
    assert set(services) == {name for name, service in COMPOSE["services"].items() if "deploy" in service}
    assert {service["deploy"].tag for service in services.values()} == {"!reset"}


def test_compose_of_image_tests():
    services = overrides("tests/image/compose.engine.yaml")
    assert set(services) == set(COMPOSE["services"])
    assert {service["ulimits"].tag for service in services.values()} == {"!reset"}
    assert {service["network_mode"].value for service in services.values()} == {"none"}
    assert {name for name, service in services.items() if "ports" in service} == {"serve"}


def steps(workflow: Path) -> list[dict]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_permissions(workflow):
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {}
    assert "pull_request_target" not in content[True]  # YAML reads `on` as true
    for job in content["jobs"].values():
        writes = {name for name, right in job["permissions"].items() if right == "write"}
        assert writes <= ({"packages"} if workflow.stem == "release" else set())
        assert 0 < job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert "${{" not in step.get("run", ""), "pass values through the environment"
            if "actions/checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False


def test_workflow_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for workflow in WORKFLOWS:
        for step in steps(workflow):
            if command := re.match(r"make ((?:[a-z-]+ ?)+)", step.get("run", "")):
                for target in command[1].split():
                    assert re.search(rf"^{target}( [a-z ]+)?:", makefile, re.MULTILINE), target
            if command := re.match(r"docker compose run --rm -T (\w+)", step.get("run", "")):
                assert command[1] in COMPOSE["services"]


def output(step: dict, folder: Path, **environment: str) -> tuple[int, str]:
    """Exit status of a workflow step and what it writes to GITHUB_OUTPUT; docker is a stub that
    prints two tags.
    """
    (folder / "docker").write_text("#!/bin/bash\nprintf 'a\\nb\\n'\n")
    (folder / "docker").chmod(0o755)
    written = folder / "output"
    written.write_text("")
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "GITHUB_OUTPUT": str(written)}
    result = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", step["run"]], cwd=ROOT, env=environment, capture_output=True, check=False
    )
    return result.returncode, written.read_text()


def test_release_tags(tmp_path):
    action = yaml.safe_load((ROOT / ".github/actions/image/action.yml").read_text())
    project = next(step for step in action["runs"]["steps"] if step.get("id") == "project")
    status, version = output(project, tmp_path)
    assert (status, version) == (0, f"version={rwkv.__version__}\n")
    tags = next(step for step in steps(ROOT / ".github/workflows/release.yml") if step.get("id") == "tags")
    variables = {"STACK": "cu117", "REGISTRY": "registry.example/someone", "VERSION": "1.2.3"}
    prefix = "registry.example/someone/rwkv-training:"
    expected = f"host=registry.example\ntags<<END\n{prefix}a\n{prefix}b\nEND\n"
    assert output(tags, tmp_path, **variables, GITHUB_REF_NAME="v1.2.3") == (0, expected)
    assert output(tags, tmp_path, **variables, GITHUB_REF_NAME="v1.2.4") == (1, "")


@pytest.fixture
def pinned(tmp_path):
    """Run env/pin.sh on a copy of the checkout, with repositories in a local folder instead of
    GitHub's, and a stub for docker.
    """
    copy = tmp_path / "copy"
    for folder in ("docker", "env", ".github"):
        shutil.copytree(ROOT / folder, copy / folder)
    shutil.copy(ROOT / "compose.yaml", copy)
    (tmp_path / "bin").mkdir()

    def run(docker: str):
        (tmp_path / "bin/docker").write_text(f"#!/bin/bash\n{docker}\n")
        (tmp_path / "bin/docker").chmod(0o755)
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{tmp_path}/github/.insteadOf",
            "GIT_CONFIG_VALUE_0": "https://github.com/",
        }
        return subprocess.run(
            ["bash", "env/pin.sh"], cwd=copy, capture_output=True, text=True, env=environment, check=False
        )

    run.folder, run.github = copy, tmp_path / "github"
    return run


def actions(folder: Path) -> set[str]:
    files = [*(folder / ".github").rglob("*.yml")]
    return set(re.findall(r"uses: ([a-z-]+/.*)", "".join(path.read_text() for path in files)))


def tagged_repository(folder: Path, tags: set[str]) -> str:
    """Create a repository with a commit and annotated tags of it, whose own hashes differ; returns
    the commit.
    """
    folder.mkdir(parents=True)

    def git(*arguments: str) -> str:
        name = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        command = ["git", "-C", str(folder), *name, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "x")
    for tag in tags:
        git("tag", "--annotate", "--message", tag, tag)
    return git("rev-parse", "HEAD")


def test_pin_writes_commits_and_digests(pinned):
    digest, before = "sha256:" + "b" * 64, actions(pinned.folder)
    commit = tagged_repository(pinned.github / "one", {re.search(r"v[\d.]+$", name)[0] for name in before})
    for name in before:  # every action is in this repository
        repository = pinned.github.joinpath(*name.partition("@")[0].split("/")[:2])
        repository.parent.mkdir(exist_ok=True)
        if not repository.exists():
            repository.symlink_to(pinned.github / "one")
    for _ in range(2):  # the second run reads what the first has written
        assert pinned(f"echo {digest}").returncode == 0
        assert actions(pinned.folder) == {
            re.sub(r"@(?:[0-9a-f]{40} # )?(v\d+)", rf"@{commit} # \1", name) for name in before
        }
        assert f"ARG BASE_IMAGE=ubuntu:22.04@{digest}\n" in (pinned.folder / "docker/Dockerfile").read_text()
        assert f"${{BASE_IMAGE:-ubuntu:22.04@{digest}}}" in (pinned.folder / "compose.yaml").read_text()


def test_failed_pin_changes_nothing(pinned):
    before = {
        path: path.read_text() for path in pinned.folder.rglob("*") if path.is_file() and path.parent.name != "bin"
    }
    result = pinned("exit 1")  # and no repositories
    assert result.returncode == 1
    assert result.stderr.count("could not be looked up") == len(actions(ROOT)) + 1
    assert {path: path.read_text() for path in before} == before


@pytest.fixture
def engine(tmp_path):
    """Run docker/engine.sh with stubs for docker, id and grep."""

    def run(docker: str, uid: str = "0", debian: str = "exit 0", command=("bash", "-c", "echo ran with $ENGINE")):
        for name, body in (("docker", docker), ("id", f"echo {uid}"), ("grep", debian)):
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DOCKER_WORK": str(tmp_path / "work")}
        return subprocess.run(
            [ROOT / "docker/engine.sh", *command], capture_output=True, text=True, env=environment, check=False
        )

    return run


def test_engine_disk_space(engine, tmp_path):
    (tmp_path / "df").write_text("#!/bin/bash\necho Avail; echo 12\n")
    (tmp_path / "df").chmod(0o755)
    result = engine("exit 1")
    work = tmp_path / "work"
    assert (result.returncode, result.stdout) == (75, "")
    assert result.stderr.startswith(f"no container engine: building an image needs 20 GB in {work}, and 12 GB are free")
    assert "DOCKER_WORK" in result.stderr


def test_running_engine_used(engine):
    result = engine("echo 27.0.1")
    assert (result.returncode, result.stdout) == (0, "ran with the machine's Docker 27.0.1\n")


@pytest.mark.parametrize(
    ("options", "reason"), [({"uid": "1000"}, "needs root"), ({"debian": "exit 1"}, "needs Debian")]
)
def test_no_engine(engine, options, reason):
    result = engine("exit 1", **options)
    assert (result.returncode, result.stdout) == (75, "")
    assert result.stderr.startswith("no container engine: docker is not installed or not running")
    assert reason in result.stderr
