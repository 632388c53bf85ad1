"""python -m tests.fuzz [--cases 1000] [--seed 0] [--kinds weights,masks,...] [--only N]"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import judge
from .around import AROUND
from .fields import FIELDS
from .kinds import KINDS, prepare

ALL = KINDS | FIELDS | AROUND


def cases(
    kind: str, numbers: list[int], seed: int, clean: Path, scratch: Path
) -> Iterator[tuple[int, list, list[str]]]:
    """(number, command line, where it fell short) of cases of a kind; first of the clean one, whose number is -1."""
    memory = None
    for number in (-1, *numbers):
        folder = scratch / f"{kind}-{number}"
        shutil.copytree(clean, folder)
        case = ALL[kind](random.Random(f"{seed} {kind} {number}") if number >= 0 else None, folder)
        short, taken = judge.judge(case, folder, memory)
        memory = memory or taken
        yield number, case.argv, short
        if not short:
            shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(ALL))
    parser.add_argument("--only", type=int, help="one case of each kind, by its number; its folder is kept")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    clean = scratch / "clean"
    clean.mkdir()
    prepare(clean)
    fell, done, started = Counter(), 0, time.time()
    numbers = list(range(args.cases)) if args.only is None else [args.only]
    for kind in args.kinds.split(","):
        for number, argv, short in cases(kind, numbers, args.seed, clean, scratch):
            done += 1
            fell[kind] += bool(short)
            for line in short:
                shown = " ".join(repr(word if len(word) < 60 else word[:57] + "...") for word in argv)
                print(f"{kind} {number}: {line}\n    emilie {shown}\n    {scratch / f'{kind}-{number}'}", flush=True)
        print(f"{kind}: {fell[kind]} of {len(numbers) + 1} fell short, {time.time() - started:.0f} s", flush=True)
    if not sum(fell.values()) and args.only is None:
        shutil.rmtree(scratch)
    print(f"{sum(fell.values())} of {done} cases fell short under seed {args.seed}")
    return bool(sum(fell.values()))


if __name__ == "__main__":
    sys.exit(main())
