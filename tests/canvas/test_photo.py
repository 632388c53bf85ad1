"""Editing in a crop: at full resolution, in its latent as long as masks lie in it, the rest of the photo to the bit."""

import numpy as np
import pytest
from PIL import Image

from emilie_min.canvas.canvas import open as open_canvas
from emilie_min.canvas.photo import Photo, crop_box, is_small, open_photo
from emilie_min.errors import CanvasError, MaskError
from emilie_min.toy import judge, world

SCENES, SIZE = 4, world.SIZE


@pytest.fixture(scope="module")
def many():
    """A large picture of sixteen scenes, and those."""
    scenes = [world.scene(seed) for seed in range(3, 3 + SCENES**2)]
    image = Image.new("RGB", (SCENES * SIZE, SCENES * SIZE))
    for i, scene in enumerate(scenes):
        image.paste(world.render(scene), (i % SCENES * SIZE, i // SCENES * SIZE))
    return image, scenes


def tile(i: int) -> tuple[int, int, int, int]:
    x, y = i % SCENES * SIZE, i // SCENES * SIZE
    return x, y, x + SIZE, y + SIZE


def edit(photo: Photo, text: str, mask, box=None, **more) -> str:
    told = photo.aim([mask], box=box)
    for _ in photo.steps([(text, mask)], **more):
        pass
    return told


def in_tile(mask: Image.Image, i: int, size) -> Image.Image:
    out = Image.new("L", size)
    out.paste(mask, tile(i)[:2])
    return out


def test_in_crops_edits_are_right_and_the_rest_stays_to_the_bit(many, shipped):
    """Of one scene among many two objects are changed in its latent, then one of another scene; undo goes all back."""
    image, scenes = many
    photo, before = open_photo(image, shipped), np.asarray(image)
    i, j, script = 5, 10, []
    scene = scenes[i]
    for seed in range(9):
        text, after, mask = world.instruct(scene, seed, "recolour")
        if not script or mask.getbbox() != script[-1][2].getbbox():
            script, scene = [*script, (text, after, mask)], after
        if len(script) == 2:
            break
    told = []
    for text, _, mask in script:
        told.append(edit(photo, text, in_tile(mask, i, image.size), tile(i), keep_background=True))
        assert photo.box == tile(i)
    assert "a new crop, 64x64 px at 64,64" in told[0] and "pixels" not in told[0] and told[1] == "goes on in the crop"
    assert len(photo.canvas.history) == 2 and photo.canvas.state.f is not None  # of the latent, not of pixels
    assert judge.judge(photo.image.crop(tile(i)), scene).correct
    union = np.maximum(*(np.asarray(in_tile(mask, i, image.size)) for _, _, mask in script)) > 0
    assert np.array_equal(np.asarray(photo.image)[~union], before[~union])

    middle = np.asarray(photo.image)
    text, after, mask = world.instruct(scenes[j], 1, "recolour")
    mask = in_tile(mask, j, image.size)
    assert "outside the crop before: a new one, 64x64 px at 128,128, from pixels" in edit(photo, text, mask, tile(j))
    assert judge.judge(photo.image.crop(tile(j)), after).correct and len(photo.canvases) == 2
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(photo.image)[outside], middle[outside])
    photo.undo()
    assert np.array_equal(np.asarray(photo.image), middle)
    photo.undo()
    photo.undo()
    assert np.array_equal(np.asarray(photo.image), before)
    with pytest.raises(CanvasError, match="nothing to undo"):
        photo.undo()


def test_a_large_photo_with_a_small_mask(editor):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8))
    mask = np.zeros((900, 1200), np.uint8)
    mask[500:520, 1180:1199] = 255
    mask[510, 1190] = 0
    of = open_photo(photo, editor)
    with pytest.raises(MaskError, match="vanishes"):  # which at the whole picture's size nothing can be done about
        of.canvas.read_regions([mask])
    edit(of, "make it night", mask, steps=1)
    assert of.box == crop_box((1180, 500, 1199, 520), photo.size, 64) and of.box[2] == 1200
    changed = (np.asarray(of.image) != np.asarray(photo)).any(-1)
    assert of.image.size == photo.size and not changed[mask == 0].any() and changed[mask > 0].mean() > 0.9
    assert of.aim(None).startswith("back to the whole picture") and of.box == (0, 0, 1200, 900)
    assert np.array_equal((np.asarray(of.image) != np.asarray(photo)).any(-1), changed)


@pytest.mark.parametrize("size", [60, 1001])
def test_a_photo_of_4000_px_goes_on_from_a_file(size, editor, tmp_path):
    """A mask of 60 px in a crop, and a large one in the whole: as if never saved; outside the masks every bit stays."""
    pixels = np.random.default_rng(0).integers(0, 255, (330, 4000, 3), dtype=np.uint8)
    masks = [np.zeros((330, 4000), np.uint8) for _ in range(2)]
    for mask, x in zip(masks, (2001, 2013)):
        mask[101 : 101 + size, x : x + size] = 255
        mask[101 : 101 + size // 5, x : x + size // 3] = 0  # a corner that no cell has
    photo, path = Image.fromarray(pixels), tmp_path / "photo.canvas"
    alone = open_photo(photo, editor)

    def go_on(of: Photo, number: int) -> None:
        if size == 60:
            of.aim([masks[number]])
        for _ in of.steps([("make it night", masks[number])], steps=2):
            pass

    def reopened() -> Photo:
        return Photo(photo, open_canvas(path, editor))

    def outside(of: Photo, *shown: np.ndarray) -> bool:
        moved = (np.asarray(of.image) != pixels).any(-1)
        inside = np.any([mask > 0 for mask in shown], 0)
        return not moved[~inside].any() and moved[inside].mean() > 0.7

    go_on(alone, 0)
    alone.canvas.save(path)
    again = reopened()
    assert (alone.box == (0, 0, 4000, 330)) == (size > 60) and outside(again, masks[0])
    assert again.image.tobytes() == alone.image.tobytes()
    for of in (alone, again):
        go_on(of, 1)
    assert again.image.tobytes() == alone.image.tobytes() and outside(again, *masks)
    again.canvas.hide(1)
    assert outside(again, masks[1])
    again.canvas.save(path)
    again = reopened()
    assert outside(again, masks[1])
    again.canvas.strength(2, 0.5)
    assert outside(again, masks[1])
    again.canvas.revise(2, mask=masks[0])
    assert outside(again, masks[0])
    again.canvas.undo()
    again.undo()
    assert outside(again, masks[1])
    again.canvas.branch(1)
    assert outside(again, masks[0])
    again.canvas.branch(0)
    assert again.image.tobytes() == photo.tobytes()


def test_crops_lie_in_the_photo_and_hold_the_mask():
    for mask in ((0, 0, 10, 10), (390, 290, 400, 300), (100, 0, 300, 300), (0, 0, 400, 300), (195, 145, 205, 155)):
        x0, y0, x1, y1 = crop_box(mask, (400, 300), 64)
        assert 0 <= x0 <= mask[0] and mask[2] <= x1 <= 400 and 0 <= y0 <= mask[1] and mask[3] <= y1 <= 300
    assert crop_box((195, 145, 205, 155), (400, 300), 64) == (184, 134, 216, 166)
    assert is_small((0, 0, 60, 60), (4000, 3000), (512, 384)) and not is_small((0, 0, 60, 60), (512, 384), (512, 384))


def test_what_cannot_be_cropped_is_told(many, editor):
    photo = open_photo(many[0], editor)
    for box in ((50, 0, 200, 200), (0, 50, 200, 200), (0, 0, 70, 200), (0, 0, 200, 70)):
        with pytest.raises(MaskError, match="make the crop larger"):
            photo.aim([(40, 40, 80, 80)], box=box)
    grey = open_photo(Image.new("RGB", (64, 64), "grey"), editor)
    with pytest.raises(CanvasError, match="on another picture"):
        Photo(Image.new("RGB", (128, 128), "grey"), grey.canvas)
    with pytest.raises(CanvasError, match="needs a mask"):
        photo.aim([None])
    assert photo.canvas.at == 0 and photo.box == (0, 0, 256, 256)


def test_a_changed_stack_at_the_photos_size(editor):
    """Outside the masks that show it is the photo, to the bit; what is taken out, hidden or moved away is it again."""
    image = world.render(world.scene(3)).resize((150, 150))
    photo, before = open_photo(image, editor), np.asarray(image)
    left, right = (0, 0, 50, 150), (100, 0, 150, 150)
    for box in (left, right):
        for _ in photo.steps([("make it night", box)], steps=1):
            pass
    both, canvas = np.asarray(photo.image), photo.canvas

    def same(a, b) -> list[bool]:
        return [bool((a[:, part] == b[:, part]).all()) for part in (slice(0, 50), slice(50, 100), slice(100, 150))]

    assert same(both, before) == [False, True, False]
    for change, kept in [
        (lambda: canvas.hide(1), [True, True, False]),
        (lambda: canvas.move(1, 2), [True, True, False]),
        (lambda: canvas.retract(1), [True, True, True]),
        (lambda: canvas.show(1), [False, True, True]),
        (lambda: canvas.revise(1, mask=(0, 0, 30, 30), text_scale=2.0), [False, True, True]),
        (lambda: canvas.retract(1), [True, True, True]),
    ]:
        change()
        assert same(np.asarray(photo.image), before) == kept
        if change and kept == [True, True, False]:
            assert same(np.asarray(photo.image), both) == [False, True, True]
    photo.undo()
    after = np.asarray(photo.image)
    assert (after[31:] == before[31:]).all() and (after != before).any()


def test_a_changed_stack_in_a_crop(editor):
    """The crop's edits are its stack; those before it are in the picture that it was cut from."""
    image = world.render(world.scene(3)).resize((200, 200))
    photo = open_photo(image, editor)
    edit(photo, "make it night", (0, 0, 60, 60), steps=1)
    edit(photo, "make it day", (140, 140, 200, 200), steps=1)
    assert len(photo.earlier) == 1 and len(photo.canvas.stack) == 1
    before = np.asarray(photo.image)
    photo.canvas.retract(1)
    after = np.asarray(photo.image)
    assert (after == np.asarray(photo.photo)).all() and (after[:140, :140] == before[:140, :140]).all()
    assert (after[140:, 140:] == np.asarray(image)[140:, 140:]).all() and (after != np.asarray(image)).any()
    with pytest.raises(CanvasError, match="the stack has none"):
        photo.canvas.retract(1)
    photo.undo()
    assert (np.asarray(photo.image) == before).all()
