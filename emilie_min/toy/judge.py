"""Reads a picture back into a `Scene` by analysis by synthesis, and says whether it is what an instruction asked for.

It knows the world and no model: `read` tries every background, style and object, and keeps what explains most.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from .world import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    INK,
    JITTER,
    PLACES,
    SHAPES,
    SIZE,
    STYLES,
    Object,
    Scene,
    alpha,
    background_pixels,
    colour_pixel,
    pixels,
)

TOLERANCE = 2  # pixels along each axis that an object may be off its true position
REACH = JITTER + TOLERANCE
POSES = [(s, dx, dy) for s in SHAPES for dx in range(-REACH, REACH + 1) for dy in range(-REACH, REACH + 1)]
# What a place may leave unexplained, as RMS in grey levels: a share of its object's contrast with the background, and
# MAX_RMS where that is less or there is no object. Measured as shares on 400 scenes: gaussian blur of radius 0.7 leaves
# 0.07-0.16 (in comic, with its outlines, up to 0.25), radius 1 0.12-0.24 (0.40), radius 2 0.24-0.39 (0.59), an object
# half faded or half removed 0.5 and more. The contrast: day 30-104, night 13-60, comic 67-138, pastel 16-56.
MAX_SHARE = {"day": 0.3, "night": 0.3, "comic": 0.4, "pastel": 0.3}
MAX_RMS = 8.0
# How far, as a distance in RGB, the mean of a block of 8x8 pixels may be off. Blur of radius 0.7 moves it by 12 at most
# and 4 grey levels are 7, but a patch of the old colour that was left in place is 67 and more, half that if faded.
MAX_STAIN = 30.0
MOST_TILES = 16  # of a larger picture that are looked at


@dataclass(frozen=True)
class Reading:
    """The scene that explains a picture best, and what it leaves unexplained, as RMS in grey levels."""

    scene: Scene
    background_rms: float  # where no object can cover it, and more than 2 px from those read: blur carries ink there
    place_rms: dict[str, float]
    place_stain: dict[str, float]  # the longest mean RGB error of a block of 8x8 pixels


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is right; given the scene before, also whether the edit was made and the rest kept."""

    correct: bool
    why: str
    edited: bool | None = None
    kept: bool | None = None


def _array(image: Image.Image | np.ndarray) -> np.ndarray:
    a = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if a.shape != (SIZE, SIZE, 3) or a.dtype != np.uint8:
        raise ValueError(f"expected a uint8 picture of shape {(SIZE, SIZE, 3)}, got {a.dtype} {a.shape}")
    return a.astype(np.float32)


def _cells(a: np.ndarray) -> np.ndarray:
    """(64, 64, C) to the four places (4, 1024, C), in the order of `PLACES`."""
    return a.reshape(2, CELL, 2, CELL, -1).swapaxes(1, 2).reshape(4, CELL * CELL, -1)


@cache
def _fill() -> np.ndarray:
    """How much of each pixel the fill covers in every pose, (P, 1024)."""
    return np.stack([alpha(*pose).ravel() for pose in POSES])


@cache
def _ink() -> np.ndarray:
    """How much of each pixel the comic outline shows in every pose, (P, 1024)."""
    return np.stack([alpha(*pose, outline=True).ravel() for pose in POSES]) * (1 - _fill())


@cache
def _colours(style: str) -> np.ndarray:
    return np.stack([colour_pixel(c, style) for c in COLOURS])


@cache
def _bare() -> np.ndarray:
    """The pixels (64, 64) that no object of the world can cover, jitter and outline included."""
    near = [abs(dx) <= JITTER and abs(dy) <= JITTER for _, dx, dy in POSES]
    return np.tile(((_fill() + _ink())[near].max(0) == 0).reshape(CELL, CELL), (2, 2))


@cache
def _energy(background: str, style: str) -> np.ndarray:
    """Squared difference |f (c - g) + k (INK - g)|^2 that each object makes to bare background g, (4, P, colours)."""
    f, k, c = _fill(), _ink(), _colours(style)
    g = _cells(background_pixels(background, style))
    g2 = np.square(g).sum(-1, keepdims=True)
    out = f**2 @ g2 - 2 * (f**2 @ g) @ c.T + (f**2).sum(1)[:, None] * np.square(c).sum(1)
    if style == "comic":
        ink = INK - g
        out += 2 * ((f * k) @ ink) @ c.T + k**2 @ np.square(ink).sum(-1, keepdims=True)
        out -= 2 * (f * k) @ (g * ink).sum(-1, keepdims=True)
    return out


def _explain(cells: np.ndarray, background: str, style: str) -> tuple[float, Scene]:
    """The best scene on a background and style, and its squared error: |d|^2 - 2 d.e + |e|^2, e what an object adds."""
    g = _cells(background_pixels(background, style))
    d = cells - g
    dot = (_fill() @ d) @ _colours(style).T - _fill() @ (d * g).sum(-1, keepdims=True)  # (4, P, colours)
    if style == "comic":
        dot = dot + _ink() @ (d * (INK - g)).sum(-1, keepdims=True)
    empty = np.square(d).sum((1, 2))
    gain = (2 * dot - _energy(background, style)).reshape(4, -1)
    best, objects = gain.argmax(1), []
    for i, place in enumerate(PLACES):
        if gain[i, best[i]] > 0:
            pose, colour = divmod(int(best[i]), len(COLOURS))
            shape, dx, dy = POSES[pose]
            objects.append(Object(shape, list(COLOURS)[colour], place, dx, dy))
    return float((empty - gain.max(1).clip(0)).sum()), Scene(background, style, tuple(objects))


def read(image: Image.Image | np.ndarray) -> Reading:
    """The scene in a picture: the four likeliest backgrounds by the bare pixels, then what explains all pixels best."""
    a = _array(image)
    bare = {(g, k): np.square(a - background_pixels(g, k))[_bare()].mean() for g in BACKGROUNDS for k in STYLES}
    likely = sorted(bare, key=bare.get)[:4]
    _, scene = min((_explain(_cells(a), *key) for key in likely), key=lambda fit: fit[0])
    error = a - pixels(scene)
    rms = np.sqrt(_cells(np.square(error)).mean((1, 2)))
    blocks = np.linalg.norm(error.reshape(2, 4, 8, 2, 4, 8, 3).mean((2, 5)), axis=-1)  # (2, 4, 2, 4) of 8x8 pixels
    stain = blocks.max((1, 3)).ravel()
    drawn = (pixels(scene) != pixels(Scene(scene.background, scene.style, ()))).any(-1)
    far = np.asarray(Image.fromarray(drawn.astype(np.uint8)).filter(ImageFilter.MaxFilter(5))) == 0
    background_rms = float(np.sqrt(np.square(error[_bare() & far]).mean()))
    return Reading(scene, background_rms, dict(zip(PLACES, rms.tolist())), dict(zip(PLACES, stain.tolist())))


def is_scene(image: Image.Image | np.ndarray) -> bool:
    """Whether a picture is a scene of the world, clean or not, or made of scenes, of which one in its tiles tells."""
    a = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    rows, columns = (range(0, side - SIZE + 1, SIZE) for side in a.shape[:2])
    corners = [(y, x) for y in rows for x in columns][:MOST_TILES]
    return any(read(a[y : y + SIZE, x : x + SIZE]).background_rms < 3 * MAX_RMS for y, x in corners)


def judge(image: Image.Image | np.ndarray, after: Scene, before: Scene | None = None) -> Verdict:
    """Whether a picture shows the scene `after`: background, style and every place right, and each cleanly drawn."""
    reading = read(image)
    limits, faults = _limits(reading.scene), {}
    for part in ("style", "background"):
        if getattr(reading.scene, part) != getattr(after, part):
            faults[part] = f"{part} is {getattr(reading.scene, part)}, not {getattr(after, part)}"
    if reading.background_rms > MAX_RMS:
        faults.setdefault("background", f"background is unclean (RMS {reading.background_rms:.0f})")
    for place in PLACES:
        seen, want = _at(reading.scene, place), _at(after, place)
        if _name(seen) != _name(want):
            faults[place] = f"{place} is {_name(seen)}, not {_name(want)}"
        elif seen and max(abs(seen.dx - want.dx), abs(seen.dy - want.dy)) > TOLERANCE:
            faults[place] = f"{place}: {_name(seen)} is out of position"
        elif reading.place_rms[place] > limits[place]:
            faults[place] = f"{place} is unclean (RMS {reading.place_rms[place]:.0f})"
        elif reading.place_stain[place] > MAX_STAIN:
            faults[place] = f"{place} is stained (by {reading.place_stain[place]:.0f})"
    why = "; ".join(faults.values())
    if before is None:
        return Verdict(not faults, why)
    changed = {part for part in ("style", "background") if getattr(before, part) != getattr(after, part)}
    changed |= {place for place in PLACES if _at(before, place) != _at(after, place)}
    return Verdict(not faults, why, edited=not faults.keys() & changed, kept=not faults.keys() - changed)


def _limits(scene: Scene) -> dict[str, float]:
    """The largest RMS with which each place counts as cleanly drawn."""
    contrast = np.square(pixels(scene) - background_pixels(scene.background, scene.style))
    share = MAX_SHARE[scene.style] * np.sqrt(_cells(contrast).mean((1, 2)))
    return dict(zip(PLACES, share.clip(MAX_RMS).tolist()))


def psnr(a: Image.Image | np.ndarray, b: Image.Image | np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures in decibels; infinite if they are the same."""
    error = np.square(_array(a) - _array(b)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def _at(scene: Scene, place: str) -> Object | None:
    return next((o for o in scene.objects if o.place == place), None)


def _name(o: Object | None) -> str:
    return f"{o.colour} {o.shape}" if o else "empty"
