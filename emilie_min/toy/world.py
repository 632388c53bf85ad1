"""A procedural world of a few shapes on a background, and instructions whose right result is known exactly.

A `Scene` is data and `pixels` its only rendering, so that "turn the circle into a square" has one right picture.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

import numpy as np
from PIL import Image

SIZE, CELL = 64, 32
PLACES = {"top left": (0, 0), "top right": (0, CELL), "bottom left": (CELL, 0), "bottom right": (CELL, CELL)}  # y, x
JITTER = 2  # an object is at most this far from the centre of its place, along each axis
COLOURS = {
    "red": (212, 28, 32),
    "yellow": (250, 205, 0),
    "green": (16, 128, 48),
    "blue": (24, 72, 220),
    "purple": (108, 16, 140),
    "pink": (250, 76, 172),
}
BACKGROUNDS = {
    "sand": (228, 200, 152),
    "grass": (164, 206, 136),
    "water": (140, 192, 224),
    "snow": (226, 236, 246),
    "stone": (172, 168, 176),
}
STYLES = ("day", "night", "comic", "pastel")
KINDS = ("recolour", "add", "remove", "shape", "background", "style")
STYLE_TEXTS = {
    "day": "make it day",
    "night": "make it night",
    "comic": "turn it into a comic",
    "pastel": "turn it into a pastel drawing",
}
STYLE_CAPTIONS = {"day": "by day", "night": "at night", "comic": "as a comic", "pastel": "as a pastel drawing"}
HELD_OUT = (("green", "circle"), ("purple", "star"), ("yellow", "square"))  # in no scene made without held_out=True


def _star(points: int, outer: float, inner: float) -> list[tuple[float, float]]:
    spokes = [(inner if i % 2 else outer, math.pi * i / points) for i in range(2 * points)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in spokes]


SHAPES = {  # corners (x, y) in pixels from the centre of the object, of similar area; y points down
    "circle": _star(32, 10.5, 10.5),
    "square": [(-9.5, -9.5), (9.5, -9.5), (9.5, 9.5), (-9.5, 9.5)],
    "triangle": [(0, -11.5), (11.75, 10), (-11.75, 10)],
    "star": _star(5, 12, 5.75),
    "cross": [(-4, -11), (4, -11), (4, -4), (11, -4), (11, 4), (4, 4),
              (4, 11), (-4, 11), (-4, 4), (-11, 4), (-11, -4), (-4, -4)],
}  # fmt: skip


@dataclass(frozen=True)
class Object:
    """One thing in the world, `dx`, `dy` pixels off the centre of its place."""

    shape: str
    colour: str
    place: str
    dx: int = 0
    dy: int = 0


@dataclass(frozen=True)
class Scene:
    """Everything there is to know about a picture; objects are kept in the order of `PLACES`."""

    background: str
    style: str
    objects: tuple[Object, ...]

    def __post_init__(self):
        order = list(PLACES)
        object.__setattr__(self, "objects", tuple(sorted(self.objects, key=lambda o: order.index(o.place))))

    def to_dict(self) -> dict:
        """As benchmark files hold it, in which the background is the "ground" and the style the "look"."""
        return {"ground": self.background, "look": self.style, "objects": [asdict(o) for o in self.objects]}

    @staticmethod
    def from_dict(d: dict) -> "Scene":
        return Scene(d["ground"], d["look"], tuple(Object(**o) for o in d["objects"]))


# ---- from a scene to pixels


def paint(rgb: np.ndarray, style: str) -> np.ndarray:
    """What becomes of day colours (..., 3) under a style."""
    if style == "night":
        rgb = rgb * np.array([0.40, 0.46, 0.72]) + np.array([0, 0, 10])
    elif style == "comic":
        grey = rgb.mean(-1, keepdims=True)
        rgb = grey + 1.35 * (rgb - grey)
    elif style == "pastel":
        rgb = 0.55 * rgb + 0.45 * 255
    return rgb.clip(0, 255).astype(np.float32)


@cache
def background_pixels(background: str, style: str) -> np.ndarray:
    """The background (64, 64, 3) with its soft pattern: at most 8 grey levels, waves of 9 pixels and more."""
    y, x = np.mgrid[:SIZE, :SIZE] * (2 * np.pi)
    pattern = {
        "sand": lambda: 8 * np.sin(y / 16 + x / 64 + 0.8 * np.sin(x / 40)),  # dunes
        "grass": lambda: 7 * np.sin(x / 11) * np.cos(y / 22),  # tufts
        "water": lambda: 6 * np.sin(y / 11 + 1.2 * np.sin(x / 22)),  # waves
        "snow": lambda: 5 * np.sin((x - y) / 45),  # drifts
        "stone": lambda: 6 * np.sin((x + y) / 22) * np.sin((x - y) / 22),  # slabs
    }[background]()
    return paint(np.array(BACKGROUNDS[background]) + pattern[..., None], style)


@cache
def _tile(shape: str, grow: float) -> np.ndarray:
    """How much of each pixel of a place (32, 32, 1) a shape covers, grown by `grow` pixels; 8x8 samples a pixel."""
    n = CELL * 8
    axis = (np.arange(n) + 0.5) / 8 - CELL / 2
    x, y = axis[None, :], axis[:, None]
    inside, near = np.zeros((n, n), bool), np.full((n, n), np.inf)
    corners = SHAPES[shape]
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        ex, ey = bx - ax, by - ay
        if ey:  # even-odd rule: a ray to the right crosses this edge
            inside ^= ((ay > y) != (by > y)) & (x < ax + ex * (y - ay) / ey)
        t = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clip(0, 1)
        near = np.minimum(near, np.hypot(x - ax - t * ex, y - ay - t * ey))
    covered = inside | (near < grow)
    return covered.reshape(CELL, 8, CELL, 8).mean((1, 3), dtype=np.float32)[..., None]


@cache
def alpha(shape: str, dx: int, dy: int, outline: bool = False) -> np.ndarray:
    """Coverage (32, 32, 1) of a shape, or of the shape with its comic outline, within its place."""
    pad = max(abs(dx), abs(dy))
    tile = np.pad(_tile(shape, 2.0 if outline else 0.0), ((pad, pad), (pad, pad), (0, 0)))
    return tile[pad - dy : pad - dy + CELL, pad - dx : pad - dx + CELL]


@cache
def colour_pixel(colour: str, style: str) -> np.ndarray:
    return paint(np.array(COLOURS[colour], float), style)


INK = np.array([24, 20, 28], np.float32)


def draw(cell: np.ndarray, o: Object, style: str) -> np.ndarray:
    """The pixels of a place (32, 32, 3) with an object put on them."""
    if style == "comic":
        cell = cell + alpha(o.shape, o.dx, o.dy, outline=True) * (INK - cell)
    return cell + alpha(o.shape, o.dx, o.dy) * (colour_pixel(o.colour, style) - cell)


def pixels(scene: Scene) -> np.ndarray:
    """The picture of a scene, uint8 (64, 64, 3)."""
    out = background_pixels(scene.background, scene.style).copy()
    for o in scene.objects:
        y, x = PLACES[o.place]
        out[y : y + CELL, x : x + CELL] = draw(out[y : y + CELL, x : x + CELL], o, scene.style)
    return (out + 0.5).astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    return Image.fromarray(pixels(scene))


def mask(place: str) -> Image.Image:
    """White inside a place, black elsewhere."""
    y, x = PLACES[place]
    out = Image.new("L", (SIZE, SIZE))
    out.paste(255, (x, y, x + CELL, y + CELL))
    return out


# ---- scenes and instructions, each a function of a seed; random.Random hashes a string the same way everywhere


def scene(seed: int, held_out: bool = False) -> Scene:
    """A scene of 2 or 3 objects: with no held-out pair of colour and shape, or with at least one."""
    rng = random.Random(f"scene {seed}")
    background = rng.choice(list(BACKGROUNDS))
    style = "day" if rng.random() < 0.5 else rng.choice(STYLES[1:])
    n = rng.choice((2, 3))
    while True:
        shapes, colours = rng.sample(list(SHAPES), n), rng.sample(list(COLOURS), n)
        if any(pair in HELD_OUT for pair in zip(colours, shapes)) == held_out:
            break
    places = rng.sample(list(PLACES), n)
    jitter = [(rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER)) for _ in range(n)]
    return Scene(background, style, tuple(Object(s, c, p, *j) for s, c, p, j in zip(shapes, colours, places, jitter)))


def twins(seed: int, alike: bool = True) -> Scene:
    """A scene of 2 to 4 objects of which two have one shape: `alike`, one colour too; else colours tell them apart."""
    rng = random.Random(f"twins {seed}")
    first = scene(seed)
    one, *others = rng.sample(first.objects, len(first.objects))
    kept = [one, *others[: rng.randint(0, len(others))]]
    colour, taken = one.colour, {o.colour for o in kept}
    if not alike:
        colour = rng.choice([c for c in COLOURS if c not in taken and (c, one.shape) not in HELD_OUT])
    place = rng.choice([p for p in PLACES if p not in {o.place for o in kept}])
    other = Object(one.shape, colour, place, rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER))
    return replace(first, objects=(*kept, other))


def possible(scene: Scene) -> list[str]:
    """The kinds of instruction that a scene allows."""
    n = len(scene.objects)
    barred = {"add"} if n == len(PLACES) else {"remove"} if n <= 1 else set()
    return [kind for kind in KINDS if kind not in barred and (n or kind not in ("recolour", "shape"))]


def instruct(
    scene: Scene, seed: int | str, kind: str | None = None, held_out: bool = False
) -> tuple[str, Scene, Image.Image | None]:
    """An instruction, the scene that it must lead to, and the mask of its place (None if it is about everything).

    Where two objects share a shape, what is recoloured, reshaped or removed is one of them: of equal ones only the mask
    tells which.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"no kind of instruction {kind!r}: choose from {', '.join(KINDS)}")
    if kind is not None and kind not in possible(scene):
        raise ValueError(f"{kind!r} is impossible in a scene of {len(scene.objects)} objects")
    rng = random.Random(f"instruct {seed}")
    kind = kind or rng.choice(possible(scene))

    if kind == "background":
        background = rng.choice([g for g in BACKGROUNDS if g != scene.background])
        return f"change the background to {background}", replace(scene, background=background), None
    if kind == "style":
        style = rng.choice([k for k in STYLES if k != scene.style])
        return STYLE_TEXTS[style], replace(scene, style=style), None

    colours = [c for c in COLOURS if c not in {o.colour for o in scene.objects}]
    shapes = [s for s in SHAPES if s not in {o.shape for o in scene.objects}]
    if kind == "add":
        place = rng.choice([p for p in PLACES if p not in {o.place for o in scene.objects}])
        pairs = [(c, s) for c in colours for s in shapes if held_out or (c, s) not in HELD_OUT]
        colour, shape = rng.choice(pairs)
        objects = (*scene.objects, Object(shape, colour, place))
        return f"add a {colour} {shape} at the {place}", replace(scene, objects=objects), mask(place)

    present = [o.shape for o in scene.objects]
    objects = [o for o in scene.objects if present.count(o.shape) > 1] or scene.objects
    if kind == "recolour":
        pairs = [(o, replace(o, colour=c)) for o in objects for c in colours]
    elif kind == "shape":
        pairs = [(o, replace(o, shape=s)) for o in objects for s in shapes]
    else:
        pairs = [(o, None) for o in objects]
    old, new = rng.choice([p for p in pairs if held_out or not p[1] or (p[1].colour, p[1].shape) not in HELD_OUT])
    names = [f"the {old.shape}", f"the {old.colour} {old.shape}"]
    if any(o.shape == old.shape and o.colour != old.colour for o in scene.objects):
        del names[0]
    name = rng.choice(names)
    objects = tuple(o for o in (new if o is old else o for o in scene.objects) if o)
    if kind == "recolour":
        text = f"make {name} {new.colour}"
    elif kind == "shape":
        text = f"turn {name} into a {new.shape}"
    else:
        text = f"remove {name}"
    return text, replace(scene, objects=objects), mask(old.place)


def chain(seed: int, n: int, held_out: bool = False) -> tuple[Scene, list[tuple[str, Scene, Image.Image | None]]]:
    """A scene and `n` instructions in a row, each about the result of the one before."""
    first = now = scene(seed, held_out)
    steps = []
    for i in range(n):
        steps.append(instruct(now, f"{seed} {i}", held_out=held_out))
        now = steps[-1][1]
    return first, steps


def without(first: Scene, scenes: Sequence[Scene], k: int) -> Scene | None:
    """The scene that all edits but the k-th, from 0, lead to; None where a later one touches what that one changed.

    Also where a shape stands twice in between: an instruction then does not say which it means.
    """
    chain, now = [first, *scenes], first
    for i, (before, after) in enumerate(zip(chain, chain[1:])):
        if i == k:
            taken = parts(before, after)
            continue
        changed = parts(before, after)
        if i > k and changed.keys() & taken.keys():
            return None
        now = put(now, changed)
        if len({o.shape for o in now.objects}) < len(now.objects):
            return None
    return now


def parts(before: Scene, after: Scene) -> dict[str, object]:
    """What an edit changed: "background", "style" and places, with what is there then."""
    old, new = ({o.place: o for o in scene.objects} for scene in (before, after))
    changed = {place: new.get(place) for place in PLACES if old.get(place) != new.get(place)}
    names = ("background", "style")
    return changed | {n: getattr(after, n) for n in names if getattr(before, n) != getattr(after, n)}


def put(scene: Scene, changed: dict) -> Scene:
    objects = {o.place: o for o in scene.objects} | {p: o for p, o in changed.items() if p in PLACES}
    looks = {name: what for name, what in changed.items() if name not in PLACES}
    return replace(scene, objects=tuple(o for o in objects.values() if o), **looks)


def caption(scene: Scene) -> str:
    """What a scene shows, object by object: what a text-to-image model of this world is told."""
    things = " and ".join(f"a {o.colour} {o.shape} at the {o.place}" for o in scene.objects)
    return f"{things} on {scene.background} {STYLE_CAPTIONS[scene.style]}".strip()


def instructions() -> Iterator[str]:
    """Every text that `instruct` can ever say."""
    for shape in SHAPES:
        names = [f"the {shape}"] + [f"the {c} {shape}" for c in COLOURS]
        yield from (f"make {n} {c}" for n in names for c in COLOURS if c not in n.split())
        yield from (f"turn {n} into a {s}" for n in names for s in SHAPES if s != shape)
        yield from (f"remove {n}" for n in names)
        yield from (f"add a {c} {shape} at the {p}" for c in COLOURS for p in PLACES)
    yield from (f"change the background to {g}" for g in BACKGROUNDS)
    yield from STYLE_TEXTS.values()


VOCABULARY = tuple(sorted({word for text in instructions() for word in text.split()}))
CAPTION_VOCABULARY = (*VOCABULARY, "and", "as", "by", "on")  # a caption's further words behind an instruction's
