"""A canvas as one file, to which saving adds what is new: an SQLite database of two tables.

    head     one row: whose canvas it is, where it stands, what was undone; JSON, see HEAD
    states   one a state: how it came to be, as JSON, see RECORD; its latent, picture and masks, as a .safetensors file

The first version's was one .safetensors file, written anew after each edit: at the 200th of 512 px 171 MB in 0.37 s,
where adding an edit here takes 0.03 s, at the first as at the 200th, most of it waiting for the disk. SQLite also
lets one process at a time write, and takes back what a killed one left half done. `read` reads both kinds.
"""

import hashlib
import json
import os
import sqlite3
import warnings
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import numpy as np
import safetensors
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..checkpoint.schema import Blank, fault, parse, strange
from ..checkpoint.writing import alone_in, atomic_path
from ..emilie import Editor
from ..errors import CanvasError, first_line, note, plain_file, printable, quote
from .images import read_part
from .pictures import LONGEST, TURNS
from .regions import own_settings
from .settings import Settings
from .state import State

FORMAT, VERSION = "emilie canvas 1", 2  # what the files of before say, and what these do
MAGIC, APPLICATION = b"SQLite format 3\0", int.from_bytes(b"EMIL", "big")
LARGEST_ROW = 2**28  # bytes: a picture of 4096^2 px, its latent and a dozen masks
TABLES = {
    "head": "CREATE TABLE head (about TEXT NOT NULL, digest TEXT NOT NULL)",
    "states": "CREATE TABLE states (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, record TEXT NOT NULL, "
    "tensors BLOB NOT NULL, digest TEXT NOT NULL)",
}
HEAD = {
    "model": Blank,
    "dtype": str,
    "seed": int,
    "original_size": [int],
    "native": bool,
    "turned?": int,
    "part?": [int],
    "at": int,
    "undone": [int, ...],
}
SETTINGS = {  # of the first version; later ones may be missing, and any that is not known is kept
    "steps": int,
    "text_scale": int | float,
    "image_scale": int | float,
    "gate": str,
    "soft": bool,
    "rescale": str,
    "iterate": str,
    "keep_background": bool,
    "seed": int,
    "sampler": str,
    "reuse": int,
    "guidance_interval?": [int | float],
    "reuse_guidance?": int | float,
    "negative?": str,
    "further?": [list, ...],
    "own?": [dict],
    "scrubbed?": {"step": int, "of": str},
}
RECORD = {  # fields of State, as JSON; those with "?" are written where they are not State's default
    "instruction": Blank,
    "parent": int,
    "settings": SETTINGS,
    "f": int | float | None,
    "regions?": [Blank],
    "depth?": int,
    "shown?": bool | None,
    "strength?": int | float,
    "made?": {"change": str, "edit": int, "way": str, "from": str, "calls": int},
    "inserted?": dict,
}
ROOT = RECORD | {"parent": NoneType, "settings": dict, "f": NoneType}
FILLED = {"depth", "strength", "made", "inserted", "own", "scrubbed"}  # which are there or not, but never null
DEFAULTS = {field.name: field.default for field in fields(State)}
PLAIN = [name[:-1] for name in RECORD if name.endswith("?") and name != "regions?"]  # as they stand in a State


class Row(NamedTuple):
    """A state in a file."""

    id: str
    record: object
    tensors: dict[str, Tensor]


def is_session(path: str | Path) -> bool:
    """Whether a path is for `read`: by its name, or because it begins as one does, of this version or of before."""
    if Path(path).suffix in (".canvas", ".safetensors"):
        return True
    try:
        head = _head(path)
    except (OSError, ValueError):
        return False
    return head == MAGIC or head[8:9] == b"{"


def _head(path: str | Path) -> bytes:
    plain_file(path)
    with open(path, "rb") as file:
        return file.read(len(MAGIC))


# ---- writing


def write(canvas, path: str | Path) -> None:
    """A `Canvas` to a file: to one of its own what is new is added; another gives way to it. Whole or not at all.

    States that another process added meanwhile stay, which is told, and this canvas's follow them; the file then
    stands where this canvas does. Raises CanvasError, and the file is what it was.
    """
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path):
        raise CanvasError(f"a canvas is saved to a path, not to {quote(path)}")
    path = Path(path)
    try:
        if _add(canvas, path):
            return
        with alone_in(path.parent):
            if not _add(canvas, path):  # another process's may have come there meanwhile
                _refuse_other(path)
                with atomic_path(path) as partial:
                    _create(canvas, partial)
    except (OSError, sqlite3.Error) as error:
        raise _unwritten(path, error) from error


def _refuse_other(path: Path) -> None:
    """Raises CanvasError where a file is no canvas, which is then not to be replaced by one, but for an empty file."""
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, "rb") as file:
        head = file.read(72)
    ours = head[:16] == MAGIC and head[68:] in (b"", APPLICATION.to_bytes(4, "big"))
    if not (ours or head[8:9] == b"{"):
        raise CanvasError(f"{printable(path)} is there and no canvas: name another file")


def start(canvas, path: Path) -> bool:
    """A `Canvas` to a file that is not there yet; False where one is, also since this moment. Raises CanvasError."""
    try:
        with alone_in(path.parent):
            if os.path.lexists(path):
                return False
            with atomic_path(path) as partial:
                _create(canvas, partial)
            return True
    except (OSError, sqlite3.Error) as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: Exception) -> CanvasError:
    why = getattr(error, "strerror", None) or first_line(error)
    return CanvasError(f"{printable(path)}: cannot write the canvas: {why}")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """mode: "rw", or "rwc" to make it. Transactions are begun and ended in words."""
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=60, isolation_level=None)
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def _create(canvas, path: Path) -> None:
    with closing(_connect(path, "rwc")) as db:
        db.execute("PRAGMA journal_mode = OFF")  # the file is thrown away if anything fails
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        for table in TABLES.values():
            db.execute(table)
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute(f"PRAGMA user_version = {VERSION}")
        _fill(db, canvas)
        db.execute("COMMIT")


def _add(canvas, path: Path) -> bool:
    """What is new of a canvas, in one transaction; whether the file is this canvas's."""
    if not path.is_file() or _head(path) != MAGIC:
        return False
    with closing(_connect(path, "rw")) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
            _check_tables(db)
            (first,) = db.execute("SELECT id FROM states WHERE number = 0").fetchone()
        except sqlite3.OperationalError:
            raise
        except (sqlite3.DatabaseError, ValueError, TypeError):  # it is damaged, or another's
            return False
        if first != canvas.states[0].id:
            return False
        others = _fill(db, canvas)
        db.execute("COMMIT")
    if others:
        note(f"{path} has edits that another process added meanwhile: all are kept")
    return True


def _fill(db: sqlite3.Connection, canvas) -> int:
    """Add the states that are not there, and say where the canvas stands; the number of states that are another's."""
    numbers = dict(db.execute("SELECT id, number FROM states"))
    others = len(numbers.keys() - {state.id for state in canvas.states})
    for state in canvas.states:
        if state.id not in numbers:
            numbers[state.id] = number = len(numbers)
            parent = None if state.parent is None else numbers[canvas.states[state.parent].id]
            record, tensors = _record(state, parent), _tensors(state)
            if number == 0:
                tensors |= {"z_init": canvas.z_init, "z_img": canvas.z_img}
            data = to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
            row = number, state.id, record, data
            db.execute("INSERT INTO states VALUES (?, ?, ?, ?, ?)", (*row, _digest(*row)))
    place = [numbers[state.id] for state in canvas.states]
    about = {
        "model": canvas.editor.model,
        "dtype": str(canvas.editor.dtype),
        "seed": canvas.seed,
        "original_size": canvas.original_size,
        "native": canvas.native,
        **({} if canvas.turned is None else {"turned": canvas.turned}),
        **({} if canvas.part is None else {"part": canvas.part}),
        "at": place[canvas.at],
        "undone": [place[i] for i in canvas.redo_stack],
        "states": len(numbers),
    }
    db.execute("DELETE FROM head")
    db.execute("INSERT INTO head VALUES (?, ?)", (json.dumps(about), _digest(json.dumps(about))))
    return others


def _digest(*parts: int | str | bytes) -> str:
    """Of a row, so that no damage to it goes unnoticed; a safeguard against accidents, not against people."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def _record(state: State, parent: int | None) -> str:
    record = {"instruction": state.instruction, "parent": parent, "settings": state.settings, "f": state.f}
    if state.regions:
        record["regions"] = [text for text, _ in state.regions]
    return json.dumps(record | {name: value for name in PLAIN if (value := getattr(state, name)) != DEFAULTS[name]})


def _tensors(state: State) -> dict[str, Tensor]:
    pictures = {"image": state.image, "mask": state.mask}
    pictures |= {f"mask.{k}": mask for k, (_, mask) in enumerate(state.regions)}
    tensors = {k: torch.from_numpy(np.array(p)) for k, p in pictures.items() if p is not None}
    if state.given is not None:  # millions of pixels, of which few differ from their neighbours
        packed = bytearray(zlib.compress(state.given.tobytes(), 1))
        tensors["given"] = torch.frombuffer(packed, dtype=torch.uint8)[None]
    return {"latent": state.latent} | tensors


def _unpack_given(packed: Tensor, size: tuple[int, int]) -> Image.Image:
    """A mask of the photo's size (width, height). Raises ValueError."""
    count, unpack = (size[0] + 7) // 8 * size[1], zlib.decompressobj()
    try:
        data = unpack.decompress(packed.numpy().tobytes(), count + 1)
    except zlib.error:
        data = b""
    if len(data) != count or not unpack.eof or unpack.unused_data or packed.shape[0] != 1:
        raise ValueError("a mask has not the photo's size")
    return Image.frombytes("1", size, data)


# ---- reading


def read(path: str | Path, editor: Editor) -> dict:
    """What `write` wrote, as the fields of a `Canvas`. To go on gives what an uninterrupted session gives, to the bit.

    Warns where it was made with other weights or in another dtype. Raises CanvasError for another kind of file, for
    one with anything in it that no `write` writes, and where the editor's latents have another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise CanvasError(f"no canvas at {printable(path)}" + (", which is a folder" if path.is_dir() else ""))
    try:
        about, *rows = _rows(path) if _head(path) == MAGIC else _rows_of_before(path)
        if found := fault(about, HEAD) or strange(about, HEAD):
            raise ValueError(found)
        _check_head(about)
        states = [_state(i, row, tuple(about["original_size"])) for i, row in enumerate(rows)]
        _check(about, states)
        noise = {name: rows[0].tensors[name] for name in ("z_init", "z_img")}
    except CanvasError:
        raise
    except Exception as error:  # whatever a broken or foreign file leads to
        raise CanvasError(f"{printable(path)} cannot be read as a canvas: {printable(first_line(error))}") from error
    width, height = states[0].image.size
    shape = (1, editor.config.diffusion.channels, height // editor.vae.factor, width // editor.vae.factor)
    made, model = (about["model"], about["dtype"]), printable(about["model"], 100)
    if any(tuple(z.shape) != shape for z in [*noise.values(), *(state.latent for state in states)]):
        raise CanvasError(f"{printable(path)} was made with {model}, whose latents {editor.model} cannot use")
    if made != (editor.model, str(editor.dtype)):
        warnings.warn(
            f"{printable(path)} was made with {model} in {printable(made[1], 40)} and goes on with {editor.model} in "
            f"{editor.dtype}",
            stacklevel=3,
        )
    return noise | {
        "seed": about["seed"],
        "original_size": tuple(about["original_size"]),
        "native": about["native"],
        "turned": about.get("turned"),
        "part": about.get("part") and tuple(about["part"]),
        "states": states,
        "at": about["at"],
        "redo_stack": about["undone"],
    }


def _rows(path: Path) -> Iterator:
    """Of a file of this version what `head` says, and then each state's `Row`."""
    with open(path, "rb") as file:
        if file.read(20)[18:] != b"\1\1":  # another kind of journal, for which SQLite would make files beside it
            raise ValueError("its first page is damaged")
    with closing(_connect(path, "rw")) as db:  # to read: but what a killed process left half done is undone first
        db.execute("BEGIN")
        if [*db.execute("PRAGMA application_id"), *db.execute("PRAGMA user_version")] != [(APPLICATION,), (VERSION,)]:
            raise CanvasError(f"{printable(path)} is no canvas of this version: it is an SQLite database of another")
        _check_tables(db)
        sizes = "SELECT length(about) FROM head UNION ALL SELECT length(record) + length(tensors) FROM states"
        if any(size > LARGEST_ROW for (size,) in db.execute(sizes)):
            raise ValueError("a state is larger than any picture that is edited")
        heads = db.execute("SELECT about, digest FROM head").fetchall()
        if len(heads) != 1:
            raise ValueError("what it says of itself is missing, or there twice")
        ((text, digest),) = heads
        if digest != _digest(text):
            raise ValueError("what it says of itself is damaged")
        about = parse(text)
        count = about.pop("states")
        yield about
        for i, row in enumerate(db.execute("SELECT number, id, record, tensors, digest FROM states ORDER BY number")):
            number, id, record, data, digest = row
            if number != i or type(id) is not str or digest != _digest(number, id, record, data):
                raise ValueError(f"state {i} is damaged")
            yield Row(id, parse(record), dict(_unpacked(data)))
            count -= 1
        if count:
            raise ValueError("states are missing")


def _check_tables(db: sqlite3.Connection) -> None:
    """Raises ValueError where there is anything but our tables, such as a view or a trigger, which are programs."""
    made = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    if len(made) != len(TABLES) or dict(made) != TABLES:
        raise ValueError("it is another kind of database")


def _unpacked(data: bytes) -> Iterator[tuple[str, Tensor]]:
    for name, view in safetensors.deserialize(data):
        kind = {"F32": torch.float32, "U8": torch.uint8}.get(view["dtype"])
        if kind is None or not 2 <= len(view["shape"]) <= 4 or 0 in view["shape"]:
            raise ValueError(f"{quote(name)} is no latent and no picture")
        yield name, torch.frombuffer(view["data"], dtype=kind).reshape(view["shape"])


def _rows_of_before(path: Path) -> Iterator:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            said = printable(metadata.get("format"), 60)
            raise CanvasError(f"{printable(path)} is no canvas of this version: its format is {said!r}")
        about, slices = parse(metadata["canvas"]), {key: file.get_slice(key) for key in file.keys()}
        for key, part in slices.items():
            if part.get_dtype() not in ("F32", "U8") or not 2 <= len(part.get_shape()) <= 4:
                raise ValueError(f"{quote(key)} is no latent and no picture")
        tensors = {key: file.get_tensor(key).clone() for key in slices}
    records = about.pop("states")
    if not isinstance(records, list) or not records:
        raise ValueError("it has no list of states")
    yield about
    for i, record in enumerate(records):
        own = [key for key in tensors if key.startswith(f"{i}.") or i == 0 and key in ("z_init", "z_img")]
        parts = {key.removeprefix(f"{i}."): tensors.pop(key) for key in own}
        digest = hashlib.sha256(json.dumps([i, record]).encode())  # so that who opens it twice has the same states
        for key, tensor in sorted(parts.items()):
            digest.update(key.encode() + tensor.numpy().tobytes())
        yield Row(digest.hexdigest()[:32], record, parts)
    if tensors:
        raise ValueError(f"{quote(min(tensors))} belongs to no state")


def _state(i: int, row: Row, photo: tuple[int, int]) -> State:
    """photo: its size. Raises ValueError."""
    record, tensors = row.record, row.tensors
    if found := fault(record, ROOT if i == 0 else RECORD) or strange(record, RECORD):
        raise ValueError(f"state {i}: {found}")
    if null := [
        name for where in (record, record["settings"]) for name in FILLED & where.keys() if where[name] is None
    ]:
        raise ValueError(f"state {i}: {null[0]} is null")
    texts = record.get("regions") or []
    needed = {"latent", "image"} | ({"z_init", "z_img"} if i == 0 else set())
    masks = set() if i == 0 else {"mask", *(f"mask.{k}" for k in range(len(texts)))}
    given = tensors.pop("given", None) if "mask" in tensors else None
    if not needed <= tensors.keys() <= needed | masks:
        raise ValueError(f"state {i} must have {', '.join(sorted(needed))}, and has {quote(sorted(tensors))}")
    for name, tensor in tensors.items():
        picture = name == "image" or name in masks
        wrong = picture and tensor.shape != (*tensors["image"].shape[:2], *[3] * (name == "image"))
        if wrong or tensor.dtype != (torch.uint8 if picture else torch.float32):
            raise ValueError(f"state {i}: {name} has another size or type")
        if not tensor.isfinite().all():
            raise ValueError(f"state {i}: {name} has numbers that are not finite")
    pictures = {name: Image.fromarray(t.numpy()) for name, t in tensors.items() if name == "image" or name in masks}
    regions = [(text, pictures.get(f"mask.{k}")) for k, text in enumerate(texts)]
    record["instruction"].encode()  # half of a surrogate pair, which JSON allows, is a ValueError
    bare = [mask for _, mask in regions].count(None)  # of them one may be everywhere else, and then there is no union
    if regions and (record["instruction"] != " + ".join(texts) or bare > 1 or (bare == 0) != ("mask" in pictures)):
        raise ValueError(f"state {i}: its regions do not fit its instruction or its mask")
    if i > 0:
        if record["settings"]["keep_background"] and "mask" not in pictures:
            raise ValueError(f"state {i} has lost its mask")
        known = {field.name for field in fields(Settings)}
        Settings(**{name: value for name, value in record["settings"].items() if name in known})  # or SamplingError
        if (own := record["settings"].get("own")) is not None and len(own) != max(1, len(texts)):
            raise ValueError(f"state {i} has settings of regions that it does not have")
        for each in own or []:
            own_settings(each)  # or InstructionError, SamplingError
        if not 0 <= record.get("strength", 1) <= 1:
            raise ValueError(f"state {i} has a strength of {quote(record['strength'])}")
    plain = {name: record[name] for name in ("instruction", "parent", "settings", "f", *PLAIN) if name in record}
    union = None if given is None else _unpack_given(given, photo)
    return State(latent=tensors["latent"], image=pictures["image"], mask=pictures.get("mask"), regions=regions,
                 given=union, id=row.id, **plain)  # fmt: skip


def _check_head(about: dict) -> None:
    """What holds of what a file says of itself. Raises ValueError, ImageError."""
    if len(about["original_size"]) != 2 or not all(0 < side <= LONGEST for side in about["original_size"]):
        raise ValueError("the size of its picture is damaged")
    if about.get("turned", 2) not in TURNS:
        raise ValueError("how its picture was turned is damaged")
    if about.get("part") is not None:
        read_part(tuple(about["part"]), tuple(about["original_size"]))


def _check(about: dict, states: list[State]) -> None:
    """What holds of a canvas as a whole. Raises ValueError."""
    if any(not 0 <= state.parent < i for i, state in enumerate(states[1:], 1)):
        raise ValueError("its tree of edits is damaged")
    ids = [state.id for state in states]
    if any(state.made and state.made["from"] not in ids[:i] for i, state in enumerate(states)):
        raise ValueError("a change of its stack is from a state that it does not hold")
    scrubbed = [state.settings.get("scrubbed") or {"of": state.id} for state in states]
    if any(each["of"] not in ids[: i + 1] for i, each in enumerate(scrubbed)):
        raise ValueError("an edit goes on from one that it does not hold")
    undone = about["undone"]
    if any(not 0 <= i < len(states) for i in [about["at"], *undone]) or len(set(undone)) < len(undone):
        raise ValueError("it names a state that it does not hold, or one twice")
    if len({state.image.size for state in states}) > 1:
        raise ValueError("its pictures have different sizes")
