"""What holds of one function and all values: hypothesis makes those, and makes what fails smaller."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emilie_min.canvas.session import HEAD, RECORD
from emilie_min.canvas.settings import Settings
from emilie_min.checkpoint.schema import Blank, fault, parse
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


@pytest.mark.parametrize(
    ("value", "shape", "found"),
    [
        ({}, dict, None), ([], [int, ...], None), (" ", Blank, None), ([1, 2], [int], None),
        ({"x": 1}, {...: int}, None), ({"a": "x"}, {"a?": int}, "a must be a whole number, not 'x'"),
        ([], [int], "it is empty"), ({}, {...: int}, "it is empty"), (" ", str, "it is empty"),
        ([[]], [[int]], "[0] is empty"), ([" "], [str, ...], "[0] is empty"), ("x", str, None), (1, int | float, None),
        ({"b": 1}, {"a": int}, "it lacks 'a'"), ({"a": "x"}, {"a": int}, "a must be a whole number, not 'x'"),
        ({"a": None}, {"a": int}, "a must be a whole number, not None"), ({"b": 1}, {"a?": int, "b": int}, None),
        ({"a": None, "b": 1}, {"a?": int, "b": int}, None), (True, int, "it must be a whole number, not True"),
        ({"a": {"b": 1}}, {"a": {"b": str}}, "a.b must be a text, not 1"), ([1, "x"], [int], "[1] must be a whole"),
        ({"x y": "z"}, {...: int}, "['x y'] must be a whole number"), (3, [int], "it must be a list, not 3"),
        ({"x": 1}, [int], "it must be a list"), ([1], {...: int}, "it must be an object"),
        (math.nan, float, "it must be a number"), (-math.inf, int | float, "it must be a whole number or a number"),
        (1, str | None, "it must be a text or null"),
    ],
)  # fmt: skip
def test_faults_one_by_one(value, shape, found):
    said = fault(value, shape)
    assert said == found if found is None else said.startswith(found)


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
