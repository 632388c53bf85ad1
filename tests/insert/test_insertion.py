"""Object insertion: an inset and its mask, where and what, the edit, and the command with its three pictures."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from command import run
from PIL import Image

import emilie_min as emilie
from emilie_min.canvas.stack import change
from emilie_min.errors import CanvasError, CheckpointError, ImageError, InstructionError, MaskError
from emilie_min.insert import insertion
from emilie_min.insert.caption import PARTS, Captioner, find
from emilie_min.insert.insertion import insert, plan, read_inset
from emilie_min.loading import shipped as shipped_file
from emilie_min.toy import world

BLIP2 = shipped_file("toy-blip2/config.json").parent
QUICK = {"steps": 1, "caption": "a red circle"}


def thing(shape="circle", colour="red", style="day"):
    """An object of the small world, cut out: RGBA, 32 px."""
    white = np.full((world.CELL, world.CELL, 3), 255, np.float32)
    pixels = (world.draw(white, world.Object(shape, colour, "top left"), style) + 0.5).astype(np.uint8)
    alpha = (world.alpha(shape, 0, 0, outline=style == "comic") * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(np.concatenate([pixels, alpha], 2))


def speck():
    """One pixel that can be seen."""
    out = Image.new("RGBA", (32, 32))
    out.putpixel((9, 9), (200, 0, 0, 255))
    return out


def base(*places):
    """A scene with a square in each of these places."""
    colours = list(world.COLOURS)[1:]
    things = tuple(world.Object("square", c, p) for c, p in zip(colours, places))
    return world.render(world.Scene("sand", "day", things))


@pytest.fixture(scope="module")
def captioner():
    return Captioner(BLIP2, "cpu")


@pytest.fixture
def canvas(shipped):
    return emilie.open(base("top left", "top right", "bottom left"), shipped)


# ---- insets


def test_the_mask_is_the_one_given_or_alpha_or_the_rectangle():
    cut, mask = thing(), Image.new("L", (32, 32))
    mask.paste(255, (3, 3, 20, 9))
    assert read_inset(cut).mask.tobytes() == cut.getchannel("A").tobytes()
    assert read_inset(cut, mask).mask.getbbox() == (3, 3, 20, 9)
    assert read_inset(cut.convert("RGB")).mask.getextrema() == (255, 255)
    assert read_inset(cut).seen.getpixel((0, 0)) == (255, 255, 255)
    hidden = Image.new("RGBA", (32, 32), (0, 255, 0, 0))
    hidden.paste((200, 0, 0, 255), (8, 8, 24, 24))
    assert read_inset(hidden).pixels.getpixel((0, 0)) == (200, 0, 0)  # no green fringe when it is resized


@pytest.mark.parametrize(
    ("inset", "mask", "error", "why"),
    [
        (Image.new("RGB", (1, 1)), None, ImageError, "1x1 px shows nothing"),
        (Image.new("RGBA", (20, 20)), None, ImageError, "transparent everywhere"),
        (speck(), None, ImageError, "object has 1x1 px and shows nothing"),
        (thing(), Image.new("L", (9, 9), 255), MaskError, "the inset's mask: .*9x9 px"),
        (thing(), Image.new("L", (32, 32)), MaskError, "the inset's mask: .*empty"),
    ],
)
def test_insets_that_show_nothing_are_refused(inset, mask, error, why):
    with pytest.raises(error, match=why):
        read_inset(inset, mask)


def test_a_large_inset_is_told_of(canvas):
    with pytest.warns(UserWarning, match="90x90 px is larger than the picture"):
        plan(canvas, thing().resize((90, 90)), caption="a red circle")


# ---- where and what


def test_the_small_proposer_finds_the_free_place(canvas):
    boxes = plan(canvas, thing(), caption="a red circle", proposals=8).boxes
    assert [insertion.place_of(box, (64, 64)) for box in boxes].count("bottom right") >= 7


def test_no_free_place_is_told(shipped):
    full = emilie.open(base(*world.PLACES), shipped)
    with pytest.raises(CanvasError, match="no free place: every proposal lies on an object"):
        plan(full, thing(), caption="a red circle")
    assert plan(full, thing(), caption="a red circle", at=(0, 0, 32, 32)).boxes == [(0, 0, 32, 32)]


class Fixed:
    """A proposer of another kind."""

    def __init__(self, *boxes):
        self.boxes = list(boxes)

    def propose(self, base, inset, mask, n, seed):
        return self.boxes


def test_any_proposer_will_do_and_boxes_that_vanish_are_left_out(canvas):
    with pytest.warns(UserWarning, match="1 of 2 proposals are smaller"):
        planned = plan(canvas, thing(), caption="a kite", proposals=2, proposer=Fixed((0, 0, 1, 9), (33, 33, 20, 20)))
    assert planned.boxes == [(33, 33, 20, 20)] and planned.instruction() == "add a kite at the bottom right"
    with pytest.warns(UserWarning, match="40x9 px at -8,60 does not lie in the picture of 64x64 px and is cut off"):
        planned = plan(canvas, thing(), caption="a kite", proposals=1, proposer=Fixed((-8, 60, 40, 9)))
    assert planned.boxes == [(0, 60, 32, 4)]
    with pytest.warns(UserWarning), pytest.raises(CanvasError, match="no free place: every proposal is too small"):
        plan(canvas, thing(), caption="a kite", proposals=1, proposer=Fixed((99, 0, 20, 20)))
    with pytest.warns(UserWarning), pytest.raises(CanvasError, match="no free place: every proposal is too small"):
        plan(canvas, thing(), caption="a kite", proposals=1, proposer=Fixed((0, 0, 1, 9)))


def test_a_caption_becomes_an_instruction_by_a_format(canvas):
    make = partial(plan, canvas, thing(), at=(0, 0, 9, 9), caption=" a red\ncircle ")
    assert make().instruction() == "add a red circle at the top left"
    assert make(format="put {caption} there").instruction() == "put a red circle there"
    for wrong in ("{what}", "{", "{0}"):
        with pytest.raises(InstructionError, match="is not one with {caption}"):
            make(format=wrong)
    with pytest.raises(InstructionError, match="the caption is empty"):
        make(caption=" ")


def test_other_models_need_a_proposer_and_a_captioner(small, picture):
    canvas = emilie.open(picture, small, resolution=64)
    with pytest.raises(CanvasError, match="--graconet"):
        plan(canvas, thing(), caption="a kite")
    with pytest.raises(CheckpointError, match="hf download"):
        plan(canvas, thing(), at=(0, 0, 32, 32))


# ---- captions


def test_the_small_captioner_says_what_an_inset_shows(captioner):
    for shape, colour, style in (("star", "blue", "day"), ("cross", "pink", "comic"), ("triangle", "green", "day")):
        assert captioner(read_inset(thing(shape, colour, style)).seen) == f"a {colour} {shape}"


def test_a_folder_that_is_no_whole_blip2_is_refused(tmp_path):
    whole = shutil.copytree(BLIP2, tmp_path / "whole")
    (whole / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="it lacks the tokenizer: copy all its files"):
        Captioner(whole)
    with pytest.raises(CheckpointError, match="is not BLIP-2: its config.json says clip"):
        Captioner(shipped_file("toy-clip/config.json").parent)
    with pytest.raises(CheckpointError, match="neither a folder nor in the hub's cache"):
        Captioner("no/such-model")


def test_a_blip2_that_lacks_tensors_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    lame = shutil.copytree(BLIP2, tmp_path / "lame")
    state = load_file(lame / "model.safetensors")
    tokens = state.pop("query_tokens")
    save_file(state, lame / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensors of a BLIP-2, such as query_tokens"):
        Captioner(lame)
    save_file(state | {"query_tokens": tokens / 0}, lame / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lame is damaged: query_tokens is not finite"):
        Captioner(lame)


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda config: config.pop("vision_config"),
            r"a model of 2 GB in float16, and its weight files have 0\.0015",
        ),
        (lambda config: config["qformer_config"].update(num_hidden_layers=10**7), "more than 1000 layers"),
    ],
)
def test_a_blip2_whose_config_is_of_a_larger_model_is_refused_before_that_is_made(change, told, tmp_path):
    larger = shutil.copytree(BLIP2, tmp_path / "larger")
    config = json.loads((larger / "config.json").read_text())
    change(config)
    (larger / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=told):
        Captioner(larger, "cpu")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (IndexError("\x1bout of\nrange"), "this BLIP-2 fails.*: \\?out of. Copy"),
        (MemoryError(), "^out of memory.*--caption"),
    ],
)
def test_a_captioner_that_fails(captioner, monkeypatch, error, told):
    def fail(**_):
        raise error

    monkeypatch.setattr(captioner.model, "generate", fail)
    with pytest.raises(emilie.EmilieError, match=told):
        captioner(thing().convert("RGB"))


@pytest.mark.parametrize("said", ["{", "[]", "\udcff", '{"model_type": "clip"}'])
def test_a_folder_that_is_no_blip2(tmp_path, said):
    for names in PARTS.values():
        (tmp_path / names[0]).touch()
    (tmp_path / "config.json").write_text(said, "utf-8", "surrogateescape")
    with pytest.raises(CheckpointError, match="BLIP-2" if "clip" in said else "config.json cannot be read"):
        find(tmp_path)


def test_the_captioner_leaves_a_full_card(captioner, monkeypatch):
    moved = []
    monkeypatch.setattr(captioner, "free", lambda: 0)
    monkeypatch.setattr(captioner, "leave", lambda: moved.append("left"))
    assert captioner(read_inset(thing()).seen) == "a red circle" and moved == ["left"]


# ---- the edit


def test_an_insertion_is_an_edit_like_any_other(canvas, shipped, tmp_path):
    insert(canvas, thing(), **QUICK)
    state = canvas.state
    assert state.instruction == "add a red circle at the bottom right" and state.settings["steps"] == 1
    assert state.inserted["caption"] == "a red circle" and len(state.inserted["boxes"]) == 4
    canvas.save(tmp_path / "a.safetensors")
    insert(canvas, thing("star", "blue"), steps=1, caption="a blue star", at=(0, 0, 32, 32))
    again = emilie.open(tmp_path / "a.safetensors", shipped)
    assert again.states[1].inserted == state.inserted
    insert(again, thing("star", "blue"), steps=1, caption="a blue star", at=(0, 0, 32, 32))
    assert again.image.tobytes() == canvas.image.tobytes()
    canvas.undo()
    assert canvas.state is state
    assert canvas.undo().tobytes() == base("top left", "top right", "bottom left").tobytes()


def test_outside_the_box_and_its_rim_nothing_moves(canvas):
    before, planned = canvas.latent, plan(canvas, thing(), caption="a red circle")
    inside = np.asarray(planned.mask().reduce(canvas.editor.vae.factor)) > 0
    for _ in planned.steps(steps=2):
        pass
    same = (before == canvas.latent).all(1)[0].numpy()
    assert same[~inside].all() and not same[inside].all()


def test_an_insertion_that_fails_changes_nothing(canvas):
    for wrong in ({"steps": 0}, {"take": 9}, {"at": (0, 0, 99, 9)}, {"proposals": 0}, {"caption": "a zeppelin"}):
        with pytest.raises(emilie.EmilieError):
            insert(canvas, thing(), **QUICK | wrong)
    assert len(canvas.states) == 1


def test_the_object_itself_is_kept_the_more_the_lower_the_level(canvas):
    planned = plan(canvas, thing("circle", "red"), caption="a green cross", at=(32, 32, 64, 64))  # not what it is
    pasted, off = np.asarray(planned.pasted()).astype(int), []
    for level in (0.1, 0.5, 1):
        for _ in planned.keep_steps(level=level):
            pass
        image = np.asarray(canvas.image).astype(int)
        off.append(np.abs(image - pasted)[36:60, 36:60].mean())
        assert canvas.state.inserted["kept"] == level and canvas.state.parent == 0
        canvas.undo()
    assert off[0] < off[1] <= off[2] + 1
    insert(canvas, thing(), keep=0.2, keep_background=True, **QUICK | {"steps": 4})
    mask, before = np.asarray(canvas.state.mask), np.asarray(canvas.states[0].image)
    assert (np.asarray(canvas.image)[mask == 0] == before[mask == 0]).all()
    for wrong in (-1, 2, "much"):
        with pytest.raises(emilie.EmilieError, match="keep is a part of the steps|keep must be"):
            insert(canvas, thing(), keep=wrong, at=(0, 0, 32, 32), **QUICK)


def test_an_insertion_can_be_hidden_and_shown_like_any_edit(canvas):
    insert(canvas, thing(), **QUICK)
    canvas.edit("make it night", steps=1)
    shown = canvas.image
    for name in ("hide", "show"):
        for _ in change(canvas, name, 1):
            pass
        if name == "hide":
            assert [state.shown for state in canvas.stack] == [False, True]
    assert canvas.image.tobytes() == shown.tobytes()


# ---- the command


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base("top left", "top right", "bottom left").save("base.png")
    thing().save("kite.png")
    return tmp_path


def test_three_columns_come_out(files, capsys):
    args = [
        "insert",
        "base.png",
        "kite.png",
        "--device",
        "cpu",
        "--steps",
        "2",
        "--out",
        "o",
        "--canvas",
        "c.safetensors",
    ]
    code, out, _ = run(*args, capsys=capsys)
    assert code == 0 and 'the inset shows "a red circle"' in out
    assert {p.name for p in (files / "o").iterdir()} == {
        f"base_{x}.png" for x in ("1", "1_proposals", "1_paste", "strip")
    }
    paste = np.asarray(Image.open("o/base_1_paste.png"))
    assert (paste[48, 48] == world.COLOURS["red"]).all() and (paste[16, 16] != world.COLOURS["red"]).any()
    code, out, _ = run(*args, "--at", "0,0,32,32", capsys=capsys)
    assert code == 0 and "base_2.png" in out
    states = emilie.open("c.safetensors", emilie.load(device="cpu")).states
    asked = [f"add a red circle at the {place}" for place in ("bottom right", "top left")]
    assert [state.instruction for state in states] == ["", *asked]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--take", "5"], "there are proposals 1 to 4"),
        (["--take", "0"], "there are proposals 1 to 4"),
        (["--proposals", "0"], "--proposals 0: one at least"),
        (["--at", "1,2,3"], "a box is four whole numbers"),
        (["--graconet", "base.png"], "base.png"),
        (["--graconet", "none.pth"], "no weights at none.pth"),
        (["--blip2", "."], "is no whole BLIP-2"),
        (["--inset-mask", "base.png"], "the inset's mask: "),
        (["--steps", "0"], "steps"),
    ],
)
def test_what_cannot_be_is_one_line(files, capsys, args, why):
    code, _, err = run("insert", "base.png", "kite.png", "--device", "cpu", *args, capsys=capsys)
    assert code == 2 and why in err[-1]
