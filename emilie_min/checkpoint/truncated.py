"""Say where a torch.save file breaks off. Its directory is at its end, so a truncated one is walked from its start.

Used for one error message. The pickle in front is read by an unpickler that knows no class at all, so nothing runs.
"""

import io
import pickle
import struct
from pathlib import Path

LOCAL_HEADER = b"PK\x03\x04"
ITEMSIZE = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}  # others: 1


class _Stub:
    """What any class or function becomes: remembers what it was called with."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


class _Names(pickle._Unpickler):  # in Python: the one in C can be made to ask for all memory
    """Reads the nesting of dicts and, as persistent ids, the storages; imports nothing."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        return type(name, (_Stub,), {})

    def persistent_load(self, pid: tuple) -> tuple:
        _, kind, key, _, count = pid
        return str(key), count * ITEMSIZE.get(kind.__name__.removesuffix("Storage"), 1)


def explain(path: str | Path) -> str:
    """One line: within which tensor the file ends, and how many bytes it is short at least."""
    try:
        inside, short = _end(Path(path))
    except Exception:  # broken off within its first record, or not what torch.save writes
        return f"{path} is truncated within its table of contents, or no file that torch.save wrote. Fetch it again"
    return f"{path} is truncated: it ends within {inside}, {short} bytes short at least. Fetch it again"


def _end(path: Path) -> tuple[str, int]:
    size = path.stat().st_size
    with open(path, "rb") as f:
        position, _ = _record(f, 0)
        f.seek(position)
        state = _Names(f).load()
        state = state.get("state_dict", state)
        storages = {}  # storage -> (bytes, the first tensor in it), in the order in which they are written
        for key, tensor in state.items():
            if isinstance(tensor, _Stub) and tensor.args and isinstance(tensor.args[0], tuple):
                storage, nbytes = tensor.args[0]
                storages.setdefault(storage, (nbytes, key))
        position, left = f.tell(), sum(nbytes for nbytes, _ in storages.values())
        inside = next(iter(storages.values()))[1] if storages else "its table of contents"
        while True:
            f.seek(position)
            gap = f.read(4096).find(LOCAL_HEADER)
            if gap < 0:
                break
            start, name = _record(f, position + gap)
            storage = name.rpartition("/data/")[2]
            nbytes, key = storages.get(storage, (0, inside))
            inside = key
            if start + nbytes > size:
                left -= max(0, size - start)
                break
            left -= nbytes
            position = start + nbytes
    return inside, max(left, 1)


def _record(f: io.BufferedReader, position: int) -> tuple[int, str]:
    """Where a record's bytes begin, and its name."""
    f.seek(position)
    header = f.read(30)
    if len(header) < 30 or not header.startswith(LOCAL_HEADER):
        return position + 30, ""  # past the end, where nothing can be read
    name, extra = struct.unpack("<26x2H", header)
    return position + 30 + name + extra, f.read(name).decode("utf-8", "replace")
