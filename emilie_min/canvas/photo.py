"""A photo edited at its own size: what a canvas makes of it, or of a part of it, put back where it was."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from ..emilie import Editor
from ..errors import CanvasError, ImageError, MaskError, quote
from ..sampling import Step
from . import images
from .canvas import Canvas
from .canvas import open as open_canvas
from .images import Box, Mask

MARGIN = 1.0  # round a mask, in lengths of its longer side, so that the model sees what it edits in
CHANGED = 24  # grey levels from which a pixel counts as changed; an autoencoder moves fewer, see `changed`


def open_photo(photo: Image.Image, editor: Editor, seed: int = 0, resolution: int | str | None = None) -> "Photo":
    """A photo, of which the whole is worked on at the model's size, or with "native" its middle at its own.

    photo: upright, of RGB, as `images.read_image` gives it. Raises ImageError, CheckpointError.
    """
    if not isinstance(photo, Image.Image):
        raise ImageError(f"a photo is a PIL image, as images.read_image gives it, not {quote(photo)}")
    whole = None if images.is_native(resolution) else (0, 0, *photo.size)
    return Photo(photo, open_canvas(photo, editor, seed, resolution, whole))


class Photo:
    """A canvas and the picture that it was opened on, at that picture's own size.

    Outside the masks of its edits `image` is that picture, to the bit, also where the working picture is not; a gate
    that is meant to change the outside, "eq8" or "guidance", is let do so unless the edit keeps the background.
    `aim` opens canvases on crops of it, one after another, and `undo` goes back through them.
    """

    def __init__(self, photo: Image.Image, canvas: Canvas):
        self.photo, self.canvas = photo, canvas
        self.earlier: list[tuple[Image.Image, Canvas]] = []  # what was left for another part
        opened = canvas.states[0].image
        same = photo.size == canvas.original_size
        if not same or images.view(photo, opened.size, canvas.native, canvas.part).tobytes() != opened.tobytes():
            raise CanvasError("the session is on another picture")

    def aim(
        self,
        masks: Sequence[Mask | None] | None,
        soft: bool = False,
        margin: float = MARGIN,
        box: Box | None = None,
    ) -> str:
        """Let the next edits happen in a crop round their masks, at full resolution; -> what was done, in a line.

        Where the masks lie in the crop that is worked on, the next edit goes on from its latent. Where not, a crop is
        cut from the picture of now, and begins with the autoencoder as a picture that is opened does. masks: of the
        next edit, None = back to the whole; margin: round them, in lengths of their longer side; box: the crop itself,
        in pixels of the photo. Raises CanvasError, MaskError, ImageError.
        """
        whole = (0, 0, *self.photo.size)
        if masks is None:
            if self.box == whole or self.canvas.native:
                return ""
            return self.move(whole, "back to the whole picture")
        given = self.read_given(masks, soft)
        if given is None:
            raise CanvasError("a crop needs a mask of the photo's own size for every instruction")
        x0, y0, x1, y1 = given.getbbox()
        here = self.box
        inside = here[0] <= x0 and here[1] <= y0 and x1 <= here[2] and y1 <= here[3]
        if here != whole and inside and box in (None, here):
            return "goes on in the crop"
        wanted = box or crop_box(
            (x0, y0, x1, y1), self.photo.size, self.canvas.editor.config.sampling.resolution, margin
        )
        if not (wanted[0] <= x0 and wanted[1] <= y0 and x1 <= wanted[2] and y1 <= wanted[3]):
            raise MaskError("the mask does not lie in the crop: make the crop larger")
        if wanted == here:
            return ""
        why = "a new crop" if here == whole else "outside the crop before: a new one"
        return self.move(wanted, why)

    def move(self, box: Box, why: str) -> str:
        """Open a canvas on another part of the picture of now; where nothing was edited yet the old one is left out."""
        photo, canvas = self.image, self.canvas
        edited = canvas.at > 0
        moved = open_canvas(photo, canvas.editor, canvas.seed, part=box)
        moved.turned = canvas.turned
        if edited:
            self.earlier.append((self.photo, canvas))
        self.photo, self.canvas = photo, moved
        width, height = box[2] - box[0], box[3] - box[1]
        through = ", from pixels" if edited else ""
        return f"{why}, {width}x{height} px at {box[0]},{box[1]}{through}"

    def undo(self) -> None:
        """Back to the picture before the last edit, in whatever part that was. Raises CanvasError at the beginning."""
        if self.canvas.at == 0 and self.earlier:
            self.photo, self.canvas = self.earlier.pop()
        self.canvas.undo()

    @property
    def canvases(self) -> list[Canvas]:
        """Of all parts that were edited, first to last."""
        return [canvas for _, canvas in self.earlier] + [self.canvas]

    @property
    def box(self) -> Box:
        """What of the photo the canvas is on."""
        canvas = self.canvas
        return canvas.part or images.place(self.photo.size, canvas.state.image.size, canvas.native)

    def steps(self, regions: Sequence[tuple], **changes) -> Iterator[Step]:
        """`Canvas.steps`, which is checked at once."""
        return self.canvas.steps(regions, **changes)

    def read_given(self, masks: Sequence[Mask | None], soft: bool = False) -> Image.Image | None:
        """The union of masks at the photo's size, see `images.union`; None: it is not known at that size."""
        return images.union(self.canvas.read_each(masks, soft), self.photo.size, soft)

    def at_own_size(self, mask: Image.Image) -> Image.Image:
        """A mask of the working picture as one of the photo."""
        box, out = self.box, Image.new("L", self.photo.size)
        out.paste(mask.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST), box[:2])
        return out

    @property
    def image(self) -> Image.Image:
        """The current picture at the photo's size."""
        canvas, box = self.canvas, self.box
        chain, at = [], canvas.at
        while canvas.states[at].parent is not None and canvas.states[at].shown is not None:
            if canvas.states[at].shown:
                chain.append(at)
                if self.shows_everywhere(at):  # on which nothing before it shows
                    break
            at = canvas.states[at].parent
        out = self.photo
        for at in reversed(chain):
            state = canvas.states[at]
            alpha = None
            if not self.shows_everywhere(at):
                same = state.image.size == (box[2] - box[0], box[3] - box[1])
                feather = 0 if same and state.settings.get("keep_background") else canvas.editor.vae.factor // 2
                alpha = images.blend_mask(state.mask, state.given, box, feather)  # which that did already
            out = images.put_back(state.image, out, box, alpha)
        return out.copy() if out is self.photo else out

    def shows_everywhere(self, at: int) -> bool:
        state = self.canvas.states[at]
        return state.mask is None or not (
            state.settings.get("gate", "anchor") == "anchor" or state.settings.get("keep_background")
        )


def crop_box(mask: Box, photo: tuple[int, int], resolution: int, margin: float = MARGIN) -> Box:
    """A square round a mask's box with a margin, at least half the model's `resolution`, moved to lie in the photo."""
    x0, y0, x1, y1 = mask
    side = max(round((1 + 2 * margin) * max(x1 - x0, y1 - y0)), resolution // 2)
    width, height = min(side, photo[0]), min(side, photo[1])
    x = min(max(0, (x0 + x1 - width) // 2), photo[0] - width)
    y = min(max(0, (y0 + y1 - height) // 2), photo[1] - height)
    return x, y, x + width, y + height


def is_small(mask: Box, photo: tuple[int, int], working: tuple[int, int]) -> bool:
    """Whether a mask is so small in a photo, once that is scaled to be worked on, that a crop would serve it better."""
    longer = max((mask[2] - mask[0]) * working[0] / photo[0], (mask[3] - mask[1]) * working[1] / photo[1])
    return photo[0] > 1.5 * working[0] and longer < max(working) / 6


def changed(before: Image.Image, after: Image.Image, mask: Image.Image | None = None) -> float:
    """The share of a working picture, or of its mask, that an edit changed visibly, from 0 to 1.

    A pixel counts where some channel, averaged over 3x3 pixels, moved by `CHANGED` grey levels or more.
    """
    difference = ImageChops.difference(*(image.filter(ImageFilter.BoxBlur(1)) for image in (before, after)))
    moved = np.asarray(difference).max(-1) >= CHANGED
    where = np.ones_like(moved) if mask is None else np.asarray(mask) >= 128
    return float(moved[where].mean()) if where.any() else 0.0
