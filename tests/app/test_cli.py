"""The command as a person types it: what it writes, and one line and exit code 2 for whatever cannot work.

Each kind of bad input once; what else a picture, a mask or a setting may not be is tried where it is refused.
"""

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from command import MODEL, run
from PIL import Image

import emilie_min as emilie
from emilie_min.canvas.settings import Settings
from emilie_min.toy import world


def test_edit_writes_every_picture_the_session_and_a_strip(photo, capsys):
    code, out, err = run("edit", photo, "make it night", "make it day", "--box", "2=0,0,32,64", *MODEL, capsys=capsys)
    assert code == 0 and not err
    written = {"photo_1.png", "photo_2.png", "photo_strip.png", "photo.canvas"}
    assert {p.name for p in Path("out").iterdir()} == written
    assert all(name in out for name in written)
    assert Image.open("out/photo_2.png").size == (64, 64)


def test_a_second_run_overwrites_nothing(photo, capsys):
    for _ in range(2):
        assert run("edit", photo, "make it night", *MODEL, capsys=capsys)[0] == 0
    names = {p.name for p in Path("out").iterdir()}
    assert {"photo_1.png", "photo-2_1.png", "photo.canvas", "photo-2.canvas"} <= names


def test_a_canvas_goes_on(photo, capsys):
    both = ["make it night", "make it day"]
    assert run("edit", photo, *both, "--out", "a", *MODEL, capsys=capsys)[0] == 0
    assert run("edit", photo, both[0], "--out", "b", "--canvas", "s.safetensors", *MODEL, capsys=capsys)[0] == 0
    assert run("edit", both[1], "--out", "b", "--canvas", "s.safetensors", *MODEL, capsys=capsys)[0] == 0
    assert Path("a/photo_2.png").read_bytes() == Path("b/s_2.png").read_bytes()
    world.render(world.scene(4)).save("other.png")
    code, _, err = run("edit", "other.png", both[0], "--canvas", "s.safetensors", *MODEL, capsys=capsys)
    assert code == 2 and "another picture" in err[0]


@pytest.mark.parametrize("number", [0, 1])
def test_what_was_finished_stays_when_an_edit_fails(photo, capsys, monkeypatch, number):
    from emilie_min.canvas.canvas import Canvas

    steps = Canvas.steps

    def fails(self, *args, **kwargs):
        if self.at == number:
            raise KeyboardInterrupt
        return steps(self, *args, **kwargs)

    monkeypatch.setattr(Canvas, "steps", fails)
    code, _, err = run("edit", photo, "make it night", "make it day", *MODEL, capsys=capsys)
    assert code == 130 and "interrupted" in err[0]
    assert {p.name for p in Path("out").iterdir()} == ({"photo_1.png", "photo.canvas"} if number else set())


def test_pictures_have_the_photos_own_size_or_the_working_one(photo, capsys):
    Image.fromarray(np.full((51, 99, 3), 90, np.uint8)).save("odd.png")
    for option, size in (([], (99, 51)), (["--working-size"], (80, 48)), (["--resolution", "native"], (99, 51))):
        assert run("edit", "odd.png", "make it night", *option, "--out", "o", *MODEL, capsys=capsys)[0] == 0
        assert Image.open(max(Path("o").glob("odd*_1.png"), key=os.path.getmtime)).size == size


def test_options_may_stand_anywhere(photo, capsys):
    code, _, err = run("edit", photo, "--seed", 1, "make it night", *MODEL, "make it day", capsys=capsys)
    assert code == 0 and not err and Path("out/photo_2.png").exists()


def test_names_that_are_patterns_are_not_overwritten(photo, capsys):
    photo.rename("p[1].png")
    for _ in range(2):
        assert run("edit", "p[1].png", "make it night", *MODEL, capsys=capsys)[0] == 0
    assert {"p[1]_1.png", "p[1]-2_1.png"} <= {p.name for p in Path("out").iterdir()}


def test_a_session_without_its_pictures_is_not_overwritten(photo, capsys):
    assert run("edit", photo, "make it night", *MODEL, capsys=capsys)[0] == 0
    for path in Path("out").glob("*.png"):
        path.unlink()
    assert run("edit", photo, "make it day", *MODEL, capsys=capsys)[0] == 0
    assert Path("out/photo-2_1.png").exists()


def test_going_on_does_not_overwrite_another_session(photo, capsys):
    assert run("edit", photo, "make it night", "make it day", *MODEL, capsys=capsys)[0] == 0
    before = {p: p.read_bytes() for p in Path("out").iterdir()}
    for text in ("make it day", "make it night"):
        assert run("edit", photo, text, "--canvas", "s.safetensors", *MODEL, capsys=capsys)[0] == 0
    assert all(p.read_bytes() == data for p, data in before.items())
    assert len(list(Path("out").glob("photo*_[0-9].png"))) == 4


def test_going_on_refuses_what_it_cannot_change(photo, capsys):
    assert run("edit", photo, "make it night", "--canvas", "s.safetensors", *MODEL, capsys=capsys)[0] == 0
    for args, message in (
        (["phto.png", "make it day"], "no picture at phto.png"),
        (["make it day", "--resolution", "64"], "--resolution"),
    ):
        code, _, err = run("edit", *args, "--canvas", "s.safetensors", *MODEL, capsys=capsys)
        assert code == 2 and message in err[0]


OPTIONS = {
    "steps": 2,
    "text_scale": 2.5,
    "image_scale": 1.25,
    "gate": "eq8",
    "soft": True,
    "rescale": "exact",
    "iterate": "image",
    "keep_background": True,
    "seed": 7,
    "sampler": "dpmpp_2m",
    "guidance_interval": (0.5, 9.0),
    "reuse": 3,
    "reuse_guidance": 0.5,
    "negative": "make it night",
    "further": (("make it day", 0.5), ("turn it into a comic", -1.0)),
}
WRITTEN = {"further": "0.5:make it day; -1:turn it into a comic"}


def test_every_setting_is_an_option():
    assert {field.name for field in fields(Settings)} == {*OPTIONS, "allow_empty"}
    assert all(value != getattr(Settings(), name) for name, value in OPTIONS.items())


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_reaches_the_edit(name, photo, editor, capsys):
    value = OPTIONS[name]
    text = WRITTEN.get(name, ",".join(map(str, value)) if isinstance(value, tuple) else value)
    text = [] if value is True else [text]
    box = ["--box", "1=0,0,32,64"]
    code, _, err = run(
        "edit", photo, "make it night", *box, *MODEL, "--" + name.replace("_", "-"), *text, capsys=capsys
    )
    assert code == 0 and not err
    canvas = emilie.open("out/photo.canvas", editor)
    written = {"steps": 1, "seed": 0, "text_scale": 1.0, "image_scale": 1.0} | {name: value}
    settings = vars(Settings(**canvas.state.settings))
    assert settings == vars(Settings(**written))
    assert canvas.seed == written["seed"]


def test_a_seed_of_its_own_for_what_a_canvas_goes_on_with(photo, editor, capsys):
    session = ["--canvas", "s.safetensors", *MODEL]
    assert run("edit", photo, "make it night", *session, "--seed", 5, capsys=capsys)[0] == 0
    assert run("edit", "make it day", *session, "--seed", 7, capsys=capsys)[0] == 0
    assert run("edit", "make it night", *session, capsys=capsys)[0] == 0
    canvas = emilie.open("s.safetensors", editor)
    assert canvas.seed == 5 and [state.settings["seed"] for state in canvas.history] == [5, 7, 5]


def test_the_background_is_kept_where_there_are_masks(photo, editor, capsys):
    texts = ["make it night", "make it day", "--box", "2=0,0,32,64", "--keep-background"]
    assert run("edit", photo, *texts, *MODEL, capsys=capsys)[0] == 0
    history = emilie.open("out/photo.canvas", editor).history
    assert [state.settings["keep_background"] for state in history] == [False, True]


def test_demo_wants_the_small_worlds_model(photo, capsys):
    config = Path("big.yaml")
    text = (files("emilie_min") / "configs" / "toy.yaml").read_text()
    config.write_text(text.replace("resolution: 64", "resolution: 128"))
    code, _, err = run("demo", "--weights", "random", "--config", config, "--device", "cpu", capsys=capsys)
    assert code == 2 and "small world" in err[0] and not Path("out").exists()


def test_what_cannot_work_is_told_before_it_begins(photo, capsys, monkeypatch):
    text = (files("emilie_min") / "configs" / "toy.yaml").read_text()
    Path("big.yaml").write_text(text.replace("resolution: 64", "resolution: 128"))
    monkeypatch.setattr("emilie_min.toy.evaluate.evaluate", lambda *_, **__: pytest.fail("it began"))
    for args, told in (
        (["studio", "--auth", "ann", "--weights", "none.ckpt"], "USER:PASSWORD"),
        (["toy-eval", "--out", "photo.png/e.json", *MODEL[:-2]], "cannot write"),
        (["toy-eval", *MODEL[:-2], "--config", "big.yaml"], "small world"),
    ):
        code, _, err = run(*args, capsys=capsys)
        assert code == 2 and told in err[-1], err


def test_the_tokenizer_alone_is_downloaded(capsys, monkeypatch):
    from emilie_min.checkpoint import download, ready

    monkeypatch.setattr(ready, "ready", lambda *_, **__: pytest.fail("the weights, too"))
    monkeypatch.setattr(download, "download", lambda folder, tokenizer_only: f"{folder} {tokenizer_only}")
    code, out, _ = run("download", "--tokenizer", "--out", "here", capsys=capsys)
    assert (code, out) == (0, "here True\n")


def broken_png(path: Path) -> None:
    path.write_bytes(Path("photo.png").read_bytes()[:300])


BAD = {
    "no picture": (["none.png", "make it night"], "no picture at none.png"),
    "truncated picture": (["broken.png", "make it night"], "cannot be read"),
    "no instruction": (["photo.png"], "no instruction"),
    "empty instruction": (["photo.png", "make it night", " "], "empty"),
    "too many tokens": (["photo.png", "make it night " * 40], "would be cut"),
    "unknown word": (["photo.png", "make it winter"], "'winter'"),
    "unknown word in the last": (["photo.png", "make it night", "make it winter"], "'winter'"),
    "mask for no edit": (["photo.png", "make it night", "--mask", "2=mask.png"], "no edit 2"),
    "an endless number": (["photo.png", "make it night", "--box", "9" * 5000 + "=0,0,9,9"], "which edit"),
    "dashes as a value": (["photo.png", "make it night", "--config=--"], "-- is no value"),
    "dashes twice": (["--", "photo.png", "--", "make it night"], "-- is no value"),
    "mask without number": (["photo.png", "make it night", "--mask", "mask.png"], "which edit"),
    "mask for a word": (["photo.png", "make it night", "--mask", "x=mask.png"], "which edit"),
    "mask twice": (["photo.png", "make it night", "--mask", "1=mask.png", "--box", "1=0,0,9,9"], "already"),
    "mask of another size": (["photo.png", "make it night", "--mask", "1=small.png"], "same size"),
    "vanishing mask": (["photo.png", "make it night", "--box", "1=0,0,1,1"], "vanishes"),
    "box of words": (["photo.png", "make it night", "--box", "1=a,b,c,d"], "four whole numbers X0,Y0,X1,Y1"),
    "box of three": (["photo.png", "make it night", "--box", "1=1,2,3"], "four whole numbers X0,Y0,X1,Y1"),
    "background of nothing": (["photo.png", "make it night", "--keep-background"], "needs a --mask"),
    "unknown gate": (["photo.png", "make it night", "--gate", "wall"], "--gate"),
    "unknown option": (["photo.png", "make it night", "--speed", "9"], "--speed"),
    "no steps": (["photo.png", "make it night", "--steps", "0"], "whole number from 1"),
    "scale of nan": (["photo.png", "make it night", "--text-scale", "nan"], "finite"),
    "levels of words": (["photo.png", "make it night", "--guidance-interval", "a,b"], "two noise levels"),
    "levels the wrong way": (["photo.png", "make it night", "--guidance-interval", "5,1"], "two noise levels"),
    "a seed of words": (["photo.png", "make it night", "--seed", "x"], "--seed"),
    "instruction for a picture": (["make it night " * 99, "make it night"], "picture"),
    "resolution of words": (["photo.png", "make it night", "--resolution", "big"], "--resolution"),
    "resolution of nothing": (["photo.png", "make it night", "--resolution", "0"], "resolution must be"),
    "no weights": (["photo.png", "make it night", "--weights", "none.ckpt"], "no weights at none.ckpt"),
    "weights of garbage": (["photo.png", "make it night", "--weights", "photo.png"], "neither"),
    "unknown config": (["photo.png", "make it night", "--config", "none.yaml"], "none.yaml"),
    "tokenizer of nothing": (["photo.png", "make it night", "--tokenizer", "none"], "vocab.json"),
    "device of nothing": (["photo.png", "make it night", "--device", "meta"], "cannot be used"),
    "canvas in a file": (
        ["photo.png", "make it night", "--canvas", "photo.png/c.canvas"],
        "another folder with --canvas",
    ),
    "output in a file": (["photo.png", "make it night", "--out", "photo.png"], "cannot write"),
    "canvas of garbage": (["photo.png", "make it night", "--canvas", "photo.png"], "canvas"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, photo, capsys):
    args, message = BAD[name]
    broken_png(Path("broken.png"))
    Image.new("L", (64, 64), 255).save("mask.png")
    Image.new("L", (32, 64), 255).save("small.png")
    before = sorted(Path().rglob("*"))
    code, _, err = run("edit", *MODEL, *args, capsys=capsys)
    assert code == 2 and len(err) == 1 and message in err[0], err
    assert sorted(Path().rglob("*")) == before  # nothing half-written


def test_a_full_disk(photo, capsys, monkeypatch):
    save = Image.Image.save

    def full(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = run("edit", photo, "make it night", *MODEL, capsys=capsys)
    assert code == 2 and "No space left" in err[0]
    assert not [p for p in Path("out").iterdir() if p.name != "photo.canvas"]


def test_help_needs_neither_torch_nor_pictures():
    code = "import sys\nfrom emilie_min.app import cli\n"
    code += "try: cli.main(['--help'])\nfinally: assert not {'torch', 'PIL', 'tqdm'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "emilie_min", "edit"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_a_benchmark_runs_from_a_clone_that_is_not_installed(photo, capsys, monkeypatch):
    real = importlib.metadata.Distribution.from_name

    def without_own(name: str):
        if name.replace("-", "_") == "emilie_min":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", without_own)
    assert run("bench", "make", "b", "--scenes", "1", "--turns", "1", capsys=capsys)[0] == 0
    options = ["--methods", "ip2p", "--steps", "1", "--device", "cpu", "--out", "r"]
    code, out, _ = run("bench", "run", "b", *options, capsys=capsys)
    assert code == 0 and "complete" in out
