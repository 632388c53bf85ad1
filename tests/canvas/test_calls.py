"""Whatever the Python interface is given: an error of ours in a line, and the canvas is what it was."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import emilie_min as emilie
from emilie_min.canvas import where
from emilie_min.checkpoint.reading import key_map
from emilie_min.errors import CanvasError, EmilieError
from emilie_min.insert import insertion


class Odd:
    def __repr__(self):
        raise RuntimeError


class Truthless(Odd):
    def __eq__(self, other):
        raise RuntimeError

    __hash__ = None


ODD = [  # which no argument of below may be
    *(10**5000, float("nan"), 1j, b"photo.png", "x\n" * 10**4, "a\0b", ..., object(), Odd(), Truthless()),
    *(lambda: 1, (i for i in "ab"), {1: 2}, [None], [[]], (0, 0, 10**5000, 1), (0, 0, 9), [("add a", 3, 4, 5)]),
    *(np.zeros((3, 4, 5, 6)), np.ones(3), np.float64("nan"), np.array(["a"]), np.datetime64("now"), np.zeros((2, 0))),
    np.broadcast_to(np.uint8(0), (10**6, 10**6, 3)),
    *(torch.ones(2, 2), torch.ones(2, device="meta"), torch.int8, Image.new("RGB", (0, 5)), Path("nowhere/x")),
]
KITE = Image.new("RGBA", (32, 32), "red")
SETTINGS = ("steps", "text_scale", "gate", "soft", "rescale", "seed", "guidance_interval", "reuse_guidance", "further")
CALLS = {
    **{f"edit {name}": lambda c, x, name=name: c.steps("add a", **{name: x}) for name in SETTINGS},
    "instruction": lambda c, x: c.edit(x),
    "mask": lambda c, x: c.steps("add a", x),
    "region": lambda c, x: c.steps([("add a", x), ("add a", (0, 0, 2, 2))]),
    "own": lambda c, x: c.steps([("add a", (0, 0, 9, 9), {"seed": x})]),
    "own names": lambda c, x: c.steps([("add a", (0, 0, 9, 9), {"text_scale": 1, "steps": x})]),
    "branch": lambda c, x: c.branch(x),
    "hide": lambda c, x: c.hide(x),
    "move": lambda c, x: c.move(1, x),
    "strength": lambda c, x: c.strength(1, x),
    "scrub": lambda c, x: c.scrub(1, x),
    "way": lambda c, x: c.hide(1, way=x),
    "change": lambda c, x: c.change(x if isinstance(x, str) else "no", 1),
    "where": lambda c, x: where.mask(c, x),
    "threshold": lambda c, x: where.mask(c, "add a", x),
    "open": lambda c, x: emilie.open(x, c.editor),
    "editor": lambda c, x: emilie.open(KITE, x),
    "open seed": lambda c, x: emilie.open(KITE, c.editor, seed=x),
    "resolution": lambda c, x: emilie.open(KITE, c.editor, resolution=x),
    "part": lambda c, x: emilie.open(KITE, c.editor, part=x),
    **{f"load {n}": lambda c, x, n=n: emilie.load(**{n: x}) for n in ("weights", "config", "device", "dtype", "plain")},
    **{f"load {n}": lambda c, x, n=n: emilie.load(**{n: x}) for n in ("tokenizer", "compile", "low_memory")},
    "ema": lambda c, x: key_map({}, {}, x),
    "inset": lambda c, x: insertion.plan(c, x, caption="a", at=(0, 0, 9, 9)),
    "at": lambda c, x: insertion.plan(c, KITE, caption="a", at=x),
    "format": lambda c, x: insertion.plan(c, KITE, caption="a", at=(0, 0, 9, 9), format=x),
    "proposals": lambda c, x: insertion.plan(c, KITE, caption="a", proposals=x),
    "proposer": lambda c, x: insertion.plan(c, KITE, caption="a", proposer=x),
    "take": lambda c, x: insertion.plan(c, KITE, caption="a", at=(0, 0, 9, 9)).steps(x),
    "kept": lambda c, x: list(insertion.plan(c, KITE, caption="a", at=(0, 0, 9, 9)).keep_steps(0, x)),
}


def of(canvas) -> tuple:
    states = [(state.id, state.parent, state.latent.sum().item()) for state in canvas.states]
    return states, canvas.at, list(canvas.redo_stack)


@pytest.fixture
def edited(canvas):
    canvas.edit("add a", steps=1)
    return canvas


@pytest.mark.filterwarnings("ignore")
def test_whatever_is_given_is_refused_in_a_line_and_changes_nothing(edited):
    before = of(edited)
    for name, call in CALLS.items():
        for i, value in enumerate(ODD):
            try:
                call(edited, value)
            except EmilieError as error:
                told = str(error)
                assert told.isprintable() and 0 < len(told) <= 2000, (name, i)
            else:
                raise AssertionError(f"{name} takes {type(value).__name__}, value {i}")
    assert of(edited) == before
    edited.edit("add a", steps=1)


def test_whole_numbers_of_any_type_are_numbers_and_bools_are_not(edited):
    assert edited.branch(np.int64(0)) and edited.branch(torch.tensor(1))
    edited.edit("add a", steps=np.uint8(1), seed=np.int64(3), soft=np.bool_(True), keep_background=0)
    for changes in ({"steps": True}, {"seed": False}, {"text_scale": True}, {"soft": "no"}, {"keep_background": 2}):
        with pytest.raises(EmilieError):
            edited.edit("add a", **changes)


def test_a_canvas_replaces_no_other_file(canvas, tmp_path):
    """Neither a photo nor another program's database; an empty file, another canvas and one of the first version do."""
    photo, other = tmp_path / "photo.png", tmp_path / "other.sqlite"
    KITE.save(photo)
    with closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE a (b)")
    for path in (photo, other):
        before = path.read_bytes()
        with pytest.raises(CanvasError, match="is there and no canvas"):
            canvas.save(path)
        assert path.read_bytes() == before
    for path in (tmp_path / "empty", tmp_path / "a.canvas"):
        path.touch()
        canvas.save(path)
        emilie.open(KITE, canvas.editor).save(path)
        assert emilie.open(path if path.suffix else str(path), canvas.editor).original_size == KITE.size
