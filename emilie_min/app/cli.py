"""The command `emilie`. Bad input is one line on stderr and exit code 2; PyTorch is imported only when needed."""

import argparse
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from .. import __version__
from ..bench.cli import add_commands, whole
from ..errors import BenchError, EmilieError, explain_oom, printable, say
from ..speed.cli import add_options, run_speed
from . import batch, demo, edit, insert, language, looks, stack
from .options import EMA_CHOICES, EMA_HELP, add_model_options, add_path_options, load_editor, writable

LINE = 1000  # characters of a line that is told


class Ended(KeyboardInterrupt):
    """A signal that ends a process, by its number: ^C's, `kill`'s, or that of a terminal that was closed."""


class Parser(argparse.ArgumentParser):
    """argparse, with one line for an error."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; the exit code: 0, 1 by a red check, 2 for bad input and what the system lacks.

    130 when interrupted, 143 by `kill`, 129 where the terminal was closed, and nothing is half written then; 141 where
    the reader of a pipe has left, as `| head` does: nothing is said then.
    """
    prepare_streams()
    try:
        try:
            with heeding_signals(), explain_oom("here: work at a lower --resolution"):
                return run_line(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except EmilieError as error:
        lines = error.lines if isinstance(error, BenchError) else [str(error)]
        tell("emilie: error: " + "\n".join(printable(line, LINE) for line in lines))
    except BrokenPipeError:
        silence(sys.stdout)
        silence(sys.stderr)
        return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
    except OSError as error:  # what the system lacks
        silence(sys.stdout)
        name = "standard output" if error.filename is None else printable(error.filename, 200)
        tell(f"emilie: error: {name} cannot be used: {error.strerror or printable(error)}")
    except KeyboardInterrupt as stop:
        tell("\nemilie: interrupted; what was written before is complete")
        return 128 + (stop.args[0] if isinstance(stop, Ended) else signal.SIGINT)
    return 2


def run_line(argv: list[str]) -> int:
    top = parser()
    if not argv:
        say(language.FIRST)
        return 0
    if wrong := language.not_a_command(argv[0]):
        top.error(wrong)
    try:
        os.getcwd()
    except OSError as error:  # for which a library of PyTorch's would end the process
        raise EmilieError(f"the folder that this runs in cannot be used ({error.strerror}): go to another") from error
    if argv.count("--") > 1 or any(re.fullmatch("--[a-z].*=--", word) for word in argv):  # argparse makes a list of it
        top.error("-- is no value: it stands once and alone, before words that begin with a dash")
    args, rest = top.parse_known_args(argv)
    if args.command == "edit" and not any(word.startswith("-") for word in rest):
        args.instructions, rest = args.instructions + rest, []  # argparse stops at the first option in between
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        told: set[str] = set()
        warnings.showwarning = lambda message, *_: tell_once(str(message), told)
        return args.run(args) or 0


@contextmanager
def heeding_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end as ^C does, so that what was begun is cleared away; what is ignored stays ignored.

    And whatever a library makes of that, such as an import that then failed, it is an `Ended`.
    """
    came: list[int] = []

    def end(number: int, _: object) -> None:
        came.append(number)
        raise Ended(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    main = threading.current_thread() is threading.main_thread()  # which alone may say what a signal does
    ours = [n for n, does in before.items() if main and does in (signal.SIG_DFL, signal.default_int_handler)]
    try:
        for number in ours:
            signal.signal(number, end)
        yield
    except Exception as error:
        if came:
            raise Ended(came[0]) from error
        raise
    finally:
        for number in ours:
            signal.signal(number, before[number])


def prepare_streams() -> None:
    """What a console cannot show is escaped, what is closed goes nowhere; and nothing more depends on either."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def silence(stream) -> None:
    """What could not be written is forgotten, so that it is not tried, and told, once more at the end of Python."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def tell(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nobody is left to be told
        silence(sys.stderr)


def tell_once(text: str, told: set[str]) -> None:
    if text not in told:
        told.add(text)
        tell(f"emilie: note: {printable(text, LINE)}")


def parser() -> Parser:
    top = Parser(prog="emilie", description="Edit a picture by instructions, one after another (EMILIE, WACV 2024).")
    top.add_argument("--version", action="version", version=f"emilie_min {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, run, help: str) -> Parser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    about = "Edit a scene of the small world by four instructions with the model that ships."
    demo.add_options(command("demo", demo.run, about))
    about = "Edit a picture by one instruction after another, each anywhere or in a mask."
    edit.add_options(command("edit", run_edit, about))

    about = "Try guidance's two scales, and seeds, at once: one labelled sheet and the single pictures."
    looks.add_grid_options(command("grid", looks.run_grid, about))
    about = "Show where an instruction would act, as a map over the picture and as a mask."
    looks.add_where_options(command("where", looks.run_where, about))

    about = "Tell in a minute or two whether this machine with these weights is all right; 1 where something is red."
    well = command("check", run_check, about)
    well.add_argument("--json", action="store_true", help="for programs")
    add_model_options(well, find=True)
    add_path_options(well)

    about = "Insert an object: GracoNet says where, BLIP-2 what it is, EMILIE draws it there."
    insert.add_options(command("insert", insert.run, about))

    about = "The edits of a session as a stack: take any back, hide, move, weaken or change it, and keep the others."
    stack.add_options(command("stack", stack.run, about))

    page = command("studio", run_studio, "Edit on a page in the browser: paint where, say what, undo, branch, save.")
    page.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this computer only)")
    page.add_argument("--port", type=int, default=7860, help="default: 7860; 0 takes any free one")
    page.add_argument("--open", action="store_true", help="open the browser too")
    page.add_argument("--auth", metavar="USER:PASSWORD", help="who may come in (beyond this computer default: a link)")
    insert.add_network_options(page)
    add_model_options(page, find=True)
    add_path_options(page)

    info = command("info", run_info, "Tell what a weight file is and which model it fits, or how a picture was made.")
    info.add_argument("file", type=Path, help="weights, or a PNG that `emilie edit` wrote")
    info.add_argument("--sha256", action="store_true", help="also hash the file and say whether it is the released one")

    convert = command("convert", run_convert, "Write the one family of weights that inference needs, about 2.1 GB.")
    convert.add_argument("input", type=Path)
    convert.add_argument("output", type=Path, metavar="OUT.safetensors")
    convert.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    convert.add_argument("--config", help="config of a model that is not built in (YAML)")
    convert.add_argument("--ema", choices=EMA_CHOICES, default="auto", help=EMA_HELP)
    convert.add_argument("--overwrite", action="store_true")

    about = "Fetch, verify and convert the released weights (7.7 GB, of which 2.1 stay), and CLIP's tokenizer."
    download = command("download", run_download, about)
    download.add_argument("--out", type=Path, default=Path("weights"), metavar="DIR", help="default: weights")
    download.add_argument("--tokenizer", action="store_true", help="only the tokenizer files")
    download.add_argument("--keep", action="store_true", help="keep the 7.7 GB once the 2.1 GB of them are made")

    evaluate = command("toy-eval", run_toy_eval, "Measure the model that ships against the small world's ground truth.")
    evaluate.add_argument("--scenes", type=whole, default=200, help="unseen scenes (default: 200)")
    evaluate.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    evaluate.add_argument("--quick", action="store_true", help="autoencoder and single edits only")
    add_model_options(evaluate)
    add_path_options(evaluate)

    speed_help = "Time an edit, tell where the time goes and how far that is from what the machine can do."
    add_options(command("speed", run_speed, speed_help))

    help = "Compare methods: benchmark folders, runs, reports, the preference study."
    add_commands(commands.add_parser("bench", help=help, description=help), add_model_options)
    return top


def run_edit(args: argparse.Namespace) -> int | None:
    return edit.run(args) if args.batch is None else batch.run(args)


def run_studio(args: argparse.Namespace) -> None:
    from .inserting import Networks
    from .studio import listen, studio

    listen(args.host, args.port, args.auth).close()  # what cannot work is told before weights are loaded
    editor = load_editor(args)
    studio(editor, args.host, args.port, args.open, args.auth, Networks(editor, args.graconet, args.blip2))


def run_check(args: argparse.Namespace) -> int:
    from . import check

    return check.run(args)


def run_info(args: argparse.Namespace) -> None:
    from ..canvas import about
    from ..checkpoint.info import info

    say(about.lines(args.file) if about.is_png(args.file) else info(args.file, sha256=args.sha256))


def run_convert(args: argparse.Namespace) -> None:
    import torch

    from ..checkpoint.convert import convert

    dtype = getattr(torch, args.dtype)
    say(f"converting {args.input} to {args.dtype}")  # what cannot be told, as where the disk is full, is told before
    say(convert(args.input, args.output, dtype, config=args.config, overwrite=args.overwrite, ema=args.ema))


def run_download(args: argparse.Namespace) -> None:
    from ..checkpoint.download import download
    from ..checkpoint.ready import ready

    if args.tokenizer:
        say(download(args.out, tokenizer_only=True))
        return
    path = ready(args.out, args.keep, tell=partial(print, flush=True))
    say(f'ready: {path}. Now: emilie check, then emilie edit photo.jpg "make it winter"')


def run_toy_eval(args: argparse.Namespace) -> None:
    from ..toy.evaluate import evaluate

    editor = load_editor(args)
    demo.need_small_world(editor)
    if args.out:
        writable(args.out.parent)
    evaluate(editor, args.scenes, args.out, quick=args.quick)
