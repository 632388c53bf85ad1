"""What is a mask: what people give as one, read as what it evidently means and told, or refused with how it looks."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

import emilie_min as emilie
from emilie_min.canvas import images, masks
from emilie_min.errors import MaskError
from emilie_min.toy import world

N = 64
SCENE = world.render(world.scene(3)).convert("RGB")


def square(*boxes, size=(N, N), value=255) -> Image.Image:
    image = Image.new("L", size)
    for box in boxes or [(16, 16, 47, 47)]:
        ImageDraw.Draw(image).rectangle(box, fill=value)
    return image


BOX = square()
HOLE = BOX.point(lambda v: 255 - v)


def read(mask, soft=False, size=(N, N), turned=None) -> tuple[np.ndarray, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = images.read_mask(mask, size, size, soft=soft, factor=4, turned=turned)
    return np.asarray(image), [str(w.message) for w in caught]


def painted(colour, alpha=None, on=(0, 0, 0)) -> Image.Image:
    image = Image.new("RGB", (N, N), on) if not isinstance(on, Image.Image) else on.copy()
    image.paste(colour, None, BOX)
    if alpha is not None:
        image.putalpha(alpha)
    return image


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=80)
    return file.getvalue()


def labels(*values) -> Image.Image:
    image = Image.new("P", (N, N))
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 0, 0, 128])
    for i, value in enumerate(values):
        image.paste(value, (16 * i, 0, 16 * i + 16, N))
    return image


def layer(colour, under) -> Image.Image:
    image = Image.new("RGBA", (N, N), (*under, 0))
    image.paste((*colour, 255), None, BOX)
    return image


def rubbed_out(image, alpha) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize(
    "mask",
    [
        BOX,
        BOX.convert("1"),
        BOX.convert("RGB"),
        jpeg(BOX),
        np.asarray(BOX) > 0,
        np.asarray(BOX) / 255,
        painted((255, 255, 255), BOX),
        layer((255, 255, 255), (0, 0, 0)),
        layer((255, 255, 255), (255, 255, 255)),
        rubbed_out(BOX, BOX),
        rubbed_out(BOX, Image.new("L", (N, N), 255)),
        BOX.filter(ImageFilter.GaussianBlur(0.5)),
    ],
)
def test_masks_need_no_word(mask):
    found, notes = read(mask)
    assert not notes and np.abs(found - np.asarray(BOX, float)).mean() < 2


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (rubbed_out(SCENE, HOLE), "rubbed out"),
        (rubbed_out(SCENE, HOLE.filter(ImageFilter.GaussianBlur(0.5))), "rubbed out"),
        (rubbed_out(SCENE.convert("L"), HOLE), "rubbed out"),
        (painted((255, 0, 0)), "one colour, (255, 0, 0), on black"),
        (painted((0, 0, 255)), "one colour, (0, 0, 255), on black"),
        (jpeg(painted((200, 0, 0))), "on black"),
        (labels(0, 1, 1, 0), "one colour, (128, 0, 0), on black"),
        (layer((255, 0, 0), (0, 0, 0)), "one colour, (255, 0, 0), on a transparent layer"),
        (painted((255, 0, 0), BOX.point(lambda v: v // 2)), "transparent layer"),
        (np.asarray(BOX) // 255, "0 and 1 of 255"),
        (BOX.filter(ImageFilter.GaussianBlur(3)), "greys"),
    ],
)
@pytest.mark.parametrize("soft", [False, True])
def test_what_it_evidently_means_is_read_and_told(mask, words, soft):
    found, notes = read(mask, soft)
    meant = np.asarray(BOX, float)
    if words == "greys":
        assert len(notes) == (0 if soft else 1)
        return
    if "P" == getattr(mask, "mode", ""):
        meant = np.zeros((N, N))
        meant[:, 16:48] = 255
    assert len(notes) == 1 and words in notes[0] and "white" in notes[0]
    assert np.abs(found - meant).mean() < 6


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (SCENE, "colour"),
        (SCENE.convert("L"), "grey picture"),
        (painted((255, 0, 0), on=SCENE), "(255, 0, 0), seems to mark 25%"),
        (painted((255, 0, 0), on=SCENE.convert("L").convert("RGB")), "seems to mark"),
        (painted((255, 255, 255), on=SCENE.convert("L").convert("RGB")), "grey picture"),
        (painted((255, 0, 0), on=(255, 255, 255)), "several colours"),
        (labels(0, 1, 2), "label"),
        (rubbed_out(SCENE, BOX), "may mean edit or keep"),
        (layer((0, 0, 0), (0, 0, 0)), "may mean edit or keep"),
        (rubbed_out(BOX, HOLE), "may mean edit or keep"),
        (Image.new("RGBA", (N, N)), "transparent everywhere"),
        (BOX.point(lambda v: v // 255), "0 and 1 of 255"),
        (Image.linear_gradient("L").resize((N, N)).point(lambda v: 40 + v // 2), "--soft"),
        (Image.fromarray(np.asarray(SCENE)).convert("CMYK"), "CMYK"),
    ],
)
def test_what_is_no_mask_is_refused_with_how_one_looks(mask, words):
    with pytest.raises(MaskError) as error:
        read(mask)
    assert words in str(error.value) and "white where to edit" in str(error.value)


def test_alpha_that_says_the_opposite_is_refused():
    both = BOX.copy()
    ImageDraw.Draw(both).rectangle((0, 0, 11, 11), fill=255)  # white where it is not transparent, too
    alpha = HOLE.copy()
    with pytest.raises(MaskError, match="opposite"):
        read(rubbed_out(both, alpha))


def test_a_little_hidden_white_says_nothing():
    dark = Image.new("L", (N, N))
    for box, value in (((40, 0, 59, 11), 22), ((8, 8, 11, 12), 255), ((8, 40, 13, 49), 255)):
        ImageDraw.Draw(dark).rectangle(box, fill=value)
    dark.paste(60, (30, 20, 40, 40))
    alpha = Image.new("L", (N, N), 255)
    ImageDraw.Draw(alpha).rectangle((8, 40, 13, 49), fill=0)
    found, notes = read(rubbed_out(dark, alpha))
    assert found[10, 10] and not found[45, 10] and any("white where it is transparent, too" in note for note in notes)


def test_half_hidden_white_is_told():
    alpha = Image.new("L", (N, N), 255)
    ImageDraw.Draw(alpha).rectangle((16, 16, 27, 47), fill=0)
    found, notes = read(rubbed_out(BOX, alpha))
    assert len(notes) == 1 and "transparent" in notes[0] and not found[20, 20] and found[20, 40]


def test_a_grey_picture_is_strengths_where_it_is_soft():
    ramp = Image.linear_gradient("L").resize((N, N))
    found, notes = read(ramp, soft=True)
    assert not notes and found.tobytes() == ramp.tobytes()


def test_zero_and_one_with_soft_is_full_strength():
    canvas = emilie.open(SCENE, emilie.load("random", "toy", device="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, cells = canvas.read_mask(np.asarray(BOX) // 255, soft=True)
    assert cells.max() == 1


# ---- parts


def test_every_part_that_vanishes_is_told():
    two = square((0, 0, 31, 31), (50, 50, 53, 53))
    found, notes = read(two)
    assert len(notes) == 1 and "1 part of the mask (4x4 px at 50,50) is left out" in notes[0]
    three = square((0, 0, 31, 31), (50, 50, 53, 53), (2, 61, 3, 61))
    assert "2 parts of the mask (4x4 px at 50,50, 2x1 px at 2,61) are left out" in read(three)[1][0]
    assert not read(two, soft=True)[1]
    assert not read(square((0, 0, 31, 31), (48, 48, 51, 51)))[1]  # on the grid
    faint = square((0, 0, 31, 31))
    ImageDraw.Draw(faint).rectangle((40, 40, 41, 63), fill=100)
    assert "too faint" in read(faint)[1][0]


def test_parts_are_those_of_the_mask_as_it_was_given():
    large = square((0, 0, 1500, 1500), (2500, 2000, 2530, 2030), size=(4000, 3000))
    with pytest.warns(UserWarning, match="1 part of the mask"):
        images.read_mask(large, (4000, 3000), (512, 384), factor=8)
    wide = square((100, 10, 199, 89), (0, 10, 9, 89), size=(300, 100))
    with pytest.warns(UserWarning, match="1 part of the mask .10x80 px at 0,10. is left out.*cropped off"):
        images.read_mask(wide, (300, 100), (128, 64), factor=4)


def test_lost_parts_of_many_shapes():
    spiral = np.zeros((200, 200), bool)
    spiral[::4] = True
    for i in range(0, 200, 4):
        spiral[i : i + 4, 0 if i % 8 else -1] = True
    kept = np.zeros_like(spiral)
    assert masks.lost_parts(spiral, kept) == [(0, 0, 200, 200)]
    kept[0, 0] = True
    assert not masks.lost_parts(spiral, kept)
    ends = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]], bool)
    none = np.zeros_like(ends)
    assert sorted(masks.lost_parts(ends, none)) == [(0, 0, 3, 2), (0, 3, 1, 4), (2, 3, 3, 4)]


def test_lost_parts_are_those_that_scipy_finds():
    ndimage = pytest.importorskip("scipy.ndimage")
    for seed in range(20):
        draw = np.random.default_rng(seed)
        mask, kept = draw.random((40, 50)) < draw.uniform(0.1, 0.6), draw.random((40, 50)) < 0.02
        label, _ = ndimage.label(mask, np.ones((3, 3)))
        boxes = enumerate(ndimage.find_objects(label), 1)
        lost = [(x.start, y.start, x.stop, y.stop) for i, (y, x) in boxes if not kept[label == i].any()]
        assert sorted(masks.lost_parts(mask, kept)) == sorted(lost)


# ---- pictures that EXIF turned


def test_a_mask_of_the_stored_pixels_is_turned_with_them():
    tall = square((0, 0, 31, 15), size=(64, 48))  # drawn on 64x48 stored pixels, shown as 48x64
    found, notes = read(tall, size=(48, 64), turned=6)
    assert len(notes) == 1 and "EXIF orientation tag (6)" in notes[0]
    assert (found == np.rot90(np.asarray(tall), -1)).all()
    assert not read(tall.transpose(Image.Transpose.ROTATE_270), size=(48, 64), turned=6)[1]


@pytest.mark.parametrize("turned", [2, 3, 4, 6])
def test_the_tag_is_named_where_both_readings_fit(turned):
    found, notes = read(BOX, turned=turned)
    assert len(notes) == 1 and f"({turned})" in notes[0] and found.tobytes() == BOX.tobytes()
    exif = Image.Exif()
    exif[0x0112] = turned
    file = io.BytesIO()
    BOX.save(file, "PNG", exif=exif)
    assert not read(file.getvalue(), turned=turned)[1]  # a mask that carries the tag is turned as the picture is


def test_a_box_beside_a_turned_picture_names_the_tag():
    with pytest.raises(MaskError, match="EXIF orientation 6"):
        read((0, 0, 60, 20), size=(48, 64), turned=6)


def test_a_canvas_knows_the_tag_and_so_does_its_session(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    SCENE.save(tmp_path / "turned.png", exif=exif)
    editor = emilie.load("random", "toy", device="cpu")
    canvas = emilie.open(tmp_path / "turned.png", editor)
    canvas.save(tmp_path / "s.safetensors")
    for each in (canvas, emilie.open(tmp_path / "s.safetensors", editor)):
        with pytest.warns(UserWarning, match="EXIF orientation tag .3."):
            each.read_mask(BOX)
