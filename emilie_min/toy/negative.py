"""`python -m emilie_min.toy.negative OUT.json`: what negative and weighted instructions do in the small world."""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ..canvas.canvas import open
from ..checkpoint.writing import write_bytes
from ..loading import load
from . import world
from .evaluate import FIRST, mean
from .judge import judge

HEAD = 6 * 10**5  # the first scene's seed after `FIRST`


def cases(seed: int) -> dict[str, tuple[str, dict, world.Scene]]:
    """Of each case an instruction, its settings, and the scene that is right."""
    scene, rng = world.scene(FIRST + HEAD + seed), random.Random(f"negative {seed}")
    text, recoloured, _ = world.instruct(scene, f"{seed}", "recolour")
    other = rng.choice([c for c in world.COLOURS if c not in text and c not in {o.colour for o in scene.objects}])
    avoided = " ".join([*text.split()[:-1], other])
    look, _, _ = world.instruct(scene, f"{seed}", "style")
    one = rng.choice(scene.objects)
    gone = replace(scene, objects=tuple(o for o in scene.objects if o != one))
    added = f"add a {one.colour} {one.shape} at the {one.place}"
    return {
        "recolour": (text, {}, recoloured),
        "recolour, and not another colour": (text, {"negative": avoided}, recoloured),
        "recolour, with half of another colour": (text, {"further": [(avoided, 0.5)]}, recoloured),
        "the same, and not that colour": (text, {"further": [(avoided, 0.5)], "negative": avoided}, recoloured),
        "recolour, and not another look": (text, {"negative": look}, recoloured),
        "an object out: remove it": (f"remove the {one.colour} {one.shape}", {}, gone),
        "an object out: not add it": ("", {"negative": added, "allow_empty": True}, gone),
        "an object out: remove it, and not add it": (f"remove the {one.shape}", {"negative": added}, gone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--scenes", type=int, default=40)
    args = parser.parse_args()
    editor, right = load(device="cpu", compile=None), {}
    for seed in tqdm(range(args.scenes)):
        for name, (text, settings, truth) in cases(seed).items():
            canvas = open(world.render(world.scene(FIRST + HEAD + seed)), editor, seed=seed)
            right.setdefault(name, []).append(judge(canvas.edit(text, **settings), truth).correct)
        found = {
            "model": editor.model,
            "scenes": seed + 1,
            **{name: mean(outcomes) for name, outcomes in right.items()},
        }
        write_bytes((json.dumps(found, indent=1) + "\n").encode(), args.out)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
