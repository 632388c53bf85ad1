"""`emilie grid` and `emilie where`: which scale to choose, and where an instruction would act."""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..canvas.settings import Settings, as_finite, as_int
from ..errors import InstructionError, SamplingError, say
from . import language
from .edit import as_written, picture_of_its_own, read_box, resolution, what_changed
from .options import add_model_options, add_path_options, load_editor, tell_foreign, writable

MOST = 100  # cells of a grid
TIMES = {"text_scale": (2 / 3, 1, 4 / 3), "image_scale": (0.8, 1, 1.2)}  # the model's own, to try


def add_common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("input", metavar="IMAGE")
    sub.add_argument("instruction", metavar="INSTRUCTION")
    sub.add_argument("--resolution", type=resolution, help='longer side to work at, in px, or "native"')
    sub.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the pictures")
    add_model_options(sub, find=True)
    add_path_options(sub)


def add_grid_options(sub: argparse.ArgumentParser) -> None:
    add_common(sub)
    sub.add_argument("--text-scale", metavar="A,B,...", help="to try (default: around the model's, as 5,7.5,10)")
    sub.add_argument("--image-scale", metavar="A,B,...", help="to try (default: around the model's, as 1.2,1.5,1.8)")
    sub.add_argument("--seeds", default="0", metavar="A,B,...", help="a sheet's blocks (default: 0)")
    sub.add_argument("--steps", type=int, help="sampling steps (default: the model's own)")
    sub.add_argument("--mask", metavar="FILE", help="edit only where FILE is white; auto: where it would act")
    sub.add_argument("--box", metavar="X0,Y0,X1,Y1", help="edit only in this box, px")


def add_where_options(sub: argparse.ArgumentParser) -> None:
    add_common(sub)
    sub.add_argument("--threshold", type=float, help="of the largest difference, where the mask begins (default: 0.2)")
    sub.add_argument("--seed", type=int, default=0, help="of the noise that is looked through (default: 0)")


def numbers(text: str, name: str, read: Callable = as_finite) -> list:
    """Values with commas between them. Raises SamplingError."""
    values = [read(each, name) for each in text.split(",") if each.strip()]
    if not values:
        raise SamplingError(f"{name} needs one value or more, with commas between them")
    return list(dict.fromkeys(values))


def opened(args: argparse.Namespace, seed: int = 0):
    """The photo of these options, of the working size that an edit would have."""
    from ..canvas import images
    from ..canvas.photo import open_photo

    language.check([args.instruction])
    if not args.instruction.strip():
        raise InstructionError("the instruction is empty: say what to change")
    original = images.read_image(args.input)
    photo = open_photo(original, load_editor(args), seed, args.resolution)
    tell_foreign(photo.canvas.editor, photo.canvas.states[0].image, str(args.input))
    return photo


def cells(photo, instruction: str, mask, text_scales, image_scales, seeds, **changes) -> Iterator[dict]:
    """The settings of an edit for each combination, when its result is the current state; all start from the same."""
    at = photo.canvas.at
    for seed, text_scale, image_scale in itertools.product(seeds, text_scales, image_scales):
        settings = {"seed": seed, "text_scale": text_scale, "image_scale": image_scale}
        photo.canvas.branch(at)
        for _ in photo.steps([(instruction, mask)], **settings, **changes):
            pass
        yield settings
    photo.canvas.branch(at)


def run_grid(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..canvas import about, images, where
    from ..canvas.strip import sheet

    seeds = numbers(args.seeds, "--seeds", lambda text, name: as_int(as_written(text), name))
    given = {
        name: None if getattr(args, name) is None else numbers(getattr(args, name), f"--{name.replace('_', '-')}")
        for name in TIMES
    }
    Settings(steps=args.steps)
    photo = opened(args)
    canvas, own = photo.canvas, photo.canvas.editor.config.sampling
    scales = [given[name] or [round(getattr(own, name) * t, 2) for t in times] for name, times in TIMES.items()]
    total = len(scales[0]) * len(scales[1]) * len(seeds)
    if total > MOST:
        raise SamplingError(f"a grid of {total} pictures is too large: {MOST} at most")
    mask = read_box(args.box, "--box") if args.box else args.mask
    if mask == "auto":
        mask = where.mask(canvas, args.instruction)
        mask = mask and photo.at_own_size(mask)
    canvas.read_regions([mask])
    canvas.editor.text.tokenize([args.instruction])
    folder, made = writable(args.out), []
    with claimed_grid(folder, Path(args.input).stem) as (sheet_path, singles):
        each = cells(photo, args.instruction, mask, *scales, seeds, steps=args.steps)
        for settings in tqdm(each, total=total):
            before = canvas.states[0].image
            made.append((settings, canvas.image, what_changed(before, canvas)))
            name = "_".join(f"{key[0]}{value:g}" for key, value in settings.items())
            images.save(photo.image, singles / f"{name}.png", about.texts(canvas))
        labels = [f"text {s['text_scale']:g}, image {s['image_scale']:g}" + f", seed {s['seed']}" * (len(seeds) > 1)
                  for s, _, _ in made]  # fmt: skip
        pictures = [(image, f"{label}: {told.partition(':')[0].removeprefix('this edit ')}", None)
                    for label, (_, image, told) in zip(labels, made)]  # fmt: skip
        title = f"{args.instruction}   (down: text scale, across: image scale)"
        path = images.save(sheet(title, pictures, len(scales[1]), canvas.states[0].image), sheet_path)
        say(f"wrote {path} and {total} pictures in {singles}")


@contextmanager
def claimed_grid(folder: Path, stem: str) -> Iterator[tuple[Path, Path]]:
    """A name for a grid's sheet and its folder of pictures, of which none is there yet."""
    for count in itertools.count(1):
        name = f"{stem}_grid" if count == 1 else f"{stem}_grid-{count}"
        try:
            (folder / name).mkdir()
            break
        except FileExistsError:
            continue
    yield folder / f"{name}.png", folder / name


def run_where(args: argparse.Namespace) -> None:
    from ..canvas import about, images, where

    threshold = where.THRESHOLD if args.threshold is None else args.threshold
    if not 0 < threshold <= 1:
        raise SamplingError(f"--threshold is a part of the largest difference, above 0 and up to 1, not {threshold:g}")
    photo, started = opened(args, args.seed), time.time()
    canvas, folder, stem = photo.canvas, writable(args.out), Path(args.input).stem
    cells = where.differences(canvas, args.instruction)
    mask = where.marked(cells, canvas.image.size, threshold)
    drawn = images.put_back(where.drawn(canvas.image, cells), photo.photo, photo.box)
    with picture_of_its_own(folder, f"{stem}_where") as path:
        say(f"wrote {images.save(drawn, path)}")
    if mask is None:
        say(f'"{args.instruction}" acts on all of the picture: a mask would not help')
        return
    own = photo.at_own_size(mask)
    with picture_of_its_own(folder, f"{stem}_where_mask") as path:
        say(f"wrote {images.save(own, path)}, for --mask 1=FILE, or say --mask auto at once")
    box = ",".join(map(str, own.getbbox()))
    say(f'"{args.instruction}" acts on {about.share(own):.1%} of the picture, in {box}; {time.time() - started:.1f} s')
