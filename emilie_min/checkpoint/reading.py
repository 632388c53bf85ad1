"""Weight files in the original layout, `.ckpt` or `.safetensors`, read strictly, safely and without waste.

A file is first indexed: every tensor's dtype, shape and place, and no tensor read. Each network's parameters are then
named in the file's terms (`key_map`); what they do not name is dropped by a rule below or is an error. Last, only
the named tensors are read, one at a time, cast on the way to the device.
"""

import mmap
import os
import re
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..errors import CheckpointError, first_line, printable

RAW, EMA, VAE, TEXT = "model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model.transformer."

DROPPED = {  # what is in released files and not needed to sample: a name for it, and its keys
    "noise schedule (computed from the config)": "betas|logvar|scale_factor|alphas_cumprod(_prev)?"
    "|(sqrt|log)_(one_minus_)?alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod|posterior_[a-z0-9_]+",
    "counters of the weight average": r"model_ema\.(decay|num_updates)",
    "position numbers": r"cond_stage_model\.transformer\..*position_ids",
    "the autoencoder's training loss": r"first_stage_model\.loss\..*",
}

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
                      "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
                      "F8_E5M2": torch.float8_e5m2}  # fmt: skip

# Calls that a pickle may ask for and that stay uncalled: values among a trainer's records.
HARMLESS_CALLS = {"numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
                  "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
                  "collections.defaultdict", "builtins.frozenset", "pathlib.PosixPath",
                  "pathlib.WindowsPath"}  # fmt: skip
HELD = 64_000_000  # bytes that a reader maps before it lets them go


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; of a .ckpt also where it lies: `stride` in elements, `offset` in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Elements from the first to the last."""
        return 0 if 0 in self.shape else 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride))


def index(path: str | Path) -> dict[str, Entry]:
    """Every tensor of a weight file, by key, without reading one.

    Raises CheckpointError for a file that is missing, cut short, of another format, or that would run code when read.
    """
    try:
        entries = _index(Path(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except CheckpointError as error:  # may quote the file
        raise CheckpointError(printable(error)) from error
    for key, entry in entries.items():
        if not key.isprintable() or len(key) > 500 or len(entry.shape) > 8:
            what = f"a tensor called {key[:80]!r} of {len(entry.shape)} dimensions"
            raise CheckpointError(f"{path} holds {what}: not a weight file")
    return entries


def _index(path: Path) -> dict[str, Entry]:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the single .ckpt or .safetensors file in the original layout")
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}: `emilie download` fetches the released ones")
    with open(path, "rb") as f:
        head, size = f.read(9), os.fstat(f.fileno()).st_size
    if _is_safetensors(path):
        return _index_safetensors(path)
    if head.startswith(b"PK"):
        return _index_ckpt(path)
    wrong = f"{path} ({size} bytes) is neither a .safetensors file nor a .ckpt of PyTorch's"
    if head.startswith(b"\x80\x02"):
        wrong = f"{path} is a bare pickle, as PyTorch wrote them before 1.6: load it with PyTorch and save it anew"
    elif head.startswith(b"version "):
        wrong += ": a Git LFS pointer, so run `git lfs pull`"
    elif head.lower().startswith((b"<!doc", b"<html")):
        wrong += ": a web page, so the download went wrong"
    raise CheckpointError(wrong)


def _is_safetensors(path: str | Path) -> bool:
    with open(path, "rb") as f:
        return f.read(9)[8:] == b"{"  # behind its length in 8 bytes, a header in JSON


def _index_safetensors(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(path, "pt") as f:
            slices = {key: f.get_slice(key) for key in f.keys()}
            found = {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and what its readers of JSON and of paths raise
        wrong = f"{path} is cut short, or no .safetensors file"
        raise CheckpointError(f"{wrong}. Fetch it again ({first_line(error)})") from error
    strange = next((key for key, (dtype, _) in found.items() if dtype not in SAFETENSORS_DTYPES), None)
    if strange is not None:
        raise CheckpointError(f"{path}: {strange} has the dtype {found[strange][0]}, which is not known here")
    return {key: Entry(SAFETENSORS_DTYPES[dtype], shape) for key, (dtype, shape) in found.items()}


def metadata(path: str | Path) -> dict[str, str] | None:
    """What the writer of a .safetensors file noted in it, once `index` has read it; None for another format."""
    if not _is_safetensors(path):
        return None
    with safe_open(path, "pt") as f:
        return f.metadata() or {}


def _index_ckpt(path: Path) -> dict[str, Entry]:
    """Tensors of a file that `torch.save` wrote: unpickled with weights_only under FakeTensorMode, which reads no data.

    Lightning also pickles its callbacks' classes. Each name that PyTorch does not know stands for an inert
    placeholder while the file is read, so nothing is imported; a file that wants one called is refused.
    """
    if not zipfile.is_zipfile(path):
        wrong = "its table of contents, which stands at the end, is missing. Fetch it again"
        raise CheckpointError(f"{path} is cut short: {wrong}")
    try:
        records = _records(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        placeholders: list[Any] = [(_Placeholder(name, (), {}), name) for name in names]
        with FakeTensorMode(), torch.serialization.safe_globals(placeholders), open(path, "rb") as f:
            state = torch.load(f, weights_only=True)  # not by its path, whose name torch.load would believe
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        state = state if isinstance(state, dict) else {}
        tensors = {key: t for key, t in state.items() if isinstance(key, str) and isinstance(t, Tensor)}
        entries = {key: _placed(key, t, records) for key, t in tensors.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:  # whatever unpickling a hostile or broken file can raise
        lines = str(error).partition("WeightsUnpickler error:")[2] or str(error).rpartition("trusted source.")[2]
        reason = next((line.strip() for line in lines.splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{path} is refused, nothing of it was run: {reason}") from error
    if not entries:
        raise CheckpointError(f"{path} holds no state_dict of tensors")
    return entries


def _records(path: Path) -> dict[int, int]:
    """Where each record of a zip file begins, and its length. Those of other machines or tools are refused."""
    records = {}
    with zipfile.ZipFile(path) as z, open(path, "rb") as f:
        for record in z.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError("its tensors are compressed. Load it with PyTorch and save it anew")
            if record.filename.endswith("byteorder") and z.read(record) != b"little":
                raise CheckpointError("its numbers are big-endian. Save it anew on a common machine")
            f.seek(record.header_offset + 26)
            begin = record.header_offset + 30 + sum(struct.unpack("<2H", f.read(4)))
            records[begin] = record.file_size
    return records


def _placed(key: str, t: Tensor, records: dict[int, int]) -> Entry:
    """A fake tensor's place in the file, if all of it lies in the record that is its storage."""
    begin, skipped = getattr(t.untyped_storage(), "_checkpoint_offset", None), t.storage_offset() * t.dtype.itemsize
    if begin not in records:
        raise CheckpointError(f"{key} has no record of its own. Load it with PyTorch and save it anew")
    entry = Entry(t.dtype, tuple(t.shape), t.stride(), begin + skipped)
    if skipped + entry.span * t.dtype.itemsize > records[begin]:
        raise CheckpointError(f"{key} reaches beyond its record. Fetch it again")
    return entry


class _Placeholder(type):
    """A class that stands for one that a pickle names: it can be named and instantiated, never called."""

    def __new__(mcs, name: str, bases: tuple, namespace: dict):
        inert = {"__new__": lambda cls, *args: object.__new__(cls), "__setstate__": lambda self, state: None}
        return super().__new__(mcs, name, bases, inert)

    def __init__(cls, name: str, bases: tuple, namespace: dict):
        super().__init__(name, bases, namespace)

    def __call__(cls, *args):
        if cls.__name__ not in HARMLESS_CALLS:
            raise CheckpointError(f"it wants {cls.__name__} called, which no weights need. Nothing of it was run")
        return object.__new__(cls)


class Reader:
    """Tensors of an indexed file, one at a time; what is mapped of the file is let go every few tensors."""

    def __init__(self, path: str | Path, entries: dict[str, Entry]):
        self.path, self.entries = path, entries
        self.open()

    def open(self) -> None:
        self.held = 0
        self.file: Any
        if _is_safetensors(self.path):
            self.file = safe_open(self.path, "pt")
        else:
            with open(self.path, "rb") as f:
                self.file = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)

    def get(self, key: str, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
        """The tensor, contiguous, in memory of its own; dtype: None = the file's."""
        e = self.entries[key]
        if e.offset is None:
            tensor = self.file.get_tensor(key)
        elif not e.span:
            tensor = torch.empty(e.shape, dtype=e.dtype)
        else:
            flat = torch.frombuffer(self.file, dtype=e.dtype, count=e.span, offset=e.offset)
            tensor = flat.as_strided(e.shape, e.stride)
        out = tensor.to(device, dtype or e.dtype, copy=True).contiguous()
        self.held += e.nbytes
        if self.held > HELD:
            self.open()
        return out


@dataclass
class LoadReport:
    """What a load took and what it left: `family` is "EMA" or "raw", `dropped` counts keys by rule."""

    family: str
    dropped: dict[str, int] = field(default_factory=dict)


def key_map(networks: dict[str, nn.Module], keys) -> tuple[dict[str, dict[str, str]], str]:
    """The file's key of each parameter, by network ("unet", "vae", "text"), and which UNet weights: "EMA" or "raw".

    EMA weights are what the original samples with; they stand under the parameter's name without its dots.
    """
    ema = any(key.startswith(EMA + "diffusion_model") for key in keys)  # pruned copies may keep the counters alone
    inner = "text_model." if any(key.startswith(TEXT + "text_model.") for key in keys) else ""
    rules = {
        "unet": lambda name: EMA + ("diffusion_model." + name).replace(".", "") if ema else RAW + name,
        "vae": lambda name: VAE + name,
        "text": lambda name: TEXT + inner + name.removeprefix("transformer.").removeprefix("text_model."),
    }
    wanted = {part: {name: rules[part](name) for name in net.state_dict()} for part, net in networks.items()}
    for names in wanted.values():
        if len(set(names.values())) < len(names):
            raise CheckpointError("two parameters share a name once its dots are stripped: this model cannot use EMA")
    return wanted, "EMA" if ema else "raw"


def check(networks: dict[str, nn.Module], entries: dict[str, Entry], what: str) -> tuple[dict[str, dict], LoadReport]:
    """`key_map`, once every key of the file is accounted for and every shape fits.

    Raises CheckpointError that lists the first missing, misshapen and unknown tensors.
    """
    wanted, family = key_map(networks, entries)
    report = LoadReport(family)
    missing, misshapen = [], []
    for part, names in wanted.items():
        shapes = {name: tuple(p.shape) for name, p in networks[part].state_dict().items()}
        for name, key in names.items():
            if key not in entries:
                missing.append(key)
            elif entries[key].shape != shapes[name]:
                misshapen.append(f"{key} is {_by(entries[key].shape)} and should be {_by(shapes[name])}")
            elif not entries[key].dtype.is_floating_point:
                misshapen.append(f"{key} holds {entries[key].dtype} and should hold floating-point numbers")
    rules = dict(DROPPED)
    if family == "EMA":
        rules["raw UNet weights beside the EMA ones"] = re.escape(RAW) + ".*"
    extra = []
    for key in entries.keys() - {key for names in wanted.values() for key in names.values()}:
        rule = next((rule for rule, pattern in rules.items() if re.fullmatch(pattern, key)), None)
        if rule:
            report.dropped[rule] = report.dropped.get(rule, 0) + 1
        else:
            extra.append(key)
    complaints = [
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("misshapen", misshapen), ("unknown", extra))
        if keys
    ]
    if complaints:
        raise CheckpointError(f"{what}: {'; '.join(complaints)}")
    return wanted, report


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def load(
    networks: dict[str, nn.Module],
    path: str | Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
    entries: dict[str, Entry] | None = None,
) -> LoadReport:
    """Fill networks built on the meta device from a file; strict, cast to `dtype` (None: the file's own).

    networks: "unet", "vae" and "text" in LDM's key layout. Raises CheckpointError; see `index` and `check`.
    """
    entries = index(path) if entries is None else entries
    wanted, report = check(networks, entries, str(path))
    reader = Reader(path, entries)
    for part, names in wanted.items():
        state = {name: reader.get(key, device, dtype) for name, key in names.items()}
        networks[part].load_state_dict(state, strict=True, assign=True)
        for name, buffer in networks[part].named_buffers():
            if buffer.is_meta:  # not in any file: transformers' position numbers
                if not name.endswith("position_ids"):
                    raise CheckpointError(f"transformers keeps a buffer {name} that this package does not know")
                owner = networks[part].get_submodule(name.rpartition(".")[0])
                owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        networks[part].requires_grad_(False).eval()
    return report


def detect_config(entries: dict[str, Entry]) -> str | None:
    """The built-in config whose UNet has this file's width and input channels, or None."""
    first = entries.get(RAW + "input_blocks.0.0.weight") or entries.get(EMA + "diffusion_modelinput_blocks00weight")
    widths: dict[tuple[int, ...], str] = {(320, 8): "ip2p", (320, 4): "sd15", (64, 8): "toy", (64, 4): "toy-t2i"}
    return widths.get(first.shape[:2]) if first else None


def explain_unknown(entries: dict[str, Entry]) -> str:
    """What kind of file has such keys, for the error when no config fits it."""
    if any(key.startswith(("down_blocks.", "mid_block.", "encoder.down_blocks.")) for key in entries):
        return "a network in diffusers' layout; the original layout is one file with model.diffusion_model.* keys"
    if not any(key.startswith((RAW, EMA)) for key in entries):
        return "not a checkpoint in the original layout: no key starts with model.diffusion_model. or model_ema."
    return "of a model that no built-in config fits: name its YAML file with --config"
