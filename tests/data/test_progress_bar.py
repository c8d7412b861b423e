"""Progress of a conversion or inspection in a log and in a terminal."""

import sys

from rwkv.data import progress_bar


def test_log_line_per_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    with progress_bar.progress_bar(200_000_000, "convert", "B") as bar:
        for _ in range(150):  # seconds
            now[0] += 1
            bar.update(1_000_000)
            bar.set_postfix_str("7 documents", refresh=False)
    assert capsys.readouterr().err == "convert: 30%, 1.00MB/s, 7 documents\nconvert: 60%, 1.00MB/s, 7 documents\n"


def test_bar_in_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar.progress_bar(10, "inspect", " tokens") as bar:
        bar.update(10)
    assert "inspect: 100%|" in capsys.readouterr().err
