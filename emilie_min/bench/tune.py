"""One rule for every method's free number: as many values on as many scenes, none of which a table or figure uses.

DIR/bench/      single edits of all kinds in turn, from scenes of `SEED`
   /run/        each method with each value over them, under seed 0; started again, it goes on where it was
   /tune.json   what share was right with each value, and which value was chosen
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from ..checkpoint.writing import write_bytes
from ..errors import BenchError
from . import data
from .io import open_picture
from .run import SHIPPED, Models, run

SEED = 97  # of `data.make`: no table or figure is of it
TRIED = {"text_scale": ("0.75", "1.0", "1.25", "1.5"), "guidance": ("1.0", "2.0", "3.0", "5.0")}


def tune(
    out: str | Path,
    methods: Sequence[str],
    settings: Mapping[str, Sequence[str]] = TRIED,
    scenes: int = 24,
    models: Models = SHIPPED,
) -> list[str]:
    """Write tune.json into a folder; a line a method. The value chosen is the one with most pictures right.

    Of several with as many it is the one whose right pictures are nearest the truth, in dB. Raises BenchError.
    """
    from ..methods import parse
    from ..toy import judge, world

    out, tried = Path(out), {}
    for method in methods:
        kind, given = parse(method)
        can = {field.name for field in fields(kind)} - given.keys()
        tried[method] = {
            f"{name}={v}": f"{method}:{name}={v}" for name in settings if name in can for v in settings[name]
        }
        if not tried[method]:
            raise BenchError(f"{method} has none of the settings {', '.join(settings)}: nothing to choose")
    if not (out / "bench" / data.FILE).exists():
        out.mkdir(parents=True, exist_ok=True)
        data.make(out / "bench", scenes, 1, SEED)
    done = run(out / "bench", [spec for of in tried.values() for spec in of.values()], out / "run", [0], models)
    if len(done.items) != scenes:
        raise BenchError(f"{out} has {len(done.items)} scenes and not {scenes}: choose another folder")
    record, lines = {"scenes": scenes, "bench seed": SEED, "models": done.info["models"], "methods": {}}, []
    for method, of in tried.items():
        found = {}
        for value, spec in of.items():
            right, quality = 0, []
            for item in done.items:
                result, truth = done.outcome(spec, 0, item.id, 1), item.turns[0].truth
                if result.image is not None:
                    picture = open_picture(result.image).convert("RGB")
                    if judge.judge(picture, truth).correct:
                        right += 1
                        quality.append(judge.psnr(picture, world.render(truth)))
            found[value] = {
                "right": right / scenes,
                "dB of these": round(sum(quality) / len(quality), 2) if quality else 0,
            }
        chosen = max(found, key=lambda value: tuple(found[value].values()))
        record["methods"][method] = {"chosen": chosen, "tried": found}
        shares = ", ".join(f"{value}: {of['right']:.2f}" for value, of in found.items())
        lines.append(f"{method}: {chosen} ({shares})")
    write_bytes((json.dumps(record, indent=1) + "\n").encode(), out / "tune.json")
    return lines
