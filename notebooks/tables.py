"""Writes TABLES.md: the paper's numbers beside ours, which are read from the reports in bench/.

Table 1 has scores of CLIP and BLIP, Tables 2 and 3 what people prefer.

    python notebooks/tables.py

A test compares the page with what this would write, so it is to be run after every change to a report.
"""

import csv
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAPER = {  # as printed; what stands in brackets there is the distance from EMILIE
    "Average CLIP Score": {"diffedit": "0.272 (-0.039)", "bld": "0.280 (-0.031)", "emilie": "**0.311**"},
    "Average BLIP Score": {"diffedit": "0.582 (-0.038)", "bld": "0.596 (-0.024)", "emilie": "**0.620**"},
    "prefer local": {"diffedit": "4.87%", "bld": "13.33%", "emilie": "81.79%"},
    "prefer several": {"concat": "18.18%", "ip2p": "19.32%", "emilie": "62.50%"},
}
NAMES = {"diffedit": "DiffEdit", "bld": "BLD", "emilie": "EMILIE", "concat": "Concat", "ip2p": "iP2P"}
NONE = "not run"

TEXT = """# The paper's tables beside ours

Two worlds, and no number of one can be held against a number of the other. **Photos** are the paper's: EditBench and
IMIE-Bench, by the released models. **Small world** is ours: 64 px scenes whose right result is known, by the two
small models that ship; [how each was made, and with intervals what is told apart](bench/README.md). What can be
compared is the order within a line. `python notebooks/tables.py` writes this page from the reports in `bench/`, and
a test holds it to them.

## Table 1: local edits

{table1}

The scene has two equal objects, the mask says which of them the instruction is about (`twins`, {twins} scenes).
DiffEdit is given the same mask as the others (`{diffedit}`; of the settings that were run, the one with most
pictures right), and like BLD it is told a caption of the right result instead of the instruction.{clip}

## Table 2: which local edit people prefer

{table2}

Nobody was asked here. "Nearest" is who would win if a vote went to the picture with the highest PSNR to the right
one; ties are shared. It is no preference: it knows nothing of what pleases. `emilie bench study` makes the page that
asks people, blinded.

## Table 3: which result of several edits people prefer

{table3}

Nobody was asked here either; "nearest" after the last of four instructions (`imie`, {imie} scenes). In the paper the
methods are InstructPix2Pix, iterated (iP2P) or told all instructions at once (Concat), and EMILIE.{concat}

## What is not the same

- The paper measures photos by scores of CLIP and BLIP, which say how well a picture goes with the words; in the
  small world the right picture is known, so it is asked whether the result is that one.
- The paper does not say which models its DiffEdit and BLD run on; ours run on one small text-to-image model.
- In the paper EMILIE leads in every line. Where the small world does not say so too, that is not evidence against
  the paper: its models find their edits easy, and little is left to tell methods apart by.
"""


def reports() -> dict[str, list[dict[str, str]]]:
    """Of every report the rows of all its tables, as {heading: cell}, plain."""
    found: dict[str, list[dict[str, str]]] = {}
    for path in sorted((HERE / "bench").glob("*.md")):
        rows = found.setdefault(path.stem, [])
        for table in re.findall(r"\n((?:\|.*\n)+)", path.read_text(encoding="utf-8")):
            head, _, *body = ([plain(c) for c in line.strip().strip("|").split("|")] for line in table.splitlines())
            rows += [dict(zip(head, row)) for row in body]
    return found


def plain(cell: str) -> str:
    return re.sub(r"[*\\`]", "", cell).strip(" ↑↓")


def cell(rows: list[dict[str, str]], method: str, heading: str) -> str:
    return next((row[heading] for row in rows if row.get("method") == method and heading in row), NONE)


def nearest(name: str, methods: list[str]) -> dict[str, str]:
    """The share of items, and seeds, after whose last turn each method is nearest to the right picture, in per cent."""
    best: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}
    for row in csv.DictReader((HERE / "bench" / f"{name}.csv").read_text(encoding="utf-8").splitlines()):
        if row["method"] in methods and row["psnr_target"]:
            last = int(row["turn"]), float(row["psnr_target"])
            kept = best.setdefault((row["item"], row["seed"]), {})
            kept[row["method"]] = max(last, kept.get(row["method"], last))  # by the turn
    votes, counted = dict.fromkeys(methods, 0.0), 0
    for kept in best.values():
        ran = [method for method in methods if any(method in other for other in best.values())]
        if set(kept) == set(ran):
            top = max(value for _, value in kept.values())
            first = [method for method, (_, value) in kept.items() if value == top]
            counted += 1
            for method in first:
                votes[method] += 1 / len(first)
    return {method: f"{100 * n / counted:.0f}%" if n or method in ran else NONE for method, n in votes.items()}


def table(columns: list[str], lines: dict[str, list[str]]) -> str:
    head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(head + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in lines.items()])


def page() -> str:
    found = reports()
    twins = found["twins"]
    tried = {row["method"] for row in twins if row.get("method", "").startswith("diffedit")}
    diffedit = max(sorted(tried), key=lambda method: cell(twins, method, "correct"))
    local = {"diffedit": diffedit, "bld": "bld", "emilie": "emilie"}
    columns = [NAMES[key] for key in local]
    lines = {f"photos: {name}": list(PAPER[name].values()) for name in ("Average CLIP Score", "Average BLIP Score")}
    for heading in ("correct", "PSNR inside, dB", "PSNR outside, dB"):
        what = {"correct": "pictures right"}.get(heading, heading)
        lines[f"small world: {what}"] = [cell(twins, method, heading) for method in local.values()]
    scored = [name for name, rows in found.items() if cell(rows, "emilie", "CLIP score") != NONE]
    for name in scored:
        for heading in ("CLIP score", "BLIP score"):
            scores = [cell(found[name], method, heading) for method in local.values()]
            lines[f"small world, `{name}`: {heading}"] = scores
    votes = nearest("twins", list(local.values()))
    chain = ["concat", "ip2p", "emilie"]
    ends = nearest("imie", chain)
    share = "small world: nearest to the right picture"
    return TEXT.format(
        table1=table(columns, lines),
        table2=table(columns, {"photos, 30 users": list(PAPER["prefer local"].values()), share: list(votes.values())}),
        table3=table(
            [NAMES[key] for key in chain],
            {"photos, 30 users": list(PAPER["prefer several"].values()), share: list(ends.values())},
        ),
        twins=items("twins"),
        imie=items("imie"),
        diffedit=diffedit,
        clip="\nThe small world's scores are by its own CLIP and BLIP-2, which have seen no photo."
        if scored
        else "\nThe report has no scores of CLIP and BLIP yet: `emilie bench report` adds them.",
        concat=" Concat has not been run yet." if ends["concat"] == NONE else "",
    )


def items(name: str) -> int:
    rows = csv.DictReader((HERE / "bench" / f"{name}.csv").read_text(encoding="utf-8").splitlines())
    return len({row["item"] for row in rows})


if __name__ == "__main__":
    (HERE / "TABLES.md").write_text(page(), encoding="utf-8")
