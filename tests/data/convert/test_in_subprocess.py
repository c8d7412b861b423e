"""Conversion in a subprocess behaves like conversion in this process."""

import os
import signal
import subprocess
import sys

import pytest

from rwkv.config import ConvertConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert import in_subprocess
from rwkv.data.convert.pipeline import convert
from rwkv.errors import UserError
from tests.waiting import wait_until

CHAT = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}


def test_same_files_and_report(write_jsonl, tmp_path):
    source = write_jsonl(*[CHAT] * 20)
    here = convert(ConvertConfig(input=str(source), output_prefix=str(tmp_path / "here"), workers=2))
    report = in_subprocess.convert(ConvertConfig(input=str(source), output_prefix=str(tmp_path / "there"), workers=2))
    assert report == here.report
    for end in ("document.bin", "document.idx", "document.json", "mask.bin"):
        assert (tmp_path / f"there_text_{end}").read_bytes() == (tmp_path / f"here_text_{end}").read_bytes()


def test_errors_propagate(write_jsonl, tmp_path):
    config = ConvertConfig(input=str(write_jsonl({"text": "a"}, {"text": 3})), output_prefix=str(tmp_path / "p"))
    with pytest.raises(
        UserError, match=r"text.jsonl, line 2: \"text\" is of type int, not a string\. Correct this record"
    ):
        in_subprocess.convert(config)


def test_no_fork_with_threads(write_jsonl, tmp_path):
    """The training process has threads: it may only start processes that exec immediately."""
    program = f"""
import os, torch
torch.rand(300, 300) @ torch.rand(300, 300)
os.register_at_fork(before=lambda: print("forked"))
from rwkv.config import ConvertConfig
from rwkv.data.convert import in_subprocess
in_subprocess.convert(ConvertConfig(input={str(write_jsonl({"text": "a"}))!r}, output_prefix={str(tmp_path / "p")!r}, workers=3))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == ""
    assert len(Dataset(tmp_path / "p_text_document")) == 1


def test_ends_with_parent(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = f"""
from rwkv.config import ConvertConfig
from rwkv.data.convert import in_subprocess
in_subprocess.convert(ConvertConfig(input={str(pipe)!r}, input_format="jsonl", output_prefix={str(tmp_path / "p")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    with open(pipe, "wb", 0) as stream:  # the conversion waits for more input
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

        def reader_has_ended():
            try:
                stream.write(b" ")
            except BrokenPipeError:
                return True

        wait_until(reader_has_ended)
