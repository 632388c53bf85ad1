"""What holds of one function and all values: hypothesis makes those, and makes what fails smaller."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emilie_min.canvas.session import HEAD, RECORD
from emilie_min.canvas.settings import Settings
from emilie_min.checkpoint.schema import fault, parse
from emilie_min.errors import SamplingError, printable

often = settings(max_examples=60, deadline=None, derandomize=True, database=None)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner), max_leaves=9
)
names = st.sampled_from([name.removesuffix("?") for name in (*RECORD, *HEAD)])


@often
@given(st.text() | values, st.integers(4, 600))
def test_what_is_quoted_is_one_short_line_that_a_terminal_can_show(value, limit):
    told = printable(value, limit)
    assert len(told) <= limit and told.isprintable()


def test_unless_it_is_asked_for_a_line_has_500_characters():
    assert len(printable("x" * 10_000)) == 500


@often
@given(st.dictionaries(names, values) | values)
def test_any_json_has_a_shape_or_a_fault_in_a_line(value):
    for shape in (RECORD, HEAD):
        found = fault(value, shape)
        assert found is None or printable(found) == found or len(found) > 500


@often
@given(values)
def test_json_that_is_read_is_what_was_written_or_a_fault(value):
    text = json.dumps(value)
    try:
        assert parse(text) == value
    except ValueError:
        assert "NaN" in text or "Infinity" in text


@often
@given(st.text(max_size=40))
def test_any_text_is_json_or_a_fault(text):
    try:
        parse(text)
    except ValueError:
        pass


def test_a_name_twice_is_told():
    with pytest.raises(ValueError, match="twice"):
        parse('{"a": 1, "b": {"c": 1, "c": 2}}')


@often
@given(st.sampled_from(["steps", "text_scale", "gate", "seed", "reuse", "guidance_interval", "reuse_guidance"]), values)
def test_a_setting_is_one_or_is_refused(name, value):
    try:
        made = getattr(Settings(**{name: value}), name)
    except SamplingError as error:
        assert "\n" not in printable(error)
    else:
        assert made is None or isinstance(made, str | int | tuple) or math.isfinite(made)
