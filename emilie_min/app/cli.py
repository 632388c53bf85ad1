"""The command `emilie`. Bad input is one line on stderr and exit code 2; PyTorch is imported only when needed."""

import argparse
import errno
import glob
import math
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

from ..bench.cli import add_commands
from ..canvas.settings import GATES, ITERATES, RESCALES, SAMPLERS
from ..checkpoint.writing import atomic_write
from ..errors import CanvasError, EmilieError, InstructionError, MaskError
from ..speed.cli import add_options, run_speed


class Parser(argparse.ArgumentParser):
    """argparse, with one line for an error."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; the exit code: 0, 2 for bad input, 130 when interrupted."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if args.command == "edit" and not any(word.startswith("-") for word in rest):
        args.instructions, rest = args.instructions + rest, []  # argparse stops at the first option in between
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"emilie: note: {message}", file=sys.stderr)
            args.run(args)
        return 0
    except EmilieError as error:
        print(f"emilie: error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR):
            raise
        print(f"emilie: error: cannot write {error.filename or ''}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nemilie: interrupted; what was written before is complete", file=sys.stderr)
        return 130
    return 2


def parser() -> Parser:
    top = Parser(prog="emilie", description="Edit a picture by instructions, one after another (EMILIE, WACV 2024).")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, run, help: str) -> Parser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", run_demo, "Edit a scene of the small world by four instructions with the model that ships.")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the pictures (out/demo)")
    demo.add_argument("--seed", type=int, default=0, help="another scene, other instructions (default: 0)")
    add_model_options(demo)
    add_path_options(demo)

    edit = command("edit", run_edit, "Edit a picture by one instruction after another, each anywhere or in a mask.")
    edit.add_argument("input", metavar="IMAGE", help="the picture; may be left out with a --canvas that exists")
    edit.add_argument("instructions", metavar="INSTRUCTION", nargs="*", help="what to change; several are done in turn")
    edit.add_argument("--mask", action="append", default=[], metavar="N=FILE", help="edit N only where FILE is white")
    edit.add_argument("--box", action="append", default=[], metavar="N=X0,Y0,X1,Y1", help="edit N only in this box, px")
    edit.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="N=WHERE:INSTRUCTION",
        help="do this too in edit N, in the same pass; WHERE: a mask's FILE or X0,Y0,X1,Y1. What edit N itself says "
        "then holds in its own mask or, without one, everywhere else",
    )
    edit.add_argument("--soft", action="store_true", help="keep the masks' greys instead of thresholding them")
    edit.add_argument("--gate", choices=GATES, default="anchor", help="what a mask does (default: anchor)")
    edit.add_argument("--keep-background", action="store_true", help="outside a mask keep the pixels, to the bit")
    edit.add_argument("--rescale", choices=RESCALES, default="paper", help="how the factor f is found (default: paper)")
    edit.add_argument("--iterate", choices=ITERATES, default="latent", help="what the next edit starts from")
    edit.add_argument("--steps", type=count, help="sampling steps; more is slower and finer")
    edit.add_argument("--sampler", choices=SAMPLERS, default="euler_ancestral", help="dpmpp_2m*: for few steps")
    edit.add_argument(
        "--guidance-interval", type=interval, metavar="LOW,HIGH", help="guide only between these noise levels (sigmas)"
    )
    edit.add_argument("--reuse", type=count, default=1, metavar="N", help="run the deep layers at every N-th step only")
    edit.add_argument("--text-scale", type=scale, help="how strongly to follow the instruction")
    edit.add_argument("--image-scale", type=scale, help="how closely to stay with the picture")
    edit.add_argument("--resolution", type=resolution, help='longer side to work at, in px, or "native"')
    edit.add_argument("--input-size", action="store_true", help="write pictures at the input's size")
    edit.add_argument("--seed", type=int, help="of all noise (default: 0, or what the --canvas began with)")
    edit.add_argument("--canvas", type=Path, metavar="FILE", help="keep the session here; goes on with one that exists")
    edit.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the pictures")
    add_model_options(edit)
    add_path_options(edit)

    page = command("studio", run_studio, "Edit on a page in the browser: paint where, say what, undo, branch, save.")
    page.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this computer only)")
    page.add_argument("--port", type=int, default=7860, help="default: 7860; 0 takes any free one")
    page.add_argument("--open", action="store_true", help="open the browser too")
    add_model_options(page)
    add_path_options(page)

    info = command("info", run_info, "Tell what a weight file is: families, dtype, size, which model it fits.")
    info.add_argument("file", type=Path)
    info.add_argument("--sha256", action="store_true", help="also hash the file and say whether it is the released one")

    convert = command("convert", run_convert, "Write the one family of weights that inference needs, about 2.1 GB.")
    convert.add_argument("input", type=Path)
    convert.add_argument("output", type=Path, metavar="OUT.safetensors")
    convert.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    convert.add_argument("--config", help="config of a model that is not built in (YAML)")
    convert.add_argument("--overwrite", action="store_true")

    download = command("download", run_download, "Fetch the released weights (7.7 GB) and CLIP's tokenizer, once.")
    download.add_argument("--out", type=Path, default=Path("weights"), metavar="DIR", help="default: weights")
    download.add_argument("--tokenizer", action="store_true", help="only the tokenizer files")

    evaluate = command("toy-eval", run_toy_eval, "Measure the model that ships against the small world's ground truth.")
    evaluate.add_argument("--scenes", type=count, default=200, help="unseen scenes (default: 200)")
    evaluate.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    evaluate.add_argument("--quick", action="store_true", help="autoencoder and single edits only")
    add_model_options(evaluate)
    add_path_options(evaluate)

    speed_help = "Time an edit, tell where the time goes and how far that is from what the machine can do."
    add_options(command("speed", run_speed, speed_help))

    help = "Compare methods: benchmark folders, runs, reports, the preference study."
    add_commands(commands.add_parser("bench", help=help, description=help), add_model_options)
    return top


def add_model_options(sub: Parser) -> None:
    sub.add_argument("--weights", help="a .ckpt or .safetensors file (default: the small model that ships)")
    sub.add_argument("--config", help="ip2p, sd15, toy or a YAML file (default: told by the weights)")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder with CLIP's vocab.json and merges.txt")
    sub.add_argument("--device", help="cuda, cpu, ... (default: the best here)")
    sub.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on CUDA, else float32"
    )


def add_path_options(sub: Parser) -> None:
    sub.add_argument("--compile", action="store_true", help="faster, the same result; a GPU compiles minutes, once")
    sub.add_argument("--low-memory", action="store_true", help="slower, the same result; for a GPU of 4 GB, or without")


def resolution(text: str) -> int | str:
    return text if text == "native" else int(text)


def count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 1000, not {text}")
    return int(text)


def interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = math.nan
    if not 0 <= low < high:
        raise argparse.ArgumentTypeError(f"must be two noise levels LOW,HIGH with 0 <= LOW < HIGH, not {text}")
    return low, high


def scale(text: str) -> float:
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return float(text)


def load_editor(args: argparse.Namespace):
    from ..loading import load

    editor = load(args.weights, args.config, args.device, args.dtype, args.tokenizer, args.compile, args.low_memory)
    print(f"{editor.model}: {editor.family} weights, {editor.dtype}, {editor.device}".replace("torch.", ""))
    return editor


def run_demo(args: argparse.Namespace) -> None:
    from ..canvas.canvas import open as open_canvas
    from ..canvas.strip import strip
    from ..toy import world
    from ..toy.judge import judge

    started = time.time()
    editor = load_editor(args)
    need_small_world(editor)
    folder = writable(args.out)
    scene = world.scene(args.seed)
    canvas = open_canvas(world.render(scene), editor, seed=args.seed)
    print(f"wrote {save_picture(canvas.image, folder / '0_input.png')}")
    cells, right = [(canvas.image, "input", None)], 0
    plan = (("recolour", False), ("add", True), ("background", False), ("style", False))
    for i, (kind, masked) in enumerate(plan, 1):
        text, scene, mask = world.instruct(scene, args.seed, kind)
        image = edit_with_bar(canvas, i, [(text, mask if masked else None)])
        verdict = judge(image, scene)
        right += verdict.correct
        print(f"wrote {save_picture(image, folder / f'{i}.png')}: {verdict.why or 'as it should be'}")
        cells.append((image, text + (" (in the mask)" if masked else ""), mask if masked else None))
    print(f"wrote {save_picture(strip(cells), folder / 'strip.png')}")
    print(f"{right} of 4 pictures are what the instructions ask for; {time.time() - started:.0f} s")


def run_edit(args: argparse.Namespace) -> None:
    from ..canvas import images
    from ..canvas.canvas import open as open_canvas
    from ..canvas.strip import strip

    going_on = args.canvas is not None and args.canvas.exists()
    if going_on and not Path(args.input).exists() and not looks_like_a_file(args.input):
        args.input, args.instructions = None, [args.input, *args.instructions]
    if going_on and args.resolution is not None:
        raise CanvasError("--resolution belongs to the start of a session, and --canvas goes on with one")
    if not args.instructions:
        raise InstructionError('no instruction: say what to change, as in `emilie edit photo.png "make it winter"`')
    for text in args.instructions:
        if not text.strip():
            raise InstructionError("an instruction is empty: say what to change")
    edits = read_edits(args)
    if args.input is None and args.input_size:
        raise CanvasError("--input-size needs the picture as first argument: the canvas keeps its working size only")
    original = images.read_image(args.input) if args.input is not None else None

    editor = load_editor(args)
    if going_on:
        canvas = open_canvas(args.canvas, editor)
        opened = canvas.states[0].image
        refit = images.crop if canvas.native else images.fit
        if original is not None and refit(original, opened.size).tobytes() != opened.tobytes():
            raise CanvasError(f"{args.canvas} is a session on another picture than {args.input}")
    else:
        canvas = open_canvas(original, editor, args.seed or 0, args.resolution)
    for regions in edits:  # so that the last edit's mask does not fail after an hour of edits
        canvas.read_regions([mask for _, mask in regions], args.soft)
        editor.text.tokenize([text for text, _ in regions])
    folder = writable(args.out)
    if args.canvas is not None:
        writable(args.canvas.parent, "--canvas")

    stem = Path(args.input).stem if args.input is not None else args.canvas.name.split(".")[0]
    numbers = range(len(canvas.states), len(canvas.states) + len(args.instructions))
    name = unused_name(folder, stem, numbers if going_on else None)
    session = args.canvas or folder / f"{name}.canvas.safetensors"
    cells = [(canvas.image, "input" if canvas.at == 0 else canvas.state.instruction, None)]
    for i, regions in enumerate(edits, 1):
        image = edit_with_bar(
            canvas,
            i,
            regions,
            steps=args.steps,
            text_scale=args.text_scale,
            image_scale=args.image_scale,
            gate=args.gate,
            soft=args.soft,
            rescale=args.rescale,
            iterate=args.iterate,
            sampler=args.sampler,
            guidance_interval=args.guidance_interval,
            reuse=args.reuse,
            keep_background=args.keep_background and all(mask is not None for _, mask in regions),
            seed=args.seed if going_on else None,
        )
        cells.append((image, canvas.state.instruction, canvas.state.mask))
        out = images.restore_size(image, original, canvas.native, canvas.edited_mask()) if args.input_size else image
        path = save_picture(out, folder / f"{name}_{canvas.at}.png")
        canvas.save(session)
        print(f"wrote {path} and {session}")
    name = f"{name}_{canvas.at}" if going_on else name
    print(f"wrote {save_picture(strip(cells), folder / f'{name}_strip.png')}")


def run_studio(args: argparse.Namespace) -> None:
    from .studio import listen, studio

    listen(args.host, args.port).close()  # a missing gradio or a taken port is told before weights are loaded
    studio(load_editor(args), args.host, args.port, args.open)


def need_small_world(editor) -> None:
    from ..toy import world

    if editor.config.sampling.resolution != world.SIZE:
        raise EmilieError(f"{editor.model} was not made for the small world of {world.SIZE} px: leave --weights out")


def edit_with_bar(canvas, number: int, regions: list[tuple], **settings):
    from tqdm import tqdm

    steps = settings.get("steps") or canvas.editor.config.sampling.steps
    with tqdm(total=steps, desc=f"{number}. {' + '.join(text for text, _ in regions)}", leave=True) as bar:
        for step in canvas.steps(regions, **settings):
            bar.update(step.sigma > 0)
    return canvas.image


def read_edits(args: argparse.Namespace) -> list[list[tuple]]:
    """The instructions, --mask N=FILE, --box N=X0,Y0,X1,Y1 and --also -> of each edit its (instruction, mask) pairs."""
    masks, also = {}, {n: [] for n in range(1, len(args.instructions) + 1)}
    examples = {"--mask": "2=mask.png", "--box": "2=10,10,200,200", "--also": '"2=mask.png:make it blue"'}
    for option, values in (("--mask", args.mask), ("--box", args.box), ("--also", args.also)):
        for value in values:
            number, _, what = value.partition("=")
            if not number.isdecimal() or not what:
                raise MaskError(f"{option} {value}: say which edit it is for, as in {option} {examples[option]}")
            if int(number) not in also:
                raise MaskError(f"{option} {value}: there is no edit {number}, only 1 to {len(also)}")
            if option == "--also":
                where, _, text = what.partition(":")
                if not where or not text.strip():
                    raise InstructionError(f"{option} {value}: say where and what, as in {option} {examples[option]}")
                is_box = set(where) <= set("0123456789,- ")
                also[int(number)].append((text.strip(), read_box(where, f"{option} {value}") if is_box else where))
                continue
            if int(number) in masks:
                raise MaskError(f"{option} {value}: edit {number} has a mask already")
            masks[int(number)] = read_box(what, f"{option} {value}") if option == "--box" else what
    if args.keep_background and not masks:
        raise MaskError("--keep-background needs a --mask or --box: without one there is no background")
    return [[(text, masks.get(n)), *also[n]] for n, text in enumerate(args.instructions, 1)]


def read_box(text: str, option: str) -> tuple[int, ...]:
    try:
        box = tuple(int(v) for v in text.split(","))
    except ValueError:
        box = ()
    if len(box) != 4:
        raise MaskError(f"{option}: a box is four whole numbers X0,Y0,X1,Y1")
    return box


def looks_like_a_file(text: str) -> bool:
    from PIL import Image

    return os.sep in text or Path(text).suffix.lower() in Image.registered_extensions()


def writable(folder: Path, option: str = "--out") -> Path:
    """The folder, made if need be, once a file could be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise EmilieError(f"cannot write to {folder}: {error.strerror}; choose another folder with {option}") from error
    return folder


def unused_name(folder: Path, stem: str, numbers: range | None = None) -> str:
    """`stem`, or `stem-2`, ...: the first under which nothing was written, so that no run overwrites another.

    numbers: of the pictures that a continued session will write, which may stand beside its earlier ones.
    """

    def used(name: str) -> bool:
        if numbers is not None:
            return any((folder / f"{name}_{n}.png").exists() for n in numbers)
        pictures = any(folder.glob(f"{glob.escape(name)}_[0-9]*.png"))
        return pictures or (folder / f"{name}.canvas.safetensors").exists()

    number, name = 1, stem
    while used(name):
        number += 1
        name = f"{stem}-{number}"
    return name


def save_picture(image, path: Path) -> Path:
    """A PNG, whole or not at all."""
    try:
        with atomic_write(path) as f:
            image.save(f, format="PNG")
    except OSError as error:
        raise EmilieError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def run_info(args: argparse.Namespace) -> None:
    from ..checkpoint.info import info

    print(info(args.file, sha256=args.sha256))


def run_convert(args: argparse.Namespace) -> None:
    import torch

    from ..checkpoint.convert import convert

    print(convert(args.input, args.output, getattr(torch, args.dtype), config=args.config, overwrite=args.overwrite))


def run_download(args: argparse.Namespace) -> None:
    from ..checkpoint.download import download

    print(download(args.out, tokenizer_only=args.tokenizer))


def run_toy_eval(args: argparse.Namespace) -> None:
    from ..toy.evaluate import evaluate

    editor = load_editor(args)
    need_small_world(editor)
    if args.out:
        writable(args.out.parent)
    evaluate(editor, args.scenes, args.out, quick=args.quick)
