"""`emilie stack`: a session's edits changed from the command line."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from command import run
from PIL import Image

import emilie_min as emilie
from emilie_min.app.edit import picture_of_its_own
from emilie_min.canvas import images
from emilie_min.canvas import session as sessions
from emilie_min.canvas.canvas import Canvas

MODEL = ["--weights", "random", "--config", "toy", "--device", "cpu"]


@pytest.fixture
def session(photo, editor):
    canvas = emilie.open("photo.png", editor)
    canvas.edit("make it night", (0, 0, 24, 64), steps=1)
    canvas.edit("make it day", (40, 0, 64, 64), steps=1)
    canvas.save("s.canvas")
    return canvas


def test_the_stack_is_told_and_changed(session, editor, capsys):
    code, out, _ = run("stack", "s.canvas", *MODEL, capsys=capsys)
    assert code == 0 and "1. make it night (in a mask)\n2. make it day (in a mask)" in out
    for change in (["hide", 1], ["move", 1, 2], ["strength", 1, 0.5], ["retract", 2]):
        code, out, err = run("stack", "s.canvas", *change, *MODEL, capsys=capsys)
        assert code == 0 and not err and "; 0 network calls" in out
    assert "1. make it day (strength 0.5, in a mask)" in out and "night" not in out
    canvas = emilie.open("s.canvas", editor)
    assert np.array_equal(Image.open(f"out/s_{canvas.at}.png"), canvas.image) and len(canvas.stack) == 1
    code, out, _ = run(
        "stack", "s.canvas", "revise", 1, "make it night", "--everywhere", "--steps", 2, *MODEL, capsys=capsys
    )
    canvas = emilie.open("s.canvas", editor)
    assert code == 0 and canvas.stack[0].instruction == "make it night" and canvas.stack[0].mask is None
    assert canvas.stack[0].settings["steps"] == 2 and canvas.stack[0].strength == 0.5
    assert run("stack", "s.canvas", "scrub", 1, 0.5, "--text-scale", 2, *MODEL, capsys=capsys)[0] == 0
    assert run("stack", "s.canvas", "undo", *MODEL, capsys=capsys)[0] == 0
    assert run("stack", "s.canvas", "undo", *MODEL, capsys=capsys)[0] == 0
    assert emilie.open("s.canvas", editor).stack[0].instruction == "make it day"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["forget", 1], "choose from retract"),
        (["retract"], "write: emilie stack SESSION retract K"),
        (["hide", 1, 2], "write: emilie stack SESSION hide K"),
        (["move", 1], "move K TO"),
        (["strength", 1, "x"], "write numbers"),
        (["hide", 1, "--steps", 3], "--steps is for `revise` and `scrub`"),
        (["revise", 1], "say what to revise"),
        (["revise", 1, "--box", "0,0,9,9", "--everywhere"], "choose one"),
        (["hide", 7], "no edit 7"),
    ],
)
def test_what_cannot_be_is_told_and_changes_nothing(args, told, session, capsys):
    before = open("s.canvas", "rb").read()
    code, _, err = run("stack", "s.canvas", *args, *MODEL, capsys=capsys)
    assert code == 2 and told in err[-1] and open("s.canvas", "rb").read() == before


def test_two_at_once_have_pictures_of_their_own(tmp_path):
    with picture_of_its_own(tmp_path, "a", "_1") as one, picture_of_its_own(tmp_path, "a", "_1") as other:
        one.write_bytes(b"x")
    assert (one.name, other.name) == ("a_1.png", "a-2_1.png") and list(tmp_path.iterdir()) == [one]


def test_a_picture_that_is_there_is_another_sessions_and_stays(session, capsys):
    """As where several change one session at once, or two folders' sessions have one name."""
    os.mkdir("out")
    for name in ("s_4.png", "s-2_4.png"):
        with open(f"out/{name}", "w") as file:
            file.write("mine")
    code, out, _ = run("stack", "s.canvas", "hide", 1, *MODEL, capsys=capsys)
    assert code == 0 and "wrote out/s-3_4.png" in out and Image.open("out/s-3_4.png").size == (64, 64)
    assert [open(f"out/{name}").read() for name in ("s_4.png", "s-2_4.png")] == ["mine", "mine"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("place", "name"), [(Canvas, "picture"), (sessions, "_fill"), (images, "save")])
def test_killed_in_a_change_the_session_is_whole_and_what_was_not_written_can_be_made_again(
    place, name, session, editor, monkeypatch, capsys
):
    shutil.copy("s.canvas", "whole.canvas")
    change = ["revise", 1, "make it night", "--everywhere", "--steps", 2, *MODEL]
    assert run("stack", "whole.canvas", *change, capsys=capsys)[0] == 0
    whole, do = emilie.open("whole.canvas", editor), getattr(place, name)
    pid = os.fork()
    if not pid:

        def killed(*args):
            if name != "save":  # that is after all is written
                do(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(place, name, killed)
        run("stack", "s.canvas", *change, capsys=capsys)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    if name != "save":
        left = emilie.open("s.canvas", editor)
        assert len(left.states) == len(session.states) and torch.equal(left.latent, session.latent)
        assert run("stack", "s.canvas", *change, capsys=capsys)[0] == 0
    again = emilie.open("s.canvas", editor)
    assert torch.equal(again.latent, whole.latent) and again.image == whole.image and again.at == whole.at


def test_what_is_no_session_is_told(photo, capsys):
    for path in (photo, "none.canvas"):
        code, _, err = run("stack", path, "hide", 1, *MODEL, capsys=capsys)
        assert code == 2 and "is no session" in err[-1]
