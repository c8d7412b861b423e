"""Multi-node launch: the command of each launcher, and training on two hosts (network namespaces)
equals one process.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rwkv import compat
from tests.forked import free_port
from tests.waiting import LIMIT, wait_until

COMMAND = "-m torch.distributed.run --nnodes {} --node_rank {} --nproc_per_node {} --master_addr {} --master_port {} scripts/lora.py --lora_r 4 --num_nodes {} --devices {}"
FLAGS = ["--", "scripts/lora.py", "--lora_r", "4"]
STEPS = 100  # of the run on two hosts: enough for one to die in between


def launch(root, *arguments, status=0, **environment) -> str:
    """The command that launch.sh would run, or its error."""
    inherited = {name: os.environ[name] for name in ("HOME",) if name in os.environ} | {
        "PATH": os.environ["PATH"],
        "PY": "python",
    }
    result = subprocess.run(
        [str(word) for word in (root / "scripts/launch.sh", "--print", *arguments)],
        capture_output=True,
        text=True,
        env=inherited | environment,
        check=False,
    )
    assert result.returncode == status, result.stderr
    return result.stderr if status else result.stdout


def command(nodes, node, devices, master, port=29500) -> str:
    return "python " + COMMAND.format(nodes, node, devices, master, port, nodes, devices) + "\n"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Stub programs at the front of PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(**programs) -> None:
        for name, text in programs.items():
            path = tmp_path / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)

    return make


def test_torchrun_per_host(root):
    arguments = ("--nodes", 3, "--node", 2, "--master", "10.0.0.1")
    assert launch(root, *arguments, "--devices", 8, *FLAGS) == command(3, 2, 8, "10.0.0.1")


def test_one_process_per_gpu(root, commands):
    commands(nvidia_smi="echo 'GPU 0: A (UUID: x)'; echo '  MIG 1g Device 0: (UUID: y)'; echo 'GPU 1: A (UUID: z)'")
    arguments = ("--nodes", 1, "--node", 0, "--master", "localhost", "--port", 1234)
    assert launch(root, *arguments, *FLAGS) == command(1, 0, 2, "localhost", 1234)
    for visible, count in {"3": 1, "0,2,5": 3, "GPU-1f, MIG-2e": 2, "": 1, "-1": 1, "1,-1,2": 1}.items():
        assert launch(root, *arguments, *FLAGS, CUDA_VISIBLE_DEVICES=visible) == command(1, 0, count, "localhost", 1234)


def test_hostfile_starts_every_host(root, commands, tmp_path):
    commands(reach='shift; exec sh -c "$*"')
    hosts = tmp_path / "hosts"
    hosts.write_text("# the rack\nalpha slots=4\n\nbeta slots=4")
    printed = launch(root, "--hostfile", hosts, "--", "scripts/lora.py", "--lora_r", "4", SSH="reach")
    assert printed == command(2, 0, 4, "alpha") + command(2, 1, 4, "alpha")


def test_slurm(root, commands):
    commands(scontrol='test "$*" = "show hostnames node[7-8]" && printf "node7\\nnode8\\n"')
    slurm = {"SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "8"}
    assert launch(root, *FLAGS, **slurm, SLURM_STEP_ID="0", SLURM_LOCALID="0") == command(2, 1, 8, "node7")
    assert "one: --ntasks-per-node 1" in launch(root, *FLAGS, status=2, **slurm, SLURM_STEP_ID="0", SLURM_LOCALID="1")
    assert "of 2 machines only; start it with srun" in launch(root, *FLAGS, status=2, **slurm)


def test_kubeflow(root):
    newer = {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "job-master-0",
        "PET_MASTER_PORT": "23456",
        "PET_NPROC_PER_NODE": "4",
    }
    assert launch(root, *FLAGS, **newer) == command(2, 1, 4, "job-master-0", 23456)
    older = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    assert launch(root, "--devices", 1, *FLAGS, **older) == command(2, 0, 1, "job-master-0", 23456)


def test_kubernetes_manifest_flags_exist(root):
    job = yaml.safe_load((root / "docker/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        container = replica["template"]["spec"]["containers"][0]
        assert container["name"] == "pytorch"  # the operator looks for this name
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
        program, dashes, script, *flags = container["command"]
        assert (root / program).stat().st_mode & 0o111
        assert dashes == "--"
        result = subprocess.run(
            [sys.executable, root / script, *flags, "--print_config"], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in replica["template"]["spec"]["volumes"]}


def test_kubernetes_command_without_compiler(root, make_base, make_data, tmp_path):
    """With a PATH like the image's: only `python`, no ninja, no g++. (Shortened, with two processes
    for the node's GPUs.)
    """
    job = yaml.safe_load((root / "docker/pytorchjob.yaml").read_text())
    container = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "wc"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tools / "python").chmod(0o755)
    files = {"base.pth": make_base(), "data_text_document": make_data(400), "out": tmp_path / "out"}
    arguments = [re.sub("/run-files/(.*)", lambda found: str(files[found[1]]), word) for word in container["command"]]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    environment |= {
        "PET_NNODES": "1",
        "PET_NODE_RANK": "0",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()),
        "PET_NPROC_PER_NODE": "2",
    }
    environment |= {
        "PATH": str(tools),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "compiled"),
    }
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    if compat.stack() == "cu117":  # its DeepSpeed trains on GPUs only
        environment["PYTHONPATH"] = os.pathsep.join(
            map(str, (root, root / "tests/train", root / "tests/train/fake_gpu"))
        )
    overrides = ["--ctx_len=8", "--epoch_steps=2", "--magic_prime=-1", "--accelerator=cpu"]
    result = subprocess.run(
        [*arguments, *overrides], cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(losses(tmp_path / "out")) == 2
    assert not (tmp_path / "compiled").exists()


INVALID_ARGUMENTS = [
    ([], "nothing to launch"),
    (["--", "x.py"], "pass --nodes, --node and --master, or --hostfile"),
    (["--nodes", "2", "--node", "2", "--master", "a", "--", "x.py"], "--node 2 of --nodes 2"),
    (["--nods", "2"], "--nods is not a flag"),
    (["--hostfile", "none", "--", "x.py"], "none: no such file"),
]


@pytest.mark.parametrize(("arguments", "message"), INVALID_ARGUMENTS)
def test_invalid_launch(root, arguments, message):
    assert message in launch(root, *arguments, status=2)


def test_invalid_hostfile(root, tmp_path):
    hosts = tmp_path / "hosts"
    for text, message in (
        ("a slots=0\n", "expected lines such as 'address slots=N'"),
        ("a slots=1\nb slots=2\n", "slots of b and a differ"),
        ("#\n", "no machine listed"),
        (
            "-oProxyCommand=x slots=1\n",
            "-oProxyCommand=x is not a host name or address",
        ),  # ssh would read it as an option
    ):
        hosts.write_text(text)
        assert message in launch(root, "--hostfile", hosts, "--", "x.py", status=2)


def _ip(*arguments) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")


@pytest.fixture(scope="module")
def hosts():
    """Two hosts, as network namespaces with one link between them: name to address."""
    names = [f"rwkv{os.getpid()}{letter}" for letter in "ab"]
    interfaces = [f"w{os.getpid()}{letter}" for letter in "ab"]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                _ip("netns", "add", name)
                stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True, check=False)
            _ip("link", "add", interfaces[0], "type", "veth", "peer", "name", interfaces[1])
            for i, (name, interface) in enumerate(zip(names, interfaces, strict=True)):
                _ip("link", "set", interface, "netns", name, "name", "veth0")
                _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "veth0")
                for link in ("lo", "veth0"):
                    _ip("-n", name, "link", "set", link, "up")
        except (OSError, FileNotFoundError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield {f"10.77.0.{i + 1}": name for i, name in enumerate(names)}


def ranks_on(host: str) -> list[int]:
    """Processes of a host that run finetune.py, not its launchers."""
    pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=True).stdout.split()
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            started = any(word.endswith(b"finetune.py") for word in words)
            if started and not any(b"torch.distributed" in word or b"launch.sh" in word for word in words):
                found.append(int(pid))
    return found


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def flags(make_base, make_data, tmp_path):
    def make(folder: str, steps: int, *more) -> list[str]:
        arguments = [
            "--load_model",
            make_base(),
            "--data_file",
            make_data(400),
            "--proj_dir",
            tmp_path / folder,
            "--ctx_len",
            8,
            "--magic_prime",
            -1,
        ]
        arguments += [
            "--epoch_count",
            1,
            "--epoch_steps",
            steps,
            "--random_seed",
            1,
            "--accelerator",
            "cpu",
            "--lr_init",
            1e-2,
        ]
        arguments += ["--precision", "fp32", *more]
        return [str(word) for word in arguments]

    return make


@pytest.fixture
def launch_environment(monkeypatch):
    monkeypatch.setenv("PY", sys.executable)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "veth0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_dead_host_then_resume(root, hosts, launch_environment, commands, flags, script, two_ranks, tmp_path):
    """A run on two hosts, of which one dies, continues with --hostfile. It equals runs on one
    host.
    """
    first_host, second_host = hosts.values()
    script("finetune.py", *flags("one", STEPS, "--micro_bsz", 4))
    two_ranks("finetune.py", *flags("uninterrupted", STEPS, "--micro_bsz", 2), GLOO_SOCKET_IFNAME="lo")
    training = ["--", "scripts/finetune.py", *flags("run", STEPS, "--micro_bsz", 2, "--save_every", 10)]

    def start_on(i: int, name: str) -> subprocess.Popen:
        arguments = ["--nodes", 2, "--node", i, "--master", next(iter(hosts)), "--devices", 1, *training]
        command = [str(word) for word in ("ip", "netns", "exec", name, root / "scripts/launch.sh", *arguments)]
        with open(tmp_path / f"{name}.txt", "w") as log:
            return subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    first, second = (start_on(i, name) for i, name in enumerate(hosts.values()))
    # Kill every process of a host, as when a machine dies; the rank is in another session than the
    # launcher. It is looked up while it starts, as the run ends a second after its first state.
    rank = wait_until(lambda: ranks_on(second_host), second)
    wait_until(lambda: list((tmp_path / "run/resume").glob("step-*.pt")), first)
    for process in rank:
        os.kill(process, signal.SIGKILL)
    os.killpg(second.pid, signal.SIGKILL)
    # the other host notices
    wait_until(lambda: "failed (exitcode: 1)" in (tmp_path / f"{first_host}.txt").read_text())
    # torchrun of torch 1.13.1 would wait five minutes for the lost host
    os.killpg(first.pid, signal.SIGKILL)
    for process in (first, second):
        process.wait(LIMIT)
    assert 0 < len(losses(tmp_path / "run")) < STEPS

    cases = "\n".join(f'{address}) exec ip netns exec {name} sh -c "$*";;' for address, name in hosts.items())
    commands(reach=f"host=$1; shift; case $host in\n{cases}\nesac")
    (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for address in hosts))
    result = subprocess.run(
        [root / "scripts/launch.sh", "--hostfile", tmp_path / "hosts", *training],
        cwd=root,
        env=os.environ | {"SSH": "reach"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "continuing from step" in result.stdout + result.stderr
    # bit-identical to an uninterrupted run on one host
    assert losses(tmp_path / "run") == losses(tmp_path / "uninterrupted")
    # one process: different summation order
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
