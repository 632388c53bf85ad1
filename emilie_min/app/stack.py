"""`emilie stack`: a session's edits as a stack, of which any can be taken back, hidden, moved, weakened, changed."""

import argparse
from pathlib import Path

from ..errors import CanvasError, EmilieError, printable, quote, say
from .edit import add_settings, photo_of, picture_of_its_own, read_box, settings
from .options import add_model_options, add_path_options, load_editor, writable

CHANGES = {  # what each takes after the session's file, and what it does
    "retract": ("K", "take edit K out"),
    "hide": ("K", "take edit K out, but keep its place: `show` brings the same bits back"),
    "show": ("K", "put a hidden edit back"),
    "move": ("K TO", "make edit K the TO-th"),
    "strength": ("K S", "keep the part S, 0 to 1, of edit K"),
    "revise": ("K [INSTRUCTION]", "make edit K anew with another instruction, mask or settings"),
    "scrub": ("K PART [INSTRUCTION]", "the same in the last PART of its steps alone, 0 to 1"),
    "undo": ("", "go back to where the last change or edit began"),
}


def add_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("session", type=Path, metavar="SESSION", help="a file of `emilie edit --canvas`; a change goes in")
    how = "; ".join(f"{name} {takes}: {what}".replace(" :", ":") for name, (takes, what) in CHANGES.items())
    sub.add_argument("change", nargs="*", metavar="CHANGE", help=f"left out: list the edits. {how}")
    sub.add_argument("--mask", metavar="FILE", help="of `revise` and `scrub`: only where FILE is white")
    sub.add_argument("--box", metavar="X0,Y0,X1,Y1", help="of `revise` and `scrub`: only in this box, px")
    sub.add_argument("--everywhere", action="store_true", help="of `revise` and `scrub`: without the mask it had")
    add_settings(sub)
    sub.add_argument("--replay", action="store_true", help="make all later edits anew in full, not only where needed")
    sub.add_argument("--picture", metavar="IMAGE", help="what the session began with: the result at its own size")
    sub.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the picture")
    add_model_options(sub)
    add_path_options(sub)


def run(args: argparse.Namespace) -> None:
    from ..canvas import about, images
    from ..canvas.canvas import open as open_canvas
    from ..canvas.session import is_session

    name, *rest = args.change or [None]
    if name is not None and name not in CHANGES:
        raise CanvasError(f"no change {quote(name)}: choose from {', '.join(CHANGES)}")
    values, revised = numbers(name, rest), revision(args, name, rest)
    if not args.session.is_file() or not is_session(args.session):
        raise CanvasError(f"{printable(args.session)} is no session: `emilie edit --canvas` writes one")
    original = images.read_image(args.picture) if args.picture else None
    folder = writable(args.out) if name else None
    canvas = open_canvas(args.session, load_editor(args))
    shown = canvas if original is None else photo_of(original, canvas, args.session, args.picture)
    if name is None:
        say(told(canvas))
        return
    if name == "undo":
        canvas.undo()
    else:
        canvas.change(name, *values, way="replay" if args.replay else "support", **revised)
    canvas.save(args.session)
    calls = f"; {canvas.state.made['calls']} network calls" if name != "undo" else ""
    stem = args.session.name.removesuffix(".canvas").removesuffix(".safetensors")
    path = folder / f"{stem}_{canvas.at}.png"
    if name != "undo" or not path.exists():
        with picture_of_its_own(folder, stem, f"_{canvas.at}") as path:
            images.save(shown.image, path, about.texts(canvas))
    say(f"{told(canvas)}\nwrote {path} and {args.session}{calls}")


def numbers(name: str | None, rest: list[str]) -> list:
    """What a change takes, as numbers. Raises CanvasError."""
    takes = CHANGES[name][0] if name else ""
    kinds = [float if word in ("S", "PART") else int for word in takes.split() if not word.startswith("[")]
    if len(rest) > len(takes.split()) or len(rest) < len(kinds):
        raise CanvasError(f"write: emilie stack SESSION {name} {takes}".rstrip())
    try:
        return [kind(word) for kind, word in zip(kinds, rest)]
    except ValueError:
        raise CanvasError(f"write numbers: emilie stack SESSION {name} {takes}") from None


def revision(args: argparse.Namespace, name: str | None, rest: list[str]) -> dict:
    """What `revise` changes, of the options. Raises EmilieError."""
    from ..canvas.settings import Settings

    given = {key: value for key, value in settings(args).items() if value != getattr(Settings(), key)}
    masks = [mask for mask in (args.mask, args.box and read_box(args.box, "--box")) if mask]
    if len(masks) + args.everywhere > 1:
        raise EmilieError("choose one of --mask, --box and --everywhere")
    given |= {"mask": masks[0] if masks else None} if masks or args.everywhere else {}
    if name not in ("revise", "scrub"):
        if given:
            options = ", ".join("--" + key.replace("_", "-") for key in given)
            raise CanvasError(f"{options} is for `revise` and `scrub` alone: leave it out")
        return {}
    at = len(numbers(name, rest))
    given |= {"instruction": rest[at]} if len(rest) > at else {}
    if not given:
        raise CanvasError("say what to revise: an instruction, --mask, --box, --everywhere or settings")
    return given


def told(canvas) -> str:
    """The stack, an edit a line."""
    lines = []
    for k, state in enumerate(canvas.stack, 1):
        more = [] if state.shown else ["hidden"]
        more += [f"strength {state.strength:g}"] if state.strength != 1 else []
        more += ["in a mask"] if state.mask is not None else []
        lines.append(f"{k}. {printable(state.instruction, 300)}" + f" ({', '.join(more)})" * bool(more))
    return "\n".join(lines) or "no edits"
