"""What comes from files: JSON of a known shape and pictures. Nothing here needs PyTorch."""

from pathlib import Path

from PIL import Image

from ..canvas.pictures import formats
from ..checkpoint.schema import Shape, fault, parse
from ..errors import BenchError, first_line, printable


def read_json(path: str | Path, shape: Shape, what: str) -> dict:
    """A JSON file of a known shape; `what` says in errors what it should be. Raises BenchError."""
    try:
        value = parse(Path(path).read_text(encoding="utf-8-sig"), infinite=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
        raise BenchError(f"{path} cannot be read as {what} ({printable(reason)})") from error
    if found := fault(value, shape):
        raise BenchError(f"{path} is not {what}: {printable(found)}")
    return value


def open_picture(path: str | Path) -> Image.Image:
    """A picture file as it is, of any mode. Raises BenchError."""
    try:
        with Image.open(path, formats=formats()) as file:
            file.load()
            return file
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, struct.error, ... on broken files
        message = f"{printable(path)} cannot be read as a picture: {printable(first_line(error), 200)}"
        raise BenchError(message) from error
