"""Weight files in the original layout, `.ckpt` or `.safetensors`, read strictly, safely and without waste.

A file is first indexed: every tensor's dtype, shape and place, and no tensor read. Each network's parameters are then
named in the file's terms (`key_map`); what they do not name is dropped by a rule below or is an error. Last, only
the named tensors are read, one at a time, cast on the way to the device.
"""

import logging
import math
import mmap
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..errors import CheckpointError, first_line, note, printable
from . import names as other_names
from .names import DROPPED, EMA, RAW, TEXT, VAE
from .schema import parse

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
                      "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
                      "F8_E5M2": torch.float8_e5m2}  # fmt: skip

# Calls that a pickle may ask for and that stay uncalled: values among a trainer's records.
HARMLESS_CALLS = {"numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
                  "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
                  "collections.defaultdict", "builtins.frozenset", "pathlib.PosixPath",
                  "pathlib.WindowsPath"}  # fmt: skip
LARGE_CALL = re.compile(rb"c(__builtin__|builtins)\nbytearray\n")  # PyTorch lets it take any memory
NUMBERED = re.compile(r"[^/]*/data/(\d{1,9})")  # a tensor's record
HELD = 64_000_000  # bytes that a reader maps before it lets them go


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; of a .ckpt also where it lies: `stride` in elements, `offset` in bytes.

    key, file: its name in the file, and which of a folder's, where they are not what it is indexed by.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    offset: int | None = None
    key: str | None = None
    file: Path | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Elements from the first to the last."""
        return 0 if 0 in self.shape else 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride))


def index(path: str | Path, inside: str | None = None) -> dict[str, Entry]:
    """Every tensor of a weight file or of diffusers' folder, by its key in the original layout, without reading one.

    inside: of a .ckpt, the entry that holds a state dict of each network, whose keys become network.key; where there
    is none, as without. Raises CheckpointError for a file that is missing, cut short, of another format, or that would
    run code when read.
    """
    try:
        path = Path(path)
        entries = _index_folder(path) if path.is_dir() else _renamed(path, _index(path, inside))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except CheckpointError as error:  # may quote the file
        raise CheckpointError(printable(error)) from error
    for key, entry in entries.items():
        if not key.isprintable() or len(key) > 500 or len(entry.shape) > 8:
            what = f"a tensor called {key[:80]!r} of {len(entry.shape)} dimensions"
            raise CheckpointError(f"{path} holds {what}: not a weight file")
    return entries


def _renamed(path: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    """By the original's names for the same numbers, and with its shapes."""
    names, prefix = other_names.original_names(entries)
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{path} holds the same tensor under two names")
    if prefix:
        note(f"{path} keeps its tensors under {prefix}, which is left out")
    return {
        names[key]: _fitted(names[key], replace(e, key=key) if names[key] != key else e) for key, e in entries.items()
    }


def _fitted(key: str, entry: Entry) -> Entry:
    """A matrix in the place of a 1x1 convolution as that."""
    if len(entry.shape) == 2 and other_names.MATRICES.fullmatch(key):
        stride = (*entry.stride, 1, 1) if entry.stride else ()
        return replace(entry, shape=(*entry.shape, 1, 1), stride=stride)
    return entry


def _index_folder(path: Path) -> dict[str, Entry]:
    """The folder that diffusers writes: unet/, vae/, text_encoder/."""
    lacking = [part for part in other_names.FOLDER if not (path / part).is_dir()]
    if lacking:
        way = "a .ckpt or .safetensors file, or a folder of diffusers' with unet/, vae/, text_encoder/ and tokenizer/"
        inside = [f"{path / name}" for name in ("unet", "vae") if (path / name).is_dir()]
        raise CheckpointError(
            f"{path} is a folder without {', '.join(lacking)}: name {way}"
            if inside or (path / "model_index.json").is_file()
            else f"{path} is a folder: name {way}"
        )
    entries: dict[str, Entry] = {}
    for part, stems in other_names.FOLDER.items():
        found = {key: replace(e, key=key, file=f) for f in _part(path / part, stems) for key, e in _index(f).items()}
        for key, name in other_names.from_diffusers(part, found).items():
            entries[name] = _fitted(name, found[key])
    return entries


def _part(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    """A part's file or, as its table of contents names them, files: .safetensors before .bin, full before float16."""
    for stem in [f"{stem}{variant}" for variant in ("", ".fp16") for stem in stems]:
        plain, _, variant = stem.partition(".")
        for suffix in ("safetensors", "bin"):
            if (folder / f"{stem}.{suffix}").is_file():
                return [folder / f"{stem}.{suffix}"]
            table = folder / (f"{plain}.{suffix}.index" + (f".{variant}" if variant else "") + ".json")
            if table.is_file():
                try:
                    names = set(parse(table.read_text(encoding="utf-8"))["weight_map"].values())
                    return sorted(folder / Path(name).name for name in names)
                except Exception as error:
                    raise CheckpointError(f"{table} cannot be read: {first_line(error)}") from error
    raise CheckpointError(f"{folder} holds no {stems[0]}.safetensors and no {stems[-1]}.bin")


def _index(path: Path, inside: str | None = None) -> dict[str, Entry]:
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}: `emilie download` fetches the released ones")
    with open(path, "rb") as f:
        head, size = f.read(9), os.fstat(f.fileno()).st_size
    if _is_safetensors(path):
        return _index_safetensors(path)
    if head.startswith(b"PK"):
        return _index_ckpt(path, inside)
    wrong = f"{path} ({size} bytes) is neither a .safetensors file nor a .ckpt of PyTorch's"
    if head.startswith(b"\x80\x02"):
        wrong = f"{path} is a bare pickle, as PyTorch wrote them before 1.6: load it with PyTorch and save it anew"
    elif head.startswith(b"GGUF"):
        wrong = f"{path} is a GGUF file, whose numbers are quantized: name the model's .safetensors file"
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
    """What the writer of a .safetensors file noted in it, once `index` has read it; None for another format.

    Of diffusers' folder, what its scheduler is set to.
    """
    if Path(path).is_dir():
        try:
            settings = parse(
                (Path(path) / "scheduler/scheduler_config.json").read_text(encoding="utf-8"), infinite=True
            )
            return {key: str(value) for key, value in settings.items()}
        except (OSError, ValueError, AttributeError):
            return None
    if not _is_safetensors(path):
        return None
    with safe_open(path, "pt") as f:
        return f.metadata() or {}


def nbytes(path: str | Path, entries: dict[str, Entry]) -> int:
    """Of a weight file, or of the files of a folder."""
    return sum(file.stat().st_size for file in {entry.file or Path(path) for entry in entries.values()})


def _index_ckpt(path: Path, inside: str | None = None) -> dict[str, Entry]:
    """Tensors of a file that `torch.save` wrote: unpickled with weights_only under FakeTensorMode, which reads no data.

    Lightning also pickles its callbacks' classes. Each name that PyTorch does not know stands for an inert
    placeholder while the file is read, so nothing is imported; a file that wants one called is refused.
    """
    if not zipfile.is_zipfile(path):
        wrong = "its table of contents, which stands at the end, is missing. Fetch it again"
        raise CheckpointError(f"{path} is cut short: {wrong}")
    try:
        records = _records(path)
        with _speechless():
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        placeholders: list[Any] = [(_Placeholder(name, (), {}), name) for name in names]
        with _speechless(), FakeTensorMode(), torch.serialization.safe_globals(placeholders), open(path, "rb") as f:
            state = torch.load(f, weights_only=True)  # not by its path, whose name torch.load would believe
        nested = state.get(inside) if isinstance(state, dict) and inside else None
        tensors = joined(nested) if isinstance(nested, dict) else _tensors(path, state)
        entries = {key: _placed(key, t, records) for key, t in tensors.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:  # whatever unpickling a hostile or broken file can raise
        lines = str(error).partition("WeightsUnpickler error:")[2] or str(error).rpartition("trusted source.")[2]
        reason = next((line.strip() for line in lines.splitlines() if line.strip()), type(error).__name__)
        wrong = f"it is damaged, or no weights of PyTorch's ({printable(reason, 200)})"
        raise CheckpointError(f"{path} is refused, nothing of it was run: {wrong}. Fetch it again") from error
    if not entries:
        raise CheckpointError(f"{path} holds no state_dict of tensors")
    return entries


@contextmanager
def _speechless() -> Iterator[None]:
    """What PyTorch logs of a tensor that it then raises an error for, or warns of in its own old classes."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def joined(parts: dict) -> dict[str, Tensor]:
    """The tensors of a dict of state dicts, by part.key."""
    states = {part: state for part, state in parts.items() if isinstance(part, str) and isinstance(state, dict)}
    return {
        f"{part}.{key}": tensor
        for part, state in states.items()
        for key, tensor in state.items()
        if isinstance(key, str) and isinstance(tensor, Tensor)
    }


def _tensors(path: Path, state: object) -> dict[str, Tensor]:
    """Of what was pickled, the dict of tensors, also under another name than Lightning's "state_dict"."""

    def own(value: object) -> dict[str, Tensor]:
        items = value.items() if isinstance(value, dict) else ()
        return {key: t for key, t in items if isinstance(key, str) and isinstance(t, Tensor)}

    if not isinstance(state, dict) or "state_dict" in state or own(state):
        return own(state.get("state_dict", state) if isinstance(state, dict) else state)
    inner = {name: own(value) for name, value in state.items() if isinstance(name, str)}
    name = max(inner, key=lambda name: len(inner[name]), default=None)
    if name is None or not any(key.startswith((RAW, EMA, VAE)) for key in inner[name]):
        return {}
    note(f"{path} keeps its tensors under {name!r}")
    return inner[name]


def _records(path: Path) -> dict[int, int]:
    """Where each record of a zip file begins, and its length. Those of other machines or tools are refused."""
    records, numbers, ordered = {}, {}, False
    with zipfile.ZipFile(path) as z, open(path, "rb") as f:
        for record in z.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise CheckpointError("its tensors are compressed. Load it with PyTorch and save it anew")
            if record.filename.endswith("byteorder") and z.read(record) != b"little":
                raise CheckpointError("its numbers are big-endian. Save it anew on a common machine")
            if record.filename.endswith("/data.pkl") and LARGE_CALL.search(z.read(record)):
                raise CheckpointError("it wants bytearray called, which no weights need. Nothing of it was run")
            f.seek(record.header_offset + 26)
            begin = record.header_offset + 30 + sum(struct.unpack("<2H", f.read(4)))
            records[begin] = record.file_size
            numbers[begin] = int(found[1]) if (found := NUMBERED.fullmatch(record.filename)) else -1
            ordered |= record.filename.endswith("/.format_version")
    placed = [numbers[begin] for begin in sorted(numbers) if numbers[begin] >= 0]
    if ordered and placed != sorted(placed):  # of these PyTorch finds each by the length of those before
        raise CheckpointError(
            "its records stand in another order than PyTorch's. Load it with PyTorch and save it anew"
        )
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
        self.path, self.entries, self.held = Path(path), entries, 0
        self.files: dict[Path, object] = {}

    def open(self, path: Path):
        if path not in self.files:
            if _is_safetensors(path):
                self.files[path] = safe_open(path, "pt")
            else:
                with open(path, "rb") as f:
                    self.files[path] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        return self.files[path]

    def get(self, key: str, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
        """The tensor, contiguous, in memory of its own; dtype: None = the file's."""
        e = self.entries[key]
        out = self.stored(key).to(device, dtype or e.dtype, copy=True).contiguous()
        self.held += e.nbytes
        if self.held > HELD:
            self.held = 0
            self.files.clear()
        return out

    def stored(self, key: str, rows: int | None = None) -> Tensor:
        """The tensor, or its first rows, as the file holds it, in the file's memory."""
        e = self.entries[key]
        file = self.open(e.file or self.path)
        if e.offset is None:
            if rows is not None:
                return file.get_slice(e.key or key)[:rows]
            return file.get_tensor(e.key or key).view(e.shape)
        if not e.span:
            return torch.empty(e.shape, dtype=e.dtype)
        flat = torch.frombuffer(file, dtype=e.dtype, count=e.span, offset=e.offset)
        tensor = flat.as_strided(e.shape, e.stride)
        return tensor if rows is None or not e.shape else tensor[:rows]

    def finite(self, key: str, tensor: Tensor, what: str) -> None:
        """Raises CheckpointError that names a tensor with NaN or infinite values, which the file has or a cast made."""
        if (tensor if tensor.dtype.itemsize > 1 else tensor.float()).isfinite().all():
            return
        name = self.entries[key].key or key
        if self.stored(key).isfinite().all():
            raise CheckpointError(f"{what}: {name} is not finite in {str(tensor.dtype)[6:]}: try bfloat16 or float32")
        wrong = f"{name} is not finite in the file (NaN or infinite)"
        raise CheckpointError(f"{what} is damaged: {wrong}. Fetch or merge it again")


@dataclass
class LoadReport:
    """What a load took and what it left: `family` is "EMA" or "raw", `dropped` counts keys by rule."""

    family: str
    dropped: dict[str, int] = field(default_factory=dict)


EMA_CHOICES = ("auto", "yes", "no")
LAG = 0.02  # how far, relative to their size, a trainer's weights and their average lie apart at most


def key_map(networks: dict[str, nn.Module], keys, ema: str = "auto") -> tuple[dict[str, dict[str, str]], str]:
    """The file's key of each parameter, by network ("unet", "vae", "text"), and which UNet weights: "EMA" or "raw".

    EMA weights are what the original samples with; they stand under the parameter's name without its dots. ema: "yes"
    and "no" want and leave them, "auto" takes them where there are any. Raises CheckpointError.
    """
    if not isinstance(ema, str) or ema not in EMA_CHOICES:
        raise CheckpointError(f"ema must be one of {', '.join(EMA_CHOICES)}, not {printable(ema, 80)}")
    averaged = any(key.startswith(EMA + "diffusion_model") for key in keys)  # pruned copies may keep counters alone
    if ema == "yes" and not averaged:
        raise CheckpointError("there are no EMA weights in it: leave out --ema yes")
    ema = averaged and ema != "no"
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


def check(
    networks: dict[str, nn.Module], entries: dict[str, Entry], what: str, ema: str = "auto"
) -> tuple[dict[str, dict], LoadReport]:
    """`key_map`, once every key of the file is accounted for and every shape fits.

    Tensors outside the three networks that nothing asks for are told of, once nothing else is wrong. Raises
    CheckpointError that lists the first missing, misshapen and unknown tensors.
    """
    wanted, family = key_map(networks, entries, ema)
    report = LoadReport(family)
    missing, misshapen = [], []
    for part, names in wanted.items():
        lacking, other = unfit(networks[part], names, entries)
        missing, misshapen = missing + lacking, misshapen + other
    rules = dict(DROPPED)
    if family == "EMA":
        rules["raw UNet weights beside the EMA ones"] = re.escape(RAW) + ".*"
    else:
        rules["EMA weights beside the raw ones"] = re.escape(EMA) + ".*"
    report.dropped, extra = left_over(entries, {key for names in wanted.values() for key in names.values()}, rules)
    strangers = [key for key in extra if not key.startswith((RAW, EMA, VAE, TEXT))]
    if not (missing or misshapen) and extra == strangers and extra:
        names = f"{', '.join(sorted(extra)[:3])}{', ...' if len(extra) > 3 else ''}"
        note(f"{what} also holds {len(extra)} tensors that no network asks for, which are left out: {printable(names)}")
        report.dropped["tensors that no network asks for"] = len(extra)
        extra = []
    complain(what, missing, misshapen, extra)
    return wanted, report


def fit(net: nn.Module, wanted: dict[str, str], entries: dict[str, Entry], rules: dict[str, str], what: str) -> None:
    """Raises CheckpointError unless a file holds what one network wants and, but for what `rules` name, nothing else.

    wanted: the file's key of each parameter; rules: patterns of keys, by what they are.
    """
    complain(what, *unfit(net, wanted, entries), left_over(entries, set(wanted.values()), rules)[1])


def unfit(net: nn.Module, wanted: dict[str, str], entries: dict[str, Entry]) -> tuple[list[str], list[str]]:
    """Of the keys that a network wants, those that a file lacks, and those of another shape or kind of number."""
    missing, misshapen = [], []
    for name, own in net.state_dict().items():
        key = wanted[name]
        if key not in entries:
            missing.append(key)
        elif entries[key].shape != tuple(own.shape):
            misshapen.append(f"{key} is {_by(entries[key].shape)} and should be {_by(tuple(own.shape))}")
        elif entries[key].dtype.is_floating_point != own.dtype.is_floating_point:
            kind = "floating-point" if own.dtype.is_floating_point else "whole"
            misshapen.append(f"{key} holds {entries[key].dtype} and should hold {kind} numbers")
    return missing, misshapen


def left_over(entries: dict[str, Entry], wanted: set[str], rules: dict[str, str]) -> tuple[dict[str, int], list[str]]:
    """Of the keys that nothing wants, how many fall under which rule, and the others."""
    dropped: dict[str, int] = {}
    extra = []
    for key in entries.keys() - wanted:
        rule = next((rule for rule, pattern in rules.items() if re.fullmatch(pattern, key)), None)
        if rule:
            dropped[rule] = dropped.get(rule, 0) + 1
        else:
            extra.append(key)
    return dropped, extra


def complain(what: str, missing: list[str], misshapen: list[str], extra: list[str]) -> None:
    """Raises CheckpointError with the first of each, where there are any."""
    complaints = [
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("misshapen", misshapen), ("unknown", extra))
        if keys
    ]
    if complaints:
        raise CheckpointError(f"{what}: {'; '.join(complaints)}")


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def load(
    networks: dict[str, nn.Module],
    path: str | Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
    entries: dict[str, Entry] | None = None,
    ema: str = "auto",
) -> LoadReport:
    """Fill networks built on the meta device from a file; strict, cast to `dtype` (None: the file's own).

    networks: "unet", "vae" and "text" in LDM's key layout; ema: see `key_map`. Raises CheckpointError; see `index`,
    `check` and `Reader.finite`.
    """
    entries = index(path) if entries is None else entries
    wanted, report = check(networks, entries, str(path), ema)
    reader = Reader(path, entries)
    tell_apart(reader, wanted["unet"], report.family, ema)
    for part, names in wanted.items():
        state = {name: reader.get(key, device, dtype) for name, key in names.items()}
        for name, key in names.items():
            reader.finite(key, state[name], str(path))
        networks[part].load_state_dict(state, strict=True, assign=True)
        for name, buffer in networks[part].named_buffers():
            if buffer.is_meta:  # not in any file: transformers' position numbers
                if not name.endswith("position_ids"):
                    raise CheckpointError(f"transformers keeps a buffer {name} that this package does not know")
                owner = networks[part].get_submodule(name.rpartition(".")[0])
                owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        networks[part].requires_grad_(False).eval()
    return report


def tell_apart(reader: Reader, names: dict[str, str], family: str, ema: str) -> None:
    """Tell where a file's raw UNet weights are not those that its EMA ones are an average of, as after a merge.

    By the first row of every matrix and convolution.
    """
    raw = {name: RAW + name for name in names}
    averages = {name: EMA + ("diffusion_model" + "." + name).replace(".", "") for name in names}
    if ema != "auto" or family != "EMA" or not all(key in reader.entries for key in raw.values()):
        return
    far, size = 0.0, 0.0
    for name in names:
        if len(reader.entries[raw[name]].shape) > 1:
            a, b = (reader.stored(each[name], 1).float() for each in (raw, averages))
            far, size = far + float((a - b).square().sum()), size + float(b.square().sum())
    apart = math.sqrt(far / size) if size else 0.0
    if apart > LAG:
        note(
            f"{reader.path} holds two UNets that are {apart:.0%} apart, as after a merge that left the old "
            "average: the average is used; --ema no (ema='no') takes the other"
        )


def detect_config(entries: dict[str, Entry]) -> str | None:
    """The built-in config whose UNet has this file's width and input channels, or None."""
    first = entries.get(RAW + "input_blocks.0.0.weight") or entries.get(EMA + "diffusion_modelinput_blocks00weight")
    widths: dict[tuple[int, ...], str] = {(320, 8): "ip2p", (320, 4): "sd15", (64, 8): "toy", (64, 4): "toy-t2i"}
    return widths.get(first.shape[:2]) if first else None


def refuse(path: str | Path, entries: dict[str, Entry]) -> None:
    """Raises CheckpointError for a file that tells that it is of another model, see `names.TELL_TALES`."""
    what = other_names.tell_tale({key: entry.shape for key, entry in entries.items()}, metadata(path))
    if what is not None:
        raise CheckpointError(f"{path} is {what}")


def explain_unknown(entries: dict[str, Entry]) -> str:
    """What kind of file has such keys, for the error when no config fits it."""
    if not any(key.startswith((RAW, EMA)) for key in entries):
        return "not a checkpoint in the original layout: no key starts with model.diffusion_model. or model_ema."
    return "of a model that no built-in config fits: name its YAML file with --config"
