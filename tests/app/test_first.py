"""The first minute: which model is taken, what is written at which size, what a picture says, what people mistype."""

import json
from pathlib import Path

import numpy as np
import pytest
from command import MODEL, run
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import emilie_min as emilie
from emilie_min.canvas.photo import changed
from emilie_min.toy import judge

NIGHT = "make it night"


@pytest.fixture
def large(photo) -> Image.Image:
    """A photo of sides that no working size has."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (301, 500, 3), dtype=np.uint8))
    image.save("large.png")
    return image


def array(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_released_weights_are_found_and_said(photo, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("emilie_min.loading.load", lambda weights, *_: seen.append(weights) or 1 / 0)
    monkeypatch.setattr("emilie_min.loading.weights_folders", lambda: [Path("weights")])
    Path("weights").mkdir()
    for name in ("instruct-pix2pix-00-22000.safetensors", "ip2p.safetensors"):
        Path("weights", name).touch()
        for more in ([], ["--config", "toy"]):
            with pytest.raises(ZeroDivisionError):
                run("edit", photo, NIGHT, *more, capsys=capsys)
    before, after = (Path("weights", name) for name in ("instruct-pix2pix-00-22000.safetensors", "ip2p.safetensors"))
    assert seen == [before, None, after, None]
    with pytest.raises(ZeroDivisionError):
        run("demo", capsys=capsys)  # which is of the small world, whatever there is
    assert seen[-1] is None


def test_the_small_model_says_what_it_is_and_that_a_photo_is_no_scene(photo, large, capsys, monkeypatch):
    monkeypatch.setattr("emilie_min.app.options.find_released", lambda: None)
    _, out, notes = run("edit", photo, NIGHT, "--steps", 1, "--device", "cpu", capsys=capsys)
    assert "the small model that ships" in out and not notes
    _, _, notes = run("edit", "large.png", NIGHT, "--steps", 1, "--device", "cpu", capsys=capsys)
    assert len(notes) == 1 and "large.png is no scene" in notes[0] and "emilie download" in notes[0]


def test_what_is_a_scene(picture):
    tiles = Image.new("RGB", (192, 128), "white")
    tiles.paste(picture, (64, 64))
    assert judge.is_scene(picture) and judge.is_scene(tiles)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert not judge.is_scene(noise) and not judge.is_scene(np.zeros((32, 32, 3), np.uint8))


def test_outside_the_masks_the_photo_stays_to_the_bit(large, capsys):
    """Also where the mask's border is no border of a pixel that is worked on, and through a chain and a session."""
    mask = Image.new("L", large.size)
    mask.paste(255, (133, 77, 291, 203))
    mask.putpixel((200, 150), 0)
    mask.save("mask.png")
    where = ["--mask", "1=mask.png", "--box", "2=17,19,111,93"]
    code, out, _ = run("edit", "large.png", NIGHT, "make it day", *where, *MODEL, capsys=capsys)
    assert code == 0
    first, second, photo = array("out/large_1.png"), array("out/large_2.png"), np.asarray(large)
    inside = np.asarray(mask) > 0
    assert first.shape == photo.shape and np.array_equal(first[~inside], photo[~inside])
    assert (first != photo).any(-1)[inside].mean() > 0.9
    box = np.zeros_like(inside)
    box[19:93, 17:111] = True
    assert np.array_equal(second[~box], first[~box]) and (second != first)[box].any()
    assert run("edit", "large.png", NIGHT, "--canvas", "s.safetensors", *MODEL, capsys=capsys)[0] == 0
    more = ["--canvas", "s.safetensors", "--box", "1=17,19,111,93", "--out", "o", *MODEL]
    assert run("edit", "large.png", "make it day", *more, capsys=capsys)[0] == 0
    whole, boxed = array("out/large-2_1.png"), array("o/large_2.png")
    assert np.array_equal(boxed[~box], whole[~box]) and (boxed != whole)[box].any()
    _, _, notes = run("edit", "make it day", "--canvas", "s.safetensors", *MODEL, capsys=capsys)
    assert "64x64 px" in notes[0] or "64x32 px" in notes[0]


def test_crops_at_the_command(large, capsys):
    """Two edits in one crop, a third in another, each outside its mask to the bit; both sessions are kept."""
    boxes = ((20, 20, 35, 35), (22, 24, 40, 38), (400, 200, 420, 222))
    where = [word for i, box in enumerate(boxes, 1) for word in ("--box", f"{i}={','.join(map(str, box))}")]
    texts = [NIGHT, "make it day", NIGHT]
    code, _, notes = run("edit", "large.png", *texts, *where, *MODEL, capsys=capsys)
    assert code == 2 and "vanishes" in notes[-1]
    code, out, _ = run("edit", "large.png", *texts, *where, "--crop", *MODEL, capsys=capsys)
    assert code == 0 and "1. a new crop, 45x45 px at 5,5" in out and "2. goes on in the crop" in out
    assert "3. outside the crop before: a new one" in out
    sessions = [emilie.open(f"out/{name}.canvas", emilie.load("random", "toy", device="cpu")) for name in
                ("large", "large-part2")]  # fmt: skip
    assert [len(session.history) for session in sessions] == [2, 1] and sessions[0].part == (5, 5, 50, 50)
    before = np.asarray(large)
    for number, (x0, y0, x1, y1) in enumerate(boxes, 1):
        after = array(f"out/large_{number}.png")
        moved = (after != before).any(-1)
        assert moved[y0:y1, x0:x1].mean() > 0.5 and moved.sum() == moved[y0:y1, x0:x1].sum()
        before = after
    assert "3. make it night" in run("info", "out/large_3.png", capsys=capsys)[1]
    more = ["--canvas", "out/large.canvas", "--box", "1=22,24,40,38", "--out", "o"]
    assert run("edit", "large.png", NIGHT, *more, *MODEL, capsys=capsys)[0] == 0
    for words, told in (
        (["--crop"], "needs a --mask"),
        (["--crop", "--working-size", *where[:2]], "no --working-size"),
    ):
        code, _, err = run("edit", "large.png", NIGHT, *words, *MODEL, capsys=capsys)
        assert code == 2 and told in err[0]


def test_a_small_mask_in_a_large_photo_gets_the_advice(large, capsys):
    _, _, notes = run("edit", "large.png", NIGHT, "--box", "1=0,0,66,66", *MODEL, capsys=capsys)
    assert "--crop edits it at full resolution" in "".join(notes)


def test_a_photo_is_edited_whole(large, capsys):
    assert run("edit", "large.png", NIGHT, *MODEL, capsys=capsys)[0] == 0
    moved = (array("out/large_1.png") != np.asarray(large)).any(-1)
    assert moved[:, 0].mean() > 0.9 and moved[:, -1].mean() > 0.9 and moved[0].mean() > 0.9


def test_the_masks_opposite(photo, capsys, editor):
    options = [*MODEL, "--keep-background"]
    assert run("edit", photo, NIGHT, "--box", "1=0,0,32,64", "--mask-invert", *options, capsys=capsys)[0] == 0
    assert run("edit", photo, NIGHT, "--box", "1=32,0,64,64", *options, capsys=capsys)[0] == 0
    assert np.array_equal(array("out/photo_1.png"), array("out/photo-2_1.png"))


def test_a_picture_says_how_it_was_made(photo, capsys):
    box, about = ["--box", "2=0,0,32,64"], "in a mask of 50.0% of the picture"
    assert run("edit", photo, NIGHT, "make it day", *box, *MODEL, "--seed", 7, capsys=capsys)[0] == 0
    code, out, _ = run("info", "out/photo_2.png", capsys=capsys)
    assert code == 0 and f"2. make it day, {about}" in out and "1. make it night" in out and "seed       7" in out
    assert "toy/random" in out and emilie.__version__ in out and "text_scale 1.0" in out
    with Image.open("out/photo_2.png") as image:
        assert image.info["Description"] == "make it night | make it day"


def test_what_a_picture_says_is_not_trusted(photo, capsys):
    for said, told in (
        (None, "does not say how"),
        ("{", "broken"),
        ('{"edits": 3}', "broken"),
        ('["edits"]', "broken"),
        ('{"edits": {}}', "broken"),
        (f'{{"edits": [], "x": "{"a" * 2**20}"}}', "broken"),  # longer than anything that is written
        ('{"edits": [{"instruction": 3, "settings": {}}]}', "broken"),
        ('{"edits": [{"instruction": "x", "settings": []}]}', "broken"),
        ("[" * 100000, "broken"),
    ):
        texts = PngInfo()
        if said is not None:
            texts.add_itxt("emilie", said)
        Image.new("RGB", (8, 8)).save("said.png", pnginfo=texts)
        code, _, err = run("info", "said.png", capsys=capsys)
        assert code == 2 and told in err[0] and len(err) == 1
    photo.write_bytes(photo.read_bytes()[:200])
    code, _, err = run("info", photo, capsys=capsys)
    assert code == 2 and "cannot be read as a picture" in err[0] and len(err) == 1
    texts = PngInfo()
    texts.add_itxt("emilie", json.dumps({"edits": [{"instruction": "\x1b[31mred", "settings": {"\x1b": 1}}]}))
    Image.new("RGB", (8, 8)).save("said.png", pnginfo=texts)
    assert "\x1b" not in run("info", "said.png", capsys=capsys)[1]


def test_it_says_how_much_changed(photo, capsys, picture):
    shifted = Image.eval(picture, lambda v: min(255, v + 60))
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    assert changed(picture, picture) == 0 and changed(picture, shifted) > 0.5
    assert changed(picture, Image.composite(shifted, picture, half), half) > 1.8 * changed(
        picture, Image.composite(shifted, picture, half)
    )
    options = ["--steps", 12, "--device", "cpu", "--weights", emilie.loading.shipped("toy.safetensors")]
    _, out, _ = run("edit", photo, NIGHT, *options, capsys=capsys)
    assert "changed 100.0% of the picture\n" in out and " s; " in out
    _, out, _ = run("edit", photo, NIGHT, "--text-scale", 0, *options, capsys=capsys)
    assert "of the picture: raise --text-scale or lower --image-scale" in out


def test_emilie_alone_says_what_there_is(capsys):
    code, out, err = run(capsys=capsys)
    assert code == 0 and not err and "emilie download" in out and "make it winter" in out


MISTYPED = {
    "a picture as the command": (["photo.png", NIGHT], 'emilie edit photo.png "make it winter"'),
    "a second picture": (["edit", "photo.png", "b.jpg", NIGHT], "b.jpg is a file and no instruction"),
    "a mask without its option": (["edit", "photo.png", NIGHT, "mask.png"], "--mask 1=mask.png"),
    "forgotten quotes": (["edit", "photo.png", "make", "it", "night"], '"make it night"'),
    "quotes of another shell": (["edit", "photo.png", "'make", "it", "night'"], '"make it night"'),
    "some quotes forgotten": (["edit", "photo.png", NIGHT, "make", "it", "day", NIGHT], '"make it day"'),
}


@pytest.mark.parametrize("name", MISTYPED)
def test_what_is_mistyped_is_told_before_anything_is_done(name, photo, capsys):
    words, told = MISTYPED[name]
    code, _, err = run(*words, *MODEL, capsys=capsys)
    assert code == 2 and len(err) == 1 and told in err[0] and not Path("out").exists()


def test_a_single_word_is_told_and_done(photo, capsys):
    code, _, notes = run("edit", photo, "night", *MODEL, capsys=capsys)
    assert code == 0 and len(notes) == 1 and "single word" in notes[0]
