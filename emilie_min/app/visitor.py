"""One visitor of the studio: the canvas, what can be done to it, and how it is shown. Nothing here knows of gradio."""

import asyncio
import base64
import io
import itertools
import os
import secrets
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from html import escape
from pathlib import Path

from PIL import Image

from ..canvas import about, images, stack, where
from ..canvas.canvas import Canvas
from ..canvas.canvas import open as open_canvas
from ..canvas.photo import Photo, changed, is_small, open_photo
from ..canvas.preview import fit, look
from ..canvas.regions import own_settings
from ..canvas.session import is_session
from ..canvas.settings import OWN
from ..canvas.state import State
from ..canvas.strip import OUTLINE, enlarge, strip
from ..emilie import Editor
from ..errors import CanvasError, EmilieError, ImageError, InstructionError, MaskError, printable
from ..sampling import Step
from ..toy import judge, world
from .edit import LITTLE
from .inserting import PROPOSALS, Inserting, Networks
from .looks import TIMES
from .options import small_world

SHOWN, THUMB = 512, 88  # px: up to where a small picture is shown enlarged; the height of those in the tree of edits
LONGEST = 2000  # characters that are looked at for an instruction
SAVES = ("picture", "strip", "canvas")
STATES, PIXELS = 1000, 2**30  # of a canvas that is opened; px of all visitors' pictures, until which one is taken
REGIONS, LOOK = 8, 0.3  # regions of an edit beside its own; seconds between two looks at what is denoised
GENERAL = ("make it winter", "make it night", "turn it into a watercolor painting", "add a rainbow", "make it autumn")
Told = tuple[str, float, Image.Image | None]  # what is done, how much of the whole, and how it looks so far


class Visitor:
    """One visitor's canvas. What is done is told in a line; what cannot be is an EmilieError and changes nothing.

    networks: of insertion, None = the small ones, of a small editor; all: the visitors that there are, by their keys.
    """

    def __init__(self, editor: Editor, networks: Networks | None = None, all: Mapping[str, "Visitor"] | None = None):
        self.inserting, self.all = Inserting(networks or Networks(editor)), {} if all is None else all
        self.editor, self.key = editor, secrets.token_urlsafe()  # the key: without it nobody sends or fetches a file
        self.photo: Photo | None = None
        self.session: Canvas | None = None  # one that was saved, whose photo is not here
        self.name = ""  # of the files to save
        self.paint: Image.Image | None = None  # a mask to put on the board: of an edit that was undone, or found
        self.regions: list[tuple] = []  # what the next edit does too: text, mask, settings of its own
        self.revised: int | None = None  # the edit of the stack that the next press of Edit makes anew
        self.filled: dict | None = None  # what to put on the page: an edit's text and settings
        self.uploaded: tuple[str, tempfile.TemporaryDirectory | None] = ("", None)  # a file's name, and its folder
        self.busy, self.stopped, self.stopped_at = threading.Lock(), False, 0.0
        self.saving = asyncio.Lock()  # while a file is made and sent
        self.seen = ""  # what an edit looks like so far, as a data URL

    @property
    def canvas(self) -> Canvas | None:
        return self.session if self.photo is None else self.photo.canvas

    @property
    def pixels(self) -> int:
        """Of the pictures that are kept for this visitor at the size that they came in."""
        pictures = [self.inserting.picture, self.photo and self.photo.photo]
        return sum(picture.width * picture.height for picture in pictures if picture)

    def check_room(self) -> None:
        """Raises ImageError: the other visitors' pictures are large."""
        if sum(one.pixels for one in list(self.all.values()) if one is not self) > PIXELS:
            raise ImageError("too many large pictures are open here: come back later")

    @contextmanager
    def arrived(self) -> Iterator[tuple[str, str]]:
        """Path and name of the file that was uploaded, which is removed afterwards."""
        (name, folder), self.uploaded = self.uploaded, ("", None)
        if folder is None:
            raise ImageError(f"{printable(name, 100) or 'the file'} did not arrive: is it larger than 256 MB?")
        self.check_room()
        with folder as place:
            (path,) = Path(place).iterdir()
            yield str(path), printable(os.path.basename(name or str(path)), 100)

    def open_uploaded(self) -> str:
        """Go on with the file that was uploaded."""
        with self.arrived() as (path, name):
            return self.open(path, name)

    def open(self, path: str, name: str = "") -> str:
        """Go on with a picture, or with a canvas that was saved (.canvas); name: what the visitor calls it."""
        name = printable(os.path.basename(name or path), 100)
        self.check_room()
        with called(name, path) as notes:
            if is_session(path):
                photo, session = None, open_canvas(path, self.editor)
                if len(session.states) > STATES:
                    raise CanvasError(f"{name} has {len(session.states)} states: the page shows {STATES} at most")
            else:
                photo, session = self.read_photo(path), None
        if photo is not None and photo.canvas is self.session:
            self.photo, self.session = photo, None
            return f"{name} is this canvas's photo: it goes on at the photo's own size"
        stem = name.removesuffix(".safetensors").removesuffix(".canvas")
        self.begin(photo, session, stem if stem != name else Path(name).stem)
        told = [f"{name} is open", *notes]
        if session is not None and session.original_size != session.state.image.size:
            told.append("For the photo's own size open its photo, too")
        if small_world(self.editor) and not judge.is_scene(self.opened().states[0].image):
            told.append("It is no scene of the small model's world, and it knows nothing else: `emilie download`")
        return ". ".join(told)

    def read_photo(self, path: str) -> Photo:
        """A picture's `Photo`: of the canvas that is open without one where it is that canvas's, else of a new one."""
        photo = images.read_image(path)
        if self.session is not None:
            with suppress(CanvasError):
                return Photo(photo, self.session)
        return open_photo(photo, self.editor)

    def open_url(self, url: str | None) -> str:
        """`open`, of a picture as a data URL; "" = `open_uploaded`."""
        if not url:
            return self.open_uploaded()
        data = sent(url)
        with tempfile.TemporaryDirectory(prefix="emilie-") as folder:
            path = Path(folder) / "upload"
            path.write_bytes(data)
            if is_session(path):
                raise ImageError("this is no picture")
            return self.open(str(path), "the picture")

    def shown(self) -> str:
        """The current picture at its photo's size, as a data URL."""
        return data_url(self.opened().image if self.photo is None else self.photo.image)

    def view(self) -> Image.Image:
        """The current picture as it would be saved, at working size."""
        canvas = self.opened()
        if self.photo is None:
            return canvas.image
        return images.view(self.photo.image, canvas.state.image.size, canvas.native, canvas.part)

    def begin(self, photo: Photo | None, session: Canvas | None, name: str) -> None:
        self.photo, self.session, self.name = photo, session, name
        self.put_down()

    def put_down(self) -> None:
        """Nothing is painted, waits or is to be revised."""
        self.paint, self.regions, self.revised = None, [], None

    def new_scene(self, seed: int) -> str:
        self.begin(open_photo(world.render(world.scene(seed)), self.editor), None, f"scene{seed}")
        return f"Scene {seed} of the small world"

    def edit(self, text: str, paint: str = "", crop: bool = False, part: float = 1, **settings) -> Iterator[Told]:
        """Follow an instruction, everywhere or where there is paint, see `read_paint`, and the `regions` in one pass.

        crop: in a crop round the paint, at the photo's full resolution; settings: of `Canvas.edit`. Yields what is
        done; between two steps `stopped` is looked at. With an edit to revise that one is made anew, see `revise`.
        """
        self.stopped, self.seen, started, photo = False, "", time.time(), self.photo
        mask = self.asked(text, paint)
        regions = [(text, mask), *self.regions]
        masks = [given for _, given, *_ in regions]
        settings["keep_background"] = settings.get("keep_background", False) and None not in masks
        settings["negative"] = settings.get("negative") or None
        if self.revised is not None:
            yield from self.revise(self.revised, regions, part, settings)
            return
        kept = None if photo is None else (photo.photo, photo.canvas, list(photo.earlier))
        aimed = ""
        try:
            if photo is not None:
                regions = [(text, given and photo.at_own_size(given), *own) for text, given, *own in regions]
                masks = [given for _, given, *_ in regions]
                aimed = photo.aim(masks if crop and None not in masks else None)
            before = self.opened().image
            yield from self.steps((photo or self.opened()).steps(regions, **settings), text, settings.get("steps"))
        except BaseException:  # also where the page is left in the middle
            if kept is not None:
                photo.photo, photo.canvas, photo.earlier = kept
            raise
        self.put_down()
        canvas = self.opened()
        share = changed(before, canvas.image, canvas.state.mask)
        place = "everywhere" if canvas.state.mask is None else "where you painted"
        told = f"Edit {canvas.at}: {canvas.state.instruction}, {place}; {time.time() - started:.1f} s"
        told += f"; {share:.1%} of {'the picture' if canvas.state.mask is None else 'that'} changed"
        told += ": raise how strongly, or lower how closely" * (share < LITTLE)
        told += f"; {aimed}" * bool(aimed)
        if not crop and photo is not None and masks[0] is not None:
            small = is_small(masks[0].getbbox(), photo.photo.size, canvas.state.image.size)
            told += "; the paint is small in this photo, a crop would do better" * small
        yield told, 1, None

    def take_up(self, k: int) -> str:
        """Put an edit of the stack on the page, to be revised; once more: put it down."""
        edits, again = self.opened().stack, self.revised == k
        state = edits[stack.place(k, len(edits))]
        self.put_down()
        if again:
            return f"Edit {k} stays as it was"
        own = [dict(one) for one in state.settings.get("own", [])]
        first, *rest = state.regions or [(state.instruction, state.mask)]
        self.revised, self.paint = k, first[1]
        self.regions = [(*region, one) for region, one in itertools.zip_longest(rest, own[1:], fillvalue={})]
        self.filled = {"text": first[0], **state.settings, **(own[0] if own else {})}
        return f"Edit {k} is on the board: change what it says, where, or its settings, and press Revise"

    def revise(self, k: int, regions: list[tuple], part: float, settings: dict) -> Iterator[Told]:
        """Make edit k of the stack anew, in the last part of its steps; the later ones stay."""
        canvas = self.opened()
        state = canvas.stack[k - 1]
        changes = {n: v for n, v in settings.items() if v is not None and v != state.settings.get(n)}
        if settings["negative"] is None and state.settings.get("negative"):
            changes["negative"] = None
        old = state.regions or [(state.instruction, state.mask)]
        same = [(t, m and m.tobytes()) for t, m, *_ in regions] == [(t, m and m.tobytes()) for t, m in old]
        if not same or any(own and own[0] for _, _, *own in regions):
            own_size = (lambda mask: mask) if self.photo is None else self.photo.at_own_size
            changes["instruction"] = [(text, mask and own_size(mask), *own) for text, mask, *own in regions]
        if not changes:
            raise CanvasError(f"edit {k} is as it was: change what it says, the paint or the settings")
        way = ("revise", k) if part >= 1 else ("scrub", k, part)
        yield from self.steps(stack.change(canvas, *way, **changes), f"edit {k}", settings.get("steps"))
        self.put_down()
        yield f"Edit {k} is made anew, and the later ones where it mattered: {calls(canvas)}", 1, None

    def asked(self, text: str, paint: str) -> Image.Image | None:
        """The paint's mask at working size, once instruction and paint can be used."""
        canvas = self.opened()
        if len(text) > LONGEST:
            raise InstructionError(f"an instruction of {len(text)} characters is too long")
        return read_paint(paint, canvas.state.image.size)

    def steps(self, steps: Iterator[Step], text: str, number: int | None) -> Iterator[Told]:
        """What is told of an edit's steps, with what is denoised so far; looks at `stopped`."""
        by, number, looked = fit(self.opened()), number or self.editor.config.sampling.steps, 0.0
        for step in steps:
            self.go_on()
            seen, now = None, time.time()
            if now - looked > LOOK:
                looked, seen = now, look(step.denoised, by)
            yield f"Step {step.i} of {number}: {text}", step.i / number, seen

    def drop_uploaded(self, caption: str = "") -> str:
        """Take the file that was uploaded as an inset, and find places for it."""
        with self.arrived() as (path, name), called(name, path) as notes:
            caption = self.inserting.take(path, caption)
        return self.first_places(caption, [f"{name} is the inset", *notes])

    def mask_uploaded(self, caption: str = "") -> str:
        """Take the file that was uploaded as the inset's mask, and find places anew."""
        with self.arrived() as (path, name), called(name, path) as notes:
            self.inserting.mask(path)
        return self.first_places(caption, [f"{name} is the inset's mask", *notes])

    def first_places(self, caption: str, told: list[str]) -> str:
        """What is told of an inset that is here, also where no place can be found for it yet."""
        try:
            return ". ".join([*told, self.propose(caption)])
        except EmilieError as error:
            return ". ".join([*told, str(error)])

    def propose(self, caption: str = "", paint: str = "", n: int = PROPOSALS, seed: int | None = None) -> str:
        """Find places for the inset, other ones where there are some, or take the painted one."""
        at = self.asked(caption, paint)
        with called() as notes:
            told = self.inserting.propose(self.photo or self.opened(), caption, at, n, seed)
        return ". ".join([told, *notes])

    def propose_url(
        self, inset: str | None, mask: str | None, caption: str | None, place: str | None, n: int, seed: int | None
    ) -> str:
        """`propose`, of an inset and its mask as data URLs; inset: "" = the file that was uploaded."""
        self.opened()
        self.check_room()
        with self.arrived() if not inset else nullcontext(("", "")) as (path, name), called(name, path) as notes:
            self.inserting.take(sent(inset) if inset else path)
            if mask:
                self.inserting.mask(sent(mask))
        return ". ".join([self.propose(caption or "", place or "", n, seed), *notes])

    def outlined(self) -> str:
        """The picture with the places that are proposed, see `Plan.outlined`, as a data URL."""
        plan = self.inserting.places(self.opened().state)
        return self.shown() if plan is None else data_url(plan.outlined())

    def insert(self, take: int, caption: str = "", redrawn: float = 1.0, **settings) -> Iterator[Told]:
        """Draw the inset in a place, by its number from 0; redrawn: below 1 see `Plan.keep_steps`. Like `edit`."""
        self.stopped, self.seen, started = False, "", time.time()
        self.asked(caption, "")
        plan = self.inserting.ready(self.opened().state, caption)
        settings["negative"], number = settings.get("negative") or None, settings.get("steps")
        if redrawn < 1:
            steps = plan.keep_steps(take, redrawn, **settings)
            number = max(1, round(redrawn * (number or self.editor.config.sampling.steps)))
        else:
            steps = plan.steps(take, **settings)
        yield from self.steps(steps, plan.instruction(take), number)
        self.gone()
        canvas = self.opened()
        told = f"Edit {canvas.at}: {canvas.state.instruction}, in place {take + 1}; {time.time() - started:.1f} s"
        yield told, 1, None

    def clear_inset(self) -> str:
        self.inserting.clear()
        return "No inset"

    def add_region(self, text: str, paint: str = "", **own) -> str:
        """Keep an instruction and where it is for, until the next edit does all of them in one pass.

        own: of the settings that are now those that a region can have for itself.
        """
        mask = self.asked(text, paint)
        if not text.strip() or mask is None:
            raise MaskError("a region needs both: say what to change, and paint where")
        if len(self.regions) >= REGIONS:
            raise MaskError(f"{REGIONS} regions are waiting already: press Edit")
        self.editor.text.tokenize([text])
        self.regions.append(
            (text, mask, own_settings({name: v for name, v in own.items() if v not in (None, "") and name in OWN}))
        )
        texts = " + ".join(text for text, *_ in self.regions)
        return f"{len(self.regions)} waiting, with the settings of now: {texts}. Paint and say the next"

    def clear_regions(self) -> str:
        self.regions = []
        return "No region is waiting"

    def where(self, text: str) -> str:
        """Put the mask of where an instruction would act on the board."""
        self.asked(text, "")
        mask = where.mask(self.opened(), text)
        self.paint = mask
        if mask is None:
            return f"{text}: acts on all of the picture"
        return f"{text}: would act here, on {about.share(mask):.0%} of the picture. Press Edit, or paint on"

    def try_scales(self, text: str, paint: str = "", **settings) -> Iterator[Told]:
        """Nine edits around the two scales that are set, as branches to choose from."""
        self.stopped, mask, canvas = False, self.asked(text, paint), self.opened()
        at, target = canvas.at, self.photo or canvas
        own = mask if mask is None or self.photo is None else self.photo.at_own_size(mask)
        settings["keep_background"] = settings.get("keep_background", False) and mask is not None
        settings["negative"] = settings.get("negative") or None
        middle = {name: settings.pop(name, None) or getattr(self.editor.config.sampling, name) for name in TIMES}
        scales = [[round(middle[name] * t, 2) for t in times] for name, times in TIMES.items()]
        each = list(itertools.product(*scales))
        try:
            for i, (text_scale, image_scale) in enumerate(each):
                canvas.branch(at)
                both = {"text_scale": text_scale, "image_scale": image_scale}
                for told, done, seen in self.steps(
                    target.steps([(text, own)], **settings, **both), text, settings.get("steps")
                ):
                    yield f"{i + 1} of {len(each)}: {told}", (i + done) / len(each), seen
        finally:
            canvas.branch(at)
        yield f"{len(each)} results below, by their scales: click one to go on from it", 1, None

    def stop(self) -> None:
        """The edit that is under way, and those that were asked for and still wait."""
        self.stopped, self.stopped_at = True, time.time()

    def go_on(self) -> None:
        """Raises CanvasError once Stop was pressed."""
        if self.stopped:
            raise CanvasError("stopped: the picture is as it was")

    def undo(self) -> str:
        state = self.opened().state
        mask = None if state.inserted else state.mask  # of an insertion its places are shown again
        (self.photo or self.opened()).undo()
        return self.gone(mask if mask is None or mask.size == self.opened().state.image.size else None)

    def redo(self) -> str:
        self.opened().redo()
        return self.gone()

    def branch(self, state: int) -> str:
        self.opened().branch(state)
        return self.gone()

    def gone(self, paint: Image.Image | None = None) -> str:
        self.regions = [] if self.revised else self.regions
        self.paint, self.revised = paint, None
        return f"At {self.canvas.at}, {self.canvas.state.instruction or 'the start'}: the next edit begins here"

    def opened(self) -> Canvas:
        if self.canvas is None:
            raise CanvasError("there is no picture yet: open one")
        return self.canvas

    def suggestions(self) -> list[str]:
        """Instructions for the current picture: of a scene, each kind that can be followed, else general ones."""
        if self.canvas is None:
            return []
        if not small_world(self.editor):
            return list(GENERAL)
        picture, scene, kinds = self.canvas.image, world.Scene("", "", ()), ["background", "style"]
        if picture.size == (world.SIZE, world.SIZE) and judge.is_scene(picture):
            scene = judge.read(picture).scene
            kinds = world.possible(scene)
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
            earlier = [] if self.photo is None else self.photo.canvases[:-1]
            image = canvas.image if self.photo is None else self.photo.image
            return f"{self.name}_{canvas.at}.png", png(image, about.texts(canvas, earlier))
        cells = [(canvas.states[0].image, "input", None), *((s.image, s.instruction, s.mask) for s in canvas.history)]
        return f"{self.name}_{canvas.at}_strip.png", png(strip(cells))


@contextmanager
def called(name: str = "", path: str = "") -> Iterator[list[str]]:
    """A list that in the end has what was told; there and in errors a file is called by its name, not by its path."""
    told: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            yield told
    except EmilieError as error:
        raise type(error)(str(error).replace(path, name) if path else str(error)) from error
    told += dict.fromkeys(str(note.message).replace(path, name) if path else str(note.message) for note in notes)


def sent(url: str | None) -> bytes:
    """The file in a data URL. Raises ImageError."""
    try:
        data = base64.b64decode((url or "").partition(",")[2], validate=True)
    except ValueError:
        data = b""
    if not data:
        raise ImageError("a picture is sent as a data URL: data:image/png;base64,...")
    return data


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


def calls(canvas: Canvas) -> str:
    """How many a change of the stack took."""
    n = canvas.state.made["calls"]
    return f"{n} network calls" if n else "no network call was needed"


def png(image: Image.Image, texts: Mapping[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=images.png_texts(texts or {}))
    return out.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def picture_html(visitor: Visitor) -> str:
    """The current picture under a canvas of its size to paint on; a small one in large pixels, a whole number each."""
    if visitor.canvas is None:
        return f'<div class="empty" data-key="{visitor.key}">Open a picture to begin: click here, or drop one</div>'
    image, paint = visitor.view(), ""
    if visitor.paint is not None:
        mask = Image.new("RGBA", image.size, OUTLINE)
        mask.putalpha(visitor.paint)
        paint = data_url(mask)
    width, height = shape(visitor)
    times, before = max(1, SHOWN // max(image.size)), ""
    if (at := visitor.canvas.before()) is not None:
        parent = visitor.canvas.states[at].image
        before = f'<img class="before" src="{data_url(parent)}" draggable="false" alt="the picture before">'
    pixels = "pixels" if times > 1 else ""
    links = "".join(f'<a id="save-{x}" href="save/{visitor.key}/{x}" download>Save {x}</a>' for x in SAVES)
    compare = (
        '<label class="compare">After <input type="range" min="0" max="100" value="0" data-compare '
        'aria-label="compare with the picture before"> before</label>'
    )
    return (
        f'<div class="board {pixels}" style="width:{times * image.width}px;aspect-ratio:{width}/{height}" '
        f'data-made="{time.time_ns()}" data-paint="{paint}">'
        f'<img class="now" src="{data_url(image)}" draggable="false" alt="the picture">{before}'
        f'<canvas width="{image.width}" height="{image.height}"></canvas>{places_html(visitor)}</div>'
        f'{compare if before else ""}<div class="saves" data-key="{visitor.key}">{links}</div>'
    )


def places_html(visitor: Visitor) -> str:
    """The places that are proposed for the inset, over the picture: a click inserts it there, what hovers shows it."""
    canvas, plan = visitor.opened(), visitor.inserting.places(visitor.opened().state)
    if plan is None:
        return ""
    (width, height), parts = canvas.state.image.size, []
    for i in sorted(range(len(plan.boxes)), key=lambda i: -plan.boxes[i][2] * plan.boxes[i][3]):  # small ones on top
        x, y, w, h = plan.boxes[i]
        at = f"left:{x / width:.2%};top:{y / height:.2%};width:{w / width:.2%};height:{h / height:.2%}"
        told = escape(f"place {i + 1}: {plan.instruction(i)}")
        parts.append(
            f'<button class="place" data-place="{i}" style="{at};--number:{i}" title="{told}" aria-label="{told}">'
            f"<b>{i + 1}</b></button>"
        )
    inset = data_url(visitor.inserting.cut_out())
    return f'<div class="places" style="--inset:url({inset})">{"".join(parts)}</div>'


def inset_html(visitor: Visitor) -> str:
    """The inset that is here, cut out by its mask."""
    if visitor.inserting.inset is None:
        return '<p class="none">Drop a picture of an object here</p>'
    return f'<img src="{data_url(visitor.inserting.cut_out())}" alt="the inset">'


def shape(visitor: Visitor) -> tuple[int, int]:
    """Width and height of what the board shows, in the proportion of the photo, which a working picture lacks a bit."""
    if visitor.photo is None:
        return visitor.opened().state.image.size
    box = visitor.photo.box
    return box[2] - box[0], box[3] - box[1]


def tree_html(canvas: Canvas | None) -> str:
    """The tree of edits, a column for each depth: a state's first edit stays in its row, a branch opens another."""
    if canvas is None:
        return ""
    children = {i: [] for i in range(len(canvas.states))}
    tried = defaultdict(set)  # scales, by what else they are tried on
    for i, state in enumerate(canvas.states[1:], 1):
        children[state.parent].append(i)
        tried[state.parent, state.instruction].add(scales(state))
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
        hidden = "" if state.shown or state.shown is None else "(hidden) "
        several = len(tried[parent, state.instruction]) > 1
        told = " <i>text {:g}, image {:g}</i>".format(*scales(state)) if several else ""
        parts.append(
            f'<button class="state{" here" if i == canvas.at else ""}" data-state="{i}" title="{escape(about)}" '
            f'style="grid-area:{row[i]}/{column[i]}"><img src="{data_url(enlarge(state.image, THUMB))}" alt="">'
            f"<span><b>{i}</b> {hidden}{escape(state.instruction or 'start')}{told}</span></button>"
        )
    return f'<div class="tree">{"".join(parts)}</div>'


def scales(state: State) -> tuple:
    return tuple(state.settings.get(name) for name in TIMES)
