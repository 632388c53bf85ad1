"""The toy world keeps its own rules, and its judge accepts the right picture and no other."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from emilie_min.config import load_config
from emilie_min.toy.judge import TOLERANCE, judge, psnr, read
from emilie_min.toy.world import (
    BACKGROUNDS,
    CAPTION_VOCABULARY,
    COLOURS,
    HELD_OUT,
    KINDS,
    PLACES,
    SHAPES,
    SIZE,
    STYLES,
    VOCABULARY,
    Object,
    Scene,
    caption,
    chain,
    instruct,
    instructions,
    mask,
    pixels,
    possible,
    render,
    scene,
    twins,
)

TEXTS = set(instructions())


def pairs(s):
    return [(o.colour, o.shape) for o in s.objects]


def check(s):
    assert s.background in BACKGROUNDS and s.style in STYLES and 1 <= len(s.objects) <= 4
    for part in ("shape", "colour", "place"):
        assert len({getattr(o, part) for o in s.objects}) == len(s.objects)
    assert [o.place for o in s.objects] == [p for p in PLACES if p in {o.place for o in s.objects}]
    assert all(abs(o.dx) <= 2 and abs(o.dy) <= 2 for o in s.objects)


def varied(n):
    """Scenes of 1 to 4 objects in every style, with and without held-out pairs."""
    for i in range(n):
        first, steps = chain(i, i % 4, held_out=i % 8 > 3)
        yield replace(steps[-1][1] if steps else first, style=STYLES[i % 4])


# ---- world


@pytest.mark.parametrize("seed", [0, 1, -1, -(10**30), 2**64, 10**100])
def test_any_integer_is_a_seed(seed):
    assert scene(seed) == scene(seed) and scene(seed, held_out=True) == scene(seed, held_out=True)
    check(scene(seed))
    assert scene(seed) != scene(seed + 1)
    assert instruct(scene(seed), seed)[:2] == instruct(scene(seed), seed)[:2]


def test_same_in_another_process():
    code = (
        "import zlib; from emilie_min.toy.world import chain, pixels\n"
        "for i in range(-5, 15): first, steps = chain(i, 4); print(first, steps[-1][:2], zlib.crc32(pixels(first)))"
    )
    outs = set()
    for seed in "0", "1":
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
        outs.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert len(outs) == 1 and outs.pop()


def test_scenes_and_chains_obey_the_rules():
    styles = []
    for seed in range(400):
        first, steps = chain(seed, 5)
        styles.append(first.style)
        assert first == scene(seed) and len(first.objects) in (2, 3)
        for s in (first, *(after for _, after, _ in steps)):
            check(s)
            assert not set(pairs(s)) & set(HELD_OUT)
    assert 0.4 < styles.count("day") / len(styles) < 0.6 and set(styles) == set(STYLES)


def test_held_out_scenes_hold_a_held_out_pair():
    seen = set()
    for seed in range(100):
        s = scene(seed, held_out=True)
        check(s)
        assert set(pairs(s)) & set(HELD_OUT)
        seen |= set(pairs(s)) & set(HELD_OUT)
    assert seen == set(HELD_OUT)


def test_held_out_edits_only_on_request():
    made = {held: set() for held in (False, True)}
    for seed in range(300):
        before = scene(seed)
        for held in made:
            for kind in ("add", "recolour", "shape"):
                made[held] |= set(pairs(instruct(before, seed, kind, held)[1])) & set(HELD_OUT)
    assert made == {False: set(), True: set(HELD_OUT)}


@pytest.mark.parametrize("kind", KINDS)
def test_an_instruction_changes_what_it_says_and_nothing_else(kind):
    for seed in range(100):
        before = scene(seed, held_out=bool(seed % 2))
        text, after, where = instruct(before, seed, kind, held_out=bool(seed % 3))
        words = text.split()
        check(after)
        old, new = set(before.objects) - set(after.objects), set(after.objects) - set(before.objects)
        if kind in ("background", "style"):
            part = "background" if kind == "background" else "style"
            assert where is None and after == replace(before, **{part: getattr(after, part)}) != before
            assert getattr(after, part) in words
            continue
        assert (after.background, after.style) == (before.background, before.style)
        assert (len(old), len(new)) == {"add": (0, 1), "remove": (1, 0)}.get(kind, (1, 1))
        o, n = next(iter(old), None), next(iter(new), None)
        assert where.mode == "L" and where.tobytes() == mask((o or n).place).tobytes()
        if o:  # named by its shape alone or by colour and shape
            assert f"the {o.shape}" in text or f"the {o.colour} {o.shape}" in text
        if kind == "recolour":
            assert n == replace(o, colour=n.colour) and words[-1] == n.colour
        elif kind == "shape":
            assert n == replace(o, shape=n.shape) and words[-1] == n.shape
        elif kind == "add":
            assert text == f"add a {n.colour} {n.shape} at the {n.place}" and (n.dx, n.dy) == (0, 0)
        y, x = PLACES[(o or n).place]  # and the pixels outside the mask stay
        changed = (pixels(before) != pixels(after)).any(-1)
        assert changed[y : y + 32, x : x + 32].any() and not changed[np.asarray(where) == 0].any()


def test_all_kinds_come_up():
    texts = [instruct(scene(seed), seed)[0].split()[0] for seed in range(300)]
    assert {t: texts.count(t) > 20 for t in texts} == dict.fromkeys(("make", "add", "remove", "turn", "change"), True)


def test_impossible_or_unknown_kinds_are_refused():
    one = Scene("sand", "day", (Object("circle", "red", "top left"),))
    four = Scene("sand", "day", tuple(map(Object, SHAPES, COLOURS, PLACES)))
    assert set(KINDS) - set(possible(one)) == {"remove"} and set(KINDS) - set(possible(four)) == {"add"}
    with pytest.raises(ValueError, match="'remove' is impossible"):
        instruct(one, 0, "remove")
    with pytest.raises(ValueError, match="'add' is impossible"):
        instruct(four, 0, "add")
    with pytest.raises(ValueError, match="no kind of instruction 'explode'"):
        instruct(one, 0, "explode")


def test_vocabulary_covers_all_instructions():
    texts = set(instructions())
    assert list(VOCABULARY) == sorted({w for t in texts for w in t.split()}) and len(texts) == len(list(instructions()))
    for seed in range(300):
        assert {text for text, _, _ in chain(seed, 4, held_out=bool(seed % 2))[1]} <= texts


def test_nothing_of_the_world_has_changed():
    """Scenes, instructions and pictures are what weights, the demo and benchmark folders were made of."""
    told, drawn = hashlib.sha256(), hashlib.sha256()
    for seed in (*range(-5, 20), *range(10**6, 10**6 + 20), *range(2 * 10**6, 2 * 10**6 + 20)):
        for held_out in (False, True):
            first, steps = chain(seed, 6, held_out)
            told.update(json.dumps([first.to_dict()] + [[text, after.to_dict()] for text, after, _ in steps]).encode())
            drawn.update(pixels(first))
            for _, after, where in steps:
                drawn.update(pixels(after))
                drawn.update(where.tobytes() if where else b"-")
                drawn.update(caption(after).encode())
    assert told.hexdigest() == "9a9851894185ae2df9968aecad6e67cc6a582bd11a7b38286e9e63ef6df59dc1"
    assert drawn.hexdigest() == "17e0132d09f6b31a526142ce44696b3307c0efcc32bbf6c3069bdb9605a667af"


@pytest.mark.parametrize("alike", [True, False])
def test_twins(alike):
    """Two objects of one shape; an instruction is about one of them, and names it as well as words can."""
    for seed in range(200):
        before = twins(seed, alike)
        assert before == twins(seed, alike) and len(before.objects) <= 4
        assert len({o.place for o in before.objects}) == len(before.objects)
        assert not set(pairs(before)) & set(HELD_OUT)
        one, other = (o for o in before.objects if [p.shape for p in before.objects].count(o.shape) == 2)
        assert (one.colour == other.colour) == alike
        assert len(set(pairs(before))) == len(before.objects) - alike
        changed = set()
        for kind in ("recolour", "shape", "remove"):
            text, after, where = instruct(before, seed, kind)
            (gone,) = set(before.objects) - set(after.objects)
            changed.add(gone)
            assert gone in (one, other) and where.tobytes() == mask(gone.place).tobytes()
            assert f"the {gone.colour} {gone.shape}" in text or alike and f"the {gone.shape}" in text
            assert text in TEXTS
        if seed < 20:
            assert read(render(before)).scene == before and judge(pixels(after), after, before).correct
    sizes = {len(twins(seed, alike).objects) for seed in range(200)}
    assert sizes == {2, 3, 4}


def test_the_judge_tells_one_twin_from_the_other():
    for seed in range(6):
        before = twins(seed)
        for kind in ("recolour", "remove"):
            text, after, _ = instruct(before, seed, kind)
            others = (instruct(before, i, kind)[:2] for i in range(99))
            other = next(a for t, a in others if a != after and t.split()[-1] == text.split()[-1])
            assert judge(pixels(after), after, before).correct
            assert not judge(pixels(other), after, before).edited


def test_pictures():
    s = scene(3)
    assert pixels(s).shape == (SIZE, SIZE, 3) and pixels(s).dtype == np.uint8
    assert render(s).mode == "RGB" and np.array_equal(np.asarray(render(s)), pixels(s))
    assert sum(np.asarray(mask(p)).astype(int) for p in PLACES).tolist() == [[255] * SIZE] * SIZE
    assert Scene.from_dict(s.to_dict()) == s and hash(Scene.from_dict(s.to_dict())) == hash(s)


# ---- judge


def test_every_true_picture_is_read_exactly():
    for s in varied(200):
        reading = read(render(s))
        assert reading.scene == s and reading.background_rms == max(reading.place_rms.values()) == 0
        verdict = judge(pixels(s), s)
        assert verdict.correct and verdict.why == "" and verdict.edited is verdict.kept is None


def test_small_damage_is_tolerated():
    rng = np.random.default_rng(0)
    for s in varied(48):
        soft = render(s).filter(ImageFilter.GaussianBlur(0.7))
        assert judge(soft, s).correct
        for shift in (-4, 4):
            noise = 3 * rng.standard_normal((SIZE, SIZE, 3))
            worn = np.clip(np.asarray(soft) + (shift + noise), 0, 255).astype(np.uint8)
            assert judge(worn, s).correct, judge(worn, s).why


def test_large_damage_is_not():
    rng = np.random.default_rng(0)
    for s in varied(48):
        assert not judge(render(s).filter(ImageFilter.GaussianBlur(4)), s).correct
        noise = 15 * rng.standard_normal((SIZE, SIZE, 3))
        assert not judge(np.clip(pixels(s) + noise, 0, 255).astype(np.uint8), s).correct
        assert not judge(Image.new("RGB", (SIZE, SIZE), (128, 128, 128)), s).correct


@pytest.mark.parametrize("kind", KINDS)
def test_the_unedited_picture_and_another_edit_are_wrong(kind):
    for seed in range(25):
        before = scene(seed)
        _, after, _ = instruct(before, seed, kind)
        right = judge(pixels(after), after, before)
        assert right.correct and right.edited and right.kept
        idle = judge(pixels(before), after, before)
        assert not idle.correct and not idle.edited and idle.kept and idle.why
        other = next(a for i in range(99) if (a := instruct(before, i, kind)[1]) != after)
        assert not judge(pixels(other), after, before).edited


def test_an_edit_that_spoils_the_rest_is_edited_but_not_kept():
    for seed in range(25):
        before = scene(seed)
        _, after, _ = instruct(before, seed, "recolour")
        for spoilt in (instruct(after, seed, "background")[1], instruct(after, seed, "style")[1]):
            verdict = judge(pixels(spoilt), after, before)
            assert verdict.edited and not verdict.kept and not verdict.correct


def test_ghosts_and_half_made_edits_are_wrong():
    for seed in range(25):
        before = replace(scene(seed), style="day")
        for kind in ("add", "remove", "recolour"):
            _, after, where = instruct(before, seed, kind)
            ghost = (pixels(after).astype(int) + pixels(before)) // 2
            assert not judge(ghost.astype(np.uint8), after).correct
            half = pixels(after)
            y, x = PLACES[next(p for p in PLACES if mask(p).tobytes() == where.tobytes())]
            half[y : y + 16, x : x + 32] = pixels(before)[y : y + 16, x : x + 32]
            assert not judge(half, after, before).edited


@pytest.mark.parametrize("style", STYLES)
def test_an_object_may_be_off_by_the_tolerance(style):
    o = Object("star", "red", "bottom left", 1, -1)
    s = Scene("water", style, (o, Object("cross", "pink", "top right")))
    for off in range(1, 5):
        moved = replace(s, objects=(replace(o, dx=o.dx - off), s.objects[0]))
        assert judge(pixels(moved), s).correct == (off <= TOLERANCE)
    elsewhere = replace(s, objects=(replace(o, place="top left"), s.objects[0]))
    assert judge(pixels(elsewhere), s).why == "top left is red star, not empty; bottom left is empty, not red star"


def test_psnr_and_bad_pictures():
    a = np.full((SIZE, SIZE, 3), 100, np.uint8)
    assert psnr(a, a) == float("inf") and psnr(a, Image.fromarray(a + 10)) == pytest.approx(28.13, abs=0.01)
    for bad in (a[:32], a / 255):
        with pytest.raises(ValueError, match="expected a uint8 picture"):
            read(bad)


def test_a_caption_names_everything_and_no_more():
    objects = (Object("star", "red", "bottom left", 1, -2), Object("circle", "blue", "top right"))
    text = "a blue circle at the top right and a red star at the bottom left on sand at night"
    assert caption(Scene("sand", "night", objects)) == text
    assert caption(Scene("snow", "pastel", ())) == "on snow as a pastel drawing"
    captions = {caption(s): s for s in (step[1] for seed in range(200) for step in chain(seed, 3)[1])}
    for text, s in captions.items():  # two scenes with one caption differ in positions only
        assert all(word in CAPTION_VOCABULARY for word in text.split())
        assert f"on {s.background}" in text and len(text.split(" and ")) == max(1, len(s.objects))


def test_both_models_know_the_words_in_one_order():
    words = [load_config(name).text.words for name in ("toy", "toy-t2i")]
    assert words[0] == list(VOCABULARY) and words[1] == list(CAPTION_VOCABULARY)
    assert words[1][: len(words[0])] == words[0]
