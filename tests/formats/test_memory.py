"""Exports do not hold a whole model in memory."""

import json
from pathlib import Path

import pytest
import torch

from rwkv import checkpoint
from rwkv.models import RWKV, v7
from tests.formats.oracle import run

# Prints by how much the peak of the process's memory grew, mapped pages included, in bytes.
PROGRAM = """
import json, pathlib, sys
from rwkv import export, export_folder
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10
path, kinds, small = json.loads(sys.argv[1])
def write(path, kind, dtype, output):
    source = export.open_source(path)
    if kind == "fla":
        export_folder.export_folder(source, output, kind, dtype, 0, 1024, 10**7)
    else:
        export.export_file(source, output, kind, dtype, 0, {})
found = {}
for kind, dtype in kinds:
    output = pathlib.Path(path).parent / f"out-{kind}"
    write(small, kind, dtype, output.with_name(f"small-{kind}"))  # what does not depend on the size
    before = peak()
    write(path, kind, dtype, output)
    found[kind] = peak() - before
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_does_not_grow_with_the_model(model_file, tmp_path):
    model = RWKV(v7.Sizes(n_layer=20, n_embd=256, vocab_size=300))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    checkpoint.save_model(tmp_path / "large.pth", model, {})
    size = (tmp_path / "large.pth").stat().st_size
    kinds = [["pth", "fp16"], ["rwkv.cpp", "fp32"], ["gguf", "q8_0"]]
    arguments = json.dumps([str(tmp_path / "large.pth"), kinds, str(model_file("7", True))])
    found = run(PROGRAM, arguments)
    assert size > 6e7
    for kind, grown in found.items():
        # a whole copy in bf16 would add a half; torch's allocator and Python's keep some
        assert grown < 0.6 * size, (kind, grown, size)
