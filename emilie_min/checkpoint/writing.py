"""Files that are written whole or not at all. Nothing here needs PyTorch, but for the tensors to be written."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import first_line


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path at which to write; the file takes `path`'s place when the block ends, and goes if the block raises."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "r+b") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename in (partial, str(partial)):
            error.filename, error.filename2 = str(path), None  # what it is for is what its reader knows
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes `path`'s place when the block ends, and leaves no trace if the block raises."""
    with atomic_path(path) as partial, open(partial, "wb") as f:
        yield f


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """No other process is in here with this folder meanwhile; where the system has no such lock, that is not promised.

    The lock is the folder's own, so it leaves no file behind and goes with a process that is killed.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have none
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_bytes(data: bytes, path: str | Path) -> None:
    """A file, whole or not at all. Raises OSError and leaves nothing behind."""
    with atomic_write(path) as f:
        f.write(data)


def write_tensors(tensors: dict, path: str | Path, metadata: dict[str, str]) -> None:
    """A .safetensors file of contiguous tensors by name, whole or not at all. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else None, first_line(error)) from error
        partial.chmod(mode)  # the library's file is its writer's alone


def need_space(folder: Path, nbytes: int) -> None:
    """Raises OSError, as a write would, where the disk has no room for so many bytes."""
    if shutil.disk_usage(folder).free < nbytes:
        from tqdm import tqdm

        raise OSError(errno.ENOSPC, f"No space left: {tqdm.format_sizeof(nbytes, 'B')} are needed in {folder}")


def explain(error: OSError) -> str:
    """Why a write failed and what to do, for the end of a message."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.strerror}): free some space or name another folder"
    if isinstance(error, PermissionError):
        return "this user may not write there: name another folder"
    return error.strerror or first_line(error)
