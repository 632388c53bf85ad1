"""Insets: pictures of objects, to be inserted into others."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import ImageError, MaskError
from . import images
from .pictures import Picture, open_picture

LEAST = 4  # px: an inset's shortest side


@dataclass(frozen=True)
class Inset:
    """A picture of an object: `seen` on white, as networks see it; `pixels`, with colour under soft edges; mask "L"."""

    seen: Image.Image
    pixels: Image.Image
    mask: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        return self.seen.size


def read_inset(inset: Picture, mask: Picture | None = None) -> Inset:
    """A picture with its mask: the one given, of the same size, or its alpha channel, or else its whole rectangle.

    Raises ImageError, MaskError.
    """
    image = open_picture(inset)
    if min(image.size) < LEAST:
        raise ImageError(f"an inset of {image.width}x{image.height} px shows nothing: {LEAST} px a side at least")
    own = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", image.size, 255)
    if not own.getbbox():
        raise ImageError("the inset is transparent everywhere: there is no object in it")
    seen, pixels = image.convert("RGB"), image.convert("RGB")
    if image.mode == "RGBA":
        seen = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        colours, shown = np.array(pixels), np.asarray(own) > 0
        colours[~shown] = (
            colours[shown].mean(0).round()
        )  # what lies under alpha 0 is anything, and resizing blends it in
        pixels = Image.fromarray(colours)
    if mask is not None:
        try:
            own = images.read_mask(mask, image.size, image.size, soft=True)
        except MaskError as error:
            raise MaskError(f"the inset's mask: {error}") from error
    x0, y0, x1, y1 = own.getbbox()  # type: ignore[misc]  # an empty one is refused
    if max(x1 - x0, y1 - y0) < LEAST:
        raise ImageError(f"the inset's object has {x1 - x0}x{y1 - y0} px and shows nothing: {LEAST} px at least")
    return Inset(seen, pixels, own)
