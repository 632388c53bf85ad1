"""`emilie info`: what is in a weight file, for a person."""

from pathlib import Path

from tqdm import tqdm

from ..config import Config, load_config
from ..errors import CheckpointError, printable
from . import reading
from .download import RELEASED, hash_file
from .networks import meta_networks


def pick_config(entries: dict[str, reading.Entry], path: Path, config: str | Path | None) -> Config:
    """The named config, or the built-in one that the file's tensors tell. Raises CheckpointError, ConfigError."""
    name = config or reading.detect_config(entries)
    loaded = load_config(name) if name else None
    reading.refuse(path, entries)
    if loaded is None:
        raise CheckpointError(f"{path} is {reading.explain_unknown(entries)}")
    return loaded


def info(path: str | Path, sha256: bool = False, config: str | Path | None = None) -> str:
    """What a weight file holds and which model it fits, in lines for a person; `sha256`: its hash too.

    config: the model to hold it against, a built-in name or a YAML file; None: the one that its tensors tell. A file
    that fits no model is described all the same. Raises CheckpointError for one that cannot be read, ConfigError.
    """
    path = Path(path)
    entries = reading.index(path)
    prefixes = {
        "UNet (EMA)": reading.EMA + "diffusion_model",
        "UNet (raw)": reading.RAW,
        "autoencoder": reading.VAE,
        "text model": reading.TEXT,
        "other": "",
    }
    notes = reading.metadata(path)
    kind = "diffusers' folder" if path.is_dir() else "torch.save" if notes is None else "safetensors"
    size = tqdm.format_sizeof(reading.nbytes(path, entries), "B")
    lines = [str(path), f"  format       {kind}, {size}, {len(entries)} tensors"]
    for key, name in (("source", "source"), ("family", "family"), ("sha256", "its sha256")):  # what `convert` notes
        if key in (notes or {}):
            lines.append(f"  {name:<12} {printable(notes[key], 80)}")
    rest = dict(entries)
    for name, prefix in prefixes.items():
        family = [rest.pop(key) for key in list(rest) if key.startswith(prefix)]
        if family:
            dtypes = ", ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in family}))
            nbytes = tqdm.format_sizeof(sum(entry.nbytes for entry in family), "B")
            lines.append(f"  {name:<12} {len(family):>4} tensors, {nbytes:>8}, {dtypes}")
    try:
        model = pick_config(entries, path, config)
        _, report = reading.check(meta_networks(model), entries, model.name)
        lines.append(f"  model        {model.name}: complete, every shape fits")
        lines.append(f"  sampling     uses the {report.family} UNet weights")
        if report.dropped:
            lines.append("  not needed   " + ", ".join(f"{n} {rule}" for rule, n in sorted(report.dropped.items())))
    except CheckpointError as error:
        lines.append(f"  model        does not fit: {str(error).removeprefix(f'{path} is ')}")
    if sha256 and path.is_dir():
        raise CheckpointError(f"{path} is a folder: --sha256 is of a file")
    if sha256:
        digest = hash_file(path)
        released = RELEASED.get(digest)
        lines.append(f"  sha256       {digest}")
        lines.append(f"               {f'the released {released}' if released else 'not a released file'}")
    return "\n".join(lines)
