"""What the README says of files, functions and lines is so."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FILES = re.findall(r"^\| `(emilie_min/[\w./]+)` \| (\d+) \|", README, re.M)
PAPER = re.findall(r"^\| (.+?) \| `(emilie_min/[\w./]+\.py)`: (.+?) \|$", README, re.M)


def lines(path):
    """Of a file, or of all Python files of a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return sum(len(file.read_text().splitlines()) for file in files)


def defined(tree):
    """Functions and classes of a module, methods as Class.method."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def test_line_counts_are_true():
    assert len(FILES) > 15
    assert {name: int(count) for name, count in FILES} == {name: lines(ROOT / name) for name, _ in FILES}


def test_every_module_is_in_the_map():
    named = [ROOT / name for name, _ in FILES]
    modules = [path for path in (ROOT / "emilie_min").rglob("*.py") if not path.name.startswith("__")]
    assert [m for m in modules if not any(m == n or n in m.parents for n in named)] == []


def test_the_method_imports_nothing_from_what_stands_beside_it():
    table = README[README.index("| file | lines |") : README.index("| beside it | lines |")]
    method = set(re.findall(r"`emilie_min/(\w+)\.py`", table))
    for name in method:
        for node in ast.walk(ast.parse((ROOT / "emilie_min" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                imported = [node.module] if node.module else [alias.name for alias in node.names]
                assert set(imported) <= method, (name, imported)


@pytest.mark.parametrize(("what", "path", "names"), PAPER, ids=[row[0][:40] for row in PAPER])
def test_the_paper_is_where_the_table_says(what, path, names):
    source = (ROOT / path).read_text()
    parts = re.findall(r"`([^`]+)`", names)
    functions = [part for part in parts if re.fullmatch(r"[\w.]+", part)]
    assert functions and set(functions) <= defined(ast.parse(source))
    for code in set(parts) - set(functions):
        assert code in source


def test_the_table_covers_what_the_paper_numbers():
    said = " ".join(row[0] for row in PAPER)
    for number in ("Eq. 5", "Eq. 7", "Eq. 8", "Alg. 1", "Fig. 2", "Fig. 6", "Fig. 8", "Table 1", "Tables 2 and 3"):
        assert number in said


def test_files_and_links_that_are_named_exist():
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", README)) | set(
        re.findall(r"`((?:tests|notebooks)/[\w./]+)`", README)
    )
    assert named and [name for name in named if not (ROOT / name).exists()] == []
