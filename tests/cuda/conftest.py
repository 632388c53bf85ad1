"""What needs a CUDA card, in one command: `pytest tests/cuda`, under two minutes on a card and skipped without one.

EMILIE_TEST_DEVICE=cpu rehearses the same tests where there is no card: what they ask of the code, not of the card.
"""

import functools
import os
import warnings

import pytest
import torch

import emilie_min as emilie
from emilie_min.toy import world

DEVICE = os.environ.get("EMILIE_TEST_DEVICE", "cuda")
PATHS = {
    "plain": {"plain": True},
    "default": {},  # CUDA graphs
    "compiled": {"compile": True},
    "low memory": {"low_memory": True},
}


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            if "/cuda/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def half() -> str:
    """The dtype of 16 bits that the device is quick at."""
    return "bfloat16" if DEVICE == "cpu" else "float16"


@pytest.fixture(scope="session")
def load():
    """The small model on a path and in a dtype, loaded once; `again`: another one of the same."""

    @functools.cache
    def editor(path: str, dtype: str, again: int = 0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that compiling takes a while
            return emilie.load(device=DEVICE, dtype=dtype, **PATHS[path])

    return editor


@pytest.fixture(scope="session")
def chain():
    """A canvas after three edits: free, in a mask, in two regions."""

    def edited(editor, size=(64, 64), **settings):
        width, height = size
        left, right = (0, 0, width // 2, height), (width // 2, 0, width, height)
        picture = world.render(world.scene(3)).resize(size)
        canvas = emilie.open(picture, editor, seed=5, resolution="native")
        settings = {"steps": 4, "text_scale": 2.0, "image_scale": 1.5} | settings
        for each in ("make it night", [("make it day", left)], [("make it night", left), ("make it day", right)]):
            canvas.edit(each, **settings)
        return canvas

    return edited


@pytest.fixture(scope="session")
def on_the_cpu(shipped, chain):
    """The same chain by the plain path on the CPU in float32, computed once for each setting."""

    @functools.cache
    def canvas(size=(64, 64), **settings):
        return chain(shipped, size, **settings)

    return canvas
