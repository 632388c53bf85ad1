"""Many pictures, many scales: what `--batch`, `grid` and `where` write, also interrupted and taken up."""

import json
from pathlib import Path

import numpy as np
import pytest
from command import MODEL, run
from PIL import Image

import emilie_min as emilie
from emilie_min.app import batch
from emilie_min.canvas import images, together, where
from emilie_min.canvas.canvas import Canvas
from emilie_min.canvas.photo import open_photo
from emilie_min.errors import CanvasError
from emilie_min.toy import world

NIGHT = "make it night"


@pytest.fixture
def pictures(photo) -> list[str]:
    """A tree of pictures, two of one name."""
    names = ["a.png", "a.jpg", "sub/b.png", "sub/deep/c.png"]
    for seed, name in enumerate(names):
        Path("in", name).parent.mkdir(parents=True, exist_ok=True)
        world.render(world.scene(seed)).resize((80, 64)).save(Path("in", name))
    Path("in/notes.txt").write_text("no picture")
    return names


def listing(folder: str) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


RESULTS = sorted(f"{name}_{n}.png" for name in ("a_png", "a_jpg", "sub/b", "sub/deep/c") for n in (1, 2))


def test_a_batch_keeps_the_tree_and_gives_what_single_edits_give(pictures, capsys):
    code, out, err = run("edit", "--batch", "in", NIGHT, "make it day", "--out", "o", *MODEL, capsys=capsys)
    assert code == 0 and not err and listing("o") == RESULTS and "4 pictures edited" in out
    assert run("edit", "in/sub/b.png", NIGHT, "make it day", "--out", "p", *MODEL, capsys=capsys)[0] == 0
    for n in (1, 2):
        one, other = (Image.open(path) for path in (f"o/sub/b_{n}.png", f"p/b_{n}.png"))
        assert np.array_equal(one, other) and one.size == (80, 64) and one.info["emilie"] == other.info["emilie"]
    code, out, _ = run("edit", "--batch", "in", NIGHT, "make it day", "--out", "o", *MODEL, capsys=capsys)
    assert code == 0 and "4 are done already" in out and "toy/random" not in out  # nothing is even loaded
    for other in (["make it day", NIGHT], [NIGHT, "make it day", "--text-scale", 2]):
        code, _, err = run("edit", "--batch", "in", *other, "--out", "o", *MODEL, capsys=capsys)
        assert code == 2 and "of another run" in err[0]


def test_a_pattern_and_a_picture_that_is_none(pictures, capsys):
    Path("in/sub/broken.png").write_bytes(b"\x89PNG")
    code, out, err = run("edit", "--batch", "in/**/*.png", NIGHT, "--out", "o", *MODEL, capsys=capsys)
    assert code == 2 and listing("o") == ["a_1.png", "sub/b_1.png", "sub/deep/c_1.png"] and "1 could not be" in out
    assert any(line.startswith("emilie: error: in/sub/broken.png") for line in err)
    code, _, err = run("edit", "--batch", "in/*.gif", NIGHT, *MODEL, capsys=capsys)
    assert code == 2 and "no pictures at in/*.gif" in err[0]
    for words in (
        ["--mask", "1=in/a.png"],
        ["--canvas", "c.canvas"],
        ["--also", "1=0,0,9,9:x"],
        ["--crop"],
        ["--mask-invert"],
    ):
        code, _, err = run("edit", "--batch", "in", NIGHT, *words, *MODEL, capsys=capsys)
        assert code == 2 and "the same for every picture" in err[0]
    for words, told in (([" "], "an instruction is empty"), ([NIGHT, ""], "an instruction is empty"),
                        (["in/a.png", NIGHT], "is a file and no instruction"), ([NIGHT, "--own", "1"], "say whose"),
                        ([NIGHT, "--keep-background"], "without one there is no background")):  # fmt: skip
        code, _, err = run("edit", "--batch", "in", *words, *MODEL, capsys=capsys)
        assert code == 2 and len(err) == 1 and told in err[0]
    Path("o/a_1.png").write_bytes(b"no picture")
    code, _, err = run("edit", "--batch", "in/a.png", NIGHT, "--out", "o", *MODEL, capsys=capsys)
    assert code == 2 and "of another run" in err[0]


def test_a_batch_that_is_interrupted_goes_on(pictures, capsys, monkeypatch):
    """And where it is killed, `tests.fuzz.kill` does."""
    words, save = ["edit", "--batch", "in", NIGHT, "make it day", "--out", "o", *MODEL], images.save

    def saved(*args):
        if len(list(Path("o").rglob("*.png"))) == 3:
            raise KeyboardInterrupt
        return save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(images, "save", saved)
        assert run(*words, capsys=capsys)[0] == 130
    there = {path: path.read_bytes() for path in Path("o").rglob("*.png")}
    assert len(there) == 3 < len(RESULTS)
    code, out, _ = run(*words, capsys=capsys)
    assert code == 0 and "1 are done already" in out and listing("o") == RESULTS
    assert all(path.read_bytes() == data for path, data in there.items())
    assert run(*words[: -len(MODEL) - 1], "whole", *MODEL, capsys=capsys)[0] == 0
    assert all(Path("o", name).read_bytes() == Path("whole", name).read_bytes() for name in RESULTS)


def test_processes_of_torchrun_share_the_pictures(pictures, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        _, out, _ = run("edit", "--batch", "in", NIGHT, "--out", "o", *MODEL, capsys=capsys)
        assert f"4 pictures, of which this process does {[2, 1, 1][rank]}; 0 are done" in out
    assert len(listing("o")) == 4


def test_together_is_one_by_one(pictures, editor, capsys, monkeypatch):
    """Of one size in one pass: the same to rounding; where memory lacks, fewer."""
    photos = [open_photo(Image.open(f"in/{name}").convert("RGB"), editor) for name in pictures[:3]]
    canvases = [photo.canvas for photo in photos]
    for text in (NIGHT, "make it day"):
        for _ in together.steps(canvases, text, steps=2, seed=3):
            pass
    for name, canvas in zip(pictures, canvases):
        alone = open_photo(Image.open(f"in/{name}").convert("RGB"), editor).canvas
        for text in (NIGHT, "make it day"):
            alone.edit(text, steps=2, seed=3)
        assert (alone.latent - canvas.latent).abs().max() < 1e-4 * alone.latent.abs().max()
        assert alone.state.settings == canvas.state.settings and alone.state.parent == canvas.state.parent
    assert together.can(steps=3, text_scale=2.0) and not together.can(reuse=2) and not together.can(gate="eq8")
    black = Image.new("RGB", (64, 64))
    large, other, fresh = (open_photo(black, editor, *how).canvas for how in ((0, 128), (1,), (0,)))
    for each, more in ((large, {}), (other, {}), (fresh, {}), (canvases[1], {"gate": "eq8"})):
        with pytest.raises(CanvasError, match="together"):
            list(together.steps([canvases[0], each], NIGHT, **more))

    real, sizes = together.steps, []

    def short(canvases, *args, **more):
        sizes.append(len(canvases))
        if len(canvases) > 2:
            raise emilie.EmilieError("out of CUDA memory")
        return real(canvases, *args, **more)

    monkeypatch.setattr(together, "steps", short)
    args = ["edit", "--batch", "in", NIGHT, "--out", "o", *MODEL]
    run_ = batch.Batch.run
    monkeypatch.setattr(batch.Batch, "run", lambda self, todo, _: run_(self, todo, 4))
    assert run(*args, capsys=capsys)[0] == 0 and sizes == [4, 2, 2] and len(listing("o")) == 4


def test_a_grid(photo, capsys):
    scales = ["--text-scale", "1,2", "--image-scale", "1,1.5,2", "--seeds", "0,5"]
    code, out, err = run("grid", photo, NIGHT, *scales, *MODEL, capsys=capsys)
    names = [f"s{s}_t{t}_i{i}.png" for s in (0, 5) for t in (1, 2) for i in (1, 1.5, 2)]
    assert code == 0 and not err and listing("out") == sorted(["photo_grid.png", *(f"photo_grid/{n}" for n in names)])
    about = json.loads(Image.open("out/photo_grid/s5_t2_i1.5.png").info["emilie"])["edits"][0]["settings"]
    assert (about["seed"], about["text_scale"], about["image_scale"]) == (5, 2.0, 1.5)
    alone = ["--text-scale", 2, "--image-scale", 1.5, "--seed", 5]
    assert run("edit", photo, NIGHT, *alone, "--out", "o", *MODEL, capsys=capsys)[0] == 0
    single = Image.open("out/photo_grid/s5_t2_i1.5.png")
    other = emilie.open("photo.png", emilie.load("random", "toy", device="cpu"))
    assert np.array_equal(single, other.edit(NIGHT, steps=1, seed=5, text_scale=2.0, image_scale=1.5))
    assert Image.open("out/photo_grid.png").width > 3 * 192
    run("grid", photo, NIGHT, "--text-scale", 1, "--image-scale", 1, *MODEL, capsys=capsys)
    assert Path("out/photo_grid-2.png").exists()  # and nothing is overwritten
    for words, told in (
        (["--text-scale", "a"], "finite number"),
        (["--text-scale", ","], "one value or more"),
        (["--seeds", ",".join(map(str, range(200)))], "100 at"),
    ):
        code, _, err = run("grid", photo, NIGHT, *words, *MODEL, capsys=capsys)
        assert code == 2 and told in err[0]
    code, _, err = run("grid", photo, " ", *MODEL, capsys=capsys)
    assert code == 2 and "the instruction is empty" in err[-1]


def test_where_an_instruction_acts(shipped, photo, capsys):
    scene = world.scene(3)
    for kind in ("recolour", "remove", "add"):
        text, _, place = world.instruct(scene, 3, kind)
        canvas = emilie.open(world.render(scene), shipped)
        found = np.asarray(where.mask(canvas, text)) > 0
        assert (found & (np.asarray(place) > 0)).sum() > 0.85 * found.sum() and canvas.at == 0
    assert where.mask(canvas, NIGHT) is None  # which is for all of it
    options = ["--weights", emilie.loading.shipped("toy.safetensors"), "--device", "cpu"]
    code, out, err = run("where", photo, "remove the square", *options, capsys=capsys)
    assert code == 0 and not err and listing("out") == ["photo_where.png", "photo_where_mask.png"]
    mask = ["--mask", "auto", "--steps", 12, *options]
    code, out, _ = run("edit", photo, "remove the square", NIGHT, *mask, capsys=capsys)
    assert code == 0 and "acts on 19% of the picture" in out and "acts on all of the picture: no mask" in out
    canvas = emilie.open("out/photo.canvas", shipped)
    assert np.array_equal(np.asarray(canvas.states[1].mask), np.asarray(Image.open("out/photo_where_mask.png")))
    for threshold in (0, 2):
        code, _, err = run("where", photo, NIGHT, "--threshold", threshold, *options, capsys=capsys)
        assert code == 2 and "--threshold" in err[0]


def test_the_place_is_looked_for_in_the_picture_of_then(shipped, monkeypatch, photo, capsys):
    seen = []
    real = where.mask
    monkeypatch.setattr(where, "mask", lambda canvas, text: seen.append((canvas.at, text)) or real(canvas, text))
    words = [NIGHT, "remove the square", "--mask", "2=auto", "--steps", 2, "--device", "cpu"]
    assert run("edit", photo, *words, "--weights", emilie.loading.shipped("toy.safetensors"), capsys=capsys)[0] == 0
    assert seen == [(1, "remove the square")] and isinstance(emilie.open("out/photo.canvas", shipped), Canvas)
