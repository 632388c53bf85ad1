"""Sessions in files: what is written is read back, goes on to the bit, and files of before are read."""

import copy
import json
import math
import random
import resource
import shutil
import sqlite3
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from pseudo import DATA
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file

import emilie_min as emilie
from emilie_min import sampling
from emilie_min.canvas import session
from emilie_min.canvas.session import SETTINGS
from emilie_min.canvas.settings import Settings
from emilie_min.errors import CanvasError, ImageError
from emilie_min.toy import world

FAST = {"steps": 2}
NIGHT, DAY, COMIC = "make it night", "make it day", "turn it into a comic"
LEFT, MIDDLE, RIGHT = (0, 0, 24, 64), (16, 0, 48, 64), (40, 0, 64, 64)


def contents(path) -> tuple[dict, dict]:
    """Of a file of the first version."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["canvas"]), {key: file.get_tensor(key) for key in file.keys()}


def before(path, about: dict, tensors: dict, format: str = "emilie canvas 1") -> None:
    """A file of the first version."""
    save_file(tensors, path, {"format": format, "canvas": json.dumps(about)})


def of_before(canvas) -> tuple[dict, dict]:
    """What the first version wrote of a canvas."""
    tensors = {"z_init": canvas.z_init, "z_img": canvas.z_img}
    for i, state in enumerate(canvas.states):
        masks = {"mask": state.mask} | {f"mask.{k}": mask for k, (_, mask) in enumerate(state.regions)}
        pictures = {"image": state.image} | {k: mask for k, mask in masks.items() if mask is not None}
        tensors |= {f"{i}.{k}": torch.from_numpy(np.array(p)) for k, p in pictures.items()}
        tensors[f"{i}.latent"] = state.latent
    states = [
        {"instruction": s.instruction, "parent": s.parent, "settings": s.settings, "f": s.f}
        | ({"regions": [text for text, _ in s.regions]} if s.regions else {})
        for s in canvas.states
    ]
    about = {"model": canvas.editor.model, "dtype": "torch.float32", "seed": canvas.seed, "native": canvas.native}
    about |= {"original_size": canvas.original_size, "at": canvas.at, "undone": canvas.redo_stack, "states": states}
    return json.loads(json.dumps(about)), tensors


def test_a_saved_canvas_goes_on_bit_for_bit(editor, canvas, tmp_path):
    path = tmp_path / "s.canvas"
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


def test_a_session_of_the_first_version_is_saved_as_one_of_this(shipped, tmp_path):
    path = tmp_path / "session.safetensors"
    shutil.copy(DATA / "session_1_regions.safetensors", path)
    old, other = emilie.open(path, shipped), emilie.open(path, shipped)
    old.undo()
    old.save(path)
    new = emilie.open(path, shipped)
    assert [state.id for state in new.states] == [state.id for state in other.states]  # both opened the same states
    assert (new.at, new.redo_stack) == (1, [2]) and new.redo() == other.image
    assert new.states[2].regions == other.states[2].regions and torch.equal(new.latent, other.latent)
    with open(path, "rb") as file:
        assert file.read(15) == b"SQLite format 3"


def test_settings_that_this_version_does_not_know_are_kept(editor, canvas, tmp_path):
    path = tmp_path / "s.canvas"
    canvas.edit(NIGHT, LEFT, **FAST)
    about, tensors = of_before(canvas)
    about["states"][1]["settings"]["mood"] = "calm"
    del about["states"][1]["settings"]["reuse_guidance"]  # which the first version did not have
    before(path, about, tensors)
    old = emilie.open(path, editor)
    assert [state.regions for state in old.states] == [[], []] and old.state.instruction == NIGHT
    old.save(path)
    again = emilie.open(path, editor)
    assert again.state.settings == about["states"][1]["settings"]
    assert again.change("hide", 1).tobytes() == canvas.states[0].image.tobytes()
    assert old.edit([(DAY, LEFT), (NIGHT, RIGHT)], **FAST) == canvas.edit([(DAY, LEFT), (NIGHT, RIGHT)], **FAST)


def test_what_is_no_session(editor, canvas, tmp_path):
    path, folder = tmp_path / "c.canvas", tmp_path / "folder.safetensors"
    folder.mkdir()
    for none in (path, folder):
        with pytest.raises(CanvasError, match="no canvas at"):
            emilie.open(none, editor)
    assert not session.is_session(tmp_path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CanvasError, match=f"^{path} is no canvas of this version"):
        emilie.open(path, editor)
    before(path, *of_before(canvas), format="emilie canvas 9")
    with pytest.raises(CanvasError, match="emilie canvas 9"):
        emilie.open(path, editor)
    canvas.save(path)
    for pragma in ("user_version = 3", "application_id = 7"):
        shutil.copy(path, tmp_path / "other")
        with changed(tmp_path / "other") as db:
            db.execute(f"PRAGMA {pragma}")
        with pytest.raises(CanvasError, match="an SQLite database of another"):
            emilie.open(tmp_path / "other", editor)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ImageError, match="cannot be read"):  # neither a session nor a picture
        emilie.open(tmp_path / "text", editor)


def test_a_session_is_told_by_what_it_holds_and_keeps_its_seed_and_size(editor, canvas, tmp_path):
    canvas.save(tmp_path / "c.canvas")
    (tmp_path / "c.canvas").rename(tmp_path / "named otherwise")
    assert emilie.open(tmp_path / "named otherwise", editor).seed == 5
    for more in ({"seed": 5}, {"resolution": 64}, {"part": (0, 0, 32, 32)}):
        with pytest.raises(CanvasError, match="leave them out"):
            emilie.open(tmp_path / "named otherwise", editor, **more)


def test_a_session_knows_how_its_picture_was_fitted(editor, tmp_path):
    for resolution in (64, "native"):
        canvas = emilie.open(world.render(world.scene(3)).resize((70, 75)), editor, resolution=resolution)
        canvas.save(tmp_path / "c.canvas")
        other = emilie.open(tmp_path / "c.canvas", editor)
        assert other.native == canvas.native == (resolution == "native") and other.original_size == (70, 75)
        assert other.read_mask((40, 40, 50, 50))[0] == canvas.read_mask((40, 40, 50, 50))[0]


def test_another_model_warns_and_one_of_other_latents_is_refused(editor, canvas, tmp_path):
    path = tmp_path / "c.canvas"
    about, tensors = of_before(canvas)
    before(path, {**about, "model": "toy/other.safetensors"}, tensors)
    with pytest.warns(UserWarning, match="other.safetensors"):
        emilie.open(path, editor)
    tensors["0.latent"] = tensors["0.latent"][..., :8].contiguous()
    before(path, about, tensors)
    with pytest.raises(CanvasError, match="latents"):
        emilie.open(path, editor)


# ---- damage


def spoiled(about: dict, tensors: dict) -> dict[str, Callable]:
    """Ways to spoil what a canvas with an edit of two regions and one of a mask is made of."""
    states, last = about["states"], about["states"][2]

    def put(where: dict | list, key, value) -> Callable:
        return lambda: where.__setitem__(key, value)

    def drop(where: dict, key) -> Callable:
        return lambda: where.pop(key)

    ways = {f"no {key}": drop(about, key) for key in about} | {f"no {key} there": drop(last, key) for key in last}
    ways |= {f"no setting {key}": drop(last["settings"], key) for key in SETTINGS if "?" not in key}
    ways |= {f"no tensor {key}": drop(tensors, key) for key in tensors if "mask." not in key}
    for key in ("at", "seed", "parent"):
        where = last if key == "parent" else about
        for value in (1.0, [1], "1", None, True, {}, -1 if key != "seed" else 0.5, 99 if key != "seed" else 1e9):
            ways[f"{key} {value!r}"] = put(where, key, value)
    for value in ([1, 1], [1.0], [[1]], 1, None, [99], [-1]):
        ways[f"undone {value}"] = put(about, "undone", value)
    for value in ([64], [64, 64.0], [64, 64, 64], [64, 0], "64", [64, 10**9]):
        ways[f"size {value}"] = put(about, "original_size", value)
    for value in ([0, 0, 64], [0, 0, 65, 64], [0, 0, 64.0, 64], [0, 0, 9, 9], "all", []):
        ways[f"part {value}"] = put(about, "part", value)
    for key, value in (("native", 1), ("model", 3), ("dtype", None), ("turned", 1), ("turned", 9), ("mood", "calm")):
        ways[f"{key} {value!r}"] = put(about, key, value)
    for key, value in (("f", "1"), ("f", math.inf), ("settings", {}), ("instruction", 3), ("instruction", "\ud800")):
        ways[f"state's {key} {value!r}"] = put(last, key, value)
    for key, value in (("f", 1.0), ("parent", 0), ("settings", None), ("regions", ["a", "b"])):
        ways[f"root's {key} {value!r}"] = put(states[0], key, value)
    for key, value in (("steps", 2.5), ("gate", "wall"), ("soft", 1), ("text_scale", "7"), ("keep_background", "no")):
        ways[f"setting {key} {value!r}"] = put(last["settings"], key, value)
    for key in ("own", "scrubbed", "strength", "depth", "made", "inserted"):  # which are left out
        ways[f"{key} null"] = put(last["settings"] if key in ("own", "scrubbed") else last, key, None)
    ways["a state twice"] = lambda: states.append(states[1])
    ways["a state less"] = lambda: states.pop()
    ways["a region twice"] = lambda: states[1]["regions"].append(states[1]["regions"][1])
    ways["a region less"] = lambda: states[1]["regions"].pop()
    ways["regions exchanged"] = lambda: states[1]["regions"].reverse()
    ways["regions without masks"] = lambda: [tensors.pop(f"1.{key}") for key in ("mask", "mask.0", "mask.1")]
    ways["own settings of one region of two"] = put(states[1]["settings"], "own", [{}])
    for strength in (-0.5, 1.5):
        ways[f"a strength of {strength}"] = put(last, "strength", strength)
    ways["made from nothing"] = put(
        last, "made", {"change": "hide", "edit": 1, "way": "support", "from": "none", "calls": 0}
    )
    ways["scrubbed from nothing"] = put(last["settings"], "scrubbed", {"step": 1, "of": "none"})
    ways["a field too many"] = put(last, "mood", "calm")
    ways["a tensor too many"] = put(tensors, "2.mask.0", tensors["1.mask"].clone())
    ways["a latent too many"] = put(tensors, "2.more", tensors["2.latent"].clone())
    ways["a mask of the picture"] = put(tensors, "0.mask", tensors["1.mask"].clone())
    ways["no state has it"] = put(tensors, "7.mask", tensors["1.mask"].clone())
    ways["a small mask"] = put(tensors, "2.mask", tensors["2.mask"][:32].clone())
    ways["a grey picture"] = put(tensors, "2.image", tensors["2.image"][..., 0].clone())
    ways["another picture size"] = put(tensors, "0.image", tensors["0.image"][:32].clone())
    ways["a picture of floats"] = put(tensors, "2.image", tensors["2.image"].float())
    ways["halves"] = put(tensors, "2.latent", tensors["2.latent"].half())
    whole, longer, cut = zlib.compress(bytes(8 * 64)), zlib.compress(bytes(8 * 65)), zlib.compress(bytes(8 * 64))[:-5]
    for at, data in ((0, whole), (2, longer), (2, cut), (2, b"none"), (2, whole + b"more")):
        packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)[None]
        ways[f"a photo's mask of {at}: {data!r}"] = put(tensors, f"{at}.given", packed)
    packed = torch.frombuffer(bytearray(whole), dtype=torch.uint8)[:, None]
    ways["a photo's mask in rows"] = put(tensors, "2.given", packed)
    for key in ("2.latent", "z_init", "z_img"):
        for value in (math.inf, math.nan):
            ways[f"{key} {value}"] = lambda key=key, value=value: tensors[key][0, 1, 2].fill_(value)
    return ways


@pytest.fixture(scope="module")
def edited(editor, picture):
    canvas = emilie.open(picture, editor, seed=5)
    canvas.edit([(NIGHT, LEFT), (DAY, RIGHT)], **FAST)
    canvas.edit(DAY, LEFT, keep_background=True, **FAST)
    return canvas


def test_a_spoiled_record_is_refused_and_never_rewritten(editor, edited, tmp_path):
    path, tried = tmp_path / "c.canvas", 0
    before(path, *of_before(edited))
    emilie.open(path, editor)
    for way in spoiled(*of_before(edited)):
        about, tensors = (copy.deepcopy(part) for part in of_before(edited))
        spoiled(about, tensors)[way]()
        before(path, about, tensors)
        whole = path.read_bytes()
        with pytest.raises(CanvasError) as told:
            emilie.open(path, editor)
            pytest.fail(way)
        assert "\n" not in str(told.value) and path.read_bytes() == whole, way
        tried += 1
    assert tried > 100


NO_TENSORS = {
    "halves": torch.zeros(1, 4, 8, 8).half(),
    "one dimension": torch.zeros(256),
    "five dimensions": torch.zeros(1, 1, 4, 8, 8),
}


@pytest.mark.parametrize("name", [*NO_TENSORS, "nothing"])
def test_what_is_no_latent_and_no_picture_is_called_so(editor, edited, tmp_path, name):
    wrong, path = NO_TENSORS.get(name, torch.zeros(1, 0)), tmp_path / "c.canvas"
    edited.save(path)
    with changed(path) as db:
        db.execute("UPDATE states SET tensors = ? WHERE number = 2", [to_bytes({"latent": wrong})])
        resigned(db)
    with pytest.raises(CanvasError, match="'latent' is no latent and no picture"):
        emilie.open(path, editor)
    if name in NO_TENSORS:
        about, tensors = of_before(edited)
        before(path, about, tensors | {"2.latent": wrong})
        with pytest.raises(CanvasError, match="'2.latent' is no latent and no picture"):
            emilie.open(path, editor)


@pytest.mark.parametrize("states", [[], {}, 3])
def test_no_list_of_states(editor, edited, tmp_path, states):
    about, tensors = of_before(edited)
    before(tmp_path / "c.canvas", about | {"states": states}, tensors)
    with pytest.raises(CanvasError, match="no list of states"):
        emilie.open(tmp_path / "c.canvas", editor)


def test_another_journal_is_left_alone(editor, edited, tmp_path):
    """SQLite would put files beside it."""
    path = tmp_path / "c.canvas"
    edited.save(path)
    data = bytearray(path.read_bytes())
    data[18:20] = b"\2\2"
    path.write_bytes(data)
    with pytest.raises(CanvasError, match="first page is damaged"):
        emilie.open(path, editor)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == data


@contextmanager
def changed(path):
    """An SQLite database to change."""
    with closing(sqlite3.connect(path)) as db:
        yield db
        db.commit()


def resigned(db) -> None:
    """Give rows the digests that fit them, as someone would who means it."""
    ((about, _),) = db.execute("SELECT * FROM head").fetchall()
    db.execute("UPDATE head SET digest = ?", [session._digest(about)])
    for row in db.execute("SELECT number, id, record, tensors FROM states").fetchall():
        db.execute("UPDATE states SET digest = ? WHERE number = ?", [session._digest(*row), row[0]])


CHANGES = {
    "a state less": "DELETE FROM states WHERE number = 2",
    "no states": "DELETE FROM states",
    "a state between": "DELETE FROM states WHERE number = 1",
    "no head": "DELETE FROM head",
    "two heads": "INSERT INTO head SELECT * FROM head",
    "others' numbers": "UPDATE states SET number = number + 10",
    "exchanged": "UPDATE states SET number = 9 - number",
    "another's record": "UPDATE states SET record = (SELECT record FROM states WHERE number = 1)",
    "another's tensors": "UPDATE states SET tensors = (SELECT tensors FROM states WHERE number = 0)",
    "no JSON": "UPDATE states SET record = '{' WHERE number = 2",
    "no tensors": "UPDATE states SET tensors = x'00' WHERE number = 2",
    "a field twice": """UPDATE states SET record = replace(record, '"f":', '"f": 1.0, "f":') WHERE number = 2""",
    "a parent to come": """UPDATE states SET record = replace(record, '"parent": 1', '"parent": 2')""",
    "not a number": """UPDATE states SET record = replace(record, '"f":', '"f": NaN, "g":')""",
    "where it stands": """UPDATE head SET about = replace(about, '"at": 2', '"at": 2.0')""",
    "how many": """UPDATE head SET about = replace(about, '"states": 3', '"states": "3"')""",
    "a large blob": "UPDATE states SET tensors = zeroblob(300000000) WHERE number = 2",
    "a blob for an id": "UPDATE states SET id = x'00' WHERE number = 2",
    "a view": "CREATE VIEW v AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c",
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON states BEGIN DELETE FROM states; END",
    "a trigger called as a table": f"""CREATE TABLE t AS SELECT * FROM head; DROP TABLE head;
        CREATE TRIGGER head AFTER INSERT ON states BEGIN DELETE FROM states; END;
        {session.TABLES["head"]}; INSERT INTO head SELECT * FROM t; DROP TABLE t""",
    "another table": "CREATE TABLE t (x)",
    "another column": "ALTER TABLE states ADD COLUMN x",
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("meant", [False, True])
def test_a_changed_file_is_refused_and_never_rewritten(editor, edited, tmp_path, name, meant):
    path = tmp_path / "c.canvas"
    edited.save(path)
    with changed(path) as db:
        db.execute("PRAGMA user_version = 2")
        db.executescript(CHANGES[name])
        if meant and name not in ("no head", "two heads"):
            resigned(db)
    whole = path.read_bytes()
    heads = dict.fromkeys(("no head", "two heads"), "of itself is missing, or there twice")
    with pytest.raises(CanvasError, match=(heads | {"a large blob": "larger than any picture"}).get(name)):
        emilie.open(path, editor)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_of_what_fits_the_digests_and_the_count_tell(editor, edited, tmp_path):
    path = tmp_path / "c.canvas"
    for change, why in (
        ("UPDATE head SET about = replace(about, '\"at\": 1', '\"at\": 0')", "what it says of itself is damaged"),
        (
            "UPDATE states SET record = replace(record, 'make it day', 'make it dim') WHERE number = 2",
            "state 2 is damaged",
        ),
        ("DELETE FROM states WHERE number = 2", "states are missing"),
    ):
        path.unlink(missing_ok=True)
        edited.save(path)
        canvas = emilie.open(path, editor)
        canvas.branch(1)
        canvas.save(path)
        with changed(path) as db:
            db.execute(change)
        with pytest.raises(CanvasError, match=why):
            emilie.open(path, editor)


def test_no_flipped_byte_goes_unnoticed(editor, edited, tmp_path):
    path, refused, generator = tmp_path / "c.canvas", 0, random.Random(0)
    edited.save(path)
    whole = path.read_bytes()
    for at in [*range(0, 100, 7), *(generator.randrange(len(whole)) for _ in range(100))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << generator.randrange(8)]) + whole[at + 1 :])
        try:
            other = emilie.open(path, editor)
        except (CanvasError, ImageError):
            refused += 1
        else:  # a byte that stands for nothing
            for a, b in zip(edited.states, other.states, strict=True):
                assert torch.equal(a.latent, b.latent) and a.image == b.image and a.mask == b.mask and a.f == b.f
            assert torch.equal(other.z_init, edited.z_init) and (other.at, other.seed) == (2, 5)
        assert list(tmp_path.iterdir()) == [path]
    for cut in (0, 50, 4096, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CanvasError):
            emilie.open(path, editor)
    assert refused > 70


# ---- saving


def test_saving_adds_what_is_new(editor, canvas, tmp_path, monkeypatch):
    path, packed = tmp_path / "c.canvas", []
    monkeypatch.setattr(session, "_tensors", lambda state, pack=session._tensors: packed.append(state) or pack(state))
    canvas.edit(NIGHT, **FAST)
    canvas.save(path)
    canvas.edit(DAY, **FAST)
    canvas.save(path)
    canvas.undo()
    canvas.save(path)
    assert [id(state) for state in packed] == [id(state) for state in canvas.states]
    assert emilie.open(path, editor).at == 1
    other = emilie.open(canvas.image, editor)
    other.save(path)  # another session: the file is its own now
    assert len(emilie.open(path, editor).states) == 1


def test_a_file_that_is_held_stays_and_a_damaged_one_gives_way(editor, canvas, tmp_path, monkeypatch):
    path = tmp_path / "c.canvas"
    canvas.save(path)
    whole = path.read_bytes()

    def held(db):
        raise sqlite3.OperationalError("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(session, "_check_tables", held)
        with pytest.raises(CanvasError, match="cannot write the canvas: database is locked"):
            canvas.save(path)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:100] + bytes(len(whole) - 100))
    canvas.save(path)
    assert len(emilie.open(path, editor).states) == 1
    with pytest.raises(CanvasError, match="cannot write the canvas"):
        session.start(canvas, tmp_path / "none" / "c.canvas")


def test_two_processes_on_one_session_keep_both_edits(editor, canvas, tmp_path):
    path = tmp_path / "c.canvas"
    canvas.edit(NIGHT, **FAST)
    canvas.save(path)
    one, other = emilie.open(path, editor), emilie.open(path, editor)
    one.edit(DAY, **FAST)
    one.save(path)
    for text in (COMIC, DAY):
        other.edit(text, LEFT, **FAST)
        with pytest.warns(UserWarning, match="another process added meanwhile: all are kept"):
            other.save(path)
    both = emilie.open(path, editor)
    assert [state.instruction for state in both.states] == ["", NIGHT, DAY, COMIC, DAY] and both.at == 4
    assert [state.parent for state in both.states] == [None, 0, 1, 1, 3]
    assert both.image == other.image and both.states[2].image == one.image
    assert both.edit(NIGHT, **FAST) == other.edit(NIGHT, **FAST)
    other.undo()
    with pytest.warns(UserWarning):
        other.save(path)
    assert (emilie.open(path, editor).at, emilie.open(path, editor).redo_stack) == (4, [5])
    with pytest.warns(UserWarning):
        one.save(path)
    assert emilie.open(path, editor).at == 2


def test_of_many_who_begin_a_session_one_does(canvas, tmp_path):
    path = tmp_path / "c.canvas"
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda _: session.start(canvas, path), range(16))) == [False] * 15 + [True]
    assert list(tmp_path.iterdir()) == [path]


def test_many_who_save_at_once_all_do(editor, canvas, tmp_path):
    """Also where the file is one of before, or none, and whoever is first puts another in its place."""
    path = tmp_path / "c.canvas"
    before(path, *of_before(canvas))
    several = [emilie.open(path, editor) for _ in range(6)]
    for i, each in enumerate(several):
        each.states.append(replace(each.state, instruction=f"edit {i}", parent=0, id=f"{i}"))
        each.states[-1].settings = Settings(seed=0).resolve(editor.config.sampling, 0).record()
    with ThreadPoolExecutor(6) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(pool.map(lambda each: each.save(path), several))
    assert {s.instruction for s in emilie.open(path, editor).states} == {"", *(f"edit {i}" for i in range(6))}


@pytest.mark.parametrize("room", [0, 5000, 12000])
def test_an_unwritable_session_keeps_the_old_one(editor, canvas, tmp_path, room):
    path = tmp_path / "c.canvas"
    canvas.save(path)
    size, states = path.stat().st_size, len(canvas.states)
    canvas.edit(NIGHT, **FAST)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room if room == 0 else size + room, limits[1]))  # as a full disk is
    try:
        with pytest.raises(CanvasError, match="cannot write the canvas"):
            canvas.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(emilie.open(path, editor).states) == states and list(tmp_path.iterdir()) == [path]
    canvas.save(path)
    assert emilie.open(path, editor).image == canvas.image
