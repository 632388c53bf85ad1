"""Pairs of the small world: a base with one to three free places, and the picture of an object that is not in it."""

import random
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from ..toy import judge, world
from . import graconet
from .graconet import Box

FIRST_SEED, UNSEEN = 5 * 10**9, 61_000_000  # training's first seed, evaluation's; in between and below lie tests'
NEAR = 3  # px that a box may be off the inset's right size, and may pass the edges of its free place
VARIANTS = {"as it is": 0.7, "rectangle": 0.12, "black": 0.12, "white": 0.06}  # of insets, and how often in training


@dataclass(frozen=True)
class Pair:
    """A scene with room, and an inset. thing: as it stands in its own picture, so its place says nothing."""

    scene: world.Scene
    thing: world.Object
    style: str  # of the inset
    inset: Image.Image
    mask: Image.Image
    whole: bool  # the inset is a whole place of 32x32 px, not cut to its object

    @cached_property
    def base(self) -> Image.Image:
        return world.render(self.scene)

    @property
    def free(self) -> list[str]:
        taken = {o.place for o in self.scene.objects}
        return [place for place in world.PLACES if place not in taken]

    @property
    def caption(self) -> str:
        return f"a {self.thing.colour} {self.thing.shape}"

    def right(self, image: Image.Image, exact: bool = False) -> bool:
        """Whether a picture is, to the world's judge, the scene with the object in some free place, and all else kept.

        exact: off the place's middle as in its own picture; else in the middle. Both within the judge's tolerance.
        """
        moved = {} if exact else {"dx": 0, "dy": 0}
        after = [replace(self.thing, place=place, **moved) for place in self.free]
        scenes = [replace(self.scene, objects=(*self.scene.objects, thing)) for thing in after]
        return any(judge.judge(image, scene).correct for scene in scenes)

    def reached(self, box: Box) -> str | None:
        """The free place that a box lies in, up to `NEAR` px; none if it is too small or too large for the inset."""
        x, y, w, h = box
        if max(abs(w - self.inset.width), abs(h - self.inset.height)) <= NEAR:
            for name in self.free:
                top, left = world.PLACES[name]
                if min(x - left, y - top, left + world.CELL - x - w, top + world.CELL - y - h) >= -NEAR:
                    return name
        return None

    def varied(self, how: str) -> "Pair":
        """The same with "black" or "white" where the mask is empty, or with no mask but the inset's "rectangle"."""
        if how == "rectangle":
            return replace(self, mask=Image.new("L", self.mask.size, 255))
        if how == "as it is":
            return self
        ground = Image.new("RGB", self.inset.size, how)
        return replace(self, inset=Image.composite(self.inset, ground, self.mask.point(lambda v: 255 if v else 0)))


def pair(seed: int) -> Pair:
    """One to three objects of a scene; an object of another shape and colour on a ground of its own.

    The inset is in the scene's style (seven of ten) or in any; a whole place, or cut to what the object covers and up
    to 3 px more. Its mask is the object's coverage, the comic outline included.
    """
    rng = random.Random(f"insert {seed}")
    scene = world.scene(seed)
    scene = replace(scene, objects=tuple(rng.sample(scene.objects, rng.randint(1, len(scene.objects)))))
    shapes, colours = ({getattr(o, what) for o in scene.objects} for what in ("shape", "colour"))
    new = [(s, c) for s in world.SHAPES for c in world.COLOURS if s not in shapes and c not in colours]
    shape, colour = rng.choice([(s, c) for s, c in new if (c, s) not in world.HELD_OUT])
    jitter = rng.randint(-world.JITTER, world.JITTER), rng.randint(-world.JITTER, world.JITTER)
    thing = world.Object(shape, colour, rng.choice(list(world.PLACES)), *jitter)
    style = scene.style if rng.random() < 0.7 else rng.choice(world.STYLES)

    y, x = world.PLACES[thing.place]
    ground = world.background_pixels(rng.choice(list(world.BACKGROUNDS)), style)[y : y + world.CELL, x : x + world.CELL]
    tile = (world.draw(ground, thing, style) + 0.5).astype(np.uint8)
    cover = (world.alpha(shape, *jitter, outline=style == "comic")[..., 0] * 255 + 0.5).astype(np.uint8)
    whole = rng.random() < 0.5
    if not whole:
        margin = rng.randint(0, 3)
        ys, xs = (np.flatnonzero(cover.any(axis)) for axis in (1, 0))
        cut = tuple(slice(max(a[0] - margin, 0), a[-1] + 1 + margin) for a in (ys, xs))
        tile, cover = tile[cut], cover[cut]
    return Pair(scene, thing, style, Image.fromarray(tile), Image.fromarray(cover), whole)


def right_boxes(p: Pair) -> np.ndarray:
    """Left, top, right, bottom of the inset in the middle of every place, (4, 4) float32; NaN where it is taken."""
    out = np.full((len(world.PLACES), 4), np.nan, np.float32)
    for i, name in enumerate(world.PLACES):
        if name in p.free:
            middle, half = np.array(world.PLACES[name])[::-1] + world.CELL / 2, np.array(p.inset.size) / 2
            out[i] = (*(middle - half), *(middle + half))
    return out


def pasted(p: Pair, box: Box) -> Image.Image:
    return graconet.paste(p.base, p.inset, p.mask, box)
