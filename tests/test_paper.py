"""What code, READMEs and notebooks say of the paper: every number that they name is one of the paper's, and means that.

The paper is not at hand where the tests run, so `PAPER` has, for each of its numbers, words of which a sentence that
names the number has at least one.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAP = (ROOT / "emilie_min" / "README.md").read_text(encoding="utf-8")
ROWS = [line for line in MAP.splitlines() if line.startswith("| ") and not line.startswith("| paper")]

PAPER = {
    "Sec. 3": "diffusion|latent|channels|schedule",
    "Sec. 4.1": "mask|gate|energy|gradient",
    "Sec. 4.2": "latent iteration|by image|the latent",
    "Sec. 4.3": "framework|Algorithm 1",
    "Sec. 5.1": "IMIE-Bench",
    "Sec. 5.2": "compared|concatenated|All instructions so far|CLIP|protocol",
    "Sec. 5.3": r"\bf\b|hyperparameters|[Aa]ncestral|Euler|magnitude|seconds",
    "Sec. 5.4": "grids|IMIE-Bench",
    "Sec. 5.5": "local edits|CLIP|EditBench",
    "Sec. 5.6": "prefer",
    "Sec. 6.1": "insert|GracoNet|place",
    "Sec. 6.2": "gate",
    "Sec. 6.3": "undone|negative",
    "Eq. 1": r"noise|beta|schedule",
    "Eq. 2": r"z_t|sigma|noise|bar",
    "Eq. 3": "second line|second half",
    "Eq. 4": "loss|learned",
    "Eq. 5": "step|sampl|schedule|coefficient|sigma|update|x = x",
    "Eq. 6": "energ|p.x.|density|partition|normal",
    "Eq. 7": "energ|Langevin|gradient",
    "Eq. 8": r"mask|gate|eps|noise",
    "Fig. 1": "strip|edits|last column",
    "Fig. 2": "noise|nothing|drift|autoencoder|image|turns",
    "Fig. 3": "sequence|latent iteration|chain",
    "Fig. 4": "channels|one edit|drawn|z_T|green box|Line 7",
    "Fig. 5": "fourth|image iteration|compare",
    "Fig. 6": "grids|beside|pictures",
    "Fig. 7": "local edits|EditBench|kept to their masks|twins",
    "Fig. 8": "insert|exchange|turned? .*off",
    "Fig. 9": "gate|control|turned off|insert",
    "Table 1": "CLIP|DiffEdit|metric",
    "Table 2": "prefer|study",
    "Table 3": "prefer|study",
    "Line 1": "z_init|once",
    "Line 2": "for e|instruction",
    "Line 3": "if e|first",
    "Line 4": r"E\(I",
    "Line 5": "else",
    "Line 6": "latent iteration|prev_latent|f \\* z",
    "Line 7": "stack|concat|z_img|sample|denois",
    "Line 8": "step|sample|denois",
    "Line 9": "step|sample|denois|eps|Eq. 8|gate",
    "Line 10": r"D\(|decod|yield",
    "Line 11": "prev_latent",
    "Line 12": "return",
}
NUMBERED = re.compile(r"\b(Sec|Eq|Fig|Table|Line)s?\.? (\d+(?:\.\d)?)((?:(?:, and|,| and| to) \d+(?:\.\d)?(?![\w%]))*)")
ANOTHERS = re.compile(r"(et al\.|20\d\d|\bits|their)[^.;|]{0,20}$")  # "(Brooks et al. 2023, Eq. 3)", "its Eq. 3"
WINDOW = 300


def numbers(text):
    """What a text names, with what stands around it: (what, words)."""
    for found in NUMBERED.finditer(text):
        kind, first, more = found.groups()
        if ANOTHERS.search(text[: found.start()][-40:]):
            continue
        listed = [first, *re.findall(r"\d+(?:\.\d)?", more)]
        if " to " in more:
            listed = [str(n) for n in range(int(first), int(listed[-1]) + 1)]
        around = text[max(0, found.start() - WINDOW) : found.end() + WINDOW]
        for number in listed:
            yield f"{kind}{'.' if len(kind) < 4 else ''} {number}", around


def wrong(text):
    flat = re.sub(r"\s+", " ", text)
    return [what for what, words in numbers(flat) if not re.search(PAPER.get(what, "(?!)"), words, re.I)]


def test_the_table_covers_all_that_the_paper_numbers():
    said = {what for row in ROWS for what, _ in numbers(row)}
    assert {what for what in PAPER if not what.startswith("Line")} - said == set()


@pytest.mark.parametrize("row", ROWS, ids=[row[2:42] for row in ROWS])
def test_a_row_is_about_what_the_paper_has_there(row):
    assert wrong(row.split(" | ")[0]) == []


FILES = [
    *(ROOT / "emilie_min").rglob("*.py"),
    *ROOT.glob("notebooks/*.*"),
    *ROOT.glob("*/**/README.md"),
    ROOT / "README.md",
]
FILES = [path for path in FILES if path.suffix in (".py", ".md", ".ipynb") and not {".venv", "tests"} & set(path.parts)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_said_of_the_paper_is_in_the_paper(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    assert wrong(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "Sec. 4.1: latent iteration",
        "Sec. 4.4: the framework",
        "f (Sec. 4.3)",
        "Fig. 10: strips",
        "Figs. 2 and 7: noise piles up",
        "Line 4: latent iteration",
        "Eq. 9: a mask",
        "Table 4: what people prefer",
    ],
)
def test_what_is_wrong_is_found(text):
    assert wrong(text)
