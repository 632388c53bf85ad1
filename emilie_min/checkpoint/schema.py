"""JSON from files, of a known shape; a clear fault where it is not. Nothing here needs PyTorch."""

import json
from types import NoneType
from typing import Any, get_args

from ..errors import quote


class Blank(str):
    """As a shape: a text that may be blank."""


WORDS = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null", dict: "an object"
}  # fmt: skip

Shape = type | dict | list


def parse(text: str | bytes, infinite: bool = False) -> Any:
    """JSON, with no name twice in an object and, unless `infinite`, no number NaN or infinite. Raises ValueError."""

    def constant(word: str) -> float:
        if not infinite:
            raise ValueError(f"{word} is no number")
        return float(word)

    def named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it has {quote(next(name for name in names if names.count(name) > 1))} twice")
        return made

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=named)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def fault(value: object, shape: Shape, at: str = "") -> str | None:
    """The first place where a JSON value departs from a shape, and how; None where it has it.

    A shape is a type or a union of types; [shape], a list, and [shape, ...] one that may be empty; {"name": shape,
    "other?": shape}, an object with the first field and maybe the second, unless it is null, or further ones;
    {...: shape}, an object of any names. No text that is asked for is blank, and no list or object of any names empty.
    """
    where, blank = at or "it", shape is Blank
    shape = str if blank else shape
    if isinstance(shape, list) and shape[1:] == [...]:
        shape = shape[:1]
        if value == []:
            return None
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


def strange(value: dict, shape: dict) -> str | None:
    """A field of an object that its shape does not name; None where it has none."""
    names = value.keys() - {name.removesuffix("?") for name in shape}
    return f"{quote(min(names))} is not known here" if names else None
