"""`python -m emilie_min.toy.stack`: one edit of a chain taken back, by the stack's way and by replaying the others.

Of every chain of four edits whose pictures are all right, one edit is taken back that no later edit touches. What the
picture shows then is known: the scene that the other edits lead to.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..canvas.canvas import Canvas, open
from ..canvas.stack import support
from ..checkpoint.writing import write_bytes
from ..emilie import Editor
from ..loading import load
from . import world
from .evaluate import FIRST, TURNS
from .judge import judge
from .where import cells

HEAD, SEEDS = 8 * 10**5, 2000  # the first chain's seed after `FIRST`, which no other measure uses; tries at most


def chain(editor: Editor, seed: int, masked: bool) -> dict | None:
    """One chain's outcomes; None where its edits are not all right, or none of its first three can be taken back."""
    first, steps = world.chain(FIRST + HEAD + seed, TURNS)
    scenes = [after for _, after, _ in steps]
    can = [k for k in range(TURNS - 1) if world.without(first, scenes, k)]
    if not can:
        return None
    k = random.Random(f"taken back {seed}").choice(can)
    right = world.without(first, scenes, k)
    canvas = open(world.render(first), editor, seed=seed)
    for text, after, mask in steps:
        if not judge(canvas.edit(text, mask if masked else None), after).correct:
            return None
    top, before = canvas.at, canvas.latent
    local = steps[k][2] is not None
    out: dict = {"seed": seed, "edit": k + 1, "local": local, "replayed": TURNS - 1 - k}
    for way in ("replay", "support"):
        canvas = replace(canvas, at=top, states=canvas.states[: top + 1])  # neither way finds the other's states
        verdict = judge(canvas.retract(k + 1, way=way), right)
        out[way] = {"right": verdict.correct, "calls": canvas.state.made["calls"], "why": verdict.why}
    same = (canvas.latent == before).all(1)
    out["kept"] = same.float().mean().item()
    out["outside"] = outside(canvas, top, k, same)
    canvas.branch(top)
    canvas.hide(k + 1)
    canvas.show(k + 1)
    out["shown again"] = torch.equal(canvas.latent, before) and canvas.image == canvas.states[top].image
    return out


def outside(canvas: Canvas, top: int, k: int, same: Tensor) -> bool:
    """Whether latent and picture are what they were, to the bit, wherever edit k, from 0, changed nothing."""
    apart = support(canvas.states[k].latent, canvas.states[k + 1].latent)[1]
    untouched = ~apart[0, 0].numpy()
    now, then = (np.asarray(image) for image in (canvas.image, canvas.states[top].image))
    kept = cells((now == then).all(-1), canvas.editor.vae.factor) == 1
    return bool(same[0].numpy()[untouched].all() and kept[untouched].all())


def interval(right: int, n: int) -> list[float]:
    """Wilson's 95% interval of a share."""
    from scipy import stats

    return [round(float(bound), 3) for bound in stats.binomtest(right, n).proportion_ci(method="wilson")]


def summary(rows: list[dict]) -> dict:
    def of(rows: list[dict]) -> dict:
        n = max(1, len(rows))
        found: dict = {"chains": len(rows), "edits after it": round(sum(row["replayed"] for row in rows) / n, 3)}
        for way in ("replay", "support"):
            right = sum(row[way]["right"] for row in rows)
            found[f"{way} right"], found[f"{way} right, 95%"] = round(right / n, 4), interval(right, n)
            found[f"{way} network calls"] = round(sum(row[way]["calls"] for row in rows) / n, 2)
        found["of the latent kept to the bit"] = round(sum(row["kept"] for row in rows) / n, 3)
        found["latent and picture outside the support, the same bits"] = round(sum(r["outside"] for r in rows) / n, 4)
        found["hidden and shown again, the same bits"] = round(sum(row["shown again"] for row in rows) / n, 4)
        return found

    split = {"local": [r for r in rows if r["local"]], "global": [r for r in rows if not r["local"]]}
    return of(rows) | {name: of(some) for name, some in split.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json", help="where to write; a run goes on with what is there")
    parser.add_argument("--chains", type=int, default=200)
    args = parser.parse_args()
    editor = load(device="cpu", compile=None)
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name, masked in (("no masks", False), ("masks on local edits", True)):
        rows = done.get(name, {}).get("rows", [])
        seed = done.get(name, {}).get("seeds", 0)
        with tqdm(total=args.chains, initial=len(rows), desc=name) as bar:
            while len(rows) < args.chains and seed < SEEDS:
                row, seed = chain(editor, seed, masked), seed + 1
                if row is not None:
                    rows.append(row)
                    bar.update()
                    about = {"model": editor.model, "seeds": seed}
                    done[name] = about | summary(rows) | {"rows": rows}
                    write_bytes((json.dumps(done) + "\n").encode(), args.out)
    write_bytes(table(done).encode(), args.out.with_suffix(".md"))
    print(table(done))


def table(done: dict) -> str:
    """The figures as Markdown."""
    lines = [
        "# An edit taken back from the middle",
        "",
        "Made by `python -m emilie_min.toy.stack notebooks/bench/stack.json`." + __doc__.split(".", 3)[-1].rstrip(),
        "Replaying makes every later edit anew. A network call is of all branches at one noise level; 12 are an edit.",
        "In brackets: Wilson's 95% intervals.",
        "",
    ]
    names = [name for name in summary([]) if name not in ("local", "global") and not name.endswith("95%")]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind, found in done.items():
        for which, of in (("all", found), ("local edits", found["local"]), ("global edits", found["global"])):
            told = [f"{of[name]:g} {of.get(f'{name}, 95%', '')}".strip() for name in names]
            lines.append(f"| {kind}: {which} | " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
