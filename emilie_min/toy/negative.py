"""`python -m emilie_min.toy.negative OUT.json`: what negative and weighted instructions do in the small world.

Of each case the share of scenes that come out right. A weight is a part of the text scale, taken off.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ..canvas.canvas import Canvas, open
from ..checkpoint.writing import write_bytes
from ..loading import load
from . import world
from .evaluate import FIRST, mean
from .judge import judge, read

HEAD = 6 * 10**5  # the first scene's seed after `FIRST`
WEIGHTS = (0.1, 0.25, 0.5, 1.0)


def less(text: str, weight: float) -> dict:
    return {"further": [(text, -weight)]}


def cases(scene: world.Scene, seed: int) -> dict[str, tuple[str, dict, world.Scene]]:
    """Of each case an instruction, its settings, and the scene that is right."""
    rng = random.Random(f"negative {seed}")
    text, recoloured, _ = world.instruct(scene, f"{seed}", "recolour")
    other = rng.choice([c for c in world.COLOURS if c not in text and c not in {o.colour for o in scene.objects}])
    avoided = " ".join([*text.split()[:-1], other])
    look, _, _ = world.instruct(scene, f"{seed}", "style")
    one = rng.choice(scene.objects)
    gone = replace(scene, objects=tuple(o for o in scene.objects if o != one))
    added = f"add a {one.colour} {one.shape} at the {one.place}"
    remove, mixed = f"remove the {one.shape}", [(avoided, 0.5)]
    out = {"recolour": (text, {}, recoloured), "take out": (remove, {}, gone)}
    for w in WEIGHTS:
        out[f"recolour, less another colour: {w:g}"] = text, less(avoided, w), recoloured
        out[f"recolour, less another look: {w:g}"] = text, less(look, w), recoloured
        out[f"take out, less adding it: {w:g}"] = remove, less(added, w), gone
    for w in (1, 2, 4):
        out[f"only less adding it: {w}"] = "", {"allow_empty": True, **less(added, w)}, gone
    return out | {
        "recolour, and half of another colour": (text, {"further": mixed}, recoloured),
        "the same, less that colour: 1": (text, {"further": mixed, "negative": avoided}, recoloured),
    }


def halves(canvas: Canvas, scene: world.Scene, seed: int) -> dict[str, bool]:
    """A look that is taken off in one half of the steps, at the high noise levels or at the low ones."""
    text, recoloured, _ = world.instruct(scene, f"{seed}", "recolour")
    look, _, _ = world.instruct(scene, f"{seed}", "style")
    out = {}
    for name, there, then in (("first", look, None), ("last", None, look)):
        canvas.branch(0)
        canvas.edit(text, negative=there)
        out[f"recolour, less another look: 1, in the {name} half"] = judge(
            canvas.scrub(1, 0.5, negative=then), recoloured
        ).correct
    return out


def uncoloured(canvas: Canvas, scene: world.Scene, seed: int) -> dict[str, bool]:
    """An object of no said colour; where one is drawn, less its colour: is it of another, and all else right?"""
    rng = random.Random(f"uncoloured {seed}")
    place = rng.choice([p for p in world.PLACES if p not in {o.place for o in scene.objects}])
    shape = rng.choice([s for s in world.SHAPES if s not in {o.shape for o in scene.objects}])

    def colour(**settings) -> str:
        canvas.branch(0)
        image = canvas.edit(f"add a {shape} at the {place}", **settings)
        drawn = next((o for o in read(image).scene.objects if (o.place, o.shape) == (place, shape)), None)
        right = drawn and replace(scene, objects=(*scene.objects, replace(drawn, dx=0, dy=0)))
        return drawn.colour if right and judge(image, right).correct else ""

    first = colour()
    out = {"add, of any colour": bool(first)}
    if first:
        said = f"add a {first} {shape} at the {place}"
        out |= {f"add, less the colour it got: {w:g}": colour(**less(said, w)) not in ("", first) for w in WEIGHTS}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.json", help="where to write; a run goes on with what is there")
    parser.add_argument("--scenes", type=int, default=40)
    args = parser.parse_args()
    editor = load(device="cpu", compile=None)
    found = json.loads(args.out.read_text()) if args.out.exists() else {"outcomes": {}}
    outcomes = found.pop("outcomes")
    for seed in tqdm(range(len(outcomes.get("recolour", [])), args.scenes)):
        scene = world.scene(FIRST + HEAD + seed)
        canvas, right = open(world.render(scene), editor, seed=seed), {}
        for name, (text, settings, truth) in cases(scene, seed).items():
            canvas.branch(0)
            right[name] = judge(canvas.edit(text, **settings), truth).correct
        right |= halves(canvas, scene, seed) | uncoloured(canvas, scene, seed)
        for name, correct in right.items():
            outcomes.setdefault(name, []).append(correct)
        found = {"model": editor.model, "scenes": seed + 1, "right": {n: mean(each) for n, each in outcomes.items()}}
        write_bytes((json.dumps(found | {"outcomes": outcomes}) + "\n").encode(), args.out)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
