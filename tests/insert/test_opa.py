"""OPA's folder becomes a benchmark with insets, and `emilie insert` over it a grid."""

import csv

import numpy as np
import pytest
from command import run
from PIL import Image

from emilie_min.bench import data
from emilie_min.bench.readers import import_, read_opa
from emilie_min.errors import BenchError, CanvasError
from emilie_min.insert import pairs

COLUMNS = ("annID", "fg_id", "bg_id", "position", "scale", "label", "img_name", "mask_name")
ROWS = (("1", "11", "21", "[32, 32, 30, 30]", "0.5", "1"), ("2", "11", "21", "[1, 2, 30, 30]", "0.5", "0"),
        ("3", "12", "21", "[5, 6, 20, 20]", "0.4", "0"))  # fmt: skip


@pytest.fixture
def opa(tmp_path, monkeypatch):
    """Two foregrounds of one category, and a background."""
    monkeypatch.chdir(tmp_path)
    for folder in ("background", "foreground"):
        (tmp_path / "opa" / folder / "apple_pie").mkdir(parents=True)
    for name, p in (("11", pairs.pair(3)), ("12", pairs.pair(4))):
        p.inset.save(tmp_path / f"opa/foreground/apple_pie/{name}.jpg", quality=95)
        p.mask.save(tmp_path / f"opa/foreground/apple_pie/mask_{name}.jpg", quality=95)
    pairs.pair(3).base.save(tmp_path / "opa/background/apple_pie/21.jpg", quality=98)
    table(ROWS)
    return tmp_path


def table(rows):
    with open("opa/test_set.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *(row + ("x.jpg", "m.jpg") for row in rows)])


def test_pairs_become_items_with_their_reasonable_boxes(opa):
    assert import_("opa", "opa", "bench") == "2 items, 2 turns, 0 with a mask, 0 with a truth"
    first, second = data.read("bench")
    assert (first.id, first.turns[0].instruction) == ("11_21", "add an apple pie")
    assert first.meta == {"from": "OPA", "kind": "insert", "reasonable": [[32, 32, 30, 30]]}
    assert Image.open(first.turns[0].region).getbbox() == (32, 32, 62, 62)
    assert second.meta["reasonable"] == [] and second.turns[0].region is None
    own = np.asarray(Image.open("opa/foreground/apple_pie/12.jpg"))
    assert np.array_equal(np.asarray(Image.open(second.turns[0].inset)), own) and second.turns[0].inset_mask


@pytest.mark.parametrize(
    ("row", "why"),
    [
        *(
            (("1", "11", "21", position, "1", "1"), "test_set.csv:2: position must be")
            for position in (
                "[1, 2, 3]",
                "[1.0, 2, 3, 4]",
                "[-1, 2, 3, 4]",
                "[1, 2, 0, 4]",
                "{1: 2}",
                "[1, 2",
                "f()",
            )
        ),
        (("1", "11", "21", "[1, 2, 3, 4]", "1", "2"), "label must be 0 or 1"),
        (("1", "11", "21", "[64, 2, 3, 4]", "1", "1"), r"11 on 21: the box '?\[64, 2, 3, 4\]'? lies outside of 64x64"),
        (("1", "99", "21", "[1, 2, 3, 4]", "1", "1"), "there is no foreground/"),
    ],
)
def test_what_is_not_as_described_is_told_with_its_line(opa, row, why):
    table([row])
    with pytest.raises(BenchError, match=why):
        import_("opa", "opa", "bench")


def test_of_a_box_what_lies_in_the_picture_counts(opa):
    table([("1", "11", "21", f"[32, 40, {10**30}, 2147483647]", "1", "1")])
    import_("opa", "opa", "bench")
    assert Image.open(data.read("bench")[0].turns[0].region).getbbox() == (32, 40, 64, 64)


def test_of_opa_there_are_two_parts(opa):
    with pytest.raises(BenchError, match="split must be test or train"):
        list(read_opa("opa", "validation"))


def test_an_inset_that_cannot_be_used_is_told(opa):
    Image.new("L", (5, 5), 255).save("opa/foreground/apple_pie/mask_11.jpg")
    with pytest.raises(BenchError, match="the inset.s mask"):
        import_("opa", "opa", "bench")


def test_the_command_over_it_gives_the_grid_and_goes_on(opa, capsys):
    import_("opa", "opa", "bench")
    args = ["insert", "bench", "--device", "cpu", "--steps", "2", "--out", "out"]
    code, out, _ = run(*args, capsys=capsys)
    assert code == 0 and {p.name for p in (opa / "out").iterdir()} == {"11_21.png", "12_21.png", "grid.png"}
    rows = [Image.open(f"out/{name}_21.png") for name in ("11", "12")]
    assert Image.open("out/grid.png").height == sum(row.height for row in rows)
    (opa / "out/12_21.png").unlink()
    code, out, _ = run(*args, capsys=capsys)
    assert code == 0 and "11_21" not in out and "12_21" in out
    (opa / "out/12_21.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    code, out, err = run(*args, capsys=capsys)
    assert code == 2 and "12_21.png cannot be read as a picture: it is a drawing" in err[-1]
    for more, told in ((["--at", "0,0,9,9"], "leave out --at"), (["kite.png"], "leave out INSET")):
        code, _, err = run(*args[:2], *more, *args[2:], capsys=capsys)
        assert code == 2 and told in err[-1]
    lines = (opa / "bench/bench.jsonl").read_text()
    (opa / "bench/bench.jsonl").write_text(lines.replace('"inset": ', '"target": ').replace("inset_mask", "caption"))
    code, _, err = run(*args, capsys=capsys)
    assert code == 2 and "no item with an inset" in err[-1]


def test_items_that_cannot_be_done_are_left_out(opa, capsys, monkeypatch):
    from emilie_min.insert import insertion

    import_("opa", "opa", "bench")
    args = ["insert", "bench", "--device", "cpu", "--steps", "1", "--out", "out"]

    def none(*_):
        raise CanvasError("there is no room")

    monkeypatch.setattr(insertion, "plan", none)
    code, out, err = run(*args, capsys=capsys)
    assert code == 2 and "11_21 is left out: there is no room" in out and "no item could be done" in err[-1]
    code, _, err = run("insert", "opa/background/apple_pie/21.jpg", capsys=capsys)
    assert code == 2 and "what to insert?" in err[-1]
