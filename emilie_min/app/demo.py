"""`emilie demo`: a scene of the small world, edited by four instructions with the model that ships."""

import argparse
import time
from pathlib import Path

from ..errors import EmilieError, say
from .options import add_model_options, add_path_options, edit_with_bar, load_editor, small_world, writable


def add_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the pictures (out/demo)")
    sub.add_argument("--seed", type=int, default=0, help="another scene, other instructions (default: 0)")
    add_model_options(sub)
    add_path_options(sub)


def run(args: argparse.Namespace) -> None:
    from ..canvas import images
    from ..canvas.canvas import open as open_canvas
    from ..canvas.strip import strip
    from ..toy import world
    from ..toy.judge import judge

    started = time.time()
    editor = load_editor(args)
    need_small_world(editor)
    folder = writable(args.out)
    scene = world.scene(args.seed)
    canvas = open_canvas(world.render(scene), editor, seed=args.seed)
    say(f"wrote {images.save(canvas.image, folder / '0_input.png')}")
    cells, right = [(canvas.image, "input", None)], 0
    plan = (("recolour", False), ("add", True), ("background", False), ("style", False))
    for i, (kind, masked) in enumerate(plan, 1):
        text, scene, mask = world.instruct(scene, args.seed, kind)
        image = edit_with_bar(canvas, i, [(text, mask if masked else None)])
        verdict = judge(image, scene)
        right += verdict.correct
        say(f"wrote {images.save(image, folder / f'{i}.png')}: {verdict.why or 'as it should be'}")
        cells.append((image, text + (" (in the mask)" if masked else ""), mask if masked else None))
    say(f"wrote {images.save(strip(cells), folder / 'strip.png')}")
    say(f"{right} of 4 pictures are what the instructions ask for; {time.time() - started:.0f} s")


def need_small_world(editor) -> None:
    from ..toy import world

    if not small_world(editor):
        raise EmilieError(f"{editor.model} was not made for the small world of {world.SIZE} px: leave --weights out")
