"""The one place that opens pictures: a file, bytes, a PIL image or an array -> 8 bits, upright, in sRGB.

What a file says decides; what had to be assumed is told, see `errors.note`. Three tables can be extended: FORMATS, what
is opened; FOREIGN and BRANDS, what is refused and what to do instead.
"""

import io
import logging
import math
import struct
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from PIL import Image

from ..errors import ImageError, hushed, note, plain_file, printable

Picture = Image.Image | np.ndarray | bytes | str | Path

SMALLEST, LONGEST = 16, 65535  # px: the shortest and the longest side of a picture
MANY, BARE = 2**24, 400  # px from which, and in a byte of the file beyond which, a picture is not unpacked
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM", "JPEG2000", "QOI")  # others run other programs
TIFF = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"
RAW = (
    "it is a camera's raw file",
    "develop it to a TIFF, PNG or JPEG first, in the camera's software, darktable or RawTherapee",
)
HEIC = "it is a HEIC picture", "`pip install pillow-heif` reads those, or save it as JPEG or PNG"
VIDEO = "it is a film", "save the frame to edit as a PNG"
DRAWING = "it is a drawing, not pixels", "export it as PNG at the size that you want"
LAYERS = "it is an editor's own file with layers", "export it as PNG"
SCIENCE = "it holds data and not a picture", "save what you want to see as an 8-bit PNG"
OTHER = "it is not a picture", "name a PNG, JPEG, WebP, TIFF, ..."
AGAIN = "copy or download it again"
FOREIGN = (  # where in the file, what stands there, what it is, the way out
    (0, b"%!PS", *DRAWING),
    (0, b"\xc5\xd0\xd3\xc6", *DRAWING),  # EPS with a preview
    (0, b"%PDF", "it is a PDF", "export the page as PNG at the size that you want"),
    (0, b"\x1f\x8b", "it is compressed with gzip (an SVGZ?)", "unpack it, or export it as PNG"),
    (8, b"CR\x02", *RAW),
    (0, b"FUJIFILMCCD-RAW", *RAW),
    (0, b"IIRO", *RAW),
    (0, b"IIRS", *RAW),
    (0, b"MMOR", *RAW),
    (0, b"IIU\0", *RAW),
    (0, b"FOVb", *RAW),
    (0, b"8BPS", *LAYERS),
    (0, b"gimp xcf", *LAYERS),
    (0, b"\xff\x0a", "it is a JPEG XL picture", "save it as PNG or JPEG"),
    (0, b"\0\0\0\x0cJXL ", "it is a JPEG XL picture", "save it as PNG or JPEG"),
    (0, b"\x76\x2f\x31\x01", "it is an OpenEXR picture", "save it as an 8-bit PNG, as it is meant to be seen"),
    (0, b"#?RADIANCE", "it is a Radiance HDR picture", "save it as an 8-bit PNG, as it is meant to be seen"),
    (0, b"DDS ", "it is a texture", "save it as PNG"),
    (0, b"\0\0\x01\0", "it is an icon in several sizes", "save the one to edit as PNG"),
    (0, b"icns", "it is an icon in several sizes", "save the one to edit as PNG"),
    (0, b"\x1aE\xdf\xa3", *VIDEO),
    (8, b"AVI ", *VIDEO),
    (128, b"DICM", "it is a medical picture (DICOM)", "save the slice to edit as an 8-bit PNG"),
    (0, b"SIMPLE  =", *SCIENCE),
    (0, b"\x93NUMPY", *SCIENCE),
    (0, b"\x89HDF", *SCIENCE),
    (0, b"PK\x03\x04", "it is a zip archive or a document", "unpack it, and name the picture in it"),
    (0, b"version https://git-lfs", "it only stands for a file in Git LFS", "fetch it with `git lfs pull`"),
)
RAW_SUFFIXES = (
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .srw .x3f"
).split()
BRANDS = {b"avif": ("it is an AVIF picture", "this Pillow cannot read those: update it, or save it as PNG or JPEG")}
BRANDS |= {b"avis": BRANDS[b"avif"], b"crx ": RAW}
BRANDS |= dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), HEIC)

ORIENTATION = 0x0112
TURNS = {  # what makes a picture upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = [TURNS[i] for i in (5, 6, 7, 8)]  # with the sides exchanged
DEPTHS = (8, 10, 12, 14, 15, 16)  # bits that samples have, in as many or more
# Pillow keeps one byte of 16-bit colours: the high one, or under these names of the layout in the file the low one
OTHER_BYTE = {
    f"{mode};16{one}": f"{mode};16{other}" for mode in ("RGB", "RGBA", "RGBX") for one, other in ("BL", "LB", "NB")
}
# linear Adobe RGB (1998) to linear sRGB
ADOBE_RGB = np.array([[1.39836, -0.39836, 0], [0, 1, 0], [0, -0.04293, 1.04293]], np.float32)


SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x, y of white, red, green, blue


class Source:
    """What a picture is called in messages, and what is to be told of it once it is read."""

    def __init__(self, picture: object, what: str, error: type[Exception]) -> None:
        self.path = printable(picture, 200) if isinstance(picture, (str, Path)) else None
        self.name = (
            f"the {what}" if self.path is None else self.path if what == "picture" else f"the {what} {self.path}"
        )
        self.error = error
        self.notes: list[str] = []
        self.sizes: list[tuple[int, int]] = []  # (width, height) that alone it may have, on either side; []: any

    def tell(self, text: str) -> None:
        self.notes.append(f"{self.name} {text}")

    def fail(self, text: str, cause: Exception | None = None) -> NoReturn:
        raise self.error(f"{self.name} {text}") from cause


def open_picture(picture: Picture) -> Image.Image:
    """A path, a file's bytes, a PIL image or an array -> PIL RGB or, where it is transparent somewhere, RGBA.

    Upright by its EXIF tag, which stays in `info["orientation"]` where it turned the picture, and converted from its
    colour profile to sRGB. Arrays: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8, or float in [0, 1]. Raises
    ImageError; tells what was assumed.
    """
    source = Source(picture, "picture", ImageError)
    stored = read_stored(picture, source)
    with quiet(source):
        image = to_srgb(stored, source)
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] == 255:
        image = image.convert("RGB")
    turned = stored.info.get("orientation")
    image.info = {} if turned is None else {"orientation": turned}
    tell(source)
    return image


def tell(source: Source) -> None:
    for text in dict.fromkeys(source.notes):
        note(text)


def read_stored(picture: Picture, source: Source) -> Image.Image:
    """The samples as they are stored, upright, with 8 bits: L, LA, RGB, RGBA, CMYK or LAB; not converted to sRGB.

    Its `info` has what `to_srgb` needs. Raises the source's error.
    """
    if isinstance(picture, Image.Image) and is_unread(picture):
        picture = Path(picture.filename)
    if isinstance(picture, (str, Path)):
        try:
            plain_file(picture)
            with open(picture, "rb") as file:
                return read_file(file, source, Path(picture).suffix.lower())
        except FileNotFoundError as cause:
            raise source.error(f"no picture at {source.path}") from cause
        except IsADirectoryError as cause:
            source.fail("cannot be read as a picture: it is a folder", cause)
        except (OSError, ValueError) as cause:
            if isinstance(cause, source.error):
                raise
            source.fail(f"cannot be read as a picture: {getattr(cause, 'strerror', None) or cause}", cause)
    if isinstance(picture, (bytes, bytearray)):
        return read_file(io.BytesIO(picture), source)
    if isinstance(picture, np.ndarray):
        return from_array(picture, source)
    if isinstance(picture, Image.Image):
        refuse_size(picture.size, source)
        with quiet(source):
            tell_frames(picture, source)
            return upright(picture, source)
    raise source.error(f"a picture must be a path, a PIL image or an array, not {type(picture).__name__}")


def is_unread(image: Image.Image) -> bool:
    """Whether PIL has opened a file and would now read 16-bit colours with 8 bits: then the file is read here."""
    name, tiles = getattr(image, "filename", ""), getattr(image, "tile", [])
    if not (name and tiles) or image.mode not in ("RGB", "RGBA") or not Path(name).is_file():
        return False
    return any(";16" in layout(tile) for tile in tiles) and getattr(image, "tell", lambda: 0)() == 0


class quiet:
    """Pillow's own warnings left out, and whatever its readers raise on broken files as one line."""

    def __init__(self, source: Source) -> None:
        self.source, self.catch = source, warnings.catch_warnings()

    def __enter__(self) -> None:
        self.catch.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind, cause, trace) -> None:
        self.catch.__exit__(kind, cause, trace)
        if not isinstance(cause, Exception) or isinstance(cause, self.source.error):
            return
        if isinstance(cause, Image.DecompressionBombError):
            self.source.fail("is too large to be read: scale it down first", cause)
        if isinstance(cause, MemoryError):
            self.source.fail("does not fit in memory: scale it down first", cause)
        if isinstance(cause, OSError) and cause.strerror:  # nothing of the file was read
            self.source.fail(f"cannot be read as a picture: {cause.strerror}", cause)
        said = isinstance(cause, (OSError, SyntaxError, ValueError)) and printable(cause, 200)
        self.source.fail(f"cannot be read as a picture: it is damaged{f' ({said})' if said else ''}; {AGAIN}", cause)


@cache
def formats() -> list[str]:
    """Of FORMATS, what this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def unknown(head: bytes) -> str:
    """What is wrong with a file that begins like this, of which no reader of FORMATS took more than the beginning."""
    named = next((name for name in formats() if (takes := Image.OPEN[name][1]) and takes(head[:16]) is True), None)
    if named is not None:
        return f"cannot be read as a picture: it is a damaged {named}; {AGAIN}"
    return "cannot be read as a picture: its format is unknown; save it as PNG or JPEG"


def read_file(file: BinaryIO, source: Source, suffix: str = "") -> Image.Image:
    head = file.read(4096)
    with quiet(source), hushed(head[:4] in TIFF):
        try:
            image = identified(file, head, suffix, source)
        except Image.UnidentifiedImageError as cause:
            file.seek(0)
            return read_otherwise(file, head, source, cause)
        if image.mode == "1" and not source.sizes and image.width * image.height > MANY:
            source.fail(f"has {image.width}x{image.height} px of black and white alone: scale it down first")
        if image.format == "TIFF":
            refuse_raw_tiff(image, source)
            if deep_planes(image.tag_v2):
                return read_otherwise(file, head, source)
        tell_frames(image, source)
        if image.format == "PNG":
            image.info["white"] = significant_white(file)
        if image.tile and all(layout(tile) in OTHER_BYTE or layout(tile) == "LA;16B" for tile in image.tile):
            return read_deep_colours(image, file, source)
        return upright(image, source)


def identified(file: BinaryIO, head: bytes, suffix: str, source: Source) -> Image.Image:
    """A file that begins like this as one of FORMATS, before its pixels are decoded.

    Raises UnidentifiedImageError and, for what is no picture or has too many pixels, the source's error.
    """
    refuse_foreign(head, suffix, source)
    file.seek(0)
    image = Image.open(file, formats=formats())
    refuse_size(image.size, source, file.seek(0, io.SEEK_END))
    return image


def refuse_size(size: tuple[int, int], source: Source, nbytes: int | None = None) -> None:
    """Before pixels are decoded. nbytes: of the file, which for a photo of many pixels is not next to nothing."""
    width, height = size
    if max(size) > LONGEST:
        source.fail(f"has {width}x{height} px, a side longer than {LONGEST}: crop it or scale it down first")
    if min(size) < 1:
        source.fail(f"has {width}x{height} px, which is nothing")
    if source.sizes and not {size, size[::-1]} & {*source.sizes}:
        wanted = "{}x{}".format(*source.sizes[0])
        source.fail(f"has {width}x{height} px and the picture {wanted}: make them the same size")
    if nbytes is not None and width * height > max(MANY, BARE * nbytes):
        source.fail(f"has {width}x{height} px in {nbytes >> 10} KB, which no photo has: scale it down first")


def refuse_foreign(head: bytes, suffix: str, source: Source) -> None:
    """What Pillow could not read, or would read as something else, by FOREIGN, BRANDS and a few words of text."""
    if not head:
        source.fail("cannot be read as a picture: the file is empty; " + AGAIN)
    found = next(((what, way) for at, magic, what, way in FOREIGN if head[at : at + len(magic)] == magic), None)
    if suffix in RAW_SUFFIXES and (head[:4] in (b"II*\0", b"MM\0*") or not found):
        found = RAW
    if head[4:8] == b"ftyp":
        brands = [head[8:12]] + [head[i : i + 4] for i in range(16, min(struct.unpack(">I", head[:4])[0], 64), 4)]
        known = next((BRANDS[brand] for brand in brands if brand in BRANDS), VIDEO)
        if known is BRANDS[b"avif"] and "AVIF" in formats() or b"avif" in brands and "AVIF" in formats():
            return
        found = None if known is HEIC and heif() else known
    if not found:
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:2000].lower()
        if text.startswith((b"<?xml", b"<svg", b"<!--", b"<!doctype svg")) and b"<svg" in text:
            found = "it is an SVG drawing", DRAWING[1]
        elif text.startswith((b"<!doctype html", b"<html", b"<head")):
            found = "it is a web page and not the picture on it", "download the picture itself"
    if found:
        source.fail(f"cannot be read as a picture: {found[0]}: {found[1]}")


def heif():
    """pillow-heif if it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return None
    return pillow_heif


def read_otherwise(file: BinaryIO, head: bytes, source: Source, cause: Exception | None = None) -> Image.Image:
    """HEIC by pillow-heif, TIFF of samples that Pillow does not know by tifffile, if they are installed."""
    if head[4:8] == b"ftyp" and heif():
        pictures = heif().open_heif(file)
        image = pictures.to_pillow()
        refuse_size(image.size, source)
        if len(pictures) > 1:
            source.tell(f"holds {len(pictures)} pictures: the first is used; save another alone to use that")
        return upright(image, source)
    if head[:4] not in TIFF:
        source.fail(unknown(head), cause)
    try:
        import tifffile
    except ImportError:
        source.fail(
            "cannot be read as a picture: a TIFF of a kind that Pillow does not know; `pip install tifffile` may "
            "read it, or save it as an 8-bit PNG",
            cause,
        )
    file.seek(0)
    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # else what it logs goes to the terminal
    return read_tiff(tifffile.TiffFile(file), source)


def read_tiff(tiff, source: Source) -> Image.Image:
    """The first page of a `tifffile.TiffFile`: grey or RGB, with or without alpha, of any type of numbers."""
    page, count = tiff.pages[0], len(tiff.pages)
    refuse_size((page.imagewidth, page.imagelength), source)
    if page.imagewidth * page.imagelength > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        source.fail("is too large to be read: scale it down first")
    if count > 1:
        source.tell(f"has {count} pages: the first is used; save another alone to use that")
    if page.photometric in (32803, 34892):
        source.fail(f"cannot be read as a picture: {RAW[0]}: {RAW[1]}")
    colours = {0: 1, 1: 1, 2: 3}.get(int(page.photometric), 5)
    if page.samplesperpixel > colours + 1 or page.samplesperpixel < colours:
        source.fail("is a TIFF of a kind that is not read: save it as an 8-bit PNG, as it is meant to be seen")
    values = page.asarray()
    if page.planarconfig == 2 and values.ndim == 3:
        values = np.moveaxis(values, 0, -1)
    values = values.reshape(page.imagelength, page.imagewidth, -1)
    tags = {tag.code: tag.value for tag in page.tags}
    white = declared_white(tags)
    levels = to_levels(values[..., :colours], source, white)
    if page.photometric == 0:
        levels = 255 - levels
    if page.samplesperpixel > colours:
        levels = np.concatenate([levels, alpha_levels(values[..., colours:])], -1)
    image = Image.fromarray(np.ascontiguousarray(levels[..., 0] if levels.shape[2] == 1 else levels))
    return turned(image, tags.get(274, 1), {"icc_profile": tags.get(34675)})


def refuse_raw_tiff(image: Image.Image, source: Source) -> None:
    """Camera raw files are TIFFs, whose first page is a preview or the sensor's mosaic."""
    tags = image.tag_v2
    preview = tags.get(254, 0) & 1 and 330 in tags  # the full picture is in a sub-directory
    if 50706 in tags or preview:
        source.fail(f"cannot be read as a picture: {RAW[0]}: {RAW[1]}")
    if image.mode == "L" and tags.get(339, (1,))[0] == 2:
        source.fail("has values from -128 to 127: save it as an 8-bit PNG, as it is meant to be seen")


def deep_planes(tags) -> bool:
    """A TIFF whose colours lie in planes of 16 bits, which Pillow takes for planes of bytes."""
    bits = tags.get(258, (8,))
    return tags.get(284) == 2 and len(bits) > 1 and max(bits) > 8


def tell_frames(image: Image.Image, source: Source) -> None:
    """Files that hold more than one picture, of which the first is used, unless the caller went to another."""
    count, kind = getattr(image, "n_frames", 1), getattr(image, "format", None)
    if count == 1 or image.tell():
        return
    way = "save another alone to use that"
    if kind == "TIFF":
        sizes, first = [], image.tag_v2.get(254, 0) & 1
        for i in range(min(count, 16)):
            image.seek(i)
            sizes.append(image.size)
        image.seek(0)
        largest = max(sizes, key=math.prod)
        hint = ""
        if first or math.prod(largest) > math.prod(sizes[0]):
            number = sizes.index(largest) + 1
            hint = f", which may be a preview: page {number} has {largest[0]}x{largest[1]} px"
        source.tell(f"has {count} pages: the first, {sizes[0][0]}x{sizes[0][1]} px, is used{hint}; {way}")
    elif kind == "MPO":
        source.tell(f"holds {count} pictures: the first is used; {way}")
    else:
        source.tell(f"is an animation of {count} frames: only the first is used; {way}")


def upright(image: Image.Image, source: Source) -> Image.Image:
    """With 8 bits and turned as its EXIF orientation says."""
    orientation = orientation_of(image, source) if image.format == "TIFF" else None
    image.load()
    if orientation is None:
        orientation = orientation_of(image, source)
    info = facts(image)
    pending = image.format != "TIFF" or ORIENTATION in getattr(image, "tag_v2", ())  # Pillow turns TIFFs itself
    if image.mode.startswith("I") or image.mode == "F":
        eight = grey_levels(image, source)
    elif image.mode in ("P", "1"):
        eight = image.convert("L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in ("PA", "RGBa", "La"):
        eight = image.convert("LA" if image.mode == "La" else "RGBA")
    elif image.mode in ("L", "RGB") and image.has_transparency_data:
        eight = image.convert("RGBA")
    elif image.mode in ("L", "LA", "RGB", "RGBA", "CMYK", "LAB"):
        eight = image
    else:
        eight = image.convert("RGB")
    return turned(eight, orientation, info, pending)


def facts(image: Image.Image) -> dict:
    """What a file says of its colours, and what it was turned by before."""
    names = ["icc_profile", "orientation"]
    if image.format == "PNG" and "srgb" not in image.info:
        names += ["gamma", "chromaticity"]
    return {name: image.info.get(name) for name in names} | {"adobe": is_adobe_rgb(image) or None}


def turned(image: Image.Image, orientation: int, info: dict, pending: bool = True) -> Image.Image:
    """A copy that is upright, with `info` and, where it was turned, its orientation in it."""
    known = orientation in TURNS
    out = image.transpose(TURNS[orientation]) if known and pending else image.copy()
    out.info = {key: value for key, value in info.items() if value is not None}
    if known:
        out.info["orientation"] = orientation
    return out


def orientation_of(image: Image.Image, source: Source) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # what is no TIFF leads to errors of any type
        source.tell("has EXIF data that cannot be read: it is taken to be upright")
        return 1


def is_adobe_rgb(image: Image.Image) -> bool:
    """What cameras write instead of a profile."""
    try:
        exif = image.getexif()
        return exif.get_ifd(0x8769).get(0xA001) == 2 or exif.get_ifd(0xA005).get(1) == "R03"
    except Exception:
        return False


def read_deep_colours(image: Image.Image, file: BinaryIO, source: Source) -> Image.Image:
    """16-bit RGB, RGBA and, in a PNG, LA: Pillow keeps one byte of two, so it reads the high ones and then the low."""
    white = declared_white(image.tag_v2) if image.format == "TIFF" else image.info.pop("white", None)
    file.seek(0)
    low = Image.open(file, formats=formats())
    if layout(low.tile[0]) == "LA;16B":  # four bytes a pixel: of grey the high and the low one, of alpha likewise
        low.tile = [renamed(tile, {"LA;16B": "RGBA"}) for tile in low.tile]
        bytes_ = np.asarray(low).astype(np.uint16)
        values = bytes_[..., 0::2] << 8 | bytes_[..., 1::2]
    else:
        low.tile = [renamed(tile, OTHER_BYTE) for tile in low.tile]
        values = np.asarray(low).astype(np.uint16)
        file.seek(0)
        image = Image.open(file, formats=formats())
        values |= np.asarray(image).astype(np.uint16) << 8
    info = facts(image)
    orientation = orientation_of(image, source)
    levels = to_levels(values[..., : values.shape[2] - 1 + values.shape[2] % 2], source, white)
    if values.shape[2] % 2 == 0:
        levels = np.concatenate([levels, alpha_levels(values[..., -1:])], -1)
    return turned(Image.fromarray(levels), orientation, info, image.format != "TIFF")


def layout(tile: Sequence) -> str:
    """Pillow's name for the layout of a tile's bytes."""
    return tile[3][0] if isinstance(tile[3], tuple) else str(tile[3])


def renamed(tile: Sequence, names: dict[str, str]) -> Sequence:
    codec, box, offset, args = tile
    name = names[layout(tile)]
    parts = codec, box, offset, (name, *args[1:]) if isinstance(args, tuple) else name
    return type(tile)(*parts) if hasattr(tile, "_fields") else parts


def declared_white(tags: dict) -> int | None:
    """The value of white that a TIFF names: by its bits, or by the largest value that may occur; None: by neither."""

    def largest(code: int) -> float:
        value = tags.get(code, 0)
        return max(value) if isinstance(value, (tuple, list)) else value

    whites = [2**bits - 1 for bits in DEPTHS]
    if largest(339) != 3 and 2 ** largest(258) - 1 in whites[1:-1]:
        return int(2 ** largest(258) - 1)
    named = largest(281) or largest(341)
    return int(named) if named in whites or (named == 1 and largest(339) == 3) else None


def significant_white(file: BinaryIO) -> int | None:
    """The largest value of as many bits as a PNG's sBIT chunk names."""
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        length = struct.unpack(">I", head[:4])[0]
        if head[4:] == b"sBIT":
            return 2 ** max(file.read(min(length, 3)), default=0) - 1
        file.seek(length + 4, 1)
    return None


def grey_levels(image: Image.Image, source: Source) -> Image.Image:
    """PIL "I", "I;16" and "F" as "L"."""
    tags = getattr(image, "tag_v2", {})
    values, white = np.asarray(image), declared_white(tags) or image.info.get("white")
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # which Pillow scales to 16 bits
        values = values.astype(np.uint16)
        white = 65535 if image.format == "PPM" else white
    elif image.mode == "I" and tags:
        signed = tags.get(339, (1,))[0] == 2
        values = values.view(np.uint32) if not signed else values
        values = values.astype(np.int16) if tags.get(258, (32,))[0] == 16 else values
    levels = to_levels(values, source, white)
    return Image.fromarray(255 - levels if tags.get(262) == 0 else levels)


def to_levels(values: np.ndarray, source: Source, white: int | None = None) -> np.ndarray:
    """Numbers of any type as uint8, by the value of white that the file names, or by one that is assumed and told."""
    if values.dtype == np.uint8:
        return values
    low, high = values.min(), values.max()
    if not math.isfinite(float(high) - float(low)):
        source.fail("has values that are not numbers (NaN or infinite): write it again without them")
    if white is not None and high > white:
        white = None
    deep, told = 8 * values.dtype.itemsize, f"has values from {low:.6g} to {high:.6g}: "
    if white is None and values.dtype.kind == "f":
        if 8 < high <= 32 or high > 1.05 * 65535:
            source.fail(f"{told}scale it to 8 bits first")
        white = 1 if high <= 8 else next(2**bits - 1 for bits in DEPTHS if high <= 1.05 * (2**bits - 1))
        if high > 1 + 1e-6:
            cut = ", and what is above is cut off" if high > white else ""
            source.tell(f"{told}{white} is assumed to be white{cut}")
    elif white is None:
        bits = next((bits for bits in DEPTHS if high < 2**bits), 31 if high < 2**31 else 32)
        if bits > 16 and not 2**30 <= high < 2**32:
            source.fail(f"{told}scale it to 8 bits first")
        white = 2**bits - 1
        if high and (bits != deep or bits > 16):
            source.tell(f"{told}it is assumed to have {bits} bits a sample, so that {white} is white, not black")
    if low < -0.05 * white:
        source.fail(f"{told}scale it to 8 bits first, from 0 on")
    if values.dtype == np.uint16:
        return np.clip(np.rint(np.arange(65536) * (255 / white)), 0, 255).astype(np.uint8)[values]
    scaled = values.astype(np.float64 if deep > 32 else np.float32)
    scaled *= 255 / white
    return np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled).astype(np.uint8)


def alpha_levels(values: np.ndarray) -> np.ndarray:
    """Of alpha, whose largest value is opaque in whatever depth: a picture that is nowhere opaque is none."""
    top = 1 if values.dtype.kind == "f" else next((2**b - 1 for b in DEPTHS if values.max() < 2**b), values.max())
    return np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8)


def from_array(array: np.ndarray, source: Source) -> Image.Image:
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise source.error(f"an array must be (H, W), (H, W, 3) or (H, W, 4), not {array.shape}")
    refuse_size(array.shape[1::-1], source)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise source.error("an array of floats must lie in [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise source.error(f"an array must be uint8, bool or float, not {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def to_srgb(image: Image.Image, source: Source) -> Image.Image:
    """What `read_stored` gives -> RGB or RGBA in sRGB, by its profile or what else names its colours."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    bare = image.convert(image.mode.removesuffix("A")) if alpha else image
    out, profile = None, image.info.get("icc_profile")
    if bare.mode == "LAB":
        out = transformed(bare, "LAB")
    elif profile:
        try:
            out = by_profile(bare, profile)
        except Exception as cause:  # Pillow's own type, OSError and others
            source.tell(
                f"has a colour profile that cannot be used ({printable(cause, 100)}): its colours are taken for "
                f"{'plain CMYK' if bare.mode == 'CMYK' else 'sRGB'}"
            )
    elif bare.mode == "CMYK":
        source.tell("is a CMYK picture without a colour profile: its colours are approximate; save it in sRGB first")
    elif image.info.get("adobe"):
        out = by_numbers(bare, 563 / 256, ADOBE_RGB)
    elif 0.2 < image.info.get("gamma", 0) <= 1.2 and abs(image.info["gamma"] - 1 / 2.2) > 0.02:
        out = by_numbers(bare, 1 / image.info["gamma"], np.eye(3, dtype=np.float32))
    primaries = image.info.get("chromaticity") or SRGB_PRIMARIES  # of none, as in a chunk without content
    if not profile and max(abs(a - b) for a, b in zip(primaries, SRGB_PRIMARIES)) > 0.01:
        source.tell("names primary colours other than sRGB's (cHRM) and has no profile: they are taken for sRGB's")
    out = (out or bare).convert("RGB")
    if alpha:
        out.putalpha(alpha)
    return out


def by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """By LittleCMS; to the bit where the profile is sRGB's. Raises errors of many types where it does not fit."""
    from PIL import ImageCms

    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    if image.mode == "L" and space == "RGB":
        image = image.convert("RGB")
    if (space, image.mode) not in (("RGB", "RGB"), ("GRAY", "L"), ("CMYK", "CMYK")):
        raise ValueError(f"it is for {space} and the picture is {'grey' if image.mode == 'L' else image.mode}")
    if image.mode != "CMYK":
        side = np.linspace(0, 255, 9).astype(np.uint8)
        cube = np.stack(np.meshgrid(side, side, side), -1).reshape(27, 27, 3)
        probe = Image.fromarray(cube if image.mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
        same = np.asarray(probe.convert("RGB"), np.int16) - np.asarray(transformed(probe, opened), np.int16)
        if abs(same).max() <= 1:
            return image
    return transformed(image, opened)


def transformed(image: Image.Image, profile) -> Image.Image:
    """An ImageCms profile or the name of one -> PIL RGB in sRGB."""
    from PIL import ImageCms

    profile = ImageCms.createProfile(profile) if isinstance(profile, str) else profile
    out = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert out is not None  # it is so in place only
    return out


def by_numbers(image: Image.Image, gamma: float, matrix: np.ndarray) -> Image.Image:
    """RGB = linear ** (1 / gamma), whose primaries a matrix takes to sRGB's."""
    linear = (np.arange(256, dtype=np.float32) / 255) ** gamma
    x = (linear[np.asarray(image.convert("RGB"))] @ matrix.T).clip(0, 1)
    x = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    return Image.fromarray((255 * x).round().astype(np.uint8))


@cache
def srgb_profile() -> bytes | None:
    """The profile that written pictures carry, always the same bytes; None without LittleCMS."""
    try:
        from PIL import ImageCms

        data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    except Exception:
        return None
    return data[:24] + struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + data[36:]  # instead of now
