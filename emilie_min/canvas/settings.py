"""The settings of an edit, checked once; without PyTorch, so that `emilie --help` can read their names."""

import math
import operator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..config import GATES, SamplingConfig
from ..errors import SamplingError, quote

RESCALES = ("paper", "signed", "exact", "none")  # how f is found: see `Canvas.image_latent`
ITERATES = ("latent", "image")  # what the next edit starts from
SAMPLERS = ("euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde")
OWN = ("text_scale", "image_scale", "negative", "seed")  # what a region of several can set for itself
MOST = 10**100  # of a seed, whose digits follow it into every file
CHOICES = {"gate": GATES, "rescale": RESCALES, "iterate": ITERATES, "sampler": SAMPLERS}


@dataclass(frozen=True)
class Settings:
    """What an edit can be told beside instruction and mask. Raises SamplingError for what no edit can use.

    steps, text_scale, image_scale: None = the config's. gate: what a mask does, see `Editor.steps`; soft: keep the
    mask's greys. rescale: how f is found, see `Canvas.image_latent`. iterate: "latent" is Alg. 1, "image" encodes the
    current picture instead (what Fig. 2 compares against). keep_background: outside the masks keep the current
    picture's pixels to the bit. allow_empty: permit the instruction "", to study drift. seed: of the noise added
    between steps, None = the canvas's; two edits at the same depth of a canvas draw the same noise. Faster by doing
    less, off by default: sampler, see `faster.dpmpp`; guidance_interval, (low, high) noise levels between which to
    guide, see `faster.interval`; reuse: run the UNet's deep layers at every n-th step only, see `faster.deepcache`;
    reuse_guidance: the part of the steps, 0 to 1, after which guidance is found anew at some only, None = at all, see
    `faster.guidance_reuse`. negative: what not to do, an instruction whose energy is subtracted; further: instructions
    with weights, (text, weight) each, as multiples of text_scale: negative is one of weight -1.
    """

    steps: int | None = None
    text_scale: float | None = None
    image_scale: float | None = None
    gate: str = "anchor"
    soft: bool = False
    rescale: str = "paper"
    iterate: str = "latent"
    keep_background: bool = False
    allow_empty: bool = False
    seed: int | None = None
    sampler: str = "euler_ancestral"
    guidance_interval: tuple[float, float] | None = None
    reuse: int = 1
    reuse_guidance: float | None = None
    negative: str | None = None
    further: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            given = getattr(self, name)
            if not isinstance(given, str) or given not in allowed:
                raise SamplingError(f"unknown {name} {quote(given)}: choose from {', '.join(allowed)}")
        for name in ("soft", "keep_background", "allow_empty"):
            self._set(name, as_flag(getattr(self, name), name))
        for name in ("steps", "reuse"):
            if getattr(self, name) is not None:
                self._set(name, as_int(getattr(self, name), name, 1, 1000))
        if self.seed is not None:
            self._set("seed", as_int(self.seed, "seed"))
        for name in ("text_scale", "image_scale"):
            if getattr(self, name) is not None:
                self._set(name, as_finite(getattr(self, name), name))
        if self.guidance_interval is not None:
            self._set("guidance_interval", as_interval(self.guidance_interval))
        if self.reuse_guidance is not None:
            self._set("reuse_guidance", as_part(self.reuse_guidance, "reuse_guidance"))
        if self.negative is not None:
            self._set("negative", as_further([(self.negative, -1)], "negative")[0][0])
        self._set("further", as_further(self.further, "further"))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # what is frozen is set once, here

    def resolve(self, defaults: SamplingConfig, seed: int) -> "Settings":
        """With the config's numbers and the canvas's seed in the places of None."""
        given = {"steps": defaults.steps, "text_scale": defaults.text_scale, "image_scale": defaults.image_scale}
        missing: dict[str, Any] = {
            name: value for name, value in (given | {"seed": seed}).items() if getattr(self, name) is None
        }
        return replace(self, **missing)

    def weighted(self) -> list[tuple[str, float]]:
        """What guidance adds beside the instruction, with weights."""
        return [*([(self.negative, -1.0)] if self.negative else []), *self.further]

    def record(self) -> dict[str, Any]:
        """What a state keeps of them."""
        return {name: value for name, value in asdict(self).items() if name != "allow_empty"}


def as_flag(value: object, name: str) -> bool:
    """True or False of any type, also as 1 or 0. Raises SamplingError for what merely counts as true, as "no" does."""
    try:
        plain = value.item()  # type: ignore[attr-defined]  # NumPy's and PyTorch's types
    except Exception:
        plain = value
    if not isinstance(plain, int) or plain not in (0, 1):
        raise SamplingError(f"{name} must be True or False, not {quote(value)}")
    return bool(plain)


def as_int(value: object, name: str, low: int | None = None, high: int | None = None) -> int:
    """A whole number of any integer type, but for bool, as an int. Raises SamplingError."""
    low, high = (-MOST, MOST) if low is None or high is None else (low, high)
    within = f" from {low} to {high}" if high < MOST else f" of at most {len(str(MOST)) - 1} digits"
    number = whole(value)
    if number is None or not low <= number <= high:
        raise SamplingError(f"{name} must be a whole number{within}, not {quote(value)}")
    return number


def whole(value: object) -> int | None:
    """A whole number of any integer type, but for bool; None: it is none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]  # what has none
    except Exception:  # each type has its own way not to be one
        return None


def as_finite(value: object, name: str) -> float:
    """A finite number as a float. Raises SamplingError."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except Exception:  # each type has its own way not to be one
        number = math.inf
    if not math.isfinite(number) or isinstance(value, bool):
        raise SamplingError(f"{name} must be a finite number, not {quote(value)}")
    return number


def as_part(value: object, name: str) -> float:
    """A number from 0 to 1 as a float. Raises SamplingError."""
    number = as_finite(value, name)
    if not 0 <= number <= 1:
        raise SamplingError(f"{name} is a part of the steps, from 0 to 1, not {number:g}")
    return number


def as_further(value: object, name: str) -> tuple[tuple[str, float], ...]:
    """Instructions with weights. Raises SamplingError."""
    try:
        pairs = [(text, weight) for text, weight in value]  # type: ignore[attr-defined]
    except Exception:
        raise SamplingError(f"{name} is instructions with weights, [(text, weight), ...], not {quote(value)}") from None
    if not all(isinstance(text, str) and text.strip() for text, _ in pairs):
        raise SamplingError(f"{name}: say what, an instruction is a text and not empty")
    return tuple((text, as_finite(weight, f"{name}: a weight")) for text, weight in pairs)


def as_interval(value: object) -> tuple[float, float]:
    """Two noise levels as floats. Raises SamplingError."""
    try:
        low, high = (float(level) for level in value)  # type: ignore[attr-defined]
        if 0 <= low < high:  # NaN is neither
            return low, high
    except Exception:
        pass
    raise SamplingError(f"guidance_interval is two noise levels, (low, high) with 0 <= low < high, not {quote(value)}")
