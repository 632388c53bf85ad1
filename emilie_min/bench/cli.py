"""`emilie bench ...`: benchmark folders, runs over them, reports of runs, and the preference study."""

import argparse
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import BenchError, printable, say

OWN = {  # of what a score is made by: the small world's, and the released one
    "clip": ("toy-clip", "openai/clip-vit-large-patch14"),
    "blip": ("toy-blip2", "Salesforce/blip-image-captioning-large"),
}


def add_commands(bench: argparse.ArgumentParser, add_model_options: Callable) -> None:
    """The sub-commands of `emilie bench`."""
    commands = bench.add_subparsers(dest="bench_command", required=True, metavar="COMMAND", parser_class=type(bench))

    def command(name: str, run: Callable, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    make = command("make", run_make, "Write a benchmark of the small world, with the right results.")
    make.add_argument("folder", type=Path, metavar="DIR")
    make.add_argument("--scenes", type=whole, default=40, help="pictures (default: 40)")
    make.add_argument(
        "--turns",
        type=whole,
        help="instructions for each (default: 4; 16 for drift and nothing, 2 for undo, up to 5 for undo-later, 1 else)",
    )
    make.add_argument("--seed", type=int, default=0, help="other scenes (default: 0)")
    kinds = ("imie", "drift", "twins", "night-here", "undo", "undo-later", "nothing")
    make.add_argument("--kind", default="imie", choices=kinds,
                      help="imie: as IMIE-Bench, masks on some; drift: one object changed again and again; twins: "
                           "equal objects, a mask on one; night-here: a look or ground in a part; undo: do and undo "
                           "in words; undo-later: others in between; nothing: empty instructions")  # fmt: skip

    check = command("check", run_check, "Validate a benchmark folder: every line, picture and mask.")
    check.add_argument("folder", type=Path, metavar="DIR")

    take = command("import", run_import, "Bring EditBench, MagicBrush, PIE-Bench, EdiVal or OPA into the one form.")
    take.add_argument("format", choices=("editbench", "magicbrush", "piebench", "edival", "opa"))
    take.add_argument("source", type=Path, metavar="SOURCE")
    take.add_argument("folder", type=Path, metavar="DIR")
    take.add_argument("--polarity", choices=("white-is-edit", "black-is-edit"), help="of EditBench's masks: look first")
    take.add_argument("--masks", action="store_true", help="give the methods MagicBrush's or PIE-Bench's masks")

    tune = command("tune", run_tune, "Choose each method's guidance or steps by one budget, on scenes of no table.")
    tune.add_argument("out", type=Path, metavar="DIR", help="folder for the scenes, the run and tune.json")
    tune.add_argument("--methods", default="emilie,ip2p,bld,diffedit:mask=given", metavar="A,B,...")
    tune.add_argument("--setting", action="append", metavar="NAME=A,B,...",
                      help="values to try; a method takes those that it has (default: text_scale=0.75,1,1.25,1.5 and "
                           "guidance=1,2,3,5)")  # fmt: skip
    tune.add_argument("--scenes", type=whole, default=24, help="single edits each (default: 24)")
    add_model_options(tune)

    run = command("run", run_run, "Run methods over a benchmark; started again, it goes on where it was.")
    run.add_argument("folder", type=Path, metavar="DIR")
    run.add_argument("--methods", default="emilie,ip2p,concat", metavar="A,B,...",
                     help="of emilie, ip2p, concat, pnp, diffedit, bld, paste, lowpass, vae, untouched; with settings, "
                          "as in emilie:gate=eq8; or a class of your own, as in mine.py:Mine (default: "
                          "emilie,ip2p,concat)")  # fmt: skip
    run.add_argument("--seeds", default="0", metavar="0,1,...", help="of all noise (default: 0)")
    run.add_argument("--steps", type=whole, help="sampling steps of every method (default: each model's own)")
    run.add_argument(
        "--prompt", choices=("caption", "instruction"), help="what text-to-image methods are told (caption)"
    )
    run.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder for the results")
    run.add_argument("--shard", metavar="I/N", help="do the I-th of N parts, from 1; torchrun needs no --shard")
    run.add_argument("--captions-weights", metavar="FILE",
                     help="text-to-image model for pnp, diffedit, bld (default: the small one)")  # fmt: skip
    add_model_options(run)

    report = command("report", run_report, "Write tables, figures and pictures of a run: report.html, .md and .csv.")
    report.add_argument("run_folder", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/report")
    report.add_argument("--methods", metavar="A,B,...",
                        help="which; the others are compared with the first (default: all)")  # fmt: skip
    report.add_argument("--clip", nargs="?", const="", metavar="MODEL",
                        help="also CLIP scores, by a hub's model name or a folder (default of the small world's runs: "
                             "weights/toy-clip; else ViT-L/14)")  # fmt: skip
    report.add_argument("--clip2", metavar="MODEL", help="another CLIP, for a column beside the first's")
    report.add_argument("--blip", nargs="?", const="", metavar="MODEL",
                        help="also BLIP scores, likewise, by BLIP or BLIP-2; needs --clip for its texts")  # fmt: skip
    report.add_argument("--lpips", action="store_true", help="also LPIPS; its package must be installed")
    report.add_argument("--grids", type=int, default=6, metavar="N", help="chains to show as pictures (default: 6)")
    report.add_argument("--device", help="for the scores: cuda, cpu, ... (default: cpu)")

    study = command("study", run_study, "Write a page on which people choose between methods without knowing them.")
    study.add_argument("run_folder", type=Path, metavar="RUN")
    study.add_argument("--methods", metavar="A,B,...", help="default: all of the run")
    study.add_argument("--chains", type=whole, metavar="N", help="how many chains to ask about (default: all)")
    study.add_argument("--seed", type=int, default=0, help="of the order shown (default: 0)")
    study.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/study")

    tally = command("tally", run_tally, "Count the answers that the study's page downloaded.")
    tally.add_argument("key", type=Path, help="the key file beside the page")
    tally.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS.json")


def whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 10000, not {text}")
    return int(text)


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def run_run(args: argparse.Namespace) -> None:
    from . import run

    shard = which_shard(args.shard, os.environ)
    device = own_device(args.device, shard, os.environ)
    try:
        seeds = [int(seed) for seed in names(args.seeds)]
    except ValueError:
        raise BenchError(f"--seeds {printable(args.seeds, 60)}: give whole numbers, as in 0,1,2") from None
    models = run.Models(args.weights, args.captions_weights, args.config, device, args.dtype, args.tokenizer)
    common = {"steps": args.steps, "prompt": args.prompt}
    done = run.run(args.folder, names(args.methods), args.out, seeds, models, shard, **common)
    missing, failed = run.state(done)
    say(f"{args.out}: {missing} edits missing, {failed} failed" if missing or failed else f"{args.out}: complete")


def own_device(device: str | None, shard: tuple[int, int], environ: Mapping[str, str]) -> str | None:
    """The card of this process of torchrun's, where several share the work and none is named."""
    if device not in (None, "cuda") or "LOCAL_RANK" not in environ or shard[1] == 1:
        return device
    import torch

    return f"cuda:{environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"


def which_shard(text: str | None, environ: dict) -> tuple[int, int]:
    """(i, n) of --shard I/N, or of torchrun's environment; (1, 1) without either. Raises BenchError."""
    try:
        world, rank = (int(environ.get(name) or default) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    except ValueError:
        world, rank = 1, 1
    if not 0 <= rank < world:
        raise BenchError("WORLD_SIZE and RANK are not as torchrun sets them: unset them, or start it with torchrun")
    if text is None:
        return rank + 1, world
    if world > 1:
        raise BenchError("--shard and torchrun both split the work: use one of them")
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    i, n = (int(part) for part in found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise BenchError(f"--shard {printable(text, 60)}: give I/N with I from 1 to N")
    return i, n


def run_tune(args: argparse.Namespace) -> None:
    from . import run, tune

    settings = {}
    for text in args.setting or ():
        name, _, values = text.partition("=")
        if not names(values):
            raise BenchError(f"--setting {printable(text, 60)}: give a name and values, as in guidance=1,2,3")
        settings[name.strip()] = names(values)
    models = run.Models(args.weights, None, args.config, args.device, args.dtype, args.tokenizer)
    for line in tune.tune(args.out, names(args.methods), settings or tune.TRIED, args.scenes, models):
        say(line)


def run_report(args: argparse.Namespace) -> None:
    from . import report, run

    done = run.read_run(args.run_folder, names(args.methods) if args.methods else None)
    clip, blip = (which(model, done, *ours) for model, ours in ((args.clip, OWN["clip"]), (args.blip, OWN["blip"])))
    page = report.report(done, args.out, clip, blip, args.lpips, args.grids, args.device or "cpu", args.clip2)
    say(f"wrote {page}, and beside it report.md and metrics.csv")


def which(model: str | None, run, small: str, released: str) -> str | None:
    """A scorer's model: the one that is named or, where the option stands alone, the run's own."""
    if model != "":
        return model
    from ..loading import shipped  # with which PyTorch comes

    truths = all(item.truth for item in run.items)
    return str(shipped(f"{small}/config.json").parent) if truths else released


def run_study(args: argparse.Namespace) -> None:
    from . import run, study

    done = run.read_run(args.run_folder)
    methods = names(args.methods) if args.methods else None
    page, key, line = study.study(done, args.out or args.run_folder / "study", methods, args.chains, args.seed)
    say(f"wrote {page}: {line}\nkeep {key} to yourself: `emilie bench tally` needs it")


def run_tally(args: argparse.Namespace) -> None:
    from . import study

    say(study.tally(args.key, args.answers).markdown())


def run_import(args: argparse.Namespace) -> None:
    from . import readers

    own = {"editbench": {"polarity": args.polarity}, "edival": {}, "opa": {}}
    options = own.get(args.format, {"masks": args.masks})
    say(f"wrote {args.folder}: {readers.import_(args.format, args.source, args.folder, **options)}")


def run_make(args: argparse.Namespace) -> None:
    from . import data

    say(f"wrote {args.folder}: {data.make(args.folder, args.scenes, args.turns, args.seed, args.kind)}")


def run_check(args: argparse.Namespace) -> None:
    from . import data

    say(f"{args.folder}: {data.check(args.folder)}")
