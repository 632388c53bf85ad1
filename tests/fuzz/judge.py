"""Runs the command in a forked process of its own, under limits, and says where it fell short."""

import errno
import faulthandler
import hashlib
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SECONDS, TIMES = 60, 3  # after which it hangs; how much more memory than a clean run it may take
LONGEST = 2000  # characters of a line
STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.startfile", "pty.spawn")
WRITES = ("emilie: error: ", "emilie edit: error: ")


@dataclass
class Case:
    """A command line to run in a folder. refuse: whether it must end in an error, None where both are right."""

    argv: list[str]
    refuse: bool | None = None
    changes: tuple[str, ...] = ()  # names of files that it may change where it ends well
    limits: dict[int, int] = field(default_factory=dict)  # of `resource`
    stdout: str = "file"  # or "full", "closed", "gone": a pipe whose reader has left
    stderr: str = "file"
    before: Callable[[], None] | None = None  # done in the process, as to break something in it
    well: Callable[[Path], str | None] | None = None  # what else must hold where it ended well
    lines: int = 1  # that an error may have
    speaks: bool = False  # whether it tells how far it is, and measures in processes of its own


@dataclass
class Result:
    code: int
    out: str
    err: str
    seconds: float
    memory: int  # KB
    told: list[str]  # programs and connections


def run(case: Case, folder: Path, seconds: float = SECONDS) -> Result:
    """The case's command line in a child of this process, which has everything imported."""
    log, started = folder.with_suffix(".log"), time.time()
    log.write_bytes(b"")
    pipes = [os.pipe(), os.pipe()]  # not files, which a limit of the case would be about
    pid = os.fork()
    if not pid:
        try:
            _child(case, folder, [writer for _, writer in pipes], log, seconds)
        finally:
            os._exit(99)  # not reached
    poll, texts = os.pidfd_open(pid), {reader: b"" for reader, _ in pipes}
    for _, writer in pipes:
        os.close(writer)
    ended, reading = False, set(texts)
    while not ended and time.time() < started + seconds:
        ready, _, _ = select.select([poll, *reading], [], [], 0.5)
        for reader in reading & {*ready}:
            data = os.read(reader, 1 << 16)
            texts[reader] += data
            reading -= set() if data else {reader}
        ended = poll in ready and not (reading & {*ready})
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    for descriptor in (poll, *texts):
        os.close(descriptor)
    told = log.read_text().splitlines()
    log.unlink()
    shown = (text.decode("utf-8", "backslashreplace") for text in texts.values())
    code = os.waitstatus_to_exitcode(status) if ended else -999
    return Result(code, *shown, time.time() - started, usage.ru_maxrss, told)


def _child(case: Case, folder: Path, writers: list[int], log: Path, seconds: float) -> None:
    code = 98
    try:
        os.chdir(folder)
        for descriptor, where, writer in zip((1, 2), (case.stdout, case.stderr), writers):
            if where == "gone":
                reader, writer = os.pipe()
                os.close(reader)
            elif where != "file":
                writer = os.open("/dev/full" if where == "full" else os.devnull, os.O_WRONLY)
            os.dup2(writer, descriptor)
        os.closerange(3, 64)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, errors="backslashreplace")
        if case.stdout == "closed":
            os.close(1)
            sys.stdout = None  # as Python has it where descriptor 1 is closed at the start
        record = os.open(log, os.O_WRONLY | os.O_APPEND)

        def audit(event: str, args: tuple) -> None:
            if (
                event in STARTS
                and args[0] not in ("fc-list", "uname")
                and not case.speaks
                or event == "socket.connect"
                and args[1][0] not in ("127.0.0.1", "::1")
            ):
                os.write(record, f"{event} {args[:2]!r}\n".encode())

        sys.addaudithook(audit)
        faulthandler.dump_traceback_later(seconds * 0.9, file=record)  # where it hangs
        if case.before:
            case.before()
        for which, limit in case.limits.items():
            resource.setrlimit(which, (limit, limit))
        from emilie_min.app.cli import main

        code = main(case.argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):  # as at the end of Python, whose exit code is then 120
            try:
                if stream is not None:
                    stream.flush()
            except Exception as error:
                code = 120
                os.write(2, f"Exception ignored in: {stream}\n{error}\n".encode())
        os._exit(code or 0)


def files(folder: Path) -> dict[str, str]:
    """Of all files in a folder, by their paths in it, the SHA-256."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**28:
            found[os.fsdecode(os.fsencode(path.relative_to(folder)))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def judge(case: Case, folder: Path, memory: int | None = None, seconds: float = SECONDS) -> tuple[list[str], int]:
    """Run a case: where it fell short, a line each, and what memory it took, KB. memory: of a clean run."""
    before = files(folder)
    result = run(case, folder, seconds)
    after, short = files(folder), []
    err = [line.rpartition("\r")[2] for line in result.err.split("\n")]
    err = [line for line in err if line.strip() and not re.match(r".*\d+%\|.*\||.*\d+it \[|.*\dedit \[", line)]
    errors = [line for line in err if not line.startswith("emilie: note: ")]
    if result.code == -999:
        return [f"hangs: still there after {seconds} s: {' < '.join(line.strip() for line in result.told[1:4])}"], 0
    left = "gone" in (case.stdout, case.stderr)
    if result.code not in (0, 2) and not (left and result.code == 128 + signal.SIGPIPE):
        short.append(f"exit code {result.code}: {errors[-1:]}")
    if "Traceback" in result.err or "Exception ignored" in result.err:
        short.append(f"traceback: {errors[-1:]}")
    elif len(errors) > case.lines:
        short.append(f"{len(errors)} lines: {errors[:3]}")
    if result.code == 2 and not errors and case.stderr == "file":
        short.append("refused without a word")
    if result.code == 2 and errors and not re.match(r"emilie[\w -]*: (error|interrupted)", errors[0]):
        short.append(f"no error of ours: {errors[0][:200]!r}")
    if result.code == 0 and errors and not case.speaks:
        short.append(f"ended well, and said {errors[:2]}")
    if result.code == 0 and case.refuse:
        short.append("accepted")
    if result.code == 2 and case.refuse is False:
        short.append(f"refused: {errors[:1]}")
    for text in (result.out, result.err):
        if strange := [c for c in text if not c.isprintable() and c not in "\n\r"]:
            short.append(f"control characters: {strange[:5]!r}")
        if any(len(line) > LONGEST for line in re.split("[\r\n]", text)):
            short.append("a line of more than 2000 characters")
    if memory is not None and result.memory > TIMES * memory:
        short.append(f"took {result.memory >> 10} MB where a clean run takes {memory >> 10} MB")
    if result.told:
        short.append(f"started or called: {result.told[:2]}")
    for name, digest in before.items():
        if after.get(name) != digest and not (result.code == 0 and name in case.changes):
            short.append(f"{name} was {'damaged' if name in after else 'removed'}, exit code {result.code}")
    for name in after.keys() - before.keys():
        if "partial" in name or name.endswith("-journal") or not (folder / name).stat().st_size:
            short.append(f"left {name}")
    if result.code == 0 and not short and case.well and (fault := case.well(folder)):
        short.append(fault)
    return short, result.memory


def full(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
