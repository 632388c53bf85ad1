"""From a weight file to an `Editor`: which config, which device, and networks built without initialising them."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from .checkpoint import reading
from .checkpoint.networks import build
from .config import BUILT_IN, TOKENIZER_FILES, load_config
from .emilie import Editor
from .errors import CheckpointError, EmilieError, TokenizerError, explain_oom, first_line, printable, quote
from .faster.half import HalfAutoencoderKL

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    weights: str | Path | None = None,
    config: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    compile: bool | None = False,
    low_memory: bool = False,
    plain: bool = False,
    ema: str = "auto",
) -> Editor:
    """Networks from a file, ready to edit.

    weights: None = the small model that ships, a .ckpt or .safetensors path, a folder that diffusers wrote, or
    "random"; config: one of `config.BUILT_IN`, a YAML path, or None = told by the file's tensors; device, dtype: None =
    CUDA in float16 if there is one, else CPU in float32; tokenizer: a folder with CLIP's vocab.json and merges.txt;
    ema: which of two UNets, see `checkpoint.reading.key_map`.

    Three ways give the same results to rounding. On CUDA the default replays the network's calls as CUDA graphs, see
    `faster.graph`; compile: on CUDA torch.compile first, which takes its time once, see `faster.compile`, on a CPU a
    faster forward pass that needs no compiler, see `faster.fast`, None: that on a CPU alone, as the command does;
    low_memory: slower, see `faster.low_memory`. plain: none of these, every step as `emilie.py` and `unet.py` read.
    Raises CheckpointError, ConfigError.
    """
    for name, path in (("weights", weights), ("config", config), ("tokenizer", tokenizer)):
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise EmilieError(f"{name} must be a path, not {quote(path)}")
    for name, flag in (("compile", compile), ("low_memory", low_memory), ("plain", plain)):
        if not isinstance(flag, bool) and not (name == "compile" and flag is None):
            raise EmilieError(f"{name} must be True or False, not {quote(flag)}")
    if tokenizer and not all(os.path.isfile(Path(tokenizer) / name) for name in TOKENIZER_FILES):
        raise TokenizerError(f"{printable(tokenizer)} does not hold {' and '.join(TOKENIZER_FILES)}")
    device = pick_device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    elif not isinstance(dtype, torch.dtype) or dtype not in (*DTYPES.values(), torch.float64):
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise EmilieError(f"dtype must be float32, float16 or bfloat16, not {printable(dtype, 80)}")
        dtype = DTYPES[dtype]
    if compile and low_memory:
        raise EmilieError("compile needs the networks where low_memory does not leave them: choose one")
    if plain and (compile or low_memory):
        raise EmilieError("plain is the network without compile and low_memory: choose one")
    if compile and device.type not in ("cuda", "cpu"):
        raise EmilieError(f"compile is for CUDA and the CPU, and this is {device}: leave it out")
    held_on, held_as = device, dtype
    if low_memory:
        held_on = torch.device("cpu")
        held_as = torch.float16 if (device.type, dtype) == ("cpu", torch.float32) else dtype
    weights = shipped("toy.safetensors") if weights is None else weights

    if weights == "random":
        config = config or "toy"
    else:
        entries = reading.index(weights)
        reading.refuse(weights, entries)
        config = config or reading.detect_config(entries)
        if config is None:
            raise CheckpointError(f"{weights} is {reading.explain_unknown(entries)}")
    settings = load_config(config)
    tokenizers = [Path(tokenizer)] if tokenizer else [Path(weights) / "tokenizer"] if Path(weights).is_dir() else []
    tokenizers += [folder / sub for folder in weights_folders() for sub in ("tokenizer", ".")]
    drawn_on = device if weights == "random" else torch.device("meta")
    with explain_oom("while the weights were loaded"):
        with drawn_on, torch.random.fork_rng(devices=[drawn_on] if drawn_on.type == "cuda" else []):
            torch.manual_seed(0)  # for "random"; nothing is drawn on the meta device
            networks: dict[str, Any] = build(settings, tuple(tokenizers))
            if dtype != torch.float32:
                networks["vae"] = HalfAutoencoderKL(settings.vae)
        if weights == "random":
            family = "random"
            for network in networks.values():
                network.to(held_on, held_as).requires_grad_(False).eval()
        else:
            family = reading.load(networks, weights, held_on, held_as, entries, ema).family
    model = f"{settings.name if settings.name in BUILT_IN else Path(settings.name).stem}/{Path(weights).name}"
    kind = Editor if plain else editor_class(device, compile, low_memory)
    return kind(settings, **networks, device=device, dtype=dtype, model=model, family=family)


def editor_class(device: torch.device, compile: bool | None, low_memory: bool) -> type[Editor]:
    """How an editor on a device computes: see `load`."""
    if low_memory:
        from .faster.low_memory import LowMemoryEditor

        return LowMemoryEditor
    if device.type == "cuda":
        from .faster.compile import CompiledEditor
        from .faster.graph import GraphEditor

        return CompiledEditor if compile else GraphEditor
    if device.type == "cpu" and compile is not False:
        from .faster.fast import FastEditor

        return FastEditor
    return Editor


def weights_folders() -> list[Path]:
    """Where weights and tokenizers are looked for: ./weights, the clone's weights/, the installed package's."""
    here = Path(__file__).resolve().parent
    return [Path("weights"), here.parent / "weights", here / "weights"]


def shipped(name: str) -> Path:
    """The first file of this name in those folders; where there is none, the path at which it would be looked for."""
    paths = [folder / name for folder in weights_folders()]
    return next((path for path in paths if path.is_file()), paths[0])


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """A device by name, None: CUDA if there is one, else the CPU. Raises EmilieError for one that is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picked = torch.device(device)
            torch.zeros(1, device=picked).item()
    except Exception as error:  # each kind of device has its own way to be absent
        reason = printable(first_line(error).partition(". ")[0], 120)
        reason = "this PyTorch is without it" if "aten::" in reason or "ASSERT" in reason else reason
        raise EmilieError(f"device {printable(device, 80)} cannot be used here: {reason}") from error
    return picked
