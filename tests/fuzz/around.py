"""Kinds of cases about what is around the files: what stands in their place, the system, and each command's options."""

import argparse
import contextlib
import os
import random
import resource
import shutil
import socket
import tempfile
import time
from pathlib import Path

from emilie_min.app.cli import parser

from .judge import Case
from .kinds import EVIL, MODEL, NIGHT, RANDOM

NOBODY = 65534

LINES = {  # what reads or writes each kind of file, "F"
    "photo.png": [
        ["edit", "F", NIGHT, *MODEL],
        ["edit", "F", NIGHT, "--working-size", *MODEL],
        ["grid", "F", NIGHT, "--steps", "1", "--text-scale", "5", "--image-scale", "1", *MODEL],
        ["where", "F", NIGHT, *MODEL],
        ["info", "F"],
        ["edit", "--batch", "F", NIGHT, *MODEL],
        ["insert", "F", "mask.png", "--at", "1,1,40,40", "--caption", "make", *MODEL],
        ["insert", "photo.png", "F", "--at", "1,1,40,40", "--caption", "make", *MODEL],
    ],
    "mask.png": [
        ["edit", "photo.png", NIGHT, "--mask", "1=F", *MODEL],
        ["edit", "photo.png", NIGHT, "--also", "1=F:make it day", *MODEL],
        ["insert", "photo.png", "photo.png", "--inset-mask", "F", "--at", "1,1,40,40", "--caption", "x", *MODEL],
    ],
    "s.canvas": [
        ["edit", "make it day", "--canvas", "F", *MODEL],
        ["stack", "F"],
        ["stack", "F", "hide", "1", *MODEL],
        ["edit", "photo.png", "make it day", "--canvas", "F", *MODEL],
    ],
    "tiny.safetensors": [
        ["edit", "photo.png", NIGHT, "--config", "tiny.yaml", "--weights", "F", "--device", "cpu"],
        ["info", "F"],
        ["info", "F", "--sha256"],
        ["convert", "F", "o.safetensors", "--config", "tiny.yaml"],
    ],
    "tiny.ckpt": [["info", "F"], ["convert", "F", "o.safetensors", "--config", "tiny.yaml"]],
    "tiny.yaml": [
        ["edit", "photo.png", NIGHT, "--config", "F", *RANDOM],
        ["convert", "tiny.ckpt", "o.safetensors", "--config", "F"],
    ],
    "tokenizer": [["edit", "photo.png", NIGHT, "--config", "clip.yaml", "--tokenizer", "F", *RANDOM]],
    "tokenizer/vocab.json": [
        ["edit", "photo.png", NIGHT, "--config", "clip.yaml", "--tokenizer", "tokenizer", *RANDOM]
    ],
    "b": [["bench", "check", "F"], ["bench", "run", "F", "--methods", "ip2p", "--out", "r2", *MODEL]],
    "b/bench.jsonl": [["bench", "check", "b"], ["bench", "run", "b", "--methods", "ip2p", "--out", "r2", *MODEL]],
    "r": [["bench", "study", "F", "--out", "s"], ["bench", "report", "F", "--out", "p"]],
    "r/run.json": [["bench", "study", "r", "--out", "s"], ["bench", "report", "r", "--out", "p"]],
    "r/study/study_key.json": [["bench", "tally", "F", "answers.json"]],
    "answers.json": [["bench", "tally", "r/study/study_key.json", "F"]],
    "": [
        ["edit", "photo.png", NIGHT, "--out", "F", *MODEL],
        ["edit", "photo.png", NIGHT, "--canvas", "F", *MODEL],
        ["convert", "tiny.ckpt", "F", "--config", "tiny.yaml"],
        ["bench", "make", "F", "--scenes", "1"],
        ["convert", "tiny.ckpt", "F", "--config", "tiny.yaml", "--overwrite"],
        ["stack", "s.canvas", "undo", "--out", "F", *MODEL],
        ["bench", "run", "b", "--methods", "ip2p", "--out", "F", *MODEL],
        ["bench", "study", "r", "--out", "F"],
        ["bench", "report", "r", "--out", "F"],
        ["edit", "--batch", "photo.png", NIGHT, "--out", "F", *MODEL],
        ["bench", "import", "opa", "b", "F"],
        ["bench", "import", "editbench", "F", "o"],
        ["demo", "--out", "F", *MODEL],
    ],
}
NAMES = [
    "a\nb.png",
    EVIL[:-1],
    "-x",
    "--help",
    "é.png",
    "e\u0301.png",
    "\udcff\udcfe.png",
    "x" * 255,
    "x" * 251 + ".png",
    " ",
    "a b .png",
    "CON",
    "a:b",
    "*",
    "[a].png",
    "~",
    "$HOME",
    ".png",
    "..png",
    "a" * 200 + "/" + "b" * 200,
    "\u202egnp.exe",
    "photo.png/",
    "./photo.png",
    "1=photo.png",
    "%s",
    "{}",
]


def place(way: str, target: Path, rng: random.Random, folder: Path) -> str:
    """Put what is no plain file, or one of an odd name, in the place of a file that may be there; its name."""
    name = str(target.relative_to(folder)) if target != folder else "new"
    target = folder / name
    whole = target.read_bytes() if target.is_file() else b""
    if way.startswith("/"):
        if "/" in name or rng.random() < 0.5:
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            target.symlink_to(way)
            return name
        return way
    if way == "name":
        odd = rng.choice(NAMES)
        if "/" not in odd and target.exists():
            with contextlib.suppress(OSError):
                target.rename(folder / os.fsdecode(os.fsencode(odd)))
        return odd
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    if way == "fifo":
        os.mkfifo(target)
    elif way == "socket":
        here = os.getcwd()
        os.chdir(target.parent)  # the path of one is short
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(target.name)
        os.chdir(here)
    elif way == "loop":
        target.symlink_to(target.name)
    elif way == "nowhere":
        target.symlink_to("nowhere/at/all")
    elif way == "folder":
        target.mkdir()
    elif way == "file":
        target.write_bytes(b"x")
    elif way == "below a file":
        target.write_bytes(b"x")
        return f"{name}/a"
    elif way == "huge":
        with open(target, "wb") as file:
            file.write(whole)
            file.truncate(2**40)
    elif way == "locked":
        target.write_bytes(whole)
        target.chmod(0)
    return name


def paths(rng: random.Random | None, folder: Path) -> Case:
    if rng is None:
        return Case(["edit", "photo.png", NIGHT, *MODEL], False)
    kind = rng.choice(sorted(LINES))
    argv = rng.choice(LINES[kind])
    devices = [
        "/dev/zero",
        "/dev/full",
        "/dev/random",
        "/dev/null",
        "/dev/stdin",
        "/proc/self/mem",
        "/proc/self/environ",
        "/dev/tty",
        "/dev/fd/0",
        "/proc/self/fd",
        "/",
    ]
    ways = [
        "fifo",
        "socket",
        "loop",
        "nowhere",
        "folder",
        "file",
        "below a file",
        "huge",
        "locked",
        "name",
        "name",
        *devices,
    ]
    way = rng.choice(ways)
    name = place(way, folder / kind, rng, folder)
    case = Case(
        [word.replace("F", name) if "F" in word and word in ("F", "1=F", "1=F:make it day") else word for word in argv],
        changes=("s.canvas", name),
        lines=3 if "check" in argv or "--batch" in argv or kind[:1] == "b" else 1,
    )

    def before() -> None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if way == "locked":
            become_nobody(folder)

    case.before = before
    return case


def become_nobody(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            os.chown(path, NOBODY, NOBODY)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def environs(rng: random.Random | None, folder: Path) -> Case:
    """Sound input, and odd surroundings."""
    shutil.copy(folder / "s.canvas", folder / "c.canvas")
    argv = [
        ["edit", "photo.png", NIGHT, "make it day", *MODEL],
        ["edit", "make it day", "--canvas", "c.canvas", *MODEL],
        ["convert", "tiny.safetensors", "out.safetensors", "--config", "tiny.yaml"],
        ["info", "tiny.safetensors"],
        ["bench", "run", "b", "--methods", "ip2p", "--out", "r2", *MODEL],
        ["edit", "--help"],
        ["bench", "report", "r", "--out", "p"],
        ["stack", "c.canvas", "hide", "1", *MODEL],
        ["edit", "photo.png", NIGHT, "--config", "clip.yaml", *RANDOM],
        ["edit", "--batch", "photo.png", NIGHT, *MODEL],
        ["bench", "study", "r", "--out", "s"],
        ["download", "--out", "w"],
        ["download", "--tokenizer"],
    ]
    if rng is None:
        return Case(argv[1], False, ("c.canvas",))
    case = Case(rng.choice(argv), changes=("c.canvas",), lines=2)
    way = rng.randrange(14)
    names = """
    HOME TMPDIR LANG LC_ALL COLUMNS LINES TERM PYTHONIOENCODING HF_HOME HF_HUB_CACHE XDG_CACHE_HOME WORLD_SIZE
    RANK LOCAL_RANK OMP_NUM_THREADS EMILIE_TRY CUDA_VISIBLE_DEVICES MPLCONFIGDIR MPLBACKEND HF_ENDPOINT
    HTTPS_PROXY TQDM_DISABLE TQDM_MININTERVAL TORCHINDUCTOR_CACHE_DIR SQLITE_TMPDIR NO_COLOR PATH PYTHONPATH""".split()
    values = [
        "",
        "0",
        "-1",
        "2",
        "x",
        "/nowhere",
        "/dev/null",
        "/dev/full",
        "9" * 5000,
        EVIL.replace("\0", ""),
        "\udcff",
        "/root/\n",
        "http://127.0.0.1:1",
        "C",
        "1.5",
    ]
    chosen = {rng.choice(names): rng.choice(values) for _ in range(rng.choice((1, 2, 3)))}
    gone = rng.choice(names)
    limit = rng.choice(
        [
            (resource.RLIMIT_NOFILE, rng.randrange(3, 40)),
            (resource.RLIMIT_FSIZE, rng.choice((0, 10, 9000, 50_000, 200_000))),
            (resource.RLIMIT_STACK, 10**5),
            (resource.RLIMIT_NPROC, 0),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_DATA, 10**8),
        ]
    )
    closed = rng.choice(([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]))
    os_call = rng.choice(
        ("fsync", "replace", "open", "rename", "mkdir", "unlink", "stat", "listdir", "scandir", "getcwd")
    )
    after = rng.randrange(6)

    def before() -> None:
        if case.argv[0] == "download":
            os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
        if way < 5:
            for name, value in chosen.items():
                os.environ[name] = value
            os.environ.pop(gone, None)
            tempfile.tempdir = None
            time.tzset()
        elif way == 5:
            folder.chmod(0o555)
            become_nobody_outside(folder)
        elif way == 6:
            for path in folder.iterdir():
                path.chmod(0o444 if path.is_file() else 0o555)
            become_nobody_outside(folder)
        elif way == 7:
            for each in closed:
                os.close(each)
                name = ("stdin", "stdout", "stderr")[each]
                setattr(__import__("sys"), name, None)
        elif way == 8:
            lost = folder / "lost"
            lost.mkdir()
            os.chdir(lost)
            lost.rmdir()
        elif way == 9:
            os.umask(0o777)
            become_nobody(folder)
        elif way == 10:
            import signal

            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            os.nice(5)
        elif way == 11:
            real, calls = getattr(os, os_call), []

            def fails(*args, **kwargs):
                calls.append(1)
                if len(calls) > after:
                    raise OSError(5, "Input/output error")
                return real(*args, **kwargs)

            setattr(os, os_call, fails)

    case.before = before
    if way == 7 and 2 in closed:
        case.stderr = "closed"
    if way >= 12:
        case.limits = {limit[0]: limit[1]}
    if way == 11 and os_call not in ("fsync", "replace"):
        case.before = None
    return case


def become_nobody_outside(folder: Path) -> None:
    """Whose nothing here is."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def actions(top: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[argparse.Action]]:
    """Of every command, by its words, the options and places."""
    found = {}
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= actions(sub, (*words, name))
    return found or {words: [a for a in top._actions if a.dest != "help"]}


BASES = {
    ("edit",): ["photo.png", NIGHT, *MODEL],
    ("grid",): ["photo.png", NIGHT, "--steps", "1", "--text-scale", "5", "--image-scale", "1", *MODEL],
    ("where",): ["photo.png", NIGHT, *MODEL],
    ("insert",): ["photo.png", "photo.png", "--at", "1,1,40,40", "--caption", "make", *MODEL],
    ("stack",): ["c.canvas", "hide", "1", *MODEL],
    ("info",): ["tiny.safetensors"],
    ("convert",): ["tiny.ckpt", "o.safetensors", "--config", "tiny.yaml"],
    ("download",): ["--out", "w"],
    ("bench", "make"): ["b2", "--scenes", "1"],
    ("bench", "check"): ["b"],
    ("bench", "run"): ["b", "--methods", "ip2p", "--out", "r2", *MODEL],
    ("bench", "report"): ["r", "--out", "p"],
    ("bench", "study"): ["r", "--out", "s"],
    ("bench", "tally"): ["r/study/study_key.json", "answers.json"],
    ("bench", "import"): ["opa", "b", "o"],
    ("studio",): ["--port", "99999"],
    ("demo",): MODEL,
    ("toy-eval",): ["--scenes", "1", "--quick", *MODEL],
    ("bench", "tune"): ["t", "--methods", "ip2p", "--scenes", "1", "--setting", "steps=1", *MODEL],
    ("speed",): [
        "--config",
        "tiny.yaml",
        "--weights",
        "tiny.safetensors",
        "--device",
        "cpu",
        "--unet-only",
        "--parts",
        "times",
        "--repeats",
        "1",
        "--steps",
        "1",
        "--resolution",
        "64",
    ],
}
VALUES = """0 -1 1 2 nan inf -inf 1e400 0.5 1,2 1,,2 a,b , = x=1 1= =1 1:2 0:0 native auto none cpu cuda cuda:99
    mps meta meta:1 cpu:7 xla hpu float16 bfloat16 0,0,64,64 0,0,0,0 -1,0,5,5 1,2,3 1e1 0x10 ١ ² 1_0
    ../.. /dev/null /proc/self/mem . photo.png mask.png s.canvas tiny.yaml b r retract show hide move
    strength revise scrub undo 3 1 ip2p emilie emilie:gate=eq8 emilie:x=1 emilie: :a mine.py:Mine
    photo.png:Mine os:system os.py:system 1/2 3/2 0/0 user:pass :pass user: 0.0.0.0 256.1.1.1 ::1 1:make
    make;make 0.5:make nan:make""".split()
VALUES += [
    "",
    " ",
    "9" * 5000,
    "x" * 300,
    "x" * 70_000,
    EVIL.replace("\0", ""),
    "\udcff",
    "a/" * 3000,
    "{",
    "{caption} {x}",
    "{0}",
    "%s %d",
    "a\nb",
]
LARGE = {
    "scenes",
    "turns",
    "minutes",
    "repeats",
    "steps",
    "batch",
    "threads",
    "resolution",
    "proposals",
    "grids",
}  # that may take long


def commands(rng: random.Random | None, folder: Path) -> Case:
    shutil.copy(folder / "s.canvas", folder / "c.canvas")
    if rng is None:
        return Case(["insert", *BASES["insert",]], False)
    words = rng.choice(sorted(BASES))
    argv, found = list(BASES[words]), actions(parser())[words]
    for _ in range(rng.choice((1, 1, 2, 3))):
        action = rng.choice(found)
        value = rng.choice((*VALUES, *(action.choices or ())))
        if action.dest in LARGE and value.isdecimal() and len(value) < 99 and int(value) > 3:
            continue
        if not action.option_strings:
            places = [
                i
                for i, word in enumerate(argv)
                if not word.startswith("-") and (i == 0 or not argv[i - 1].startswith("--"))
            ]
            at = rng.choice(places or [0])
            argv[at : at + 1] = rng.choice(([value], [value], [], [argv[at], value] if argv else [value]))
        elif action.nargs == 0:
            argv.append(action.option_strings[-1])
        else:
            argv += rng.choice(
                (
                    [action.option_strings[-1], value],
                    [f"{action.option_strings[-1]}={value}"],
                    [action.option_strings[-1]],
                )
            )
    if words == ("studio",) and not any("99999" in word for word in argv[-2:]):
        argv += ["--port", "99999"]
    if words == ("speed",):
        argv = [word for word in argv if word not in ("--full", "--against", "--compile")]

    def before() -> None:
        os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    case = Case([*words, *argv], changes=("c.canvas", "s.canvas", "photo.png"), before=before, lines=25)
    case.speaks = words == ("speed",)
    return case


AROUND = {make.__name__: make for make in (paths, environs, commands)}
