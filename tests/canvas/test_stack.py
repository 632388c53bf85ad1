"""The stack: any edit can be taken back, hidden, moved, weakened or changed, and the others stay, to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image

import emilie_min as emilie
from emilie_min.canvas import stack
from emilie_min.canvas.stack import Walk, kept, layers, support
from emilie_min.emilie import Editor
from emilie_min.errors import CanvasError, EmilieError, InstructionError, MaskError
from emilie_min.sampling import anchor, get_sigmas, noise_stream, sample_euler_ancestral
from emilie_min.toy import world
from emilie_min.toy.judge import judge

FAST = {"steps": 2}
LEFT, RIGHT, TOP = (0, 0, 24, 64), (40, 0, 64, 64), (0, 0, 64, 16)
OTHERS = world.Object("circle", "red", "top right"), world.Object("cross", "purple", "bottom right")
LEFT_CELLS, RIGHT_CELLS = slice(0, 6), slice(10, 16)


class Counting(Editor):
    """An editor that counts its network calls."""

    calls = 0

    def branches(self, *args):
        self.calls += 1
        return super().branches(*args)


@pytest.fixture
def counting(editor):
    return Counting(editor.config, editor.unet, editor.vae, editor.text)


@pytest.fixture
def three(counting):
    """Three edits, of which the first and the second are apart, and the third is about everything."""
    canvas = emilie.open(world.render(world.scene(3)), counting, seed=5)
    canvas.edit("make it night", LEFT, **FAST)
    canvas.edit("turn it into a comic", RIGHT, **FAST)
    canvas.edit("make it day", **FAST)
    counting.calls = 0
    return canvas


def told(canvas):
    return [state.instruction for state in canvas.history]


def test_disjoint_masks_need_no_call_for_each_other(three):
    three.branch(2)
    before, first = three.latent, three.states[0].latent
    three.retract(1)
    assert three.editor.calls == 0 == three.state.made["calls"] and told(three) == ["turn it into a comic"]
    assert torch.equal(three.latent[..., LEFT_CELLS], first[..., LEFT_CELLS])
    assert torch.equal(three.latent[..., 6:], before[..., 6:])
    three.undo()
    three.move(2, 1)
    assert three.editor.calls == 0 and torch.equal(three.latent, before)
    assert told(three) == ["turn it into a comic", "make it night"]
    three.retract(2)
    three.retract(1)
    assert three.editor.calls == 0 and three.stack == [] and torch.equal(three.latent, first)


def test_where_it_never_mattered_nothing_changes_to_the_bit(three):
    before = three.latent
    three.retract(2)
    assert three.state.made["calls"] == 1 == three.editor.calls  # "make it day" again, where the comic was
    assert torch.equal(three.latent[..., :10], before[..., :10])
    assert not torch.equal(three.latent[..., RIGHT_CELLS], before[..., RIGHT_CELLS])
    assert told(three) == ["make it night", "make it day"] and [s.depth for s in three.stack] == [0, 2]


def test_hidden_and_shown_again_is_the_same_to_the_bit(three):
    latent, picture = three.latent, three.image.tobytes()
    three.hide(2)
    assert [state.shown for state in three.stack] == [True, False, True] and len(three.history) == 2
    hidden = three.latent
    three.edit("make it night", TOP, **FAST)
    assert three.state.depth == 3  # a hidden edit keeps its own
    three.undo()
    calls = three.editor.calls
    three.show(2)
    assert three.editor.calls == calls and three.state.made["calls"] == 0
    assert torch.equal(three.latent, latent) and three.image.tobytes() == picture
    three.hide(2)
    assert torch.equal(three.latent, hidden) and three.editor.calls == calls


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (("strength", 1, 0.5), ("strength", 1, 1)),
        (("move", 1, 3), ("move", 3, 1)),
        (("hide", 3), ("show", 3)),
    ],
)
def test_there_and_back_is_the_same_to_the_bit(three, there, back):
    latent = three.latent
    three.change(*there)
    assert not torch.equal(three.latent, latent)
    calls = three.editor.calls
    three.change(*back)
    assert torch.equal(three.latent, latent) and three.editor.calls == calls


def test_replaying_is_what_the_edits_would_have_been_at_their_depths(three, counting):
    three.retract(1, way="replay")
    plain = emilie.open(world.render(world.scene(3)), counting, seed=5)
    for depth, (text, mask) in enumerate([("turn it into a comic", RIGHT), ("make it day", None)], 1):
        settings = emilie.Settings(**FAST).resolve(plain.editor.config.sampling, 5)
        for _ in plain.run(plain.asked([text], [mask], [{}], settings), settings, depth):
            pass
    assert torch.equal(three.latent, plain.latent)
    three.retract(1)
    assert [state.depth for state in three.stack] == [2]  # also of what was made anew


def test_strength_is_the_way_from_before_to_after(three):
    three.branch(1)
    before, after = three.states[0].latent, three.latent
    three.strength(1, 0.25)
    assert torch.allclose(three.latent, before + 0.25 * (after - before), atol=1e-5)
    three.strength(1, 0)
    assert torch.equal(three.latent[..., LEFT_CELLS], before[..., LEFT_CELLS])
    assert three.editor.calls == 0


def test_a_revised_edit_is_made_anew_and_keeps_the_others(three):
    latent = three.latent
    three.revise(2, instruction="turn it into a pastel drawing", text_scale=1.2)
    assert three.stack[1].instruction == "turn it into a pastel drawing" and three.stack[1].depth == 1
    assert three.stack[1].settings["text_scale"] == 1.2 and three.stack[1].mask == three.states[2].mask
    assert torch.equal(three.latent[..., :10], latent[..., :10])
    three.revise(2, mask=TOP)
    assert three.stack[1].mask != three.states[2].mask
    fresh = emilie.open(world.render(world.scene(3)), three.editor, seed=5)
    fresh.edit("make it night", LEFT, **FAST)
    fresh.edit("turn it into a pastel drawing", TOP, text_scale=1.2, **FAST)
    inside = three.states[three.stack[2].parent].latent
    assert torch.equal(inside[..., :4, :], fresh.latent[..., :4, :])


def test_a_change_is_a_state_of_the_tree(three, tmp_path):
    three.retract(2)
    made = three.state.made
    assert (made["change"], made["edit"], made["way"], made["from"]) == ("retract", 2, "support", three.states[3].id)
    three.undo()
    assert three.at == 3
    three.redo()
    three.undo()
    three.branch(1)
    three.edit("turn it into a comic", TOP, **FAST)
    three.hide(1)
    three.save(tmp_path / "a.canvas")
    again = emilie.open(tmp_path / "a.canvas", three.editor)
    for each in (three, again):
        each.show(1)
        each.retract(2)
        each.retract(1)
        each.undo()
    assert torch.equal(again.latent, three.latent) and again.at == three.at and told(again) == told(three)


def test_what_fails_or_is_stopped_changes_nothing(three):
    at, count, latent = three.at, len(three.states), three.latent
    next(stack.change(three, "retract", 2))
    for wrong, error in [
        (lambda: three.retract(0), CanvasError),
        (lambda: three.retract(4), CanvasError),
        (lambda: three.retract("1"), CanvasError),
        (lambda: three.retract(True), CanvasError),
        (lambda: three.show(1), CanvasError),
        (lambda: three.move(1, 4), CanvasError),
        (lambda: three.strength(1, 1.5), CanvasError),
        (lambda: three.strength(1, "much"), EmilieError),
        (lambda: three.hide(1, way="fast"), CanvasError),
        (lambda: three.change("forget", 1), CanvasError),
        (lambda: three.revise(1, instruction=" "), InstructionError),
        (lambda: three.revise(1, mask=(0, 0, 99, 99)), MaskError),
        (lambda: emilie.open(three.states[0].image, three.editor).retract(1), CanvasError),
    ]:
        with pytest.raises(error):
            wrong()
    assert (three.at, len(three.states)) == (at, count) and torch.equal(three.latent, latent)


def test_support_is_where_latents_are_apart_and_a_cell_around():
    a = torch.zeros(1, 4, 6, 6)
    b = a + 0.01
    b[0, 2, 3, 3] = 1
    b[0, 0, 0, 0] = 0.3
    far, near = support(a, b)
    assert far.sum() == 9 and near.sum() == 9 + 4 and far[0, 0, 2:5, 2:5].all() and near[0, 0, :2, :2].all()
    b[..., 4] = 0  # as a mask keeps it
    assert support(a, b)[0].sum() == 6
    b[:, 1] = 0.2
    assert support(a, b)[0].all()  # a little, but nearly everywhere
    assert not support(a, a)[1].any() and support(a, a + 0.02)[1].all()  # little, but everywhere


def test_an_inset_that_was_kept_is_never_drawn_anew(three):
    """It is no edit by its words: its state is all that there is of it."""
    three.states[3].inserted = {"caption": "a day", "boxes": [[0, 0, 64, 64]], "taken": 0, "kept": 0.2}
    before = three.latent
    three.retract(1)
    assert three.editor.calls == 0 and three.state.inserted == three.states[3].inserted
    assert torch.equal(three.latent[..., 6:], before[..., 6:])
    with pytest.raises(CanvasError, match="was kept"):
        three.retract(1, way="replay")
    three.states[3].inserted = {"caption": "a day", "boxes": [[0, 0, 64, 64]], "taken": 0}
    three.branch(3)
    three.retract(1)
    assert three.editor.calls > 0 and three.state.inserted == three.states[3].inserted  # drawn by its words
    three.revise(2, instruction="make it night")
    assert three.state.inserted is None


def test_several_regions_in_a_stack(three):
    three.edit([("make it night", LEFT, {"text_scale": 0.5}), ("make it day", RIGHT)], **FAST)
    latent = three.latent
    three.hide(3)
    three.show(3)
    assert torch.equal(three.latent, latent) and three.state.settings["own"] == [{"text_scale": 0.5}, {}]
    with pytest.raises(CanvasError, match="several"):
        three.revise(4, instruction="make it day")


def test_the_shipped_model_without_the_first_edit(shipped):
    """Sec. 6.3's case: what was covered comes back, and what came after stays."""
    scene = world.scene(5)
    one, other = scene.objects
    canvas = emilie.open(world.render(scene), shipped)
    canvas.edit(f"remove the {one.shape}")
    canvas.edit(f"make the {other.shape} purple")
    before = canvas.latent
    canvas.retract(1)
    assert canvas.state.made["calls"] == 1 and told(canvas) == [f"make the {other.shape} purple"]  # acts it there?
    moved = (canvas.latent != before).any(1)[0]
    assert 0.05 < moved.float().mean() < 0.4
    right = world.Scene(scene.background, scene.style, (one, world.replace(other, colour="purple")))
    assert judge(canvas.image, right).correct
    assert len(Walk(canvas, "support").layers) == len(canvas.states) - 1 and len(layers(canvas)) == 1


def test_what_comes_back_is_given_the_look_that_the_others_have(shipped):
    """Where it was, there was nothing to draw as a comic."""
    scene = world.Scene("grass", "day", (world.Object("star", "pink", "bottom left"), *OTHERS))
    canvas = emilie.open(world.render(scene), shipped)
    canvas.edit("remove the star", world.mask("bottom left"))
    canvas.edit("turn it into a comic")
    canvas.retract(1)
    assert judge(canvas.image, world.replace(scene, style="comic")).correct
    assert canvas.state.made["calls"] == 7


def test_the_picture_stays_where_the_latent_does(counting):
    canvas = emilie.open(world.render(world.scene(3)), counting, seed=5)
    canvas.edit("make it night", LEFT, **FAST)
    canvas.edit("turn it into a comic", RIGHT, keep_background=True, **FAST)
    before = np.asarray(canvas.image)
    canvas.retract(1)
    after, first = np.asarray(canvas.image), np.asarray(canvas.states[0].image)
    assert (after[:, 42:] == before[:, 42:]).all() and (after[:, :40] == first[:, :40]).all()  # which that kept
    canvas.branch(1)
    canvas.edit("turn it into a comic", RIGHT, **FAST)
    before = np.asarray(canvas.image)
    canvas.strength(1, 0.5)
    after = np.asarray(canvas.image)
    assert (after[:, 24:] == before[:, 24:]).all() and (after[:, :24] != before[:, :24]).any()


def test_the_rest_of_a_picture_is_shifted_by_the_tint_it_is_apart():
    old = Image.new("RGB", (16, 16), (100, 150, 200))
    new = Image.new("RGB", (16, 16), (90, 155, 200))
    state, latent = emilie.canvas.state.State("", torch.zeros(1, 4, 4, 4), old), torch.zeros(1, 4, 4, 4)
    latent[..., 0, 0] = 1
    new.paste((10, 20, 30), (0, 0, 2, 2))
    out = kept(new, latent, state)
    assert out.getpixel((0, 0)) == (20, 15, 30) and out.getpixel((9, 9)) == (100, 150, 200)
    assert kept(new, latent + 2, state) is new


def test_scrubbed_is_a_whole_edit_that_changes_at_that_step(counting):
    """Against Euler's steps written out: the first half of one edit, the second of another."""
    canvas = emilie.open(world.render(world.scene(3)), counting, seed=5)
    canvas.edit("make it night", steps=4, text_scale=3.0)
    counting.calls = 0
    canvas.scrub(1, 0.5, text_scale=1.0, mask=LEFT)
    assert counting.calls == 2 == canvas.state.made["calls"]

    def settings(scale):
        return emilie.Settings(steps=4, text_scale=scale).resolve(counting.config.sampling, 5)

    def denoiser(scale):
        return canvas.denoiser(
            canvas.z_img, canvas.asked(["make it night"], [None], [{}], settings(scale)), settings(scale)
        )

    mask, source = canvas.read_mask(LEFT)[1], canvas.states[0].latent
    draw, sigmas = noise_stream(tuple(source.shape), 5, "edit", 0), get_sigmas(4, counting.alphas_cumprod)
    *_, early = zip(range(3), sample_euler_ancestral(denoiser(3.0), canvas.z_init * sigmas[0].item(), sigmas, draw))
    draw = noise_stream(tuple(source.shape), 5, "edit", 0)
    draw(), draw()
    *_, last = sample_euler_ancestral(denoiser(1.0), early[1].x, sigmas[2:], draw, anchor(mask, source))
    assert torch.equal(canvas.latent, torch.where(mask == 0, source, last.x))


def test_a_scrubbed_edit_is_saved_and_made_again_elsewhere(three, tmp_path):
    three.branch(2)
    three.scrub(2, 0.5, text_scale=1.1)
    three.save(tmp_path / "a.canvas")
    again = emilie.open(tmp_path / "a.canvas", three.editor)
    for canvas in (three, again):
        canvas.retract(1, way="replay")
    assert torch.equal(three.latent, again.latent) and three.state.made["calls"] == 4 - 1
    with pytest.raises(CanvasError, match="steps cannot change"):
        three.scrub(1, 0.5, steps=3)
    for more in ({"sampler": "dpmpp_2m"}, {"reuse": 2}, {"reuse_guidance": 0.5}):
        three.edit("make it day", **more, **FAST)
        with pytest.raises(CanvasError, match="euler_ancestral that reuses nothing"):
            three.scrub(len(three.stack), 0.5, text_scale=1.1)
