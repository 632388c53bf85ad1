"""`emilie speed`: its options. PyTorch is not needed until it runs; `run` does the measuring, `report` the tables."""

import argparse
import json
import re
import sys
import time
from pathlib import Path

from ..checkpoint.writing import write_bytes
from ..errors import EmilieError
from .report import PARTS, markdown


def add_options(sub: argparse.ArgumentParser) -> None:
    """The options of `emilie speed`; parsed, they are the `setting` that all of this room takes."""
    weights = sub.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", metavar="FILE", default="random", help="default: random numbers, which take the same time"
    )
    weights.add_argument("--random", dest="weights", action="store_const", const="random", help="as without --weights")
    sub.add_argument("--config", help="ip2p, toy or a YAML file (default: ip2p, or told by the weights)")
    sub.add_argument("--steps", type=count, help="of an edit (default: 20, with --full 100)")
    sub.add_argument("--batch", type=counts, default=[], metavar="A,B,...", help="default: 1,2,4,8 on CUDA, else 1")
    sub.add_argument("--resolution", type=count, default=512, help="of the square picture, px (default: 512)")
    sub.add_argument("--device", help="cuda, cpu, ... (default: the best here)")
    sub.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on CUDA, else float32"
    )
    sub.add_argument("--compile", action="store_true", help="also emilie compiled, and diffusers compiled")
    sub.add_argument("--low-memory", action="store_true", help="also emilie's way with less memory")
    sub.add_argument("--against", choices=("diffusers",), help="also diffusers' pipeline, on the same weights")
    sub.add_argument("--repeats", type=count, default=3, help="of every timing (default: 3)")
    sub.add_argument("--threads", type=count, help="on the CPU (default: PyTorch's)")
    sub.add_argument("--unet-only", action="store_true", help="steps alone: whole edits take minutes on a CPU")
    sub.add_argument("--full", action="store_true", help="all that one card can tell, most important first")
    sub.add_argument("--parts", type=parts, metavar="A,B,...", help=f"these alone, of {','.join(PARTS)}")
    sub.add_argument("--minutes", type=minutes, help="stop after so long; what was not measured by then is told")
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="write speed.md and speed.json here, anew after each piece"
    )


def count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 10000, not {text}")
    return int(text)


def counts(text: str) -> list[int]:
    return [count(part.strip()) for part in text.split(",")]


def parts(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"must be of {','.join(PARTS)}, not {text}")
    return names


def minutes(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, not {text}")
    return float(text)


def run_speed(args: argparse.Namespace) -> None:
    """Measure, print the report and, with --out, write it. Raises EmilieError."""
    started, out = time.monotonic(), args.out
    if out and out.exists() and not out.is_dir():
        raise EmilieError(f"--out {out} is a file: name a folder")
    if out:
        out.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before anything is measured
    from .run import run

    def save(result: dict) -> None:
        if out:
            write_bytes(json.dumps(result, indent=1).encode(), out / "speed.json")
            write_bytes(markdown(result).encode(), out / "speed.md")

    given = {key: value for key, value in vars(args).items() if key not in ("command", "run", "out")}
    print(markdown(run(argparse.Namespace(**given), started, save)))
    if out:
        print(f"wrote {out / 'speed.md'} and speed.json beside it", file=sys.stderr)
