"""A benchmark is a folder of pictures with a file, bench.jsonl, that says what is asked of each.

    DIR/bench.jsonl                                  one item a line: a picture and a chain of edits
    DIR/images/ masks/ regions/ targets/             pictures; any names that bench.jsonl gives will do

One item, which stands on one line of bench.jsonl, in UTF-8; only "id", "image", "turns" and "instruction" are needed:

    {"id": "0001",                                   of letters, digits, "_", "-" and "."; no two items share one
     "image": "images/0001.png",                     the picture that the chain begins with
     "caption": "a red circle on sand",              what it shows, for methods that need captions
     "truth": null,                                  what it shows, as `toy.world.Scene.to_dict()` gives it
     "meta": {},                                     whatever else is worth noting
     "turns": [                                      one or more edits, each about the result of the one before
        {"instruction": "make the circle blue",      what is asked
         "mask": "masks/0001_1.png",                 given to the methods: white = edit here, black = keep
         "region": "regions/0001_1.png",             never given to them: white where the right result may differ
                                                     from the picture before
         "within": false,                            true: "truth" is what the region shall show, and outside it the
                                                     picture before is right
         "caption": "a blue circle on sand",         what the right result shows
         "target": "targets/0001_1.png",             the right result, where there is one
         "inset": "insets/0001_1.png",               given to `emilie insert`: a picture of an object to insert,
         "inset_mask": "inset_masks/0001_1.png",     and where in it the object is
         "truth": null}]}                            the right result as a scene of the small world

Paths are relative to DIR, with "/", and stay inside it. Masks and regions have their picture's size. An edit with
neither is about the whole picture. An instruction may be "" where the item's meta has {"asks": "nothing"}. Any other
key is an error.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from PIL import Image

from ..checkpoint.schema import Blank, fault, parse
from ..errors import BenchError, EmilieError, plain_file, printable, quote
from ..toy import world
from .io import LONGEST

FILE = "bench.jsonl"
MOST = 20  # lines with a fault that are named in one error
PICTURES = ("image", "mask", "region", "target", "inset", "inset_mask")
TURN = {
    "instruction": str, "mask?": str, "caption?": str, "region?": str, "target?": str, "truth?": dict, "within?": bool,
    "inset?": str, "inset_mask?": str,
}  # fmt: skip
ITEM = {"id": str, "image": str, "turns": [TURN], "caption?": str, "truth?": dict, "meta?": dict}
IDLE = ITEM | {"turns": [TURN | {"instruction": Blank}]}  # of items that ask for nothing
ID = re.compile(r"(?!\.\.?$)[A-Za-z0-9_.-]+")  # a file name everywhere

# of benchmark to `make`, and their turns
KINDS = {"imie": 4, "drift": 16, "twins": 1, "night-here": 1, "undo": 2, "undo-later": 5, "nothing": 16}
FIRST = 2 * 10**6  # the first scene's seed: training begins at 10**9, `toy-eval` at 10**6 and uses some hundreds
SCENES = 10**4  # at most, so that no two seeds share a scene

Picture = Path | Image.Image  # a path in what was read; either in what is to be written or measured


@dataclass(frozen=True)
class Turn:
    """One edit of a chain. `mask` is for the methods, all after it for measuring."""

    instruction: str
    mask: Picture | None = None
    caption: str | None = None
    region: Picture | None = None
    target: Picture | None = None
    truth: world.Scene | None = None
    within: bool = False  # the truth is the region's alone
    inset: Picture | None = None  # of an object to insert, for `emilie insert`
    inset_mask: Picture | None = None


@dataclass(frozen=True)
class Item:
    """A picture and the chain of edits that is asked of it."""

    id: str
    image: Picture
    turns: tuple[Turn, ...]
    caption: str | None = None
    truth: world.Scene | None = None
    meta: dict | None = None


# ---- reading


def read(folder: str | Path) -> list[Item]:
    """The items of a benchmark, paths absolute; no picture is opened. BenchError names each line's first fault."""
    return _load(folder)


def check(folder: str | Path) -> str:
    """Read a benchmark, open every picture and mask too, and say in a line what there is. Raises BenchError."""
    items = _load(folder, opened=True)
    turns = [turn for item in items for turn in item.turns]
    masks, truths = (sum(getattr(turn, part) is not None for turn in turns) for part in ("mask", "truth"))
    return f"{len(items)} items, {len(turns)} turns, {masks} with a mask, {truths} with a truth"


def _load(folder: str | Path, opened: bool = False) -> list[Item]:
    """The items of a benchmark that has no fault, with all pictures looked at if `opened`."""
    folder = Path(os.path.abspath(folder))
    path = folder / FILE
    try:
        plain_file(path, LONGEST)
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BenchError(f"{path} cannot be read ({error.strerror}): a benchmark is a folder with this file") from error
    except UnicodeDecodeError as error:
        raise BenchError(f"{path} is not in UTF-8 (byte {error.start}): save it so") from error
    faults, items, lines = [], [], {}
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which breaks instructions at U+2028
        if not line.strip():
            continue
        try:
            item = _item(line, folder)
            if lines.setdefault(item.id, number) != number:
                raise ValueError(f"the id {item.id!r} is that of line {lines[item.id]} too: give each item its own")
            if opened:
                _open(item)
            items.append(item)
        except ValueError as error:  # all EmilieErrors are
            faults.append(f"{path}:{number}: {printable(error)}")
    if faults:
        more = [f"... and {len(faults) - MOST} more"] if len(faults) > MOST else []
        raise BenchError("\n".join(faults[:MOST] + more), faults[:MOST] + more)
    if not items:
        raise BenchError(f"{path} has no items: write one a line")
    return items


def _item(line: str, folder: Path) -> Item:
    """The item that a line describes. Raises ValueError with the first thing that is wrong."""
    try:
        record = parse(line)
    except ValueError as error:
        why = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"not valid JSON ({why}): one item stands on one line") from None
    meta = record.get("meta") if isinstance(record, dict) else None
    idle = isinstance(meta, dict) and meta.get("asks") == "nothing"
    if found := fault(record, IDLE if idle else ITEM):
        raise ValueError(found)
    if not ID.fullmatch(record["id"]):
        raise ValueError(f"id must be of letters, digits, _, - and ., not {quote(record['id'])}")
    turns = [Turn(**_values(turn, TURN, folder, f"turns[{i}].")) for i, turn in enumerate(record["turns"])]
    return Item(**_values(record, ITEM, folder, "") | {"turns": tuple(turns)})


def _values(record: dict, shape: dict, folder: Path, at: str) -> dict:
    """An item's or turn's fields: names of files become paths, dictionaries scenes; null is as good as absent."""
    known, values = [name.removesuffix("?") for name in shape], {}
    convert = {"truth": _scene, **dict.fromkeys(PICTURES, partial(file_in, folder))}
    for key, value in record.items():
        if key not in known:
            choices = f"choose from {', '.join(known)}; notes of your own go into meta"
            raise ValueError(f"{at}{printable(key, 60)} is not known here: {choices}")
        if value is not None:
            try:
                if isinstance(value, str):
                    value.encode()  # half of a surrogate pair, which JSON allows, is a ValueError
                values[key] = convert[key](value) if key in convert else value
            except ValueError as error:
                raise ValueError(f"{at}{key}: {error}") from None
    return values


def file_in(folder: Path, name: str) -> Path:
    """The path of a file by its name relative to a folder that it lies in. Raises ValueError.

    ".." is worked out on the name, so links are left alone.
    """
    normal = os.path.normpath(name)
    if "\\" in name:
        raise ValueError(f'{quote(name)}: write the path with "/"')
    if os.path.isabs(normal) or normal.split(os.sep)[0] in (".", ".."):
        raise ValueError(f"{quote(name)} lies outside the folder: copy the file into it, give its path relative to it")
    if not os.path.isfile(folder / normal):
        raise ValueError(f"there is no file {printable(name, 120)}: put it there or correct the path")
    return folder / normal


def _scene(value: object) -> world.Scene:
    """A scene of the small world from its dictionary."""
    try:
        scene = world.Scene.from_dict(value)
        places = [o.place for o in scene.objects]
        right = value.keys() == {"ground", "look", "objects"} and len(set(places)) == len(places)
        right &= scene.background in world.BACKGROUNDS and scene.style in world.STYLES
        for o in scene.objects:
            right &= o.shape in world.SHAPES and o.colour in world.COLOURS
            right &= all(type(d) is int and abs(d) <= world.JITTER for d in (o.dx, o.dy))
    except (AttributeError, KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise ValueError("is no scene of the small world: write what its Scene.to_dict() gives, or leave it out")
    return scene


def _open(item: Item) -> None:
    """Look at all pictures of an item as a run will. Raises ValueError at the first that will not do."""
    from ..canvas import images
    from ..canvas.insets import read_inset

    size = None
    for where, entry in [("", item), *((f"turns[{i}].", turn) for i, turn in enumerate(item.turns))]:
        for part in PICTURES:
            path = getattr(entry, part, None)
            try:
                if path and part in ("image", "target"):
                    found = images.read_image(path).size
                    size = size or found
                elif path and part.startswith("inset"):
                    read_inset(entry.inset, entry.inset_mask)
                elif path:
                    images.read_mask(path, size, size)
            except EmilieError as error:
                raise ValueError(f"{where}{part}: {error}") from error
    if size != (world.SIZE, world.SIZE) and any(entry.truth for entry in (item, *item.turns)):
        raise ValueError(
            f"truth: the picture is {size[0]}x{size[1]} px and no picture of the small world: leave it out"
        )


# ---- writing


def write(folder: str | Path, items: Iterable[Item]) -> str:
    """Write a benchmark, whole and checked or not at all; returns `check`'s line. Pictures are copied or saved as PNG.

    items: may be a generator, so that one item at a time is in memory. Raises BenchError, also for a folder that is
    there and not empty.
    """
    folder = Path(os.path.abspath(folder))
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise BenchError(f"{folder} is there already: remove it or name another folder")
        if not folder.parent.is_dir():
            raise BenchError(f"there is no folder {folder.parent}: make it or name another")
        unfinished.mkdir()
        with open(unfinished / FILE, "w", encoding="utf-8", newline="\n") as f:
            for item in items:
                f.write(json.dumps(_record(item, unfinished), ensure_ascii=False) + "\n")
            if not f.tell():
                raise BenchError(f"{folder} is not written: there is no item to put into it")
        try:
            summary = check(unfinished)
        except BenchError as error:
            lines = [line.replace(str(unfinished), str(folder)) for line in error.lines]
            raise BenchError("\n".join(lines), lines) from error
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except (OSError, UnicodeError) as error:
        raise BenchError(f"{folder} cannot be written: {error}") from error
    finally:
        _remove(unfinished)
    return summary


def _remove(folder: Path) -> None:
    """With one file open at a time: `shutil.rmtree` has more, for which there may be no room."""
    for here, _, names in os.walk(folder, topdown=False):
        with suppress(OSError):
            for name in names:
                os.unlink(os.path.join(here, name))
            os.rmdir(here)


def _record(item: Item, folder: Path) -> dict:
    """An item as it stands in bench.jsonl, its pictures put into the folder."""
    if not ID.fullmatch(item.id):
        raise BenchError(f'an id must be of letters, digits, "_", "-" and ".", not {item.id!r}')

    def fields(entry: Item | Turn, stem: str) -> dict:
        record = {}
        for key, value in vars(entry).items():
            if isinstance(value, Picture):
                value = _put(value, folder, f"{key}s/{stem}")
            elif isinstance(value, world.Scene):
                value = value.to_dict()
            elif key == "turns":
                value = [fields(turn, f"{item.id}_{i}") for i, turn in enumerate(value, 1)]
            if value is not None and value is not False:
                record[key] = value
        return record

    return fields(item, item.id)


def _put(picture: Picture, folder: Path, stem: str) -> str:
    """A picture's path in the folder, relative to it, once it is there."""
    name = stem + (".png" if isinstance(picture, Image.Image) else picture.suffix.lower())
    (folder / name).parent.mkdir(exist_ok=True)
    if isinstance(picture, Image.Image):
        picture.save(folder / name)
    else:
        shutil.copyfile(picture, folder / name)
    return name


# ---- the small world's own benchmarks


def make(folder: str | Path, scenes: int = 40, turns: int | None = None, seed: int = 0, kind: str = "imie") -> str:
    """Write a benchmark of the small world whose right results are known; returns `check`'s line.

    kind: "imie", as IMIE-Bench: chains of 4 (`turns`) of all kinds of edits, about half of the local ones with a mask.
    "drift": chains of 16 that change one object and change it back again, without masks; outside that object's place
    every right result is the first picture. "twins": one of two equal objects is to change, and only the mask says
    which. "night-here": a look or ground in a half or quarter of the picture, by a mask. "undo": an edit and, in words,
    its undoing ("make the circle blue", "make the circle red"), without masks; after every second turn the first
    picture is right. "undo-later": the same once, with zero to three other edits in between, which the right picture
    keeps. "nothing", for Fig. 2: 16 turns of "", after each of which the first picture is right.

    seed: other seeds have other scenes, none of which training saw. The same call writes the same bytes. Raises
    BenchError.
    """
    if kind not in KINDS:
        raise BenchError(f"no kind of benchmark {kind!r}: choose from {', '.join(KINDS)}")
    turns = KINDS[kind] if turns is None else turns
    if not 1 <= scenes <= SCENES or turns < 1:
        raise BenchError(f"a benchmark has 1 to {SCENES} scenes and 1 turn or more, not {scenes} and {turns}")
    if kind == "night-here" and turns > 1:
        raise BenchError("night-here has one turn: after it the picture is none of the world's scenes")
    if not 0 <= seed < (10**9 - FIRST) // SCENES:
        raise BenchError(f"seed must be from 0 to {(10**9 - FIRST) // SCENES - 1}, not {seed}")
    return write(folder, (MAKERS[kind](i, FIRST + seed * SCENES + i, turns) for i in range(scenes)))


def _imie(i: int, seed: int, turns: int) -> Item:
    """A chain of edits of all kinds, the first of the i-th kind."""
    rng = random.Random(f"imie {seed}")
    first = now = world.scene(seed)
    edits, kinds = [], []
    for turn in range(turns):
        kinds.append(rng.choice(world.possible(now)) if turn else world.KINDS[i % len(world.KINDS)])
        text, now, place = world.instruct(now, f"{seed} {turn}", kinds[-1])
        masked = place is not None and rng.random() < 0.5
        edits.append(Turn(text, place if masked else None, world.caption(now), place, truth=now))
    return _world_item(i, seed, first, edits, kinds=kinds)


def _drift(i: int, seed: int, turns: int) -> Item:
    """A chain that recolours or reshapes one object in every odd turn and undoes it in the next."""
    rng = random.Random(f"drift {seed}")
    first = now = world.scene(seed)
    place = rng.choice(first.objects).place
    edits, kinds = [], []
    for turn in range(turns):
        if turn % 2 == 0:
            kind = rng.choice(("recolour", "shape"))
        for attempt in count():  # any object may be drawn, and any colour or shape
            text, after, where = world.instruct(now, f"{seed} {turn} {attempt}", kind)
            if after == first or turn % 2 == 0 and where.tobytes() == world.mask(place).tobytes():
                break
        now = after
        kinds.append(kind)
        edits.append(Turn(text, None, world.caption(now), world.mask(place), truth=now))
    return _world_item(i, seed, first, edits, kinds=kinds, place=place)


def _twins(i: int, seed: int, turns: int) -> Item:
    """A scene with two equal objects, one of which is to change; every turn has its mask."""
    first = now = world.twins(seed)
    edits, kinds = [], []
    for turn in range(turns):
        can = [kind for kind in ("recolour", "shape", "remove") if kind in world.possible(now)]
        kinds.append(can[(i + turn) % len(can)])
        text, now, place = world.instruct(now, f"{seed} {turn}", kinds[-1])
        edits.append(Turn(text, place, world.caption(now), place, truth=now))
    return _world_item(i, seed, first, edits, kinds=kinds)


def _night_here(i: int, seed: int, turns: int) -> Item:
    """A look or a ground, in turn, in one half or quarter of the picture; the truth is of that part alone."""
    first = world.scene(seed)
    kind, half = ("style", "background")[i % 2], world.SIZE // 2
    text, now, _ = world.instruct(first, f"{seed} 0", kind)
    top, left, height, width = [
        (0, 0, 2, 1), (0, 1, 2, 1), (0, 0, 1, 2), (1, 0, 1, 2), (0, 0, 1, 1), (0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 1, 1)
    ][i // 2 % 8]  # fmt: skip
    part = Image.new("L", (world.SIZE, world.SIZE))
    part.paste(255, (half * left, half * top, half * (left + width), half * (top + height)))
    target = Image.composite(world.render(now), world.render(first), part)
    edit = Turn(text, part, world.caption(now), part, target, now, within=True)
    return _world_item(i, seed, first, [edit], kinds=[kind])


UNDONE = {"recolour": "recolour", "add": "remove", "shape": "shape", "background": "background", "style": "style"}


def _undo(i: int, seed: int, turns: int) -> Item:
    """An edit of the i-th kind that words can undo, and its undoing, again and again."""
    first = now = world.scene(seed)
    kind = list(UNDONE)[i % len(UNDONE)]
    edits, kinds = [], []
    for turn in range(turns):
        kinds.append(UNDONE[kind] if turn % 2 else kind)
        for attempt in count():  # any change may be drawn
            text, after, where = world.instruct(now, f"{seed} {turn} {attempt}", kinds[-1])
            if after == first or turn % 2 == 0:
                break
        now = after
        edits.append(Turn(text, None, world.caption(now), where, truth=now))
    return _world_item(i, seed, first, edits, kinds=kinds)


def _undo_later(i: int, seed: int, turns: int) -> Item:
    """An edit of the i-th kind, up to three others (at most `turns` - 2) that touch nothing of it, and its undoing."""
    first, kind = world.scene(seed), list(UNDONE)[i % len(UNDONE)]
    between = min(i // len(UNDONE) % 4, max(turns - 2, 0))
    for attempt in count():
        now, steps = first, []
        for turn in range(1 + between):
            steps.append(world.instruct(now, f"{seed} {attempt} {turn}", None if turn else kind))
            now = steps[-1][1]
        right = world.without(first, [after for _, after, _ in steps], 0)
        if right is None or UNDONE[kind] not in world.possible(now):
            continue
        back = (world.instruct(now, f"{seed} {attempt} back {k}", UNDONE[kind]) for k in range(100))
        found = next((step for step in back if step[1] == right), None)
        if found is not None:
            break
    edits = [Turn(text, None, world.caption(after), where, truth=after) for text, after, where in (*steps, found)]
    return _world_item(i, seed, first, edits, undone=kind, between=between)


def _nothing(i: int, seed: int, turns: int) -> Item:
    """Nothing is asked for, again and again."""
    scene = world.scene(seed)
    return _world_item(i, seed, scene, turns * [Turn("", caption=world.caption(scene), truth=scene)], asks="nothing")


MAKERS = {
    "imie": _imie, "drift": _drift, "twins": _twins, "night-here": _night_here, "undo": _undo,
    "undo-later": _undo_later, "nothing": _nothing,
}  # fmt: skip


def _world_item(i: int, seed: int, scene: world.Scene, turns: list[Turn], **meta) -> Item:
    caption, picture = world.caption(scene), world.render(scene)
    return Item(f"{i + 1:04d}", picture, tuple(turns), caption, scene, {"scene": seed, **meta})
