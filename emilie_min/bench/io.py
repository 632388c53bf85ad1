"""What comes from files: JSON of a known shape, pictures, texts fit to be quoted. Nothing here needs PyTorch."""

import json
import reprlib
from pathlib import Path
from types import NoneType
from typing import get_args

from PIL import Image

from ..canvas.pictures import formats
from ..errors import BenchError, first_line, printable


class Blank(str):
    """As a shape: a text that may be blank."""


WORDS = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null", dict: "an object"
}  # fmt: skip

Shape = type | dict | list

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def quote(value: object) -> str:
    """A value of a file as it may stand in a message: at most 80 printable characters."""
    return printable(_short.repr(value), 80)


def read_json(path: str | Path, shape: Shape, what: str) -> dict:
    """A JSON file of a known shape; `what` says in errors what it should be. Raises BenchError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
        raise BenchError(f"{path} cannot be read as {what} ({reason})") from error
    if found := fault(value, shape):
        raise BenchError(f"{path} is not {what}: {printable(found)}")
    return value


def fault(value: object, shape: Shape, at: str = "") -> str | None:
    """The first place where a JSON value departs from a shape, and how; None where it has it.

    A shape is a type or a union of types; [shape], a list; {"name": shape, "other?": shape}, an object with the first
    field and maybe the second, unless it is null, or further ones; {...: shape}, an object of any names. No text that
    is asked for is blank, and no list or object of any names empty.
    """
    where, blank = at or "it", shape is Blank
    shape = str if blank else shape
    if isinstance(shape, (dict, list)) and value in ({}, []) or isinstance(value, str) and not (blank or value.strip()):
        return f"{where} is empty"
    if isinstance(shape, dict) and isinstance(value, dict):
        for name in value if ... in shape else shape:
            optional = name in shape and name.endswith("?")
            key = name[:-1] if optional else name
            if optional and value.get(key) is None:
                continue
            if key not in value:
                return f"{where} lacks {key!r}"
            place = f"{at}.{key}".lstrip(".") if key.isidentifier() else f"{at}[{quote(key)}]"
            if found := fault(value[key], shape.get(..., shape.get(name)), place):
                return found
        return None
    if isinstance(shape, list) and isinstance(value, list):
        return next(filter(None, (fault(entry, shape[0], f"{at}[{i}]") for i, entry in enumerate(value))), None)
    kinds = get_args(shape) or (type(shape) if isinstance(shape, (dict, list)) else shape,)
    if type(value) in kinds and not (isinstance(value, (int, float)) and not abs(value) < 1e300):  # nor NaN
        return None
    return f"{where} must be {' or '.join(WORDS.get(kind, 'a list') for kind in kinds)}, not {quote(value)}"


def open_picture(path: str | Path) -> Image.Image:
    """A picture file as it is, of any mode. Raises BenchError."""
    try:
        with Image.open(path, formats=formats()) as file:
            file.load()
            return file
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, struct.error, ... on broken files
        message = f"{printable(path)} cannot be read as a picture: {printable(first_line(error), 200)}"
        raise BenchError(message) from error
