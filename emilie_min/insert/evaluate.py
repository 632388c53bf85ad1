"""Measure the small models of object insertion, apart and together, on what no training saw.

    python -m emilie_min.insert.evaluate --out weights/toy-insert.eval.json
    python -m emilie_min.insert.evaluate --keep 30 --out weights/toy-insert.eval.json   # the entry "keep" alone

Every rate is over 200 unseen pairs or pictures (`--pairs`); chance stands beside it.
"""

import argparse
import itertools
import json
import random
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..bench.metrics import ClipScorer
from ..canvas.canvas import open as open_canvas
from ..canvas.insets import Inset
from ..checkpoint.writing import write_bytes
from ..emilie import Editor
from ..loading import load, shipped
from ..toy import judge, world
from . import graconet, insertion, pairs
from .caption import Captioner
from .pairs import Pair
from .train_words import UNSEEN, inset

KEPT = 61_500_000  # the first pair that `keeping` is measured on
CODES, AMONG = 8, 100  # proposals of a pair; captions to choose from


def share(outcomes: list[bool]) -> float:
    return round(float(np.mean(outcomes)), 3)


def mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 1)


def proposals(net: graconet.GracoNet | None, n: int, how: str = "as it is") -> dict:
    """How often boxes are right (`Pair.reached`): GracoNet's or, without it, the right size in any of the places."""
    first, every, kinds, several = [], [], {True: [], False: []}, []
    rng = random.Random("chance")
    for i in range(n):
        p = pairs.pair(pairs.UNSEEN + i).varied(how)
        if net is None:
            boxes = [guess(p, rng) for _ in range(CODES)]
        else:
            boxes = net.propose(p.base, p.inset, p.mask, CODES, seed=i)
        places = [p.reached(box) for box in boxes]
        first.append(places[0] is not None)
        kinds[p.whole].append(first[-1])
        every += [place is not None for place in places]
        if len(p.free) > 1:
            several.append(len(set(places) - {None}) > 1)
    return {
        "pairs": n,
        "first proposal right": share(first),
        "whole tiles": share(kinds[True]),
        "cut to the object": share(kinds[False]),
        f"all {CODES} proposals right": share(every),
        f"pairs of several free places where {CODES} codes reach more than one": [sum(several), len(several)],
    }


def guess(p: Pair, rng: random.Random) -> graconet.Box:
    """The right size, in the middle of any of the four places."""
    y, x = rng.choice(list(world.PLACES.values()))
    w, h = p.inset.size
    return x + (world.CELL - w) // 2, y + (world.CELL - h) // 2, w, h


def captions(captioner: Captioner, n: int) -> dict:
    """How often captions are right, word for word."""
    out = {}
    for name, ground, style in (("insets on white", "white", None), ("insets on any ground", "any", None)):
        drawn = [inset(random.Random(f"{UNSEEN + i} {name}"), ground, style) for i in range(n)]
        out[name] = share([captioner(picture) == caption for picture, caption in drawn])
    found = [pairs.pair(pairs.UNSEEN + i) for i in range(n)]
    out["insets of the pairs"] = share([captioner(p.inset) == p.caption for p in found])
    for name, held_out in (("scenes", False), ("scenes with held-out pairs", True)):
        scenes = [world.scene(UNSEEN + i, held_out) for i in range(n)]
        out[name] = share([captioner(world.render(s)) == world.caption(s) for s in scenes])
    return out


def retrieval(clip: ClipScorer, n: int) -> float:
    """How often a picture's caption scores best among `AMONG` of different scenes."""
    scenes = [world.scene(UNSEEN + i) for i in range(max(n, AMONG))]
    images, hits = clip.image([world.render(s) for s in scenes]), []
    captions = {world.caption(s) for s in scenes}
    for i, scene in enumerate(scenes[:n]):
        own = world.caption(scene)
        others = random.Random(f"among {i}").sample(sorted(captions - {own}), AMONG - 1)
        hits.append(int((clip.text([own, *others]) @ images[i]).argmax()) == 0)
    return share(hits)


def together(editor: Editor, net: graconet.GracoNet, captioner: Captioner, n: int) -> dict:
    """`insertion.plan` and its edit, first proposal, all settings as they come: object, place, the rest kept."""
    right, parts, mistakes = [], Counter(), []
    for i in tqdm(range(n), desc="insertions"):
        p = pairs.pair(pairs.UNSEEN + i)
        canvas = open_canvas(p.base, editor, seed=i)
        planned = insertion.plan(canvas, p.inset, p.mask, proposer=net, captioner=captioner)
        for _ in planned.steps():
            pass
        placed, told = p.reached(planned.boxes[0]) is not None, planned.caption == p.caption
        drawn = p.right(canvas.image)
        right.append(drawn)
        parts.update(place=placed, caption=told, both=placed and told, drawn=placed and told and drawn)
        if not drawn:
            fault = "the box" if not placed else "the caption" if not told else "the drawing"
            seen = judge.judge(canvas.image, p.scene).why
            mistakes.append({"pair": pairs.UNSEEN + i, "fault": fault, "told": planned.instruction(), "new": seen})
    return {
        "pairs": n,
        "right": share(right),
        "place right": parts["place"] / n,
        "caption right": parts["caption"] / n,
        "drawn right where both are": round(parts["drawn"] / max(1, parts["both"]), 3),
        "what is to blame": dict(Counter(each["fault"] for each in mistakes)),
        "mistakes": mistakes,
    }


def keeping(editor: Editor, n: int, levels: tuple[float, ...] = (0.1, 0.17, 0.25, 0.34, 0.5, 1.0)) -> dict:
    """`Plan.keep_steps` at several levels, beside the plain paste and EMILIE's own object.

    "another style": insets in another style than the scene's, put into a free place. right: to the judge, in the
    scene's style; off: mean difference from the right picture in that place, grey levels.
    "another colour": insets in a colour between two of the world's, which no word says. off: how far the object's
    colour is from the inset's.
    """
    found: dict = {"another style": {}, "another colour": {}}
    pairs_of_other_styles = filter(lambda p: p.style != p.scene.style, map(pairs.pair, itertools.count(KEPT)))
    for i, p in enumerate(itertools.islice(pairs_of_other_styles, n)):
        place = p.free[0]
        x0, y0, *_ = (int(v) for v in pairs.right_boxes(p)[list(world.PLACES).index(place)])
        own = replace(p.thing, place=place) if p.whole else replace(p.thing, place=place, dx=0, dy=0)
        truth = replace(p.scene, objects=(*p.scene.objects, own))
        for how, image in kept(editor, p, (x0, y0, *p.inset.size), levels, i).items():
            off = np.abs(cell(image, place) - cell(world.render(truth), place)).mean()
            found["another style"].setdefault(how, []).append((judge.judge(image, truth).correct, off))
    for i in range(n):
        p = pairs.pair(KEPT + i)
        other = random.Random(i).choice([c for c in world.COLOURS if c != p.thing.colour])
        style, size = p.scene.style, world.CELL
        ground = world.background_pixels(p.scene.background, style)[:size, :size]
        colour = 0.6 * world.colour_pixel(p.thing.colour, style) + 0.4 * world.colour_pixel(other, style)
        cover = world.alpha(p.thing.shape, 0, 0)
        tile = Image.fromarray((ground + cover * (colour - ground) + 0.5).astype(np.uint8))
        mask = Image.fromarray((cover[..., 0] * 255 + 0.5).astype(np.uint8))
        p, place = replace(p, inset=tile, mask=mask), p.free[0]
        y, x = world.PLACES[place]
        for how, image in kept(editor, p, (x, y, world.CELL, world.CELL), levels, i).items():
            off = np.abs(cell(image, place)[cover[..., 0] == 1].mean(0) - colour).mean()
            found["another colour"].setdefault(how, []).append(off)
    style = {
        how: {"right": share([right for right, _ in each]), "off": mean([off for _, off in each])}
        for how, each in found["another style"].items()
    }
    colour = {how: {"off": mean(each)} for how, each in found["another colour"].items()}
    return {"pairs": n, "another style": style, "another colour": colour}


def kept(editor: Editor, p: Pair, box: graconet.Box, levels: tuple[float, ...], seed: int) -> dict[str, Image.Image]:
    """The plain paste, what is kept at each level, and a new object."""
    canvas = open_canvas(p.base, editor, seed=seed)
    planned = insertion.Plan(canvas, Inset(p.inset, p.inset, p.mask), p.caption, [box], insertion.FORMATS[1])
    out = {"paste": planned.pasted()}
    ways = {f"keep {level:g}": planned.keep_steps(level=level) for level in levels} | {"new object": planned.steps()}
    for how, steps in ways.items():
        for _ in steps:
            pass
        out[how] = canvas.image
        canvas.undo()
    return out


def cell(image: Image.Image, place: str) -> np.ndarray:
    y, x = world.PLACES[place]
    return np.asarray(image, float)[y : y + world.CELL, x : x + world.CELL]


def evaluate(editor: Editor, n: int = 200) -> dict:
    net, captioner = insertion.load_proposer(editor), insertion.load_captioner(editor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of boxes that pass the edge by a pixel
        found = {
            "graconet": {how: proposals(net, n, how) for how in pairs.VARIANTS} | {"chance": proposals(None, n)},
            "blip2": captions(captioner, n),
            "clip, the right caption of 100": {
                name: retrieval(ClipScorer(shipped(f"{name}/config.json").parent), n)
                for name in ("toy-clip", "toy-clip-captions")
            },
            "insertion": together(editor, net, captioner, n),
        }
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument(
        "--keep", type=int, metavar="N", help="only `keeping`, over N pairs of each kind; --out keeps the rest"
    )
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    editor = load(device="cpu")
    found = evaluate(editor, args.pairs) if args.keep is None else {"keep": keeping(editor, args.keep)}
    if args.out and args.out.exists():
        found = json.loads(args.out.read_text(encoding="utf-8")) | found
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        write_bytes(f"{text}\n".encode(), args.out)


if __name__ == "__main__":
    main()
