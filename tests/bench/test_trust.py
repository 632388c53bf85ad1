"""What scores are worth: statistics against closed forms, and the small world's own CLIP and BLIP-2."""

from types import SimpleNamespace

import numpy as np
import pytest

from emilie_min.bench import trust
from emilie_min.bench.metrics import BlipScorer, ClipScorer
from emilie_min.loading import shipped
from emilie_min.toy import words, world


def row(method, item, made, score, text="make it night", turn=1):
    values = {"edited": made, "correct": made, "clip": score}
    turns = [SimpleNamespace(instruction=text)] * turn
    item = SimpleNamespace(id=item, turns=turns)
    return SimpleNamespace(method=method, seed=0, item=item, turn=turn, state="done", values=values)


def cells(table, name):
    return next(dict(zip(table.columns, row)) for row in table.rows if row[0] == name)


def test_what_differs_between_instructions_drops_out_of_pairs():
    """Item 2's scores are all higher; within each item the edit that was made scores higher in 3 of 4 pairs."""
    rows = [row("a", "1", True, 0.2), row("b", "1", False, 0.1), row("c", "1", False, 0.1)]
    rows += [row("a", "2", True, 0.7), row("b", "2", False, 0.9), row("c", "2", False, 0.6)]
    _, _, (ranks, overall, kinds) = trust.trust(["a", "b", "c"], rows)
    got = cells(overall, "CLIP score")
    assert got["edits"] == 6 and got["pairs within"].mean == 0.75 and got["pairs within"].low <= 0.75
    right, wrong = [0.2, 0.7], [0.1, 0.1, 0.9, 0.6]
    assert got["AUC, pooled"].mean == np.mean([r > w for r in right for w in wrong])
    assert got["correlation, pooled"].mean == pytest.approx(
        np.corrcoef([1, 0, 0] * 2, [0.2, 0.1, 0.1, 0.7, 0.9, 0.6])[0, 1]
    )
    assert cells(kinds, "style")["CLIP score"].mean == 0.75 and cells(kinds, "style")["pairs"] == 4
    assert cells(kinds, "add")["CLIP score"] is None
    assert [r[0] for r in ranks.rows] == ["a", "b", "c", "rank correlation with edited"]
    assert ranks.rows[-1][-1].mean == pytest.approx(trust.spearman([1, 0, 0], [0.45, 0.5, 0.35]))


def test_ties_count_half_and_what_never_varies_is_left_empty():
    assert trust.auc(np.array([1.0]), np.array([1.0, 0.0])) == 0.75
    _, _, (_, overall, _) = trust.trust(["a"], [row("a", "1", True, 0.5), row("a", "2", True, 0.5)])
    assert overall.rows[0][2:] == (None,) * 4
    assert trust.trust(["a"], [SimpleNamespace(state="done", values={"clip": 0.5})])[2] == []


def test_claims_of_instructions_hold_after_them_and_of_nothing_else():
    for i in range(60):
        before = world.scene(i)
        text, after, _ = world.instruct(before, i)
        claim = words.asked(text)
        assert words.holds(claim, after) and words.kind(text) in world.KINDS
        assert not words.holds(claim, before), text
        seen = words.said(world.caption(after))
        assert seen is not None and world.caption(seen) == world.caption(after) and words.holds(claim, seen)
    for wrong in ("", "a red circle", "a red circle at the top left", "a red kite at the top left on sand by day"):
        assert words.said(wrong) is None


def folder(name):
    return shipped(f"{name}/config.json").parent


@pytest.fixture(scope="module")
def clip():
    return ClipScorer(folder("toy-clip"))


def test_the_small_clips_tell_captions_and_one_of_them_instructions(clip):
    scenes = [world.scene(60_000_500 + i) for i in range(24)]
    texts = [world.caption(s) for s in scenes]
    before = world.scene(60_000_900)
    gone = [(o, f"remove the {o.colour} {o.shape}") for o in before.objects]
    for name, right in (("toy-clip", True), ("toy-clip-captions", False)):
        clip = ClipScorer(folder(name))
        best = (clip.image([world.render(s) for s in scenes]) @ clip.text(texts).T).argmax(1)
        assert best.tolist() == list(range(24))
        for o, text in gone:  # "remove the star" is near pictures of stars, to a CLIP that saw captions alone
            after = world.Scene(before.background, before.style, tuple(x for x in before.objects if x is not o))
            scores = [clip.clip_score(world.render(s), text) for s in (after, before)]
            assert (scores[0] > scores[1]) == right, (name, text)


def test_the_small_blip2_is_one_of_the_scorers(clip):
    blip = BlipScorer(clip, folder("toy-blip2"))
    before = world.scene(60_000_600)
    text, after, _ = world.instruct(before, 1, "background")
    assert blip.captions([world.render(after)]) == [world.caption(after)]
    assert [blip.borne_out(world.render(s), text) for s in (after, before)] == [True, False]
    assert blip.borne_out(world.render(after), "make it winter") is None
