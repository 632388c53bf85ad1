"""Sessions in files: what is written is read back, goes on to the bit, and files of before are read."""

import json
import warnings

import pytest
import torch
from pseudo import DATA
from safetensors import safe_open
from safetensors.torch import save_file

import emilie_min as emilie
from emilie_min import sampling
from emilie_min.errors import CanvasError, ImageError
from emilie_min.toy import world

FAST = {"steps": 2}
NIGHT, DAY, COMIC = "make it night", "make it day", "turn it into a comic"
LEFT, MIDDLE, RIGHT = (0, 0, 24, 64), (16, 0, 48, 64), (40, 0, 64, 64)


def contents(path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["canvas"]), {key: file.get_tensor(key) for key in file.keys()}


def write(path, about: dict, tensors: dict, format: str = "emilie canvas 1") -> None:
    save_file(tensors, path, {"format": format, "canvas": json.dumps(about)})


def test_a_saved_canvas_goes_on_bit_for_bit(editor, canvas, tmp_path):
    path = tmp_path / "session.safetensors"
    canvas.edit(NIGHT, LEFT, **FAST)
    canvas.edit([(COMIC, RIGHT), (NIGHT, None)], **FAST)
    canvas.edit(DAY, LEFT, keep_background=True, guidance_interval=(1, 5), **FAST)
    canvas.undo()
    canvas.save(path)
    other = emilie.open(path, editor)
    assert (other.at, other.redo_stack, other.original_size, other.seed) == (2, [3], (64, 64), 5)
    assert torch.equal(other.z_init, canvas.z_init) and torch.equal(other.z_img, canvas.z_img)
    for a, b in zip(canvas.states, other.states, strict=True):
        assert torch.equal(a.latent, b.latent) and a.image == b.image and a.mask == b.mask
        assert (a.instruction, a.parent, a.f, a.regions) == (b.instruction, b.parent, b.f, b.regions)
        assert json.loads(json.dumps(a.settings)) == b.settings  # JSON knows no tuples
    assert other.states[2].regions[1] == (NIGHT, None)
    assert canvas.redo() == other.redo()
    for edit in (COMIC, [(DAY, LEFT), (COMIC, MIDDLE)]):
        assert canvas.edit(edit, **FAST) == other.edit(edit, **FAST)
        assert torch.equal(canvas.latent, other.latent)
    assert list(tmp_path.iterdir()) == [path]  # no partial file stays
    other.branch(1)
    assert other.edit(other.states[2].regions, **FAST) == canvas.states[2].image  # a record can be followed again


@pytest.mark.parametrize("name, states", [("masks", 5), ("regions", 3)])
def test_a_session_of_the_first_version_opens_goes_on_and_undoes(shipped, name, states):
    """Written before this version's first change, by the small model's first weights, which may not be today's."""
    path = DATA / f"session_1_{name}.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it was made with other weights, should they have another name
        canvas = emilie.open(path, shipped)
    about, tensors = contents(path)
    assert len(canvas.states) == states and canvas.at == states - 1 and canvas.seed == 7
    for i, (state, record) in enumerate(zip(canvas.states, about["states"], strict=True)):
        assert torch.equal(state.latent, tensors[f"{i}.latent"]) and state.latent.isfinite().all()
        assert torch.equal(torch.frombuffer(bytearray(state.image.tobytes()), dtype=torch.uint8).view(64, 64, 3),
                           tensors[f"{i}.image"])  # fmt: skip
        assert (state.instruction, state.settings, state.f) == (record["instruction"], record["settings"], record["f"])
    if name == "masks":
        assert [s.settings["gate"] for s in canvas.history] == ["anchor", "eq8", "guidance", "anchor"]
        assert canvas.state.mask.getbbox() == (0, 0, 32, 64) and canvas.edited_mask() is None
    else:
        assert [[text for text, _ in s.regions] for s in canvas.history] == [[NIGHT, DAY]] * 2
        assert [m and m.getbbox() for _, m in canvas.state.regions] == [(0, 0, 32, 64), None]
    assert torch.equal(canvas.z_init, sampling.noise_stream((1, 4, 16, 16), 7, "init")())  # the noise of before
    last = canvas.image
    assert canvas.undo() == canvas.states[states - 2].image and canvas.redo() == last
    canvas.branch(1)
    canvas.edit(DAY, LEFT, **FAST)
    assert canvas.state.parent == 1 and len(canvas.history) == 2
    assert torch.equal(canvas.latent[..., 6:], canvas.states[1].latent[..., 6:])
    canvas.branch(0)
    settings = canvas.states[1].settings
    changes = {key: settings[key] for key in ("steps", "text_scale", "image_scale", "gate")}
    canvas.edit(canvas.states[1].regions or NIGHT, None if canvas.states[1].regions else LEFT, **changes)
    assert settings.items() <= canvas.state.settings.items()  # the same keys, with the same meanings


def test_sessions_of_one_mask_are_what_they_were(editor, canvas, tmp_path):
    """The first version reads them, and this one reads what is not in them yet, or no longer understood."""
    path = tmp_path / "session.safetensors"
    canvas.edit(NIGHT, LEFT, **FAST)
    canvas.save(path)
    about, tensors = contents(path)
    first, _ = contents(DATA / "session_1_masks.safetensors")
    assert about.keys() == first.keys()
    assert all(record.keys() == first["states"][0].keys() for record in about["states"])
    assert about["states"][1]["settings"].keys() >= first["states"][1]["settings"].keys()
    assert set(tensors) == {"z_init", "z_img", "0.latent", "0.image", "1.latent", "1.image", "1.mask"}
    about["states"][1]["settings"] = {"steps": 2, "mood": "calm"}  # is kept and not read
    write(path, about, tensors)
    old = emilie.open(path, editor)
    assert [state.regions for state in old.states] == [[], []] and old.state.instruction == NIGHT
    assert old.edit([(DAY, LEFT), (NIGHT, RIGHT)], **FAST) == canvas.edit([(DAY, LEFT), (NIGHT, RIGHT)], **FAST)


def test_what_is_no_session(editor, canvas, tmp_path):
    path, folder = tmp_path / "c.safetensors", tmp_path / "folder.safetensors"
    folder.mkdir()
    for none in (path, folder):
        with pytest.raises(CanvasError, match="no canvas at"):
            emilie.open(none, editor)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CanvasError, match="no canvas of this version"):
        emilie.open(path, editor)
    canvas.save(path)
    write(path, *contents(path), format="emilie canvas 9")
    with pytest.raises(CanvasError, match="emilie canvas 9"):
        emilie.open(path, editor)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ImageError, match="cannot be read"):  # neither a session nor a picture
        emilie.open(tmp_path / "text", editor)


def test_a_session_is_told_by_what_it_holds_and_keeps_its_seed_and_size(editor, canvas, tmp_path):
    canvas.save(tmp_path / "c.safetensors")
    (tmp_path / "c.safetensors").rename(tmp_path / "named otherwise")
    assert emilie.open(tmp_path / "named otherwise", editor).seed == 5
    for more in ({"seed": 5}, {"resolution": 64}):
        with pytest.raises(CanvasError, match="leave them out"):
            emilie.open(tmp_path / "named otherwise", editor, **more)


def test_a_session_knows_how_its_picture_was_fitted(editor, tmp_path):
    for resolution in (64, "native"):
        canvas = emilie.open(world.render(world.scene(3)).resize((70, 75)), editor, resolution=resolution)
        canvas.save(tmp_path / "c.safetensors")
        other = emilie.open(tmp_path / "c.safetensors", editor)
        assert other.native == canvas.native == (resolution == "native") and other.original_size == (70, 75)
        assert other.read_mask((40, 40, 50, 50))[0] == canvas.read_mask((40, 40, 50, 50))[0]


def test_another_model_warns_and_one_of_other_latents_is_refused(editor, canvas, tmp_path):
    path = tmp_path / "c.safetensors"
    canvas.save(path)
    about, tensors = contents(path)
    write(path, {**about, "model": "toy/other.safetensors"}, tensors)
    with pytest.warns(UserWarning, match="other.safetensors"):
        emilie.open(path, editor)
    tensors["0.latent"] = tensors["0.latent"][..., :8].contiguous()
    write(path, about, tensors)
    with pytest.raises(CanvasError, match="latents"):
        emilie.open(path, editor)


@pytest.mark.parametrize(
    ("key", "value"),
    [("at", 9), ("at", -1), ("undone", [9]), ("parent", 7), ("parent", 1), ("states", []), ("regions", 3), ("cut", 99)],
)
def test_damaged_sessions(editor, canvas, tmp_path, key, value):
    canvas.edit([(NIGHT, LEFT), (DAY, RIGHT)], **FAST)
    path = tmp_path / "c.safetensors"
    canvas.save(path)
    about, tensors = contents(path)
    if key == "cut":
        path.write_bytes(path.read_bytes()[:-value])
    else:
        (about["states"][1] if key in ("parent", "regions") else about)[key] = value
        write(path, about, tensors)
    with pytest.raises(CanvasError, match="cannot be read"):
        emilie.open(path, editor)


def test_an_unwritable_session_keeps_the_old_one(canvas, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    canvas.save(path)
    before = path.read_bytes()
    canvas.edit(NIGHT, **FAST)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CanvasError, match="No space left"):
        canvas.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
