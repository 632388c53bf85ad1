"""Object insertion (Sec. 6.1): GracoNet proposes where, BLIP-2 says what, EMILIE draws it there.

What the paper leaves open, and what is done here: the caption becomes an instruction by a format string (`FORMATS`);
the edit's mask is GracoNet's box with a rim, not the inset's outline in it, since what is drawn is a new object with
an outline of its own; of several proposals the first is taken unless another is named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import torch
from PIL import Image, ImageDraw, ImageFilter

from ..canvas import images
from ..canvas.canvas import SAMPLERS, Canvas
from ..canvas.insets import Inset, read_inset
from ..canvas.photo import Photo
from ..canvas.pictures import Picture
from ..canvas.regions import Asked
from ..canvas.settings import Settings, as_int, as_part, whole
from ..canvas.state import State
from ..canvas.strip import INK, OUTLINE, PAPER, enlarge
from ..emilie import Editor
from ..errors import CanvasError, InstructionError, explain_oom, note, quote
from ..loading import shipped
from ..sampling import Step, get_sigmas, noise_stream
from ..toy import judge, world
from . import graconet
from .caption import RELEASED, Captioner
from .graconet import Box

FORMATS = ("add {caption}", "add {caption} at the {place}")  # for any model; for the small one, which was taught places
MOST = 64  # proposals
KEEP = 0.25  # of the steps, see `Plan.keep_steps`
ASK = "say where yourself: --at X0,Y0,X1,Y1, or on the studio's page paint there"
RIM = 0.15  # of a box's longer side, added all around it


@dataclass(frozen=True)
class Plan:
    """An insertion before it is made: what, and where it could go. boxes: in pixels of the working picture.

    photo: what the canvas works on, if that is more than a canvas; pictures of the plan then have its size.
    """

    canvas: Canvas
    inset: Inset
    caption: str
    boxes: Sequence[Box]
    format: str
    photo: Photo | None = None

    def instruction(self, take: int = 0) -> str:
        """What the editor is told of a proposal."""
        return self.format.format(caption=self.caption, place=place_of(self.boxes[take], self.canvas.image.size))

    def mask(self, take: int = 0) -> Image.Image:
        """Where the editor may draw: a proposal's box and a rim, at working size."""
        x, y, w, h = self.boxes[take]
        rim = round(RIM * max(w, h))
        out = Image.new("L", self.canvas.image.size)
        out.paste(255, (max(0, x - rim), max(0, y - rim), min(out.width, x + w + rim), min(out.height, y + h + rim)))
        return out

    @property
    def image(self) -> Image.Image:
        """The picture that is inserted into, the photo at its own size or the working picture."""
        return self.canvas.image if self.photo is None else self.photo.image

    def own_box(self, take: int = 0) -> Box:
        """A proposal in pixels of `image`."""
        if self.photo is None:
            return self.boxes[take]
        (left, top, right, bottom), (x, y, w, h) = self.photo.box, self.boxes[take]
        width, height = self.canvas.image.size
        kx, ky = (right - left) / width, (bottom - top) / height
        x0, y0, x1, y1 = (round(v) for v in (left + x * kx, top + y * ky, left + (x + w) * kx, top + (y + h) * ky))
        return x0, y0, max(1, x1 - x0), max(1, y1 - y0)

    def pasted(self, take: int = 0) -> Image.Image:
        """What GracoNet alone does: the inset itself, put into `image`."""
        return graconet.paste(self.image, self.inset.pixels, self.inset.mask, self.own_box(take))

    def outlined(self, take: int | None = None, height: int | None = None) -> Image.Image:
        """`image` with numbered outlines of its proposals, the taken one's pink.

        At `height` px; None: at its own size, or a small one enlarged in whole steps.
        """
        image = self.image
        out = enlarge(image, height or max(256, image.height))
        draw, k, line = ImageDraw.Draw(out), out.height / image.height, max(2, max(out.size) // 200)
        for i in sorted(range(len(self.boxes)), key=lambda i: i == take):
            x, y, w, h = (round(v * k) for v in self.own_box(i))
            colour, one = OUTLINE if take in (None, i) else PAPER, line // 2
            draw.rectangle((x, y, x + w - 1, y + h - 1), outline=INK, width=line + one)
            draw.rectangle((x + one, y + one, x + w - 1 - one, y + h - 1 - one), outline=colour, width=line)
            at, size = (x + 2 * line + 7 * line * i, y + line), 7 * line
            draw.text(at, str(i + 1), fill=colour, font_size=size, stroke_width=one, stroke_fill="black")
        return out

    def check(self, take: int) -> None:
        number = whole(take)
        if number is None or not 0 <= number < len(self.boxes):
            asked = quote(take if number is None else number + 1)
            raise CanvasError(f"there is no proposal {asked}, only 1 to {len(self.boxes)}")

    def steps(self, take: int = 0, **changes) -> Iterator[Step]:
        """The edit of a proposal, step by step, see `Canvas.steps`; what is given is checked at once."""
        self.check(take)
        return self._steps(take, self.canvas.steps(self.instruction(take), self.mask(take), **changes))

    def keep_steps(self, take: int = 0, level: float = KEEP, **changes) -> Iterator[Step]:
        """The object itself: the plain paste, redrawn from a low noise level on, so that light and edges fit.

        level: the part of the steps that are done, 0 to 1. The model sees the picture without the object and is told to
        add it; what it starts from is the paste under that much noise; and the anchor gate holds all but the object and
        a rim of a latent's cell. The higher the level, the more of the object is the model's: in the small world no
        level both keeps a colour that no word says and fits another style (weights/README.md). Raises SamplingError.
        """
        self.check(take)
        canvas, level = self.canvas, as_part(level, "keep")
        settings = Settings(**changes).resolve(canvas.editor.config.sampling, canvas.seed)
        editor, parent, at, text = canvas.editor, canvas.state, canvas.at, self.instruction(take)
        editor.text.tokenize([text])
        depth, factor = canvas.depth, editor.vae.factor
        placed = graconet.placed(self.inset.mask, self.boxes[take], canvas.image.size)
        pixels = placed.point(lambda v: 255 if v else 0).filter(ImageFilter.MaxFilter(2 * factor + 1))
        mask = (images.latent_mask(pixels, factor, soft=True) > 0).float()
        asked = Asked([text], [pixels], [{}], torch.ones(1, *mask.shape), mask)
        first = settings.steps - max(1, round(level * settings.steps))
        sigmas = get_sigmas(settings.steps, editor.alphas_cumprod)[first:]
        with explain_oom(f"at {parent.image.width}x{parent.image.height} px: lower --resolution"):
            z_img, f = canvas.image_latent(settings.rescale, settings.iterate)
            pasted = graconet.paste(parent.image, self.inset.pixels, self.inset.mask, self.boxes[take])
            start = editor.scale_factor * images.to_latent(editor, pasted).cpu()
            for step in editor.steps(
                canvas.denoiser(z_img, asked, settings),
                sigmas,
                canvas.z_init + start / sigmas[0],
                noise_stream(tuple(canvas.z_init.shape), settings.seed, "edit", depth),
                parent.latent,
                mask,
                settings.gate,
                SAMPLERS[settings.sampler],
            ):
                yield step
            latent = step.x.cpu()
            image = images.from_latent(editor, latent)
        if settings.keep_background:
            latent = torch.where(mask == 0, parent.latent, latent)
            image = images.paste_back(image, parent.image, pixels, feather=factor // 2)
        canvas.states.append(State(text, latent, image, at, pixels, settings.record(), f, depth=depth))
        canvas.at, canvas.redo_stack = len(canvas.states) - 1, []
        self.record(take, kept=level)

    def record(self, take: int, **more) -> None:
        """Note with the current state what was inserted, and where in the photo."""
        boxes, state = [list(box) for box in self.boxes], self.canvas.state
        state.inserted = {"caption": self.caption, "boxes": boxes, "taken": take} | more
        if self.photo is not None and state.mask is not None:
            state.given = images.union([self.photo.at_own_size(state.mask)], self.photo.photo.size)

    def _steps(self, take: int, steps: Iterator[Step]) -> Iterator[Step]:
        yield from steps
        self.record(take)


def plan(
    canvas: Canvas | Photo,
    inset: Picture | Inset,
    mask: Picture | None = None,
    at: images.Mask | None = None,
    proposals: int = 4,
    caption: str | None = None,
    seed: int | None = None,
    format: str | None = None,
    proposer: graconet.GracoNet | None = None,
    captioner: Captioner | None = None,
) -> Plan:
    """Where an inset could go in a canvas's or a photo's picture, and what it shows.

    at: a box (x0, y0, x1, y1) in pixels of the opened picture, or a mask, to decide that oneself. caption: likewise.
    seed: of the proposals, None = the canvas's. format: with {caption} and, if it likes, {place}, see `FORMATS`; None =
    by the model. proposer: anything with GracoNet's `propose`; None, as for the captioner: the small model's, where the
    editor is the small one, and else an error. Raises EmilieError.
    """
    photo = canvas if isinstance(canvas, Photo) else None
    canvas = canvas.canvas if isinstance(canvas, Photo) else canvas
    editor = canvas.editor
    inset = inset if isinstance(inset, Inset) else read_inset(inset, mask)
    if inset.size[0] > canvas.original_size[0] or inset.size[1] > canvas.original_size[1]:
        size = f"{inset.size[0]}x{inset.size[1]} px"
        note(f"the inset of {size} is larger than the picture: it is scaled down to the place that it gets")
    if proposer is not None and not callable(getattr(proposer, "propose", None)):
        raise CanvasError(f"a proposer is what graconet.load gives, not {quote(proposer)}")
    if captioner is not None and not callable(captioner):
        raise InstructionError(f"a captioner gives a picture's caption, and {quote(captioner)} cannot be called")
    boxes = [box_at(canvas, at)] if at is not None else propose(canvas, inset, proposals, seed, proposer)
    if caption is None:
        captioner = load_captioner(editor) if captioner is None else captioner
        caption = captioner(inset.seen)
    if not isinstance(caption, str):
        raise InstructionError(f"the caption is a text, not {quote(caption)}")
    if not caption.strip():
        raise InstructionError("the caption is empty: say what the inset shows, as in --caption 'a red kite'")
    format = FORMATS[small_world(editor)] if format is None else format
    try:
        fields = [field for _, *field in Formatter().parse(format) if field[0] is not None]
    except (TypeError, ValueError):
        fields = [[None]]
    known = ["caption", "", None], ["place", "", None]
    if known[0] not in fields or not all(field in known for field in fields):
        raise InstructionError(
            f"the format {quote(format)} is not one with {{caption}} and {{place}}, as in {FORMATS[1]!r}"
        )
    return Plan(canvas, inset, " ".join(caption.split()), boxes, format, photo)


def insert(canvas: Canvas | Photo, inset: Picture, take: int = 0, keep: float | None = None, **options) -> Image.Image:
    """Draw what an inset shows at a place that suits it, as an edit like any other, and return the picture.

    options: of `plan`, and fields of `Settings`; take: which proposal, from 0; keep: see `Plan.keep_steps`, None: what
    is drawn is a new object. An insertion that fails changes nothing.
    Raises EmilieError.
    """
    known = set(plan.__annotations__)
    planned = plan(canvas, inset, **{name: value for name, value in options.items() if name in known})
    changes = {name: value for name, value in options.items() if name not in known - {"seed"}}
    for _ in planned.steps(take, **changes) if keep is None else planned.keep_steps(take, keep, **changes):
        pass
    return canvas.image


# ---- where


def small_world(editor: Editor) -> bool:
    return editor.text.config.words is not None and editor.config.sampling.resolution == world.SIZE


def load_proposer(editor: Editor, path: str | Path | None = None) -> graconet.GracoNet:
    """GracoNet from a file, None: the small model's, for the small editor only. Raises CheckpointError, CanvasError."""
    if path is None and not small_world(editor):
        raise CanvasError("where to? Name GracoNet's file with --graconet, or a box with --at X0,Y0,X1,Y1")
    return graconet.load(shipped("toy-graconet.safetensors") if path is None else path, editor.device)


def load_captioner(editor: Editor, model: str | Path | None = None) -> Captioner:
    """BLIP-2 from a folder or the hub's cache, None: the small model's for the small editor, else the released one."""
    small = shipped("toy-blip2/config.json").parent if small_world(editor) else RELEASED
    return Captioner(small if model is None else model, editor.device)


def propose(
    canvas: Canvas, inset: Inset, n: int, seed: int | None = None, proposer: graconet.GracoNet | None = None
) -> list[Box]:
    """Boxes for an inset in a canvas's picture, in its working pixels.

    Boxes that are too small for a latent's cells are left out, which is told. Raises CanvasError where no place is
    left: all boxes are too small or, in the small world, where that can be known, every one lies on an object.
    """
    number, n = n, whole(n) or 0
    if not 1 <= n <= MOST:
        raise CanvasError(f"the number of proposals is from 1 to {MOST}, not {quote(number)}")
    proposer = load_proposer(canvas.editor) if proposer is None else proposer
    picture, seed = canvas.image, canvas.seed if seed is None else as_int(seed, "seed")
    boxes = [inside(box, picture.size) for box in proposer.propose(picture, inset.seen, inset.mask, n, seed)]
    factor = canvas.editor.vae.factor
    large = [box for box in boxes if min(box[2:]) >= factor]
    if len(large) < n:
        note(f"{n - len(large)} of {n} proposals are smaller than {factor}x{factor} px and are left out")
    if not large:
        raise CanvasError(f"no free place: every proposal is too small to draw in; {ASK}")
    if small_world(canvas.editor) and picture.size == (world.SIZE, world.SIZE):
        objects = judge.read(picture).scene.objects
        if all(any(covers(box, o) for o in objects) for box in large):
            raise CanvasError(f"no free place: every proposal lies on an object; {ASK}")
    return large


def inside(box: Box, size: tuple[int, int]) -> Box:
    """What of a box lies in a picture of (width, height), of no size where nothing does; what is cut off is told."""
    x, y, w, h = box
    x0, y0, x1, y1 = max(0, x), max(0, y), min(x + w, size[0]), min(y + h, size[1])
    out = x0, y0, max(0, x1 - x0), max(0, y1 - y0)
    if out != tuple(box):
        note(
            f"a proposal of {w}x{h} px at {x},{y} does not lie in the picture of {size[0]}x{size[1]} px and is cut off"
        )
    return out


def covers(box: Box, o: world.Object) -> bool:
    """Whether a box reaches to the middle third of an object of the small world."""
    y, x = world.PLACES[o.place]
    third, (left, top, w, h) = world.CELL // 3, box
    across = min(left + w, x + world.CELL - third) > max(left, x + third)
    return across and min(top + h, y + world.CELL - third) > max(top, y + third)


def box_at(canvas: Canvas, at: images.Mask) -> Box:
    """A box (x0, y0, x1, y1) in pixels of the opened picture, or a mask's, as one in the working picture's.

    Raises MaskError.
    """
    pixels, _ = canvas.read_mask(at)
    x0, y0, x1, y1 = pixels.getbbox()  # type: ignore[misc]  # an empty mask is refused
    return x0, y0, x1 - x0, y1 - y0


def place_of(box: Box, size: tuple[int, int]) -> str:
    """Which quarter of the picture a box's middle lies in, in words."""
    x, y, w, h = box
    return f"{'top' if 2 * y + h < size[1] else 'bottom'} {'left' if 2 * x + w < size[0] else 'right'}"
