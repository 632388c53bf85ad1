"""`emilie edit --batch`: the same instructions on every picture of a folder or pattern; started again, it goes on."""

import argparse
import glob
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..bench.cli import own_device, which_shard
from ..errors import CanvasError, EmilieError, InstructionError, MaskError, printable, say
from . import language
from .edit import read_edits, settings, with_places
from .options import load_editor, tell_foreign, writable

TOGETHER = 4  # pictures in a pass on a GPU, fewer where its memory does not hold them


def run(args: argparse.Namespace) -> int:
    """Edit them; 2 where some could not be. Results keep their picture's place in the tree of folders, below --out."""
    from ..canvas.together import can

    changes = settings(args)
    texts = [args.input, *args.instructions]  # all words: the pictures are --batch's
    if not all(text.strip() for text in texts):
        raise InstructionError("an instruction is empty: say what to change")
    language.check(texts)
    if (
        args.canvas
        or args.also
        or args.crop
        or args.mask_invert
        or any(m.partition("=")[2] != "auto" for m in args.mask)
    ):
        raise MaskError("--batch takes the same for every picture: --box and --mask N=auto, no other mask, no --canvas")
    read_edits(args, list(texts))  # what is wrong for every picture is told once
    found = pictures(args.batch, args.out)
    shard = which_shard(None, dict(os.environ))
    args.device = own_device(args.device, shard, os.environ)
    mine = found[shard[0] - 1 :: shard[1]]
    folder = writable(args.out)
    todo = [(source, name) for source, name in mine if not done(folder, name, texts, changes)]
    part = f", of which this process does {len(mine)}" if shard[1] > 1 else ""
    say(f"{len(found)} pictures{part}; {len(mine) - len(todo)} are done already")
    if not todo:
        return 0
    editor = load_editor(args)
    editor.text.tokenize(texts)
    together = TOGETHER if editor.device.type == "cuda" and can(**changes) and not (args.mask or args.box) else 1
    return Batch(args, changes, texts, editor, folder).run(todo, together)


class Batch:
    """What all pictures of a run have in common."""

    def __init__(self, args: argparse.Namespace, changes: dict, texts: Sequence[str], editor, folder: Path):
        self.args, self.changes, self.texts, self.editor, self.folder = args, changes, list(texts), editor, folder
        self.foreign = False

    def run(self, todo: list[tuple[Path, str]], together: int) -> int:
        from tqdm import tqdm

        failed, at = 0, 0
        with tqdm(total=len(todo), unit="picture") as bar:
            while at < len(todo):
                group, photos, started = [], [], time.time()
                for source, name in todo[at:]:
                    if len(group) == together:
                        break
                    try:
                        photo = self.open(source)
                    except EmilieError as error:
                        if group:
                            break  # it is told when its turn comes
                        bar.write(f"emilie: error: {printable(error)}", sys.stderr)
                        failed, at = failed + 1, at + 1
                        bar.update()
                        continue
                    if photos and photo.canvas.z_init.shape != photos[0].canvas.z_init.shape:
                        break
                    group.append((source, name))
                    photos.append(photo)
                if not group:
                    continue
                try:
                    self.edit(group, photos)
                except EmilieError as error:
                    if len(group) > 1:  # too many for the memory, or one that fails
                        together = max(1, len(group) // 2)
                        continue
                    bar.write(f"emilie: error: {printable(group[0][0])}: {printable(error)}", sys.stderr)
                    failed += 1
                each = (time.time() - started) / len(group)
                bar.set_postfix_str(f"{each:.1f} s each, {printable(group[-1][1], 80)}")
                at += len(group)
                bar.update(len(group))
        say(f"{len(todo) - failed} pictures edited, in {self.folder}" + f"; {failed} could not be" * (failed > 0))
        return 2 if failed else 0

    def open(self, source: Path):
        from ..canvas import images
        from ..canvas.photo import open_photo

        photo = open_photo(images.read_image(source), self.editor, self.args.seed or 0, self.args.resolution)
        if not self.foreign:
            self.foreign = tell_foreign(self.editor, photo.canvas.states[0].image, str(source))
        return photo

    def edit(self, group: list[tuple[Path, str]], photos: list) -> None:
        """All instructions on a group of pictures; what is written is written when all of them are done."""
        from ..canvas import about, images, together

        made: list[list[tuple]] = [[] for _ in photos]
        edits = read_edits(self.args, self.texts)
        for regions in edits:
            if len(photos) > 1:
                for _ in together.steps([photo.canvas for photo in photos], regions[0][0], **self.changes):
                    pass
            else:
                placed = with_places(regions, photos[0], photos[0].canvas)
                masked = all(mask is not None for _, mask, *_ in placed)
                keep = {"keep_background": self.changes["keep_background"] and masked}
                for _ in photos[0].steps(placed, **self.changes | keep):
                    pass
            for photo, done in zip(photos, made):
                image = photo.canvas.image if self.args.working_size else photo.image
                done.append((image, about.texts(photo.canvas)))
        for (_, name), done in zip(group, made):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            for number, (image, said) in enumerate(done, 1):  # the last one says that the picture is done
                images.save(image, path.with_name(f"{path.name}_{number}.png"), said)


def pictures(where: str, out: Path) -> list[tuple[Path, str]]:
    """Each picture of a folder, below it too, or of a pattern, and its name below --out, without suffix.

    What lies below --out is left out. Raises CanvasError where there is none.
    """
    from PIL import Image

    suffixes = {*Image.registered_extensions(), ".heic", ".heif"}
    if os.path.isdir(where):
        root, paths = Path(where), sorted(Path(where).rglob("*"))
    else:
        fixed = Path(where.partition("*")[0].partition("?")[0].partition("[")[0])
        root = fixed if fixed.is_dir() else fixed.parent
        paths = sorted(map(Path, glob.glob(where, recursive=True)))
    own = out.resolve()
    found = [p for p in paths if p.suffix.lower() in suffixes and p.is_file() and own not in p.resolve().parents]
    if not found:
        raise CanvasError(
            f'no pictures at {where}: name a folder, or a pattern in quotes, as in --batch "photos/*.jpg"'
        )
    names = [str(path.relative_to(root).with_suffix("")) for path in found]
    twice = {name for name in names if names.count(name) > 1}  # a.jpg and a.png
    return [(p, f"{n}{p.suffix.replace('.', '_')}" if n in twice else n) for p, n in zip(found, names)]


def done(folder: Path, name: str, texts: Sequence[str], changes: dict) -> bool:
    """Whether a picture's last result is there. Raises CanvasError where it is another run's."""
    from ..canvas import about
    from ..errors import ImageError

    path = folder / f"{name}_{len(texts)}.png"
    if not path.exists():
        return False
    try:
        edits = about.read(path)["edits"]
    except ImageError:
        edits = []
    asked = {key: value for key, value in changes.items() if value is not None and key != "keep_background"}
    asked = json.loads(json.dumps(asked))  # as they read back: of tuples become lists
    same = [edit["instruction"] for edit in edits] == list(texts)
    if not same or any(edit["settings"].get(key, value) != value for edit in edits for key, value in asked.items()):
        raise CanvasError(f"{path} is there and of another run: name another folder with --out")
    return True
