"""What reports and studies are made of: tables, pictures in a page, and pages that need no other file."""

import base64
import csv
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from ..canvas.strip import enlarge, outlined
from ..checkpoint.writing import write_bytes
from ..errors import BenchError
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
    best: bool = False  # better than all others in its column, beyond doubt

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
    """One table, for the page, for Markdown and for CSV."""

    name: str  # the CSV's, without its ending
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(isinstance(cell, (int, Value)) for cell in column) for column in self._columns]

    @property
    def _columns(self) -> list[list[Cell]]:
        return [[row[i] for row in self.rows] for i in range(len(self.columns))]

    def markdown(self) -> str:
        """In GitHub's dialect, with title and note."""
        lines = [self.columns, tuple("---:" if n else "---" for n in self.numeric)]
        for row in self.rows:
            texts = [plain(cell) if isinstance(cell, str) else text(cell) for cell in row]
            bold = [isinstance(cell, Value) and cell.best for cell in row]
            lines.append(tuple(f"**{t}**" if b else t for t, b in zip(texts, bold)))
        lines[0] = tuple(map(plain, self.columns))
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{plain(self.title)}**\n\n{table}\n" + (f"\n{plain(self.note)}\n" if self.note else "")

    def csv(self) -> str:
        """Numbers in full; a column with intervals becomes three: name, name low, name high."""
        ranged = [any(isinstance(cell, Value) and cell.low is not None for cell in column) for column in self._columns]
        header = [h for c, r in zip(self.columns, ranged) for h in ((c, f"{c} low", f"{c} high") if r else (c,))]
        rows = [[v for cell, r in zip(row, ranged) for v in _fields(cell, r)] for row in self.rows]
        return to_csv(header, rows)


def text(cell: Cell) -> str:
    return "–" if cell is None else str(cell)


def _fields(cell: Cell, ranged: bool) -> tuple:
    if isinstance(cell, Value):
        return (cell.mean, cell.low, cell.high) if ranged else (cell.mean,)
    return (cell, None, None) if ranged else (cell,)


def to_csv(header: list[str], rows: list[list]) -> str:
    """Rows of numbers, texts and None as CSV; floats with 6 significant digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows])
    return out.getvalue()


MARKS = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;", **{mark: f"\\{mark}" for mark in "\\`*_|[]~$"}})


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return " ".join(text.translate(MARKS).split())


# ---- pictures


def open_picture(path: Path) -> Image.Image:
    """A picture of a run or benchmark. Raises BenchError."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise BenchError(f"{path} cannot be read as a picture: {error}") from error


def working_mask(item: Item, path: Path | None, size: tuple[int, int]) -> Image.Image | None:
    """A mask or region of an item, "L", scaled to working size as a run does it."""
    if path is None:
        return None
    with Image.open(path) as mask:
        if mask.mode in ("1", "L") and mask.size == size:
            return mask.convert("L")
    from ..canvas import images

    return images.read_mask(path, images.read_image(item.image).size, size)


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
    out = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(out, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def evenly(things: list, number: int) -> list:
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
    """A text file, whole or not at all."""
    write_bytes(text.encode(), path)
