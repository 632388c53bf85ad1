"""Algorithm 1: what an edit starts from, what is drawn when, and that nothing of a session is lost."""

import numpy as np
import pytest
import torch
from PIL import Image

import emilie_min as emilie
from emilie_min import sampling
from emilie_min.canvas import images
from emilie_min.emilie import random_latent
from emilie_min.errors import CanvasError, CheckpointError, EmilieError, InstructionError, MaskError, SamplingError
from emilie_min.toy import world

FAST = {"steps": 2}


@pytest.fixture(scope="module")
def editor():
    return emilie.load("random", "toy", device="cpu")


@pytest.fixture
def canvas(editor):
    return editor.open(world.render(world.scene(3)), seed=5)


def left_half() -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    return mask


def outside(z: torch.Tensor) -> torch.Tensor:
    return z[..., 8:]


def test_an_edit_is_what_algorithm_1_says(editor, canvas):
    """Two edits by the canvas and by hand, from the public pieces."""
    canvas.edit("make it night", steps=3, rescale="exact")
    canvas.edit("make it day", steps=3, rescale="exact")

    sigmas = sampling.get_sigmas(3, editor.alphas_cumprod)
    shape = tuple(canvas.z_init.shape)
    z_init = random_latent(shape, 5, "init")()
    z_img, uncond = editor.encode(world.render(world.scene(3))), editor.context([""])
    for i, text in enumerate(("make it night", "make it day")):
        scales = {"text_scale": editor.config.sampling.text_scale, "image_scale": editor.config.sampling.image_scale}
        noise = random_latent(shape, 5, "edit", i)
        z = editor.sample(z_img, editor.context([text]), uncond, sigmas, z_init, noise, **scales)
        z_img = z / editor.scale_factor
    assert torch.allclose(canvas.latent, z, rtol=1e-4, atol=1e-4)
    assert torch.equal(canvas.z_init, z_init)


def test_z_init_is_drawn_once_and_step_noise_per_edit(canvas):
    first = random_latent((1, 4, 16, 16), 5, "edit", 0)()
    assert not torch.equal(first, random_latent((1, 4, 16, 16), 5, "edit", 1)())
    assert not torch.equal(canvas.z_init, first)
    assert abs(canvas.z_init.std().item() - 1) < 0.1


def test_same_seed_same_result_whatever_ran_before(editor):
    picture = world.render(world.scene(3))
    once = editor.open(picture, seed=7).edit("make it night", **FAST)
    torch.manual_seed(1)
    torch.rand(5)
    editor.open(picture, seed=8).edit("make it day", **FAST)
    again = editor.open(picture, seed=7)
    assert again.edit("make it night", **FAST).tobytes() == once.tobytes()
    again.undo()
    assert again.edit("make it night", **FAST).tobytes() == once.tobytes()
    again.undo()
    assert again.edit("make it night", seed=8, **FAST).tobytes() != once.tobytes()


def test_rescales(editor, canvas):
    canvas.edit("make it night", **FAST)
    z = canvas.latent
    again = editor.vae.encode(editor.decode(z))
    z_img, f = canvas.image_latent("paper")
    assert f == pytest.approx((again.abs().mean() / z.abs().mean()).item(), rel=1e-5)
    assert torch.allclose(z_img, f * z)
    assert canvas.image_latent("exact")[1] == 1 / editor.scale_factor
    assert canvas.image_latent("none")[1] == 1
    signed = (again.mean() / z.mean()).item()
    if 0.25 < signed / f < 4:
        assert canvas.image_latent("signed")[1] == pytest.approx(signed, rel=1e-4)
    else:
        with pytest.raises(SamplingError, match="signed"):
            canvas.image_latent("signed")


def test_signed_rescale_is_refused_where_the_means_cancel(canvas):
    canvas.edit("make it night", **FAST)
    canvas.state.latent -= canvas.latent.mean()
    with pytest.raises(SamplingError, match="signed"):
        canvas.edit("make it day", rescale="signed", **FAST)
    assert len(canvas.history) == 1


def test_image_iteration_starts_from_the_picture(editor, canvas):
    canvas.edit("make it night", **FAST)
    z_img, f = canvas.image_latent(iterate="image")
    assert f is None and torch.equal(z_img, editor.encode(canvas.image))


def test_anchor_keeps_the_latent_outside_a_hard_mask_through_a_chain(canvas):
    source = outside(canvas.latent).clone()
    for text in ("make it night", "make it day", "turn it into a comic"):
        canvas.edit(text, left_half(), **FAST)
        assert torch.equal(outside(canvas.latent), source)


def test_eq8_leaves_noise_outside(canvas):
    before = canvas.latent
    canvas.edit("make it night", left_half(), gate="eq8", **FAST)
    assert outside(canvas.latent).std() > 5 * outside(before).std()


def test_guidance_gate_with_an_empty_mask_side_ignores_the_instruction(canvas):
    everywhere = canvas.edit("make it night", **FAST).tobytes()
    canvas.undo()
    ones = np.ones((64, 64), bool)
    assert canvas.edit("make it night", ones, gate="guidance", **FAST).tobytes() == everywhere


def test_mask_of_ones_is_no_mask(canvas):
    free = canvas.edit("make it night", **FAST)
    canvas.undo()
    masked = canvas.edit("make it night", np.ones((64, 64), bool), **FAST)
    apart = np.abs(np.asarray(free, int) - np.asarray(masked, int))
    assert apart.max() <= 1


def test_keep_background_to_the_bit_over_ten_edits(canvas):
    mask = left_half()
    first = np.asarray(canvas.image)
    for i in range(10):
        canvas.edit(("make it night", "make it day")[i % 2], mask, keep_background=True, steps=1)
    last = np.asarray(canvas.image)
    assert (last[:, 32:] == first[:, 32:]).all()
    assert (last[:, :32] != first[:, :32]).any()


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.tobytes() == b.tobytes()


def test_undo_redo_branch(canvas):
    opened = canvas.image
    with pytest.raises(CanvasError, match="nothing to undo"):
        canvas.undo()
    night = canvas.edit("make it night", **FAST)
    day = canvas.edit("make it day", **FAST)
    assert [s.instruction for s in canvas.history] == ["make it night", "make it day"]
    assert same(canvas.undo(), night) and same(canvas.undo(), opened)
    assert same(canvas.redo(), night) and same(canvas.redo(), day)
    with pytest.raises(CanvasError, match="nothing to redo"):
        canvas.redo()
    canvas.branch(1)
    canvas.edit("turn it into a comic", **FAST)
    assert [s.instruction for s in canvas.history] == ["make it night", "turn it into a comic"]
    assert len(canvas.states) == 4 and same(canvas.states[2].image, day)  # the other branch is still there
    for bad in (-1, 4):
        with pytest.raises(CanvasError, match="no state"):
            canvas.branch(bad)


def test_a_saved_canvas_goes_on_bit_for_bit(editor, canvas, tmp_path):
    canvas.edit("make it night", left_half(), **FAST)
    canvas.edit("make it day", keep_background=True, mask=left_half(), **FAST)
    canvas.undo()
    canvas.save(tmp_path / "session.safetensors")
    other = emilie.open_canvas(tmp_path / "session.safetensors", editor)
    assert other.at == canvas.at == 1 and other.undone == [2] and other.original_size == (64, 64)
    for a, b in zip(canvas.states, other.states):
        assert torch.equal(a.latent, b.latent) and a.image.tobytes() == b.image.tobytes()
        assert (a.mask is None) == (b.mask is None) and a.settings == b.settings and a.f == b.f
        assert a.mask is None or a.mask.tobytes() == b.mask.tobytes()
    assert canvas.redo().tobytes() == other.redo().tobytes()
    texts = ("turn it into a comic", "make it day")
    for text in texts:
        assert canvas.edit(text, **FAST).tobytes() == other.edit(text, **FAST).tobytes()
        assert torch.equal(canvas.latent, other.latent)
    assert list(tmp_path.iterdir()) == [tmp_path / "session.safetensors"]  # no partial file stays


def test_canvas_files_that_are_none(editor, tmp_path):
    with pytest.raises(CanvasError, match="no canvas at"):
        emilie.open_canvas(tmp_path / "none.safetensors", editor)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CanvasError, match="cannot be read"):
        emilie.open_canvas(tmp_path / "text", editor)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CanvasError, match="no canvas"):
        emilie.open_canvas(tmp_path / "other.safetensors", editor)


def test_a_truncated_canvas(editor, canvas, tmp_path):
    path = tmp_path / "c.safetensors"
    canvas.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CanvasError, match="cannot be read"):
        emilie.open_canvas(path, editor)


def test_an_unwritable_canvas_keeps_the_old_one(canvas, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    canvas.save(path)
    before = path.read_bytes()
    canvas.edit("make it night", **FAST)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("emilie_min.checkpoint.writing.os.fsync", full)
    with pytest.raises(CanvasError, match="No space left"):
        canvas.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"gate": "wall"}, SamplingError, "unknown gate 'wall'"),
        ({"rescale": "best"}, SamplingError, "unknown rescale"),
        ({"iterate": "words"}, SamplingError, "unknown iterate"),
        ({"steps": 0}, SamplingError, "steps"),
        ({"steps": 2.5}, SamplingError, "steps"),
        ({"text_scale": float("nan")}, SamplingError, "text_scale"),
        ({"image_scale": "much"}, SamplingError, "image_scale"),
        ({"instruction": ""}, InstructionError, "empty"),
        ({"instruction": "  "}, InstructionError, "empty"),
        ({"instruction": None}, InstructionError, "NoneType"),
        ({"instruction": "make it winter"}, InstructionError, "does not know 'winter'.* circle "),
        ({"instruction": "make it night " * 30}, InstructionError, "90 tokens.*would be cut"),
        ({"keep_background": True}, MaskError, "needs a mask"),
        ({"mask": np.zeros((64, 64), bool)}, MaskError, "empty"),
        ({"mask": (0, 0, 1, 64)}, MaskError, "vanishes"),
    ],
)
def test_bad_edits_change_nothing(canvas, settings, error, match):
    with pytest.raises(error, match=match):
        canvas.edit(**{"instruction": "make it night", **settings})
    assert len(canvas.states) == 1 and canvas.history == []


def test_numbers_that_are_not_finite(editor, canvas, monkeypatch):
    monkeypatch.setattr(editor, "denoise", lambda x, *_: x * float("nan"))
    with pytest.raises(SamplingError, match="not finite"):
        canvas.edit("make it night", **FAST)
    assert canvas.history == []


def test_an_overflowing_decode_is_done_again_in_float32(editor, canvas, monkeypatch):
    half = emilie.load("random", "toy", device="cpu", dtype="bfloat16")
    decode = half.vae.decode

    def overflows(z):
        return decode(z) * (float("inf") if z.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(half.vae, "decode", overflows)
    with pytest.warns(UserWarning, match="again in float32"):
        image = half.decode(canvas.latent)
    assert image.isfinite().all() and next(half.vae.parameters()).dtype == torch.bfloat16


def test_out_of_memory_says_what_to_lower(editor, canvas, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(editor, "denoise", full)
    with pytest.raises(EmilieError, match="--resolution"):
        canvas.edit("make it night", **FAST)


def test_four_channels_cannot_edit():
    editor = emilie.load("random", "toy", device="cpu")
    editor.unet.in_channels = 4
    with pytest.raises(CheckpointError, match="needs 8.*emilie download"):
        editor.open(world.render(world.scene(0)))


def test_rectangles_and_native(editor):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (51, 99, 3), np.uint8))
    canvas = editor.open(picture, resolution="native")
    assert canvas.image.size == (96, 48) and canvas.latent.shape == (1, 4, 12, 24)
    canvas.edit("make it night", (0, 0, 50, 51), **FAST)
    assert images.unfit(canvas.image, picture).size == (99, 51)


def test_load_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(CheckpointError, match="no weights at"):
        emilie.load(tmp_path / "none.ckpt")
    with pytest.raises(EmilieError, match="dtype"):
        emilie.load("random", "toy", dtype="int8")
    with pytest.raises(EmilieError, match="device"):
        emilie.load("random", "toy", device="warp")
    with pytest.raises(EmilieError, match="config"):
        emilie.load("random", "nonsense")
    (tmp_path / "bad.yaml").write_text("model: {params: {unet_config: {params: {speed: 3}}}}")
    with pytest.raises(EmilieError, match="speed"):
        emilie.load("random", tmp_path / "bad.yaml")


def test_what_is_handed_out_is_a_copy(canvas):
    canvas.edit("make it night", **FAST).paste(0, (0, 0, 64, 64))
    canvas.image.thumbnail((8, 8))
    canvas.latent.zero_()
    assert canvas.image.size == (64, 64) and np.asarray(canvas.image).any() and canvas.latent.any()


def test_numbers_of_any_integer_type(editor, tmp_path):
    picture = world.render(world.scene(3))
    a, b = (editor.open(picture, seed=s, resolution=r) for s, r in ((5, 64), (np.int64(5), np.int64(64))))
    assert torch.equal(a.z_init, b.z_init)
    assert a.edit("make it night", steps=2).tobytes() == b.edit("make it night", steps=np.int64(2)).tobytes()
    b.save(tmp_path / "c.safetensors")
    with pytest.raises(SamplingError, match="seed must be a whole number"):
        editor.open(picture, seed=5.0)


def test_kept_background_is_kept_in_the_latent_under_every_gate(canvas):
    for gate in ("guidance", "eq8"):
        before = outside(canvas.latent)
        canvas.edit("make it night", left_half(), gate=gate, keep_background=True, **FAST)
        assert torch.equal(outside(canvas.latent), before)


def test_native_and_input_size_keep_the_background_to_the_bit(editor):
    noise = np.random.default_rng(0).integers(0, 255, (150, 203, 3), np.uint8)
    original, box = Image.fromarray(noise), (10, 20, 90, 100)
    away = np.ones((150, 203), bool)
    away[20:100, 10:90] = False
    for resolution in ("native", 96):
        canvas = editor.open(original, resolution=resolution)
        canvas.edit("make it night", box, keep_background=True, steps=1)
        back = np.asarray(images.unfit(canvas.image, original, canvas.native, canvas.touched()))
        assert (back[away] == noise[away]).all() and (back != noise).any()
    assert (np.asarray(editor.open(original, resolution="native").image) == noise[3:147, 1:201]).all()


def test_a_faint_mask_background_is_not_edited(canvas):
    grey = np.asarray(left_half()).copy()
    grey[:, 32:] = 3
    before = np.asarray(canvas.image)
    after = np.asarray(canvas.edit("make it night", grey, keep_background=True, **FAST))
    assert (after[:, 32:] == before[:, 32:]).all()


def test_decoder_returns_to_half_precision_when_the_retry_fails(canvas, monkeypatch):
    half = emilie.load("random", "toy", device="cpu", dtype="bfloat16")

    def overflows(z):
        if z.dtype == torch.float32:
            raise RuntimeError("can't allocate memory")
        return torch.full((1, 3, 64, 64), float("inf"))

    monkeypatch.setattr(half.vae, "decode", overflows)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError):
        half.decode(canvas.latent)
    assert next(half.vae.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("key", "value"),
    [("at", 9), ("at", -1), ("undone", [9]), ("parent", 7), ("parent", 1), ("states", []), ("seed", None)],
)
def test_damaged_canvases(editor, canvas, tmp_path, key, value):
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    canvas.edit("make it night", **FAST)
    path = tmp_path / "c.safetensors"
    canvas.save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    about = json.loads(metadata["canvas"])
    if key == "parent":
        about["states"][1]["parent"] = value
    elif key == "seed":
        tensors["z_init"] = tensors["z_init"][..., :-1].contiguous()
    else:
        about[key] = value
    save_file(tensors, path, {**metadata, "canvas": json.dumps(about)})
    with pytest.raises(CanvasError):
        emilie.open_canvas(path, editor)
