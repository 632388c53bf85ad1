"""The paper's tables beside ours: the page is what its script writes from the reports; the paper's numbers stand."""

import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(FOLDER))
    import tables

    yield tables
    sys.path.remove(str(FOLDER))


def test_the_page_is_what_the_reports_say(tables):
    committed = (FOLDER / "TABLES.md").read_text(encoding="utf-8")
    assert committed == tables.page(), "a report has changed: run python notebooks/tables.py"


def test_the_papers_numbers_are_marked_as_of_photos(tables):
    rows = [line for line in tables.page().splitlines() if line.startswith("| photos")]
    numbers = [re.findall(r"\d+\.\d+", re.sub(r"\(.*?\)", "", row)) for row in rows]
    assert numbers == [
        ["0.272", "0.280", "0.311"],
        ["0.582", "0.596", "0.620"],
        ["4.87", "13.33", "81.79"],
        ["18.18", "19.32", "62.50"],
    ]
    assert all(
        line.startswith(("| photos", "| small world", "| |", "|---"))
        for line in tables.page().splitlines()
        if line[:1] == "|"
    )


def test_votes_are_for_the_nearest_after_the_last_turn(tables, monkeypatch, tmp_path):
    (tmp_path / "bench").mkdir()
    lines = ["method,seed,item,turn,psnr_target"]
    lines += ["a,0,1,1,99", "a,0,1,2,20", "b,0,1,1,10", "b,0,1,2,30"]  # b ends nearer
    lines += ["a,0,2,1,25", "b,0,2,1,25"]  # shared
    lines += ["a,0,3,1,25", "b,0,3,1,"]  # b failed: not counted
    (tmp_path / "bench" / "x.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(tables, "HERE", tmp_path)
    assert tables.nearest("x", ["a", "b", "c"]) == {"a": "25%", "b": "75%", "c": "not run"}
