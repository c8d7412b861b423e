"""What differs between the stacks is met in rwkv/compat.py, and seen nowhere else."""

import re
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl

from rwkv import compat


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])  # fp16 needs a GPU
@pytest.mark.parametrize("alone", [True, False])
def test_lightning_takes_the_options_without_a_warning(precision, alone):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1 if alone else 2,
            logger=False,
            enable_checkpointing=False,
            **compat.trainer_options(precision, None if alone else "ddp_find_unused_parameters_false"),
        )
    assert ("bf16" in str(trainer.precision)) == (precision == "bf16")
    assert trainer.world_size == (1 if alone else 2)


def interrupted(module):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(1)


def test_ctrl_c_comes_back_and_can_be_pressed_again():
    before = signal.getsignal(signal.SIGINT)
    compat.fit(SimpleNamespace(fit=interrupted), None)  # as Lightning 2 ends
    assert signal.getsignal(signal.SIGINT) is before


def test_any_other_exit_is_an_exit():
    with pytest.raises(SystemExit):
        compat.fit(SimpleNamespace(fit=sys.exit), 3)


def test_the_extension_builder_makes_no_remarks():
    program = "from rwkv import compat; print(compat.cpp_extension().__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("torch.utils.cpp_extension\n", "")


def test_no_other_module_asks_for_a_version(root):
    for path in sorted((root / "rwkv").rglob("*.py")):
        asks = re.findall(
            r"version_info|importlib|ImportError|ModuleNotFoundError|__version__\S* *(?:[<>]|==|!=)", path.read_text(encoding="utf-8")
        )
        assert not asks or path.name in ("compat.py", "doctor.py", "manifest.py"), path  # these two report versions


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_what_is_absent_is_there_again():
    # peft and safetensors stand for any package: installed, and nothing here has imported peft.
    out = run("""
import importlib.metadata, importlib.util, sys
import safetensors
from rwkv import compat
def there(name):
    try:
        importlib.metadata.version(name), importlib.import_module(name)
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
        return False
    return importlib.util.find_spec(name) is not None
assert "peft" not in sys.modules
try:
    with compat.absent("peft", "safetensors"):
        inside = there("peft"), there("safetensors")
        try:
            importlib.metadata.version("peft")
        except importlib.metadata.PackageNotFoundError:
            pass
        else:
            raise AssertionError
        list(importlib.metadata.distributions())
        raise KeyError
except KeyError:
    print(*inside, there("peft"))
""")
    assert out.split() == ["False", "True", "True"]


STEP = """
import sys, rwkv.train, torch
from torch.utils.checkpoint import checkpoint
model = torch.nn.Linear(2, 2)
adam = torch.optim.Adam(model.parameters())
def step():
    checkpoint(model, torch.ones(1, 2), use_reentrant=False).sum().backward()
    adam.step()
    adam.zero_grad()
step()
assert "torch._dynamo.eval_frame" not in sys.modules
"""
needs_compiler = pytest.mark.skipif(compat.stack() == "cu117", reason="torch 1.13.1 has none")


@needs_compiler
@pytest.mark.parametrize("way", ["", "import torch._dynamo.config", "from torch._dynamo.utils import counters", "torch._dynamo.reset()"])
def test_who_compiles_gets_the_compiler_that_was_left_out(way):
    out = run(f"""{STEP}
{way}
compiled = torch.compile(model, backend="eager")
x = torch.ones(3, 2)
assert torch.equal(compiled(x), model(x)) and isinstance(compiled, torch._dynamo.OptimizedModule)
step()
from torch._dynamo import config, utils
again = [config is sys.modules["torch._dynamo.config"], utils is torch._dynamo.utils, torch._dynamo.utils.counters["frames"]["ok"] > 0]
print(*again, type(torch._dynamo).__name__)
""")
    assert out.split() == ["True", "True", "True", "module"]


@needs_compiler
def test_the_compiler_has_no_more_names_than_it_has():
    out = run("""
import rwkv.train
for line in ("from torch._dynamo import nothing", "import torch._dynamo.nothing"):
    try:
        exec(line)
    except ImportError as error:
        print(type(error).__name__)
""")
    assert out.split() == ["ImportError", "ModuleNotFoundError"]
