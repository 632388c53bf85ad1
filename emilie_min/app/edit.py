"""`emilie edit`: a picture, edited by one instruction after another, each anywhere or in a mask."""

import argparse
import glob
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path

from ..canvas.settings import CHOICES, OWN, Settings
from ..errors import CanvasError, InstructionError, MaskError, note, printable, say
from . import language
from .options import add_model_options, add_path_options, edit_with_bar, load_editor, tell_foreign, writable

LONGEST_NAME, LONGEST_STEM = 225, 180  # bytes: of 255, what the endings and a half-written file's name leave

AUTO = "auto"  # in the place of a mask
LITTLE = 0.005  # of the picture or the mask: an edit that changed less is told how to be stronger

HELP = {  # of the fields of Settings that are options
    "soft": "keep the masks' greys instead of thresholding them",
    "gate": "what a mask does (default: anchor)",
    "keep_background": "outside a mask keep the pixels, to the bit",
    "rescale": "how the factor f is found (default: paper)",
    "iterate": "what the next edit starts from",
    "steps": "sampling steps; more is slower and finer",
    "sampler": "dpmpp_2m*: for few steps",
    "guidance_interval": "guide only between these noise levels (sigmas)",
    "reuse": "run the deep layers at every N-th step only",
    "reuse_guidance": "after this part of the steps, 0 to 1, find guidance anew at some only",
    "text_scale": "how strongly to follow the instruction",
    "image_scale": "how closely to stay with the picture",
    "seed": "of all noise (default: 0, or what the --canvas began with)",
    "negative": "what not to do: an instruction whose pull is taken off the others'; gentler: --further",
    "further": "instructions that pull too, by these parts of the text scale, which may be negative",
}
METAVARS = {"guidance_interval": "LOW,HIGH", "reuse": "N", "reuse_guidance": "PART"}
METAVARS |= {"negative": "INSTRUCTION", "further": "WEIGHT:INSTRUCTION[;...]"}
READ = {  # what an option's text becomes, by the field's type
    int: int,
    int | None: int,
    float | None: float,
    tuple[float, float] | None: lambda text: tuple(text.split(",")),
    tuple[tuple[str, float], ...]: lambda text: [part.strip().split(":", 1)[::-1] for part in text.split(";")],
}


def add_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "input", metavar="IMAGE", help="the picture; may be left out with a --canvas that exists, and with --batch"
    )
    sub.add_argument("instructions", metavar="INSTRUCTION", nargs="*", help="what to change; several are done in turn")
    sub.add_argument("--mask", action="append", default=[], metavar="N=FILE",
                     help="edit N only where FILE is white; FILE auto: where the instruction would act")  # fmt: skip
    sub.add_argument("--box", action="append", default=[], metavar="N=X0,Y0,X1,Y1", help="edit N only in this box, px")
    sub.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="N=WHERE:INSTRUCTION",
        help="do this too in edit N, in the same pass; WHERE: a mask's FILE or X0,Y0,X1,Y1. What edit N itself says "
        "then holds in its own mask or, without one, everywhere else",
    )
    sub.add_argument("--own", action="append", default=[], metavar="N.R=NAME=VALUE[;...]",
                     help=f"of edit N's R-th instruction alone, 2 the first --also: {', '.join(OWN)}")  # fmt: skip
    add_settings(sub)
    sub.add_argument("--resolution", type=resolution, help='longer side to work at, in px, or "native"')
    sub.add_argument("--working-size", action="store_true", help="write pictures as they are worked on, cropped to fit")
    sub.add_argument("--crop", action="store_true", help="edit in a crop round the mask, at full resolution")
    sub.add_argument("--crop-box", metavar="X0,Y0,X1,Y1", help="the crop itself, px (default: the mask and a margin)")
    sub.add_argument("--mask-invert", action="store_true", help="the masks' files are black where to edit")
    sub.add_argument("--canvas", type=Path, metavar="FILE", help="keep the session here; goes on with one that exists")
    sub.add_argument("--batch", metavar="WHERE", help="all pictures of a folder or quoted pattern; goes on if killed")
    sub.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the pictures")
    add_model_options(sub, find=True)
    add_path_options(sub)


def add_settings(sub: argparse.ArgumentParser) -> None:
    """The fields of `Settings` as options; `settings` reads them."""
    for field in fields(Settings):  # which checks the values
        if field.name in HELP:
            given = dict(help=HELP[field.name], default=field.default)
            if field.type is bool:
                given |= dict(action="store_true")
            else:
                given |= dict(type=READ.get(field.type), choices=CHOICES.get(field.name))
                given |= dict(metavar=METAVARS.get(field.name))
            sub.add_argument("--" + field.name.replace("_", "-"), **given)


def settings(args: argparse.Namespace) -> dict:
    """The fields of `Settings` that the options give, once they are known to be such. Raises SamplingError."""
    changes = {name: getattr(args, name) for name in HELP}
    Settings(**changes)  # what no edit can use is told before anything is loaded
    return changes


def resolution(text: str) -> int | str:
    return text if text == "native" else int(text)


def run(args: argparse.Namespace) -> None:
    from ..canvas import about, images
    from ..canvas.canvas import open as open_canvas
    from ..canvas.photo import open_photo
    from ..canvas.session import start
    from ..canvas.strip import strip

    changes = settings(args)
    going_on = goes_on(args)
    if going_on and not os.path.exists(args.input) and not language.looks_like_a_file(args.input):
        args.input, args.instructions = None, [args.input, *args.instructions]
    if not args.instructions:
        raise InstructionError('no instruction: say what to change, as in `emilie edit photo.png "make it winter"`')
    if not all(text.strip() for text in args.instructions):
        raise InstructionError("an instruction is empty: say what to change")
    language.check(args.instructions)
    edits = read_edits(args, args.instructions)
    original = images.read_image(args.input) if args.input is not None else None

    editor = load_editor(args)
    if going_on:
        canvas = open_canvas(args.canvas, editor)
    elif args.working_size:
        canvas = open_canvas(original, editor, args.seed or 0, args.resolution)
    else:
        canvas = open_photo(original, editor, args.seed or 0, args.resolution).canvas
    photo = None if original is None else photo_of(original, canvas, args.canvas, args.input)
    target = canvas if photo is None or args.working_size else photo
    if args.mask_invert:
        edits = [[(t, inverted(mask, canvas, args.soft), *own) for t, mask, *own in regions] for regions in edits]
    crop = read_box(args.crop_box, "--crop-box") if args.crop_box else None
    args.crop = args.crop or crop is not None
    if args.crop and target is not photo:
        raise CanvasError("--crop needs the picture as first argument, and no --working-size")
    if args.crop and not any(mask is not None for regions in edits for _, mask, *_ in regions):
        raise MaskError("--crop needs a --mask or --box: the crop is made round it")
    for regions in edits:  # so that the last edit's mask does not fail after an hour of edits
        check_edit(photo if target is photo else None, canvas, regions, args.soft, args.crop)
    if args.canvas is not None:
        writable(args.canvas.parent, "--canvas")
    folder = writable(args.out)
    if original is None:
        note(
            f"pictures are written at {canvas.image.width}x{canvas.image.height} px: name the picture for its own size"
        )
    if args.crop:
        edits[0] = with_places(edits[0], target, canvas)
    if args.crop and (told := aim(photo, edits[0], args.soft, crop)):
        say(f"1. {told}")
        canvas = photo.canvas
    tell_foreign(editor, canvas.states[0].image, str(args.input or args.canvas))

    stem = Path(args.input).stem if args.input is not None else args.canvas.name.removesuffix(".safetensors")
    stem = stem.removesuffix(".canvas") if args.input is None else stem
    first = len(canvas.states)
    begin = partial(start, canvas)
    with (
        claimed(folder, stem, range(first, first + len(edits)), going_on, args.canvas, begin) as (name, session),
        gone_without_edits(None if going_on else session, canvas),
    ):
        cells = [(canvas.image, "input" if canvas.at == 0 else canvas.state.instruction, None)]
        for i, regions in enumerate(edits, 1):
            regions = with_places(regions, target, canvas)
            if args.crop and i > 1 and (told := aim(photo, regions, args.soft, crop)):
                say(f"{i}. {told}")
                if photo.canvas is not canvas:
                    canvas, session = photo.canvas, another_session(session, photo.canvas)
            masked = all(mask is not None for _, mask, *_ in regions)
            before, started = canvas.image, time.time()
            out = edit_with_bar(target, i, regions, **changes | {"keep_background": args.keep_background and masked})
            cells.append((canvas.image, canvas.state.instruction, canvas.state.mask))
            earlier = [] if photo is None else photo.canvases[:-1]
            path = images.save(out, folder / f"{name}_{first + i - 1}.png", about.texts(canvas, earlier))
            canvas.save(session)
            say(f"wrote {path} and {session}")
            say(f"  {time.time() - started:.1f} s; {what_changed(before, canvas)}")
        strip_name = f"{name}_{first + len(edits) - 1}_strip.png" if going_on else f"{name}_strip.png"
        say(f"wrote {images.save(strip(cells), folder / strip_name)}")


def goes_on(args: argparse.Namespace) -> bool:
    """Whether --canvas names a session that is there. Raises CanvasError."""
    from ..canvas.session import is_session

    if args.canvas is None or not os.path.exists(args.canvas):
        return False
    if not is_session(args.canvas):
        raise CanvasError(f"{args.canvas} is there and no canvas: name another file with --canvas")
    if args.resolution is not None:
        raise CanvasError("--resolution belongs to the start of a session, and --canvas goes on with one")
    return True


def photo_of(original, canvas, session: Path | None, name: object):
    """The picture of a canvas at its own size, as a `Photo`. Raises CanvasError."""
    from ..canvas.photo import Photo

    try:
        return Photo(original, canvas)
    except CanvasError as error:
        raise CanvasError(f"{session} is a session on another picture than {name}") from error


def check_edit(photo, canvas, regions: list[tuple], soft: bool, crop: bool) -> None:
    """Whether an edit's masks and words can be used, in a crop or on the canvas; a mask that is small is told of.

    photo: None where pictures are written as they are worked on. Raises MaskError, InstructionError.
    """
    from ..canvas.photo import is_small

    masks = [mask for _, mask, *_ in regions]
    canvas.editor.text.tokenize([text for text, *_ in regions])
    if AUTO in masks:
        return
    given = None if photo is None else photo.read_given(masks, soft)
    if crop and given is not None:  # what vanishes is told at the crop's size
        return
    canvas.read_regions(masks, soft)
    if given is not None and not canvas.native and is_small(given.getbbox(), given.size, canvas.image.size):
        x0, y0, x1, y1 = given.getbbox()
        note(
            f"a mask of {x1 - x0}x{y1 - y0} px in a picture of {given.width}x{given.height} px is edited at "
            f"{canvas.image.width}x{canvas.image.height} px: --crop edits it at full resolution"
        )


def with_places(regions: list[tuple], target, canvas) -> list[tuple]:
    """An edit's regions, with the masks that it has to find by itself found, see `canvas.where`, and told."""
    from ..canvas import about, where

    placed = []
    for text, mask, *own in regions:
        if mask == AUTO:
            mask = where.mask(canvas, text)
            what = "all of the picture: no mask" if mask is None else f"{about.share(mask):.0%} of the picture"
            say(f'"{text}" acts on {what}')
            if mask is not None and target is not canvas:
                mask = target.at_own_size(mask)
        placed.append((text, mask, *own))
    return placed


def aim(photo, regions: list[tuple], soft: bool, crop: tuple | None) -> str:
    """`Photo.aim` for an edit's masks; an edit of everything is back on the whole picture."""
    masks = [mask for _, mask, *_ in regions]
    return photo.aim(None if None in masks else masks, soft, box=None if None in masks else crop)


def another_session(session: Path, canvas) -> Path:
    """A session's file beside another one, for a canvas on another part of the picture. Raises CanvasError."""
    from ..canvas.session import start

    stem, count = session.name.removesuffix(".canvas"), 2
    while not start(canvas, path := fits(session.with_name(f"{stem}-part{count}.canvas"))):
        count += 1
    return path


def inverted(mask, canvas, soft: bool):
    """A mask's opposite, at the size at which it was given; None stays."""
    from PIL import ImageChops

    if mask is None or mask == AUTO:
        return mask
    given = canvas.read_given(mask, soft)
    return ImageChops.invert(given if soft else given.point(lambda v: 255 if v >= 128 else 0))


def what_changed(before, canvas) -> str:
    """How much of the picture, or of the mask, the last edit changed, and what to do where that is next to nothing."""
    from ..canvas.photo import changed

    mask = canvas.state.mask
    share, of = changed(before, canvas.image, mask), "the picture" if mask is None else "the mask"
    told = f"this edit changed {share:.1%} of {of}"
    return told + (": raise --text-scale or lower --image-scale" if share < LITTLE else "")


def read_edits(args: argparse.Namespace, texts: list[str]) -> list[list[tuple]]:
    """The instructions, --mask N=FILE, --box N=X0,Y0,X1,Y1 and --also -> of each edit its (instruction, mask) pairs.

    With --own a third part, see `Canvas.edit`. Raises MaskError, InstructionError, SamplingError.
    """
    masks, also = {}, {n: [] for n in range(1, len(texts) + 1)}
    examples = {"--mask": "2=mask.png", "--box": "2=10,10,200,200", "--also": '"2=mask.png:make it blue"'}
    for option, values in (("--mask", args.mask), ("--box", args.box), ("--also", args.also)):
        for value in values:
            given = f"{option} {printable(value, 80)}"
            if option == "--mask" and value == AUTO:
                masks |= {n: AUTO for n in also if n not in masks}
                continue
            text, _, what = value.partition("=")
            number = count(text)
            if number is None or not what:
                raise MaskError(f"{given}: say which edit it is for, as in {option} {examples[option]}")
            if number not in also:
                raise MaskError(f"{given}: there is no edit {text}, only 1 to {len(also)}")
            if option == "--also":
                where, text = place_and_text(what)
                if not where or not text.strip():
                    raise InstructionError(f"{given}: say where and what, as in {option} {examples[option]}")
                is_box = set(where) <= set("0123456789,- ")
                also[number].append((text.strip(), read_box(where, given) if is_box else where))
                continue
            if number in masks:
                raise MaskError(f"{given}: edit {text} has a mask already")
            masks[number] = read_box(what, given) if option == "--box" else what
    if args.keep_background and not masks:
        raise MaskError("--keep-background needs a --mask or --box: without one there is no background")
    edits: list[list[tuple]] = [[(text, masks.get(n)), *also[n]] for n, text in enumerate(texts, 1)]
    for value in args.own:
        number, _, what = value.partition("=")
        given = f"--own {printable(value, 80)}"
        n, r = (count(part) for part in number.partition(".")[::2])
        if n is None or r is None or "=" not in what:
            raise InstructionError(f'{given}: say whose and what, as in --own "2.1=text_scale=1.2;seed=3"')
        if not (1 <= n <= len(edits) and 1 <= r <= len(edits[n - 1])):
            raise InstructionError(f"{given}: there is no instruction {r} of an edit {n}")
        edits[n - 1][r - 1] = (*edits[n - 1][r - 1][:2], read_own(what))
    return edits


def count(text: str) -> int | None:
    """A number in decimals; None: it is none, or longer than any that something is counted by."""
    return int(text) if text.isdecimal() and len(text) < 19 else None


def read_own(text: str) -> dict:
    """NAME=VALUE[;...], of what a region sets for itself. Raises InstructionError, SamplingError."""
    from ..canvas.regions import own_settings

    pairs = [(name.strip(), value.strip()) for name, _, value in (part.partition("=") for part in text.split(";"))]
    return own_settings({n: as_written(v) if n == "seed" else v for n, v in pairs})


def as_written(text: str) -> int | str:
    """A whole number that is written out; what is none stays a text, for its own check to refuse."""
    return int(text) if re.fullmatch(r"\s*[+-]?\d{1,100}\s*", text) else text


def place_and_text(what: str) -> tuple[str, str]:
    """Of WHERE:INSTRUCTION, the file up to the last colon that leaves one that exists, else up to the first colon.

    The colon behind a drive's letter is not taken for that one.
    """
    colons = [match.start() for match in re.finditer(":", what) if what[match.start() + 1 :].strip()]
    found = [at for at in colons if os.path.isfile(what[:at])]
    drive = re.match(r"[A-Za-z]:[\\/]", what) is not None
    rest = [at for at in colons if not (drive and at == 1)]
    at = found[-1] if found else rest[0] if rest else -1
    return (what[:at], what[at + 1 :]) if at >= 0 else (what, "")


def read_box(text: str, option: str) -> tuple[int, ...]:
    try:
        box = tuple(int(v) for v in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4:
        raise MaskError(f"{option}: a box is four whole numbers X0,Y0,X1,Y1")
    return box


@contextmanager
def claimed(
    folder: Path, stem: str, numbers: range, going_on: bool, canvas: Path | None, begin: Callable[[Path], bool]
) -> Iterator[tuple[str, Path]]:
    """A name for the files of this run and where its session goes, taken before anything is computed.

    `stem`, or `stem-2`, ...: the first of which no file is there, so that no run overwrites another, also none at the
    same time: each file is made, empty, by the run that gets it, and goes at the end if it is still empty. numbers: of
    the pictures; those of a session that goes on may stand beside its earlier ones. begin: makes the session's file,
    without edits, or says that one is there. Raises CanvasError.
    """
    while len(os.fsencode(stem)) > LONGEST_STEM:
        stem = stem[:-1]
    for name in numbered(stem):
        session = canvas or folder / f"{name}.canvas"
        strip = folder / (f"{name}_{numbers[-1]}_strip.png" if going_on else f"{name}_strip.png")
        paths = [folder / f"{name}_{number}.png" for number in numbers] + [strip]
        taken = not going_on and any(folder.glob(f"{glob.escape(name)}_[0-9]*.png"))
        made = [] if taken else make_new(paths)
        try:
            if made and (going_on or begin(fits(session))):
                yield name, session
                return
        finally:
            drop_empty(made)
        if made and canvas:
            raise CanvasError(f"{canvas} was made by another run meanwhile: name another file with --canvas")


@contextmanager
def gone_without_edits(session: Path | None, canvas) -> Iterator[None]:
    """A session's file goes where not even the first edit was made."""
    try:
        yield
    finally:
        if session is not None and len(canvas.states) == 1:
            session.unlink(missing_ok=True)


@contextmanager
def picture_of_its_own(folder: Path, stem: str, end: str = "") -> Iterator[Path]:
    """A name for a picture that no other file has, as `claimed` finds one; the file goes if nothing is written."""
    path = next(path for name in numbered(stem) if make_new([path := folder / f"{name}{end}.png"]))
    try:
        yield path
    finally:
        drop_empty([path])


def numbered(stem: str) -> Iterator[str]:
    """Names to try: `stem`, `stem-2`, ..."""
    return itertools.chain([stem], (f"{stem}-{count}" for count in itertools.count(2)))


def drop_empty(paths: list[Path]) -> None:
    """Of the files that were made for their names, those to which nothing was written."""
    for path in paths:
        if path.exists() and not path.stat().st_size:
            path.unlink()


def make_new(paths: list[Path]) -> list[Path]:
    """Empty files at all of these paths; at none, and [], where one is there already. Raises CanvasError."""
    made: list[Path] = []
    for path in paths:
        try:
            fits(path).open("xb").close()
        except OSError as error:
            for each in made:
                each.unlink()
            if isinstance(error, FileExistsError):
                return []
            raise CanvasError(f"cannot write {printable(path)}: {error.strerror}") from error
        made.append(path)
    return made


def fits(path: Path) -> Path:
    """A path whose last name is short enough for a file. Raises CanvasError."""
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise CanvasError(f"the name {printable(path.name, 60)} is too long for a file: choose a shorter one")
    return path
