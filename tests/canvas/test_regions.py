"""Several instructions in one pass, each in its own mask: the energies add, and nothing else about an edit changes."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import MODEL, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import emilie_min as emilie
from emilie_min import sampling
from emilie_min.canvas.settings import GATES
from emilie_min.errors import CanvasError, InstructionError, MaskError
from emilie_min.toy import evaluate, world

FAST = {"steps": 2}
NIGHT, DAY, COMIC = "make it night", "make it day", "turn it into a comic"


class Pointwise(nn.Module):
    """A network whose noise prediction is linear and looks at one cell alone; it counts the branches it is given."""

    in_channels, num_downsamples = 8, 1

    def __init__(self):
        super().__init__()
        self.branches = []

    def forward(self, x, t, context):
        self.branches.append(len(x))
        return 0.3 * x[:, :4] + 0.2 * x[:, 4:] + context[:, 1:5, 0, None, None]


@pytest.fixture(scope="module")
def editor():
    return emilie.load("random", "toy", device="cpu")


@pytest.fixture
def pointwise(editor):
    editor = copy.copy(editor)
    editor.unet = Pointwise()
    return editor


@pytest.fixture
def canvas(editor):
    return open_canvas(editor)


def open_canvas(editor):
    return editor.open(world.render(world.scene(3)), seed=5)


def area(x0: int, y0: int, x1: int, y1: int, value: int = 255) -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(value, (x0, y0, x1, y1))
    return mask


LEFT, MIDDLE, RIGHT = area(0, 0, 24, 64), area(16, 0, 48, 64), area(40, 0, 64, 64)  # cells 0-5, 4-11, 10-15 of a row
LEFT_CELLS, RIGHT_CELLS, BETWEEN = slice(0, 6), slice(10, 16), slice(6, 10)


def latent_of(editor, *args, **settings) -> torch.Tensor:
    canvas = open_canvas(editor)
    canvas.edit(*args, **{**FAST, **settings})
    return canvas.latent


def test_one_region_is_an_edit_with_one_mask_to_the_bit(editor, canvas):
    ramp = np.tile(np.linspace(0, 1, 64), (64, 1))
    for gate in GATES:
        for mask, soft in ((LEFT, False), (ramp, True), (None, False)):
            single, region = (
                canvas.branch(0) and canvas.edit(*args, gate=gate, soft=soft, **FAST) and canvas.state
                for args in ((NIGHT, mask), ([(NIGHT, mask)],))
            )
            assert torch.equal(single.latent, region.latent) and single.image.tobytes() == region.image.tobytes()
            assert region.instruction == NIGHT and region.regions == [] and region.settings == single.settings
            assert single.mask == region.mask


def test_shares_are_a_partition_of_unity():
    masks = torch.rand(3, 1, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    masks[:, ..., 0, :] = 0  # outside
    masks[1:, ..., 1, :] = 0  # the first alone
    shares, union = sampling.partition(list(masks))
    assert shares.shape == (3, 1, 1, 6, 5) and torch.equal(union, masks.amax(0))
    assert (shares.sum(0) - 1).abs().max() < 1e-6 and shares.min() >= 0
    assert torch.allclose(shares[..., 2:, :], masks[..., 2:, :] / masks[..., 2:, :].sum(0))
    assert (shares[0, ..., 1, :] == 1).all() and torch.allclose(shares[..., 0, :], torch.tensor(1 / 3))
    alone, union = sampling.partition([masks[0]])
    assert (alone == 1).all() and torch.equal(union, masks[0])


def test_everywhere_else_is_the_remainder_and_leaves_no_outside():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2], mask[..., 2] = 1, 0.25
    shares, union = sampling.partition([mask, None])
    assert union is None and torch.equal(shares[0], mask) and torch.equal(shares[1], 1 - mask)
    shares, union = sampling.partition([None])
    assert union is None and (shares == 1).all()


@torch.no_grad()
def test_the_energies_add(pointwise):
    """The guided latent of a linear network, against the sum written out."""
    b, sigma, text_scale, image_scale = 2, 3.0, 7.5, 1.5
    draw = torch.Generator().manual_seed(1)
    x, z_img = torch.randn(2, b, 4, 6, 5, generator=draw)
    context = pointwise.context([NIGHT, DAY, COMIC, ""])
    weights, _ = sampling.partition(list(torch.rand(3, 1, 1, 6, 5, generator=draw)))
    guided = pointwise.denoise(x, sigma, z_img, context[:3], context[3:], text_scale, image_scale, weights)

    z_t = x / (sigma**2 + 1) ** 0.5
    bias = context[:, 1:5, 0, None, None]
    *conds, img_cond = (x - sigma * (0.3 * z_t + 0.2 * z_img + c) for c in bias)
    uncond = x - sigma * (0.3 * z_t + bias[3])
    energies = sum(w * (cond - img_cond) for w, cond in zip(weights, conds))
    assert torch.allclose(guided, uncond + image_scale * (img_cond - uncond) + text_scale * energies, atol=1e-4)
    assert energies.abs().max() > 0.1


@torch.no_grad()
def test_the_energies_of_a_real_network_add(editor):
    """What several instructions move is the weighted sum of what each one moves alone."""
    x, z_img = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    a, b, uncond = editor.context([NIGHT, DAY, ""]).split(1)
    weights, _ = sampling.partition(list(torch.rand(2, 1, 1, 16, 16, generator=torch.Generator().manual_seed(3))))
    empty, alone_a, alone_b = (editor.denoise(x, 2.0, z_img, c, uncond, 7.5, 1.5) for c in (uncond, a, b))
    both = editor.denoise(x, 2.0, z_img, torch.cat([a, b]), uncond, 7.5, 1.5, weights)
    moved = weights[0] * (alone_a - empty) + weights[1] * (alone_b - empty)
    assert moved.abs().max() > 1e-3 and torch.allclose(both - empty, moved, atol=1e-5 * both.abs().max().item())


@pytest.mark.parametrize("gate", GATES)
def test_regions_apart_come_out_as_each_does_alone(pointwise, gate):
    both = latent_of(pointwise, [(NIGHT, LEFT), (COMIC, RIGHT)], gate=gate)
    night, comic = latent_of(pointwise, NIGHT, LEFT, gate=gate), latent_of(pointwise, COMIC, RIGHT, gate=gate)
    assert torch.allclose(both[..., LEFT_CELLS], night[..., LEFT_CELLS], atol=1e-4)
    assert torch.allclose(both[..., RIGHT_CELLS], comic[..., RIGHT_CELLS], atol=1e-4)
    assert torch.allclose(both[..., BETWEEN], night[..., BETWEEN], atol=1e-4)
    assert not torch.allclose(both[..., LEFT_CELLS], comic[..., LEFT_CELLS], atol=1e-2)


def test_outside_all_regions_the_anchor_keeps_the_latent_to_the_bit(canvas):
    source = canvas.latent
    for regions in ([(NIGHT, LEFT), (DAY, RIGHT)], [(COMIC, RIGHT), (NIGHT, LEFT)]):
        canvas.edit(regions, **FAST)
        assert torch.equal(canvas.latent[..., BETWEEN], source[..., BETWEEN])
    for cells in (LEFT_CELLS, RIGHT_CELLS):
        assert not torch.equal(canvas.latent[..., cells], source[..., cells])


@pytest.mark.parametrize("gate", GATES)
def test_one_instruction_in_every_region_is_that_instruction_in_their_union(editor, gate):
    grey = area(16, 0, 48, 64, 120)
    regions = latent_of(editor, [(NIGHT, LEFT), (NIGHT, grey)], soft=True, gate=gate)
    union = Image.fromarray(np.maximum(LEFT, grey))
    assert torch.allclose(regions, latent_of(editor, NIGHT, union, soft=True, gate=gate), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gate", GATES)
def test_masks_that_are_the_same_share_the_guidance(pointwise, gate):
    both = latent_of(pointwise, [(NIGHT, LEFT), (COMIC, LEFT)], gate=gate)
    each = [latent_of(pointwise, text, LEFT, gate=gate) for text in (NIGHT, COMIC)]
    assert torch.allclose(both, (each[0] + each[1]) / 2, atol=1e-4)


def test_a_mask_within_another_shares_where_both_are_and_no_further(pointwise):
    inner = area(0, 0, 8, 64)
    both = latent_of(pointwise, [(NIGHT, LEFT), (COMIC, inner)])
    night, comic = latent_of(pointwise, NIGHT, LEFT), latent_of(pointwise, COMIC, LEFT)
    assert torch.allclose(both[..., :2], (night + comic)[..., :2] / 2, atol=1e-4)
    assert torch.allclose(both[..., 2:], night[..., 2:], atol=1e-4)


def test_an_instruction_without_a_mask_holds_everywhere_else(pointwise):
    both = latent_of(pointwise, [(NIGHT, None), (COMIC, LEFT)])
    assert torch.allclose(both[..., LEFT_CELLS], latent_of(pointwise, COMIC)[..., LEFT_CELLS], atol=1e-4)
    assert torch.allclose(both[..., 6:], latent_of(pointwise, NIGHT)[..., 6:], atol=1e-4)


@pytest.mark.parametrize("masks", [[None], [LEFT], [LEFT, RIGHT], [LEFT, None], [LEFT, MIDDLE, RIGHT, MIDDLE]])
def test_n_regions_cost_n_plus_2_branches(pointwise, masks):
    canvas = open_canvas(pointwise)
    canvas.edit([(NIGHT, mask) for mask in masks], steps=3)
    assert pointwise.unet.branches == 3 * [len(masks) + 2]


def test_keep_background_keeps_what_is_outside_the_union(canvas):
    before = np.asarray(canvas.image)
    after = np.asarray(canvas.edit([(NIGHT, LEFT), (COMIC, RIGHT)], gate="eq8", keep_background=True, **FAST))
    assert (after[:, 24:40] == before[:, 24:40]).all()
    assert all((after[:, columns] != before[:, columns]).any() for columns in (slice(0, 24), slice(40, 64)))
    assert np.array_equal(canvas.touched(), np.maximum(LEFT, RIGHT))


def test_a_state_tells_its_regions(canvas):
    canvas.edit([(NIGHT, LEFT), (COMIC, (40, 0, 64, 64))], **FAST)
    assert canvas.state.instruction == "make it night + turn it into a comic"
    assert [text for text, _ in canvas.state.regions] == [NIGHT, COMIC]
    assert [np.array_equal(mask, m) for (_, mask), m in zip(canvas.state.regions, (LEFT, RIGHT))] == [True, True]
    assert np.array_equal(canvas.state.mask, np.maximum(LEFT, RIGHT))
    canvas.edit([(NIGHT, LEFT), (DAY, None)], **FAST)
    assert canvas.state.mask is None and canvas.state.regions[1] == (DAY, None)


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        ({"instruction": []}, InstructionError, "one or more"),
        ({"instruction": [NIGHT, DAY]}, InstructionError, r"\[\(instruction, mask\), ...\]"),
        ({"instruction": (NIGHT, LEFT)}, InstructionError, r"\[\(instruction, mask\), ...\]"),
        ({"instruction": [(NIGHT, LEFT), (DAY,)]}, InstructionError, r"\[\(instruction, mask\), ...\]"),
        ({"instruction": [(NIGHT, LEFT), (" ", RIGHT)]}, InstructionError, "empty"),
        ({"instruction": [(LEFT, NIGHT)]}, InstructionError, "not Image"),
        ({"instruction": [(NIGHT, LEFT), ("make it winter", RIGHT)]}, InstructionError, "'winter'"),
        ({"instruction": [(NIGHT, LEFT)], "mask": RIGHT}, MaskError, "its own mask"),
        ({"instruction": [(NIGHT, LEFT), (DAY, area(0, 0, 0, 0))]}, MaskError, "empty"),
        ({"instruction": [(NIGHT, LEFT), (DAY, (0, 0, 1, 64))]}, MaskError, "vanishes"),
        ({"instruction": [(NIGHT, LEFT), (DAY, None), (COMIC, None)]}, MaskError, "only one"),
        ({"instruction": [(NIGHT, (0, 0, 64, 64)), (DAY, None)]}, MaskError, "nothing is left"),
        ({"instruction": [(NIGHT, LEFT), (DAY, None)], "keep_background": True}, MaskError, "every instruction"),
    ],
)
def test_bad_regions_change_nothing(canvas, edit, error, match):
    with pytest.raises(error, match=match):
        canvas.edit(**edit)
    assert len(canvas.states) == 1


def test_a_saved_session_with_regions_goes_on_bit_for_bit(editor, canvas, tmp_path):
    canvas.edit([(NIGHT, LEFT), (DAY, MIDDLE)], **FAST)
    canvas.edit([(COMIC, RIGHT), (NIGHT, None)], **FAST)
    canvas.save(tmp_path / "session.safetensors")
    other = emilie.open_canvas(tmp_path / "session.safetensors", editor)
    for a, b in zip(canvas.states, other.states, strict=True):
        assert torch.equal(a.latent, b.latent) and a.image == b.image and a.mask == b.mask
        assert a.regions == b.regions and a.instruction == b.instruction and a.settings == b.settings
    assert len(other.states[1].regions) == 2 and other.states[2].regions[1] == (NIGHT, None)
    again = [canvas.edit([(DAY, LEFT), (COMIC, RIGHT)], **FAST) for canvas in (canvas, other)]
    assert again[0] == again[1] and torch.equal(canvas.latent, other.latent)
    other.branch(0)
    assert other.edit(other.states[1].regions, **FAST) == canvas.states[1].image  # a record can be followed again


def contents(path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["canvas"]), {key: file.get_tensor(key) for key in file.keys()}


def test_sessions_of_one_mask_are_what_they_were(editor, canvas, tmp_path):
    """An earlier version reads them, and this one reads an earlier version's."""
    canvas.edit(NIGHT, LEFT, **FAST)
    canvas.save(tmp_path / "session.safetensors")
    about, tensors = contents(tmp_path / "session.safetensors")
    assert all(set(state) == {"instruction", "parent", "settings", "f"} for state in about["states"])
    assert set(tensors) == {"z_init", "z_img", "0.latent", "0.image", "1.latent", "1.image", "1.mask"}
    about["states"][1]["settings"] = {"steps": 2}  # what else an earlier file may say is only kept
    metadata = {"format": "emilie canvas 1", "canvas": json.dumps(about)}
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    old = emilie.open_canvas(tmp_path / "old.safetensors", editor)
    assert [state.regions for state in old.states] == [[], []] and old.state.instruction == NIGHT
    assert old.edit([(DAY, LEFT), (NIGHT, RIGHT)], **FAST) == canvas.edit([(DAY, LEFT), (NIGHT, RIGHT)], **FAST)


def test_a_session_whose_regions_are_no_list(editor, canvas, tmp_path):
    canvas.edit([(NIGHT, LEFT), (DAY, RIGHT)], **FAST)
    canvas.save(tmp_path / "session.safetensors")
    about, tensors = contents(tmp_path / "session.safetensors")
    about["states"][1]["regions"] = 3
    metadata = {"format": "emilie canvas 1", "canvas": json.dumps(about)}
    save_file(tensors, tmp_path / "broken.safetensors", metadata)
    with pytest.raises(CanvasError, match="cannot be read"):
        emilie.open_canvas(tmp_path / "broken.safetensors", editor)


def test_the_command_takes_several_regions(photo, editor, capsys):  # noqa: F811
    RIGHT.save("right.png")
    places = ["--box", "1=0,0,24,64", "--also", f"1=right.png:{COMIC}", "--also", f"2=0,0,24,64: {NIGHT}"]
    code, out, err = run("edit", photo, NIGHT, DAY, *places, *MODEL, capsys=capsys)
    assert code == 0 and not err and "photo_2.png" in out
    canvas = editor.open(photo, seed=0)
    for regions in ([(NIGHT, LEFT), (COMIC, RIGHT)], [(DAY, None), (NIGHT, LEFT)]):
        canvas.edit(regions, steps=1)
    written = emilie.open_canvas("out/photo.canvas.safetensors", editor)
    assert [s.regions for s in written.history] == [s.regions for s in canvas.history]
    assert torch.equal(written.latent, canvas.latent)
    strip = np.asarray(Image.open("out/photo_strip.png"))
    ink = (strip == (255, 0, 120)).all(-1)[12:268]  # the outlines, in the row of pictures
    assert [ink[:, x : x + 256].any() for x in (12, 280, 548)] == [False, True, False]
    assert ink[128, 280 : 280 + 96].any() and ink[128, 280 + 160 : 536].any()  # of both regions
    assert not ink[:, 280 + 97 : 280 + 159].any()


def test_the_command_keeps_the_background_of_all_regions(photo, capsys):  # noqa: F811
    regions = ["--box", "1=0,0,24,64", "--also", f"1=40,0,64,64:{COMIC}", "--keep-background"]
    assert run("edit", photo, NIGHT, *regions, *MODEL, capsys=capsys)[0] == 0
    before, after = np.asarray(Image.open(photo)), np.asarray(Image.open("out/photo_1.png"))
    assert (before[:, 24:40] == after[:, 24:40]).all() and (before != after).any()


BAD = {
    "no number": ("0,0,9,9:make it day", "which edit"),
    "nothing behind the number": ("1=", "which edit"),
    "number of nothing": ("3=0,0,9,9:make it day", "no edit 3, only 1 to 2"),
    "no instruction": ("1=0,0,9,9", "where and what"),
    "empty instruction": ("1=0,0,9,9: ", "where and what"),
    "no place": ("1=:make it day", "where and what"),
    "box of three": ("1=0,0,9:make it day", "four whole numbers"),
    "box outside": ("1=0,0,99,99:make it day", "does not lie in"),
    "box without area": ("2=0,0,1,1:make it day", "vanishes"),
    "everything": ("2=0,0,64,64:make it day", "nothing is left"),
    "mask of nothing": ("1=none.png:make it day", "no picture at none.png"),
    "word of nothing": ("2=0,0,24,64:make it winter", "'winter'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_also(name, photo, capsys):  # noqa: F811
    value, message = BAD[name]
    code, _, err = run("edit", photo, NIGHT, DAY, "--also", value, *MODEL, capsys=capsys)
    assert code == 2 and len(err) == 1 and message in err[0], err
    assert not Path("out").exists()  # told before the first edit


def test_help_tells_how_to_write_also(capsys):
    code, out, _ = run("edit", "--help", capsys=capsys)
    assert code == 0 and "--also N=WHERE:INSTRUCTION" in out


def test_two_places_are_two_and_their_truth_is_known():
    for i, (first, second) in enumerate([("add", "remove"), ("remove", "recolour"), ("shape", "add")] * 5):
        scene, after, [(_, here), (_, there)] = evaluate.two_places(evaluate.FIRST + i, first, second)
        changed = np.asarray(world.render(scene), int) != np.asarray(world.render(after), int)
        masks = [np.asarray(mask) > 0 for mask in (here, there)]
        assert not (masks[0] & masks[1]).any() and not changed[~(masks[0] | masks[1])].any()
        assert changed[masks[0]].any() and changed[masks[1]].any()


def test_the_model_that_ships_follows_two_instructions_in_one_pass():
    figures = evaluate.regions(emilie.load(device="cpu"), 2)
    assert figures["one pass"]["right"] >= 0.5  # `emilie toy-eval` measures it on 50
    assert set(figures) == {"scenes", "one pass", "in turn"} and figures["in turn"]["seconds"] > 0
