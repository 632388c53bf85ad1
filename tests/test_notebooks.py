"""The notebooks: they run from top to bottom, and what is committed is small, complete and in one form."""

import ast
import json
import math
import os
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))  # the exercises have tests of their own
ANSWER = re.compile(r"<details>\s*<summary>[^<]*</summary>(.*?)</details>", re.S)
CODE = re.compile(r"```python\n(.*?)```", re.S)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|Users|mnt|var)/|[A-Z]:\\\\")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4


@each
def test_is_small_and_in_one_form(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert not ABSOLUTE.search(text)
    notebook = json.loads(text)
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert not any("execution" in cell["metadata"] for cell in notebook["cells"])  # when it was run


@each
def test_outputs_are_kept_and_clean(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # run in order, from fresh
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


@each
def test_one_variable_chooses_the_weights(path):
    assert re.search(r"^WEIGHTS = None\b", source(cells(path, "code")[0]), re.M)


@each
def test_answers_are_folded_and_compile(path):
    text = "\n".join(source(cell) for cell in cells(path, "markdown"))
    assert text.count("<details>") == text.count("</details>") == len(ANSWER.findall(text)) >= 2
    for answer in ANSWER.findall(text):
        for block in CODE.findall(answer):
            ast.parse(block)


@each
def test_quotes_are_todays_source(path):
    package = "\n".join(file.read_text(encoding="utf-8") for file in (FOLDER.parent / "emilie_min").rglob("*.py"))
    lines = {line.strip() for line in package.splitlines()}
    quoting = [cell for cell in cells(path, "code") if re.search(r"^quote\(", source(cell), re.M)]
    assert quoting
    for cell in quoting:
        first = printed(cell).splitlines()[0].strip()
        assert first in lines, first


@each
def test_pictures_have_their_colours(path):
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    for output in outputs:
        if "image/png" in output.get("data", {}):
            assert Image.open(BytesIO(b64decode(output["data"]["image/png"]))).mode in ("RGB", "RGBA")


@each
def test_runs_from_top_to_bottom_and_says_what_is_committed(path, monkeypatch):
    for name in ("nbclient", "nbformat", "ipykernel", "matplotlib"):
        pytest.importorskip(name, reason=f"notebooks need {name}: pip install 'emilie_min[notebooks]'")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    committed = [printed(cell) for cell in notebook.cells]
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    answers = [code for answer in ANSWER.findall(text) for code in CODE.findall(answer)]
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in answers]
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()  # raises CellExecutionError
    errors = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]
    assert not errors, errors
    for before, cell in zip(committed, notebook.cells):
        same_but_for_rounding(before, printed(cell))


def printed(cell):
    return "".join("".join(output["text"]) for output in cell.get("outputs", []) if output.get("name") == "stdout")


def same_but_for_rounding(before, now):
    """Word for word; numbers to 5% or 0.1, as other processors round otherwise."""
    one, other = before.split(), now.split()
    assert len(one) == len(other), now
    for a, b in zip(one, other):
        assert NUMBER.sub("#", a) == NUMBER.sub("#", b), now
        for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)):
            assert math.isclose(float(x), float(y), rel_tol=0.05, abs_tol=0.1), now
