"""An object inserted in the studio: the inset that is dropped, its places, and the edit at one of them."""

import re
import warnings

import numpy as np
import pytest
from PIL import Image

import emilie_min as emilie
from emilie_min.app.inserting import Networks
from emilie_min.app.options import tell_foreign
from emilie_min.app.visitor import GENERAL, Visitor, data_url, inset_html, picture_html
from emilie_min.canvas.photo import open_photo
from emilie_min.errors import CanvasError, CheckpointError, ImageError, InstructionError, MaskError
from emilie_min.insert import insertion
from emilie_min.toy import world

BASE = world.render(world.Scene("sand", "day", (world.Object("square", "blue", "top left"),)))


def thing(colour="red"):
    """A circle, cut out: RGBA, 32 px."""
    out = Image.new("RGBA", (32, 32))
    cover = Image.fromarray((world.alpha("circle", 0, 0)[..., 0] * 255).astype(np.uint8))
    out.paste(world.COLOURS[colour], (0, 0, 32, 32), cover)
    return out


def painted(box, size=(64, 64)):
    board = Image.new("RGBA", size)
    board.paste((255, 0, 120, 255), box)
    return data_url(board)


@pytest.fixture
def visitor(shipped):
    visitor = Visitor(shipped)
    visitor.begin(open_photo(BASE, shipped), None, "base")
    return visitor


def propose(visitor, inset=None, **more) -> str:
    given = {"mask": None, "caption": "", "place": "", "n": 4, "seed": None} | more
    return visitor.propose_url(data_url(inset or thing()), **given)


def insert(visitor, take=0, **more) -> str:
    *_, (told, done, _) = visitor.insert(take, **{"steps": 1} | more)
    assert done == 1
    return told


def test_the_places_are_outlined_a_click_inserts_there_and_undo_shows_them_again(visitor, shipped):
    assert propose(visitor) == 'It shows "a red circle"; 4 places for it: click one on the picture'
    plan, page = visitor.inserting.plan, picture_html(visitor)
    outlines = dict(re.findall(r'data-place="(\d)" style="left:([\d.]+)%', page))
    assert {int(i): float(x) for i, x in outlines.items()} == {i: x / 0.64 for i, (x, *_) in enumerate(plan.boxes)}
    told = [note for note, *_ in visitor.insert(1, steps=2)]
    asked = plan.instruction(1)
    assert told[0] == f"Step 0 of 2: {asked}" and told[-1].startswith(f"Edit 1: {asked}, in place 2")
    canvas = emilie.open(BASE, shipped)
    assert insertion.insert(canvas, thing(), take=1, steps=2).tobytes() == visitor.canvas.image.tobytes()
    assert visitor.canvas.state.inserted == canvas.state.inserted and "data-place" not in picture_html(visitor)
    visitor.undo()
    assert picture_html(visitor).count("data-place") == 4 and visitor.paint is None
    first = list(plan.boxes)
    visitor.propose("a red circle")
    assert visitor.inserting.plan.boxes != first  # other places
    visitor.clear_inset()
    assert "data-place" not in picture_html(visitor) and "Drop a picture" in inset_html(visitor)


def test_a_place_can_be_painted_and_a_caption_said(visitor):
    told = propose(visitor, caption=" a blue\nstar ", place=painted((2, 34, 30, 62)))
    assert told.startswith('It shows "a blue star"; a place for it')
    assert visitor.inserting.plan.boxes == [(2, 34, 28, 28)]
    assert "add a green star at the bottom left" in insert(visitor, caption="a green star")


def test_the_object_itself_is_redrawn(visitor):
    propose(visitor, place=painted((32, 32, 64, 64)))
    told = [note for note, *_ in visitor.insert(0, redrawn=0.25, steps=8)]
    assert told[0].startswith("Step 0 of 2:") and visitor.canvas.state.inserted["kept"] == 0.25


def test_what_cannot_be_inserted_is_told_and_harms_nothing(visitor):
    with pytest.raises(CanvasError, match="there is no inset yet"):
        visitor.propose()
    with pytest.raises(CanvasError, match="no place is proposed for this picture"):
        insert(visitor)
    url, small = data_url(thing()), data_url(Image.new("L", (9, 9), 255))
    for given, error, told in (
        ({"inset": Image.new("RGB", (1, 1))}, ImageError, "1x1 px shows nothing"),
        ({"inset": Image.new("RGBA", (20, 20))}, ImageError, "transparent everywhere"),
        ({"mask": small}, MaskError, "the inset's mask: .*9x9 px"),
        ({"mask": "/etc/passwd"}, ImageError, "data URL"),
        ({"place": painted((0, 0, 9, 9), (9, 9))}, MaskError, "same size"),
        ({"caption": "a zeppelin " * 999}, InstructionError, "too long"),
        ({"n": 10**6}, CanvasError, "from 1 to 64"),
        ({"n": 2.5}, CanvasError, "from 1 to 64"),
    ):
        with pytest.raises(error, match=told):
            propose(visitor, **given)
    assert "is taken for white" in propose(visitor, mask=url)  # the notes of what was assumed
    for given, error, told in (
        ({"take": 4}, CanvasError, "no proposal 5, only 1 to 4"),
        ({"take": -1}, CanvasError, "no proposal 0"),
        ({"caption": "a zeppelin"}, InstructionError, "'zeppelin'"),
        ({"caption": "a red circle " * 999}, InstructionError, "of 12987 characters is too long"),
        ({"redrawn": -1.0}, emilie.EmilieError, "keep"),
    ):
        with pytest.raises(error, match=told):
            insert(visitor, **given)
    steps = visitor.insert(0, steps=4)
    next(steps)
    visitor.stop()
    with pytest.raises(CanvasError, match="stopped"):
        next(steps)
    assert len(visitor.canvas.states) == 1
    visitor.new_scene(1)
    with pytest.raises(CanvasError, match="no place is proposed for this picture"):
        insert(visitor)


def test_a_caption_is_of_one_inset_alone(visitor, tmp_path, monkeypatch):
    inserting = visitor.inserting
    for name, colour, field, told in (
        ("a.png", "red", "", "a red circle"),
        ("b.png", "green", "a red circle", "a green circle"),  # what the field was told of the one before
        ("c.png", "blue", "a blue star", "a blue star"),  # what was typed
    ):
        thing(colour).save(tmp_path / name)
        monkeypatch.setattr(visitor, "uploaded", (name, Uploaded(tmp_path / name)))
        assert visitor.drop_uploaded(field).startswith(f'{name} is the inset. It shows "{told}"')
        assert inserting.told == inserting.caption == told
    with pytest.raises(ImageError, match="did not arrive"):
        visitor.drop_uploaded()
    visitor.begin(None, None, "")
    assert visitor.first_places("", ["c.png is the inset"]).startswith("c.png is the inset. there is no picture yet")


class Uploaded:
    """A folder with one file, as the door leaves it."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        folder = self.path.with_suffix("")
        folder.mkdir()
        self.path.rename(folder / "upload")
        return str(folder)

    def __exit__(self, *_):
        pass


def test_another_model_says_what_to_give(small, picture):
    visitor = Visitor(small)
    visitor.begin(open_photo(picture, small, resolution=64), None, "photo")
    assert visitor.suggestions() == list(GENERAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tell_foreign(small, Image.new("RGB", (64, 64)))
    with pytest.raises(CanvasError, match="Paint there.*--graconet"):
        propose(visitor)
    place = painted((0, 0, 32, 32))
    with pytest.raises(InstructionError, match="Caption .*--blip2"):
        propose(visitor, place=place)
    assert "a place for it" in propose(visitor, caption="a kite", place=place)
    given = (
        emilie.loading.shipped("toy-graconet.safetensors"),
        str(emilie.loading.shipped("toy-blip2/config.json").parent),
    )
    visitor.inserting.networks = Networks(small, *given)
    assert "a red circle" in propose(visitor) and len(visitor.inserting.plan.boxes) == 4
    for wrong in ((given[1], None), (None, "no/such-model"), ("none.pth", None)):
        with pytest.raises(CheckpointError):
            Networks(small, *wrong)


def test_a_photo_keeps_its_size_and_its_bits(shipped):
    photo = BASE.resize((200, 200), Image.Resampling.NEAREST)
    visitor = Visitor(shipped)
    visitor.begin(open_photo(photo, shipped), None, "photo")
    propose(visitor, caption="a red circle", place=painted((32, 32, 64, 64)))
    plan = visitor.inserting.plan
    assert plan.own_box() == (100, 100, 100, 100)
    assert plan.outlined().size == plan.pasted().size == photo.size
    outside = np.s_[:80]  # above the box and its rim
    pasted = np.asarray(plan.pasted())
    assert (pasted[150, 150] == world.COLOURS["red"]).all() and (pasted[outside] == np.asarray(photo)[outside]).all()
    insert(visitor)
    assert (np.asarray(visitor.photo.image)[outside] == np.asarray(photo)[outside]).all()
    assert visitor.canvas.state.given.getbbox() == (84, 84, 200, 200)
