"""One visitor of the studio: the canvas, what can be done to it, and how it is shown. Nothing here knows of gradio."""

import base64
import io
import os
import secrets
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path

from PIL import Image

from ..canvas.canvas import Canvas
from ..canvas.canvas import open as open_canvas
from ..canvas.strip import OUTLINE, enlarge, strip
from ..emilie import Editor
from ..errors import CanvasError, EmilieError, ImageError, InstructionError, MaskError, printable
from ..toy import judge, world

SHOWN, THUMB = 512, 88  # px: up to where a small picture is shown enlarged; the height of those in the tree of edits
LONGEST = 2000  # characters that are looked at for an instruction
SAVES = ("picture", "strip", "canvas")


class Visitor:
    """One visitor's canvas. What is done is told in a line; what cannot be is an EmilieError and changes nothing."""

    def __init__(self, editor: Editor):
        self.editor, self.key = editor, secrets.token_urlsafe()  # the key: without it nobody sends or fetches a file
        self.canvas: Canvas | None = None
        self.name = ""  # of the files to save
        self.paint: Image.Image | None = None  # the mask of an edit that was undone, so that it can be tried again
        self.uploaded: tuple[str, tempfile.TemporaryDirectory | None] = ("", None)  # a file's name, and its folder
        self.busy, self.stopped, self.stopped_at = threading.Lock(), False, 0.0

    def open_uploaded(self) -> str:
        """Go on with the file that was uploaded, which is removed."""
        (name, folder), self.uploaded = self.uploaded, ("", None)
        if folder is None:
            raise ImageError(f"{printable(name, 100) or 'the file'} did not arrive: is it larger than 256 MB?")
        with folder as place:
            (path,) = Path(place).iterdir()
            return self.open(str(path), name)

    def open(self, path: str, name: str = "") -> str:
        """Go on with a picture, or with a canvas that was saved (.canvas); name: what the visitor calls it."""
        name = printable(os.path.basename(name or path), 100)
        try:
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always", UserWarning)
                canvas = open_canvas(path, self.editor)
        except EmilieError as error:
            raise type(error)(str(error).replace(path, name)) from error
        stem = name.removesuffix(".safetensors").removesuffix(".canvas")
        self.canvas, self.name, self.paint = canvas, stem if stem != name else Path(name).stem, None
        return ". ".join([f"{name} is open", *(str(note.message).replace(path, name) for note in notes)])

    def new_scene(self, seed: int) -> str:
        canvas = open_canvas(world.render(world.scene(seed)), self.editor)
        self.canvas, self.name, self.paint = canvas, f"scene{seed}", None
        return f"Scene {seed} of the small world"

    def edit(self, text: str, paint: str = "", **settings) -> Iterator[tuple[str, float]]:
        """Follow an instruction: everywhere, or where there is paint, see `read_paint`; settings: of `Canvas.edit`.

        Yields what is done and how much of the whole; between two steps `stopped` is looked at.
        """
        self.stopped, started, canvas = False, time.time(), self.opened()
        if len(text) > LONGEST:
            raise InstructionError(f"an instruction of {len(text)} characters is too long")
        mask = read_paint(paint, canvas.state.image.size)
        settings["keep_background"] = settings.get("keep_background", False) and mask is not None
        settings["negative"] = settings.get("negative") or None
        number = settings.get("steps") or self.editor.config.sampling.steps
        for step in canvas.steps(text, mask, **settings):
            self.go_on()
            yield f"Step {step.i} of {number}: {text}", step.i / number
        self.paint = None
        where = "everywhere" if mask is None else "where you painted"
        yield f"Edit {canvas.at}: {text}, {where}; {time.time() - started:.1f} s", 1

    def stop(self) -> None:
        """The edit that is under way, and those that were asked for and still wait."""
        self.stopped, self.stopped_at = True, time.time()

    def go_on(self) -> None:
        """Raises CanvasError once Stop was pressed."""
        if self.stopped:
            raise CanvasError("stopped: the picture is as it was")

    def undo(self) -> str:
        mask = self.opened().state.mask
        self.canvas.undo()
        return self.gone(mask)

    def redo(self) -> str:
        self.opened().redo()
        return self.gone()

    def branch(self, state: int) -> str:
        self.opened().branch(state)
        return self.gone()

    def gone(self, paint: Image.Image | None = None) -> str:
        self.paint = paint
        return f"At {self.canvas.at}, {self.canvas.state.instruction or 'the start'}: the next edit begins here"

    def opened(self) -> Canvas:
        if self.canvas is None:
            raise CanvasError("there is no picture yet: open one")
        return self.canvas

    def suggestions(self) -> list[str]:
        """In the small world: an instruction of every kind that can be followed in the current picture."""
        if not small_world(self.editor) or self.canvas is None:
            return []
        picture, scene, kinds = self.canvas.image, world.Scene("", "", ()), ["background", "style"]
        if picture.size == (world.SIZE, world.SIZE):
            reading = judge.read(picture)
            if reading.background_rms < 3 * judge.MAX_RMS:  # else it is some other picture, without shapes to speak of
                scene, kinds = reading.scene, world.possible(reading.scene)
        return [world.instruct(scene, f"{self.name} {self.canvas.at}", kind)[0] for kind in kinds]

    def file(self, what: str) -> tuple[str, bytes] | None:
        """Name and content of what can be saved now: "picture", the "strip" that led to it, or the whole "canvas"."""
        if self.canvas is None or what not in SAVES:
            return None
        canvas = replace(self.canvas, at=self.canvas.at, states=list(self.canvas.states))  # an edit may end meanwhile
        if what == "canvas":
            with tempfile.TemporaryDirectory() as folder:
                canvas.save(Path(folder) / "canvas")
                return f"{self.name}.canvas", (Path(folder) / "canvas").read_bytes()
        if what == "picture":
            return f"{self.name}_{canvas.at}.png", png(canvas.image)
        cells = [(canvas.states[0].image, "input", None), *((s.image, s.instruction, s.mask) for s in canvas.history)]
        return f"{self.name}_{canvas.at}_strip.png", png(strip(cells))


def small_world(editor: Editor) -> bool:
    return editor.config.sampling.resolution == world.SIZE


def read_paint(url: str, size: tuple[int, int]) -> Image.Image | None:
    """What the page sends as a mask: a PNG as data URL, opaque where to edit; "" = no mask, None. Raises MaskError."""
    if not url:
        return None
    try:
        mask = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])), formats=["PNG"])
        if mask.size != size:  # looked at before it is unpacked
            raise MaskError("the painted mask has not the same size as the picture: paint it again")
        mask = mask.getchannel("A")
    except MaskError:
        raise
    except Exception as error:  # PIL raises whatever its reader meets
        raise MaskError("the painted mask did not arrive whole: paint it again") from error
    if not mask.getbbox():
        raise MaskError("nothing is painted: paint where to edit, or press Clear to edit everywhere")
    return mask


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def picture_html(visitor: Visitor) -> str:
    """The current picture under a canvas of its size to paint on; a small one in large pixels, a whole number each."""
    if visitor.canvas is None:
        return f'<div class="empty" data-key="{visitor.key}">Open a picture to begin: click here, or drop one</div>'
    image, paint = visitor.canvas.image, ""
    if visitor.paint is not None:
        mask = Image.new("RGBA", image.size, OUTLINE)
        mask.putalpha(visitor.paint)
        paint = data_url(mask)
    times = max(1, SHOWN // max(image.size))
    links = "".join(f'<a id="save-{x}" href="save/{visitor.key}/{x}" download>Save {x}</a>' for x in SAVES)
    return (
        f'<div class="board" style="width:{times * image.width}px" data-made="{time.time_ns()}" data-paint="{paint}">'
        f'<img class="{"pixels" if times > 1 else ""}" src="{data_url(image)}" draggable="false" alt="the picture">'
        f'<canvas width="{image.width}" height="{image.height}"></canvas></div>'
        f'<div class="saves" data-key="{visitor.key}">{links}</div>'
    )


def tree_html(canvas: Canvas | None) -> str:
    """The tree of edits, a column for each depth: a state's first edit stays in its row, a branch opens another."""
    if canvas is None:
        return ""
    children = {i: [] for i in range(len(canvas.states))}
    for i, state in enumerate(canvas.states[1:], 1):
        children[state.parent].append(i)
    rows, row, column, parts, todo = 1, {}, {}, [], [0]
    while todo:  # depth first, so that no line crosses another
        i = todo.pop()
        todo += reversed(children[i])
        state, parent = canvas.states[i], canvas.states[i].parent
        rows += i > 0 and i != children[parent][0]
        row[i] = rows
        column[i] = 1 if i == 0 else column[parent] + 1
        if i > 0:
            line = f"grid-area:{row[parent]}/{column[i]}/{row[i] + 1}/{column[i] + 1}"
            parts.append(f'<i class="{"branch" if row[i] > row[parent] else ""}" style="{line}"></i>')
        about = ", ".join(f"{key} {value}" for key, value in state.settings.items())
        hidden = "" if state.shown or state.shown is None else " (hidden)"
        parts.append(
            f'<button class="state{" here" if i == canvas.at else ""}" data-state="{i}" title="{escape(about)}" '
            f'style="grid-area:{row[i]}/{column[i]}"><img src="{data_url(enlarge(state.image, THUMB))}" alt="">'
            f"<span><b>{i}</b> {escape(state.instruction or 'start')}{hidden}</span></button>"
        )
    return f'<div class="tree">{"".join(parts)}</div>'
