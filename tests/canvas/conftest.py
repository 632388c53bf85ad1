"""Fixtures: an editor on random weights, which is all that most of a session needs, and a canvas of it."""

import pytest

import emilie_min as emilie
from emilie_min.toy import world


@pytest.fixture(scope="session")
def editor():
    return emilie.load("random", "toy", device="cpu")


@pytest.fixture
def canvas(editor):
    return emilie.open(world.render(world.scene(3)), editor, seed=5)
