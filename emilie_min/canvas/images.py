"""Pictures and masks on their way in and out: from what `pictures` opens to tensors, and back."""

import math
import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps
from PIL.PngImagePlugin import PngInfo

from ..checkpoint.writing import atomic_write
from ..errors import ImageError, MaskError, SamplingError, note, quote
from . import masks
from .pictures import SIDEWAYS, SMALLEST, TURNS, Picture, Source, open_picture, read_stored, srgb_profile, tell
from .settings import whole

if TYPE_CHECKING:  # PyTorch takes seconds to import, and a benchmark's pictures are checked without it
    from torch import Tensor

    from ..emilie import Editor

LARGEST = 4096**2  # px: the area of a working picture

Box = tuple[int, int, int, int]
Mask = Picture | Box


def read_image(picture: Picture) -> Image.Image:
    """What `pictures.open_picture` takes -> PIL RGB, upright, in sRGB, on white where it is transparent, which is told.

    Raises ImageError.
    """
    image = open_picture(picture)
    if min(image.size) < SMALLEST:
        raise ImageError(f"a picture of {image.width}x{image.height} px is too small: {SMALLEST} px a side at least")
    if image.mode == "RGBA":
        name = Source(picture, "picture", ImageError).name
        note(f"{name} is transparent in places: it is edited as seen on white, and what is written is opaque")
        info, white = image.info, Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
        image.info = info
    return image


def save(image: Image.Image, path: Path, about: Mapping[str, str] | None = None) -> Path:
    """A PNG that says that it is sRGB, whole or not at all; -> the path. about: texts to put in. Raises ImageError."""
    try:
        with atomic_write(path) as f:
            image.save(f, format="PNG", icc_profile=srgb_profile(), pnginfo=png_texts(about or {}))
    except OSError as error:
        raise ImageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def png_texts(about: Mapping[str, str]) -> PngInfo:
    texts = PngInfo()
    for key, text in about.items():
        texts.add_itxt(key, text)
    return texts


def is_native(resolution: object) -> bool:
    """Whether a picture is to be worked on at its own size; an array, say, is no such word."""
    return isinstance(resolution, str) and resolution == "native"


def fit_size(size: tuple[int, int], resolution: int | str, multiple: int) -> tuple[int, int]:
    """The working size for a picture of (width, height): InstructPix2Pix's rule, or "native": each side rounded down.

    The longer side comes near `resolution`, both become multiples of `multiple`, 64 in the original. Raises ImageError.
    """
    width, height = size
    if is_native(resolution):
        width, height = width // multiple * multiple, height // multiple * multiple
        if not width or not height:
            raise ImageError(f"{size[0]}x{size[1]} px is too small to be edited at its own size: give a resolution")
    else:
        given, resolution = resolution, whole(resolution)
        if resolution is None or resolution < multiple:
            raise ImageError(f'resolution must be "native" or at least {multiple}, not {quote(given)}')
        resolution = min(resolution, LARGEST)  # whose picture is too large
        scale = resolution / max(width, height)
        scale = math.ceil(min(width, height) * scale / multiple) * multiple / min(width, height)
        width, height = (int(side * scale // multiple) * multiple for side in size)
    if width * height > LARGEST:
        raise ImageError(f"{width}x{height} px to work at is too large: lower the resolution")
    return width, height


def near_size(size: tuple[int, int], resolution: int | str, multiple: int) -> tuple[int, int]:
    """The working size for the whole of a picture: each side the multiple that is nearest, so that nothing is cropped.

    The longer side comes near `resolution`; the sides' proportion changes by what rounding to multiples changes, and
    changes back where the result is brought to the picture's own size. Raises ImageError.
    """
    if is_native(resolution):
        raise ImageError('a part of a picture is worked on at a resolution in px, not "native"')
    fit_size(size, resolution, multiple)  # which says what a resolution may be
    scale = operator.index(resolution) / max(size)
    width, height = (max(1, round(side * scale / multiple)) * multiple for side in size)
    return width, height


def place(original: tuple[int, int], working: tuple[int, int], native: bool = False) -> Box:
    """The box of a picture that `fit`, or with native `crop`, makes the working picture of, in whole pixels."""
    scale = 1 if native else min(original[0] / working[0], original[1] / working[1])
    size = round(working[0] * scale), round(working[1] * scale)
    x, y = (original[0] - size[0]) // 2, (original[1] - size[1]) // 2
    return x, y, x + size[0], y + size[1]


def read_part(part: Box, size: tuple[int, int]) -> Box:
    """A box of a picture of (width, height). Raises ImageError."""
    try:
        x0, y0, x1, y1 = (operator.index(v) for v in part)
    except Exception:  # each type has its own way not to be four numbers
        raise ImageError(f"a part is four whole numbers x0, y0, x1, y1, not {quote(part)}") from None
    if min(x0, y0) < 0 or x1 > size[0] or y1 > size[1] or min(x1 - x0, y1 - y0) < SMALLEST:
        raise ImageError(
            f"part {','.join(map(quote, (x0, y0, x1, y1)))} is no box of the picture of {size[0]}x{size[1]}, "
            f"{SMALLEST} px a side"
        )
    return x0, y0, x1, y1


def view(photo: Image.Image, size: tuple[int, int], native: bool = False, part: Box | None = None) -> Image.Image:
    """The working picture of a photo: of a part of it, scaled; else of its middle, cropped alone where it is native."""
    if part is not None:
        return scale(photo, part, size)
    return crop(photo, size) if native else fit(photo, size)


def scale(
    image: Image.Image, part: Box, size: tuple[int, int], resample: int = Image.Resampling.LANCZOS
) -> Image.Image:
    """A box of a picture at another size."""
    return image.crop(part).resize(size, resample)


def fit(image: Image.Image, size: tuple[int, int], resample: int = Image.Resampling.LANCZOS) -> Image.Image:
    """Scale to cover `size` and crop to it around the centre (the original's ImageOps.fit, Lanczos)."""
    return image if image.size == size else ImageOps.fit(image, size, method=resample)


def crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crop to `size` around the centre, to the bit: what "native" does to a picture and its masks."""
    x, y = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((x, y, x + size[0], y + size[1]))


def restore_size(
    edited: Image.Image, original: Image.Image, native: bool = False, edited_mask: Image.Image | None = None
) -> Image.Image:
    """An edited working picture at the size of the picture it came from, whose cropped-off edges are kept.

    native: it was cropped, not scaled. edited_mask: at working size, outside which the original is kept to the bit.
    """
    box, alpha = place(original.size, edited.size, native), None
    if edited_mask is not None:  # so that scaling does not spread it
        alpha = edited_mask if native else edited_mask.filter(ImageFilter.MinFilter(3))
        alpha = alpha.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST)
    return put_back(edited, original, box, alpha)


def put_back(edited: Image.Image, photo: Image.Image, box: Box, alpha: Image.Image | None = None) -> Image.Image:
    """The photo with an edited working picture of its box in its place; alpha: of the box's size, 0 = as it was."""
    size = box[2] - box[0], box[3] - box[1]
    scaled = edited if edited.size == size else edited.resize(size, Image.Resampling.LANCZOS)
    if size == photo.size and alpha is None and scaled.mode == photo.mode:  # a large photo is not copied to be covered
        return scaled.copy() if scaled is edited else scaled
    out = photo.copy()
    out.paste(scaled, box[:2], alpha)
    return out


def blend_mask(mask: Image.Image, given: Image.Image | None, box: Box, feather: int) -> Image.Image:
    """How much of an edit shows at a photo's own size: an alpha of the box's size, 0 wherever the mask is.

    mask: at working size; given: the same at the photo's, see `union`, None where it is not known, then a pixel at the
    border is left out; feather: px of the working picture, inside the mask, over which the edit sets in.
    """
    size = box[2] - box[0], box[3] - box[1]
    if given is None:
        limit = mask.filter(ImageFilter.MinFilter(3)) if size != mask.size else mask
        limit = limit.point(lambda v: 255 if v else 0).resize(size, Image.Resampling.NEAREST)
    else:
        limit = given.crop(box).convert("L")
    alpha = feathered(mask.point(lambda v: 255 if v else 0), feather)
    return ImageChops.darker(alpha.resize(size, Image.Resampling.BILINEAR), limit)


def to_tensor(image: Image.Image) -> "Tensor":
    """PIL RGB -> (1, 3, H, W) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def to_image(x: "Tensor", truncate: bool = False) -> Image.Image:
    """(1, 3, H, W), clamped to [-1, 1], -> PIL RGB; rounded, or truncated as the original does (half a level dark)."""
    levels = ((x[0].float().clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).cpu()
    return Image.fromarray((levels if truncate else levels.round()).byte().numpy())


def to_latent(editor: "Editor", image: Image.Image) -> "Tensor":
    """A working picture's image latent, unscaled: (1, 4, h, w) float32. Raises SamplingError if it is not finite."""
    z_img = editor.encode(to_tensor(image))
    if not z_img.isfinite().all():
        raise SamplingError(f"encoding the picture gave numbers that are not finite, in {editor.dtype}")
    return z_img


def from_latent(editor: "Editor", z: "Tensor", truncate: bool = False) -> Image.Image:
    """The picture of a scaled latent (1, 4, h, w), see `to_image`. Raises SamplingError if it is not finite."""
    import torch

    if not z.isfinite().all():
        what = "use --dtype float32" if editor.dtype != torch.float32 else "lower the guidance scales"
        raise SamplingError(f"the sampled latent is not finite, in {editor.dtype}: {what}")
    pixels = editor.decode(z)
    if not pixels.isfinite().all():
        raise SamplingError("decoding gave numbers that are not finite: are these the right weights?")
    return to_image(pixels, truncate)


def read_mask(
    mask: Picture | Box,
    original: tuple[int, int],
    working: tuple[int, int],
    native: bool = False,
    soft: bool = False,
    factor: int | None = None,
    turned: int | None = None,
    part: Box | None = None,
) -> Image.Image:
    """A mask as PIL "L" at working size, white where to edit; black or white, with `soft` also grey.

    A picture or array has the size (width, height) of the input or of the working picture, see `masks.meaning`; a box
    (x0, y0, x1, y1) is in pixels of the input, its far edges excluded. factor: the autoencoder's scale, to tell of
    parts that vanish at it. turned: the EXIF orientation that the input was turned by, if it was. part: the box of the
    input that the working picture shows, if it is not the one of `place`. Raises MaskError.
    """
    given = read_given(mask, original, working, soft, turned)
    return at_working_size(given, original, working, native, soft, factor, part)


def at_working_size(
    given: Image.Image,
    original: tuple[int, int],
    working: tuple[int, int],
    native: bool = False,
    soft: bool = False,
    factor: int | None = None,
    part: Box | None = None,
) -> Image.Image:
    """What `read_given` gave, at working size, see `read_mask`. Raises MaskError."""
    image = given
    if part is not None and image.size == original:
        image = scale(image, part, working, Image.Resampling.BOX)
    elif image.size == original != working:
        image = crop(image, working) if native else fit(image, working, Image.Resampling.BOX)
    if not soft:
        image = image.point(lambda v: 255 if v >= 128 else 0)
    if not image.getbbox():
        raise MaskError("nothing is left of the mask: it is fainter than middle grey, or lies where edges are cropped")
    if factor is not None:
        shown = part if part is not None and given.size == original else place(given.size, working, native)
        tell_lost_parts(given, image, shown, soft, factor)
    return image


def read_given(
    mask: Picture | Box,
    original: tuple[int, int],
    working: tuple[int, int],
    soft: bool = False,
    turned: int | None = None,
) -> Image.Image:
    """A mask as PIL "L" at the size at which it was given, see `read_mask`. Raises MaskError."""
    source = Source(mask, "mask", MaskError)
    if isinstance(mask, (tuple, list)):
        if len(mask) != 4 or not all(isinstance(v, (int, np.integer)) for v in mask):
            raise MaskError(f"a box is four whole numbers x0, y0, x1, y1, not {quote(mask)}")
        x0, y0, x1, y1 = mask
        if not (0 <= x0 < x1 <= original[0] and 0 <= y0 < y1 <= original[1]):
            tag = f", as it is shown, turned by its EXIF orientation {turned}" * (turned is not None)
            raise MaskError(
                f"box {','.join(map(quote, mask))} does not lie in the picture of {original[0]}x{original[1]} px{tag}"
            )
        image = Image.new("L", original)
        image.paste(255, (x0, y0, x1, y1))
    else:
        source.sizes = [original, working]  # what a file has is known before it is unpacked
        stored = read_stored(mask, source)
        image = masks.meaning(stored, source, soft, isinstance(mask, np.ndarray))
        image = turn_alike(image, original, working, turned, stored.info.get("orientation"), source)
        if image.size not in (original, working):
            source.fail(
                f"has {image.width}x{image.height} px and the picture {original[0]}x{original[1]}: "
                "make them the same size"
            )
    tell(source)
    if not image.getbbox():
        source.fail("is empty: white marks where to edit")
    return image


def union(given: Sequence[Image.Image | None], size: tuple[int, int], soft: bool = False) -> Image.Image | None:
    """Where any of these masks, see `read_given`, lets an edit act, PIL "1"; None: not known at this size."""
    if any(mask is None or mask.size != size for mask in given):
        return None
    least = 1 if soft else 128
    return reduce(ImageChops.logical_or, [mask.point(lambda v: 255 * (v >= least), "1") for mask in given])


def turn_alike(
    mask: Image.Image,
    original: tuple[int, int],
    working: tuple[int, int],
    turned: int | None,
    own: int | None,
    source: Source,
) -> Image.Image:
    """A mask of a picture that its EXIF tag turned: drawn on the picture as it is stored, or as it is shown?"""
    if turned is None or own == turned:
        return mask
    tag = f"the picture is turned by its EXIF orientation tag ({turned})"
    if mask.size not in (original, working) and mask.size[::-1] == original:
        source.tell(f"has the size of the picture as it is stored, and {tag}: the mask is turned with it")
        return mask.transpose(TURNS[turned])
    if mask.size == original and (TURNS[turned] not in SIDEWAYS or original[0] == original[1]):
        source.tell(f"is taken to be drawn on the picture as it is shown: {tag}")
    return mask


def tell_lost_parts(given: Image.Image, working: Image.Image, box: Box, soft: bool, factor: int) -> None:
    """Tell which connected parts of a mask, as it was given, no cell of the latent has; box: what the latent shows."""
    cells = latent_mask(working, factor, soft)[0, 0].numpy() > 0
    kept = Image.fromarray((cells * 255).astype(np.uint8)).resize(working.size, Image.Resampling.NEAREST)
    if given.size != working.size:
        kept = put_back(kept, Image.new("L", given.size), box)
    step = math.ceil(math.sqrt(given.width * given.height / 2**22))
    seen = given.point(lambda v: 255 if v > 1 and (soft or v >= masks.MIDDLE[0]) else 0)
    if step > 1:
        seen, kept = (image.reduce(step) for image in (seen, kept))
    lost = masks.lost_parts(np.asarray(seen) > 0, np.asarray(kept) >= 128)
    if not lost:
        return
    several = len(lost) > 1
    named = [f"{(x1 - x0) * step}x{(y1 - y0) * step} px at {x0 * step},{y0 * step}" for x0, y0, x1, y1 in lost[:3]]
    note(
        f"{len(lost)} part{'s' if several else ''} of the mask ({', '.join(named)}{', ...' if len(lost) > 3 else ''}) "
        f"{'are' if several else 'is'} left out: too small for the latent's cells, {factor}x{factor} px of the working "
        "picture, too faint, or cropped off; make larger, raise the resolution, or give --soft (soft=True)"
    )


def latent_mask(mask: Image.Image, factor: int, soft: bool = False) -> "Tensor":
    """A mask at the autoencoder's scale, by area: (1, 1, H/factor, W/factor) in [0, 1], or in {0, 1} unless `soft`.

    Raises MaskError where nothing is left of it.
    """
    import torch
    import torch.nn.functional as F

    pixels = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None] / 255
    z = F.avg_pool2d(pixels, factor)
    z = z if soft else (z >= 0.5).float()
    if not z.any():
        raise MaskError(
            f"the mask vanishes: it covers no {factor}x{factor} px cell of the working picture by half. "
            "Make it larger, raise the resolution, or leave it soft"
        )
    return z


def paste_back(edited: Image.Image, background: Image.Image, mask: Image.Image, feather: int) -> Image.Image:
    """`edited` inside the mask, `background` outside to the bit, blended over `feather` px that lie inside the mask."""
    return Image.composite(edited, background, feathered(mask, feather))


def feathered(mask: Image.Image, feather: int) -> Image.Image:
    """A mask that rises from its border over `feather` px that lie inside it."""
    alpha, total = mask, np.zeros((mask.height, mask.width))
    for _ in range(feather):
        total += np.asarray(alpha)
        alpha = alpha.filter(ImageFilter.MinFilter(3))
    return Image.fromarray(np.ceil(total / max(feather, 1)).astype(np.uint8)) if feather else mask
