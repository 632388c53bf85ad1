"""Published benchmarks in their own layouts, read into the one form of `data`.

Each reader says what of the layout is documented and what is inferred. None was tried on the released files, which
are not on this machine: where a layout is other than described, the readers say so and guess nothing.
"""

import ast
import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..checkpoint.schema import fault
from ..errors import BenchError, plain_file, printable, quote
from . import data
from .data import Item, Turn, file_in
from .io import LONGEST, open_picture, read_json

PARTS = ("natural", "generated")
PROMPTS = ("mask-simple", "mask-rich", "full")
POLARITIES = ("white-is-edit", "black-is-edit")
PIE_SIZE = 512  # px a side of all of PIE-Bench's pictures and masks
SESSIONS = {...: [{"input": str, "mask": str, "output": str, "instruction": str}]}
MAPPING = {
    ...: {"image_path": str, "original_prompt": str, "editing_prompt": str, "editing_instruction": str, "mask": list}
}


def import_(format: str, source: str | Path, folder: str | Path, **options) -> str:
    """Write a published benchmark that lies in `source` as a benchmark folder; returns `data.check`'s line.

    format: one of FORMATS; options: those of its reader. Raises BenchError, and then `folder` is as it was.
    """
    if format not in FORMATS:
        raise BenchError(f"no format {format!r}: choose from {', '.join(FORMATS)}")
    return data.write(folder, FORMATS[format](Path(source), **options))


def read_editbench(
    source: str | Path, polarity: str, which: tuple[str, ...] = PARTS, prompt: str = "mask-rich"
) -> Iterator[Item]:
    """EditBench (Wang et al. 2023): one edit a picture, always in a mask.

    Documented by public code that reads it: annotations_natural.csv and annotations_generated.csv with the columns
    aos, prompt_mask-simple, prompt_mask-rich and prompt_full; references_natural/AOS.png, masks_natural/AOS.png, and
    the same for generated. The paper: references are whole pictures, which it uses for automatic metrics too; simple
    and rich prompts describe what belongs into the mask, full ones the whole picture.

    polarity: "white-is-edit" or "black-is-edit". Which of the two the masks have is not documented: look at one.
    which: the parts to read. prompt: the column that becomes the instruction, "mask-simple", "mask-rich" or "full";
    EMILIE does not say which it used, and none of them is an instruction; "mask-rich" is what other public code takes.
    The full prompt becomes the caption. Inferred: that the reference is the picture to edit. It may show already what
    the prompt says, so a method that does nothing can score well. Raises BenchError.
    """
    if polarity not in POLARITIES:
        given = f", not {quote(polarity)}" if polarity else ""
        raise BenchError(f"look at one of the masks, and give --polarity {' or '.join(POLARITIES)}{given}")
    if prompt not in PROMPTS:
        raise BenchError(f"prompt must be one of {', '.join(PROMPTS)}, not {prompt!r}")
    if not which or not set(which) <= set(PARTS):
        raise BenchError(f"which must be of {', '.join(PARTS)}, not {', '.join(which) or 'nothing'}")
    source = Path(source)
    for part in which:
        table = source / f"annotations_{part}.csv"
        for line, row in _rows(table, ("aos", "prompt_full", f"prompt_{prompt}")):
            with located(f"{table}:{line}"):
                name = row["aos"].strip()
                picture = file_in(source, f"references_{part}/{name}.png")
                marked = open_picture(file_in(source, f"masks_{part}/{name}.png")).convert("L")
                size = open_picture(picture).size
                if marked.size != size:
                    raise ValueError(f"the mask is {_px(marked.size)} and the picture {_px(size)}: they must agree")
            mask = marked if polarity == "white-is-edit" else ImageOps.invert(marked)
            mask = mask.point(lambda v: 255 if v >= 128 else 0)
            turn = Turn(row[f"prompt_{prompt}"].strip(), mask, row["prompt_full"].strip())
            yield Item(_id(f"{part}_{name}"), picture, (turn,), meta={"from": "EditBench", "aos": name})


def read_magicbrush(source: str | Path, masks: bool = False) -> Iterator[Item]:
    """MagicBrush (Zhang et al. 2023): chains of edits of photos, each with a mask and a picture of the right result.

    For the release as files, dev or test; the hub's parquet files have another layout. Documented by its authors'
    code: edit_sessions.json is {session: [{input, mask, output, instruction}, ...]} with names of files in
    images/SESSION. By other public code: global_descriptions.json, optional here, is {session: {file: caption}}. By
    its authors in issue 10 of OSU-NLP-Group/MagicBrush: a mask is the picture with what is to be edited made
    transparent, at times of another size. So it is read from the alpha channel, every pixel that is not opaque is
    edited, and it is scaled to the picture; the grey values of such a file mean nothing.

    masks: give them to the methods too; else they are regions, for measuring only. Inferred: a turn whose input is
    not the result of the turn before begins a new chain, whose id is the session's and the turn's number. Raises
    BenchError.
    """
    source = Path(source)
    path, descriptions = source / "edit_sessions.json", source / "global_descriptions.json"
    sessions = read_json(path, SESSIONS, "MagicBrush's sessions")
    captions = read_json(descriptions, {...: dict}, "MagicBrush's captions") if descriptions.exists() else {}
    for session, edits in sessions.items():
        texts, chains = captions.get(session, {}), []
        for i, edit in enumerate(edits, 1):
            with located(f"{path}: session {quote(session)}, edit {i}"):
                names = [edit[part] for part in ("input", "mask", "output")]
                picture, mask, output = (file_in(source, f"images/{session}/{name}") for name in names)
                region = _transparent(mask, open_picture(picture).size)
            caption = texts.get(edit["output"])
            turn = Turn(edit["instruction"].strip(), region if masks else None, caption, region, output)
            if i == 1 or edit["input"] != edits[i - 2]["output"]:
                chains.append((i, picture, texts.get(edit["input"]), []))
            chains[-1][-1].append(turn)
        for i, picture, caption, turns in chains:
            name = _id(session if i == 1 else f"{session}_{i}")
            yield Item(name, picture, tuple(turns), caption, meta={"from": "MagicBrush"})


def read_piebench(source: str | Path, masks: bool = False) -> Iterator[Item]:
    """PIE-Bench (Ju et al. 2024): 700 pictures of 512x512 px, one edit each, with the region that it is about.

    Documented by its authors (README and evaluation/evaluate.py of cure-lab/PnPInversion): mapping_file.json is
    {id: {image_path, original_prompt, editing_prompt, editing_instruction, editing_type_id, blended_word, mask}},
    image_path lies in annotation_images/, and square brackets in a prompt mark what differs. mask is a flat list of
    pairs, start and length of each run of pixels to edit, counted row by row over 512x512; a run that goes past the
    end is cut there. Their decoding then marks the outermost row or column at every side as well, "to avoid annotation
    errors in boundary". The region here has that border, as their figures do.

    masks: give them to the methods too, without that border, which would have them edit a frame; else they are only
    measured with. A region of all pixels is left out: such an edit is about the whole picture. Inferred: pictures of
    another size fit no mask, and are an error. Raises BenchError.
    """
    source = Path(source)
    path = source / "mapping_file.json"
    for key, entry in read_json(path, MAPPING, "PIE-Bench's mapping file").items():
        with located(f"{path}: {quote(key)}"):
            picture = file_in(source, f"annotation_images/{entry['image_path'].strip()}")
            size, expected = open_picture(picture).size, (PIE_SIZE, PIE_SIZE)
            if size != expected:
                raise ValueError(f"{picture.name} is {_px(size)}, but PIE-Bench's masks are over {_px(expected)}")
            mask = _runs(entry["mask"])
        region = mask.copy()
        region[[0, -1]] = region[:, [0, -1]] = 255
        before, after = (re.sub(r"[\[\]]", "", entry[f"{which}_prompt"].strip()) for which in ("original", "editing"))
        local = not region.all()
        turn = Turn(
            entry["editing_instruction"].strip(),
            Image.fromarray(mask) if masks and local and mask.any() else None,
            after,
            Image.fromarray(region) if local else None,
        )
        meta = {"from": "PIE-Bench"} | {k: entry[k] for k in ("editing_type_id", "blended_word") if k in entry}
        yield Item(_id(key), picture, (turn,), before, meta=meta)


def read_edival(source: str | Path) -> Iterator[Item]:
    """EdiVal-Bench (Chen et al. 2025): 572 pictures of 512x512 px, three instructions in turn on each, no masks.

    Documented by the generating script of its authors (EdiVal-Agent): oai_instruction_generation_output.csv with the
    columns image_index, turns and instructions, this one a list as Python writes it; only rows of 3 turns count; the
    pictures of input_images_resize_512.zip are N_input_raw.jpg or .png. Here the archive is unpacked beside the table,
    into input_images_resize_512/ or into the folder itself. Raises BenchError.
    """
    source = Path(source)
    table = source / "oai_instruction_generation_output.csv"
    folders, endings = ("input_images_resize_512/", ""), ("jpg", "png")
    names = [f"{folder}{{}}_input_raw.{ending}" for folder in folders for ending in endings]
    for line, row in _rows(table, ("image_index", "turns", "instructions")):
        if row["turns"].strip() not in ("3", "3.0"):
            continue
        with located(f"{table}:{line}"):
            index = row["image_index"].strip()
            try:
                texts = ast.literal_eval(row["instructions"].strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                texts = None
            if fault(texts, [str]) or len(texts) != 3:
                raise ValueError("instructions must be a list of 3 texts, as Python writes it")
            found = [name.format(index) for name in names if (source / name.format(index)).is_file()]
            picture = file_in(source, found[0] if found else names[0].format(index))
        turns = tuple(Turn(text.strip()) for text in texts)
        yield Item(_id(index), picture, turns, meta={"from": "EdiVal", "image_index": index})


def read_opa(source: str | Path, split: str = "test") -> Iterator[Item]:
    """OPA (Liu et al. 2021): pairs of a background and a cut-out object, with boxes that people judged.

    For `emilie insert`, as the paper's Fig. 8 has it. Documented by GracoNet's authors: background/CATEGORY/ID.jpg,
    foreground/CATEGORY/ID.jpg and beside it mask_ID.jpg, whose ids are unique over categories; train_set.csv and
    test_set.csv with the columns fg_id, bg_id, position, "[x, y, w, h]" in the background, and label, 1 = reasonable.

    split: "test" or "train". One item a pair, with the reasonable boxes in its meta; their union is the region, without
    one it is left out. Inferred: that the object's category is its folder's name, of which the instruction is made for
    methods that need one: "add a dog". Raises BenchError.
    """
    source = Path(source)
    if split not in ("test", "train"):
        raise BenchError(f"split must be test or train, not {split!r}")
    table = source / f"{split}_set.csv"
    files = {which: _by_id(source / which) for which in ("background", "foreground")}
    found: dict[tuple[str, str], list[list[int]]] = {}
    for line, row in _rows(table, ("fg_id", "bg_id", "position", "label")):
        with located(f"{table}:{line}"):
            pair, label = (row["fg_id"].strip(), row["bg_id"].strip()), row["label"].strip()
            try:
                box = ast.literal_eval(row["position"].strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                box = None
            if fault(box, [int]) or len(box) != 4 or min(box) < 0 or min(box[2:]) < 1:
                raise ValueError("position must be [x, y, w, h], four whole numbers")
            if label not in ("0", "1"):
                raise ValueError(f"label must be 0 or 1, not {quote(label)}")
            boxes = found.setdefault(pair, [])
            if label == "1":
                boxes.append(box)
            for which, name in zip(("foreground", "background"), pair):
                if name not in files[which]:
                    raise ValueError(f"there is no {which}/*/{printable(name, 60)}.jpg: unpack the pictures too")
    for (fg, bg), boxes in found.items():
        picture, inset = files["background"][bg], files["foreground"][fg]
        with located(f"{table}: {fg} on {bg}"):
            mask = file_in(source, f"foreground/{inset.parent.name}/mask_{fg}.jpg")
            region = Image.new("L", open_picture(picture).size)
            for x, y, w, h in boxes:
                if x >= region.width or y >= region.height:
                    raise ValueError(f"the box {quote([x, y, w, h])} lies outside of {_px(region.size)}")
                region.paste(255, (x, y, min(x + w, region.width), min(y + h, region.height)))
        category = inset.parent.name.replace("_", " ")
        text = f"add {'an' if category[0].lower() in 'aeiou' else 'a'} {category}"
        meta = {"from": "OPA", "kind": "insert", "reasonable": boxes}
        turn = Turn(text, region=region if boxes and region.getbbox() else None, inset=inset, inset_mask=mask)
        yield Item(_id(f"{fg}_{bg}"), picture, (turn,), meta=meta)


def _by_id(folder: Path) -> dict[str, Path]:
    """OPA's pictures of all categories, by their names without the ending; masks are left out."""
    return {path.stem: path for path in sorted(folder.glob("*/*.jpg")) if not path.stem.startswith("mask_")}


FORMATS = {
    "editbench": read_editbench, "magicbrush": read_magicbrush, "piebench": read_piebench, "edival": read_edival,
    "opa": read_opa,
}  # fmt: skip


@contextmanager
def located(at: str) -> Iterator[None]:
    """Says in the error of what is wrong with an entry where the entry stands."""
    try:
        yield
    except ValueError as error:
        raise BenchError(f"{at}: {printable(error)}") from error


def _runs(pairs: list) -> np.ndarray:
    """PIE-Bench's runs of pixels as a mask, uint8 (512, 512), 255 in every run."""
    if len(pairs) % 2 or not all(type(n) is int and n >= 0 for n in pairs):
        raise ValueError('"mask" must be a list of pairs of whole numbers, start and length of each run')
    mask = np.zeros(PIE_SIZE * PIE_SIZE, np.uint8)
    for start, length in zip(pairs[::2], pairs[1::2]):
        mask[start : start + length] = 255
    return mask.reshape(PIE_SIZE, PIE_SIZE)


def _transparent(path: Path, size: tuple[int, int]) -> Image.Image:
    """White where a picture is not opaque, scaled to `size`."""
    image = open_picture(path)
    if not image.has_transparency_data:
        raise ValueError(f"{path.name} has no transparency, by which MagicBrush's masks mark what to edit")
    alpha = image.convert("RGBA").getchannel("A").point(lambda v: 255 if v < 255 else 0)
    return alpha if alpha.size == size else alpha.resize(size, Image.Resampling.NEAREST)


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} px"


def _id(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _rows(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a table that has these columns, none of them empty."""
    try:
        plain_file(path, LONGEST)
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, restval="")
            rows = [(table.line_num, row) for row in table]
    except OSError as error:
        raise BenchError(f"{path} cannot be read ({error.strerror}): give the folder that holds it") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise BenchError(f"{path} is no table in UTF-8 with commas: {error}") from error
    found = table.fieldnames or ["none"]
    for column in columns:
        if column not in found:
            raise BenchError(f"{path} has no column {column!r}, but: {printable(', '.join(found), 200)}")
        for line, row in rows:
            if not row[column].strip():
                raise BenchError(f"{path}:{line}: {column} is empty: fill it in or remove the row")
    return rows
