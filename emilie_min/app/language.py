"""The command's little language: what people type that does not mean what it says, told before anything is done."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..errors import InstructionError, note, printable

FIRST = """emilie edits a picture by instructions, one after another, anywhere or in a mask.

  emilie demo                                four edits of a small scene: a minute, no download
  emilie download                            the released weights, for photos
  emilie edit photo.jpg "make it winter"     writes out/photo_1.png, at the photo's own size
  emilie studio                              the same on a page to paint on

emilie --help lists all commands, emilie edit --help all that an edit can be told."""


def looks_like_a_file(text: str) -> bool:
    return os.sep in text or ends_like_a_picture(text)


def ends_like_a_picture(text: str) -> bool:
    suffix = Path(text).suffix.lower()
    if not suffix:  # as of most words: Pillow's plugins take a while
        return False
    from PIL import Image

    return suffix in Image.registered_extensions()


def is_a_picture(text: str) -> bool:
    """Whether a word is a file, or has the name of a picture and no other words."""
    return os.path.isfile(text) or (" " not in text and ends_like_a_picture(text))


def not_a_command(word: str) -> str | None:
    """What to say of a first word that is a picture."""
    if not is_a_picture(word):
        return None
    name = printable(shlex.quote(word), 100)
    return f'{name} is no command: say `emilie edit {name} "make it winter"`'


def check(instructions: Sequence[str]) -> None:
    """Raises InstructionError where instructions are evidently something else; a lone word is told of."""
    for text in instructions:
        if is_a_picture(text):
            name = printable(text, 100)
            raise InstructionError(
                f"{name} is a file and no instruction: a mask is given as --mask 1={name}, and several pictures as "
                '--batch FOLDER or --batch "*.jpg", with the quotes'
            )
    words = [not text.strip().strip("'\"").count(" ") for text in instructions]
    run = next((i for i in range(len(words) - 1) if words[i] and words[i + 1]), None)
    if run is not None:
        end = next((i for i in range(run, len(words)) if not words[i]), len(words))
        said = printable(" ".join(text.strip().strip("'\"") for text in instructions[run:end]), 100)
        raise InstructionError(
            f"{end - run} instructions of one word each: were quotes forgotten? One edit is written "
            f'"{said}", in double quotes; edits of one word each are done one by one, with --canvas'
        )
    for text, alone in zip(instructions, words):
        if alone:
            note(
                f'"{printable(text, 40)}" is a single word: the model was trained on sentences such as "make it winter"'
            )
