"""Pictures as people have them: profiles, depths, transparency, EXIF, files that are not one picture."""

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from emilie_min.canvas import images, pictures
from emilie_min.errors import ImageError, MaskError
from emilie_min.toy import world

SCENE = np.asarray(world.render(world.scene(3)).convert("RGB"))
GREY = np.asarray(Image.fromarray(SCENE).convert("L"))
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))  # Display P3, to D50


def told(read, *args, **options) -> tuple:
    """What a reader returns, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = read(*args, **options)
    return result, [str(w.message) for w in caught]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def off(image: Image.Image, meant: np.ndarray) -> float:
    return float(np.abs(np.asarray(image).astype(float) - meant).max())


def profile(primaries: tuple = P3, gamma: float = 2.2, space: bytes = b"RGB ") -> bytes:
    """A matrix profile of an RGB space, or a grey one of a gamma."""

    def fixed(values):
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = [(b"desc", b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79))]
    tags += [(b"wtpt", b"XYZ \0\0\0\0" + fixed((0.9642, 1, 0.8249)))]
    if space == b"RGB ":
        tags += [(key, b"XYZ \0\0\0\0" + fixed(p)) for key, p in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)]
        tags += [(key, curve) for key in (b"rTRC", b"gTRC", b"bTRC")]
    else:
        tags += [(b"kTRC", curve)]
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for key, data in tags:
        table += key + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">III", start + len(body), 0, 0x02400000) + b"mntr" + space + b"XYZ "
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed((0.9642, 1, 0.8249))
    return head.ljust(128, b"\0") + table + body


def in_profile(pixels: np.ndarray, icc: bytes) -> Image.Image:
    """sRGB colours as a profile stores them."""
    to = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    return ImageCms.profileToProfile(Image.fromarray(pixels), ImageCms.createProfile("sRGB"), to)


def png16(values: np.ndarray, sbit: int | None = None) -> bytes:
    """A PNG of 16 bits with all five filters; values (H, W, C), C: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    height, width, channels = values.shape
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)
    size, out, above = 2 * channels, b"", np.zeros(rows.shape[1], int)
    for y, row in enumerate(rows):
        left, corner = np.roll(row, size), np.roll(above, size)
        left[:size] = corner[:size] = 0
        near = np.abs([above - corner, left - corner, left + above - 2 * corner])
        paeth = np.where(near[0] <= np.minimum(near[1], near[2]), left, np.where(near[1] <= near[2], above, corner))
        guess = [0 * row, left, above, (left + above) // 2, paeth][y % 5]
        out, above = out + bytes([y % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes(), row

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    head += chunk(b"sBIT", bytes([sbit] * channels)) if sbit else b""
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(out)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, photometric: int = 1, **tags) -> bytes:
    """A little-endian TIFF of one strip; values (H, W) or (H, W, C) of any type; tags: as t281=4095."""
    height, width, *rest = values.shape
    channels, kind = (rest or [1])[0], {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    bits = 8 * values.dtype.itemsize
    data = values.tobytes()
    entries = {256: (4, width), 257: (4, height), 259: (3, 1), 262: (3, photometric), 277: (3, channels)}
    entries |= {278: (4, height), 279: (4, len(data)), 339: (3, kind)} | {int(k[1:]): (4, v) for k, v in tags.items()}
    if channels == 1:
        entries[258] = (3, bits)
    extra, start = struct.pack(f"<{channels}H", *[bits] * channels), 8
    count = len(entries) + 1 + (channels > 1)
    at = start + 2 + 12 * count + 4
    if channels > 1:
        entries[258] = (0, at)
        entries[339] = (3, kind)
    entries[273] = (4, at + len(extra))
    body = struct.pack("<H", len(entries))
    for code, (form, value) in sorted(entries.items()):
        body += struct.pack("<HHII", code, form or 3, 1 if form else channels, value)
    return b"II*\0" + struct.pack("<I", start) + (body + bytes(4)).ljust(at - start, b"\0") + extra + data


# ---- colours


def test_a_profile_is_obeyed_once(tmp_path):
    stored = in_profile(SCENE, profile())
    path = tmp_path / "wide.png"
    stored.save(path, icc_profile=profile())
    assert off(stored, SCENE) > 20
    image, notes = told(images.read_image, path)
    assert not notes and off(image, SCENE) <= 4 and not image.info
    again, _ = told(images.read_image, image)
    assert again.tobytes() == image.tobytes()
    with Image.open(path) as file:  # as a PIL image, too
        assert told(images.read_image, file)[0].tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_srgb_profiles_change_no_bit(kind):
    plain = images.read_image(encoded(Image.fromarray(SCENE), kind))
    icc = pictures.srgb_profile()
    assert images.read_image(encoded(Image.fromarray(SCENE), kind, icc_profile=icc)).tobytes() == plain.tobytes()


def test_grey_with_a_grey_profile():
    stored = (255 * (GREY / 255.0) ** (2.2 / 1.8)).round().astype(np.uint8)
    data = encoded(Image.fromarray(stored), icc_profile=profile(gamma=1.8, space=b"GRAY"))
    image, notes = told(images.read_image, data)
    assert (
        not notes
        and 1 < off(Image.fromarray(stored), GREY)
        and np.abs(np.asarray(image)[..., 0] - GREY * 1.0).mean() < 6
    )


@pytest.mark.parametrize(
    ("image", "icc", "why"),
    [
        (Image.fromarray(SCENE), b"junk", ""),
        (Image.fromarray(SCENE), profile(space=b"GRAY"), "it is for GRAY and the picture is RGB"),
        (Image.fromarray(SCENE).convert("CMYK"), profile(), "it is for RGB and the picture is CMYK"),
        (Image.fromarray(SCENE), profile()[:200], ""),
    ],
)
def test_a_profile_that_cannot_be_used_is_told(image, icc, why):
    image.info["icc_profile"] = icc
    result, notes = told(images.read_image, image)
    assert len(notes) == 1 and f"profile that cannot be used ({why}" in notes[0]
    assert off(result, SCENE) <= 3


def test_cmyk_without_a_profile_is_told():
    _, notes = told(images.read_image, encoded(Image.fromarray(SCENE).convert("CMYK"), "JPEG"))
    assert len(notes) == 1 and "CMYK" in notes[0]


def test_lab():
    lab = ImageCms.profileToProfile(
        Image.fromarray(SCENE), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    image, notes = told(images.read_image, encoded(lab, "TIFF"))
    assert not notes and off(image, SCENE) <= 8


def test_adobe_rgb_by_exif():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 2
    data = encoded(Image.new("RGB", (32, 32), (144, 255, 60)), "JPEG", exif=exif, quality=100)
    image, _ = told(images.read_image, data)
    assert abs(np.asarray(image)[4, 4] - np.array([0.0, 255, 0])).max() <= 45  # the green of sRGB


def test_png_gamma():
    class Gamma:
        chunks = [(b"gAMA", struct.pack(">I", 100000), False)]

    linear = (255 * (GREY / 255.0) ** 2.2).round().astype(np.uint8)
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add(*Gamma.chunks[0][:2])
    image = images.read_image(encoded(Image.fromarray(linear), pnginfo=info))
    assert np.abs(np.asarray(image)[..., 0] - GREY * 1.0).mean() < 4


def test_other_primaries_are_told():
    from PIL.PngImagePlugin import PngInfo

    def read(red: int) -> list[str]:
        info = PngInfo()
        info.add(b"cHRM", struct.pack(">8I", 31270, 32900, red, 33000, 30000, 60000, 15000, 6000))
        return told(images.read_image, encoded(Image.fromarray(SCENE), pnginfo=info))[1]

    assert read(64000) == [] and ["cHRM" in note for note in read(68000)] == [True]


def test_masks_are_not_converted():
    mask = Image.fromarray(np.where(GREY > 150, 255, 0).astype(np.uint8))
    data = encoded(mask, icc_profile=profile(gamma=1.0, space=b"GRAY"))
    assert images.read_mask(data, (64, 64), (64, 64)).tobytes() == mask.tobytes()


# ---- depth


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_fewer_bits_in_sixteen_are_told(bits):
    white = 2**bits - 1
    for data in (
        png16((GREY / 255 * white).round()[..., None]),
        png16((SCENE / 255 * white).round()),
        tiff((GREY / 255 * white).round().astype("<u2")),
        tiff((SCENE / 255 * white).round().astype("<u2"), 2),
    ):
        image, notes = told(images.read_image, data)
        assert len(notes) == 1 and f"{bits} bits" in notes[0]
        meant = SCENE if off(image, SCENE) < off(image, GREY[..., None]) else GREY[..., None]
        assert off(image, meant) <= 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_are_read_at_their_depth(channels):
    fine = np.random.default_rng(channels).integers(0, 65536, (32, 40, channels))
    fine[..., -1] = 65535 if channels in (2, 4) else fine[..., -1]
    image, notes = told(images.read_image, png16(fine))
    colours = fine if channels in (1, 3) else fine[..., :-1]
    assert not notes and off(image, np.rint(colours / 257)) == 0  # and not the high byte


@pytest.mark.parametrize(
    ("data", "meant"),
    [
        (png16(SCENE.astype(int) * 16, sbit=12), SCENE * 16.0 / 4095 * 255),
        (png16(SCENE.astype(int), sbit=16), SCENE / 257),
        (tiff(GREY.astype("<u2") * 16, t281=4095), GREY[..., None] * 16.0 / 4095 * 255),
        (tiff(GREY.astype("<u2"), t281=65535), GREY[..., None] / 257),
        (tiff(GREY.astype("<u2") * 257, t281=4095), GREY[..., None]),  # it says what is not so
        (tiff(GREY.astype("<u2") * 257, 0), 255.0 - GREY[..., None]),
        (tiff((GREY / 255).astype("<f4")), GREY[..., None]),
        (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PPM"), GREY[..., None]),
    ],
)
def test_what_the_file_says_decides_and_needs_no_word(data, meant):
    image, notes = told(images.read_image, data)
    assert not notes and off(image, meant) <= 1


@pytest.mark.parametrize(
    ("values", "words", "white"),
    [
        (GREY.astype("<i4"), "8 bits", 255),
        (GREY.astype("<u4") * 257, "16 bits", 65535),
        (GREY.astype("<u4") * 16843009, "32 bits", 2**32 - 1),
        (GREY.astype("<i2") * 128, "15 bits", 32767),
        (np.minimum(GREY / 150.0, 1.3).astype("<f4"), "1 is assumed to be white, and what is above is cut off", 1),
        (GREY.astype("<f4"), "255 is assumed", 255),
        (GREY.astype("<f4") * 257, "65535 is assumed", 65535),
    ],
)
def test_what_is_assumed_is_told(values, words, white):
    image, notes = told(images.read_image, tiff(values))
    assert len(notes) == 1 and words in notes[0]
    assert off(image, np.clip(values / white * 255, 0, 255)[..., None]) <= 1


@pytest.mark.parametrize(
    "values",
    [
        np.where(GREY > 100, np.nan, 0.5).astype("<f4"),
        np.where(GREY > 100, np.inf, 0.5).astype("<f4"),
        np.where(GREY > 100, -np.inf, 0.5).astype("<f4"),
        GREY.astype("<f4") * 400,
        GREY.astype("<f4") - 128,
        GREY.astype("<i4") * 3000,
        GREY.astype("<f4") / 12,
        GREY.astype("<i1"),
    ],
)
def test_values_that_mean_nothing_are_refused(values):
    with pytest.raises(
        ImageError, match="has values " + ("from" if np.isfinite(values).all() else "that are not numbers")
    ):
        images.read_image(tiff(values))


def test_pil_images_of_deep_greys():
    image, notes = told(images.read_image, Image.fromarray(GREY.astype(np.int32)))
    assert off(image, GREY[..., None]) == 0 and len(notes) == 1


@pytest.mark.parametrize(
    ("values", "photometric", "meant"),
    [((SCENE / 255).astype("<f4"), 2, SCENE), ((GREY / 255.0), 1, GREY[..., None])],
)
def test_other_tiffs_by_tifffile_or_told(values, photometric, meant, monkeypatch):
    data = tiff(values, photometric)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImageError, match="pip install tifffile"):
        images.read_image(data)
    monkeypatch.undo()
    pytest.importorskip("tifffile")
    image, notes = told(images.read_image, data)
    assert not notes and off(image, meant) <= 1


def by_tifffile(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(file, values, **options)
    return file.getvalue()


def test_deep_planes():
    planes = SCENE.transpose(2, 0, 1).astype(np.uint16) * 257
    assert off(images.read_image(by_tifffile(planes, photometric="rgb", planarconfig="separate")), SCENE) == 0


def test_what_tifffile_reads_is_looked_at_too(monkeypatch):
    image, notes = told(images.read_image, by_tifffile(np.stack([GREY / 255.0] * 2), photometric="minisblack"))
    assert off(image, GREY[..., None]) == 0 and len(notes) == 1 and "2 pages" in notes[0]
    with pytest.raises(ImageError, match="raw file"):
        images.read_image(tiff(GREY, 32803))  # the sensor's mosaic
    for channels in (2, 5):  # fewer than colours, and more than colours and alpha
        data = tiff(np.zeros((32, 32, channels)), 2)
        with pytest.raises(ImageError, match="of a kind that is not read"):
            images.read_image(data)
    wide = tiff(np.zeros((2, 70000)))
    with pytest.raises(ImageError, match="longer than 65535"):
        images.read_image(wide)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ImageError, match="too large"):
        images.read_image(tiff(GREY / 255.0))


# ---- transparency


def test_transparency_is_flattened_on_white_and_told():
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.info["transparency"] = 0
    for picture in (clear, palette, encoded(clear), Image.new("LA", (32, 32), (0, 0))):
        image, notes = told(images.read_image, picture)
        assert image.getpixel((3, 3)) == (255, 255, 255)
        assert len(notes) == 1 and "transparent" in notes[0]
    _, notes = told(images.read_image, Image.new("RGBA", (32, 32), (255, 0, 0, 255)))
    assert not notes


# ---- EXIF


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    stored = Image.fromarray(SCENE[:40])
    image = images.read_image(encoded(stored, kind, exif=exif, **{"quality": 100} if kind != "TIFF" else {}))
    upright = np.rot90(SCENE[:40], {3: 2, 6: -1, 8: 1}[orientation])
    assert image.info["orientation"] == orientation
    assert np.abs(np.asarray(image) - upright.astype(float)).mean() < 4


def test_exif_that_is_none_is_no_traceback():
    image = Image.fromarray(SCENE)
    image.info["exif"] = b"Exif\0\0this is not a TIFF"
    result, notes = told(images.read_image, image)
    assert result.tobytes() == image.tobytes() and len(notes) == 1 and "EXIF" in notes[0]
    told(images.read_image, encoded(image, "JPEG", exif=b"Exif\0\0this is not a TIFF"))


# ---- files that are not one picture


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_further_frames_are_told(kind):
    frames = [Image.fromarray(np.roll(SCENE, 20 * i, 1)) for i in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    image, notes = told(images.read_image, data)
    assert np.abs(np.asarray(image) - SCENE.astype(float)).mean() < 8
    assert len(notes) == 1 and "3" in notes[0] and "first" in notes[0]


def test_a_preview_is_told():
    small, large = Image.fromarray(SCENE[:32, :32]), Image.fromarray(SCENE)
    _, notes = told(images.read_image, encoded(small, "TIFF", save_all=True, append_images=[large]))
    assert len(notes) == 1 and "preview: page 2 has 64x64 px" in notes[0]


ISO = b"\0\0\0\x18ftyp"
ROWS = [(b"\0" * at + magic, what) for at, magic, what, _ in pictures.FOREIGN]
ROWS += [(ISO + brand + bytes(8), what) for brand, (what, _) in pictures.BRANDS.items()]
ROWS += [(ISO + b"qt  " + bytes(8), "it is a film"), (b"", "empty"), (b"word", "format is unknown")]
ROWS += [(b"<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns='x'/>", "SVG"), (b"<!DOCTYPE html><html>", "web page")]


@pytest.mark.parametrize(("data", "what"), ROWS, ids=[repr(data[:12]) for data, _ in ROWS])
def test_foreign_files_are_told_in_words(data, what, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(pictures, "formats", lambda: ["PNG", "JPEG", "TIFF"])
    with pytest.raises(ImageError) as error:
        images.read_image(data)
    assert what in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


def test_a_chunk_without_content_says_nothing_of_colours():
    data = png16(np.full((16, 16, 1), 300))
    empty = struct.pack(">I4sI", 0, b"cHRM", zlib.crc32(b"cHRM"))
    assert images.read_image(data[:33] + empty + data[33:]).size == (16, 16)


def test_numbers_of_64_bits_are_not_taken_for_32():
    for large in (2**33, 2**63):
        with pytest.raises(ImageError, match="scale it to 8 bits first"):
            pictures.to_levels(np.full((16, 16), large, np.uint64), pictures.Source("a.tif", "picture", ImageError))


def test_a_damaged_file_is_no_foreign_one():
    scene = Image.fromarray(SCENE)
    whole = {"PNG": encoded(scene, "PNG"), "GIF": encoded(scene, "GIF"), "BMP": encoded(scene, "BMP")}
    for kind, data in whole.items():
        with pytest.raises(ImageError, match=f"it is a damaged {kind}; copy or download it again"):
            images.read_image(data[:12])
    odd = tiff(SCENE[..., 0]).replace(struct.pack("<HHI", 257, 4, 1), struct.pack("<HHI", 257, 7, 1))  # bytes as height
    cut = [*(data[: len(data) * 3 // 4] for data in (whole["PNG"], encoded(scene, "JPEG"))), odd]
    for data in cut:
        with pytest.raises(ImageError, match=r"it is damaged( \(.*\))?; copy or download it again") as told:
            images.read_image(data)
        assert "not supported between" not in str(told.value)


@pytest.mark.parametrize("suffix", [".nef", ".dng", ".CR2", ".raf"])
def test_camera_raw_is_not_its_preview(tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(SCENE).save(path, "TIFF")
    with pytest.raises(ImageError, match="raw file"):
        images.read_image(path)
    with pytest.raises(ImageError, match="raw file"):
        images.read_image(tiff(GREY, t50706=1))
    with pytest.raises(ImageError, match="raw file"):
        images.read_image(tiff(GREY, t254=1, t330=8))  # a preview, and the picture in a sub-directory
    images.read_image(tiff(GREY, t254=0, t330=8))  # the picture, and smaller ones there


def test_postscript_is_never_run(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript."""
    path = tmp_path / "drawing.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    with pytest.raises(ImageError, match="drawing"):
        images.read_image(path)
    assert not {"EPS", "PDF", "PSD", "WMF"} & set(pictures.formats())


def test_heic_by_pillow_heif():
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(SCENE)).save(file, quality=90)
    assert np.abs(np.asarray(images.read_image(file.getvalue())) - SCENE.astype(float)).mean() < 5


def test_heic_without_it_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        images.read_image(ISO + b"heic" + bytes(4) + b"mif1heic")


# ---- sizes


def test_sizes_are_looked_at_before_pixels(monkeypatch):
    pictures.formats()  # Pillow's plugins make pictures of their own when they are loaded
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("pixels were decoded"))
    wide = tiff(np.zeros((2, 70000), np.uint8))
    with pytest.raises(ImageError, match="longer than 65535"):
        images.read_image(wide)
    for side, why in ((60000, "too large"), (5000, "which no photo has")):
        bomb = png16(np.zeros((4, 4, 1)))
        bomb = bomb[:16] + struct.pack(">II", side, side) + bomb[24:]
        bomb = bomb[:29] + struct.pack(">I", zlib.crc32(bomb[12:29])) + bomb[33:]
        with pytest.raises(ImageError, match=why):
            images.read_image(bomb)


def test_a_large_picture_of_one_bit_is_no_photo_but_may_be_a_mask(monkeypatch):
    saved = io.BytesIO()
    Image.new("1", (4500, 4500), 1).save(saved, "TIFF", compression="raw")
    assert images.read_mask(saved.getvalue(), (4500, 4500), (64, 64)).size == (64, 64)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(ImageError, match="4500x4500 px of black and white alone: scale it down"):
        images.read_image(saved.getvalue())


def test_a_mask_of_another_size_is_not_unpacked(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(MaskError, match="make them the same size"):
        images.read_mask(png16(np.zeros((32, 32, 1))), (64, 64), (64, 64))


def test_a_picture_that_does_not_fit_in_memory_is_told(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    with pytest.raises(ImageError, match="memory"):
        images.read_image(png16(np.zeros((4, 4, 1))))


def test_a_source_may_be_bytes_a_path_or_a_name(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(SCENE).save(path)
    for source in (path, str(path), path.read_bytes(), Image.fromarray(SCENE), SCENE):
        assert pictures.open_picture(source).tobytes() == SCENE.tobytes()


def test_a_note_points_at_who_called():
    with pytest.warns(UserWarning) as caught:
        images.read_image(Image.new("LA", (32, 32)))
    assert [w.filename for w in caught] == [__file__]


def test_without_littlecms_pictures_are_written_all_the_same(monkeypatch):
    pictures.srgb_profile.cache_clear()
    monkeypatch.setattr(ImageCms, "createProfile", lambda *_: 1 / 0)
    assert pictures.srgb_profile() is None
    pictures.srgb_profile.cache_clear()


def test_the_written_profile_is_always_the_same():
    icc = pictures.srgb_profile()
    assert ImageCms.ImageCmsProfile(io.BytesIO(icc)).profile.profile_description.startswith("sRGB")
    pictures.srgb_profile.cache_clear()
    assert pictures.srgb_profile() == icc
