"""Ten cases of each kind, four where another kind is about the same; `python -m tests.fuzz` runs more."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from emilie_min.app import cli

from . import judge
from .__main__ import ALL, cases
from .kinds import KINDS, prepare


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("clean"))


@pytest.mark.parametrize("kind", ALL)
def test_no_case_falls_short(kind, clean, tmp_path):
    fell = {
        number: short
        for number, _, short in cases(kind, list(range(10 if kind in KINDS else 4)), 17, clean, tmp_path)
        if short
    }
    assert not fell


# ---- the judge itself: what it must see


def told(folder: Path, act: Callable[[], int | None], refuse: bool | None = None, memory: int | None = None) -> str:
    """What the judge says of a command that does `act`."""
    folder.mkdir()
    (folder / "mine").write_text("mine")

    def before() -> None:
        cli.main = lambda argv: act() or 0

    return " ".join(judge.judge(judge.Case([], refuse, before=before), folder, memory, seconds=2)[0])


def says(text: str, code: int = 0) -> Callable[[], int]:
    return lambda: sys.stderr.write(text) and code


def calls() -> None:
    with contextlib.suppress(OSError):
        socket.create_connection(("192.0.2.1", 9), 0.01)  # of a network that is nowhere


SHORT = {
    "traceback": lambda: {}["no"],
    "2 lines": says("emilie: error: a\nb\n", 2),
    "no error of ours": says("oh\n", 2),
    "without a word": lambda: 2,
    "exit code 3": lambda: 3,
    "exit code -9": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ended well, and said": says("emilie: error: a\n"),
    "control characters": says("emilie: error: \x1b[31m\n", 2),
    "2000 characters": says(f"emilie: error: {'a' * 3000}\n", 2),
    "hangs": lambda: time.sleep(9),
    "mine was damaged": lambda: Path("mine").write_text("yours") * 0,
    "mine was removed": lambda: os.unlink("mine"),
    "left .a.partial": lambda: Path(".a.partial").write_text("a") * 0,
    "left a": lambda: Path("a").touch(),
    "subprocess.Popen": lambda: subprocess.run(["true"]) and 0,
    "socket.connect": calls,
}


@pytest.mark.parametrize("name", SHORT)
def test_the_judge_sees(name, tmp_path):
    assert name in told(tmp_path / "here", SHORT[name])


def test_the_judge_sees_what_is_accepted_refused_or_large(tmp_path):
    assert told(tmp_path / "a", lambda: None) == ""
    assert told(tmp_path / "b", lambda: None, refuse=True) == "accepted"
    assert "refused" in told(tmp_path / "c", says("emilie: error: a\n", 2), refuse=False)
    assert "where a clean run takes" in told(tmp_path / "d", lambda: None, memory=1000)
