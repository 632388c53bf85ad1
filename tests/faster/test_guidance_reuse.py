"""Guidance reused: which branches run, and what stands for those that do not."""

import pytest
import torch
from pseudo import error

import emilie_min as emilie
from emilie_min.errors import SamplingError
from emilie_min.faster import guidance_reuse
from emilie_min.faster.guidance_reuse import EVERY, ReusedGuidance
from emilie_min.toy import world

NIGHT, DAY = "make it night", "make it day"
LEFT, RIGHT = (0, 0, 30, 64), (34, 0, 64, 64)


@pytest.fixture
def rows(shipped):
    """Rows of every call of the UNet."""
    seen = []
    with shipped.unet.register_forward_pre_hook(lambda _, given: seen.append(len(given[0]))):
        yield seen


@pytest.mark.parametrize(
    ("instruction", "all_of_them", "asked"), [(NIGHT, 3, 1), ([(NIGHT, LEFT), (DAY, RIGHT)], 4, 2)], ids=["one", "two"]
)
def test_which_branches_run(shipped, edited, rows, instruction, all_of_them, asked):
    edited(shipped, instruction, steps=12, reuse_guidance=0.25)
    after = [all_of_them if i % EVERY == EVERY - 1 else asked for i in range(9)]
    assert rows == [all_of_them] * 3 + after


@pytest.mark.parametrize(("part", "first"), [(0, 1), (0.5, 3), (1, 6)])
def test_the_first_part_runs_in_full(shipped, edited, rows, part, first):
    edited(shipped, steps=6, reuse_guidance=part)
    assert rows[:first] == [3] * first and set(rows[first:-1]) <= {1, 3} and rows.count(1) == {0: 4, 0.5: 3, 1: 0}[part]


def test_at_the_last_part_nothing_changes(shipped, edited):
    assert torch.equal(edited(shipped, steps=4, reuse_guidance=1.0), edited(shipped, steps=4))
    assert not torch.equal(edited(shipped, steps=4, reuse_guidance=0), edited(shipped, steps=4))


def test_where_the_noise_differs_by_as_much_as_before_it_is_exact():
    """Branches whose noise stands off by a constant: what is reused is what they would give."""
    off = {"cond": 0.3, "other": 0.9, "img": -0.2, "null": 0.5}
    calls = []

    def branches(x, sigma, seen, told):
        calls.append(list(seen))
        return [y - sigma * (torch.sin(y) + off[which]) for y, which in zip(x, seen)]

    null, text, other = torch.zeros(1), torch.ones(1), torch.ones(1)
    given = ["cond", "other", "img", "null"], [text, other, null, null]
    reused = ReusedGuidance(branches, null, full=1)
    draw = torch.Generator().manual_seed(0)
    for sigma in (9.0, 4.0, 1.0, 0.1, 0.01):
        x = [torch.randn(2, 3, generator=draw)] * 4
        for y, expected in zip(reused(x, sigma, *given), branches(x, sigma, *given), strict=True):
            assert torch.allclose(y, expected, atol=1e-5)
    assert calls[2::2] == [["cond", "other"]] * 3 + [given[0]]


def test_branches_that_are_all_told_something_run_as_they_are():
    null, text = torch.zeros(1), torch.ones(1)
    reused = ReusedGuidance(lambda x, sigma, seen, told: [len(told)], null, full=0)
    assert reused([0, 0], 1.0, [0, 0], [text, text]) == [2]
    assert reused([0], 1.0, [0], [null]) == [1]


@pytest.mark.parametrize(
    "settings",
    [
        {"image_scale": 1.0},
        {"mask": LEFT, "gate": "guidance"},
        {"mask": LEFT, "keep_background": True},
        {"guidance_interval": (0.4, 4.0)},
        {"reuse": 2},
        {"sampler": "dpmpp_2m"},
    ],
    ids=str,
)
def test_with_every_step_fresh_it_is_the_edit_itself(shipped, fast, edited, monkeypatch, settings):
    monkeypatch.setattr(guidance_reuse, "EVERY", 1)
    for editor in (shipped, fast):
        apart = error(edited(editor, steps=6, reuse_guidance=0, **settings), edited(editor, steps=6, **settings))
        assert apart <= 1e-6


def test_the_fast_path_reuses_the_same(shipped, fast, edited):
    for settings in ({}, {"image_scale": 1.0}, {"instruction": [(NIGHT, LEFT), (DAY, RIGHT)]}):
        each = [edited(editor, steps=8, reuse_guidance=0.25, **settings) for editor in (shipped, fast)]
        assert error(*each) <= 1e-5


SCALES = {"text_scale": 1.5, "image_scale": 1.2}  # with both at 1 there is no guidance to reuse


def test_it_stays_near_full_guidance(shipped, edited):
    full = edited(shipped, steps=24, **SCALES)
    apart = [error(edited(shipped, steps=24, reuse_guidance=part, **SCALES), full) for part in (0.75, 0.5, 0.0)]
    assert 0 < apart[0] < 0.02 and max(apart) < 0.05


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), "half", (0.5, 1)])
def test_what_is_no_part_of_the_steps(shipped, wrong):
    canvas = emilie.open(world.render(world.scene(3)), shipped)
    with pytest.raises(SamplingError, match="reuse_guidance"):
        canvas.edit(NIGHT, reuse_guidance=wrong)
    assert len(canvas.states) == 1


def test_a_state_records_it(shipped, tmp_path):
    canvas = emilie.open(world.render(world.scene(3)), shipped)
    canvas.edit(NIGHT, steps=2, reuse_guidance=0.5)
    canvas.save(tmp_path / "s.safetensors")
    assert emilie.open(tmp_path / "s.safetensors", shipped).state.settings["reuse_guidance"] == 0.5
