"""EMILIE (WACV 2024) on InstructPix2Pix: iterative, multi-granular image editing without training.

    import emilie_min as emilie
    editor = emilie.load()
    canvas = emilie.open("photo.png", editor)
    canvas.edit("make it winter").save("winter.png")

Names are imported when first used, so that `import emilie_min` and `emilie --help` need no PyTorch.
"""

from importlib import import_module

from .errors import EmilieError

__version__ = "0.1.0"

_HOME = {
    "load": "loading",
    "open": "canvas.canvas",
    "Editor": "emilie",
    "Canvas": "canvas.canvas",
    "Settings": "canvas.settings",
}
_MODULES = ("config", "emilie", "errors", "loading", "sampling", "text", "unet", "vae")

__all__ = ["EmilieError", *_HOME]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
