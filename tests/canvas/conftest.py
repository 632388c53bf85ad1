"""Fixtures: a canvas of an editor on random weights, which is all that most of a session needs."""

import pytest

import emilie_min as emilie
from emilie_min.toy import world


@pytest.fixture
def canvas(editor):
    return emilie.open(world.render(world.scene(3)), editor, seed=5)
