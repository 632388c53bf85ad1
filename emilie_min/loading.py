"""From a weight file to an `Editor`: which config, which device, and networks built without initialising them."""

from pathlib import Path

import torch
from torch import nn

from .checkpoint import reading
from .config import BUILT_IN, TOKENIZER_FILES, Config, load_config
from .emilie import Editor, memory_told
from .errors import CheckpointError, EmilieError, TokenizerError
from .text import TextEncoder
from .unet import UNetModel
from .vae import AutoencoderKL


def load(
    weights: str | Path | None = None,
    config: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    compile: bool = False,
    low_memory: bool = False,
) -> "Editor":
    """Networks from a file, ready to edit.

    weights: None = the small model that ships, a .ckpt or .safetensors path, or "random"; config: one of
    `config.BUILT_IN`, a YAML path, or None = told by the file's tensors; device, dtype: None = CUDA in float16 if there
    is one, else CPU in float32; tokenizer: a folder with CLIP's vocab.json and merges.txt; compile: the fast path,
    the same results to rounding, see `fast`; low_memory: the lean path, slower, see `lean`.
    Raises CheckpointError, ConfigError.
    """
    if tokenizer and not all((Path(tokenizer) / name).is_file() for name in TOKENIZER_FILES):
        raise TokenizerError(f"{tokenizer} does not hold {' and '.join(TOKENIZER_FILES)}")
    device = _device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    elif isinstance(dtype, str):
        if dtype not in ("float32", "float16", "bfloat16"):
            raise EmilieError(f"dtype must be float32, float16 or bfloat16, not {dtype}")
        dtype = getattr(torch, dtype)
    if compile and low_memory:
        raise EmilieError("compile needs the networks where low_memory does not leave them: choose one")
    held = (device, dtype)
    if low_memory:
        held = ("cpu", torch.float16 if (device.type, dtype) == ("cpu", torch.float32) else dtype)
    folders = weights_folders()
    weights = shipped("toy.safetensors") if weights is None else weights

    entries = None
    if weights == "random":
        config = config or "toy"
    else:
        entries = reading.index(weights)
        if config is None:
            config = reading.fits(entries)
            if config is None:
                raise CheckpointError(f"{weights} is {reading.describe(entries)}")
    name, config = str(config), load_config(config)
    tokenizers = ([Path(tokenizer)] if tokenizer else []) + [f / sub for f in folders for sub in ("tokenizer", ".")]
    drawn_on = device if weights == "random" else torch.device("meta")
    with drawn_on, torch.random.fork_rng(devices=[drawn_on] if drawn_on.type == "cuda" else []):
        torch.manual_seed(0)  # for "random"; nothing is drawn on the meta device
        networks = build(config, tuple(tokenizers))
    with memory_told("while the weights were loaded"):
        if weights == "random":
            report = reading.Report("random")
            for network in networks.values():
                network.to(*held).requires_grad_(False).eval()
        else:
            report = reading.load(networks, weights, *held, entries)
    model = f"{name if name in BUILT_IN else Path(name).stem}/{Path(weights).name}"
    kind = Editor
    if compile:
        from .faster.fast import FastEditor as kind
    elif low_memory:
        from .faster.low_memory import LeanEditor as kind
    return kind(config, **networks, device=device, dtype=dtype, model=model, report=report)


def build(config: Config, tokenizer_folders: tuple[str | Path, ...] = ()) -> dict[str, nn.Module]:
    """The three networks of a config: "unet", "vae", "text". Under `torch.device("meta")` they take no memory."""
    params = config.model.params
    return {
        "unet": UNetModel(params.unet_config.params),
        "vae": AutoencoderKL(params.first_stage_config.params),
        "text": TextEncoder(params.cond_stage_config.params, tokenizer_folders),
    }


def weights_folders() -> list[Path]:
    """Where weights and tokenizers are looked for: ./weights, the clone's weights/, the installed package's."""
    here = Path(__file__).resolve().parent
    return [Path("weights"), here.parent / "weights", here / "weights"]


def shipped(name: str) -> Path:
    """The first file of this name in those folders; where there is none, the path at which it would be looked for."""
    paths = [folder / name for folder in weights_folders()]
    return next((path for path in paths if path.is_file()), paths[0])


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0][:120]
        raise EmilieError(f"device {device} cannot be used here: {reason}") from error
    return device
