"""What several commands share: the options of the model and its loading, the folder to write to, the bar of an edit."""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import EmilieError, note, printable, say

EMA_CHOICES = ("auto", "yes", "no")  # without PyTorch, see `checkpoint.reading.key_map`
EMA_HELP = "of a file with two UNets, the averaged one or the other (default: auto, the averaged one if there is one)"


def add_model_options(sub: argparse.ArgumentParser, find: bool = False) -> None:
    """find: without --weights take the released ones, where they are."""
    default = (
        "weights/ip2p.safetensors if `emilie download` made it, else the small model" if find else "the small model"
    )
    sub.add_argument("--weights", help=f"a .ckpt or .safetensors file or diffusers' folder (default: {default})")
    sub.set_defaults(find=find)
    sub.add_argument("--config", help="ip2p, sd15, toy or a YAML file (default: told by the weights)")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder with CLIP's vocab.json and merges.txt")
    sub.add_argument("--device", help="cuda, cpu, ... (default: the best here)")
    sub.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on CUDA, else float32"
    )


def add_path_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--compile", action="store_true", help="on a GPU: faster still, compiles for about a minute, once")
    sub.add_argument("--ema", choices=EMA_CHOICES, default="auto", help=EMA_HELP)
    sub.add_argument("--low-memory", action="store_true", help="slower, the same result; for a GPU of 4 GB, or without")
    sub.add_argument("--plain", action="store_true", help="the network as it reads: no CUDA graphs, no faster CPU path")


def load_editor(args: argparse.Namespace):
    """The `Editor` of these options, told in a line."""
    from ..loading import load

    weights = args.weights
    if weights is None and args.find and args.config is None:
        weights = find_released()
    editor = load(
        weights,
        args.config,
        args.device,
        args.dtype,
        args.tokenizer,
        args.compile or None,
        args.low_memory,
        args.plain,
        args.ema,
    )
    small = ", the small model that ships" if weights is None else ""
    say(f"{editor.model}{small}: {editor.family} weights, {editor.dtype}, {editor.device}".replace("torch.", ""))
    return editor


def find_released() -> Path | None:
    """The released weights, converted or as they came, where `emilie download` puts them; None: they are not there."""
    from ..checkpoint.download import RELEASED
    from ..checkpoint.ready import READY
    from ..loading import weights_folders

    paths = [folder / name for name in (READY, *RELEASED.values()) for folder in weights_folders()]
    return next((path for path in paths if path.is_file()), None)


def small_world(editor) -> bool:
    """Whether a model was made for the small world of shapes."""
    from ..toy import world

    return editor.config.sampling.resolution == world.SIZE


def tell_foreign(editor, picture, name: str = "the picture") -> bool:
    """Whether a small model is given a working picture that is no scene of its world, which is told."""
    from ..toy import judge

    if not small_world(editor) or judge.is_scene(picture):
        return False
    note(
        f"{printable(name, 100)} is no scene of the small model's world of shapes, and it knows nothing else: expect "
        "mud. `emilie download` fetches the released weights, which edit photos"
    )
    return True


def writable(folder: Path, option: str = "--out") -> Path:
    """The folder, made if need be, once a file could be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise EmilieError(f"cannot write to {folder}: {error.strerror}; choose another folder with {option}") from error
    return folder


def edit_with_bar(canvas, number: int, regions: list[tuple], **settings):
    """`Canvas.edit`, or a `Photo`'s, the number-th of this run, with a bar of its steps."""
    editor = getattr(canvas, "canvas", canvas).editor
    total = settings.get("steps") or editor.config.sampling.steps
    with_bar(canvas.steps(regions, **settings), total, f"{number}. {' + '.join(text for text, *_ in regions)}")
    return canvas.image


def with_bar(steps: Iterable, total: int, what: str) -> None:
    """Go through an edit's steps, with a bar of them."""
    from tqdm import tqdm

    with tqdm(total=total, desc=printable(what, 80)) as bar:
        for step in steps:
            bar.update(step.sigma > 0)
