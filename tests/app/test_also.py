"""`emilie edit --also`: several instructions in one pass; and the options that make an edit faster."""

from pathlib import Path

import numpy as np
import pytest
import torch
from command import MODEL, run
from PIL import Image

import emilie_min as emilie

NIGHT, DAY, COMIC = "make it night", "make it day", "turn it into a comic"


def area(x0: int, y0: int, x1: int, y1: int) -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (x0, y0, x1, y1))
    return mask


LEFT, RIGHT = area(0, 0, 24, 64), area(40, 0, 64, 64)


def test_the_command_takes_several_regions(photo, capsys):
    editor = emilie.load("random", "toy", device="cpu")
    RIGHT.save("right.png")
    places = ["--box", "1=0,0,24,64", "--also", f"1=right.png:{COMIC}", "--also", f"2=0,0,24,64: {NIGHT}"]
    code, out, err = run("edit", photo, NIGHT, DAY, *places, *MODEL, capsys=capsys)
    assert code == 0 and not err and "photo_2.png" in out
    canvas = emilie.open(photo, editor, seed=0)
    for regions in ([(NIGHT, LEFT), (COMIC, RIGHT)], [(DAY, None), (NIGHT, LEFT)]):
        canvas.edit(regions, steps=1)
    written = emilie.open("out/photo.canvas", editor)
    assert [s.regions for s in written.history] == [s.regions for s in canvas.history]
    assert torch.allclose(written.latent, canvas.latent, atol=1e-4)
    strip = np.asarray(Image.open("out/photo_strip.png"))
    ink = (strip == (255, 0, 120)).all(-1)[12:268]  # the outlines, in the row of pictures
    assert [ink[:, x : x + 256].any() for x in (12, 280, 548)] == [False, True, False]
    assert ink[128, 280 : 280 + 96].any() and ink[128, 280 + 160 : 536].any()  # of both regions
    assert not ink[:, 280 + 97 : 280 + 159].any()


def test_a_region_has_settings_of_its_own(photo, editor, capsys):
    own = ["--own", "1.2=text_scale=2.5; seed=7;negative=make it night", "--own", "1.1=image_scale=0.5"]
    also = ["--box", "1=0,0,24,64", "--also", f"1=40,0,64,64:{COMIC}", *own, "--text-scale", 2]
    assert run("edit", photo, NIGHT, *also, *MODEL, capsys=capsys)[0] == 0
    written = emilie.open("out/photo.canvas", editor).state
    second = {"text_scale": 2.5, "seed": 7, "negative": "make it night"}
    assert written.settings["own"] == [{"image_scale": 0.5}, second] and written.settings["text_scale"] == 2
    for bad, why in [("1=seed=1", "whose and what"), ("1.1=seed", "whose and what"),
                     ("x.1=seed=1", "whose and what"), ("1.x=seed=1", "whose and what"),
                     ("1.3=seed=1", "no instruction 3"),
                     ("1.1=steps=2", "own settings are"), ("1.1=seed=x", "seed must be a whole number"),
                     ("2.1=seed=1", "of an edit 2")]:  # fmt: skip
        code, _, err = run("edit", photo, NIGHT, "--own", bad, *MODEL, capsys=capsys)
        assert code == 2 and why in err[0], err


def test_the_command_keeps_the_background_of_all_regions(photo, capsys):
    regions = ["--box", "1=0,0,24,64", "--also", f"1=40,0,64,64:{COMIC}", "--keep-background"]
    assert run("edit", photo, NIGHT, *regions, *MODEL, capsys=capsys)[0] == 0
    before, after = np.asarray(Image.open(photo)), np.asarray(Image.open("out/photo_1.png"))
    assert (before[:, 24:40] == after[:, 24:40]).all() and (before != after).any()


BAD = {
    "no number": ("0,0,9,9:make it day", "which edit"),
    "nothing behind the number": ("1=", "which edit"),
    "number of nothing": ("3=0,0,9,9:make it day", "no edit 3"),
    "no instruction": ("1=0,0,9,9", "where and what"),
    "empty instruction": ("1=0,0,9,9: ", "where and what"),
    "no place": ("1=:make it day", "where and what"),
    "box outside": ("1=0,0,99,99:make it day", "does not lie in"),
    "everything": ("2=0,0,64,64:make it day", "nothing is left"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_also(name, photo, capsys):
    value, message = BAD[name]
    code, _, err = run("edit", photo, NIGHT, DAY, "--also", value, *MODEL, capsys=capsys)
    assert code == 2 and len(err) == 1 and message in err[0], err
    assert not Path("out").exists()  # told before the first edit


def test_help_tells_how_to_write_also(capsys):
    code, out, _ = run("edit", "--help", capsys=capsys)
    assert code == 0 and "--also N=WHERE:INSTRUCTION" in out


def test_the_command_takes_what_makes_an_edit_faster(photo, capsys):
    def edit(name, *options):
        assert run("edit", photo, NIGHT, "--device", "cpu", "--out", name, *options, capsys=capsys)[0] == 0
        return np.array(Image.open(f"{name}/photo_1.png"), dtype=float)

    plain = edit("plain")
    for name in ("compile", "low-memory"):
        assert np.abs(edit(name, f"--{name}") - plain).max() <= 1  # grey levels
    quick = edit("quick", "--sampler", "dpmpp_2m", "--steps", "6", "--guidance-interval", "0.3,6", "--reuse", "2")
    assert 0 < np.abs(quick - plain).mean() < 30
    settings = emilie.open("quick/photo.canvas").state.settings
    said = [settings[name] for name in ("sampler", "steps", "guidance_interval", "reuse")]
    assert said == ["dpmpp_2m", 6, [0.3, 6.0], 2]
    for wrong in ("5,1", "1", "a,b"):
        code, _, err = run("edit", photo, NIGHT, f"--guidance-interval={wrong}", capsys=capsys)
        assert code == 2 and "two noise levels" in err[0]
    code, _, err = run("edit", photo, NIGHT, "--compile", "--low-memory", capsys=capsys)
    assert code == 2 and "choose one" in err[0]
