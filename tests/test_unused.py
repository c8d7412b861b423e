"""What training leaves out is there for whoever asks for it."""

import subprocess
import sys

import pytest

from rwkv import compat


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_what_is_absent_is_there_again():
    # peft and safetensors stand for any package: installed, and nothing here has imported peft.
    out = run("""
import importlib.metadata, importlib.util, sys
import safetensors
from rwkv import unused
def there(name):
    try:
        importlib.metadata.version(name), importlib.import_module(name)
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
        return False
    return importlib.util.find_spec(name) is not None
assert "peft" not in sys.modules
try:
    with unused.absent("peft", "safetensors"):
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
@pytest.mark.parametrize(
    "way", ["", "import torch._dynamo.config", "from torch._dynamo.utils import counters", "torch._dynamo.reset()"]
)
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
