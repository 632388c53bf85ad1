"""How well `canvas.where` finds the place of an edit, against the small world's truth.

python -m emilie_min.toy.where weights/where.json     # 100 unseen scenes; 10 minutes on a core
"""

import argparse
import json
from pathlib import Path

import numpy as np

from .. import loading
from ..canvas import where
from ..canvas.canvas import open as open_canvas
from ..checkpoint.writing import write_bytes
from ..emilie import Editor
from . import world
from .judge import judge

FIRST = 700_000  # the scenes' first seed, unlike training's and the ones by which the threshold was chosen
LOCAL, ALL = ("recolour", "add", "remove", "shape"), ("background", "style")


def measure(editor: Editor, scenes: int) -> dict:
    """Of each kind of edit: whether the map's peak lies in the true place, and how the mask meets what truly changes.

    "peak", "overlap" (intersection over union with the cells that change in truth, by a tenth or more), "found" (of
    those, in the mask), "share" (of the picture in the mask); and edits right with that mask, without one, with the
    true place. For grounds and looks, which are everywhere, "share" and "everywhere" alone.
    """
    found: dict[str, list[dict]] = {}
    for seed in range(FIRST, FIRST + scenes):
        scene = world.scene(seed)
        for kind in (*LOCAL, *ALL):
            if kind in world.possible(scene):
                found.setdefault(kind, []).append(one(editor, scene, seed, kind))
    table = {}
    for kind, rows in found.items():
        table[kind] = {"edits": len(rows)} | {k: round(float(np.mean([r[k] for r in rows])), 3) for k in rows[0]}
    local = [row for kind in LOCAL for row in found.get(kind, [])]
    table["all local"] = {"edits": len(local)} | {k: round(float(np.mean([r[k] for r in local])), 3) for k in local[0]}
    return {"scenes": scenes, "levels": where.LEVELS, "threshold": where.THRESHOLD, "kinds": table}


def one(editor: Editor, scene: world.Scene, seed: int, kind: str) -> dict:
    text, after, place = world.instruct(scene, seed, kind)
    canvas = open_canvas(world.render(scene), editor, seed)
    differences = where.differences(canvas, text)
    mask = where.marked(differences, canvas.image.size)
    share = 1.0 if mask is None else float((np.asarray(mask) > 0).mean())
    if kind in ALL:
        return {"share": share, "everywhere": mask is None}
    factor = editor.vae.factor
    peaks = where.as_image(differences, canvas.image.size)
    changes = (world.pixels(scene) != world.pixels(after)).any(-1)
    true = cells(changes, factor) >= 0.1
    marked = np.ones_like(true) if mask is None else cells(np.asarray(mask) > 0, factor) > 0.5
    row, column = np.unravel_index(np.asarray(peaks).argmax(), changes.shape)
    right = {}
    for name, given in (("right", mask), ("right without", None), ("right with the true place", place)):
        right[name] = judge(canvas.edit(text, given), after).correct
        canvas.undo()
    return {
        "peak": bool(np.asarray(place)[row, column]),
        "overlap": (marked & true).sum() / (marked | true).sum(),
        "found": (marked & true).sum() / true.sum(),
        "share": share,
        **right,
    }


def cells(pixels: np.ndarray, factor: int) -> np.ndarray:
    """The share of each cell that is marked, of (H, W)."""
    height, width = pixels.shape
    return pixels.reshape(height // factor, factor, width // factor, factor).mean((1, 3))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=100)
    args = parser.parse_args()
    result = measure(loading.load(compile=None), args.scenes)
    write_bytes((json.dumps(result, indent=1) + "\n").encode(), args.out)
    print(json.dumps(result["kinds"]["all local"]))
