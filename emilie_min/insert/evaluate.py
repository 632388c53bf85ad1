"""Measure the small models of object insertion, apart and together, on what no training saw.

    python -m emilie_min.insert.evaluate --out weights/toy-insert.eval.json

Every rate is over 200 unseen pairs or pictures (`--pairs`); chance stands beside it.
"""

import argparse
import json
import random
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..bench.metrics import ClipScorer
from ..canvas.canvas import open as open_canvas
from ..checkpoint.writing import write_bytes
from ..emilie import Editor
from ..loading import load, shipped
from ..toy import judge, world
from . import graconet, insertion, pairs
from .caption import Captioner
from .pairs import Pair
from .train_words import UNSEEN, inset

CODES, AMONG = 8, 100  # proposals of a pair; captions to choose from


def share(outcomes: list[bool]) -> float:
    return round(float(np.mean(outcomes)), 3)


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
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    text = json.dumps(evaluate(load(device="cpu"), args.pairs), indent=1)
    print(text)
    if args.out:
        write_bytes(f"{text}\n".encode(), args.out)


if __name__ == "__main__":
    main()
