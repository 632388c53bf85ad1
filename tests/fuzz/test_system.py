"""A system that lacks something, each case by hand: one line and exit code 2, and nothing is damaged."""

import ast
import builtins
import errno
import json
import logging
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest

import emilie_min as emilie
from emilie_min.checkpoint import ready, writing
from emilie_min.errors import EmilieError, explain_oom, hushed

from .judge import Case, files, full, judge, run
from .kinds import MODEL, NIGHT, prepare


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("clean"))


@pytest.fixture
def folder(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "here")


EDIT = ["edit", "photo.png", NIGHT, *MODEL]
LINES = {
    "help": ["--help"],
    "an edit": EDIT,
    "info": ["info", "tiny.safetensors"],
    "convert": ["convert", "tiny.safetensors", "out.safetensors", "--overwrite", "--config", "tiny.yaml"],
    "check": ["bench", "check", "b"],
}


@pytest.mark.parametrize("name", LINES)
def test_standard_output_that_is_full_or_gone(name, folder):
    """`convert` replaces nothing where it then could not say so."""
    (folder / "out.safetensors").write_bytes(b"mine")
    before = files(folder)
    result = run(Case(LINES[name], stdout="full"), folder)
    assert result.code == 2 and result.err.splitlines()[-1:] == [
        "emilie: error: standard output cannot be used: No space left on device"
    ]
    gone = run(Case(LINES[name], stdout="gone"), folder)
    assert (gone.code, gone.err) == (128 + signal.SIGPIPE, "")
    assert files(folder) == before


def test_a_folder_that_is_gone(folder):
    (folder / "gone").mkdir()

    def goes():
        os.chdir("gone")
        os.rmdir("../gone")

    result = run(Case(["edit", "../photo.png", NIGHT, *MODEL], before=goes), folder)
    assert (result.code, result.err) == (
        2,
        "emilie: error: the folder that this runs in cannot be used (No such file or directory): go to another\n",
    )


def test_standard_output_or_error_that_is_closed_or_full_stops_no_edit(folder):
    assert run(Case(EDIT, stdout="closed"), folder).code == 0
    assert len(list((folder / "out").glob("*.png"))) == 2
    assert run(Case(EDIT, stderr="full"), folder).code in (0, 2)
    assert run(Case(EDIT, stderr="gone"), folder).code in (0, 128 + signal.SIGPIPE)


def breaks(name: str):
    def before() -> None:
        setattr(os, name, full)

    return before


@pytest.mark.parametrize("name, value", [("MPLBACKEND", "-1"), ("MPLCONFIGDIR", "/dev/full")])
def test_settings_of_matplotlib_change_no_report(name, value, folder):
    def set_anew():
        os.environ[name] = value
        logging.getLogger().handlers.clear()  # pytest's, which would hear what else goes to the terminal
        for loaded in [module for module in sys.modules if module.startswith("matplotlib")]:
            del sys.modules[loaded]

    pytest.importorskip("matplotlib")
    assert judge(Case(["bench", "report", "r", "--out", "p"], False, before=set_anew), folder)[0] == []


@pytest.mark.parametrize("name", ["an edit", "convert"])
@pytest.mark.parametrize("how", ["fsync", "replace", 4096, 300_000])
def test_a_full_disk(name, how, folder):
    (folder / "out.safetensors").write_bytes(b"mine")
    limits = {resource.RLIMIT_FSIZE: how} if isinstance(how, int) else {}
    case = Case(LINES[name], limits=limits, before=breaks(how) if isinstance(how, str) else None)
    case.refuse = name == "convert" or how != 300_000
    assert judge(case, folder)[0] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("name", ["an edit", "convert"])
def test_a_signal_in_the_middle_of_a_file(name, number, folder):
    """In a word, and nothing half written is left; also where a library makes another error of it."""
    (folder / "out.safetensors").write_bytes(b"mine")
    before = files(folder)

    def ends(*_):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt as stop:
            raise ImportError("no") from stop

    result = run(Case(LINES[name], before=lambda: setattr(os, "fsync", ends)), folder)
    assert (result.code, result.err.splitlines()[-1:]) == (
        128 + number,
        ["emilie: interrupted; what was written before is complete"],
    )
    assert files(folder) == before


def test_too_many_open_files_and_no_memory(folder):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    for limits in ({resource.RLIMIT_NOFILE: 4}, {resource.RLIMIT_AS: used + 3_000_000}):
        assert judge(Case(EDIT, True, limits=limits), folder)[0] == []
    make = ["bench", "make", "b2", "--scenes", "2", "--turns", "1"]
    for most in (4, 5, 6):  # of which one is enough to begin its folder and not to go on
        assert judge(Case(make, limits={resource.RLIMIT_NOFILE: most}), folder)[0] == []


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOMEM, "no"), ImportError("x.so: failed to map segment")]
)
def test_no_memory_is_told_where_nothing_can_be_imported_either(error, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EmilieError, match="out of memory here"), explain_oom("here"):
        try:
            raise error
        finally:
            raise ImportError("a library's own") from error


def test_a_session_is_whole_after_a_full_disk(folder):
    shutil.copy(folder / "s.canvas", folder / "c.canvas")
    case = Case(["edit", "make it day", "--canvas", "c.canvas", *MODEL], True, limits={resource.RLIMIT_FSIZE: 95_000})
    assert judge(case, folder)[0] == []
    editor = emilie.load(folder / "tiny.safetensors", folder / "tiny.yaml", device="cpu")
    assert len(emilie.open(folder / "c.canvas", editor).states) == 3


def test_a_run_that_ended_in_an_error_goes_on(folder):
    line = ["bench", "run", "b", "--methods", "ip2p,emilie", "--out", "r2", *MODEL]
    assert judge(Case(line, True, limits={resource.RLIMIT_FSIZE: 1500}), folder)[0] == []
    assert judge(Case(line, False, changes=("r2/run.json",)), folder)[0] == []
    records = list((folder / "r2").glob("edits/*/*/*/1.json"))
    assert len(records) == 2 and not any(json.loads(path.read_text())["error"] for path in records)


PIPED = {  # in the place of "F"
    "a picture": ["edit", "F", NIGHT, *MODEL],
    "a mask": ["edit", "photo.png", NIGHT, "--mask", "1=F", *MODEL],
    "a config": ["edit", "photo.png", NIGHT, "--config", "F", "--weights", "random", "--device", "cpu"],
    "what info is asked of": ["info", "F"],
    "a session": ["edit", "photo.png", NIGHT, "--canvas", "F", *MODEL],
    "a benchmark": ["bench", "check", "p"],
    "a run": ["bench", "study", "p"],
    "a key": ["bench", "tally", "F", "answers.json"],
}


@pytest.mark.parametrize("name", PIPED)
def test_nothing_waits_for_a_pipe(name, folder):
    """Nor reads a device to its end, which has none."""
    (folder / "p").mkdir()
    for path in ("F", "p/bench.jsonl", "p/run.json"):
        os.mkfifo(folder / path)
    assert judge(Case(PIPED[name], True), folder, seconds=10)[0] == []


@pytest.mark.parametrize("option", ["--device", "--tokenizer", "--out", "--canvas"])
def test_names_that_no_file_can_have(option, folder):
    for value in ["b/" * 3000] if option != "--device" else ["privateuseone"]:
        short, _ = judge(Case([*EDIT, option, value]), folder)
        assert short == [], (option, value[:20])


# ---- memory, and what is closed


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out of memory here: wait"),
        (RuntimeError("can't allocate memory: 9 GB"), "out of memory here: wait"),
        (RuntimeError("shapes differ"), "shapes differ"),
    ],
)
def test_memory_that_lacks_is_told_and_nothing_else_is_called_so(error, told):
    with pytest.raises((emilie.EmilieError, RuntimeError), match=told), explain_oom("here: wait"):
        raise error


@pytest.mark.parametrize("descriptor", [1, 2])
def test_what_a_library_writes_past_python_goes_nowhere(descriptor, capfd):
    for needed in (True, False):
        with hushed(needed, descriptor):
            os.write(descriptor, b"inside ")
        os.write(descriptor, b"after ")
    assert capfd.readouterr()[descriptor - 1] == "after inside after "


def test_a_descriptor_that_is_closed_is_not_hushed():
    with hushed(descriptor=resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1):
        pass


# ---- a system that is not POSIX

POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "crypt", "posix"}


def test_nothing_of_posix_is_imported_where_a_module_begins():
    for path in Path(emilie.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", ())]
            assert not POSIX & {str(name) for name in names if not isinstance(node, ast.Global)}, path


def test_a_folder_that_cannot_be_locked_is_written_to_all_the_same(monkeypatch, tmp_path):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", full)
    with writing.alone_in(tmp_path):
        (tmp_path / "a").touch()
    assert (tmp_path / "a").is_file()


def test_without_what_windows_lacks(monkeypatch, tmp_path):
    """A folder's lock is then not promised, and free memory not told."""
    real = builtins.__import__

    def lacking(name, *rest):
        if name in POSIX:
            raise ImportError(name)
        return real(name, *rest)

    def unread(path, *_):
        raise FileNotFoundError(path)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with writing.alone_in(tmp_path):
        pass
    monkeypatch.delattr(os, "sysconf_names")
    monkeypatch.setattr(builtins, "open", unread)
    assert ready.available_memory() is None
