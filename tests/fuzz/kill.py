"""python -m tests.fuzz.kill [--times 100] [--seed 0]: kill -9 at random moments; what is left goes on to the bit."""

import argparse
import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

import torch

import emilie_min as emilie
from emilie_min.app.cli import main
from emilie_min.app.visitor import Visitor
from emilie_min.checkpoint import download
from emilie_min.checkpoint.writing import write_bytes
from emilie_min.toy import world

from .hub import HubHandler
from .kinds import MODEL, prepare

CHAIN = ["make it night", "make it day", "turn it into a comic", "make it night"] * 2
WEIGHTS = hashlib.shake_256(b"weights").digest(400_000)


def started(do: Callable[[], object], folder: Path) -> int:
    """Begin to do something in a folder, in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        code = do() or 0
    finally:
        os._exit(code)


def done(do: Callable[[], object], folder: Path) -> float:
    """Do it to the end; the seconds it took."""
    begun = time.time()
    _, status = os.waitpid(started(do, folder), 0)
    assert status == 0, status
    return time.time() - begun


def killed(do: Callable[[], object], folder: Path, seconds: float, reached: Callable[[], bool] = lambda: True) -> None:
    """Some seconds after something is reached, so that there is something to go on from."""
    pid = started(do, folder)
    while not reached() and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        time.sleep(0.01)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def line(*words: str) -> Callable[[], int]:
    return lambda: main([*words])


def edits(folder: Path, session: str) -> Callable[[], int]:
    """The rest of a chain of eight edits, by what its session says is done."""

    def do() -> int:
        path = folder / session
        count = len(opened(path, folder).states) - 1 if path.exists() else 0
        rest = CHAIN[count:]
        return main(["edit", "photo.png", *rest, "--canvas", session, "--out", "o", *MODEL]) if rest else 0

    return do


def opened(path: Path, folder: Path):
    editor = emilie.load(folder / "tiny.safetensors", folder / "tiny.yaml", device="cpu")
    with contextlib.redirect_stderr(io.StringIO()):
        return emilie.open(path, editor)


def same(a, b) -> None:
    assert len(a.states) == len(b.states) and a.at == b.at and torch.equal(a.z_init, b.z_init)
    for one, other in zip(a.states, b.states):
        assert torch.equal(one.latent, other.latent) and one.image == other.image
        assert (one.instruction, one.parent, one.f, one.settings) == (
            other.instruction, other.parent, other.f, other.settings
        )  # fmt: skip


def states(path: Path) -> int:
    """How many a session has."""
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as db:
        return db.execute("SELECT count(*) FROM states").fetchone()[0]


def a_chain(folder: Path, rng: random.Random, times: int) -> None:
    took = done(edits(folder, "whole.canvas"), folder)
    whole = opened(folder / "whole.canvas", folder)
    for i in range(times):
        path, count = folder / f"{i}.canvas", rng.randrange(9)
        killed(edits(folder, path.name), folder, rng.uniform(0, took / 8), lambda p=path, n=count: states(p) >= n)
        if (folder / f"{i}.canvas").exists():
            left = opened(folder / f"{i}.canvas", folder)
            for one, other in zip(left.states, whole.states):  # what was finished is there
                assert torch.equal(one.latent, other.latent)
        done(edits(folder, f"{i}.canvas"), folder)
        same(opened(folder / f"{i}.canvas", folder), whole)


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.suffix in (".png", ".safetensors")}  # fmt: skip


def two_shards(folder: Path, rng: random.Random, times: int) -> None:
    def shard(i: int, out: str) -> Callable[[], int]:
        methods = ["--methods", "emilie,ip2p", "--seeds", "0,1"]
        return line("bench", "run", "b", *methods, "--out", out, "--shard", f"{i}/2", *MODEL)

    took = done(shard(1, "whole"), folder) + done(shard(2, "whole"), folder)
    for i in range(times):
        running = [started(shard(k, f"r{i}"), folder) for k in (1, 2)]
        time.sleep(rng.uniform(0, took))
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for k in (1, 2):
            done(shard(k, f"r{i}"), folder)
        assert pictures_in(folder / f"r{i}") == pictures_in(folder / "whole")


def a_conversion(folder: Path, rng: random.Random, times: int) -> None:
    def convert(name: str) -> Callable[[], int]:
        return line("convert", "tiny.ckpt", name, "--config", "tiny.yaml", "--overwrite")

    took = done(convert("whole.safetensors"), folder)
    whole = (folder / "whole.safetensors").read_bytes()
    for i in range(times):
        target = folder / f"{i}.safetensors"
        target.write_bytes(b"mine")
        killed(convert(target.name), folder, rng.uniform(0, took))
        assert target.read_bytes() in (b"mine", whole)
        done(convert(target.name), folder)
        assert target.read_bytes() == whole


class Hub(HubHandler):
    """As much of the hub as a download asks for; it is slow, and every other transfer breaks off."""

    asked = 0

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        small = b'{"<|endoftext|>": 1}' if self.path.endswith(".json") else b"#version: 0.2\ni n\n"
        data = WEIGHTS if self.path.endswith(download.WEIGHTS) else small
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.begins(data, start)
        if self.command == "HEAD":
            return
        Hub.asked += 1
        end = (start + len(data)) // 2 if Hub.asked % 2 and data is WEIGHTS else len(data)
        with contextlib.suppress(OSError):
            for at in range(start, end, 20_000):
                self.wfile.write(data[at : min(end, at + 20_000)])
                time.sleep(0.005)
        self.close_connection = end < len(data)


def a_download(folder: Path, rng: random.Random, times: int) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads, server.handle_error = True, lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, expected = f"http://127.0.0.1:{server.server_address[1]}", hashlib.sha256(WEIGHTS).hexdigest()

    def fetch(name: str) -> Callable[[], int]:
        def do() -> int:
            download.download(name, endpoint=url, expected_sha256=expected)
            return 0

        return do

    try:
        took = done(fetch("whole"), folder)
        for i in range(times):
            killed(fetch(f"w{i}"), folder, rng.uniform(0, took))
            target = folder / f"w{i}" / download.WEIGHTS
            assert not target.exists() or target.read_bytes() == WEIGHTS
            done(fetch(f"w{i}"), folder)
            assert target.read_bytes() == WEIGHTS
            assert not list(target.parent.glob(".*partial"))
    finally:
        server.shutdown()
        server.server_close()


def a_studio_session(folder: Path, rng: random.Random, times: int) -> None:
    """A visitor edits and saves the canvas after each; who comes back with what was saved goes on to the bit."""

    def visit(name: str) -> Callable[[], int]:
        def do() -> int:
            visitor, path = Visitor(emilie.load("tiny.safetensors", "tiny.yaml", device="cpu")), Path(name)
            visitor.open(str(path if path.exists() else "photo.png"))
            for text in CHAIN[len(visitor.canvas.states) - 1 :]:
                *_, _ = visitor.edit(text)
                write_bytes(visitor.file("canvas")[1], path)
            return 0

        return do

    took = done(visit("whole.canvas"), folder)
    whole = opened(folder / "whole.canvas", folder)
    for i in range(times):
        path, count = folder / f"{i}.canvas", rng.choice((0, *range(2, 9)))
        killed(visit(path.name), folder, rng.uniform(0, took / 8), lambda p=path, n=count: states(p) >= n)
        done(visit(f"{i}.canvas"), folder)
        same(opened(folder / f"{i}.canvas", folder), whole)


def a_stack(folder: Path, rng: random.Random, times: int) -> None:
    """A change of a stack is there whole or not at all, and made again gives the same."""
    done(line("edit", "photo.png", *CHAIN[:3], "--canvas", "three.canvas", "--out", "o", *MODEL), folder)
    changes = ("hide", "1"), ("retract", "1"), ("move", "3", "1")
    wholes = []
    for i, change in enumerate(changes):
        shutil.copy(folder / "three.canvas", folder / f"whole{i}.canvas")
        took = done(line("stack", f"whole{i}.canvas", *change, "--out", "o", *MODEL), folder)
        wholes.append((change, took, opened(folder / f"whole{i}.canvas", folder)))
    before = opened(folder / "three.canvas", folder)
    for i in range(times):
        (change, took, whole), path = wholes[i % len(wholes)], folder / f"s{i}.canvas"
        shutil.copy(folder / "three.canvas", path)
        killed(line("stack", path.name, *change, "--out", "o", *MODEL), folder, rng.uniform(0, took))
        left = opened(path, folder)
        if len(left.states) == len(before.states):
            same(left, before)
            done(line("stack", path.name, *change, "--out", "o", *MODEL), folder)
        alike(opened(path, folder), whole)


def alike(a, b) -> None:
    """As `same`, but for the ids of states, by which a change names where it is from."""
    assert len(a.states) == len(b.states) and a.at == b.at
    for one, other in zip(a.states, b.states):
        assert torch.equal(one.latent, other.latent) and one.image == other.image
        assert (one.instruction, one.parent, one.f, one.shown) == (
            other.instruction,
            other.parent,
            other.f,
            other.shown,
        )


def a_batch(folder: Path, rng: random.Random, times: int) -> None:
    """Pictures that were done stay, the others are done, and all are what an uninterrupted run gives."""
    (folder / "in").mkdir()
    for i in range(4):
        world.render(world.scene(i)).save(folder / f"in/{i}.png")

    def batch(out: str) -> Callable[[], int]:
        return line("edit", "--batch", "in", *CHAIN[:2], "--out", out, *MODEL)

    took = done(batch("whole"), folder)
    for i in range(times):
        killed(batch(f"o{i}"), folder, rng.uniform(0, took))
        kept = pictures_in(folder / f"o{i}") if (folder / f"o{i}").exists() else {}
        done(batch(f"o{i}"), folder)
        made = pictures_in(folder / f"o{i}")
        assert made == pictures_in(folder / "whole")
        assert all(made[name] == data for name, data in kept.items() if not Path(name).name.startswith("."))


WORKS = (a_chain, two_shards, a_conversion, a_download, a_studio_session, a_stack, a_batch)


def run(work: Callable, clean: Path, times: int, seed: int) -> None:
    """Some work, killed so many times. Raises AssertionError where anything is lost or other than it would be."""
    with tempfile.TemporaryDirectory(prefix="kill-") as scratch:
        folder = shutil.copytree(clean, Path(scratch) / "here")
        work(folder, random.Random(f"{seed} {work.__name__}"), times)


def all_of_them() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kill", description=__doc__)
    parser.add_argument("--times", type=int, default=100, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-") as clean:
        prepare(Path(clean))
        for work in WORKS:
            begun = time.time()
            run(work, Path(clean), args.times // len(WORKS), args.seed)
            print(f"{work.__name__}: {args.times // len(WORKS)} times killed, {time.time() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(all_of_them())
