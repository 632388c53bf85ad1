"""What the READMEs say of the code is so: the printed core, the named files and links, the paper's table."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "emilie_min"
README = (ROOT / "README.md").read_text()
MAP = (PACKAGE / "README.md").read_text()
CORE = README[README.index("## The core") :].split("```")[1].removeprefix("python\n")
PAPER = re.findall(r"^\| (.+?) \| `([\w/]+\.py)`: (.+?) \|$", MAP, re.M)


def defined(path):
    """Functions and classes of a module, methods as Class.method: name -> source, not indented."""
    found, text = {}, path.read_text()
    nodes = [(node, node.name) for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for node, name in nodes:
        if isinstance(node, ast.ClassDef):
            nodes += [(inner, f"{name}.{inner.name}") for inner in node.body if isinstance(inner, ast.FunctionDef)]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        lines = text.splitlines()[first - 1 : node.end_lineno]
        found[name] = "\n".join(line[node.col_offset :] for line in lines)
    return found


def test_the_core_that_is_printed_is_the_source():
    printed = re.split(r"\n\n\n|^# emilie_min/\w+\.py\n", CORE.strip() + "\n\n\n", flags=re.M)
    sources = {**defined(PACKAGE / "sampling.py"), **defined(PACKAGE / "emilie.py")}
    printed = [block.strip() for block in printed if block.strip()]
    assert len(printed) == 8
    assert [block for block in printed if block not in sources.values()] == []


def test_line_counts_are_about_right():
    counts = re.findall(r"^\| \d\. \[`(emilie_min/\w+\.py)`\].*? \| (\d+) \|", README, re.M)
    assert len(counts) == 6
    for name, count in counts:
        assert abs(len((ROOT / name).read_text().splitlines()) - int(count)) <= 0.1 * int(count) + 2, name


def test_every_room_is_on_the_map():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {room for room in rooms if f"emilie_min/{room})" not in README} == set()


@pytest.mark.parametrize(("what", "path", "names"), PAPER, ids=[row[0][:40] for row in PAPER])
def test_the_paper_is_where_the_table_says(what, path, names):
    names = re.findall(r"`([^`]+)`", names)
    assert names and set(names) <= defined(PACKAGE / path).keys()


def test_the_table_covers_what_the_paper_numbers():
    said = " ".join(row[0] for row in PAPER)
    for number in ("Eq. 5", "Eq. 7", "Eq. 8", "Alg. 1", "Fig. 2", "Fig. 6", "Fig. 9", "Table 1", "Tables 2 and 3"):
        assert number in said


@pytest.mark.parametrize("readme", sorted(ROOT.rglob("README.md")), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_links_that_are_named_exist(readme):
    if ".venv" in readme.parts:
        pytest.skip("not ours")
    text = readme.read_text()
    named = {readme.parent / name for name in re.findall(r"\]\((?!http)([^)#]+)\)", text)}
    named |= {ROOT / name for name in re.findall(r"`((?:tests|notebooks|emilie_min)/[\w./]+)`", text)}
    assert [str(name) for name in named if not name.exists()] == []
