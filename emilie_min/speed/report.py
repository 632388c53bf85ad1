"""`emilie speed`: its options and its report. PyTorch is not needed until it runs; `measure` does the measuring."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from statistics import median

from ..bench.cli import whole
from ..checkpoint.writing import write_bytes
from ..errors import EmilieError

PARTS = ("step", "encode", "text", "denoise", "decode", "edit")  # of what is timed
NOTES = """\
Figures are the median and (smallest to largest) of {repeats} repeats, in which all take turns. A step is one guided
call of the UNet, with the {branches} rows of a batch; an edit is encode + text + denoise of {steps} steps + decode.
FLOPs are counted on the plain networks, attention included, also where a faster way does without some of them; the
ceiling is a matrix product's in {dtype}, the best of what was measured between the repeats ({ceilings} TFLOP/s).
Ready: seconds until the first outputs were there and compared, once per shape, torch.compile's work included. Weights
{weights}. Before anything was timed all computed the same but for rounding: {errors}.
"""
MEMORY = """\
Live tensors: the peak of weights and activations, without what kernels use inside (step: the UNet's weights alone).
Process: the most memory resident in a process of its own while it loads, then while it computes one step, and an edit
of 2 steps; all load emilie's weights, and the others share them. CUDA: allocated (reserved) there; CUDA graphs show in
the latter.
"""


def add_options(sub: argparse.ArgumentParser) -> None:
    """The options of `emilie speed`."""
    sub.add_argument("--weights", metavar="FILE", help="default: random numbers, which take the same time")
    sub.add_argument("--random", action="store_true", help="random weights: the default without --weights")
    sub.add_argument("--config", help="ip2p, toy or a YAML file (default: ip2p, or told by the weights)")
    sub.add_argument("--steps", type=whole, default=20, help="of an edit (default: 20)")
    sub.add_argument("--batch", type=batches, default=[], metavar="A,B,...", help="default: 1,2,4,8 on CUDA, else 1")
    sub.add_argument("--resolution", type=whole, default=512, help="of the square picture, px (default: 512)")
    sub.add_argument("--device", help="cuda, cpu, ... (default: the best here)")
    sub.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on CUDA, else float32"
    )
    sub.add_argument("--compile", action="store_true", help="also emilie's fast path, and diffusers compiled")
    sub.add_argument("--low-memory", action="store_true", help="also emilie's way with less memory")
    sub.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="diffusers|DIR",
        help="also diffusers' pipeline, or the UNet of a checkout of instruct-pix2pix; repeatable",
    )
    sub.add_argument("--repeats", type=whole, default=3, help="of every timing (default: 3)")
    sub.add_argument("--threads", type=whole, help="on the CPU (default: PyTorch's)")
    sub.add_argument("--unet-only", action="store_true", help="steps alone: whole edits take minutes on a CPU")
    sub.add_argument("--out", type=Path, metavar="DIR", help="write speed.md and speed.json here")


def batches(text: str) -> list[int]:
    return [whole(part.strip()) for part in text.split(",")]


def run(args: argparse.Namespace) -> None:
    """Measure, print the report and, with --out, write it. Raises EmilieError."""
    if args.random and args.weights:
        raise EmilieError("--random and --weights exclude each other")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise EmilieError(f"--out {args.out} is a file: name a folder")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before anything is measured
    from .measure import Setting, measure

    given = vars(args) | {
        "weights": args.weights or "random",
        "config": args.config or (None if args.weights else "ip2p"),
        "batches": args.batch,
        "against": list(dict.fromkeys(args.against)),
    }
    setting = Setting(**{field.name: given[field.name] for field in fields(Setting)})
    result = measure(setting, lambda line: print(line, file=sys.stderr))
    text = markdown(result)
    print(text)
    if args.out:
        write_bytes(text.encode(), args.out / "speed.md")
        write_bytes(json.dumps(result, indent=1).encode(), args.out / "speed.json")
        print(f"wrote {args.out / 'speed.md'} and speed.json beside it")


def markdown(result: dict) -> str:
    """What `measure.measure` returns, as tables: on the CPU ratios first, and absolute times only with its name."""
    machine, setting, runs = result["machine"], result["setting"], result["runs"]
    where = machine["name"] + ("" if machine["cuda"] else f", {machine['threads']} threads")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    errors = [
        f"{name} off by {max(row['errors'].values()):.1g}"
        for name, row in runs[0]["entrants"].items()
        if name != "emilie"
    ]
    ceilings = [value / 1e12 for run in runs for value in run["ceiling"]]
    notes = NOTES.format(
        repeats=setting["repeats"],
        branches="3 B",
        steps=setting["steps"],
        dtype=machine["dtype"],
        ceilings=f"{min(ceilings):.3g} to {max(ceilings):.3g}",
        weights="random" if setting["weights"] == "random" else f"from {setting['weights']}",
        errors=", ".join(errors) or "there was one alone",
    )
    ratios, seconds = ratio_table(runs), seconds_table(runs, "" if machine["cuda"] else where)
    parts = [
        "# emilie speed",
        f"{where}; {machine['dtype']}, {setting['resolution']} px; {versions}; {machine['date']}",
        f"    {' '.join(machine['command'])}",
        *((seconds, ratios) if machine["cuda"] else (ratios, seconds)),
        flops_table(runs),
        notes,
        memory_table(result["entrants"], runs[0]["batch"]),
        MEMORY,
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def spread(values: list[float], digits: int = 3) -> str:
    low, middle, high = (f"{v:.{digits}g}" for v in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table without the columns that are empty in every row."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def took(entrant: dict, part: str) -> list[float]:
    """Seconds of a part in every repeat; none where the entrant does not do it."""
    return [repeat[part] for repeat in entrant["repeats"] if part in repeat]


def ratio_table(runs: list[dict]) -> str:
    """Time over another's in the same repeat, below 1 is faster: ours over the others', and over the plain path's."""
    rows = []
    for run in runs:
        ours = [name for name in run["entrants"] if name.startswith("emilie")]
        others = [name for name in run["entrants"] if name not in ours]
        for name, over in [(a, b) for b in others for a in ours] + [(name, "emilie") for name in ours[1:]]:
            pairs = {part: zip(*(took(run["entrants"][who], part) for who in (name, over))) for part in PARTS}
            ratios = {part: [a / b for a, b in both] for part, both in pairs.items()}
            rows.append([f"{name} / {over}", str(run["batch"]), *(spread(r) if r else "" for r in ratios.values())])
    return table("Time as a multiple of another's", ["", "batch", *PARTS], rows) if rows else ""


def seconds_table(runs: list[dict], on: str) -> str:
    rows = []
    for run in runs:
        top, flops, batch = max(run["ceiling"]), run["flops"], run["batch"]
        for name, entrant in run["entrants"].items():
            seconds = {part: took(entrant, part) for part in PARTS}
            row = [name, str(batch), *(spread(s) if s else "" for s in seconds.values())]
            row.append(f"{batch / median(seconds['edit']):.3g}" if seconds["edit"] else "")
            rate = flops["step"] / median(seconds["step"])
            rows.append([*row, f"{rate / 1e12:.3g}", f"{100 * rate / top:.0f} %", f"{entrant['first_s']:.1f}", on])
    head = ["", "batch", *PARTS, "images/s", "TFLOP/s of a step", "of the ceiling", "ready", "on"]
    return table("Seconds", head, rows)


def flops_table(runs: list[dict]) -> str:
    rows = [[str(run["batch"]), *(f"{run['flops'][part] / 1e9:.4g}" for part in run["flops"])] for run in runs]
    return table("GFLOP", ["batch", *runs[0]["flops"]], rows)


def memory_table(entrants: dict, batch: int) -> str:
    def size(count: int | None) -> str:
        return "" if count is None else f"{count / 1e9:.3g}"

    rows = []
    for name, entrant in entrants.items():
        live, process = entrant["live"], entrant.get("process", {})
        cuda = [process.get(f"{part}_cuda") for part in ("step", "edit")]
        row = [
            size(live.get("step")),
            size(live.get("edit")),
            *(size(process.get(p)) for p in ("loaded", "step", "edit")),
        ]
        rows.append([name, *row, *(f"{size(both[0])} ({size(both[1])})" if both else "" for both in cuda)])
    head = ["", "live: step", "edit", "process: loaded", "step", "edit", "CUDA: step", "edit"]
    return table(f"Memory, GB, at batch {batch}", head, rows)
