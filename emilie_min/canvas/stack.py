"""The stack: take back, hide, change or move any edit of a canvas, and keep the others.

What an edit does depends on the picture that it finds, so without edit k the later ones have to be made anew. But most
of them never saw it. Where an edit left the latent another than it found it, see `support`, it changed something: E. A
later edit is looked at as it was, from a to b; now it finds a', which other edits led to. Where those did is S.

- No such edit: b, to the bit.
- S and E apart: b, and a' in S. Masks that are apart need no network call; without one the instruction might act on
  what has come back in S, as a look does. One call tells, see `Walk.acts`.
- Else the edit is made once more, within S and E, or S where it acts there, and held to that outside; but for an inset
  that was kept as it is, which stays b in E.

So outside S every bit of b stays, of the latent and of the picture. Noise is keyed by an edit's seed and by its depth,
which it keeps wherever it moves. A stack that was there before is taken from the tree: hidden and shown again gives the
same bits.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import CanvasError, printable, quote
from ..sampling import Step
from . import images, regions
from .images import Mask
from .regions import Asked
from .settings import Settings, as_finite, as_part, whole
from .state import State

APART, REACH = 0.35, 1  # how far a scaled latent, of unit variance, is another; cells around that count too
STEPS = 0.5  # the part of an edit's steps that it takes where what is around it is known
LEVEL, ACTS = 8.0, 0.15  # of noise; the part of the largest difference from which an instruction acts somewhere
WAYS = ("support", "replay")  # to make later edits anew: as above, or each in full
CHANGES = ("retract", "hide", "show", "move", "strength", "revise", "scrub")
SCRUBBED = {"text_scale", "image_scale", "gate", "soft", "negative", "further", "guidance_interval", "keep_background"}

Made = Generator[Step, None, State]


@dataclass(frozen=True)
class Layer:
    """An edit as it is asked for, whatever it is made on."""

    texts: tuple[str, ...]
    masks: tuple[Image.Image | None, ...]  # at working size
    settings: dict  # of `State.settings`
    depth: int
    shown: bool = True
    strength: float = 1.0
    given: Image.Image | None = None  # their union at the photo's size
    inserted: dict | None = None  # of `State`; with "kept" it is no edit by words, and never drawn anew

    @staticmethod
    def of(state: State, depth: int) -> "Layer":
        texts, masks = zip(*(state.regions or [(state.instruction, state.mask)]))
        depth = depth if state.depth is None else state.depth
        how = depth, bool(state.shown), state.strength, state.given, state.inserted
        return Layer(texts, masks, state.settings, *how)

    @cached_property
    def key(self) -> tuple:
        """What its result depends on, besides its input."""
        masks = tuple(None if mask is None else mask.tobytes() for mask in self.masks)
        own = [sorted(own.items()) for own in self.settings.get("own", [])]
        more = repr(self.told()), repr(own), repr(self.settings.get("scrubbed")), repr(self.inserted)
        given = None if self.given is None else self.given.tobytes()
        return self.texts, masks, given, *more, self.depth, self.shown, self.strength

    @property
    def kept(self) -> bool:
        return self.inserted is not None and "kept" in self.inserted

    def told(self, **changes) -> Settings:
        """Its settings, with changes: what its record has of `Settings`, not what it keeps of other things."""
        known = {field.name for field in fields(Settings)}
        record = {name: value for name, value in self.settings.items() if name in known}
        return Settings(**record | {"allow_empty": True} | changes)

    def asked(self, canvas) -> tuple[Asked, Settings]:
        settings, own = self.told(), self.settings.get("own", [{} for _ in self.texts])
        return canvas.asked(list(self.texts), self.masks, own, settings)._replace(given=self.given), settings


@dataclass
class Walk:
    """From the opened picture through the edits that are wanted, making what no state of the tree holds yet."""

    canvas: object
    way: str
    calls: int = 0  # of the network, each of all branches at one noise level
    remade: Tensor | None = None  # where the network worked, (1, 1, h, w)

    def __post_init__(self) -> None:
        self.states, self.layers = list(self.canvas.states), {}
        self.recipe = {0: ()}  # of a state: the keys of the edits that it shows
        self.nodes: dict[tuple, int] = {}  # the number of a state by its parent's and its edit's key
        self.made: dict[tuple, int] = {}  # by its recipe, the first of such
        for i in range(1, len(self.states)):
            self.enter(i)
        self.today = {layer.depth: (layer, state) for layer, state in zip(layers(self.canvas), self.canvas.stack)}

    def enter(self, i: int) -> None:
        """Know state i, which is there."""
        state, number, above = self.states[i], 0, self.states[i].parent
        while above:
            number, above = number + (above in self.layers), self.states[above].parent
        if state.shown is None:
            self.recipe[i] = ()
            return
        layer = self.layers[i] = Layer.of(state, number)
        self.recipe[i] = self.recipe[state.parent] + ((layer.key,) if layer.shown else ())
        self.nodes.setdefault((state.parent, layer.key), i)
        self.made.setdefault(self.recipe[i], i)

    def through(self, wanted: list[Layer]) -> Generator[Step, None, int]:
        """The number of the state at which they end; all new ones are appended to `states`."""
        at, kept = 0, True
        for layer in wanted:
            number = self.nodes.get((at, layer.key))
            kept &= number is not None and any(self.states[number] is state for _, state in self.today.values())
            if number is None or self.way == "replay" and not kept:
                state = yield from self.make(layer, at)
                number = len(self.states)
                self.states.append(state)
                self.enter(number)
            at = number
        return at

    def make(self, layer: Layer, at: int) -> Made:
        """One edit on a state: from the tree, from what it was before, or by the network."""
        parent = self.states[at]
        several = list(zip(layer.texts, layer.masks)) if len(layer.texts) > 1 else []
        state = State(" + ".join(layer.texts), parent.latent, parent.image, at, None, layer.settings, None, several)
        state.depth, state.shown, state.strength = layer.depth, layer.shown, layer.strength
        state.inserted = layer.inserted
        asked, settings = layer.asked(self.canvas)
        state.mask, state.given = regions.joined(asked), asked.given
        if not layer.shown:
            return state
        known = self.made.get((*self.recipe[at], layer.key))
        if known is not None and self.way == "support":
            return replace(
                state, latent=self.states[known].latent, image=self.states[known].image, f=self.states[known].f
            )
        if layer.strength != 1:
            whole = replace(layer, strength=1.0)
            known = self.made.get((*self.recipe[at], whole.key))
            if known is None:
                known = len(self.states)
                self.states.append((yield from self.make(whole, at)))
                self.enter(known)
            full = self.states[known]
            changed = support(parent.latent, full.latent)[1]
            state.f, state.latent = full.f, parent.latent.lerp(full.latent, layer.strength)
        else:
            yield from self.again(state, layer, asked, settings)
            changed = support(parent.latent, state.latent)[1]
        before, today = self.today.get(layer.depth, (None, None))
        if before is not None and before.shown and before.key != layer.key and self.way == "support":
            changed |= support(self.states[today.parent].latent, today.latent)[1]  # this edit itself is another now
            state.latent = torch.where(changed, state.latent, today.latent)
        pair, like = self.pair(layer), today
        if before is None or not before.shown:
            like = None if pair is None else self.states[pair]
        state.image = self.canvas_at(at).picture(state, like if self.way == "support" else None)
        return state

    def again(self, state: State, layer: Layer, asked: Asked, settings: Settings) -> Iterator[Step]:
        """Give `state` its latent."""
        pair, within = self.pair(layer) if self.way == "support" and settings.gate != "eq8" else None, None
        scratch = self.canvas_at(state.parent)
        if pair is not None:
            a, b = self.states[self.states[pair].parent], self.states[pair]
            others = {*self.recipe[b.parent]} ^ {*self.recipe[state.parent]}
            if not others:
                state.latent, state.f = b.latent, b.f
                return
            parent, edges = self.states[state.parent].latent, [self.changed(key) for key in others]
            core, where = (torch.stack(part).any(0) for part in zip(*edges))
            mine, reach = support(a.latent, b.latent)
            state.latent, state.f = torch.where(where & ~mine, parent, b.latent), b.f
            if layer.kept:
                return
            if self.acts(asked, settings, scratch, core & ~mine):
                reach = where
            elif not (core & mine).any():
                return
            within = (where & reach).float(), torch.where(where, parent, b.latent)
        elif layer.kept:
            raise CanvasError(f"{printable(layer.texts[0], 60)!r} is an inset that was kept: it cannot be drawn anew")
        for step in self.steps(layer, scratch, within):
            self.calls += step.sigma > 0
            yield step
        state.kept = scratch.state.kept if within is None else {}
        state.latent, state.f = scratch.state.latent, scratch.state.f
        where = torch.ones_like(state.latent[:, :1]) > 0 if within is None else within[0] > 0
        self.remade = where if self.remade is None else self.remade | where

    def acts(self, asked: Asked, settings: Settings, scratch, where: Tensor) -> bool:
        """Whether an edit would do something there that it did not before, as where an object has come back.

        One call tells, at noise level `LEVEL`: how far apart the branches with and without instruction are there.
        """
        most = where.float().mean() > 0.5  # a look that is gone: of what it was on the instruction knew
        where = where if asked.union is None else where & (asked.union > 0)
        if most or not where.any():
            return False
        self.calls += 1
        z_img = scratch.image_latent(settings.rescale, settings.iterate)[0]
        apart = regions.differences(scratch.editor, z_img, scratch.latent + LEVEL * scratch.z_init, LEVEL, asked.texts)
        return (apart[where].mean() > ACTS * apart.max()).item()

    def steps(self, layer: Layer, scratch, within: tuple[Tensor, Tensor] | None) -> Iterator[Step]:
        """An edit's steps on a canvas, of one that was scrubbed first those of the edit that it goes on from."""
        (asked, settings), part, start = layer.asked(self.canvas), 1.0 if within is None else STEPS, None
        if (scrubbed := layer.settings.get("scrubbed")) is not None:
            number = next(i for i, state in enumerate(self.states) if state.id == scrubbed["of"])
            step, of = round(part * scrubbed["step"]), self.states[number]
            x = of.kept.get(step) if within is None and of.parent == scratch.at else None
            if x is None:
                before = self.steps(replace(self.layers[number], shown=True, strength=1.0), scratch, within)
                for each in before:
                    if each.i == step:
                        x, self.calls = each.x.cpu(), self.calls + 1
                        break
                    yield each
            start = step, x
        yield from scratch.run(
            asked, replace(settings, steps=math.ceil(part * settings.steps)), layer.depth, within, start
        )

    def pair(self, layer: Layer) -> int | None:
        """A state that this edit led to: today's, else the last; None: it was never made."""
        mine = [i for i, other in self.layers.items() if other.key == layer.key]
        _, today = self.today.get(layer.depth, (None, None))
        return next((i for i in mine if self.states[i] is today), max(mine, default=None))

    def changed(self, key: tuple) -> tuple[Tensor, Tensor]:
        """Where the edit of this key changed something, at its full strength, see `support`."""
        whole = (*key[:-1], 1.0)
        i = max(i for i, layer in self.layers.items() if layer.key == whole)
        return support(self.states[self.states[i].parent].latent, self.states[i].latent)

    def canvas_at(self, at: int):
        """A canvas of its own at a state, to edit there."""
        return replace(self.canvas, states=list(self.states), at=at, redo_stack=[])


def support(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where two scaled latents are far apart, and where they are apart at all; (1, 1, h, w) of bool both.

    By more than twice `APART` in a channel, and by `APART`, or by a half and a quarter of the most where that is less;
    and in the cells around; everywhere if most cells are apart by half of that, as a look leaves them. Never where they
    are equal to the bit, as a mask keeps them.
    """
    apart = (a - b).abs().amax(1, keepdim=True)
    if (apart > min(APART, apart.max().item() / 4) / 2).float().mean() > 0.5:
        return apart > 0, apart > 0
    levels = [min(part * APART, part / 4 * apart.max().item()) for part in (2, 1)]
    far, near = (F.max_pool2d((apart > level).float(), 2 * REACH + 1, 1, REACH) > 0 for level in levels)
    return far & (apart > 0), near & (apart > 0)


def kept(image: Image.Image, latent: Tensor, like: State) -> Image.Image:
    """A latent's picture, but another state's pixels where the latents are equal to the bit.

    What a decoder makes of a cell depends a little on all the others: where they are equal the pictures are a tint
    apart, by which the rest is shifted, so that no seam shows.
    """
    apart = (latent != like.latent).any(1, keepdim=True)
    if apart.all():
        return image
    mask = F.interpolate(apart.byte() * 255, size=image.size[::-1])[0, 0].numpy()
    new, old = (np.asarray(each, np.float32) for each in (image, like.image))
    tinted = new + np.median((old - new)[mask == 0], axis=0)
    image = Image.fromarray(tinted.round().clip(0, 255).astype(np.uint8))
    return images.paste_back(image, like.image, Image.fromarray(mask), image.width // apart.shape[-1] // 2)


def layers(canvas) -> list[Layer]:
    return [Layer.of(state, depth) for depth, state in enumerate(canvas.stack)]


def wanted(canvas, change: str, k: int, *more, **revised) -> list[Layer]:
    """The stack after a change. Raises CanvasError and what an edit raises."""
    edits = layers(canvas)
    if change not in CHANGES:
        raise CanvasError(f"no change {quote(change)} of the stack: choose from {', '.join(CHANGES)}")
    at = place(k, len(edits))
    one = edits[at]
    if change == "retract":
        del edits[at]
    elif change in ("hide", "show"):
        if one.shown == (change == "show"):
            raise CanvasError(f"edit {k} is {'shown' if one.shown else 'hidden'} already")
        edits[at] = replace(one, shown=not one.shown)
    elif change == "move":
        edits.insert(place(*more, len(edits)), edits.pop(at))
    elif change == "strength":
        (strength,) = more
        if not 0 <= (strength := as_finite(strength, "strength")) <= 1:
            raise CanvasError(f"strength is from 0, as before the edit, to 1, all of it, not {strength:g}")
        edits[at] = replace(one, strength=strength)
    elif change == "scrub":
        edits[at] = scrub(canvas, one, canvas.stack[at], *more, **revised)
    else:
        edits[at] = revise(canvas, one, **revised)
    return edits


def scrub(canvas, layer: Layer, state: State, part: float, **revised) -> Layer:
    """An edit that goes on from a step of the one that led to `state`, see `Canvas.scrub`."""
    settings, part = layer.asked(canvas)[1], as_part(part, "part")
    if other := revised.keys() - {"instruction", "mask"} - SCRUBBED:
        raise CanvasError(f"{min(other)} cannot change within an edit, only {', '.join(sorted(SCRUBBED))}")
    if settings.sampler != "euler_ancestral" or settings.reuse > 1 or settings.reuse_guidance is not None:
        raise CanvasError("only an edit by euler_ancestral that reuses nothing can change within: others remember more")
    changed = revise(canvas, layer, **revised)
    step = round((1 - part) * settings.steps)
    return replace(
        changed, settings=changed.settings | {"scrubbed": {"step": step, "of": state.id}} if step else changed.settings
    )


def place(k: object, n: int) -> int:
    number = whole(k)
    if number is None or not 1 <= number <= n:
        raise CanvasError(f"no edit {quote(k)}: " + (f"the stack has edits 1 to {n}" if n else "the stack has none"))
    return number - 1


def revise(
    canvas,
    layer: Layer,
    instruction: object = None,
    mask: Mask | None = ...,
    **changes,  # type: ignore[assignment]
) -> Layer:
    """An edit with another instruction, mask (None: everywhere; ... : as it was) or other settings."""
    own = layer.settings.get("own", [])
    settings = layer.told(**changes).resolve(canvas.editor.config.sampling, canvas.seed)
    if instruction is None and mask is ...:
        texts, masks, union = layer.texts, layer.masks, layer.given
    else:
        if instruction is None or isinstance(instruction, str):
            if len(layer.texts) > 1:
                raise CanvasError("this edit has several instructions: give all of them, [(instruction, mask), ...]")
            instruction = [
                (layer.texts[0] if instruction is None else instruction, layer.masks[0] if mask is ... else mask)
            ]
            same, mask = mask is ..., None
        else:
            same = False
        texts, given, own = regions.read(instruction, None if mask is ... else mask, False)
        asked = canvas.asked(texts, given, own, settings)
        masks, union = asked.masks, layer.given if same else asked.given
    record = settings.record() | ({"own": own} if any(own) else {})
    return replace(layer, texts=tuple(texts), masks=tuple(masks), given=union, settings=record, inserted=None)


def change(canvas, name: str, k: int, *more, way: str = "support", **revised) -> Iterator[Step]:
    """A change of the stack, step by step: what is given is checked at once, the states are added after the last step.

    The last new state is the result, and its `made` says how it came to be. Whoever stops in between leaves the canvas
    as it was.
    """
    if not isinstance(way, str) or way not in WAYS:
        raise CanvasError(f"no way {quote(way)}: choose from {', '.join(WAYS)}")
    edits = wanted(canvas, name, k, *more, **revised)
    return _change(canvas, Walk(canvas, way), edits, {"change": name, "edit": k, "way": way})


def _change(canvas, walk: Walk, edits: list[Layer], made: dict) -> Iterator[Step]:
    end = yield from walk.through(edits)
    states = walk.states
    if made["change"] == "move" and walk.made[walk.recipe[end]] == end >= len(canvas.states):  # all still shows
        where, result = walk.remade, states[end]
        result.latent = canvas.state.latent if where is None else torch.where(where, result.latent, canvas.state.latent)
        result.image = canvas.image if where is None else walk.canvas_at(end).picture(result, canvas.state)
    if end < len(canvas.states):  # it was there before: its like, so that undo leads back from it
        settings = Settings().resolve(canvas.editor.config.sampling, canvas.seed).record()
        root = State("", states[0].latent, states[0].image, 0, settings=settings, shown=None)
        states.append(replace(states[end], id=root.id) if end else root)
    states[-1].made = made | {"from": canvas.state.id, "calls": walk.calls}
    canvas.states, canvas.redo_stack = states, []
    canvas.at = len(states) - 1
