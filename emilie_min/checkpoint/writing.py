"""Files that are written whole or not at all. Nothing here needs PyTorch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_bytes(data: bytes, path: str | Path) -> None:
    """A file, whole or not at all. Raises OSError and leaves nothing behind."""
    with replacing(path) as f:
        f.write(data)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes `path`'s place when the block ends, and leaves no trace if the block raises."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
