"""Ten times kill -9; `python -m tests.fuzz.kill` does it a hundred times."""

import pytest

from . import kill
from .kinds import prepare


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("clean"))


@pytest.mark.parametrize("work", kill.WORKS, ids=[work.__name__ for work in kill.WORKS])
def test_what_was_finished_is_there_and_what_goes_on_is_the_same(work, clean):
    kill.run(work, clean, 1 if work in (kill.a_stack, kill.a_batch) else 2, 3)  # twelve times
