"""The numbers of notebooks/bench/README.md are those of the reports beside it, which follow from their CSV files."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from emilie_min.bench import data
from emilie_min.bench.metrics import METRICS

HERE = Path(__file__).resolve().parents[2] / "notebooks" / "bench"
README = (HERE / "README.md").read_text()
NAMES = sorted(path.stem for path in HERE.glob("*.csv"))


def plain(cell):
    return re.sub(r"[*\\`]", "", cell).strip(" ↑↓")


def rows(lines):
    """A Markdown table's rows as {first cell: {heading: cell}}."""
    cells = [[plain(cell) for cell in line.strip().strip("|").split("|")] for line in lines]
    head, _, *body = cells
    return {row[0]: dict(zip(head, row)) for row in body}


def tables(text, heading):
    """{title: rows} of the tables that stand under a heading of this pattern."""
    found = {}
    for match in re.finditer(heading + r"\n\n((?:\|.*\n)+)", text):
        found[match[1]] = rows(match[2].splitlines())
    return found


def test_every_table_is_that_of_a_report():
    shown = tables(README, r"<!-- (.+?) -->")
    assert len(shown) >= 4
    for title, table in shown.items():
        name, _, title = title.partition(": ")
        report = tables((HERE / f"{name}.md").read_text(), r"\*\*(.+?)\*\*")
        for method, cells in table.items():
            for heading, cell in list(cells.items())[1:]:
                where = next(t for t in report if t == title or title == "*" and heading in report[t].get(method, {}))
                assert report[where][method][heading] == cell, (name, method, heading)


def test_every_interval_in_the_text_is_in_a_report():
    reports = "".join((HERE / f"{name}.md").read_text() for name in NAMES).replace("*", "")
    prose = "\n".join(line for line in README.splitlines() if not line.startswith("|"))
    found = re.findall(r"-?\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]", prose)
    assert found and not [interval for interval in found if interval not in reports]


@pytest.mark.parametrize("name", NAMES)
def test_a_report_s_means_follow_from_its_edits(name):
    report = tables((HERE / f"{name}.md").read_text(), r"\*\*(.+?)\*\*")
    edits = list(csv.DictReader((HERE / f"{name}.csv").read_text().splitlines()))
    assert report
    for title in ("Right or wrong", "What is wrong", "Pixels"):
        for method, cells in report[title].items():
            for metric, about in METRICS.items():
                heading = f"{about.title}, {about.unit}" if about.unit not in ("", "share") else about.title
                if heading in cells and cells[heading] != "–":
                    of = {}
                    for edit in edits:
                        if edit["method"] == method and edit[metric]:
                            of.setdefault(edit["item"], []).append(float(edit[metric]))
                    told = cells[heading].split()[0]
                    mean = np.mean([np.mean(values) for values in of.values()])
                    assert float(told) == pytest.approx(mean, abs=0.51 * 10 ** -len(told.split(".")[1]))


def test_what_doing_less_costs_follows_from_its_edits():
    of = {}
    for edit in csv.DictReader((HERE / "less.csv").read_text().splitlines()):
        of.setdefault(edit["method"], {})[edit["item"]] = [
            float(edit[k]) for k in ("correct", "psnr_target", "seconds")
        ]
    told = re.findall(
        r"^\| `(emilie:.+?)` \| (.+?) \| (.+?) \| (.+?) \|$", (HERE.parent / "speed" / "README.md").read_text(), re.M
    )
    assert len(told) == len(of) > 10
    for method, *figures in told:
        right, psnr, seconds = np.array(list(of[method].values())).T
        ratio = seconds / [of["emilie:steps=50"][item][2] for item in of[method]]
        assert figures == [f"{right.mean():.2f}", f"{psnr.mean():.1f}", f"{np.median(ratio):.2f}"], method


def test_eq8_as_printed_gets_no_masked_turn_right():
    edits = list(csv.DictReader((HERE / "imie.csv").read_text().splitlines()))
    items = {item.id: item for item in (data.MAKERS["imie"](i, data.FIRST + i, 4) for i in range(40))}
    of = [e for e in edits if e["method"] == "emilie:gate=eq8" and items[e["item"]].turns[int(e["turn"]) - 1].mask]
    right = [float(e["correct"]) for e in of if e["correct"]]
    assert f"{sum(right):.0f} of its {len(right)} masked turns" in " ".join(README.split())
