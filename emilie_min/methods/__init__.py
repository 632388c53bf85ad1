"""The methods that EMILIE is compared with, by the names that `emilie bench run --methods` takes.

A name can carry settings, `emilie:gate=eq8:steps=20`; a class of one's own is named by its file, `mine.py:Mine`. A
method is a dataclass under `base.Method`: its fields are its settings, and one file with one such class is enough to
have it in every table.
"""

import importlib.util
import sys
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

from ..errors import BenchError
from .base import Chain, Method, Request
from .bld import BlendedLatentDiffusion
from .controls import Autoencoder, Untouched
from .diffedit import DiffEdit
from .instruct import Concatenated, Emilie, IterativeInstructPix2Pix
from .pnp import PlugAndPlay
from .remedies import LowPass, PasteBack

__all__ = ["METHODS", "Chain", "Method", "Request", "parse"]

METHODS: dict[str, type[Method]] = {
    "emilie": Emilie,
    "ip2p": IterativeInstructPix2Pix,
    "concat": Concatenated,
    "pnp": PlugAndPlay,
    "diffedit": DiffEdit,
    "bld": BlendedLatentDiffusion,
    "paste": PasteBack,
    "lowpass": LowPass,
    "vae": Autoencoder,
    "untouched": Untouched,
}


def parse(spec: str) -> tuple[type[Method], dict]:
    """A method's class and the settings that a name such as "emilie:gate=eq8" gives. Raises BenchError."""
    name, *rest = spec.split(":")
    if name.endswith(".py"):
        if not rest or "=" in rest[0]:
            raise BenchError(f"{spec}: name the class behind the file, as in {name}:Mine")
        method = _from_file(Path(name), rest.pop(0))
    elif name in METHODS:
        method = METHODS[name]
    else:
        raise BenchError(f"no method {name!r}: choose from {', '.join(METHODS)}, or give a file, as in mine.py:Mine")
    hints, settings = typing.get_type_hints(method), {}
    known = [field.name for field in fields(method) if field.name != "editor"]
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise BenchError(f"{spec}: {name} has no setting {key!r}, but: {', '.join(known)}")
        settings[key] = _convert(spec, key, value, hints[key])
    return method, settings


def _convert(spec: str, key: str, value: str, hint: object) -> object:
    """A setting's text as the type that its field has: str, int, float, bool, or one of these or None."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    if value.lower() == "none" and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError, TypeError):
        raise BenchError(f"{spec}: {key} must be of type {getattr(kind, '__name__', kind)}, not {value!r}") from None


def _from_file(path: Path, name: str) -> type[Method]:
    """A class from a user's own file, which is run to get it."""
    if not path.is_file():
        raise BenchError(f"there is no file {path} to take the method {name} from")
    module_spec = importlib.util.spec_from_file_location(f"emilie_method_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise BenchError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    method = getattr(module, name, None)
    if not (isinstance(method, type) and issubclass(method, Method) and is_dataclass(method)):
        raise BenchError(f"{path} has no class {name} that is a dataclass under emilie_min.methods.base.Method")
    return method
