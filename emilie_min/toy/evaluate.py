"""`emilie toy-eval`: the shipped model measured against the small world, where every right answer is known.

Scenes come from seeds below `train.FIRST_SEED`, so training never saw them. Every edit goes through `Canvas.edit`.
"""

import itertools
import json
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..canvas import images
from ..canvas.canvas import Canvas, open
from ..config import GATES
from ..emilie import Editor
from ..methods import ddim
from ..methods.text_to_image import predict
from ..sampling import noise_stream
from . import world
from .judge import judge, psnr, read

FIRST = 10**6  # the first evaluation scene's seed
TURNS = 4
IDLE_TURNS = 16
LOCAL = tuple(kind for kind in world.KINDS if kind not in ("background", "style"))  # about one place
ONE_OF = ("recolour", "shape", "remove")  # about one object that is there


def mean(outcomes: list[bool]) -> float:
    return round(float(np.mean(outcomes)), 4) if outcomes else float("nan")


def through_autoencoder(editor: Editor, image: Image.Image) -> Image.Image:
    """A picture encoded and decoded: what no edit can do better than."""
    return images.from_latent(editor, editor.scale_factor * images.to_latent(editor, image))


def autoencoder(editor: Editor, scenes: int) -> dict:
    """True after-scenes encoded, decoded and judged; the bound on everything below."""
    right, quality = [], []
    for seed in tqdm(range(FIRST, FIRST + scenes), desc="truth through the autoencoder"):
        _, steps = world.chain(seed, 1)
        picture = world.render(steps[0][1])
        again = through_autoencoder(editor, picture)
        right.append(judge(again, steps[0][1]).correct)
        quality.append(psnr(again, picture))
    return {"scenes": scenes, "judged correct": mean(right), "PSNR dB": round(float(np.mean(quality)), 2)}


def script(seed: int, kind: str, turns: int, held_out: bool = False) -> tuple[world.Scene, list[tuple]]:
    """A scene and `turns` instructions in a row, the first of the given kind."""
    scene = now = world.scene(seed, held_out)
    steps = []
    for turn in range(turns):
        steps.append(world.instruct(now, f"{seed} {turn}", kind if turn == 0 else None, held_out))
        now = steps[-1][1]
    return scene, steps


def run_edits(canvas: Canvas, steps: list[tuple], **settings) -> list[bool]:
    """Give the instructions in turn; for each picture, whether it is the right one."""
    return [judge(canvas.edit(text, **settings), after).correct for text, after, _ in steps]


def edits(editor: Editor, scenes: int) -> dict:
    """Single edits by kind, and chains of four, by latent and by image iteration from the same first edit."""
    by_kind, mixed = defaultdict(list), []
    turns = {"latent": [[] for _ in range(TURNS)], "image": [[] for _ in range(TURNS)]}
    for i in tqdm(range(scenes), desc=f"single edits and chains of {TURNS}"):
        kind = world.KINDS[i % len(world.KINDS)]
        scene, steps = script(FIRST + i, kind, TURNS)
        canvas = open(world.render(scene), editor, seed=i)
        first = run_edits(canvas, steps[:1])
        by_kind[kind] += first
        mixed += first
        for iterate, outcomes in turns.items():
            canvas.branch(1)
            done = first + run_edits(canvas, steps[1:], iterate=iterate)
            for turn in range(TURNS):
                outcomes[turn].append(all(done[: turn + 1]))
    return {
        "scenes": scenes,
        "single": mean(mixed),
        "by kind": {kind: mean(outcomes) for kind, outcomes in by_kind.items()},
        **{
            f"all right up to turn, {iterate} iteration": [mean(outcomes) for outcomes in turns]
            for iterate, turns in turns.items()
        },
    }


def held_out(editor: Editor, scenes: int) -> dict:
    """Single edits in scenes with pairs of colour and shape that training never showed."""
    right = []
    for i in tqdm(range(scenes), desc="held-out combinations"):
        scene, steps = script(FIRST + i, world.KINDS[i % len(world.KINDS)], 1, held_out=True)
        right += run_edits(open(world.render(scene), editor, seed=i), steps)
    return {"scenes": scenes, "single": mean(right)}


def twins(editor: Editor, scenes: int) -> dict:
    """Edits of one of two equal objects, which only the mask names: the share right by each gate and with no mask."""
    right = {way: [] for way in (*GATES, "no mask")}
    for i in tqdm(range(scenes), desc="two equal objects, a mask on one"):
        scene = world.twins(FIRST + i)
        text, after, mask = world.instruct(scene, FIRST + i, ONE_OF[i % len(ONE_OF)])
        canvas = open(world.render(scene), editor, seed=i)
        for way, outcomes in right.items():
            canvas.branch(0)
            image = canvas.edit(text) if way == "no mask" else canvas.edit(text, mask, gate=way)
            outcomes.append(judge(image, after).correct)
    return {"scenes": scenes, **{way: mean(outcomes) for way, outcomes in right.items()}}


def nothing(editor: Editor, scenes: int) -> dict:
    """Fig. 2: 16 turns that ask for nothing, y = "", by each iteration and by the autoencoder alone.

    Of each turn the PSNR to the first picture in dB, a mean over scenes, and the share of pictures judged right.
    """
    ways = ("latent iteration", "image iteration", "autoencoder alone")
    quality, right = ({way: np.zeros((scenes, IDLE_TURNS)) for way in ways} for _ in range(2))
    for i in tqdm(range(scenes), desc=f"{IDLE_TURNS} turns that ask for nothing"):
        scene = world.scene(FIRST + i)
        first = world.render(scene)
        for way in ways:
            canvas, image = open(first, editor, seed=i), first
            for turn in range(IDLE_TURNS):
                if way == "autoencoder alone":
                    image = through_autoencoder(editor, image)
                else:
                    image = canvas.edit("", iterate=way.split()[0], allow_empty=True)
                quality[way][i, turn] = psnr(image, first)
                right[way][i, turn] = judge(image, scene).correct
    return {
        "scenes": scenes,
        **{
            way: {"dB": quality[way].mean(0).round(2).tolist(), "right": right[way].mean(0).round(4).tolist()}
            for way in ways
        },
    }


def places(seed: int, *kinds: str) -> tuple[world.Scene, world.Scene, list[tuple]]:
    """A scene, what local instructions of these kinds, each on a place of its own, make of it, and they with masks.

    Two adds need two free places and two removals three objects, which not every scene has.
    """
    scene = after = world.scene(seed)
    pairs: list[tuple] = []
    for i, kind in enumerate(kinds):
        tries = (world.instruct(after, f"{seed} {k}", kind) for k in (itertools.count(1) if i else [0]))
        taken = [mask.getbbox() for _, mask in pairs]
        text, after, mask = next(found for found in tries if found[2].getbbox() not in taken)
        pairs.append((text, mask))
    return scene, after, pairs


PAIRS = [(a, b) for a in LOCAL for b in LOCAL if (a, b) not in (("add", "add"), ("remove", "remove"))]
TRIPLES = [  # that every scene allows: two objects at least, one free place at least
    (*two[:k], "add", *two[k:]) for two in itertools.product(("recolour", "shape"), repeat=2) for k in range(3)
]


def regions(editor: Editor, scenes: int) -> dict:
    """Two and three local edits in their masks, in one pass and in turn: the share of whole pictures right."""
    right = defaultdict(list)
    for i in tqdm(range(scenes), desc="two and three regions, in one pass and in turn"):
        for name, kinds in (("", PAIRS), (", three", TRIPLES)):
            scene, after, pairs = places(FIRST + i, *kinds[i % len(kinds)])
            canvas = open(world.render(scene), editor, seed=i)
            for way, passes in (("one pass", [pairs]), ("in turn", [[pair] for pair in pairs])):
                canvas.branch(0)
                for several in passes:
                    canvas.edit(several)
                right[way + name].append(judge(canvas.image, after).correct)
    return {"scenes": scenes, **{way: mean(outcomes) for way, outcomes in right.items()}}


@torch.no_grad()
def captions(editor: Editor, scenes: int, batch: int = 16) -> dict:
    """Pictures drawn from captions of unseen scenes, DDIM from pure noise: is all there that the caption names?

    Where exactly in its place an object lies, a caption does not say, so any position that the judge can read is right.
    """
    defaults, alphas = editor.config.sampling, editor.alphas_cumprod.tolist()
    levels, right, side = ddim.levels(defaults.steps), [], world.SIZE // editor.vae.factor
    uncond = editor.context([""])
    for first in tqdm(range(FIRST, FIRST + scenes, batch), desc="captions"):
        truths = [world.chain(seed, 2)[1][-1][1] for seed in range(first, min(first + batch, FIRST + scenes))]
        context = torch.cat([uncond.expand(len(truths), -1, -1), editor.context([world.caption(s) for s in truths])])

        eps = partial(predict, editor, context.to(editor.dtype), defaults.text_scale)
        noise = noise_stream((len(truths), editor.config.diffusion.channels, side, side), first)()
        for x, truth in zip(editor.decode(ddim.sample(eps, noise.to(editor.device), levels, alphas)), truths):
            shown = read(images.to_image(x[None])).scene
            right.append(shown == replace(truth, objects=shown.objects) and named(shown) == named(truth))
    return {"scenes": scenes, "steps": defaults.steps, "all as the caption says": mean(right)}


def named(scene: world.Scene) -> set[tuple[str, str, str]]:
    """What a caption says of a scene's objects."""
    return {(o.colour, o.shape, o.place) for o in scene.objects}


def evaluate(editor: Editor, scenes: int, out: Path | None = None, quick: bool = False) -> dict:
    """All of the above, printed and, with `out`, written as JSON. `quick` leaves out what `edits` does not show.

    Of the text-to-image model only the autoencoder and `captions`.
    """
    edit = editor.unet.in_channels > editor.config.diffusion.channels
    measures = [autoencoder, edits if edit else captions]
    if edit and not quick:
        measures += [held_out, twins, regions, nothing]
    settings = editor.config.sampling
    figures = {"model": editor.model, "steps": settings.steps, "text_scale": settings.text_scale}
    for measure in measures:
        figures[measure.__name__] = measure(editor, scenes)
        print(f"{measure.__name__}: {json.dumps(figures[measure.__name__], indent=2)}")
        if out:
            out.write_text(json.dumps(figures, indent=2) + "\n")
    return figures
