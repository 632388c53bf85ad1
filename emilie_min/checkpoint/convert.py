"""`emilie convert`: what sampling needs of a weight file, in one precision."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import CheckpointError
from . import reading, writing
from .info import pick_config
from .names import RAW, TEXT, VAE
from .networks import meta_networks

DTYPES = ("float16", "bfloat16", "float32")
PREFIXES = {"unet": RAW, "vae": VAE, "text": TEXT}  # in a converted file


def convert(
    source: str | Path,
    target: str | Path,
    dtype: str | torch.dtype = "float16",
    config: str | Path | None = None,
    overwrite: bool = False,
    ema: str = "auto",
    about: Mapping[str, str] | None = None,
) -> str:
    """Write what sampling needs of a weight file, and no more, as .safetensors; returns a line that says what was done.

    The UNet is written under the raw weights' names and filled with the EMA ones where there are any, so the result
    is a common pruned copy. dtype: "float16", "bfloat16" or "float32". The result is held in memory, 2.1 GB of the
    released model in float16, and the target appears when it is whole. ema: see `reading.key_map`; about: more notes.
    Raises CheckpointError, ConfigError.
    """
    source, target, dtype = Path(source), Path(target), str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype}")
    if target.suffix != ".safetensors":
        raise CheckpointError(f"the converted file is a .safetensors file: name it so, not {target.name}")
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: name a file in it")
    if not target.parent.is_dir():
        raise CheckpointError(f"there is no folder {target.parent}")
    if target.exists() and source.exists() and os.path.samefile(source, target):
        raise CheckpointError(f"{target} is the file that is read: name another target")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} is there already: remove it, name another, or ask to overwrite it")
    entries = reading.index(source)
    networks = meta_networks(pick_config(entries, source, config))
    wanted, report = reading.check(networks, entries, str(source), ema)
    names, _ = reading.key_map(networks, [reading.TEXT + "text_model."])  # those of a pruned copy
    keys = {names[part][name]: key for part, files in wanted.items() for name, key in files.items()}

    reader, tensors = reading.Reader(source, entries), {}
    reading.tell_apart(reader, wanted["unet"], report.family, ema)
    nbytes = sum(torch.Size(entries[key].shape).numel() for key in keys.values()) * getattr(torch, dtype).itemsize
    notes = {"format": "pt", "source": os.fsencode(source.name).decode("utf-8", "replace"), "family": report.family}
    notes |= about or {}
    try:
        writing.need_space(target.parent, nbytes)
        for name, key in keys.items():
            tensors[name] = reader.get(key, "cpu", getattr(torch, dtype))
            reader.finite(key, tensors[name], str(source))
        notes |= {f"sha256.{part}": digest for part, digest in digests(tensors, tensors.__getitem__).items()}
        writing.write_tensors(tensors, target, notes)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {writing.explain(error)}") from error
    before, after = (tqdm.format_sizeof(n, "B") for n in (reading.nbytes(source, entries), target.stat().st_size))
    made = f"{target}: {len(keys)} tensors in {dtype}, {after}"
    return f"{made}, from the {report.family} weights of {source} ({before})"


def digests(keys: Iterable[str], get: Callable[[str], Tensor]) -> dict[str, str]:
    """Of each network in a converted file the SHA-256 of its tensors: names, dtypes, shapes and bytes, by name."""
    keys, made = sorted(keys), {}
    for part, prefix in PREFIXES.items():
        digest = hashlib.sha256()
        for key in keys:
            if key.startswith(prefix):
                tensor = get(key).contiguous()
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy())
        made[part] = digest.hexdigest()
    return made
