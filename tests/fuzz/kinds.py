"""The kinds of cases. Each makes, from a number, files in a folder and a command line on them."""

import copy
import io
import json
import math
import os
import random
import resource
import shutil
import sqlite3
import struct
import threading
from collections.abc import Callable
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save, save_file
from tqdm import tqdm

import emilie_min as emilie
from emilie_min.app.cli import main
from emilie_min.canvas import session
from emilie_min.checkpoint import reading
from emilie_min.checkpoint.networks import build
from emilie_min.config import load_config
from emilie_min.toy import world

from .judge import Case, full

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # no thread: what is forked has one
tqdm.set_lock(threading.RLock())  # and no lock between processes, which one that is killed keeps for ever

TINY = {  # a model of a megabyte, with the latents of the small one
    "model": {
        "params": {
            "scale_factor": 0.4,
            "unet_config": {"params": {"in_channels": 8, "model_channels": 16, "attention_resolutions": [2],
                                       "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 2, "context_dim": 16,
                                       "num_groups": 8}},
            "first_stage_config": {"params": {"embed_dim": 4, "ddconfig": {"ch": 8, "ch_mult": [1, 2, 4],
                                                                           "num_res_blocks": 1, "num_groups": 4}}},
            "cond_stage_config": {"params": {
                "text_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                                "intermediate_size": 32, "vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63,
                                "pad_token_id": 63},
                "words": load_config("toy").text.words}},
        }
    },
    "sampling": {"resolution": 64, "multiple": 16, "steps": 1},
}  # fmt: skip
NIGHT = "make it night"
MODEL = ["--config", "tiny.yaml", "--weights", "tiny.safetensors", "--device", "cpu"]
RANDOM = ["--weights", "random", "--device", "cpu"]
EVIL = "\x1b]0;owned\x07\x1b[31m\r\n\x00"  # what a terminal would do something for
ODD = [None, True, -1, 0, 10**30, 1.5, math.inf, "", "x" * 5000, EVIL, "\ud800", [], {}, [[]], "../../etc/passwd"]


# ---- what is spoiled


def prepare(folder: Path) -> Path:
    """A folder with one clean file of each kind, to be copied from."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
        networks = build(load_config("tiny.yaml"), ())
        generator = torch.Generator().manual_seed(0)
        names, _ = reading.key_map(networks, [reading.TEXT + "text_model."])
        tensors = {}
        for part, keys in names.items():
            for name, parameter in networks[part].named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator) / math.sqrt(max(1, parameter[0].numel()))
                tensors[keys[name]] = drawn if parameter.ndim > 1 else torch.full(parameter.shape, 0.1)
        save_file(tensors, "tiny.safetensors")
        torch.save({"epoch": 3, "state_dict": tensors}, "tiny.ckpt")
        world.render(world.scene(3)).save("photo.png")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 32, 64))
        mask.save("mask.png")
        editor = emilie.load("tiny.safetensors", "tiny.yaml", device="cpu")
        canvas = emilie.open("photo.png", editor)
        canvas.edit(NIGHT, (0, 0, 32, 64), keep_background=True)
        canvas.edit([("make it day", (0, 0, 32, 64)), (NIGHT, (32, 0, 64, 64))])
        canvas.save("s.canvas")
        old = Path(__file__).parents[1] / "data/session_1_masks.safetensors"
        shutil.copy(old, "old.safetensors")
        tokenizer = Path("tokenizer")
        tokenizer.mkdir()
        letters = [chr(c) for c in range(97, 123)]
        vocabulary = (
            letters + [f"{c}</w>" for c in letters] + ["ma", "mak", "make</w>", "<|startoftext|>", "<|endoftext|>"]
        )
        (tokenizer / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
        (tokenizer / "merges.txt").write_text("#version: 0.2\nm a\nma k\nmak e</w>\n")
        clip = copy.deepcopy(TINY)
        texts = clip["model"]["params"]["cond_stage_config"]["params"]
        del texts["words"]
        Path("clip.yaml").write_text(yaml.safe_dump(clip))
        with open(os.devnull, "w") as nowhere, TemporaryDirectory() as aside:
            for line in (["edit", "photo.png", NIGHT, "--out", aside, *MODEL], ["info", "tiny.ckpt"]):
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    assert main(line) == 0  # so that what is forked has imported it all
            for line in (["make", "b", "--scenes", "1", "--turns", "2"],
                         ["run", "b", "--methods", "ip2p,emilie", "--out", "r", *MODEL],
                         ["study", "r"]):  # fmt: skip
                told = io.StringIO()
                with redirect_stdout(nowhere), redirect_stderr(told):
                    assert main(["bench", *line]) == 0, told.getvalue()
        key = json.loads(Path("r/study/study_key.json").read_text())
        chosen = [{"chain": chain, "chosen": [*about["results"]][:1]} for chain, about in key["chains"].items()]
        Path("answers.json").write_text(json.dumps({"page": key["page"], "rater": "ann", "choices": chosen}))
    finally:
        os.chdir(here)
    return folder


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Bytes, spoiled in one of the ways in which files are."""
    at, span = rng.randrange(len(data) + 1), rng.choice((1, 8, 100, 5000))
    ways = (
        lambda: data[:at],
        lambda: data[:at] + bytes([data[at % len(data)] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        lambda: data[:at] + rng.randbytes(span) + data[at + span :],
        lambda: data[:at] + bytes(span) + data[at + span :],
        lambda: data[:at] + data[at + span :],
        lambda: data[:at] + data[at : at + span] * 2 + data[at + span :],
        lambda: data + rng.randbytes(span),
        lambda: rng.randbytes(16) + data[16:],
        lambda: b"",
        lambda: rng.choice(
            (b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<html>", b"PK\x03\x04", b"GIF89a", b"\x80\x02.", b"{}" * 9)
        ),
        lambda: data[:200] + struct.pack("<Q", rng.choice((2**63, 2**31, 0))) + data[208:],
        lambda: struct.pack("<Q", rng.choice((0, 2, 2**20, 2**62))) + data[8:],
    )
    return rng.choice(ways)()


def spoil_tree(tree, rng: random.Random):
    """A value of JSON or YAML, spoiled in one place."""
    tree = copy.deepcopy(tree)
    places = []

    def walk(node) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)) and node[key]:
                walk(node[key])

    walk(tree)
    node, key = rng.choice(places)
    way = rng.randrange(6)
    if way == 0:
        del node[key]
    elif way == 1 and isinstance(node, list):
        node.insert(key, node[key])
    elif way == 1:
        node[f"{key}{rng.choice(('', EVIL, '2'))}?"] = node[key]
    elif way == 2:
        node[key] = [node[key]]
    elif way == 3 and isinstance(node[key], (int, float)):
        node[key] = rng.choice((float(node[key]), -node[key], str(node[key]), node[key] + 1))
    else:
        node[key] = rng.choice(ODD)
    return tree


def dump(tree, rng: random.Random) -> str:
    text = json.dumps(tree)
    way = rng.randrange(12)
    if way == 0:
        return text[: rng.randrange(len(text))]
    if way == 1:
        return "[" * 100_000 + text
    if way == 2 and '"' in text:  # a name twice
        at = text.find('"', rng.randrange(len(text)))
        end = text.find(",", at)
        return text if min(at, end) < 0 else text[:end] + "," + text[at:end] + text[end:]
    return text


# ---- the kinds: (rng, folder) -> Case; rng None = a clean one


def weights(rng: random.Random | None, folder: Path) -> Case:
    path, whole = folder / "w.safetensors", (folder / "tiny.safetensors").read_bytes()
    argv = [["edit", "photo.png", NIGHT, "--config", "tiny.yaml", "--weights", path.name, "--device", "cpu"],
            ["convert", path.name, "out.safetensors", "--config", "tiny.yaml"], ["info", path.name]]  # fmt: skip
    path.write_bytes(whole)
    if rng is None:
        return Case(argv[0], False)
    way = rng.randrange(8)
    if way < 4:
        path.write_bytes(spoil(whole, rng))
    else:
        length = struct.unpack("<Q", whole[:8])[0]
        header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
        key = rng.choice(sorted(header))
        if way == 4:
            header[key]["shape"] = rng.choice(
                ([1] * 100, [2**62, 4], [0], [-1], [2**40] * 3, header[key]["shape"][::-1] + [1])
            )
        elif way == 5:
            header[f"{key}{EVIL}" if rng.random() < 0.5 else "x" * 10_000] = header.pop(key)
        elif way == 6:
            header["__metadata__"] = {"source": EVIL, "family": "x" * 10**5, "format": EVIL}
        else:
            header = spoil_tree(header, rng)
        text = dump(header, rng).encode("utf-8", "surrogatepass")
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    if rng.random() < 0.2:
        tensors = load_file(folder / "tiny.safetensors")
        key = rng.choice(sorted(tensors))
        tensors[key] = rng.choice(
            (tensors[key] * math.nan, tensors[key].double(), tensors[key].long(), tensors[key][None])
        )
        path.write_bytes(save(tensors))
    return Case(rng.choice(argv))


class Runs:
    """What a pickle may want called."""

    def __init__(self, call: Callable, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


def ckpt(rng: random.Random | None, folder: Path) -> Case:
    path = folder / "w.ckpt"
    argv = [["edit", "photo.png", NIGHT, "--config", "tiny.yaml", "--weights", path.name, "--device", "cpu"],
            ["convert", path.name, "out.safetensors", "--config", "tiny.yaml"], ["info", path.name]]  # fmt: skip
    whole = (folder / "tiny.ckpt").read_bytes()
    path.write_bytes(whole)
    if rng is None:
        return Case(argv[0], False)
    if rng.random() < 0.5:
        path.write_bytes(spoil(whole, rng))
        return Case(rng.choice(argv))
    call = rng.choice(
        ((os.system, "touch owned"), (eval, "open('owned', 'w')"), (os.makedirs, "owned"), (print, EVIL),
         (Path, "x"), (bytes, 10**9), (__import__, "antigravity"), (torch.load, "tiny.ckpt"))
    )  # fmt: skip
    state = {
        "state_dict": load_file(folder / "tiny.safetensors"),
        rng.choice(("hook", "state_dict2", EVIL)): Runs(*call),
    }
    torch.save(state, path)

    def well(folder: Path) -> str | None:
        return "it ran" if (folder / "owned").exists() else None

    return Case(rng.choice(argv), well=well)


def picture_bytes(rng: random.Random, image: Image.Image) -> bytes:
    """A picture in some mode and format, whole or spoiled, or one that is large when it is unpacked."""
    mode = rng.choice(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"))
    kind = rng.choice(
        ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "EPS", "PDF", "ICO", "PPM", "TGA", "PCX", "JPEG2000")
    )
    if rng.random() < 0.15:
        size = rng.choice(
            ((65535, 9), (9, 65535), (60000, 3000), (9000, 9000), (1, 1), (15, 15), (70000, 2), (14000, 14000))
        )
        mode = "1" if size[0] * size[1] > 10**6 else rng.choice(("1", "L"))
        image, kind = Image.new(mode, size, 1), rng.choice(("PNG", "TIFF"))
    else:
        try:
            image = image.convert("L").convert(mode) if mode in ("I", "F", "I;16", "1") else image.convert(mode)
        except ValueError:
            image = image.convert("L")
    extra = {}
    if rng.random() < 0.3:
        extra["exif"] = rng.choice(
            (b"Exif\0\0" + rng.randbytes(30), b"Exif\0\0II*\0" + rng.randbytes(40), b"MM\0*" + bytes(9))
        )
    if rng.random() < 0.2:
        extra["icc_profile"] = rng.choice((b"", rng.randbytes(200), EVIL.encode()))
    if kind == "TIFF":
        extra["compression"] = rng.choice(("raw", "tiff_lzw", "tiff_deflate", "packbits"))
    for more in (extra, {}):
        for form in (image, image.convert("RGB") if image.width * image.height < 10**6 else image):
            out = io.BytesIO()
            try:
                form.save(out, kind, **more)
                break
            except Exception:
                continue
        else:
            continue
        break
    data = out.getvalue() or b"x"
    return spoil(data, rng) if rng.random() < 0.5 else data


def pictures(rng: random.Random | None, folder: Path) -> Case:
    name = "p.png"
    if rng is not None:
        name = "p" + rng.choice((".png", ".jpg", ".tif", "", ".eps", ".\x1b[31m.png", ".webp", ".heic", ".raw"))
        (folder / name).write_bytes(picture_bytes(rng, Image.open(folder / "photo.png")))
    else:
        shutil.copy(folder / "photo.png", folder / name)
    size = ["--resolution", "64"] if rng is None or rng.random() < 0.8 else ["--working-size"]
    return Case(["edit", name, NIGHT, *size, *MODEL], None if rng else False)


def masks(rng: random.Random | None, folder: Path) -> Case:
    if rng is None:
        return Case(["edit", "photo.png", NIGHT, "--mask", "1=mask.png", *MODEL], False)
    (folder / "m.png").write_bytes(picture_bytes(rng, Image.open(folder / "mask.png")))
    where = rng.choice((["--mask", "1=m.png"], ["--mask", "1=m.png", "--soft"], ["--also", "1=m.png:make it day"],
                        ["--mask", "1=m.png", "--mask-invert"]))  # fmt: skip
    return Case(["edit", "photo.png", NIGHT, *where, *MODEL])


def same_canvas(name: str, clean: str) -> Callable[[Path], str | None]:
    """A spoiled session that opens must hold what the clean one held: then what was spoiled stands for nothing."""

    def well(folder: Path) -> str | None:
        (_, *old), (_, *new) = ([*session._rows(folder / each)] for each in (clean, name))
        for a, b in zip(old, new[: len(old)], strict=True):
            if a.record != b.record or a.tensors.keys() != b.tensors.keys():
                return "went on with another record"
            if any(not torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors):
                return "went on with other pictures"
        return None

    return well


def canvases(rng: random.Random | None, folder: Path) -> Case:
    argv = ["edit", "make it day", "--canvas", "c.canvas", *MODEL]
    path = folder / "c.canvas"
    if rng is None:
        shutil.copy(folder / "s.canvas", path)
        return Case(argv, False, (path.name,))
    changes = (
        ["hide", "1"],
        ["move", "2", "1"],
        ["strength", "1", "0.5"],
        ["revise", "1", "make it day"],
        ["undo"],
        [],
    )
    argv = rng.choice((argv, argv, ["stack", path.name, *rng.choice(changes), *MODEL]))
    way = rng.randrange(4)
    clean = "old.safetensors" if way > 1 else "s.canvas"
    shutil.copy(folder / clean, path)
    if way in (0, 2):
        path.write_bytes(spoil(path.read_bytes(), rng))
        if way == 2:  # which has no digests: a changed number in a latent is a number
            return Case(argv, changes=(path.name,))
        return Case(argv, changes=(path.name,), well=same_canvas(path.name, clean))
    if way == 1:
        with closing(sqlite3.connect(path)) as db:
            number = rng.randrange(3)
            table, column = rng.choice((("head", "about"), ("states", "record")))
            which = "" if table == "head" else f" WHERE number = {number}"
            ((text,),) = db.execute(f"SELECT {column} FROM {table}{which}").fetchall()
            tree = json.loads(text)
            if table == "states" and number and rng.random() < 0.3:  # of a later version's, or none
                tree["settings"][rng.choice(("mood", "own", "scrubbed"))] = rng.choice(ODD)
            else:
                tree = spoil_tree(tree, rng)
            spoiled = dump(tree, rng)
            db.execute(f"UPDATE {table} SET {column} = ?{which}", [spoiled])
            if rng.random() < 0.7:  # with a digest that fits
                ((about, _),) = db.execute("SELECT * FROM head").fetchall()
                db.execute("UPDATE head SET digest = ?", [session._digest(about)])
                for row in db.execute("SELECT number, id, record, tensors FROM states").fetchall():
                    db.execute("UPDATE states SET digest = ? WHERE number = ?", [session._digest(*row), row[0]])
            db.commit()
        return Case(argv, changes=(path.name,))
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["canvas"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    if rng.random() < 0.6:
        text = dump(spoil_tree(about, rng), rng)
    else:
        text, key = json.dumps(about), rng.choice(sorted(tensors))
        way = rng.randrange(4)
        if way == 0:
            tensors[key] = tensors[key].float() * math.inf
        elif way == 1:
            tensors[f"9.{key}" if rng.random() < 0.5 else f"{key}{EVIL}"] = tensors.pop(key)
        elif way == 2:
            tensors[key] = tensors[key][..., :1].clone()
        else:
            tensors[key] = (
                tensors[key].reshape([1] * 70 + list(tensors[key].shape)) if key[0] == "z" else tensors[key].half()
            )
    save_file(tensors, path, {"format": "emilie canvas 1", "canvas": text.encode("utf-8", "replace").decode()})
    return Case(argv, changes=(path.name,))


def configs(rng: random.Random | None, folder: Path) -> Case:
    path = folder / "c.yaml"
    argv = ["edit", "photo.png", NIGHT, "--config", path.name, "--steps", "1", "--resolution", "64", *RANDOM]
    path.write_text(yaml.safe_dump(TINY))
    if rng is None:
        return Case(argv, False)
    way = rng.randrange(6)
    if way == 0:
        path.write_bytes(spoil(path.read_bytes(), rng))
    elif way == 1:
        laughs = "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk"))
        path.write_text(rng.choice((laughs, "a: ${oc.env:HOME}\n", "a: ${b}${b}\nb: ${a}\n", "[" * 10**5, "? " * 10**4,
                                    "!!python/object/apply:os.system ['touch owned']\n", "a: " + EVIL)))  # fmt: skip
    else:
        path.write_text(yaml.safe_dump(json.loads(json.dumps(spoil_tree(TINY, rng)))))
    return Case(argv)


def benches(rng: random.Random | None, folder: Path) -> Case:
    argv = [["bench", "check", "b"], ["bench", "run", "b", "--methods", "ip2p", "--out", "r2", *MODEL],
            ["bench", "tally", "r/study/study_key.json", "answers.json"],
            ["bench", "run", "b", "--methods", "ip2p,emilie", "--out", "r", *MODEL],
            ["bench", "study", "r", "--out", "s"],
            ["bench", "report", "r", "--out", "p"]]  # fmt: skip
    if rng is None:
        return Case(argv[1], False)
    about = json.loads((folder / "r/run.json").read_text()) | {"bench": str(folder / "b")}  # where it is now
    (folder / "r/run.json").write_text(json.dumps(about, indent=1))
    which = rng.choice((0, 0, 1, 2, 2, 3, 4, 5))
    found = {0: ["b/bench.jsonl", "b/images/*", "b/masks/*"], 1: ["b/bench.jsonl", "b/images/*"],
             2: ["r/study/study_key.json", "answers.json"],
             3: ["r/run.json", *(f"r/edits/*/*/*/1.{end}" for end in ("json", "png", "safetensors"))],
             4: ["r/run.json", "r/edits/*/*/*/1.json", "r/edits/*/*/*/1.png"]}[min(which, 4)]  # fmt: skip
    paths = sorted(path for pattern in found for path in folder.glob(pattern))
    path = rng.choice(paths)
    if which == 3:  # which a run that was killed goes on from
        for last in folder.glob("r/edits/*/*/*/2.json"):
            last.unlink()
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.8:
        path.write_text(dump(spoil_tree(json.loads(path.read_text()), rng), rng) + "\n")
    else:
        path.write_bytes(spoil(path.read_bytes(), rng))
    changes = {f"{path.parent.relative_to(folder)}/{turn}{end}" for path in folder.glob("r/edits/*/*/*/0.png")
               for turn in (1, 2) for end in (".json", ".png", ".safetensors", "_mask.png")}  # fmt: skip
    return Case(argv[which], changes=("r/run.json", *changes) if which == 3 else (), lines=25)


def options(rng: random.Random | None, folder: Path) -> Case:
    argv = ["edit", "photo.png", NIGHT, *MODEL]
    if rng is None:
        return Case(argv, False)
    values = """0 -1 1 3 nan inf 1e400 ../.. /proc/self/mem /dev/null 1= 1=mask.png 2=mask.png 1=0,0,64,64 native 64
    1=0,0,99999999999999999999,1 1=-1,0,5,5 privateuseone cuda:99 mps meta meta:1 cpu:7 xla float16 0,1 5,1 s.canvas
    photo.png""".split()
    values += ["", "9" * 5000, "x" * 300, "x" * 70_000, "\x1b[31m", "\udcff", "a/" * 3000, "1=photo.png:make it day"]
    names = """mask box also gate rescale iterate steps sampler canvas out guidance-interval reuse reuse-guidance
    text-scale image-scale seed device resolution dtype tokenizer config weights ema none""".split()
    for _ in range(rng.choice((1, 1, 2, 3))):
        argv += [f"--{rng.choice(names)}", rng.choice(values)]
    argv += rng.choice([[], *([f"--{name}"] for name in "soft keep-background low-memory plain compile".split())])
    return Case(argv, changes=("s.canvas",))


def texts(rng: random.Random | None, folder: Path) -> Case:
    if rng is None:
        return Case(["edit", "photo.png", NIGHT, *MODEL], False)
    alphabet = [
        *"make it night red {} %s -- / .png é 写 \u202e \udcff \x1b[2J \U0001f600".split(" "),
        " ",
        "\n",
        "\t",
        '"',
    ]
    alphabet += ["\u2028", "a" * 10**6, "a" * 300, "b" * 5000]
    text = rng.choice(("", " ")).join(rng.choice(alphabet) for _ in range(rng.randrange(1, 12)))[:130_000]
    others = [text, NIGHT] if rng.random() < 0.3 else [text]
    form = rng.choice((["edit", "photo.png", *others], ["edit", text, NIGHT],
                       ["edit", "photo.png", "--also", f"1={text}", NIGHT], ["edit", text, "--canvas", "s.canvas"],
                       ["edit", "photo.png", NIGHT, "--mask", f"1={text}"],
                       ["edit", "--", "photo.png", text], [text], ["info", text], ["convert", text, text],
                       ["bench", "check", text], ["edit", "photo.png", text, "--tokenizer", "tokenizer"]))  # fmt: skip
    model = MODEL if form[0] == "edit" else []
    if form[-2:] == ["--tokenizer", "tokenizer"]:
        model = ["--config", "clip.yaml", *RANDOM]
    return Case([*form[:1], *model, *form[1:]] if "--" in form else [*form, *model], changes=("s.canvas",))


def tokenizers(rng: random.Random | None, folder: Path) -> Case:
    argv = ["edit", "photo.png", NIGHT, "--config", "clip.yaml", "--tokenizer", "tokenizer", *RANDOM]
    if rng is None:
        return Case(argv, False)
    path = folder / "tokenizer" / rng.choice(("vocab.json", "vocab.json", "merges.txt"))
    way = rng.randrange(3)
    if way == 0 or path.suffix == ".txt" and way == 1:
        path.write_bytes(spoil(path.read_bytes(), rng))
    elif path.suffix == ".txt":
        path.write_text(rng.choice(("a", "a b c\n" * 5, "x y\n" * 10**5, EVIL, "#version: 0.2\nm a\n" + EVIL)))
    else:
        path.write_text(
            dump(spoil_tree(json.loads(path.read_text()), rng), rng), encoding="utf-8", errors="surrogatepass"
        )
    if rng.random() < 0.2:
        (folder / "tokenizer" / "tokenizer_config.json").write_text(
            rng.choice(("{", "[]", '{"tokenizer_class": "os.system"}'))
        )
    return Case(argv, well=numbered)


def numbered(folder: Path) -> str | None:
    """A vocabulary whose tokens are not numbered from 0 on would give another edit without a word."""
    numbers = [*json.loads((folder / "tokenizer/vocab.json").read_text()).values()]
    right = {*map(type, numbers)} == {int} and sorted(numbers) == [*range(len(numbers))]
    return None if right else "accepted a vocabulary without right numbers"


def faults(rng: random.Random | None, folder: Path) -> Case:
    """Sound input, and a system that lacks something."""
    shutil.copy(folder / "s.canvas", folder / "c.canvas")
    (folder / "out.safetensors").write_bytes(b"mine")
    argv = [["edit", "photo.png", NIGHT, "make it day", *MODEL],
            ["edit", "make it day", "--canvas", "c.canvas", *MODEL],
            ["convert", "tiny.safetensors", "out.safetensors", "--overwrite", "--config", "tiny.yaml"],
            ["info", "tiny.safetensors"], ["bench", "run", "b", "--methods", "ip2p", "--out", "r2", *MODEL], ["--help"],
            ["bench", "make", "b2", "--scenes", "2", "--turns", "1"], ["bench", "check", "b"],
            ["edit", "--help"]]  # fmt: skip
    if rng is None:
        return Case(argv[1], False, ("c.canvas",))
    case = Case(rng.choice(argv), changes=("c.canvas", "out.safetensors"))
    way = rng.randrange(7)
    if way == 0:
        case.limits = {resource.RLIMIT_FSIZE: rng.choice((0, 1, 4096, 20_000, 60_000, 100_000))}
    elif way == 1:
        case.limits = {resource.RLIMIT_NOFILE: rng.randrange(3, 20)}
    elif way == 2:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        case.limits = {resource.RLIMIT_AS: used + rng.choice((1, 3, 10, 30, 60)) * 10**6}
    elif way == 3:
        case.stdout = rng.choice(("full", "closed", "gone"))
    elif way == 4:

        def no_sync() -> None:
            os.fsync = full

        case.before = no_sync
    elif way == 5:

        def no_space() -> None:
            os.replace = full

        case.before = no_space
    else:
        case.stderr = rng.choice(("full", "gone"))
    return case


KINDS = {make.__name__: make for make in (weights, ckpt, pictures, masks, canvases, configs, benches, options, texts,
                                          tokenizers, faults)}  # fmt: skip
