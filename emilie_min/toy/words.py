"""What texts say of the small world: a text is a `Claim`, and `holds` whether a scene bears it out."""

import random
from dataclasses import dataclass

from . import world

Thing = tuple[str | None, str | None, str | None]  # shape, colour, place; None: any


@dataclass(frozen=True)
class Claim:
    """All of `things`, none of `gone`, and the background and style where given."""

    things: tuple[Thing, ...] = ()
    gone: tuple[Thing, ...] = ()
    background: str | None = None
    style: str | None = None


def holds(claim: Claim, scene: world.Scene) -> bool:
    if claim.background not in (None, scene.background) or claim.style not in (None, scene.style):
        return False
    there = [(o.shape, o.colour, o.place) for o in scene.objects]

    def found(want: Thing) -> bool:
        return any(all(w in (None, h) for w, h in zip(want, have)) for have in there)

    return all(map(found, claim.things)) and not any(map(found, claim.gone))


def part(scene: world.Scene, rng: random.Random) -> tuple[str, Claim]:
    """Some of what a scene's caption says, in its words."""
    things: list[Thing] = []
    texts = []
    for o in rng.sample(scene.objects, rng.choice([k for k in (0, 1, 1, 1, 2) if k <= len(scene.objects)])):
        colour, place = (o.colour if rng.random() < 0.85 else None), (o.place if rng.random() < 0.5 else None)
        things.append((o.shape, colour, place))
        texts.append(f"a {colour + ' ' if colour else ''}{o.shape}{' at the ' + place if place else ''}")
    background = scene.background if rng.random() < (0.25 if things else 0.6) else None
    style = scene.style if rng.random() < (0.25 if things or background else 1) else None
    words = (" and ".join(texts), background and f"on {background}", style and world.STYLE_CAPTIONS[style])
    return " ".join(word for word in words if word), Claim(tuple(things), (), background, style)


def asked(instruction: str) -> Claim:
    """What must be true of a picture after an instruction, one of `world.instructions`.

    That the rest is kept is beyond what one picture can say.
    """
    styles = {text: style for style, text in world.STYLE_TEXTS.items()}
    if instruction in styles:
        return Claim(style=styles[instruction])
    words = instruction.split()
    if words[0] == "change":
        return Claim(background=words[-1])
    if words[0] == "add":
        return Claim(things=((words[3], words[2], " ".join(words[-2:])),))
    old = words[2] if words[2] in world.COLOURS else None
    shape = words[3] if old else words[2]
    if words[0] == "make":
        return Claim(things=((shape, words[-1], None),), gone=((shape, old, None),) if old else ())
    if words[0] == "turn":
        return Claim(things=((words[-1], old, None),), gone=((shape, old, None),))
    return Claim(gone=((shape, old, None),))


def kind(instruction: str) -> str:
    """Which of `world.KINDS` an instruction of the world is."""
    if instruction in world.STYLE_TEXTS.values():
        return "style"
    first = instruction.partition(" ")[0]
    return {"make": "recolour", "turn": "shape", "change": "background"}.get(first, first)


def said(caption: str) -> world.Scene | None:
    """The scene that a caption of the world describes, objects in the middle of their places; None: it is none."""
    styles = sorted(world.STYLE_CAPTIONS.items(), key=lambda item: -len(item[1]))
    style = next((style for style, text in styles if text and caption.endswith(text)), None)
    rest = caption.removesuffix(world.STYLE_CAPTIONS[style]).strip() if style else ""
    things, _, background = rest.rpartition("on ")
    objects = []
    for text in filter(None, things.strip().split(" and ")):
        words = text.split()
        if len(words) != 7 or words[:1] + words[3:5] != ["a", "at", "the"]:
            return None
        objects.append(world.Object(words[2], words[1], " ".join(words[5:])))
    known = all(o.shape in world.SHAPES and o.colour in world.COLOURS and o.place in world.PLACES for o in objects)
    if style is None or background not in world.BACKGROUNDS or not known:
        return None
    return world.Scene(background, style, tuple(objects))
