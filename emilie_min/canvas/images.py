"""Pictures and masks on their way in and out: from anything that PIL reads to tensors, and back."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from ..checkpoint.writing import atomic_write
from ..emilie import Editor
from ..errors import ImageError, MaskError, SamplingError

SMALLEST, LARGEST = 16, 4096**2  # px: the shortest side of an input; the area of a working picture

FORMATS = {"PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"}  # and no more: for an EPS file Pillow starts a program

Picture = Image.Image | np.ndarray | str | Path
Box = tuple[int, int, int, int]
Mask = Picture | Box


def read_image(picture: Picture) -> Image.Image:
    """A path, PIL image or array -> PIL RGB, upright by its EXIF tag, on white where it is transparent.

    Arrays: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8, or float in [0, 1]. Raises ImageError.
    """
    image = _open(picture, ImageError)
    if min(image.size) < SMALLEST:
        raise ImageError(f"a picture of {image.width}x{image.height} px is too small: {SMALLEST} px a side at least")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _open(picture: Picture, error: type[Exception]) -> Image.Image:
    if isinstance(picture, (str, Path)):
        try:
            with Image.open(picture, formats=FORMATS & set(Image.registered_extensions().values())) as file:
                file.load()
                picture = file.copy() if not file.getexif().get(0x0112) else ImageOps.exif_transpose(file)
        except Image.DecompressionBombError as cause:
            raise error(f"{picture} is too large ({cause}): scale it down first") from cause
        except FileNotFoundError as cause:
            raise error(f"no picture at {picture}") from cause
        except Exception as cause:  # PIL's plugins raise OSError, SyntaxError, struct.error, ... on broken files
            raise error(f"{picture} cannot be read as a picture: {cause or type(cause).__name__}") from cause
    elif isinstance(picture, np.ndarray):
        picture = _from_array(picture, error)
    elif isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)
    else:
        raise error(f"a picture must be a path, a PIL image or an array, not {type(picture).__name__}")
    if picture.mode.startswith("I") or picture.mode == "F":  # deeper than 8 bits, which convert("RGB") would clip
        values = np.asarray(picture, dtype=np.float64)
        tops = (65535.0,) if picture.mode != "F" else (1.0, 255.0, 65535.0)
        top = next((top for top in tops if values.max() <= 1.05 * top), None)
        if top is None or not values.min() >= -0.05 * top:  # not so for NaN either
            raise error(
                f"a picture with values from {values.min():.4g} to {values.max():.4g}: scale it to 8 bits first"
            )
        picture = Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8))
    return picture


def _from_array(array: np.ndarray, error: type[Exception]) -> Image.Image:
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise error(f"an array must be (H, W), (H, W, 3) or (H, W, 4), not {array.shape}")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise error("an array of floats must lie in [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise error(f"an array must be uint8, bool or float, not {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def save(image: Image.Image, path: Path) -> Path:
    """A PNG, whole or not at all; -> the path. Raises ImageError."""
    try:
        with atomic_write(path) as f:
            image.save(f, format="PNG")
    except OSError as error:
        raise ImageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def fit_size(size: tuple[int, int], resolution: int | str, multiple: int) -> tuple[int, int]:
    """The working size for a picture of (width, height): InstructPix2Pix's rule, or "native": each side rounded down.

    The longer side comes near `resolution`, both become multiples of `multiple`, 64 in the original. Raises ImageError.
    """
    width, height = size
    if resolution == "native":
        width, height = width // multiple * multiple, height // multiple * multiple
        if not width or not height:
            raise ImageError(f"{size[0]}x{size[1]} px is too small to be edited at its own size: give a resolution")
    else:
        if not hasattr(resolution, "__index__") or resolution < multiple:  # any type of integer
            raise ImageError(f'resolution must be "native" or at least {multiple}, not {resolution}')
        scale = resolution / max(width, height)
        scale = math.ceil(min(width, height) * scale / multiple) * multiple / min(width, height)
        width, height = (int(side * scale // multiple) * multiple for side in size)
    if width * height > LARGEST:
        raise ImageError(f"{width}x{height} px to work at is too large: lower the resolution")
    return width, height


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
    scale = 1 if native else min(original.width / edited.width, original.height / edited.height)
    size = round(edited.width * scale), round(edited.height * scale)
    corner = (original.width - size[0]) // 2, (original.height - size[1]) // 2
    alpha = Image.new("L", size, 255)
    if edited_mask is not None:
        inner = (
            edited_mask if native else edited_mask.filter(ImageFilter.MinFilter(3))
        )  # so that scaling does not spread it
        alpha = inner.resize(size, Image.Resampling.NEAREST)
    out = original.copy()
    out.paste(edited if edited.size == size else edited.resize(size, Image.Resampling.LANCZOS), corner, alpha)
    return out


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> (1, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def to_image(x: Tensor, truncate: bool = False) -> Image.Image:
    """(1, 3, H, W), clamped to [-1, 1], -> PIL RGB; rounded, or truncated as the original does (half a level dark)."""
    levels = ((x[0].float().clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).cpu()
    return Image.fromarray((levels if truncate else levels.round()).byte().numpy())


def to_latent(editor: Editor, image: Image.Image) -> Tensor:
    """A working picture's image latent, unscaled: (1, 4, h, w) float32. Raises SamplingError if it is not finite."""
    z_img = editor.encode(to_tensor(image))
    if not z_img.isfinite().all():
        raise SamplingError(f"encoding the picture gave numbers that are not finite, in {editor.dtype}")
    return z_img


def from_latent(editor: Editor, z: Tensor, truncate: bool = False) -> Image.Image:
    """The picture of a scaled latent (1, 4, h, w), see `to_image`. Raises SamplingError if it is not finite."""
    if not z.isfinite().all():
        what = "use --dtype float32" if editor.dtype != torch.float32 else "lower the guidance scales"
        raise SamplingError(f"the sampled latent is not finite, in {editor.dtype}: {what}")
    pixels = editor.decode(z)
    if not pixels.isfinite().all():
        raise SamplingError("decoding gave numbers that are not finite: are these the right weights?")
    return to_image(pixels, truncate)


def read_mask(
    mask: Picture | Box, original: tuple[int, int], working: tuple[int, int], native: bool = False, soft: bool = False
) -> Image.Image:
    """A mask as PIL "L" at working size, white where to edit; black or white, with `soft` also grey.

    A picture or array has the size (width, height) of the input or of the working picture; a box (x0, y0, x1, y1) is
    in pixels of the input, its far edges excluded. Raises MaskError.
    """
    if isinstance(mask, (tuple, list)):
        if len(mask) != 4 or not all(isinstance(v, (int, np.integer)) for v in mask):
            raise MaskError(f"a box is four whole numbers x0, y0, x1, y1, not {mask}")
        x0, y0, x1, y1 = mask
        if not (0 <= x0 < x1 <= original[0] and 0 <= y0 < y1 <= original[1]):
            raise MaskError(f"box {x0},{y0},{x1},{y1} does not lie in the picture of {original[0]}x{original[1]} px")
        image = Image.new("L", original)
        image.paste(255, (x0, y0, x1, y1))
    else:
        image = _open(mask, MaskError)
        if image.has_transparency_data:  # transparent means: not here
            image = Image.composite(
                image.convert("L"), Image.new("L", image.size), image.convert("RGBA").getchannel("A")
            )
        image = image.convert("L")
        if 0 < image.getextrema()[1] <= 1 and not isinstance(mask, np.ndarray):
            raise MaskError("the mask's values are 0 and 1 of 255, black to the eye: use 0 and 255")
        if image.size not in (original, working):
            raise MaskError(
                f"the mask has {image.width}x{image.height} px and the picture {original[0]}x{original[1]}: "
                "make them the same size"
            )
    if not image.getbbox():
        raise MaskError("the mask is empty: white marks where to edit")
    if image.size == original != working:
        image = crop(image, working) if native else fit(image, working, Image.Resampling.BOX)
    if not soft:
        image = image.point(lambda v: 255 if v >= 128 else 0)
    if not image.getbbox():
        raise MaskError("nothing is left of the mask: it is fainter than middle grey, or lies where edges are cropped")
    return image


def latent_mask(mask: Image.Image, factor: int, soft: bool = False) -> Tensor:
    """A mask at the autoencoder's scale, by area: (1, 1, H/factor, W/factor) in [0, 1], or in {0, 1} unless `soft`.

    Raises MaskError where nothing is left of it.
    """
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
    alpha, total = mask, np.zeros((mask.height, mask.width))
    for _ in range(feather):
        total += np.asarray(alpha)
        alpha = alpha.filter(ImageFilter.MinFilter(3))
    alpha = Image.fromarray(np.ceil(total / max(feather, 1)).astype(np.uint8)) if feather else mask
    return Image.composite(edited, background, alpha)
