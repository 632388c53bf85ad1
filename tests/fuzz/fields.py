"""Kinds of cases that spoil a format by its own fields, which bytes spoiled blindly rarely reach."""

import csv
import io
import json
import math
import pickle
import random
import shutil
import sqlite3
import struct
import zipfile
import zlib
from contextlib import closing
from functools import cache
from pathlib import Path

import yaml
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file

from .judge import Case
from .kinds import EVIL, MODEL, NIGHT, RANDOM, TINY, dump, same_canvas, spoil, spoil_tree

NUMBERS = (0, 1, 2, 7, 8, 16, 32, 33, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


@cache
def bomb() -> bytes:
    """256 MB of zeros in 260 KB."""
    return zlib.compress(bytes(2**28), 9)


# ---- pictures


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png(rng: random.Random, image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    chunks = png_chunks(out.getvalue())
    more = {
        b"iCCP": [b"x\0\0" + bomb(), b"x\0\0" + zlib.compress(profile(rng)), b"x\0\1", b"x" * 100, b""],
        b"zTXt": [b"a\0\0" + bomb(), b"a\0\7x", EVIL.encode() + b"\0\0" + zlib.compress(EVIL.encode())],
        b"iTXt": [b"a\0\1\0\0\0" + bomb(), b"a\0\0\0\0\0" + EVIL.encode(), b"emilie\0\0\0\0\0{", b""],
        b"tEXt": [b"emilie\0" + b"[" * 10**5, EVIL.encode(), b""],
        b"gAMA": [struct.pack(">I", rng.choice(NUMBERS)), b"", b"\0"],
        b"cHRM": [struct.pack(">8I", *(rng.choice(NUMBERS) for _ in range(8))), bytes(32), b"\0" * 5, b""],
        b"sBIT": [b"", b"\0", b"\0\0\0\0", b"\xff\xff\xff"],
        b"sRGB": [b"", b"\xff"],
        b"tRNS": [b"", b"\0", b"\0" * 6, b"\0" * 300],
        b"PLTE": [b"", b"\0\0", bytes(3), bytes(3000)],
        b"bKGD": [b"", b"\xff"],
        b"pHYs": [bytes(9), b""],
        b"acTL": [struct.pack(">II", rng.choice(NUMBERS), rng.choice(NUMBERS)), b""],
        b"fcTL": [struct.pack(">IIIIIHHBB", *(rng.choice(NUMBERS) & 0xFFFF for _ in range(9 - 2)), 1, 1), b""],
        b"fdAT": [b"\0\0\0\1" + chunks[1][1], b""],
        b"eXIf": [b"MM\0*" + struct.pack(">I", n) + rng.randbytes(40) for n in (0, 8, 2**31, 4)],
        b"IDAT": [bomb(), b"", b"x"],
        b"CgBI": [b"\x50\0\x20\2"],
        b"\x1b[3m": [b""],
    }
    for _ in range(rng.choice((1, 1, 2))):
        way, at = rng.randrange(6), rng.randrange(len(chunks))
        if way == 0:
            head = bytearray(chunks[0][1])
            place, size = rng.choice(((0, 4), (4, 4), (8, 1), (9, 1), (10, 1), (11, 1), (12, 1)))
            head[place : place + size] = (rng.choice(NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, "big")
            chunks[0] = b"IHDR", bytes(head)
        elif way == 1:
            chunks.insert(at, chunks[at])
        elif way == 2 and at:
            del chunks[at]
        else:
            name = rng.choice(sorted(more))
            chunks.insert(rng.choice((1, 1, len(chunks) - 1)), (name, rng.choice(more[name])))
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg(rng: random.Random, image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", progressive=rng.random() < 0.5, icc_profile=profile(rng), exif=tiff_bytes(rng, None))
    data, at, segments = out.getvalue(), 2, []
    while data[at + 1] != 0xDA:
        (length,) = struct.unpack(">H", data[at + 2 : at + 4])
        segments.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    rest, way = data[at:], rng.randrange(8)
    which = rng.randrange(len(segments))
    name, body = segments[which]
    sof = next(i for i, (n, _) in enumerate(segments) if n in (0xC0, 0xC2))
    if way == 0:
        segments[which] = name, spoil(body or b"x", rng)[:65000]
    elif way == 1:
        del segments[which]
    elif way == 2:
        segments.insert(which, segments[which])
    elif way == 3:
        frame = bytearray(segments[sof][1])
        place, size = rng.choice(((0, 1), (1, 2), (3, 2), (5, 1), (7, 1), (8, 1)))
        frame[place : place + size] = (rng.choice(NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, "big")
        segments[sof] = segments[sof][0], bytes(frame)
    elif way == 4:
        segments[sof] = rng.choice((0xC1, 0xC3, 0xC9, 0xCB)), segments[sof][1]
    elif way == 5:  # a scan again and again
        rest = rest[:-2] * rng.choice((2, 50, 3000)) + rest[-2:]
    elif way == 6:
        parts = [
            b"ICC_PROFILE\0" + bytes([i & 255, n & 255]) + rng.randbytes(99) for i, n in ((0, 0), (3, 2), (1, 255))
        ]
        segments += [(0xE2, part) for part in parts[: rng.randrange(1, 4)]]
    else:
        segments.append(
            rng.choice(
                (
                    (0xEE, b"Adobe\0\x64\0\0\0\0\xff"),
                    (0xDD, b"\0\1"),
                    (0xDC, b"\0\0"),
                    (0xE2, b"MPF\0II*\0" + rng.randbytes(60)),
                    (0xFE, EVIL.encode()),
                )
            )
        )
    return data[:2] + b"".join(bytes([255, n]) + struct.pack(">H", len(b) + 2) + b for n, b in segments) + rest


TAGS = {
    254: 1,
    256: 64,
    257: 64,
    258: 8,
    259: 1,
    262: 2,
    273: 0,
    274: 1,
    277: 3,
    278: 64,
    279: 0,
    284: 1,
    317: 1,
    322: 64,
    323: 64,
    324: 0,
    325: 0,
    330: 8,
    338: 1,
    339: 1,
    281: 255,
    320: 0,
    530: 2,
    34675: 0,
    50706: 1,
    34665: 8,
    33432: 0,
}


def tiff_bytes(rng: random.Random, image: Image.Image | None) -> bytes:
    """A TIFF, or without a picture EXIF data, some of whose entries are odd."""
    pixels = b"" if image is None else image.convert("RGB").tobytes()
    entries = {274: rng.choice((1, 3, 6, 8))}
    if image is not None:
        entries |= {
            256: image.width,
            257: image.height,
            258: 8,
            259: 1,
            262: 2,
            273: 1000,
            277: 3,
            278: image.height,
            279: len(pixels),
            284: 1,
        }
    odd = {}
    for tag in rng.sample(sorted(TAGS), rng.choice((1, 1, 2, 3))):
        odd[tag] = rng.choice((TAGS[tag], *NUMBERS))
    for tag in rng.sample(sorted(entries), 1) if rng.random() < 0.2 else ():
        del entries[tag]
    rows = []
    for tag, value in sorted((entries | odd).items()):
        kind, count = (4, 1) if tag not in odd or rng.random() < 0.5 else (rng.randrange(14), rng.choice(NUMBERS))
        rows.append(struct.pack("<HHII", tag, kind, count, value))
    following = rng.choice((0, 0, 8, 2**31, 990))
    order = b"Exif\0\0" if image is None else b""
    data = b"II*\0" + struct.pack("<IH", 8, len(rows)) + b"".join(rows) + struct.pack("<I", following)
    return order + (data if image is None else data.ljust(1000, b"\0") + pixels)


def others(rng: random.Random, image: Image.Image) -> bytes:
    """GIF, WebP, BMP, AVIF, PPM, JPEG 2000, QOI, TGA: a number somewhere in the head is another one."""
    out = io.BytesIO()
    kind = rng.choice(("GIF", "WEBP", "BMP", "AVIF", "PPM", "JPEG2000", "QOI", "TIFF"))
    more = {"save_all": True, "append_images": [image] * 3} if kind in ("GIF", "WEBP", "TIFF") else {}
    try:
        image.save(out, kind, **more)
    except (OSError, KeyError, ValueError):
        return b"P6 " + str(rng.choice(NUMBERS)).encode() + b" 64 255\n"
    data = bytearray(out.getvalue())
    for _ in range(rng.choice((1, 2, 4))):
        size, at = rng.choice((1, 2, 4)), rng.randrange(min(len(data), 400))
        number = rng.choice(NUMBERS) & (1 << 8 * size) - 1
        data[at : at + size] = number.to_bytes(size, rng.choice(("big", "little")))
    return bytes(data)


def profile(rng: random.Random) -> bytes:
    """A colour profile with odd fields."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile(rng.choice(("sRGB", "LAB", "XYZ")))).tobytes())
    for _ in range(rng.randrange(4)):
        at = rng.choice((0, 8, 12, 16, 20, 36, 64, 128, *range(132, 260, 4), rng.randrange(0, len(data) - 4, 4)))
        new = struct.pack(">I", rng.choice(NUMBERS))
        data[at : at + 4] = rng.choice((new, b"CMYK", b"GRAY", b"RGB ", b"link", b"mAB ", b"curv", rng.randbytes(4)))
    return bytes(data)


def icc(rng: random.Random, image: Image.Image) -> bytes:
    out, kind = io.BytesIO(), rng.choice(("PNG", "JPEG", "TIFF", "WEBP"))
    mode = rng.choice(("RGB", "L", "CMYK", "RGBA", "LA", "1", "P"))
    mode = mode if kind in ("PNG", "TIFF") and mode != "CMYK" else rng.choice(("RGB", "L"))
    image.convert(mode).save(out, kind, icc_profile=profile(rng))
    return out.getvalue()


def inside(rng: random.Random | None, folder: Path) -> Case:
    """Pictures, as picture, mask and inset."""
    if rng is None:
        return Case(["edit", "photo.png", NIGHT, "--mask", "1=mask.png", *MODEL], False)
    whole = Image.open(folder / rng.choice(("photo.png", "mask.png"))).convert("RGB")
    data = rng.choice((png, png, jpeg, tiff_bytes, others, icc))(rng, whole)
    name = "p" + rng.choice((".png", ".jpg", ".tif", ""))
    (folder / name).write_bytes(data)
    argv = rng.choice(
        (
            ["edit", name, NIGHT, *MODEL],
            ["edit", name, NIGHT, *MODEL],
            ["edit", "photo.png", NIGHT, "--mask", f"1={name}", *MODEL],
            ["info", name],
            ["edit", "photo.png", NIGHT, "--mask", f"1={name}", "--soft", "--crop", *MODEL],
            ["edit", "--batch", name, NIGHT, *MODEL],
            ["where", name, NIGHT, *MODEL],
            ["edit", name, NIGHT, "--working-size", *MODEL],
        )
    )
    return Case(argv, lines=2 if "--batch" in argv else 1)


# ---- a session's pages and tables


def pages(rng: random.Random | None, folder: Path) -> Case:
    path = folder / "c.canvas"
    shutil.copy(folder / "s.canvas", path)
    argv = [
        ["edit", "make it day", "--canvas", path.name, *MODEL],
        ["stack", path.name, *MODEL],
        ["stack", path.name, "hide", "1", *MODEL],
    ]
    if rng is None:
        return Case(argv[0], False, (path.name,))
    way = rng.randrange(5)
    if way < 2:
        data = bytearray(path.read_bytes())
        size = struct.unpack(">H", data[16:18])[0]
        size = 65536 if size == 1 else size
        page = rng.randrange(len(data) // size)
        at = page * size + (100 if page == 0 and rng.random() < 0.5 else 0)
        place = rng.choice((*range(0, 12), 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 44, 52, 56, 60, 64, 92, 96))
        new = rng.choice((2, 4)), rng.choice((*NUMBERS, page + 1, page, len(data) // size + 7))
        data[at + place : at + place + new[0]] = (new[1] & (1 << 8 * new[0]) - 1).to_bytes(new[0], "big")
        path.write_bytes(data)
    elif way == 2:  # files that SQLite looks for beside it
        aside = rng.choice(("-journal", "-wal", "-shm"))
        (folder / f"{path.name}{aside}").write_bytes(rng.choice((b"", rng.randbytes(600))))
        return Case(
            rng.choice(argv), changes=(path.name, f"{path.name}{aside}"), well=same_canvas(path.name, "s.canvas")
        )
    else:
        with closing(sqlite3.connect(path)) as db:
            db.execute(
                rng.choice(
                    (
                        "CREATE VIEW other AS SELECT 1",
                        "CREATE INDEX i ON states(id)",
                        "CREATE TABLE more(a)",
                        "CREATE TRIGGER t AFTER INSERT ON head BEGIN DELETE FROM states; END",
                        "DROP TABLE head",
                        "ALTER TABLE head ADD COLUMN more",
                        "UPDATE states SET record = CAST(record AS BLOB)",
                        "UPDATE states SET number = number + 1000000",
                        "UPDATE states SET id = CAST(id AS BLOB)",
                        "UPDATE states SET tensors = zeroblob(900000000) WHERE number = 1",
                        "UPDATE states SET digest = NULL || ''",
                        "DELETE FROM states WHERE number = 1",
                        "INSERT INTO head SELECT * FROM head",
                        "DELETE FROM head",
                        "PRAGMA user_version = -1",
                        "UPDATE states SET record = char(27) || record",
                        "PRAGMA application_id = 0",
                        "UPDATE states SET tensors = substr(tensors, 1, 999)",
                        "UPDATE head SET about = 'null'",
                        "PRAGMA journal_mode = WAL",
                        "PRAGMA encoding = 'UTF-16'",
                        "PRAGMA auto_vacuum = 1",
                    )
                ).replace("NULL || ''", "'x'")
            )
            db.commit()
            if rng.random() < 0.3:
                db.execute("VACUUM")
    return Case(rng.choice(argv), changes=(path.name,), well=same_canvas(path.name, "s.canvas"))


# ---- weights: zip and pickle


class Says:
    """What pickles itself as these bytes would."""

    def __init__(self, function, args):
        self.said = function, args

    def __reduce__(self):
        return self.said


def zips(rng: random.Random | None, folder: Path) -> Case:
    path = folder / "w.ckpt"
    shutil.copy(folder / "tiny.ckpt", path)
    argv = [
        ["edit", "photo.png", NIGHT, "--config", "tiny.yaml", "--weights", path.name, "--device", "cpu"],
        ["convert", path.name, "out.safetensors", "--config", "tiny.yaml"],
        ["info", path.name],
    ]
    if rng is None:
        return Case(argv[0], False)
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    name, data = records[at]
    compress, way = zipfile.ZIP_STORED, rng.randrange(10)
    if way == 0:  # laughs: tuples of tuples, by the memo
        laughs = b"\x80\x02(K\x01t" + b"".join(b"q%c2222t0" % 1 for _ in range(1))
        laughs = (
            b"\x80\x02K\x01\x85"
            + b"q\x01"
            + b"".join(b"h%c" % i + b"h%c" % i + b"\x86q%c" % (i + 1) for i in range(1, 60))
        )
        records[at] = name, laughs + b"."
    elif way == 1:
        records[at] = (
            name,
            b"\x80\x02"
            + rng.choice(
                (
                    b"(" * 10**6,
                    b"]" * 10**6,
                    b"\x8b\xff\xff\xff\x7f",
                    b"c" + b"x" * 9**6 + b"\nx\n.",
                    b"X\xff\xff\xff\x7fx",
                    b"\x82\x01.",
                    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
                    b"j\xff\xff\xff\x7f.",
                    b"r\xff\xff\xff\x7f.",
                    b"I" + b"9" * 10**6 + b"\n.",
                    b"Pabc\n.",
                    b"cos\nsystem\n(S'touch owned'\ntR.",
                )
            ),
        )
    elif way == 2:
        place = rng.randrange(len(data))
        opcodes = (
            b"()-./012BCDFGHIJKLMNPQRSTUVXZ[]abcdeghijlmnopqrstuvxyz}\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x93\x94"
        )
        records[at] = name, data[:place] + bytes([rng.choice(opcodes)]) + data[place + 1 :]
    elif way == 3:
        compress = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        if rng.random() < 0.5:
            records.append(("archive/data/999", bytes(2**28)))
    elif way == 4:
        records.append(
            rng.choice(
                (
                    records[at],
                    ("../../owned", b"x"),
                    (EVIL, b"x"),
                    ("x" * 60_000, b"x"),
                    ("archive/byteorder", b"big"),
                    ("/etc/owned", b""),
                    ("archive/.format_version", b"9" * 999),
                    ("archive/version", b"99\n"),
                )
            )
        )
    elif way == 5:
        del records[rng.randrange(len(records))]
    elif way == 6:
        which = rng.randrange(len(records))
        records[which] = (
            records[which][0],
            rng.choice((b"", records[which][1][:7], records[which][1] * 3, rng.randbytes(99))),
        )
    elif way == 7:
        numbers = [place for place in range(len(data) - 3) if data[place : place + 1] in b"KMJ"]
        place = rng.choice(numbers)
        records[at] = (
            name,
            data[:place]
            + b"J"
            + struct.pack("<i", rng.choice((-1, 0, 2**31 - 1, -(2**31))))
            + data[place + {75: 2, 77: 3, 74: 5}[data[place]] :],
        )
    elif way == 8:
        deep: object = 1
        for _ in range(rng.choice((100, 300))):
            deep = [deep]
        state = rng.choice(
            (
                deep,
                {"state_dict": None},
                {"state_dict": [1]},
                {"state_dict": {1: 2}},
                {EVIL: EVIL},
                None,
                "x" * 10**7,
                {"state_dict": {EVIL: 1}},
                Says(bytearray, (10**10,)),
                Says(dict, ([(1, 2)],)),
                {"state_dict": Says(list, ((1,),))},
            )
        )
        records[at] = name, pickle.dumps(state, 2)
    else:
        records = [(rng.choice(("x/", "", EVIL)) + each.partition("/")[2], body) for each, body in records]
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(out, "w", compress) as archive:
            for each, body in records:
                archive.writestr(each, body)
        data = bytearray(out.getvalue())
    except (ValueError, UserWarning):
        data = bytearray(path.read_bytes())
    if rng.random() < 0.3:  # the table of contents, and where it is
        for _ in range(3):
            place = rng.randrange(max(0, len(data) - 400), len(data) - 4)
            data[place : place + 4] = struct.pack("<I", rng.choice(NUMBERS))
    path.write_bytes(data)

    def well(folder: Path) -> str | None:
        return "it ran" if any(folder.parent.rglob("owned")) else None

    return Case(rng.choice(argv), well=well)


# ---- YAML


def yamls(rng: random.Random | None, folder: Path) -> Case:
    path, text = folder / "c.yaml", yaml.safe_dump(TINY)
    argv = ["edit", "photo.png", NIGHT, "--config", path.name, "--steps", "1", "--resolution", "64", *RANDOM]
    path.write_text(text)
    if rng is None:
        return Case(argv, False)
    odd = """!!binary AAAA|!!timestamp 2001-01-01|!!set {a, b}|!!omap [a: 1]|!!float 1|!!int "8"|!!str 8|!!null ''
    !!python/name:os.system|!!python/tuple [1, 2]|&a [*a]|&a {b: *a}|*unknown|0x10|0o20|1_6|1:20|1e1|.inf|.nan
    -.inf|~|???|${a}|${.}|${oc.env:HOME}|$|yes|on|2001-01-01|'8'|"\\x1b[31m"|"\\ud800"|"\\0"|[8, ]|[8, 8, ]
    {8: 8}|{? [a] : b}|>-\n      8|- 8|8 # more|"8|@|`|%|!|!!|!<x> 8|! 8|=|<<|{<<: {a: 1}}
    99999999999999999999999999|0b1000|1.0|8.5|--8|+8|080|0x|_|1__6|true|[]|{}|""|[[8]]|[1, 2.5]|[true]|[null]
    [-1]""".replace("\n    ", "|").split("|")
    lines, way = text.splitlines(), rng.randrange(9)
    at = rng.randrange(len(lines))
    if way < 4:
        while ": " not in lines[at]:
            at = rng.randrange(len(lines))
        lines[at] = lines[at].partition(": ")[0] + ": " + rng.choice(odd)
    elif way == 4:
        lines[at] = (
            rng.choice(
                (
                    "\t",
                    " ",
                    "- ",
                    "? ",
                    "---\n",
                    "...\n",
                    "%YAML 9.9\n---\n",
                    "%TAG ! x:\n---\n",
                    "\0",
                    "\ufeff",
                    "\u2028",
                    "'",
                    "{",
                    "!x ",
                )
            )
            + lines[at]
        )
    elif way == 5:
        lines.insert(
            at,
            rng.choice(
                (
                    lines[at],
                    "<<: {a: 1}",
                    "1: 2",
                    "null: 1",
                    "true: 1",
                    "[a]: 1",
                    "? {a: 1}\n: 2",
                    "model.params: 1",
                    "a" * 70_000 + ": 1",
                    ".: 1",
                    "'': 1",
                    "model: {}",
                    "2001-01-01: 1",
                    '"\\x1b[31m": 1',
                    "!!binary aaaa: 1",
                    "? " * 400,
                )
            ),
        )
    elif way == 6:
        path.write_bytes("\n".join(lines).encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le", "cp037"))))
        return Case(argv)
    elif way == 7:
        lines = [
            line.replace(rng.choice((" ", ":", "-")), rng.choice(("\t", ":", "- ", "  ")), 1) if i == at else line
            for i, line in enumerate(lines)
        ]
    else:
        kept = lines[at].rpartition(" ")
        lines[at] = (
            kept[0]
            + " "
            + rng.choice(
                (
                    f"{kept[2]}e400",
                    f"{kept[2]}.0",
                    f"-{kept[2]}",
                    f"{kept[2]}{'0' * 5000}",
                    f'"{kept[2]}"',
                    f"[{kept[2]}]",
                    f"{kept[2]} {kept[2]}",
                )
            )
        )
    path.write_text("\n".join(lines), errors="surrogatepass")
    return Case(argv)


# ---- folders of models


def folders(rng: random.Random | None, folder: Path) -> Case:
    """Of diffusers, of BLIP-2 and of GracoNet: the small ones that ship, spoiled."""
    argv = ["insert", "photo.png", "mask.png", "--blip2", "blip2", "--graconet", "graconet.safetensors", *MODEL]
    shipped = Path(__file__).parents[2] / "weights"
    shutil.copytree(shipped / "toy-blip2", folder / "blip2")
    shutil.copy(shipped / "toy-graconet.safetensors", folder / "graconet.safetensors")
    if rng is None:
        return Case(argv, False)
    which = sorted((folder / "blip2").iterdir())
    path = rng.choice((*which, *which, folder / "graconet.safetensors", folder / "photo.png", folder / "mask.png"))
    if path.suffix == ".json" and rng.random() < 0.8:
        text = dump(spoil_tree(json.loads(path.read_text()), rng), rng)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    elif path.suffix == ".safetensors" and rng.random() < 0.5:
        tensors = load_file(path)
        key = rng.choice(sorted(tensors))
        made = rng.choice(
            (
                lambda t: t * math.nan,
                lambda t: t.flatten()[:1],
                lambda t: t.double(),
                lambda t: t[None],
                lambda t: t * 1e30,
            )
        )
        tensors[key] = made(tensors[key]).contiguous()
        if rng.random() < 0.3:
            del tensors[key]
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            about = json.loads(file.read(length)).get("__metadata__", {})
        save_file(
            tensors, path, about if rng.random() < 0.7 else {k: rng.choice((EVIL, "{", "9" * 99, "")) for k in about}
        )
    elif rng.random() < 0.15:
        path.unlink()
    else:
        path.write_bytes(spoil(path.read_bytes(), rng))
    return Case(argv)


def diffusers(rng: random.Random | None, folder: Path) -> Case:
    """A folder of weights by parts: what it lacks, spells or nests otherwise."""
    argv = [
        ["info", "d"],
        ["convert", "d", "out.safetensors", "--config", "tiny.yaml"],
        ["edit", "photo.png", NIGHT, "--config", "tiny.yaml", "--weights", "d", "--device", "cpu"],
    ]
    tensors = load_file(folder / "tiny.safetensors")
    parts = {
        "unet": ("model.diffusion_model.", "diffusion_pytorch_model.safetensors"),
        "vae": ("first_stage_model.", "diffusion_pytorch_model.safetensors"),
        "text_encoder": ("cond_stage_model.transformer.", "model.safetensors"),
    }
    for part, (prefix, name) in parts.items():
        (folder / "d" / part).mkdir(parents=True)
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        save_file(own, folder / "d" / part / name)
    (folder / "d/scheduler").mkdir()
    (folder / "d/scheduler/scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    if rng is None:
        return Case(argv[0])
    files = sorted(path for path in (folder / "d").rglob("*") if path.is_file())
    path = rng.choice(files)
    way = rng.randrange(5)
    if way == 0:
        path.write_bytes(spoil(path.read_bytes(), rng))
    elif way == 1:
        path.unlink()
    elif way == 2:
        table = rng.choice(
            (
                {"weight_map": {"a": "../../../etc/passwd"}},
                {"weight_map": {"a": EVIL}},
                {"weight_map": []},
                {"weight_map": {"a": 1}},
                [],
                {"weight_map": {}},
                {"weight_map": {"a": "x" * 999}},
                {"weight_map": {"a": ""}},
                {"weight_map": {"a": "."}},
            )
        )
        path.rename(path.with_name("other"))
        path.with_name(path.name + ".index.json").write_text(json.dumps(table))
    elif way == 3:
        (folder / "d/scheduler/scheduler_config.json").write_text(
            rng.choice(
                (
                    "[]",
                    "{",
                    EVIL,
                    '{"prediction_type": "v_prediction"}',
                    '{"prediction_type": [1]}',
                    json.dumps({EVIL: EVIL * 999}),
                    "[" * 10**5,
                )
            )
        )
    else:
        prefix = rng.choice(
            (
                "time_embedding.linear_1.weight",
                "down_blocks.0.resnets.0.conv1.weight",
                "up_blocks.99.attentions.0.norm.weight",
                "decoder.up_blocks.0.resnets.0.norm1.weight",
                "up_blocks.x.weight",
                EVIL,
                "mid_block." * 99,
            )
        )
        if path.suffix == ".safetensors":
            own = load_file(path)
            save_file({prefix if i == 0 else key: t for i, (key, t) in enumerate(own.items())}, path)
    return Case(rng.choice(argv))


def imports(rng: random.Random | None, folder: Path) -> Case:
    """Published benchmarks in their own layouts, a cell, an entry or a picture spoiled."""
    files: dict[str, dict[str, bytes | object]] = {  # of each format; a list is a table
        "opa": {
            "test_set.csv": [["fg_id", "bg_id", "position", "label"], ["1", "2", "[1, 2, 20, 20]", "1"]],
            "background/dog/2.jpg": b"photo.png", "foreground/dog/1.jpg": b"photo.png",
            "foreground/dog/mask_1.jpg": b"mask.png"},
        "edival": {
            "oai_instruction_generation_output.csv": [
                ["image_index", "turns", "instructions"], ["0", "3", "['a', 'b', 'c']"]],
            "0_input_raw.png": b"photo.png"},
        "piebench": {
            "mapping_file.json": {"0": {
                "image_path": "0.png", "original_prompt": "a [cat]", "editing_prompt": "a [dog]",
                "editing_instruction": "make it a dog", "mask": [0, 100, 3000, 500]}},
            "annotation_images/0.png": b"large.png"},
        "magicbrush": {
            "edit_sessions.json": {"1": [{"input": "i.png", "mask": "m.png", "output": "i.png", "instruction": NIGHT}]},
            "global_descriptions.json": {"1": {"i.png": "a cat"}},
            "images/1/i.png": b"photo.png", "images/1/m.png": b"hole.png"},
    }  # fmt: skip
    photo = Image.open(folder / "photo.png")
    photo.resize((512, 512)).save(folder / "large.png")
    photo.putalpha(Image.open(folder / "mask.png"))
    photo.save(folder / "hole.png")
    kind = "opa" if rng is None else rng.choice(sorted(files))
    spoiled = None if rng is None else rng.choice([*files[kind], *3 * [n for n in files[kind] if "/" not in n]])
    for name, made in files[kind].items():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(made, list):
            if name == spoiled:
                row = rng.randrange(2) if rng.random() < 0.2 else 1
                made[row][rng.choice((*range(len(made[row])), 2))] = rng.choice(CELLS)
            text = io.StringIO()
            csv.writer(text).writerows(made)
            path.write_text(text.getvalue(), encoding="utf-8", errors="surrogatepass")
        elif isinstance(made, dict):
            text = dump(spoil_tree(made, rng), rng) if name == spoiled else json.dumps(made)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        else:
            shutil.copy(folder / made.decode(), path)
            if name == spoiled:
                path.write_bytes(spoil(path.read_bytes(), rng))
    options = ["--masks"] if rng is not None and kind in ("piebench", "magicbrush") and rng.random() < 0.5 else []
    return Case(["bench", "import", kind, "source", "made", *options], None if rng else False, lines=5)


CELLS = ["", "..", "a/b", "x" * 5000, EVIL, "[1,2]", "[-1,0,5,5]", "[1.5,2,3,4]", "[True,1,1,1]", "nan", "1" * 5000]
CELLS += [f"[{10**30},0,5,5]", f"[0,0,{10**30},5]", f"[0,0,{2**31},{2**31}]", "[900,0,5,5]", "[" * 5000, "9**9**9**9"]
CELLS += ["['a','b','']", "['a',5,'c']", "['\\ud800','b','c']", '__import__("os").system("touch OWNED")']

FIELDS = {make.__name__: make for make in (inside, pages, zips, yamls, folders, diffusers, imports)}
