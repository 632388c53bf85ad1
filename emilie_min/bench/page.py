"""What reports and studies are made of: tables, pictures in a page, and pages that need no other file."""

import base64
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import Image

from ..canvas.strip import enlarge, outlined
from ..checkpoint.writing import write_bytes
from ..errors import BenchError, printable
from .data import Item

TEMPLATES = Path(__file__).parent / "templates"
SMALL = 128  # px: pictures up to this are shown enlarged, pixel for pixel
OUTLINED = 192  # px: the height at which a small picture's mask is outlined


# ---- tables


@dataclass(frozen=True)
class Value:
    """A number with its 95% interval, if it has one, and how many decimals to show."""

    mean: float
    low: float | None = None
    high: float | None = None
    digits: int = 2
    best: bool = False  # better than all others in its column, significantly

    @property
    def middle(self) -> str:
        return f"{self.mean:.{self.digits}f}"

    @property
    def range(self) -> str:
        return "" if self.low is None else f"[{self.low:.{self.digits}f}, {self.high:.{self.digits}f}]"

    def __str__(self) -> str:
        return f"{self.middle} {self.range}".strip()


Cell = str | int | Value | None


@dataclass(frozen=True)
class Table:
    """One table, for the page and for Markdown."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(isinstance(row[i], (int, Value)) for row in self.rows) for i in range(len(self.columns))]

    def markdown(self) -> str:
        """In GitHub's dialect, with title and note."""
        lines = [tuple(map(escape_markdown, self.columns)), tuple("---:" if n else "---" for n in self.numeric)]
        lines += [tuple(map(_markdown, row)) for row in self.rows]
        blocks = [f"**{escape_markdown(self.title)}**", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
        return "\n\n".join([*blocks, escape_markdown(self.note)] if self.note else blocks) + "\n"


def _markdown(cell: Cell) -> str:
    text = "–" if cell is None else escape_markdown(cell) if isinstance(cell, str) else str(cell)
    return f"**{text}**" if isinstance(cell, Value) and cell.best else text


MARKS = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;", **{mark: f"\\{mark}" for mark in "\\`*_|[]~$"}})


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line, fit for a terminal too."""
    return printable(" ".join(text.split()), len(text)).translate(MARKS)


# ---- pictures


def working_mask(item: Item, path: Path | None, size: tuple[int, int]) -> Image.Image | None:
    """A mask or region of an item, "L", scaled to working size as a run does it. Raises EmilieError."""
    from ..canvas import images  # with which PyTorch comes

    return path and images.read_mask(path, images.read_image(item.image).size, size)


def data_uri(image: Image.Image, mask: Image.Image | None = None, longest: int | None = None) -> str:
    """A picture as text, to stand in a page: PNG where it is small, else WebP; what its file said besides is dropped.

    mask: to outline; longest: scale down to so many px.
    """
    if mask is not None:
        image = outlined(enlarge(image, OUTLINED) if max(image.size) <= SMALL else image, mask)
    if longest and max(image.size) > longest:
        image = image.copy()
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    kind, options = ("png", {}) if max(image.size) <= 2 * SMALL else ("webp", {"quality": 90})
    out = BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(out, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def evenly_spaced(things: list, number: int) -> list:
    """As many of them as asked, evenly spaced, the first among them; all where there are no more."""
    return [things[i * len(things) // number] for i in range(number)] if number < len(things) else list(things)


# ---- pages


@cache
def _environment():
    try:
        import jinja2
    except ImportError as error:
        raise BenchError("pages need jinja2: pip install 'emilie_min[bench]'") from error
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )


def render(template: str, **values) -> str:
    """A page from its template; everything is escaped. Raises BenchError."""
    return _environment().get_template(template).render(**values)


def save(path: Path, text: str) -> None:
    """A text file, whole or not at all; of a surrogate pair's half, which no file can hold, "?" is left."""
    write_bytes(text.encode(errors="replace"), path)
