"""Fixtures: the small model that ships, on the paths that are compared with the plain one."""

import pytest

import emilie_min as emilie
from emilie_min.toy import world


@pytest.fixture(scope="session")
def fast():
    return emilie.load(device="cpu", compile=True)


@pytest.fixture(scope="session")
def edited():
    """The latent of one edit by an editor."""

    def latent(editor, instruction="make it night", **settings):
        canvas = emilie.open(world.render(world.scene(3)), editor, seed=5)
        canvas.edit(instruction, **settings)
        return canvas.latent

    return latent
