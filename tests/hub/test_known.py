"""The table of known models, and its copies in the documentation."""

import re

import pytest

from rwkv.hub import known


def test_table_has_published_file_sizes(root):
    # GB as shown on the pages of the repositories
    published = {"rwkv7-g1-0.1b": 0.4, "rwkv7-g1-0.4b": 0.9, "rwkv7-g1-1.5b": 3.1, "rwkv7-g1-2.9b": 5.9}
    published |= {"rwkv7-g1-7.2b": 14.4, "rwkv7-g1-13.3b": 26.5, "rwkv4-world-0.1b": 0.4, "rwkv6-world-14b": 28.1}
    header, *rows = (line.split("  ") for line in known.table().splitlines())
    rows = {cells[0].strip(): [cell.strip() for cell in cells if cell.strip()] for cells in rows}
    assert [name for name, _, _ in known.models()] == list(rows)
    assert {name: float(rows[name][3]) for name in published} == published
    assert all(float(cells[3]) < float(cells[4]) < float(cells[5]) for cells in rows.values())
    assert header[0].strip() == "model"
    for page in ("docs/models.md", "docs/zh/models.md"):
        text = (root / page).read_text(encoding="utf-8")
        documented = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall("^[|] rwkv.*", text, re.M)
        ]
        assert [[*cells[:4], cells[6]] for cells in documented] == [[*cells[:4], cells[6]] for cells in rows.values()]
        for cells in documented:  # estimates may change slightly
            ours = [float(cell) for cell in rows[cells[0]][4:6]]
            assert [float(cell) for cell in cells[4:6]] == pytest.approx(ours, rel=0.1)
