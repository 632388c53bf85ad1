"""What a picture says of how it was made: texts in the PNG, which `emilie info` reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .. import __version__
from ..checkpoint.schema import parse
from ..errors import ImageError, first_line, plain_file, printable
from .canvas import Canvas

KEY, LONGEST = "emilie", 2**20  # of the text that holds all; characters of it that are read


def texts(canvas: Canvas, earlier: Sequence[Canvas] = ()) -> dict[str, str]:
    """The texts for the current picture of a canvas: the edits that led to it as JSON, and two that others read.

    earlier: canvases on other parts of the picture, edited before.
    """
    history = [state for each in (*earlier, canvas) for state in each.history]
    edits = [
        {"instruction": state.instruction}
        | ({"mask": round(share(state.mask), 4)} if state.mask is not None else {})
        | {"settings": {name: value for name, value in state.settings.items() if value is not None}}
        for state in history
    ]
    about = {
        "version": __version__,
        "model": canvas.editor.model,
        "weights": canvas.editor.family,
        "dtype": str(canvas.editor.dtype).removeprefix("torch."),
        "seed": canvas.seed,
        "worked at": list(canvas.state.image.size),
        **({} if canvas.part is None else {"part": list(canvas.part)}),
        "edits": edits,
    }
    said = " | ".join(state.instruction for state in history)
    return {KEY: json.dumps(about, ensure_ascii=False), "Description": said, "Software": f"emilie_min {__version__}"}


def share(mask: Image.Image) -> float:
    """What part of a picture a mask is, from 0 to 1."""
    return sum(mask.histogram()[128:]) / (mask.width * mask.height)


def is_png(path: str | Path) -> bool:
    try:
        plain_file(path)
        with open(path, "rb") as file:
            return file.read(8) == b"\x89PNG\r\n\x1a\n"
    except OSError:
        return False


def read(path: str | Path) -> dict[str, Any]:
    """What `texts` put into a PNG. Raises ImageError for one that says nothing or is broken."""
    try:
        plain_file(path)
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            said = image.info.get(KEY)
    except Exception as error:  # PIL raises whatever its reader meets
        raise ImageError(f"{printable(path)} cannot be read as a picture: {printable(first_line(error))}") from error
    if said is None:
        raise ImageError(f"{printable(path)} does not say how it was made: `emilie edit` did not write it, or it was "
                         "saved anew by another program")  # fmt: skip
    try:
        about = parse(str(said)[:LONGEST])
        if not isinstance(about["edits"], list):
            raise ValueError("no edits")
        for edit in about["edits"]:
            if not isinstance(edit["instruction"], str) or not isinstance(edit["settings"], dict):
                raise ValueError("an edit without instruction and settings")
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(f"what {printable(path)} says of how it was made is broken: {first_line(error)}") from error
    return about


def lines(path: str | Path) -> str:
    """`read`, in lines for a person."""
    about = read(path)
    out = [printable(path)]
    for name in ("model", "weights", "dtype", "seed", "worked at", "part", "version"):
        if name in about:
            value = about[name]
            if isinstance(value, list):  # width and height, or a box
                value = ("x" if name == "worked at" else ",").join(map(str, value)) + " px"
            out.append(f"  {name:<10} {printable(value, 80)}")
    for number, edit in enumerate(about["edits"], 1):
        where = f", in a mask of {float(edit['mask']):.1%} of the picture" if is_number(edit.get("mask")) else ""
        out.append(f"  {number}. {printable(edit['instruction'], 300)}{where}")
        settings = ", ".join(f"{key} {value}" for key, value in edit["settings"].items())
        out.append(f"     {printable(settings)}")
    return "\n".join(out)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
