"""`emilie download`: from nothing to weights that an edit loads, in stages of which each goes on where it stopped."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..config import TOKENIZER_FILES
from ..errors import CheckpointError, EmilieError
from . import writing
from .download import RELEASED, WAYS, WEIGHTS, download, hash_file

READY = "ip2p.safetensors"
SIZES = 7_700_000_000, 2_140_000_000  # bytes, about, of the released file and of what is kept of it
WORKING = 1_000_000_000  # bytes of memory beside the converted weights: PyTorch and the tensor that is read


def ready(
    folder: str | Path = "weights",
    keep: bool = False,
    tell: Callable[[str], None] = print,
    endpoint: str | None = None,
    config: str | Path | None = None,
    expected_sha256: str | None = None,
) -> Path:
    """Fetch, verify and convert the released weights, and fetch CLIP's tokenizer; -> the file that an edit loads.

    What is done already is not done again: a file that was fetched or copied here is verified and converted, what is
    converted stays. keep: the released file too, which else goes once it is converted. tell: is told each stage.
    endpoint: see `download`; config, expected_sha256: of another file than the released one. Raises CheckpointError,
    TokenizerError.
    """
    from . import reading
    from .convert import convert

    folder = Path(folder)
    target, source = folder / READY, folder / WEIGHTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {writing.explain(error)}") from error
    expected = expected_sha256 or next(digest for digest, name in RELEASED.items() if name == WEIGHTS)
    made = made_of(target) if target.exists() else None
    for name in [] if made is not None else [name for digest, name in RELEASED.items() if name != WEIGHTS]:
        if not source.exists() and (folder / name).exists() and RELEASED.get(hash_file(folder / name)) == name:
            source, expected = folder / name, next(digest for digest in RELEASED if RELEASED[digest] == name)
            tell(f"{source}: already there, sha256 as released")
    if made is None:
        tell(plan(folder, source, keep))
    try:
        tell(download(folder, made is not None or source.name != WEIGHTS, endpoint, expected_sha256=expected))
        if made is None:
            tell(f"converting {source} to float16 ...")
            tell(convert(source, target, config=config, about={"sha256": expected}))
    except EmilieError as error:
        raise type(error)(f"{error}{by_hand(folder) * (WAYS in str(error))}") from error
    if made is not None:
        tell(f"{target}: already there")
    if source.exists() and not keep and made in (None, expected):
        reading.index(target)  # that can be read, before the other goes
        source.unlink()
        tell(f"{source}: removed, --keep would keep it")
    return target


def made_of(path: Path) -> str:
    """The SHA-256 of the file that a converted one was made of, "" where it does not say. Raises CheckpointError."""
    from . import reading

    reading.index(path)
    return (reading.metadata(path) or {}).get("sha256", "")


def plan(folder: Path, source: Path, keep: bool) -> str:
    """What the stages need of disk and memory, in a line. Raises CheckpointError where the disk has no room."""
    partial = source.with_name(f".{source.name}.partial")
    have = next((path.stat().st_size for path in (source, partial) if path.is_file()), 0)
    need = SIZES[1] + max(0, SIZES[0] - have)
    free, stays = shutil.disk_usage(folder).free, sum(SIZES) if keep else SIZES[1]
    size = {name: tqdm.format_sizeof(n, "B") for name, n in dict(need=need, free=free, stays=stays).items()}
    if free < need:
        raise CheckpointError(
            f"{folder} needs {size['need']} for the download and its conversion, and the disk has {size['free']}: free "
            "some space, or name a folder on another disk with --out"
        )
    memory, wants = available_memory(), SIZES[1] + WORKING
    line = f"needs {size['need']} on the disk, of which {size['stays']} stay, and has {size['free']}"
    line += f"; converting needs {tqdm.format_sizeof(wants, 'B')} of memory"
    if memory is not None:
        line += f", and {tqdm.format_sizeof(memory, 'B')} are free" + ": close other programs" * (memory < wants)
    return line


def available_memory() -> int | None:
    """Bytes of main memory that a program can have now; None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        known = getattr(os, "sysconf_names", {})  # which Windows lacks
        pages = {name: os.sysconf(name) for name in ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE") if name in known}
        return pages["SC_AVPHYS_PAGES"] * pages["SC_PAGE_SIZE"] if len(pages) == 2 else None


def by_hand(folder: Path) -> str:
    """How to do without this machine's network, for the end of a message."""
    return (
        f". By hand: copy {WEIGHTS} to {folder} and {' and '.join(TOKENIZER_FILES)} to {folder / 'tokenizer'}, from "
        "another machine, and run this command again: it goes on from there without a network"
    )
