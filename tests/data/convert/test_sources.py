"""Input files: splits, order, names with commas, pipes, unreadable files."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pyarrow
import pytest

from rwkv.data import provenance
from rwkv.data.binidx import Dataset
from rwkv.data.convert import sources
from rwkv.errors import UserError
from tests.data.convert.files import SCRIPT, converted, line, write


def names_of(spec, **flags):
    return [path.name for path in (source.path for source in sources.find(str(spec), **flags).sources)]


SHARDED = (
    "data/train-00000-of-00002.jsonl",
    "data/train-00001-of-00002.jsonl",
    "data/validation-00000-of-00001.jsonl",
    "data/test-00000-of-00001.jsonl",
)


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (SHARDED, "", SHARDED[:2]),
        (SHARDED, "validation", SHARDED[2:3]),
        (SHARDED, "dev", SHARDED[2:3]),
        (SHARDED, "test,validation", SHARDED[2:]),
        (SHARDED, "all", SHARDED),
        (("train.jsonl", "dev.jsonl", "eval.jsonl"), "", ("train.jsonl",)),
        (("train.jsonl", "valid.jsonl"), "validation", ("valid.jsonl",)),
        (("squad-train.jsonl", "squad-validation.jsonl"), "", ("squad-train.jsonl",)),
        (("train/a.jsonl", "train/b.jsonl", "test/a.jsonl"), "", ("train/a.jsonl", "train/b.jsonl")),
        (("train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl"), "", ("train_sft-00000-of-00001.jsonl",)),
        (("训练集.jsonl", "测试集.jsonl"), "", ("训练集.jsonl",)),
        (("train.jsonl", "TEST.JSONL"), "test", ("TEST.JSONL",)),
        (("train.jsonl", "test.jsonl", "LICENSE.txt"), "", ("train.jsonl",)),
        (("training.jsonl", "more.jsonl"), "", ("training.jsonl", "more.jsonl")),  # no other split
        (
            ("a.txt", "b.txt", "The Test.txt", "Night train.txt", "c.txt"),
            "",
            ("a.txt", "b.txt", "c.txt", "Night train.txt", "The Test.txt"),
        ),
        (("trainset.jsonl", "TestSet.jsonl"), "", ("trainset.jsonl",)),
        (("TrainData.jsonl", "TestData.jsonl"), "test", ("TestData.jsonl",)),
        (("train.jsonl", "held_out.jsonl"), "", ("train.jsonl",)),
        (("train.jsonl", "hold-out.jsonl"), "validation", ("hold-out.jsonl",)),
        (("学習.jsonl", "検証.jsonl"), "", ("学習.jsonl",)),
        (("protest.txt", "latest.txt", "strain.txt"), "", ("protest.txt", "latest.txt", "strain.txt")),
    ],
)
def test_default_split_is_train(tmp_path, names, split, expected):
    write(tmp_path, *names)
    result = sources.find(str(tmp_path), split=split)
    assert sorted(str(source.path.relative_to(tmp_path)) for source in result.sources) == sorted(expected)
    if result.omitted:
        assert any(
            note.startswith("splits: ") and all(name in note for name in result.omitted) for note in result.notes
        )
    globbed = sources.find(f"{tmp_path}/**/*.*", split=split)
    assert sorted(source.path for source in globbed.sources) == sorted(source.path for source in result.sources)


def test_hub_readme_splits(tmp_path):
    write(tmp_path, "one.jsonl", "two.jsonl", "three.jsonl")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [one.jsonl, th*.jsonl]\n  - split: test\n    path: two.jsonl\n---\n# Text\n"
    )
    assert names_of(tmp_path) == ["one.jsonl", "three.jsonl"]
    assert names_of(tmp_path, split="test") == ["two.jsonl"]
    # the other forms of data_files, in which two.jsonl is not for training
    for files in (
        "\n    train: t*e.jsonl\n    test: two.jsonl",
        " th*.jsonl",
        "\n  - split: train\n    path: three.jsonl",
    ):
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:{files}\n---\n")
        assert names_of(tmp_path) == ["three.jsonl"], files


def test_missing_or_ambiguous_split(tmp_path):
    write(tmp_path, "hub/train.jsonl", "hub/test.jsonl", "x.jsonl", "only/dev.jsonl", "only/test.jsonl", "two/train_a-00000-of-00001.jsonl",
          "two/train_b-00000-of-00001.jsonl", "two/test_a-00000-of-00001.jsonl")  # fmt: skip
    for spec, split, message in (
        ("hub", "holdout", r"--split holdout: no such split; there are test, train"),
        ("x.jsonl", "train", r"--split train: .*x.jsonl has no splits"),
        ("only", "", r"only: has no split for training \(dev, test\); choose with --split NAME"),
        ("two", "", r"two: has several splits for training"),
    ):
        with pytest.raises(UserError, match=message):
            sources.find(str(tmp_path / spec), split=split)
    assert names_of(tmp_path / "two", split="train_b") == ["train_b-00000-of-00001.jsonl"]


def test_splits_in_manifest_and_output(tmp_path, capsys):
    write(tmp_path / "hub", *SHARDED)
    converted(tmp_path / "hub", tmp_path / "p")
    assert provenance.read(tmp_path / "p_text_document")["splits"] == {
        "used": ["train"],
        "omitted": ["test", "validation"],
    }
    printed = capsys.readouterr().err
    assert "order: train-00000-of-00002.jsonl, train-00001-of-00002.jsonl" in printed
    assert "splits: train used; test, validation omitted" in printed
    assert "--val_file" in printed


def arrow(path):
    table = pyarrow.table({"text": ["a"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)


@pytest.mark.parametrize(
    ("state", "splits"),
    [
        ({"_data_files": [{"filename": "secret.txt"}]}, None),
        ({"_data_files": [{"filename": "../outside.arrow"}]}, None),
        ({"_data_files": [{"filename": "/etc/hostname.arrow"}]}, None),
        ({"_data_files": [{"filename": "sub/x.arrow"}]}, None),
        ({"_data_files": [{"filename": 3}]}, None),
        ({"_data_files": ["x.arrow"]}, None),
        ({"_data_files": {}}, None),
        ([1], None),
        (None, ["."]),
        (None, [".."]),
        (None, ["../b"]),
        (None, ["train", 3]),
        (None, [""]),
        (None, "train"),
        (None, ["missing"]),
    ],
)
def test_datasets_folder_path_traversal(tmp_path, state, splits):
    arrow(tmp_path / "ds/data.arrow")
    (tmp_path / "outside.arrow").write_bytes((tmp_path / "ds/data.arrow").read_bytes())
    (tmp_path / "ds/secret.txt").write_text("secret")
    if state is not None:
        (tmp_path / "ds/state.json").write_text(json.dumps(state))
    if splits is not None:
        (tmp_path / "ds/dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(UserError, match=r"state.json|dataset_dict.json"):
        sources.find(str(tmp_path / "ds"), split="all")


def test_natural_chapter_order(tmp_path):
    names = ["ch1.txt", "ch2.txt", "Ch10.txt", "第1章.txt", "第2章.txt", "第10章.txt", "第一百章.txt"]
    write(tmp_path, *names)
    assert names_of(tmp_path) == names
    chinese = [
        "第一章",
        "第二章",
        "第九章",
        "第十章",
        "第十一章",
        "第十九章",
        "第二十章",
        "第二十一章",
        "第一百零二章",
        "第一百一十章",
        "第一千章",
    ]
    write(tmp_path / "b", *(f"{name}.txt" for name in chinese))
    assert names_of(tmp_path / "b") == [f"{name}.txt" for name in chinese]
    write(tmp_path / "c", "卷十/2.txt", "卷二/10.txt", "卷二/9.txt", "１０.txt", "９.txt")
    assert [str(source.path.relative_to(tmp_path / "c")) for source in sources.find(str(tmp_path / "c")).sources] == [
        "9.txt".replace("9", "９"), "10.txt".replace("10", "１０"), "卷二/9.txt", "卷二/10.txt", "卷十/2.txt"]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        ["一、开端", "二、发展", "三、高潮", "十、结局"],
        ["故事一", "故事二", "故事三", "故事十"],
        ["红楼梦（上）", "红楼梦（中）", "红楼梦（下）"],
        ["第壹章", "第贰章", "第拾章", "第廿一章"],
        ["①", "②", "⑩"],
        ["Chapter I", "Chapter II", "Chapter V", "Chapter IX", "Chapter X", "Chapter XI"],
        ["Part A", "Part B", "Part C", "Part D"],
        ["chapter one", "chapter two", "chapter ten", "chapter twenty", "chapter twenty-one"],
        ["chapter_1", "Chapter 2", "chapter-3", "chapter 10"],
        ["1", "1.5", "1.10", "2"],
        ["楔子", "第一章", "第二章", "尾声"],
        ["Prologue", "Chapter 1", "Chapter 2", "Epilogue"],
        ["book a", "book b"],
    ],
)
def test_numbers_in_names(tmp_path, names):
    write(tmp_path, *(f"{name}.txt" for name in reversed(names)))
    assert names_of(tmp_path) == [f"{name}.txt" for name in names]


def test_names_with_commas_spaces_and_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a b%20c,d.jsonl", "other.jsonl", "x.jsonl", "with,comma/1.jsonl", "e.jsonl ")
    assert names_of("a b%20c,d.jsonl,other.jsonl") == ["a b%20c,d.jsonl", "other.jsonl"]
    assert names_of("other.jsonl, a b%20c,d.jsonl ,x.jsonl") == ["other.jsonl", "a b%20c,d.jsonl", "x.jsonl"]
    assert names_of("~/x.jsonl,with,comma") == ["x.jsonl", "1.jsonl"]
    assert names_of("~/o*.jsonl") == ["other.jsonl"]
    with pytest.raises(UserError, match=r"^none: no such file"):
        names_of("x.jsonl,none")


def test_delimiter_by_suffix(tmp_path):
    (tmp_path / "DATA.TSV").write_text("text\tother\na, b\t1\n")
    (tmp_path / "x.tsv.csv").write_text('text,other\n"a, b",1\n')
    (tmp_path / "x.Tsv.GZ").write_bytes(gzip.compress(b"text\tother\na, b\t1\n"))
    (tmp_path / "semicolon.csv").write_text("text;other\na, b;1\n")
    for name in ("DATA.TSV", "x.tsv.csv", "x.Tsv.GZ", "semicolon.csv"):
        assert converted(tmp_path / name, tmp_path / "p", force=True) == ["a, b"], name


def test_input_format_overrides_suffix(tmp_path):
    (tmp_path / "noending").write_bytes(gzip.compress(line("a").encode()))
    with pytest.raises(UserError, match=r"unknown format.* --input_format jsonl"):
        names_of(tmp_path / "noending")
    assert converted(tmp_path / "noending", tmp_path / "p", input_format="jsonl") == ["a"]
    (tmp_path / "t").write_text("text\tb\nx\t1\n")
    assert converted(tmp_path / "t", tmp_path / "q", input_format="tsv") == ["x"]
    write(tmp_path / "d", "x.jsonl")
    with pytest.raises(UserError, match=r"--input_format jsonl: applies to files given by path"):
        names_of(tmp_path / "d", input_format="jsonl")


@pytest.mark.parametrize("workers", [1, 2])
def test_named_pipe(tmp_path, workers):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    texts = [f"{i} " * 100 for i in range(2000)]
    writer = threading.Thread(target=lambda: pipe.write_text("".join(map(line, texts))))
    writer.start()
    assert converted(pipe, tmp_path / "p", input_format="jsonl", workers=workers) == texts
    writer.join()


@pytest.mark.parametrize("spec", ["-", "/dev/stdin", "<(cat x.jsonl)"])
def test_stdin_and_process_substitution(tmp_path, spec):
    write(tmp_path, "x.jsonl")
    command = f"{sys.executable} {SCRIPT} --input {spec} --output-prefix p --input_format jsonl --workers 2 < x.jsonl"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(Dataset(tmp_path / "p_text_document")) == 1
    if spec == "-":
        result = subprocess.run(
            ["bash", "-c", command.replace("--output-prefix p", "")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, "pass --output_prefix" in result.stderr) == (1, True)


def test_unreadable_subfolder():
    folder = Path(tempfile.mkdtemp())
    try:
        write(folder, "a.jsonl", "closed/b.jsonl")
        (folder / "closed").chmod(0)
        folder.chmod(0o755)
        if os.geteuid() == 0:  # root can read everything
            os.seteuid(65534)
            try:
                with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\)"):
                    sources.find(str(folder))
            finally:
                os.seteuid(0)
        else:
            with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\)"):
                sources.find(str(folder))
    finally:
        (folder / "closed").chmod(0o700)
        shutil.rmtree(folder)


def test_symlinks(tmp_path):
    write(tmp_path, "blobs/x.jsonl")
    (tmp_path / "in/data").mkdir(parents=True)
    (tmp_path / "in/data/a.jsonl").symlink_to(tmp_path / "blobs/x.jsonl")
    (tmp_path / "in/linked").symlink_to(tmp_path / "blobs")
    (tmp_path / "blobs/back").symlink_to(tmp_path / "in")
    assert names_of(tmp_path / "in") == ["a.jsonl", "x.jsonl"]
    (tmp_path / "in/b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"b.jsonl: a broken symbolic link"):
        names_of(tmp_path / "in")


def test_unknown_formats_reported(tmp_path):
    write(tmp_path, "a.txt", "b.docx", "README.md")
    (note,) = sources.find(str(tmp_path)).notes
    assert note == "skipped: b.docx, README.md: unknown format"
