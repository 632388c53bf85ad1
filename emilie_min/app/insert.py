"""`emilie insert`: a base and an object's picture in; proposals, plain paste and EMILIE's picture out (Fig. 8)."""

import argparse
from functools import partial
from pathlib import Path

from ..errors import BenchError, CanvasError, EmilieError, ImageError, MaskError, say
from .edit import add_settings, claimed, goes_on, gone_without_edits, photo_of, read_box, resolution, settings
from .options import add_model_options, add_path_options, load_editor, tell_foreign, with_bar, writable

GRID, HEIGHT = 40, 256  # rows of a grid at most; px that a strip's pictures are high


def add_options(sub: argparse.ArgumentParser) -> None:
    told = "the picture to insert into; or a benchmark's folder with insets, such as OPA's, for Fig. 8's grid of it"
    sub.add_argument("base", type=Path, metavar="BASE", help=told)
    sub.add_argument("inset", type=Path, nargs="?", metavar="INSET", help="a picture of the object, cut out or not")
    sub.add_argument("--inset-mask", type=Path, metavar="FILE", help="where the object is (default: INSET's alpha)")
    sub.add_argument("--at", metavar="X0,Y0,X1,Y1", help="where to, in pixels of BASE (default: GracoNet says)")
    sub.add_argument("--proposals", type=int, default=4, metavar="N", help="places to propose (default: 4)")
    sub.add_argument("--take", type=int, default=1, metavar="I", help="which of them to take, from 1 (default)")
    sub.add_argument("--caption", metavar="TEXT", help="what the object is (default: BLIP-2 says)")
    sub.add_argument("--format", metavar="TEXT", help='how a caption becomes an instruction (default: "add {caption}")')
    add_network_options(sub)
    told = "the object itself: redraw its paste in this last part of the steps alone, 0 to 1 (0.25 if not given); in "
    told += "the small world 0.1 keeps some of its colour but not the scene's style, 0.5 the other way round"
    sub.add_argument("--keep", type=float, nargs="?", const=0.25, metavar="PART", help=told)
    add_settings(sub)
    sub.add_argument("--resolution", type=resolution, help='longer side to work at, in px, or "native"')
    sub.add_argument("--canvas", type=Path, metavar="FILE", help="keep the session here; goes on with one that exists")
    sub.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the pictures")
    add_model_options(sub, find=True)
    add_path_options(sub)


def add_network_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--graconet", type=Path, metavar="FILE", help="GracoNet's 11.pth (default: the small model)")
    sub.add_argument("--blip2", metavar="MODEL", help="a folder, or a name in the hub's cache (default: the small one)")


def run(args: argparse.Namespace) -> None:
    from ..canvas import about, images
    from ..canvas.canvas import open as open_canvas
    from ..canvas.photo import open_photo
    from ..canvas.session import start
    from ..canvas.strip import strip
    from ..insert import insertion

    changes, at = settings(args), read_box(args.at, "--at") if args.at is not None else None
    if args.proposals < 1:
        raise CanvasError(f"--proposals {args.proposals}: one at least")
    if args.at is None and not 1 <= args.take <= args.proposals:
        raise CanvasError(f"--take {args.take}: there are proposals 1 to {args.proposals}")
    if args.base.is_dir():
        return over_benchmark(args, changes)
    if args.inset is None:
        raise ImageError("what to insert? Name a picture of it, as in `emilie insert base.jpg kite.png`")
    going_on = goes_on(args)
    original, inset = images.read_image(args.base), insertion.read_inset(args.inset, args.inset_mask)
    editor = load_editor(args)
    if going_on:
        photo = photo_of(original, open_canvas(args.canvas, editor), args.canvas, args.base)
    else:
        photo = open_photo(original, editor, args.seed or 0, args.resolution)
    canvas = photo.canvas
    tell_foreign(editor, canvas.states[0].image, str(args.base))
    folder = writable(args.out)
    if args.canvas is not None:
        writable(args.canvas.parent, "--canvas")
    proposer = insertion.load_proposer(editor, args.graconet) if at is None else None
    captioner = insertion.load_captioner(editor, args.blip2) if args.caption is None else None
    planned = insertion.plan(
        photo, inset, None, at, args.proposals, args.caption, args.seed, args.format, proposer, captioner
    )
    take = 0 if at is not None else args.take - 1
    if take >= len(planned.boxes):
        raise MaskError(f"--take {args.take}: only {len(planned.boxes)} proposals are large enough to draw in")
    del captioner  # whose memory the edit may need
    boxes = ", ".join(str(planned.own_box(i)) for i in range(len(planned.boxes)))
    say(f'the inset shows "{planned.caption}"; proposals {boxes} (x, y, w, h)')

    first = len(canvas.states)
    begin = partial(start, canvas)
    with (
        claimed(folder, args.base.stem, range(first, first + 1), going_on, args.canvas, begin) as (name, session),
        gone_without_edits(None if going_on else session, canvas),
    ):
        pictures = {"proposals": planned.outlined(take), "paste": planned.pasted(take)}
        told = "where: GracoNet's proposals" if at is None else "where: as it was said"
        columns = [(planned.outlined(take, HEIGHT), told, None)]
        columns.append((pictures["paste"], "the plain paste: GracoNet alone", None))
        draw(planned, take, args.keep, changes)
        stem, result = f"{name}_{canvas.at}", photo.image
        columns.append((result, f"EMILIE: {canvas.state.instruction}", None))
        for what, image in pictures.items():
            say(f"wrote {images.save(image, folder / f'{stem}_{what}.png')}")
        path = images.save(result, folder / f"{stem}.png", about.texts(canvas))
        canvas.save(session)
        say(f"wrote {path} and {session}")
        strip_name = f"{stem}_strip.png" if going_on else f"{name}_strip.png"
        say(f"wrote {images.save(strip(columns), folder / strip_name)}")


def over_benchmark(args: argparse.Namespace, changes: dict) -> None:
    """The same for every item of a benchmark that has an inset, where an earlier call left off; then their grid."""
    from PIL import Image

    from ..bench import data
    from ..canvas import images
    from ..canvas.canvas import open as open_canvas
    from ..canvas.strip import strip
    from ..insert import insertion

    given = [f"--{name.replace('_', '-')}" for name in ("at", "canvas", "inset_mask", "caption") if getattr(args, name)]
    if args.inset is not None or given:
        what = given[0] if given else "INSET"
        raise BenchError(f"{args.base} is a folder, whose items have insets of their own: leave out {what}")
    items = [item for item in data.read(args.base) if item.turns[0].inset is not None]
    if not items:
        raise BenchError(f"{args.base} has no item with an inset")
    editor, folder = load_editor(args), writable(args.out)
    proposer = insertion.load_proposer(editor, args.graconet)
    captioner = insertion.load_captioner(editor, args.blip2)
    rows = []
    for item in items:
        place = folder / f"{item.id}.png"
        if not place.exists():
            turn = item.turns[0]
            try:
                canvas = open_canvas(item.image, editor, args.seed or 0, args.resolution)
                given = (turn.inset, turn.inset_mask, None, args.proposals, None, args.seed, args.format)
                planned = insertion.plan(canvas, *given, proposer, captioner)
                columns = [(planned.outlined(args.take - 1, HEIGHT), f"{item.id}: proposals", None)]
                columns.append((planned.pasted(args.take - 1), f"pasted: {planned.caption}", None))
                draw(planned, args.take - 1, args.keep, changes)
            except EmilieError as error:
                say(f"{item.id} is left out: {error}")
                continue
            images.save(strip([*columns, (canvas.image, f"EMILIE: {canvas.state.instruction}", None)]), place)
            say(f"wrote {place}")
        if len(rows) < GRID:
            rows.append(images.read_image(place))
    if not rows:
        raise BenchError(f"of {args.base} no item could be done")
    grid = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        grid.paste(row, (0, top))
        top += row.height
    say(f"wrote {images.save(grid, folder / 'grid.png')}")


def draw(planned, take: int, keep: float | None, changes: dict) -> None:
    """The edit, with a bar of its steps."""
    steps = planned.steps(take, **changes) if keep is None else planned.keep_steps(take, keep, **changes)
    total = changes.get("steps") or planned.canvas.editor.config.sampling.steps
    with_bar(steps, total if keep is None else max(1, round(keep * total)), planned.instruction(take))
