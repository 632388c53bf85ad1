"""What can go wrong, as types. Every message is one line that says what to do; the command prints it and exits 2."""

import errno
import os
import re
import reprlib
import stat
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

HUSHED = threading.Lock()
NO_MEMORY = re.compile("an't allocate memory|annot allocate memory|bad_alloc|failed to map segment|create a primitive")
LINE = 2000  # characters of a message
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


class EmilieError(ValueError):
    """Base of all errors that bad input can cause. Its message is a line that a terminal can show."""

    def __init__(self, text: object = "") -> None:
        super().__init__(printable(text, LINE))


class ConfigError(EmilieError):
    """A config file that does not fit the schema, or settings that no model can have."""


class CheckpointError(EmilieError):
    """A weight file that is missing, broken, unsafe, or not what the config describes."""


class ImageError(EmilieError):
    """A picture that cannot be read or has an unusable size."""


class MaskError(EmilieError):
    """A mask or box that does not fit its picture or selects nothing."""


class InstructionError(EmilieError):
    """An instruction that is empty, too long, or in words that the model does not know."""


class TokenizerError(EmilieError):
    """The tokenizer's files are not on this machine."""


class CanvasError(EmilieError):
    """A canvas file or an edit history that cannot be used as asked."""


class SamplingError(EmilieError):
    """Sampler settings out of range, or a result that is not finite."""


class BenchError(EmilieError):
    """A benchmark folder, a run of one, or a method's name that cannot be used as asked.

    Of a folder with several faults it names each on a line of its own.
    """

    def __init__(self, text: str, lines: Sequence[str] = ()) -> None:
        ValueError.__init__(self, "\n".join(printable(line, LINE) for line in text.split("\n")))
        self.lines = lines or [text]


def printable(text: object, limit: int = 500) -> str:
    """A line of at most `limit` characters that a terminal can show, of whatever a file or its name may hold."""
    try:
        text = str(text)
    except Exception:  # an int of more digits than Python writes, or whatever a foreign type does
        text = f"<{type(text).__name__}>"
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in text)


def quote(value: object) -> str:
    """Any value, as of a file or an argument, as it may stand in a message: at most 80 printable characters."""
    try:
        text = _short.repr(value)
        text = " ".join(text.split()) if "\n" in text else text  # an array's
    except Exception:
        text = f"<{type(value).__name__}>"
    return printable(text, 80)


def plain_file(path: str | os.PathLike[str], most: float = float("inf")) -> None:
    """Raises OSError for what is no file, as a pipe or a device, which may never end, and for more than `most` bytes.

    A folder, or nothing, is left to whoever opens it.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device and not a file", os.fspath(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it is longer than {most / 2**20:.3g} MB", os.fspath(path))


def note(text: str) -> None:
    """Tell what was assumed, in a printable line, as a warning of whoever called the package; the command prints it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(printable(text, 1000), stacklevel=level)


@contextmanager
def hushed(needed: bool = True, descriptor: int = 2) -> Iterator[None]:
    """What a library writes past Python to standard error, or output, as libtiff and tokenizers do, goes nowhere."""
    with HUSHED if needed else nullcontext():
        try:
            kept = os.dup(descriptor) if needed else None
        except OSError:  # it is closed
            kept = None
        try:
            if kept is not None:
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)
            yield
        finally:
            if kept is not None:
                os.dup2(kept, descriptor)
                os.close(kept)


def say(text: str) -> None:
    """Tell a result on standard output, at once, in lines that a terminal can show."""
    print("\n".join(printable(line, 2000) for line in text.split("\n")), flush=True)


def first_line(error: Exception, last: bool = False) -> str:
    """What an exception says, in a line (its first, or its `last`), or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1 if last else 0].strip()


@contextmanager
def explain_oom(where_and_what: str) -> Iterator[None]:
    """Say what to lower where memory does not suffice, on a GPU or on the CPU. Raises EmilieError.

    Nothing is imported here, for which there may be no memory either.
    """
    try:
        yield
    except EmilieError:
        raise
    except Exception as error:
        if not (cuda := _of_cuda(error)) and not any(map(_of_memory, _chain(error))):
            raise
        raise EmilieError(
            f"out of {'CUDA ' if cuda else ''}memory {where_and_what}, use --dtype float16, or close what else uses it"
        ) from error


def _of_cuda(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)


def _of_memory(error: BaseException) -> bool:
    """Also as the system, its linker and PyTorch's libraries say it."""
    known = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return known or isinstance(error, MemoryError) or NO_MEMORY.search(str(error)) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that led to it, of which a library may have made it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__
