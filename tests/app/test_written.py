"""What `emilie edit` writes: names that no other run has, whatever a console can show, masks' names with colons."""

import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command import MODEL, run
from PIL import Image, ImageFont

from emilie_min.app import cli, edit
from emilie_min.canvas import pictures, strip
from emilie_min.errors import CanvasError

NIGHT = "make it night"


def test_written_pictures_say_that_they_are_srgb(photo, capsys):
    run("edit", photo, NIGHT, *MODEL, capsys=capsys)
    for path in Path("out").glob("*.png"):
        with Image.open(path) as image:
            assert image.info["icc_profile"] == pictures.srgb_profile()


def test_no_old_profile_rides_along(photo, capsys):
    from PIL import ImageCms

    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.open(photo)
    image.save("tagged.png", icc_profile=wide)
    code, _, notes = run("edit", "tagged.png", NIGHT, "--box", "1=0,0,32,32", *MODEL, capsys=capsys)
    assert code == 0 and sum("profile" in line for line in notes) == 1
    with Image.open("out/tagged_1.png") as image:
        assert image.info["icc_profile"] == pictures.srgb_profile()


def test_a_note_is_told_once(photo, capsys):
    mask = Image.new("RGB", (64, 64))
    mask.paste((255, 0, 0), (0, 0, 32, 32))
    mask.save("mask.png")
    twice = [NIGHT, "make it day", "--mask", "1=mask.png", "--mask", "2=mask.png"]
    _, _, lines = run("edit", photo, *twice, *MODEL, capsys=capsys)
    assert len(lines) == 1 and "note" in lines[0] and "one colour" in lines[0]


def begin(path: Path) -> bool:
    return bool(edit.make_new([path]))


def test_runs_at_the_same_time_take_different_names(tmp_path):
    """Each takes a name, waits for the others, and finds its files its own."""

    def take(_):
        with edit.claimed(tmp_path, "a", range(1, 4), False, None, begin) as (name, session):
            (tmp_path / f"{name}_1.png").write_bytes(b"x")
            session.write_bytes(b"x")
            return name

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(take, range(24)))
    assert len(set(names)) == 24
    assert len(list(tmp_path.iterdir())) == 48  # and nothing empty is left


def test_names_of_files_that_are_there_are_not_taken(tmp_path):
    for there in ("a_7.png", "a-2_strip.png", "a-3.canvas"):
        (tmp_path / there).write_bytes(b"mine")
    with edit.claimed(tmp_path, "a", range(1, 3), False, None, begin) as (name, _):
        assert name == "a-4"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-2_strip.png", "a-3.canvas", "a-4.canvas", "a_7.png"]


def test_a_session_that_goes_on_stands_beside_its_earlier_pictures(tmp_path):
    (tmp_path / "a_1.png").write_bytes(b"mine")
    with edit.claimed(tmp_path, "a", range(2, 3), True, tmp_path / "s.canvas", begin) as (name, session):
        assert name == "a" and session.name == "s.canvas"
    with edit.claimed(tmp_path, "a", range(1, 3), True, tmp_path / "s.canvas", begin) as (name, _):
        assert name == "a-2"


def test_a_canvas_that_another_run_made_meanwhile(tmp_path):
    canvas = tmp_path / "s.canvas"
    canvas.write_bytes(b"theirs")
    with pytest.raises(CanvasError, match="another run"):
        with edit.claimed(tmp_path, "a", range(1, 2), False, canvas, begin):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["s.canvas"]


@pytest.mark.parametrize("stem", ["x" * 240, "写" * 80])
def test_long_names_are_cut(photo, capsys, stem):
    os.rename(photo, f"{stem}.png")
    code, out, _ = run("edit", f"{stem}.png", NIGHT, *MODEL, capsys=capsys)
    assert code == 0 and len(list(Path("out").iterdir())) == 3


def test_a_long_name_for_a_session_is_refused_before_anything_is_computed(photo, capsys, monkeypatch):
    monkeypatch.setattr(edit, "edit_with_bar", lambda *_, **__: pytest.fail("an edit was made"))
    code, _, lines = run("edit", photo, NIGHT, "--canvas", "x" * 236 + ".safetensors", *MODEL, capsys=capsys)
    assert code == 2 and len(lines) == 1 and "too long" in lines[0]
    assert not list(Path("out").iterdir())


@pytest.mark.parametrize(("name", "encoding"), [("写真.png", "cp1252"), (os.fsdecode(b"sc\xe8ne.png"), "utf-8")])
def test_what_a_console_cannot_show_decides_nothing(photo, name, encoding, monkeypatch):
    os.rename(photo, name)
    with monkeypatch.context() as patch:
        for stream in ("stdout", "stderr"):
            patch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding))
        assert cli.main(["edit", name, NIGHT, "make it day", *MODEL]) == 0
    assert len(os.listdir("out")) == 4


# ---- masks' names


@pytest.mark.parametrize("name", ["mask 10:22.png", "C:\\masks\\hat.png", "a:b:c.png"])
def test_masks_whose_names_have_colons(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    Path(name.partition(":")[0]).touch()  # the longer name is meant
    assert edit.place_and_text(f"{name}:add: a red star") == (name, "add: a red star")


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("C:\\masks\\hat.png:add a star", ("C:\\masks\\hat.png", "add a star")),
        ("d:/masks/hat.png:add a star", ("d:/masks/hat.png", "add a star")),
        ("hat.png:add: a star", ("hat.png", "add: a star")),
        ("1,2,3,4:add a star", ("1,2,3,4", "add a star")),
        ("hat.png", ("hat.png", "")),
        ("hat.png:", ("hat.png:", "")),
    ],
)
def test_masks_that_are_not_there(tmp_path, monkeypatch, what, expected):
    monkeypatch.chdir(tmp_path)
    assert edit.place_and_text(what) == expected


# ---- captions


def cell(text):
    return [(Image.new("RGB", (64, 64)), text, None)]


@pytest.mark.parametrize("text", ["Добавь звезду", "Ελλάδα", "café"])
def test_captions_in_other_scripts(text):
    try:
        ImageFont.truetype("DejaVuSans.ttf")
    except OSError:
        pytest.skip("no font for it here")
    font = strip.font_for(text, 16)
    assert not strip.missing(text, font)
    boxes = np.asarray(strip.strip(cell("\U0010ffff" * len(text))))
    shown = np.asarray(strip.strip(cell(text)))
    assert shown.shape != boxes.shape or (shown != boxes).any()


def test_captions_for_which_no_font_is_here_are_told(monkeypatch):
    monkeypatch.setattr(strip, "FONTS", ["no font of this name"])
    with pytest.warns(UserWarning, match="captions lack 写"):
        strip.strip(cell("写"))


def test_plain_captions_keep_pillows_font():
    assert strip.font_for("make it night", 16).getname() == ImageFont.load_default(16).getname()


def test_a_saved_strip_is_a_png():
    out = io.BytesIO()
    strip.strip(cell("day")).save(out, "PNG")
    assert Image.open(io.BytesIO(out.getvalue())).size[0] > 64
