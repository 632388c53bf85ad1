"""Pictures and masks: what is accepted, what it becomes, and what is refused with a clear line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pseudo import DATA

from emilie_min.canvas import images
from emilie_min.errors import ImageError, MaskError

GOLDENS = json.loads((DATA / "goldens.json").read_text())


def gradient(width=64, height=48) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8))


def test_working_size_is_the_originals():
    for (width, height, resolution), expected in GOLDENS["resize"]["table"]:
        assert images.fit_size((width, height), resolution, 64) == tuple(expected)


def test_native_size_rounds_down():
    assert images.fit_size((641, 480), "native", 64) == (640, 448)
    for narrow in ((40, 400), (400, 40)):
        with pytest.raises(ImageError, match="give a resolution"):
            images.fit_size(narrow, "native", 64)
    with pytest.raises(ImageError, match="resolution in px"):
        images.near_size((400, 400), "native", 64)


@pytest.mark.parametrize("resolution", [0, -64, 32, 1.5, "big"])
def test_unusable_resolutions(resolution):
    for size in (images.fit_size, images.near_size):
        with pytest.raises(ImageError, match="resolution must be"):
            size((512, 512), resolution, 64)


def test_pixels_survive_the_round_trip():
    picture = gradient()
    assert images.to_image(images.to_tensor(picture)).tobytes() == picture.tobytes()


def test_truncation_is_half_a_level_darker():
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    rounded, truncated = (np.asarray(images.to_image(x, truncate=t), float) for t in (False, True))
    assert (rounded - truncated).mean() == pytest.approx(0.5, abs=0.02)


def test_arrays():
    picture = gradient()
    array = np.asarray(picture)
    assert images.read_image(array).tobytes() == picture.tobytes()
    assert images.read_image(array / 255.0).tobytes() == picture.tobytes()
    assert images.read_image(array[..., 0]).mode == "RGB"
    kinds = [array.astype(np.int64), array.astype(float), array / 255.0 - 0.1, np.full((32, 32), np.nan)]
    for bad in (*kinds, array[..., :2], array[None], array[:0]):
        with pytest.raises(ImageError, match="array"):
            images.read_image(bad)
    with pytest.raises(ImageError, match="not list"):
        images.read_image([1, 2])


def test_unreadable_pictures(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="no picture at"):
        images.read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ImageError, match="cannot be read"):
        images.read_image(tmp_path / "text.png")
    with pytest.raises(ImageError, match="cannot be read as a picture: it is a folder"):
        images.read_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read as a picture: File name too long"):
        images.read_image(tmp_path / ("x" * 300))
    for suffix in ("png", "jpg", "bmp", "tif"):
        gradient(200, 200).save(tmp_path / f"whole.{suffix}")
        data = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"half.{suffix}").write_bytes(data[: len(data) // 2])
        with pytest.raises(ImageError, match="cannot be read"):
            images.read_image(tmp_path / f"half.{suffix}")
    with pytest.raises(ImageError, match="too small"):
        images.read_image(gradient(200, 15))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=f"^{tmp_path}/whole.png is too large"):
        images.read_image(tmp_path / "whole.png")
    for size, resolution in ((images.fit_size, "native"), (images.near_size, 9000)):
        with pytest.raises(ImageError, match="lower the resolution"):
            size((9000, 9000), resolution, 64)


def test_what_libtiff_says_goes_nowhere(tmp_path, capfd):
    gradient(200, 200).save(tmp_path / "a.tif", compression="tiff_lzw")
    data = (tmp_path / "a.tif").read_bytes()
    with pytest.raises(ImageError):
        images.read_image(data[:100] + bytes(1000) + data[1100:])
    assert capfd.readouterr().err == ""


def test_restored_to_its_size_a_picture_keeps_the_edges_that_were_cropped_off():
    original = gradient(1000, 333)
    size = images.fit_size(original.size, 512, 64)
    back = images.restore_size(Image.new("RGB", size, "red"), original)
    assert back.size == original.size
    assert back.getpixel((500, 166)) == (255, 0, 0)
    wide = images.restore_size(Image.new("RGB", (64, 64), "red"), original)  # of a square from its middle
    assert wide.getpixel((500, 166)) == (255, 0, 0) and wide.getpixel((0, 100)) == original.getpixel((0, 100))
    assert [wide.getpixel((x, 9)) == (255, 0, 0) for x in (332, 333, 665, 666)] == [False, True, True, False]


def test_masks_from_pictures_arrays_and_boxes():
    box = images.read_mask((16, 8, 48, 40), (64, 64), (64, 64))
    array = np.zeros((64, 64), bool)
    array[8:40, 16:48] = True
    assert images.read_mask(array, (64, 64), (64, 64)).tobytes() == box.tobytes()
    assert images.read_mask(Image.fromarray(array), (64, 64), (64, 64)).tobytes() == box.tobytes()
    cells = images.latent_mask(box, 8)
    assert cells.shape == (1, 1, 8, 8) and cells.sum() == 16 and cells[0, 0, 1:5, 2:6].all()


def test_a_mask_follows_its_picture_to_working_size():
    mask = images.read_mask((0, 0, 500, 333), (1000, 333), (576, 192))
    assert mask.size == (576, 192)
    cells = images.latent_mask(mask, 8)
    assert 0.45 < cells.mean() < 0.55 and cells[0, 0, :, 0].all() and not cells[0, 0, :, -1].any()


def test_area_threshold_and_soft():
    box = images.read_mask((0, 0, 12, 8), (64, 64), (64, 64))
    assert images.latent_mask(box, 8).sum() == 2  # the second cell is covered by half
    assert images.latent_mask(box, 8, soft=True)[0, 0, 0, 1] == 0.5
    thin = images.read_mask((0, 0, 3, 64), (64, 64), (64, 64))
    with pytest.raises(MaskError, match="vanishes"):
        images.latent_mask(thin, 8)
    assert images.latent_mask(thin, 8, soft=True).max() == 0.375


def test_masks_are_scaled_by_area():
    """Stripes finer than the working picture's pixels: what is counted is how much of each pixel they cover."""
    stripes = np.zeros((128, 128), np.uint8)
    stripes[:, ::4] = 255  # a quarter everywhere; a half in the lower half
    stripes[64:, 1::4] = 255
    soft = np.asarray(images.read_mask(stripes, (128, 128), (32, 32), soft=True))
    assert (abs(soft[:16] - 63.75) <= 1).all() and (abs(soft[16:] - 127.5) <= 1).all()
    cells = images.latent_mask(Image.fromarray(stripes), 8, soft=True)
    assert torch.allclose(cells[..., :8, :], torch.tensor(0.25)) and torch.allclose(
        cells[..., 8:, :], torch.tensor(0.5)
    )
    hard = images.latent_mask(images.read_mask(stripes, (128, 128), (128, 128)), 8)
    assert not hard[..., :8, :].any() and hard[..., 8:, :].all()


def test_a_native_mask_is_cropped_as_its_picture_is():
    mask = images.read_mask((80, 40, 90, 50), (127, 95), (96, 64), native=True)  # 15 px are cut off at the left and top
    assert mask.getbbox() == (65, 25, 75, 35)


OUTSIDE = [(0, 0, 65, 32), (0, 0, 32, 65), (-1, 0, 32, 32), (0, -1, 32, 32), (40, 0, 20, 32), (0, 40, 32, 20)]


@pytest.mark.parametrize("box", [*OUTSIDE, (0, 0, 0, 5), (0, 5, 9, 5), (1, 2, 3), (0.5, 0, 5, 5)])
def test_bad_boxes(box):
    with pytest.raises(MaskError, match="box"):
        images.read_mask(box, (64, 64), (64, 64))


@pytest.mark.parametrize("part", [*OUTSIDE, (0, 0, 15, 32), (0, 0, 32, 15), (1, 2, 3), (0.5, 0, 32, 32), "all", None])
def test_bad_parts(part):
    with pytest.raises(ImageError, match="part"):
        images.read_part(part, (64, 64))


def test_bad_masks(tmp_path):
    with pytest.raises(MaskError, match="fainter"):
        images.read_mask(np.full((64, 64), 100, np.uint8), (64, 64), (64, 64))
    with pytest.raises(MaskError, match="empty"):
        images.read_mask(np.zeros((64, 64), bool), (64, 64), (64, 64))
    with pytest.raises(MaskError, match="same size"):
        images.read_mask(np.ones((32, 64), bool), (64, 64), (64, 64))
    with pytest.raises(MaskError, match="no picture"):
        images.read_mask(tmp_path / "mask.png", (64, 64), (64, 64))


def test_paste_never_touches_the_outside():
    new, old = Image.new("RGB", (64, 64), "white"), gradient(64, 64)
    mask = images.read_mask((10, 10, 40, 40), (64, 64), (64, 64))
    out = np.asarray(images.paste_back(new, old, mask, feather=4))
    inside = np.asarray(mask) > 0
    assert (out[~inside] == np.asarray(old)[~inside]).all()
    assert (out[20:30, 20:30] == 255).all()
    assert (out[inside] != np.asarray(old)[inside]).any(axis=-1).all()  # even a rim of the mask is edited
