"""A canvas is Algorithm 1; every setting reaches the edit, and nothing of a session is lost."""

import copy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import emilie_min as emilie
from emilie_min import sampling
from emilie_min.canvas import images, where
from emilie_min.canvas.canvas import SAMPLERS
from emilie_min.canvas.settings import Settings
from emilie_min.config import GATES
from emilie_min.emilie import emilie as algorithm_1
from emilie_min.errors import CanvasError, CheckpointError, EmilieError, InstructionError, MaskError, SamplingError
from emilie_min.toy import world

FAST = {"steps": 2}
NIGHT, DAY, COMIC = "make it night", "make it day", "turn it into a comic"
RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


def left_half() -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    return mask


def outside(z: torch.Tensor) -> torch.Tensor:
    return z[..., 8:]


def few_steps(editor):
    editor = copy.copy(editor)
    editor.config = replace(editor.config, sampling=replace(editor.config.sampling, steps=3))
    return editor


@pytest.mark.parametrize("gate", GATES)
def test_a_canvas_is_algorithm_1_to_the_bit(shipped, gate):
    """Four edits by the model that ships, two of them in masks, one hard and one soft."""
    editor, picture = few_steps(shipped), world.render(world.scene(3))
    edits = [(NIGHT, None), (DAY, left_half()), (COMIC, RAMP), (NIGHT, None)]
    canvas = emilie.open(picture, editor, seed=7)
    masks = [None if mask is None else canvas.read_mask(mask, soft=True)[1] for _, mask in edits]
    edits_by_hand = [(text, mask) for (text, _), mask in zip(edits, masks)]
    by_hand = algorithm_1(editor, images.to_tensor(picture), edits_by_hand, 7, gate)
    for (text, mask), z in zip(edits, by_hand, strict=True):
        image = canvas.edit(text, mask, gate=gate, soft=True)
        assert torch.equal(canvas.latent, z)
        assert image.tobytes() == images.to_image(editor.decode(z)).tobytes()


def test_the_first_edit_sees_the_encoded_picture(editor, canvas):
    z_img, f = canvas.image_latent()
    assert f is None and torch.equal(z_img, images.to_latent(editor, world.render(world.scene(3))))
    assert torch.equal(canvas.latent, editor.scale_factor * z_img)
    for rescale in ("exact", "none", "signed"):  # nothing is rescaled yet
        assert torch.equal(canvas.image_latent(rescale)[0], z_img)
    canvas.edit(NIGHT, **FAST)
    assert canvas.state.f is None
    canvas.undo()
    assert torch.equal(canvas.image_latent()[0], z_img)


def test_z_init_is_drawn_once_from_the_canvas_s_seed(editor, canvas):
    assert torch.equal(canvas.z_init, sampling.noise_stream((1, 4, 16, 16), 5, "init")())
    z_init = canvas.z_init.clone()
    canvas.edit(NIGHT, seed=8, **FAST)
    assert torch.equal(canvas.z_init, z_init)
    assert not torch.equal(emilie.open(canvas.image, editor, seed=6).z_init, z_init)


def test_same_seed_same_result_whatever_ran_before(editor):
    picture = world.render(world.scene(3))
    once = emilie.open(picture, editor, seed=7).edit(NIGHT, **FAST).tobytes()
    torch.manual_seed(1)
    torch.rand(5)
    emilie.open(picture, editor, seed=8).edit(DAY, **FAST)
    again = emilie.open(picture, editor, seed=7)
    assert again.edit(NIGHT, **FAST).tobytes() == once
    again.undo()
    assert again.edit(NIGHT, **FAST).tobytes() == once  # by depth, not by how many edits there were
    again.undo()
    assert again.edit(NIGHT, seed=8, **FAST).tobytes() != once


def test_rescales(editor, canvas):
    """On networks that make 5 z - 0.5 of a latent z, so that every mean is known."""
    canvas.edit(NIGHT, **FAST)
    canvas.editor = copy.copy(editor)
    canvas.editor.decode, canvas.editor.encode = lambda z: z, lambda x: 5 * x - 0.5
    z = canvas.state.latent = torch.linspace(-0.2, 1, 1024).view(1, 4, 16, 16)
    again, mean = 5 * z - 0.5, z.mean()
    expected = {"paper": again.abs().mean() / z.abs().mean(), "signed": again.mean() / mean, "none": 1.0}
    for rescale, f in {**expected, "exact": 1 / editor.scale_factor}.items():
        z_img, used = canvas.image_latent(rescale)
        assert used == pytest.approx(float(f), rel=1e-5) and torch.equal(z_img, used * z)
    assert abs(expected["paper"] / expected["signed"] - 1) > 0.05
    assert torch.equal(canvas.image_latent()[0], canvas.image_latent("paper")[0])
    for mean in (-0.001, 0.02):  # where the means cancel: too large, and of the wrong sign
        canvas.state.latent = z - z.mean() + mean
        with pytest.raises(SamplingError, match="rescale='signed'"):
            canvas.edit(DAY, rescale="signed", **FAST)
    assert len(canvas.history) == 1


def test_a_state_keeps_the_f_that_led_to_it(editor, canvas):
    canvas.edit(NIGHT, **FAST)
    f = canvas.image_latent()[1]
    canvas.edit(DAY, **FAST)
    assert canvas.state.f == f > 0
    canvas.edit(NIGHT, rescale="exact", **FAST)
    assert canvas.state.f == 1 / editor.scale_factor


def test_image_iteration_starts_from_the_picture_and_anchors_to_it(editor, canvas):
    canvas.edit(NIGHT, **FAST)
    latent = canvas.latent
    z_img, f = canvas.image_latent(iterate="image")
    assert f is None and torch.equal(z_img, images.to_latent(editor, canvas.image))
    canvas.edit(DAY, left_half(), iterate="image", **FAST)
    assert canvas.state.f is None
    assert torch.equal(outside(canvas.latent), outside(editor.scale_factor * z_img))
    assert not torch.equal(outside(canvas.latent), outside(latent))


def test_anchor_keeps_the_latent_outside_a_hard_mask_through_a_chain(canvas):
    source = outside(canvas.latent).clone()
    for text in (NIGHT, DAY, COMIC):
        canvas.edit(text, left_half(), **FAST)
        assert torch.equal(outside(canvas.latent), source)


def test_eq8_leaves_noise_outside(canvas):
    before = canvas.latent
    canvas.edit(NIGHT, left_half(), gate="eq8", **FAST)
    assert outside(canvas.latent).std() > 5 * outside(before).std()


@pytest.mark.parametrize("gate", GATES)
def test_a_mask_of_ones_is_no_mask(canvas, gate):
    free = np.asarray(canvas.edit(NIGHT, **FAST), int)
    canvas.undo()
    masked = np.asarray(canvas.edit(NIGHT, np.ones((64, 64), bool), gate=gate, **FAST), int)
    assert np.abs(free - masked).max() <= 1


BASE = {"text_scale": 3.0, "image_scale": 1.5, "steps": 3}


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 4},
        {"text_scale": 4.0},
        {"image_scale": 2.0},
        {"gate": "eq8"},
        {"gate": "guidance"},
        {"soft": True},
        {"rescale": "exact"},
        {"rescale": "none"},
        {"iterate": "image"},
        {"keep_background": True},
        {"seed": 6},
        {"sampler": "dpmpp_2m"},
        {"sampler": "dpmpp_2m_sde"},
        {"guidance_interval": (5.0, 100.0)},
        {"reuse": 2},
        {"reuse_guidance": 0.3},
    ],
    ids=str,
)
def test_every_setting_reaches_the_edit_and_its_record(canvas, change):
    canvas.edit(NIGHT, **BASE)
    plain, changed = (
        canvas.branch(1) and canvas.edit(DAY, RAMP, **more) and canvas.state for more in (BASE, BASE | change)
    )
    moved = (plain.latent - changed.latent).abs().max()
    assert moved > 1e-3 or (change == {"keep_background": True} and not same(plain.image, changed.image))
    record = {**asdict(Settings(**BASE, seed=5)), **change}
    assert changed.settings == {name: value for name, value in record.items() if name != "allow_empty"}


def test_what_is_not_said_is_the_config_s_and_the_canvas_s(editor, canvas):
    canvas.edit(NIGHT)
    said, defaults = canvas.state.settings, editor.config.sampling
    assert [said[name] for name in ("steps", "text_scale", "image_scale", "seed")] == [
        *(defaults.steps, defaults.text_scale, defaults.image_scale, 5)
    ]


def test_steps_are_the_edit_one_by_one(canvas):
    image, seen = canvas.edit(NIGHT, **FAST), []
    latent = canvas.latent
    canvas.undo()
    for step in canvas.steps(NIGHT, **FAST):
        seen.append(step)
        assert len(canvas.states) == 2  # the state is added after the last
    assert [step.i for step in seen] == [0, 1, 2] and seen[-1].sigma == 0
    assert torch.equal(seen[-1].x, latent) and torch.equal(canvas.latent, latent) and canvas.at == 2
    assert canvas.image.tobytes() == image.tobytes()


def test_an_edit_that_is_left_changes_nothing_and_one_that_goes_on_starts_where_it_began(canvas):
    canvas.edit(NIGHT, **FAST)
    canvas.undo()
    for _ in canvas.steps(DAY, **FAST):
        break
    assert canvas.at == 0 and canvas.redo_stack == [1] and len(canvas.states) == 2
    steps = canvas.steps(DAY, **FAST)
    next(steps)
    canvas.redo()  # while an edit of the picture as opened is under way
    list(steps)
    assert canvas.state.instruction == DAY and canvas.state.parent == 0


def test_what_is_given_is_checked_before_the_first_step(canvas):
    with pytest.raises(InstructionError):
        canvas.steps(" ")
    with pytest.raises(SamplingError):
        canvas.steps(NIGHT, steps=0)
    with pytest.raises(MaskError):
        canvas.steps(NIGHT, (0, 0, 0, 0))
    with pytest.raises(MaskError, match="needs a mask"):
        canvas.steps(NIGHT, keep_background=True)


def test_the_samplers_are_those_of_their_names():
    names = {name: getattr(sampler, "func", sampler).__name__ for name, sampler in SAMPLERS.items()}
    assert names == {
        "euler_ancestral": "sample_euler_ancestral",
        "dpmpp_2m": "sample_dpmpp_2m",
        "dpmpp_2m_sde": "sample_dpmpp_2m",
    }
    assert SAMPLERS["dpmpp_2m_sde"].keywords == {"eta": 1.0}


def test_keep_background_to_the_bit_over_ten_edits(canvas):
    mask = left_half()
    first = np.asarray(canvas.image)
    for i in range(10):
        canvas.edit((NIGHT, DAY)[i % 2], mask, keep_background=True, steps=1)
    last = np.asarray(canvas.image)
    assert (last[:, 32:] == first[:, 32:]).all()
    assert (last[:, :32] != first[:, :32]).any()


def test_kept_background_is_kept_in_the_latent_under_every_gate(canvas):
    for gate in GATES:
        before = outside(canvas.latent)
        canvas.edit(NIGHT, left_half(), gate=gate, keep_background=True, **FAST)
        assert torch.equal(outside(canvas.latent), before)


def test_a_faint_mask_background_is_not_edited(canvas):
    grey = np.asarray(left_half()).copy()
    grey[:, 32:] = 3
    before = np.asarray(canvas.image)
    after = np.asarray(canvas.edit(NIGHT, grey, keep_background=True, **FAST))
    assert (after[:, 32:] == before[:, 32:]).all()


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.tobytes() == b.tobytes()


def test_undo_redo_branch(canvas):
    opened = canvas.image
    with pytest.raises(CanvasError, match="nothing to undo"):
        canvas.undo()
    night = canvas.edit(NIGHT, **FAST)
    day = canvas.edit(DAY, **FAST)
    assert [s.instruction for s in canvas.history] == [NIGHT, DAY]
    assert same(canvas.undo(), night) and same(canvas.undo(), opened)
    assert same(canvas.redo(), night) and same(canvas.redo(), day)
    with pytest.raises(CanvasError, match="nothing to redo"):
        canvas.redo()
    canvas.branch(1)
    canvas.edit(COMIC, **FAST)
    assert [s.instruction for s in canvas.history] == [NIGHT, COMIC]
    assert len(canvas.states) == 4 and same(canvas.states[2].image, day)  # the other branch is still there
    for bad in (-1, 4, "1"):
        with pytest.raises(CanvasError, match="no state"):
            canvas.branch(bad)
    canvas.undo()
    canvas.edit(DAY, **FAST)
    with pytest.raises(CanvasError, match="nothing to redo"):
        canvas.redo()  # what was undone before an edit is another branch


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        ({"gate": "wall"}, SamplingError),
        ({"instruction": "make it winter"}, InstructionError),
        ({"mask": np.zeros((64, 64), bool)}, MaskError),
        ({"instruction": [(NIGHT, (0, 0, 24, 64)), (DAY, (0, 0, 1, 64))]}, MaskError),
    ],
    ids=str,
)
def test_bad_edits_change_nothing(canvas, edit, error):
    with pytest.raises(error):
        canvas.edit(**{"instruction": NIGHT, **edit})
    assert len(canvas.states) == 1 and canvas.history == []


def test_numbers_that_are_not_finite(editor, canvas, monkeypatch):
    monkeypatch.setattr(editor, "denoise", lambda x, *_: x * float("nan"))
    with pytest.raises(SamplingError, match="the sampled latent is not finite"):
        canvas.edit(NIGHT, **FAST)
    assert canvas.history == []
    monkeypatch.setattr(editor, "encode", lambda x: torch.full((1, 4, 8, 8), float("nan")))
    with pytest.raises(SamplingError, match="encoding the picture"):
        emilie.open(world.render(world.scene(0)), editor)


def test_nothing_is_no_instruction_to_look_for(canvas):
    for text in ("", " "):
        with pytest.raises(InstructionError):
            where.differences(canvas, text)


def test_out_of_memory_says_what_to_lower(editor, canvas, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for part in ("denoise", "decode"):
        with monkeypatch.context() as patch:
            patch.setattr(editor, part, full)
            with pytest.raises(EmilieError, match="--resolution"):
                canvas.edit(NIGHT, **FAST)
    monkeypatch.setattr(editor, "encode", full)
    with pytest.raises(EmilieError, match="--resolution"):
        emilie.open(canvas.image, editor)


def test_four_channels_cannot_edit(editor, monkeypatch):
    monkeypatch.setattr(editor.unet, "in_channels", 4)
    with pytest.raises(CheckpointError, match="needs 8.*emilie download"):
        emilie.open(world.render(world.scene(0)), editor)


def test_rectangles_and_native(editor):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (51, 99, 3), np.uint8))
    canvas = emilie.open(picture, editor, resolution="native")
    assert canvas.image.size == (96, 48) and canvas.latent.shape == (1, 4, 12, 24)
    canvas.edit(NIGHT, (0, 0, 50, 51), **FAST)
    assert images.restore_size(canvas.image, picture).size == (99, 51)


def test_native_and_input_size_keep_the_background_to_the_bit(editor):
    noise = np.random.default_rng(0).integers(0, 255, (150, 203, 3), np.uint8)
    original, box = Image.fromarray(noise), (10, 20, 90, 100)
    away = np.ones((150, 203), bool)
    away[20:100, 10:90] = False
    for resolution in ("native", 96):
        canvas = emilie.open(original, editor, resolution=resolution)
        canvas.edit(NIGHT, box, keep_background=True, steps=1)
        back = np.asarray(images.restore_size(canvas.image, original, canvas.native, canvas.edited_mask()))
        assert (back[away] == noise[away]).all() and (back != noise).any()
    assert (np.asarray(emilie.open(original, editor, resolution="native").image) == noise[3:147, 1:201]).all()


def test_what_is_handed_out_is_a_copy(canvas):
    canvas.edit(NIGHT, **FAST).paste(0, (0, 0, 64, 64))
    canvas.image.thumbnail((8, 8))
    canvas.latent.zero_()
    assert canvas.image.size == (64, 64) and np.asarray(canvas.image).any() and canvas.latent.any()


def test_numbers_of_any_integer_type(editor, tmp_path):
    picture = world.render(world.scene(3))
    a, b = (emilie.open(picture, editor, seed=s, resolution=r) for s, r in ((5, 64), (np.int64(5), np.int64(64))))
    assert torch.equal(a.z_init, b.z_init)
    assert a.edit(NIGHT, steps=2).tobytes() == b.edit(NIGHT, steps=np.int64(2)).tobytes()
    b.save(tmp_path / "c.safetensors")
    with pytest.raises(SamplingError, match="seed"):
        emilie.open(picture, editor, seed=5.0)
