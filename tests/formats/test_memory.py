"""Exports do not hold a whole model in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from rwkv import checkpoint
from rwkv.models import RWKV, v7

ROOT = Path(__file__).parents[2]
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


def test_memory_does_not_grow_with_the_model(model_file, tmp_path):
    model = RWKV(v7.Sizes(n_layer=40, n_embd=256, vocab_size=300))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    checkpoint.save_model(tmp_path / "large.pth", model, {})
    size = (tmp_path / "large.pth").stat().st_size
    kinds = [["pth", "fp16"], ["rwkv.cpp", "fp32"], ["gguf", "q8_0"]]
    arguments = json.dumps([str(tmp_path / "large.pth"), kinds, str(model_file("7", True))])
    # Tensors of 64 KiB and more are mapped, as those of real models: holes in glibc's heap are not
    # measured (docs/decisions/012), which differ from run to run.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PROGRAM, arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert size > 1e8
    for kind, grown in found.items():
        # a whole copy in fp16 would add a half; pages of libraries and of the files are a third
        assert grown < 0.6 * size, (kind, grown, size)
