"""What comes from files: JSON of a known shape and pictures. Nothing here needs PyTorch."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..canvas.pictures import TIFF, Source, identified, quiet, unknown
from ..checkpoint.schema import Shape, fault, parse
from ..errors import BenchError, hushed, plain_file, printable

LONGEST = 2**28  # bytes of a JSON file


def read_json(path: str | Path, shape: Shape, what: str) -> dict:
    """A JSON file of a known shape; `what` says in errors what it should be. Raises BenchError."""
    try:
        plain_file(path, LONGEST)
        value = parse(Path(path).read_text(encoding="utf-8-sig"), infinite=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
        raise BenchError(f"{path} cannot be read as {what} ({printable(reason)})") from error
    if found := fault(value, shape):
        raise BenchError(f"{path} is not {what}: {printable(found)}")
    return value


def open_picture(path: str | Path) -> Image.Image:
    """A picture file as it is, of any mode. Raises BenchError."""
    source = Source(path, "picture", BenchError)
    with quiet(source):
        plain_file(path)
        with open(path, "rb") as file, hushed((head := file.read(4096))[:4] in TIFF):
            try:
                image = identified(file, head, Path(path).suffix.lower(), source)
            except UnidentifiedImageError as cause:
                source.fail(unknown(head), cause)
            image.load()
            return image
