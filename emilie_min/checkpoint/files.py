"""Weight files as a user handles them: say what is in one, convert one, download the released one.

The heavy imports stand inside the functions, so that the command line can import this module for its help alone.
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

from ..config import Config, load_config
from ..errors import CheckpointError, EmilieError, TokenizerError
from . import writing

DTYPES = ("float16", "bfloat16", "float32")
SAFETENSORS_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

REPOSITORY, WEIGHTS = "timbrooks/instruct-pix2pix", "instruct-pix2pix-00-22000.safetensors"
CLIP, TOKENIZER = "openai/clip-vit-large-patch14", ("vocab.json", "merges.txt")
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")  # taken where the repository has them


def meta_networks(config: Config) -> dict:
    """The three networks of a config on the meta device: shapes and names, no memory. {"unet", "vae", "text"}."""
    import torch

    from ..loading import build

    with torch.device("meta"):
        return build(config)


def _config(entries: dict, path: Path, config: str | Path | None) -> tuple[str, Config]:
    """The named config, or the built-in one that the file's tensors tell. Raises CheckpointError, ConfigError."""
    from . import reading

    name = config or reading.fits(entries)
    if name is None:
        raise CheckpointError(f"{path} is {reading.describe(entries)}")
    return str(name), load_config(name)


def size(nbytes: int) -> str:
    """Bytes for people, in decimal units as disks and the hub count them."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} bytes"


def hash_file(path: str | Path) -> str:
    """The file's SHA-256 in hex, with a progress bar on a terminal. Raises CheckpointError if it cannot be read."""
    from tqdm import tqdm

    digest, path = hashlib.sha256(), Path(path)
    look = {"unit": "B", "unit_scale": True, "desc": f"sha256 of {path.name}", "leave": False, "disable": None}
    try:
        with open(path, "rb") as f, tqdm(total=path.stat().st_size, **look) as bar:
            while chunk := f.read(1 << 22):
                digest.update(chunk)
                bar.update(len(chunk))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def info(path: str | Path, sha256: bool = False, config: str | Path | None = None) -> str:
    """What a weight file holds and which model it fits, in lines for a person; `sha256`: its hash too.

    config: the model to hold it against, a built-in name or a YAML file; None: the one that its tensors tell. A file
    that fits no model is described all the same. Raises CheckpointError for one that cannot be read, ConfigError.
    """
    from . import reading

    path = Path(path)
    entries = reading.index(path)
    families = {
        "UNet (EMA)": [key for key in entries if key.startswith(reading.EMA + "diffusion_model")],
        "UNet (raw)": [key for key in entries if key.startswith(reading.RAW)],
        "autoencoder": [key for key in entries if key.startswith(reading.VAE)],
        "text model": [key for key in entries if key.startswith(reading.TEXT)],
    }
    families["other"] = sorted(entries.keys() - {key for keys in families.values() for key in keys})
    notes = reading.metadata(path)
    kind = "torch.save" if notes is None else "safetensors"
    lines = [str(path), f"  format       {kind}, {size(path.stat().st_size)}, {len(entries)} tensors"]
    for key in ("source", "family"):  # what `convert` notes
        if key in (notes or {}):
            lines.append(f"  {key:<12} {''.join(c for c in notes[key][:80] if c.isprintable())}")
    for family, keys in families.items():
        if keys:
            dtypes = ", ".join(sorted({str(entries[key].dtype).removeprefix("torch.") for key in keys}))
            nbytes = size(sum(entries[key].nbytes for key in keys))
            lines.append(f"  {family:<12} {len(keys):>4} tensors, {nbytes:>9}, {dtypes}")
    try:
        name, loaded = _config(entries, path, config)
        _, report = reading.check(meta_networks(loaded), entries, name)
        lines.append(f"  model        {name}: complete, every shape fits")
        lines.append(f"  sampling     uses the {report.family} UNet weights")
        if report.dropped:
            lines.append("  not needed   " + ", ".join(f"{n} {rule}" for rule, n in sorted(report.dropped.items())))
    except CheckpointError as error:
        lines.append(f"  model        does not fit: {str(error).removeprefix(f'{path} is ')}")
    if sha256:
        digest = hash_file(path)
        released = reading.RELEASED.get(digest)
        lines.append(f"  sha256       {digest}")
        lines.append(f"               {f'the released {released}' if released else 'not a released file'}")
    return "\n".join(lines)


def convert(
    source: str | Path, target: str | Path, dtype="float16", config: str | Path | None = None, overwrite: bool = False
) -> str:
    """Write what sampling needs of a weight file, and no more, as .safetensors; returns a line that says what was done.

    The UNet is written under the raw weights' names and filled with the EMA ones where there are any, so the result
    is a common pruned copy. dtype: "float16", "bfloat16" or "float32". One tensor at a time is in memory, and the
    target appears when it is whole. Raises CheckpointError, ConfigError.
    """
    import torch

    from . import reading

    source, target, dtype = Path(source), Path(target), str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype}")
    if target.suffix != ".safetensors":
        raise CheckpointError(f"the converted file is a .safetensors file: name it so, not {target.name}")
    if target.is_dir() or not target.parent.is_dir():
        wrong = f"{target} is a folder: name a file in it" if target.is_dir() else f"there is no folder {target.parent}"
        raise CheckpointError(wrong)
    if target.exists() and source.exists() and os.path.samefile(source, target):
        raise CheckpointError(f"{target} is the file that is read: name another target")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} is there already: remove it, name another, or ask to overwrite it")
    entries = reading.index(source)
    _, loaded = _config(entries, source, config)
    networks = meta_networks(loaded)
    wanted, report = reading.check(networks, entries, str(source))
    kept, _ = reading.file_keys(networks, [reading.TEXT + "text_model."])  # names of a pruned copy
    pairs = [(kept[part][name], key) for part, names in wanted.items() for name, key in names.items()]

    itemsize, offset = getattr(torch, dtype).itemsize, 0
    header = {
        "__metadata__": {
            "format": "pt",
            "source": os.fsencode(source.name).decode("utf-8", "replace"),
            "family": report.family,
        }
    }
    for name, key in pairs:
        nbytes = torch.Size(entries[key].shape).numel() * itemsize
        record = {"dtype": SAFETENSORS_NAMES[dtype], "shape": entries[key].shape}
        header[name] = {**record, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # so that every tensor is aligned
    reader = reading.Reader(source, entries)
    try:
        _need(target.parent, 8 + len(head) + offset)
        with writing.replacing(target) as f:
            f.write(len(head).to_bytes(8, "little") + head)
            for _, key in pairs:
                tensor = reader.get(key, "cpu", getattr(torch, dtype))
                if not tensor.isfinite().all():
                    raise CheckpointError(f"{source}: {key} is not finite in {dtype}: try bfloat16 or float32")
                f.write(tensor.reshape(-1).view(torch.uint8).numpy())
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {_why(error)}") from error
    before, after = size(source.stat().st_size), size(8 + len(head) + offset)
    return (
        f"{target}: {len(pairs)} tensors in {dtype}, {after}, from the {report.family} weights of {source} ({before})"
    )


def download(
    folder: str | Path = "weights",
    tokenizer_only: bool = False,
    endpoint: str | None = None,
    revision: str = "main",
    expected_sha256: str | None = None,
) -> str:
    """Fetch the released weights into `folder` and CLIP's tokenizer into `folder`/tokenizer; returns lines to print.

    What is there already stays; what was interrupted goes on where it stopped. The weights appear under their name
    once their SHA-256 is right; a file of that name with another one is moved aside. endpoint: a mirror of the hub,
    default HF_ENDPOINT or huggingface.co. Raises CheckpointError, TokenizerError.
    """
    from . import reading

    folder, lines = Path(folder), []
    expected = expected_sha256 or next(digest for digest, name in reading.RELEASED.items() if name == WEIGHTS)
    tokenizer = folder / "tokenizer"
    if all((tokenizer / name).is_file() for name in TOKENIZER):
        lines.append(f"{tokenizer}: already there")
    else:
        for name in TOKENIZER + TOKENIZER_EXTRAS:
            partial = _fetch(CLIP, name, tokenizer / name, "main", endpoint, TokenizerError)
            if partial is None and name in TOKENIZER:
                raise TokenizerError(f"{CLIP} has no {name} at {endpoint or 'the hub'}: try again without the mirror")
            if partial:
                os.replace(partial, tokenizer / name)
                lines.append(f"{tokenizer / name}: {size((tokenizer / name).stat().st_size)}")
    if tokenizer_only:
        return "\n".join(lines)

    target = folder / WEIGHTS
    if target.exists():
        if hash_file(target) == expected:
            return "\n".join([*lines, f"{target}: already there, sha256 as released"])
        aside = target.with_name(target.name + ".wrong")
        os.replace(target, aside)
        lines.append(f"{target} was not the released file: moved to {aside}, which you may delete")
    partial = _fetch(REPOSITORY, WEIGHTS, target, revision, endpoint, CheckpointError, resume=True)
    if partial is None:
        raise CheckpointError(f"{REPOSITORY} has no {WEIGHTS} at revision {revision}: check it, and the mirror if any")
    found = hash_file(partial)
    if found != expected:
        partial.unlink()
        raise CheckpointError(
            f"{WEIGHTS} came with sha256 {found} and not {expected}: it was deleted. Try again, or without the mirror"
        )
    os.replace(partial, target)
    return "\n".join([*lines, f"{target}: {size(target.stat().st_size)}, sha256 as released"])


def _fetch(
    repository: str,
    name: str,
    target: Path,
    revision: str,
    endpoint: str | None,
    complaint: type[EmilieError],
    resume: bool = False,
) -> Path | None:
    """A file of a hub repository, whole, beside its target; None if there is none. `resume`: after what is there.

    `hf_hub_download` starts anew after an interruption, so this uses the two functions below it: one for the size and
    place of a file, one that reads from a given byte on and tries again by itself when a connection breaks.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.file_download import http_get

    url = hf_hub_url(repository, name, revision=revision, endpoint=endpoint)
    partial = target.with_name(f".{name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remote = get_hf_file_metadata(url, token=False)  # public files: no one's token leaves for a mirror
        with open(partial, "ab" if resume else "wb") as f:
            if remote.size is not None:
                if f.tell() > remote.size:
                    f.truncate(0)
                    f.seek(0)
                _need(target.parent, remote.size - f.tell())
            http_get(remote.location, f, resume_size=f.tell(), expected_size=remote.size, displayed_filename=name)
            f.flush()
            os.fsync(f.fileno())
        return partial
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 404):  # 401 is the hub's answer for a repository that is not there
            return None
        raise complaint(f"{url}: the server answered {status}. Run the same command again later") from error
    except (HTTPError, OSError) as error:
        if isinstance(error, HTTPError | ConnectionError | TimeoutError) or error.errno is None:
            kept = partial.stat().st_size if resume and partial.exists() else 0
            again = f"run the same command again, {size(kept)} are kept" if kept else "is this machine online?"
            raise complaint(f"{url} cannot be fetched ({_first_line(error)}): {again}") from error
        raise complaint(f"{target} cannot be written: {_why(error)}") from error


def _need(folder: Path, nbytes: int) -> None:
    """Raises OSError, as a write would, where the disk has no room for so many bytes."""
    if shutil.disk_usage(folder).free < nbytes:
        raise OSError(errno.ENOSPC, f"No space left: {size(nbytes)} are needed in {folder}")


def _why(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.strerror}): free some space or name another folder"
    if isinstance(error, PermissionError):
        return "this user may not write there: name another folder"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
