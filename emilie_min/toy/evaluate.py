"""`emilie toy-eval`: the shipped model measured against the small world, where every right answer is known.

Scenes come from seeds below `train.FIRST_SEED`, so training never saw them. Every edit goes through `Canvas.edit`.
"""

import itertools
import json
import time
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
from ..canvas.settings import GATES, RESCALES, SAMPLERS
from ..emilie import Editor
from ..errors import SamplingError
from ..methods import ddim
from ..methods.text_to_image import predict
from ..sampling import noise_stream
from . import world
from .judge import judge, psnr, read

FIRST = 10**6  # the first evaluation scene's seed
TURNS = 4
DRIFT_TURNS = 16
REFERENCE = "euler_ancestral, 100 steps"
LESS = {
    REFERENCE: {"steps": 100},
    "the same with other noise between the steps": {"steps": 100, "seed": 10**9},
    **{
        f"{sampler}, {steps} steps": {"sampler": sampler, "steps": steps}
        for steps in (50, 25, 12, 6)
        for sampler in SAMPLERS
    },
    **{
        f"guidance between sigma {low} and {high}": {"steps": 100, "guidance_interval": (low, high)}
        for low, high in ((0.3, 15.0), (0.0, 5.0), (0.3, 5.0), (1.0, 5.0))
    },
    **{f"deep features every {n} steps": {"steps": 100, "reuse": n} for n in (2, 3, 5)},
    "dpmpp_2m, 25 steps, deep features every 2": {"sampler": "dpmpp_2m", "steps": 25, "reuse": 2},
    "dpmpp_2m_sde, 25 steps, deep features every 2": {"sampler": "dpmpp_2m_sde", "steps": 25, "reuse": 2},
    "dpmpp_2m_sde, 25 steps, guidance between 0.3 and 5": {
        "sampler": "dpmpp_2m_sde",
        "steps": 25,
        "guidance_interval": (0.3, 5.0),
    },
}
LOCAL = tuple(kind for kind in world.KINDS if kind not in ("background", "style"))  # about one place


def share(outcomes: list[bool]) -> float:
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
    return {"scenes": scenes, "judged correct": share(right), "PSNR dB": round(float(np.mean(quality)), 2)}


def script(seed: int, kind: str, turns: int, held_out: bool = False) -> tuple[world.Scene, list[tuple]]:
    """A scene and `turns` instructions in a row, the first of the given kind."""
    scene = now = world.scene(seed, held_out)
    steps = []
    for turn in range(turns):
        steps.append(world.instruct(now, f"{seed} {turn}", kind if turn == 0 else None, held_out))
        now = steps[-1][1]
    return scene, steps


def follow(canvas: Canvas, steps: list[tuple], **settings) -> list[bool]:
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
        first = follow(canvas, steps[:1])
        by_kind[kind] += first
        mixed += first
        for iterate, outcomes in turns.items():
            canvas.branch(1)
            done = first + follow(canvas, steps[1:], iterate=iterate)
            for turn in range(TURNS):
                outcomes[turn].append(all(done[: turn + 1]))
    return {
        "scenes": scenes,
        "single": share(mixed),
        "by kind": {kind: share(outcomes) for kind, outcomes in by_kind.items()},
        **{
            f"all right up to turn, {iterate} iteration": [share(outcomes) for outcomes in turns]
            for iterate, turns in turns.items()
        },
    }


def held_out(editor: Editor, scenes: int) -> dict:
    """Single edits in scenes with pairs of colour and shape that training never showed."""
    right = []
    for i in tqdm(range(scenes), desc="held-out combinations"):
        scene, steps = script(FIRST + i, world.KINDS[i % len(world.KINDS)], 1, held_out=True)
        right += follow(open(world.render(scene), editor, seed=i), steps)
    return {"scenes": scenes, "single": share(right)}


def drift(editor: Editor, scenes: int) -> dict:
    """Fig. 2: PSNR to the first picture after each of 16 turns that ask for nothing, dB."""
    curves = {"autoencoder alone": [], "image iteration": [], "latent iteration": []}
    for i in tqdm(range(scenes), desc=f"drift over {DRIFT_TURNS} turns"):
        first = world.render(world.scene(FIRST + i))
        again, curve = first, []
        for _ in range(DRIFT_TURNS):
            again = through_autoencoder(editor, again)
            curve.append(psnr(again, first))
        curves["autoencoder alone"].append(curve)
        for iterate in ("image", "latent"):
            canvas = open(first, editor, seed=i)
            curve = [psnr(canvas.edit("", iterate=iterate, allow_empty=True), first) for _ in range(DRIFT_TURNS)]
            curves[f"{iterate} iteration"].append(curve)
    return {name: [round(float(v), 2) for v in np.mean(curve, axis=0)] for name, curve in curves.items()}


def rescales(editor: Editor, scenes: int) -> dict:
    """Chains of four under each way to find f; a refused `signed` counts as wrong."""
    out = {}
    for rescale in RESCALES:
        right, factors, refused = [], [], 0
        for i in tqdm(range(scenes), desc=f"rescale={rescale}"):
            scene, steps = script(FIRST + i, world.KINDS[i % len(world.KINDS)], TURNS)
            canvas = open(world.render(scene), editor, seed=i)
            try:
                right.append(all(follow(canvas, steps, rescale=rescale)))
            except SamplingError:
                right.append(False)
                refused += 1
            factors += [state.f for state in canvas.history if state.f is not None]
        out[rescale] = {"chains right": share(right), "refused": refused}
        if factors:
            out[rescale] |= {"f mean": round(float(np.mean(factors)), 3), "f std": round(float(np.std(factors)), 3)}
    return {"exact f": round(1 / editor.scale_factor, 3), **out}


def gates(editor: Editor, scenes: int) -> dict:
    """Local edits, each in its mask: right or not, and how far the rest moved from the input, RMS in grey levels."""
    out = {}
    for gate in (*GATES, "no mask"):
        right, moved = [], []
        for i in tqdm(range(scenes), desc=f"gate={gate}"):
            scene, [(text, after, mask)] = script(FIRST + i, LOCAL[i % len(LOCAL)], 1)
            canvas = open(world.render(scene), editor, seed=i)
            before = canvas.image
            image = canvas.edit(text) if gate == "no mask" else canvas.edit(text, mask, gate=gate)
            right.append(judge(image, after).correct)
            apart = np.asarray(image, float) - np.asarray(before, float)
            moved.append(np.sqrt(np.mean(apart[np.asarray(mask) == 0] ** 2)))
        out[gate] = {"right": share(right), "outside the mask, RMS": round(float(np.mean(moved)), 2)}
    return out


def less(editor: Editor, scenes: int) -> dict:
    """Single edits by each of `LESS`: the share right, how far the picture is from 100 Euler ancestral steps' (mean
    of absolute differences in grey levels) and the time, as a share of theirs."""
    right, apart, seconds, pictures = defaultdict(list), defaultdict(list), defaultdict(float), {}
    for i in tqdm(range(scenes), desc="faster by doing less"):
        scene, [(text, after, _)] = script(FIRST + i, world.KINDS[i % len(world.KINDS)], 1)
        canvas = open(world.render(scene), editor, seed=i)
        for way, settings in LESS.items():
            canvas.branch(0)
            started = time.perf_counter()
            image = canvas.edit(text, **settings)
            seconds[way] += time.perf_counter() - started
            pictures[way] = np.asarray(image, float)
            right[way].append(judge(image, after).correct)
            apart[way].append(np.abs(pictures[way] - pictures[REFERENCE]).mean())
    return {
        "scenes": scenes,
        **{
            way: {
                "right": share(right[way]),
                "grey levels": round(float(np.mean(apart[way])), 2),
                "time": round(seconds[way] / seconds[REFERENCE], 3),
            }
            for way in LESS
        },
    }


def two_places(seed: int, first: str, second: str) -> tuple[world.Scene, world.Scene, list[tuple]]:
    """A scene, what two local instructions of the given kinds on two places make of it, and both with their masks.

    Two adds need two free places and two removals three objects, which not every scene has.
    """
    scene = world.scene(seed)
    text, after, mask = world.instruct(scene, f"{seed} 0", first)
    tries = (world.instruct(after, f"{seed} {k}", second) for k in itertools.count(1))
    other, both, there = next(found for found in tries if found[2].getbbox() != mask.getbbox())
    return scene, both, [(text, mask), (other, there)]


def regions(editor: Editor, scenes: int) -> dict:
    """Two local edits in their masks, in one pass and in turn: the share of whole pictures right, and seconds."""
    kinds = [(a, b) for a in LOCAL for b in LOCAL if (a, b) not in (("add", "add"), ("remove", "remove"))]
    right, seconds = defaultdict(list), defaultdict(list)
    for i in tqdm(range(scenes), desc="two regions, in one pass and in turn"):
        scene, after, pairs = two_places(FIRST + i, *kinds[i % len(kinds)])
        canvas = open(world.render(scene), editor, seed=i)
        for way, passes in (("one pass", [pairs]), ("in turn", [[pair] for pair in pairs])):
            canvas.branch(0)
            started = time.perf_counter()
            for several in passes:
                canvas.edit(several)
            seconds[way].append(time.perf_counter() - started)
            right[way].append(judge(canvas.image, after).correct)
    return {
        "scenes": scenes,
        **{way: {"right": share(right[way]), "seconds": round(float(np.mean(seconds[way])), 2)} for way in right},
    }


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
    return {"scenes": scenes, "steps": defaults.steps, "all as the caption says": share(right)}


def named(scene: world.Scene) -> set[tuple[str, str, str]]:
    """What a caption says of a scene's objects."""
    return {(o.colour, o.shape, o.place) for o in scene.objects}


def evaluate(editor: Editor, scenes: int, out: Path | None = None, quick: bool = False) -> dict:
    """All of the above, printed and, with `out`, written as JSON. `quick` leaves out what `edits` does not show.

    Of the text-to-image model only the autoencoder and `captions`.
    """
    small, edit = max(1, scenes // 4), editor.unet.in_channels > editor.config.diffusion.channels
    parts = [(autoencoder, scenes), (edits if edit else captions, scenes)]
    if edit and not quick:
        parts += [(held_out, small), (drift, max(1, scenes // 10)), (rescales, small), (gates, small), (regions, small)]
        parts += [(less, max(1, scenes // 10))]
    settings = editor.config.sampling
    figures = {"model": editor.model, "steps": settings.steps, "text_scale": settings.text_scale}
    for measure, n in parts:
        figures[measure.__name__] = measure(editor, n)
        print(f"{measure.__name__}: {json.dumps(figures[measure.__name__], indent=2)}")
        if out:
            out.write_text(json.dumps(figures, indent=2) + "\n")
    return figures
