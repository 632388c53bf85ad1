"""A photo edited at its own size: what a canvas makes of it, or of a part of it, put back where it was."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from ..emilie import Editor
from ..errors import CanvasError
from ..sampling import Step
from . import images
from .canvas import Canvas
from .canvas import open as open_canvas
from .images import Box, Mask

CHANGED = 24  # grey levels from which a pixel counts as changed; an autoencoder moves fewer, see `changed`


def open_photo(photo: Image.Image, editor: Editor, seed: int = 0, resolution: int | str | None = None) -> "Photo":
    """A photo, of which the whole is worked on at the model's size, or with "native" its middle at its own."""
    whole = None if resolution == "native" else (0, 0, *photo.size)
    return Photo(photo, open_canvas(photo, editor, seed, resolution, whole))


class Photo:
    """A canvas and the picture that it was opened on, at that picture's own size.

    Outside the masks of its edits `image` is that picture, to the bit, also where the working picture is not; a gate
    that is meant to change the outside, "eq8" or "guidance", is let do so unless the edit keeps the background.
    """

    def __init__(self, photo: Image.Image, canvas: Canvas):
        self.photo, self.canvas = photo, canvas
        self.given: dict[int, Image.Image] = {}  # of states edited here: their masks' union at the photo's size
        opened = canvas.states[0].image
        if images.view(photo, opened.size, canvas.native, canvas.part).tobytes() != opened.tobytes():
            raise CanvasError("the session is on another picture")

    @property
    def box(self) -> Box:
        """What of the photo the canvas is on."""
        canvas = self.canvas
        return canvas.part or images.place(self.photo.size, canvas.state.image.size, canvas.native)

    def steps(self, regions: Sequence[tuple[str, Mask | None]], **changes) -> Iterator[Step]:
        """`Canvas.steps`, which is checked at once, and remember the masks as they were given."""
        steps, given = self.canvas.steps(regions, **changes), self.read_given([mask for _, mask in regions], **changes)
        return self._steps(steps, given)

    def _steps(self, steps: Iterator[Step], given: Image.Image | None) -> Iterator[Step]:
        yield from steps
        if given is not None:
            self.given[self.canvas.at] = given

    def read_given(self, masks: Sequence[Mask | None], soft: bool = False, **_) -> Image.Image | None:
        """The union of masks at the photo's size, white where an edit may act; None: it is not known at that size."""
        canvas, union = self.canvas, Image.new("L", self.photo.size)
        for mask in masks:
            if mask is None:
                return None
            one = images.read_given(mask, self.photo.size, canvas.state.image.size, soft, canvas.turned)
            if one.size != self.photo.size:
                return None
            union = ImageChops.lighter(union, one.point(lambda v: 255 if v >= (1 if soft else 128) else 0))
        return union

    @property
    def image(self) -> Image.Image:
        """The current picture at the photo's size."""
        canvas, box = self.canvas, self.box
        chain, at = [], canvas.at
        while canvas.states[at].parent is not None:  # back to an edit of everything, on which nothing before it shows
            chain.append(at)
            if self.shows_everywhere(at):
                break
            at = canvas.states[at].parent
        out = self.photo
        for at in reversed(chain):
            state = canvas.states[at]
            alpha = None
            if not self.shows_everywhere(at):
                alpha = images.blend_mask(state.mask, self.given.get(at), box, canvas.editor.vae.factor // 2)
            out = images.put_back(state.image, out, box, alpha)
        return out.copy() if out is self.photo else out

    def shows_everywhere(self, at: int) -> bool:
        state = self.canvas.states[at]
        return state.mask is None or not (
            state.settings.get("gate", "anchor") == "anchor" or state.settings.get("keep_background")
        )


def changed(before: Image.Image, after: Image.Image, mask: Image.Image | None = None) -> float:
    """The share of a working picture, or of its mask, that an edit changed visibly, from 0 to 1.

    A pixel counts where some channel, averaged over 3x3 pixels, moved by `CHANGED` grey levels or more.
    """
    difference = ImageChops.difference(*(image.filter(ImageFilter.BoxBlur(1)) for image in (before, after)))
    moved = np.asarray(difference).max(-1) >= CHANGED
    where = np.ones_like(moved) if mask is None else np.asarray(mask) >= 128
    return float(moved[where].mean()) if where.any() else 0.0
