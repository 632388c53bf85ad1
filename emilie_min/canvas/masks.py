"""What a picture means as a mask: white where to edit. Whatever else is read as what it evidently means, or refused."""

import math

import numpy as np
from PIL import Image, ImageChops

from .pictures import Source

HOW = "a mask is black and white, white where to edit"
MIDDLE = 25, 230  # greys in between are neither black nor white, whatever JPEG made of those
COLOURED = 40  # how far apart the channels of a colour are


def meaning(image: Image.Image, source: Source, soft: bool = False, array: bool = False) -> Image.Image:
    """A stored picture, see `pictures.read_stored`, as PIL "L", 255 where to edit. Raises the source's error.

    array: it was one, of which 0 and 1 may be all values.
    """
    if image.mode in ("LAB", "CMYK"):
        source.fail(f"is a picture in {image.mode}, not a mask: {HOW}")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    bare = image.convert(image.mode.removesuffix("A")) if alpha else image
    if alpha is None or alpha.getextrema()[0] >= 250:
        mask = of_opaque(bare, source)
    elif alpha.getextrema()[1] < 5:
        source.fail(f"is transparent everywhere, so nothing is marked: {HOW}")
    else:
        mask = of_transparent(bare, alpha, source)
    if mask.getextrema()[1] == 1:
        if not array:
            source.fail(f"has the values 0 and 1 of 255, black to the eye: use 0 and 255; {HOW}")
        source.tell("has the values 0 and 1 of 255, black to the eye: 1 is taken for white")
        mask = mask.point(lambda v: 255 * v)
    greys, levels = share(mask, *MIDDLE), np.count_nonzero(mask.histogram())
    feathered = min(share(mask, 0, MIDDLE[0]), share(mask, MIDDLE[1], 255)) > 0.03  # which few photos are
    if not soft and greys > 0.25 and levels > 16 and not feathered:
        source.fail(f"is no mask but a grey picture: {HOW}, or give --soft (soft=True) to use its greys as strengths")
    if not soft and greys > 0.1:
        source.tell(
            f"has {greys:.0%} of greys, as masks with soft edges do: from middle grey on they are taken for white, the "
            "rest for black; give --soft (soft=True) to use them as strengths"
        )
    return mask


def share(image: Image.Image, low: int, high: int) -> float:
    """Of pixels with values from low to high, both included, in a picture with one channel."""
    counts = image.histogram()
    return sum(counts[low : high + 1]) / max(1, sum(counts))


def chroma(image: Image.Image) -> Image.Image:
    """The largest of a pixel's channels minus the smallest."""
    r, g, b = image.split()
    return ImageChops.subtract(
        ImageChops.lighter(ImageChops.lighter(r, g), b), ImageChops.darker(ImageChops.darker(r, g), b)
    )


def sample(image: Image.Image, most: int = 2**21) -> np.ndarray:
    """The pixels (N, C) of a picture, of a large one every k-th of both sides."""
    step = math.ceil(math.sqrt(image.width * image.height / most))
    pixels = np.asarray(image.resize((-(-image.width // step), -(-image.height // step)), Image.Resampling.NEAREST))
    return pixels.reshape(-1, pixels.shape[2] if pixels.ndim == 3 else 1)


def one_colour(pixels: np.ndarray) -> tuple[int, int, int] | None:
    """The colour of pixels (N, 3) that are all of one, lit more or less, as on black and at soft edges, or None."""
    colour = main_colour(pixels)
    along = np.clip(pixels @ colour / max(1e-9, float(colour @ colour)), 0, 1)[:, None] * colour
    off = np.abs(pixels - along).max(1) > 64
    return tuple(int(v) for v in colour) if off.mean() <= 0.05 else None


def main_colour(pixels: np.ndarray) -> np.ndarray:
    """The most frequent colour (3,), of 16 levels a channel told apart, averaged over those."""
    cells = (pixels.astype(np.int64) // 16) @ np.array([256, 16, 1])
    most = np.bincount(cells).argmax()
    return np.median(pixels[cells == most], axis=0)


def of_opaque(image: Image.Image, source: Source) -> Image.Image:
    if image.mode == "L":
        return image
    apart = chroma(image)
    if apart.getextrema()[1] <= COLOURED:
        return image.convert("L")
    pixels = sample(image).astype(np.float32)
    lit = pixels[pixels.max(1) > MIDDLE[0]]
    if share(apart, COLOURED + 1, 255) * len(pixels) <= 0.005 * len(lit):  # specks of a bad JPEG
        return image.convert("L")
    colour = one_colour(lit) if len(lit) else None
    if colour and max(colour) - min(colour) > COLOURED:
        source.tell(f"has one colour, {colour}, on black, and that is taken for white: {HOW}")
        brightest = max(image.getchannel(i).getextrema()[1] for i in range(3)) or 1
        light = ImageChops.lighter(ImageChops.lighter(*image.split()[:2]), image.getchannel(2))
        return light.point(lambda v: min(255, round(255 * v / brightest)))
    source.fail(f"{describe(pixels)}: {HOW}")


def describe(pixels: np.ndarray) -> str:
    """What pixels (N, 3) with colours in them are, which is no mask."""
    values, counts = np.unique((pixels.astype(np.int64) @ np.array([65536, 256, 1])), return_counts=True)
    if len(values) <= 8:
        return "has several colours, as label maps do: paint the label to edit white and the rest black"
    for value, count in sorted(zip(values, counts), key=lambda each: -each[1])[:3]:
        colour = int(value) >> 16, int(value) >> 8 & 255, int(value) & 255
        if max(colour) - min(colour) > 180 and count > 0.002 * len(pixels):
            return (
                f"is a picture on which one colour, {colour}, seems to mark {count / len(pixels):.0%}: paint that "
                "white and the rest black"
            )
    if len(values) <= 64:
        return "has several colours, as label maps do: paint the label to edit white and the rest black"
    return "is a picture with colours and no mask"


def of_transparent(image: Image.Image, alpha: Image.Image, source: Source) -> Image.Image:
    """A layer that was painted on, black and white on nothing, or a picture with a hole in it."""
    rgb, seen = image.convert("RGB"), np.asarray(alpha) >= 128
    if not seen.any():  # painted thinly all over
        seen = np.asarray(alpha) > 0
    hidden = ~seen
    pixels = sample(Image.merge("RGBA", (*rgb.split(), Image.fromarray(seen * np.uint8(255))))).astype(np.float32)
    pixels = pixels[pixels[:, 3] > 0, :3] if (pixels[:, 3] > 0).any() else pixels[:, :3]
    flat = np.abs(pixels - main_colour(pixels)).max(1) <= 24
    if flat.mean() > 0.98:  # a layer in one colour
        colour = tuple(int(v) for v in main_colour(pixels))
        if max(colour) <= MIDDLE[0]:
            source.fail(f"is black where it is not transparent, which may mean edit or keep: {HOW}")
        if min(colour) < MIDDLE[1]:
            source.tell(
                f"is painted in one colour, {colour}, on a transparent layer, and that is taken for white: {HOW}"
            )
            top = alpha.getextrema()[1]
            return alpha.point(lambda v: round(255 * v / top))
        return alpha
    greys = np.ptp(pixels, axis=1).max(initial=0) <= COLOURED
    middle = ((pixels[:, 0] >= MIDDLE[0]) & (pixels[:, 0] <= MIDDLE[1])).mean()
    if greys and middle < 0.25:
        marked = ImageChops.multiply(rgb.convert("L"), alpha)
        lost = (np.asarray(rgb.convert("L")) >= 128) & hidden
        if lost.sum() > 0.02 * lost.size and share(marked, 128, 255) < 0.5 * lost.mean():
            source.fail(f"has alpha that says the opposite of its black and white: save it without transparency; {HOW}")
        if lost.sum() > 0.005 * lost.size:
            source.tell("is white where it is transparent, too: what is transparent is taken for black")
        return marked
    border = np.concatenate([hidden[0], hidden[-1], hidden[:, 0], hidden[:, -1]])
    if hidden.any() and not border.any():
        source.tell(f"is a picture with {hidden.mean():.0%} rubbed out: the hole is taken to be where to edit; {HOW}")
        return ImageChops.invert(alpha)
    source.fail(f"is a picture that is transparent in places, which may mean edit or keep: {HOW}")


def lost_parts(mask: np.ndarray, kept: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Boxes (x0, y0, x1, y1) of the connected parts of a mask (H, W) that meet nothing of what is kept (H, W), bool.

    Parts that touch at a corner are one. By runs of pixels in rows, which are joined where they touch.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 1), np.int8)  # so that no run goes on in the next row
    padded[:, :width] = mask
    edges = np.diff(padded.ravel(), prepend=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)  # one behind the last
    if not len(starts):
        return []
    rows = starts // (width + 1)
    x0, x1 = starts - rows * (width + 1), ends - rows * (width + 1)
    # run b of the row above touches run a if b.start <= a.end and b.end >= a.start, at the same columns
    first = np.searchsorted(ends, starts - (width + 1), "left")
    last = np.searchsorted(starts, ends - (width + 1), "right")
    count = np.maximum(last - first, 0)
    below = np.repeat(np.arange(len(starts)), count)
    above = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    label = joined(len(starts), above, below)
    total = np.concatenate([[0], np.cumsum(kept, axis=None, dtype=np.int64)])
    meets = total[rows * width + x1] > total[rows * width + x0]
    alive = np.zeros(len(starts), bool)
    np.logical_or.at(alive, label, meets)
    lost = ~alive[label]
    boxes: dict[int, list[int]] = {}
    for name, a, b, y in zip(label[lost], x0[lost], x1[lost], rows[lost]):
        box = boxes.setdefault(int(name), [int(a), int(y), int(b), int(y) + 1])
        box[0], box[2], box[3] = min(box[0], int(a)), max(box[2], int(b)), int(y) + 1
    return [tuple(box) for box in boxes.values()]


def joined(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The smallest number of those that each of `count` is connected with by pairs."""
    label = np.arange(count)
    while True:
        least = np.minimum(label[one], label[other])
        new = label.copy()
        np.minimum.at(new, label[one], least)
        np.minimum.at(new, label[other], least)
        new = new[new]
        while not (new == new[new]).all():
            new = new[new]
        if (new == label).all():
            return label
        label = new
