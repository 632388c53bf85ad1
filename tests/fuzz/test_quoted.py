"""What a file says, or is called, is quoted in one short line that a terminal can show: wherever it is quoted."""

import json
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command import MODEL, run
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import emilie_min as emilie
from emilie_min.app import batch, cli, edit, language, options, stack
from emilie_min.app.visitor import Visitor
from emilie_min.canvas import about, images, pictures, session, strip
from emilie_min.checkpoint import reading, schema
from emilie_min.checkpoint.networks import meta_networks
from emilie_min.checkpoint.tokenizer import Tokenizer
from emilie_min.config import TextConfig, load_config
from emilie_min.errors import EmilieError
from emilie_min.insert import caption, graconet
from emilie_min.loading import load, pick_device, shipped

WORDS, LONG, NAME = "\x1b[2J\x07", "\x1b[2J\n" + "x" * 3000, "a\x1b[2J\x07"  # the last for a file
REFUSED = (EmilieError, ValueError)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def told(act: Callable) -> list[str]:
    """What a call returns if that is a text, the error that it raises, and its notes."""
    said = []
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            said += [result] if isinstance(result := act(), str) else []
        except REFUSED as error:
            said.append(str(error))
    return said + [str(note.message) for note in notes]


def check(act: Callable, longest: int = 700) -> None:
    said = told(act)
    assert said and all(line.isprintable() and len(line) <= longest for text in said for line in text.split("\n")), said


def png(**texts: str) -> str:
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (32, 32)).save(f"{NAME}.png", pnginfo=info)
    return f"{NAME}.png"


def pickled(kind: str = "png") -> str:
    Path(f"{NAME}.{kind}").write_bytes(b"\x89PNG\r\n\x1a\n")
    return f"{NAME}.{kind}"


def weights(**strangers) -> str:
    save_file(load_file(shipped("toy.safetensors")) | strangers, f"{NAME}.safetensors")
    return f"{NAME}.safetensors"


def nested() -> str:
    torch.save({WORDS: load_file(shipped("toy.safetensors"))}, f"{NAME}.ckpt")
    return f"{NAME}.ckpt"


def config() -> str:
    text = (Path(emilie.__file__).parent / "configs/toy.yaml").read_text()
    Path(f"{NAME}.yaml").write_text(text.replace("num_heads: 4", "num_heads: 7").replace("ch: 32", "ch: -3"))
    return f"{NAME}.yaml"


def blip(said: str) -> Path:
    Path(NAME).mkdir()
    for names in caption.PARTS.values():
        Path(NAME, names[0]).touch()
    Path(NAME, "config.json").write_text(said)
    return Path(NAME)


def tokenizer() -> Tokenizer:
    Path(NAME).mkdir()
    for name in ("vocab.json", "merges.txt"):
        Path(NAME, name).write_text("{")
    return Tokenizer(TextConfig(), (Path(NAME),))


CALLS = {
    "about: no picture": lambda: about.read(pickled()),
    "about: nothing said": lambda: about.read(png()),
    "about: broken": lambda: about.read(png(emilie="{")),
    "about: said": lambda: about.lines(png(emilie=json.dumps({"model": LONG, "edits": []}))),
    "a part": lambda: images.read_part([LONG], (64, 64)),
    "a prefix": lambda: reading.index(nested()) and None,
    "tensors": lambda: load(weights(**{c * 400: torch.ones(1) for c in "abc"}), device="cpu") and None,
    "an average": lambda: reading.key_map({}, [], LONG),
    "a name twice": lambda: schema.parse(json.dumps({"a": 1})[:-1] + f', "{"b" * 900}": 1, "{"b" * 900}": 2}}'),
    "a strange name": lambda: schema.strange({LONG: 1}, {}),
    "a tokenizer": lambda: tokenizer()(["make it night"]),
    "a config": lambda: meta_networks(load_config(config())),
    "no BLIP-2 here": lambda: caption.find(NAME),
    "BLIP-2's parts": lambda: Path(NAME).mkdir() or caption.find(NAME),
    "BLIP-2's config": lambda: caption.find(blip("{")),
    "BLIP-2's kind": lambda: caption.find(blip(json.dumps({"model_type": LONG}))),
    "BLIP-2's files": lambda: caption.Captioner(blip(json.dumps({"model_type": "blip-2"})), "cpu"),
    "a dtype": lambda: load(device="cpu", dtype=LONG),
    "a device": lambda: pick_device(LONG),
    "files to make": lambda: edit.make_new([Path(f"{NAME}/x")]),
    "a long name": lambda: edit.fits(Path(WORDS * 60)),
    "a command": lambda: language.not_a_command(f"{WORDS}.png"),
    "an instruction that is a picture": lambda: language.check([f"{WORDS}.png"]),
    "two words": lambda: language.check([WORDS, LONG]),
    "a word": lambda: language.check([WORDS * 20]),
    "a stack": lambda: stack.told(
        SimpleNamespace(stack=[SimpleNamespace(instruction=LONG, shown=True, strength=1, mask=None)])
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_foreign_is_quoted_in_a_line(name):
    check(CALLS[name])


def test_what_no_font_has(monkeypatch):
    monkeypatch.setattr(strip, "FONTS", [])
    check(lambda: strip.font_for("".join(map(chr, range(0x4E00, 0x4F00))), 16) and None, 200)


def test_what_pillow_says(monkeypatch):
    def fail(*_, **__):
        raise ValueError(LONG)

    monkeypatch.setattr(pictures, "by_profile", fail)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (32, 32))
    image.info["icc_profile"] = profile
    check(lambda: images.read_image(image) and None, 300)
    monkeypatch.setattr(pictures, "upright", fail)
    check(lambda: images.read_image(image), 300)


def test_what_a_session_says(editor, picture):
    canvas = emilie.open(picture, editor)
    path = Path(f"{NAME}.canvas")
    check(lambda: emilie.open(path, editor))
    path.write_bytes(b"no canvas of anybody's")
    check(lambda: emilie.open(path, editor))
    check(lambda: canvas.save(path))
    path.unlink()
    check(lambda: canvas.save(Path(NAME) / "c.canvas"))
    canvas.save(path)
    one, other = (emilie.open(path, editor) for _ in range(2))
    for each, text in ((one, "make it night"), (other, "make it day")):
        each.edit(text, steps=1)
    one.save(path)
    check(lambda: other.save(path))
    save_file({"x": torch.zeros(1, 1)}, path, {"format": LONG})
    check(lambda: emilie.open(path, editor))
    latents = {"z_init": canvas.z_init, "z_img": canvas.z_img, "0.latent": canvas.latent}
    tensors = latents | {"0.image": torch.from_numpy(np.array(canvas.image))}
    said = {"model": LONG, "dtype": LONG, "seed": 0, "native": False, "original_size": [64, 64], "at": 0, "undone": []}
    said["states"] = [{"instruction": " ", "parent": None, "settings": {}, "f": None}]
    small = {key: value[..., :4].contiguous() for key, value in latents.items()}
    for change in ({}, small, {f"0.{WORDS}{'x' * 900}": torch.zeros(1, 1)}, {LONG: torch.zeros(1, 1)},
                   {LONG: torch.zeros(1)}):  # fmt: skip
        states = [{**state, "instruction": "x"} for state in said["states"]]
        save_file(tensors | change, path, {"format": session.FORMAT, "canvas": json.dumps(said | {"states": states})})
        check(lambda: emilie.open(path, editor) and None)
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t (x)")
    check(lambda: emilie.open(path, editor))


def test_what_a_visitor_calls_a_file(editor):
    visitor = Visitor(editor)
    visitor.uploaded = (LONG, None)
    check(visitor.open_uploaded)
    Path("x").write_bytes(b"none")
    check(lambda: visitor.open("x", LONG), 300)


def test_a_picture_of_another_world(shipped):
    check(lambda: options.tell_foreign(shipped, Image.new("RGB", (64, 64), "navy"), LONG) and None)


def test_what_the_network_of_a_file_is():
    save_file({"shared_net.0.weight": torch.ones(1)}, f"{NAME}.safetensors", {"config": LONG})
    check(lambda: graconet.load(f"{NAME}.safetensors"))
    with pytest.raises(EmilieError, match="no network has the sizes"):
        graconet.load(f"{NAME}.safetensors")


def test_what_the_command_writes_past_its_errors(capsys, monkeypatch):
    for act in (lambda: cli.tell_once(LONG, set()), lambda: cli.main(["edit", "x", "--" + WORDS])):
        with pytest.raises(SystemExit) if "main" in act.__code__.co_names else warnings.catch_warnings():
            act()
        said = capsys.readouterr().err.strip()
        assert said.isprintable() and len(said) < 1100
    for error in (OSError(2, "none", WORDS), OSError(WORDS), EmilieError(LONG), MemoryError()):
        with monkeypatch.context() as patch:
            patch.setattr(cli, "run_line", lambda argv, error=error: (_ for _ in ()).throw(error))
            assert cli.main([]) == 2
            said = capsys.readouterr().err.strip()
            assert said.isprintable() and len(said) < 1100
    Path("in").mkdir()
    Path(f"in/{NAME}.png").write_bytes(b"\x89PNG")
    shutil.copy(png(), "in/good\x1b.png")

    def fail(*_):
        raise EmilieError(WORDS)

    monkeypatch.setattr(batch.Batch, "edit", fail)
    code, _, err = run("edit", "--batch", "in", "make it night", *MODEL, capsys=capsys)
    errors = [line for line in err if "error" in line]
    assert code == 2 and len(errors) == 2 and all(line.isprintable() for line in errors), err
