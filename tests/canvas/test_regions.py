"""Several instructions in one pass, each in its own mask: the energies add, and nothing else about an edit changes."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import emilie_min as emilie
from emilie_min.canvas import regions
from emilie_min.canvas.settings import Settings
from emilie_min.config import GATES
from emilie_min.errors import InstructionError, MaskError, SamplingError
from emilie_min.sampling import get_sigmas
from emilie_min.toy import world

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


@pytest.fixture
def pointwise(editor):
    editor = copy.copy(editor)
    editor.unet = Pointwise()
    return editor


def open_canvas(editor):
    return emilie.open(world.render(world.scene(3)), editor, seed=5)


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


def test_one_region_is_an_edit_with_one_mask_to_the_bit(canvas):
    ramp = np.tile(np.linspace(0, 1, 64), (64, 1))
    for mask, soft in ((LEFT, False), (ramp, True), (None, False)):
        single, region = (
            canvas.branch(0) and canvas.edit(*args, soft=soft, **FAST) and canvas.state
            for args in ((NIGHT, mask), ([(NIGHT, mask)],))
        )
        assert torch.equal(single.latent, region.latent) and single.image.tobytes() == region.image.tobytes()
        assert region.instruction == NIGHT and region.regions == [] and region.settings == single.settings
        assert single.mask == region.mask


def test_shares_are_a_partition_of_unity():
    masks = torch.rand(3, 1, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    masks[:, ..., 0, :] = 0  # outside
    masks[1:, ..., 1, :] = 0  # the first alone
    shares, union = regions.partition(list(masks))
    assert shares.shape == (3, 1, 1, 6, 5) and torch.equal(union, masks.amax(0))
    assert (shares.sum(0) - 1).abs().max() < 1e-6 and shares.min() >= 0
    assert torch.allclose(shares[..., 2:, :], masks[..., 2:, :] / masks[..., 2:, :].sum(0))
    assert (shares[0, ..., 1, :] == 1).all() and torch.allclose(shares[..., 0, :], torch.tensor(1 / 3))
    alone, union = regions.partition([masks[0]])
    assert (alone == 1).all() and torch.equal(union, masks[0])


def test_everywhere_else_is_the_remainder_and_leaves_no_outside():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2], mask[..., 2] = 1, 0.25
    shares, union = regions.partition([mask, None])
    assert union is None and torch.equal(shares[0], mask) and torch.equal(shares[1], 1 - mask)
    shares, union = regions.partition([None])
    assert union is None and (shares == 1).all()


@torch.no_grad()
def test_the_energies_add(pointwise):
    """The guided latent of a linear network, against the sum written out."""
    b, sigma, text_scale, image_scale = 2, 3.0, 7.5, 1.5
    draw = torch.Generator().manual_seed(1)
    x, z_img = torch.randn(2, b, 4, 6, 5, generator=draw)
    *conds, null = pointwise.context([NIGHT, DAY, COMIC, ""]).split(1)
    shares, _ = regions.partition(list(torch.rand(3, 1, 1, 6, 5, generator=draw)))
    guided = regions.denoiser(pointwise, z_img, conds, null, shares, text_scale, image_scale)(x, sigma)

    z_t = x / (sigma**2 + 1) ** 0.5
    *biases, bias = (context[:, 1:5, 0, None, None] for context in (*conds, null))
    *each, img_cond = (x - sigma * (0.3 * z_t + 0.2 * z_img + c) for c in (*biases, bias))
    uncond = x - sigma * (0.3 * z_t + bias)
    energies = sum(share * (cond - img_cond) for share, cond in zip(shares, each))
    assert torch.allclose(guided, uncond + image_scale * (img_cond - uncond) + text_scale * energies, atol=1e-4)
    assert energies.abs().max() > 0.1
    alone = regions.unguided(pointwise, z_img, conds, shares)(x, sigma)
    assert torch.allclose(alone, sum(share * cond for share, cond in zip(shares, each)), atol=1e-5)


@torch.no_grad()
def test_the_energies_of_a_real_network_add(editor):
    """What several instructions move is the weighted sum of what each one moves alone."""
    x, z_img = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    a, b, null = editor.context([NIGHT, DAY, ""]).split(1)
    shares, _ = regions.partition(list(torch.rand(2, 1, 1, 16, 16, generator=torch.Generator().manual_seed(3))))
    empty, alone_a, alone_b = (editor.denoise(x, 2.0, z_img, c, null, 7.5, 1.5) for c in (null, a, b))
    both = regions.denoiser(editor, z_img, [a, b], null, shares, 7.5, 1.5)(x, 2.0)
    moved = shares[0] * (alone_a - empty) + shares[1] * (alone_b - empty)
    assert moved.abs().max() > 1e-3 and torch.allclose(both - empty, moved, atol=1e-5 * both.abs().max().item())


@pytest.mark.parametrize("each", [[None], [LEFT], [(NIGHT, LEFT), (DAY, RIGHT)]], ids=["free", "mask", "regions"])
def test_guidance_in_an_interval(pointwise, each):
    """Outside it the instructions alone, at the cost of their branches; inside it all as ever."""
    canvas, each = open_canvas(pointwise), each if len(each) > 1 else [(NIGHT, each[0])]
    sigmas = get_sigmas(6, pointwise.alphas_cumprod)[:-1].tolist()
    low, high = sorted(sigmas)[2], sorted(sigmas)[4]  # both ends belong to it
    settings = {"steps": 6, "text_scale": 3.0, "image_scale": 1.5, "guidance_interval": (low, high)}
    seen, n = list(canvas.steps(each, **settings)), len(each)
    assert pointwise.unet.branches == [n + 2 if low <= sigma <= high else n for sigma in sigmas]
    assert pointwise.unet.branches.count(n) == 3
    *conds, null = pointwise.context([text for text, _ in each] + [""]).split(1)
    shares = canvas.read_regions([mask for _, mask in each])[1]
    for step in seen[:-1]:
        alone = regions.unguided(pointwise, canvas.z_img, conds, shares)(step.x, step.sigma)
        guided = regions.denoiser(pointwise, canvas.z_img, conds, null, shares, 3.0, 1.5)(step.x, step.sigma)
        assert torch.allclose(step.denoised, guided if low <= step.sigma <= high else alone, atol=1e-4)


@pytest.mark.parametrize("several", [False, True], ids=["one", "regions"])
def test_the_guidance_gate_holds_outside_the_guidance_interval_too(pointwise, several):
    """Outside the mask an instruction has no effect, at whatever noise level; inside it has."""

    def latent(text):
        each = [(text, LEFT), (text, RIGHT)] if several else [(text, LEFT)]
        settings = {"gate": "guidance", "steps": 4, "text_scale": 3.0, "image_scale": 1.5}
        return latent_of(pointwise, each, guidance_interval=(1.0, 8.0), **settings)

    night, comic = latent(NIGHT), latent(COMIC)
    assert torch.equal(night[..., BETWEEN], comic[..., BETWEEN])
    assert not torch.allclose(night[..., LEFT_CELLS], comic[..., LEFT_CELLS], atol=1e-2)


@pytest.mark.parametrize("gate", GATES)
def test_regions_apart_come_out_as_each_does_alone(pointwise, gate):
    both = latent_of(pointwise, [(NIGHT, LEFT), (COMIC, RIGHT)], gate=gate)
    night, comic = latent_of(pointwise, NIGHT, LEFT, gate=gate), latent_of(pointwise, COMIC, RIGHT, gate=gate)
    assert torch.allclose(both[..., LEFT_CELLS], night[..., LEFT_CELLS], atol=1e-4)
    assert torch.allclose(both[..., RIGHT_CELLS], comic[..., RIGHT_CELLS], atol=1e-4)
    assert torch.allclose(both[..., BETWEEN], night[..., BETWEEN], atol=1e-4)
    assert not torch.allclose(both[..., LEFT_CELLS], comic[..., LEFT_CELLS], atol=1e-2)


def test_each_region_sees_the_others_as_they_were(editor):
    """So with a network that looks everywhere, too, regions apart come out as each does alone."""
    plain = {"text_scale": 1.0, "image_scale": 1.0}
    both = latent_of(editor, [(NIGHT, LEFT), (COMIC, RIGHT)], **plain)
    night, comic = latent_of(editor, NIGHT, LEFT, **plain), latent_of(editor, COMIC, RIGHT, **plain)
    assert torch.allclose(both[..., LEFT_CELLS], night[..., LEFT_CELLS], rtol=1e-3, atol=1e-3)
    assert torch.allclose(both[..., RIGHT_CELLS], comic[..., RIGHT_CELLS], rtol=1e-3, atol=1e-3)


def test_a_region_has_settings_of_its_own(pointwise):
    own = {"text_scale": 2.0, "image_scale": 0.5, "seed": 9, "negative": DAY}
    both = latent_of(pointwise, [(NIGHT, LEFT, own), (COMIC, RIGHT)])
    night, comic = latent_of(pointwise, NIGHT, LEFT, **own), latent_of(pointwise, COMIC, RIGHT)
    assert torch.allclose(both[..., LEFT_CELLS], night[..., LEFT_CELLS], atol=1e-4)
    assert torch.allclose(both[..., RIGHT_CELLS], comic[..., RIGHT_CELLS], atol=1e-4)
    for wrong in ({"steps": 3}, {"text_scale": "much"}, {"negative": " "}, 3):
        with pytest.raises((InstructionError, SamplingError)):
            latent_of(pointwise, [(NIGHT, LEFT, wrong), (COMIC, RIGHT)])


@torch.no_grad()
def test_a_negative_is_subtracted_and_further_ones_weigh(editor):
    """What several energies move is the weighted sum of what each moves alone."""
    canvas = open_canvas(editor)
    x, settings = canvas.z_init * 2, {"steps": 1, "text_scale": 3.0, "image_scale": 1.5}

    def move(**more):
        told = Settings(**settings, **more).resolve(editor.config.sampling, 5)
        asked = canvas.asked([NIGHT], [None], [{}], told)
        return canvas.denoiser(canvas.z_img, asked, told)(x, 2.0)

    *texts, null = editor.context([DAY, COMIC, ""]).split(1)
    a, b, null = (editor.denoise(x, 2.0, canvas.z_img, c, null, 3.0, 1.5) for c in (*texts, null))
    plain = move()
    assert torch.allclose(move(negative=DAY), plain - (a - null), rtol=1e-3, atol=1e-3)
    assert torch.allclose(move(further=[(DAY, 0.5), (COMIC, -2)]), plain + 0.5 * (a - null) - 2 * (b - null), atol=1e-2)
    assert (a - null).abs().max() > 0.05


def test_outside_all_regions_the_anchor_keeps_the_latent_to_the_bit(canvas):
    source = canvas.latent
    for each in ([(NIGHT, LEFT), (DAY, RIGHT)], [(COMIC, RIGHT), (NIGHT, LEFT)]):
        canvas.edit(each, **FAST)
        assert torch.equal(canvas.latent[..., BETWEEN], source[..., BETWEEN])
    for cells in (LEFT_CELLS, RIGHT_CELLS):
        assert not torch.equal(canvas.latent[..., cells], source[..., cells])


@pytest.mark.parametrize("gate", GATES)
def test_one_instruction_in_every_region_is_that_instruction_in_their_union(pointwise, gate):
    grey = area(16, 0, 48, 64, 120)
    regions = latent_of(pointwise, [(NIGHT, LEFT), (NIGHT, grey)], soft=True, gate=gate)
    union = Image.fromarray(np.maximum(LEFT, grey))
    assert torch.allclose(regions, latent_of(pointwise, NIGHT, union, soft=True, gate=gate), rtol=1e-3, atol=1e-3)


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
    assert np.array_equal(canvas.edited_mask(), np.maximum(LEFT, RIGHT))


def test_a_state_tells_its_regions(canvas):
    canvas.edit([(NIGHT, LEFT), (COMIC, (40, 0, 64, 64))], **FAST)
    assert canvas.state.instruction == "make it night + turn it into a comic"
    assert [text for text, _ in canvas.state.regions] == [NIGHT, COMIC]
    assert [np.array_equal(mask, m) for (_, mask), m in zip(canvas.state.regions, (LEFT, RIGHT))] == [True, True]
    assert np.array_equal(canvas.state.mask, np.maximum(LEFT, RIGHT))
    canvas.edit([(NIGHT, LEFT), (DAY, None)], **FAST)
    assert canvas.state.mask is None and canvas.state.regions[1] == (DAY, None)


@pytest.mark.parametrize(
    ("instruction", "mask", "error"),
    [
        ("", None, InstructionError),
        ("  ", None, InstructionError),
        (None, None, InstructionError),
        ([], None, InstructionError),
        ([NIGHT, DAY], None, InstructionError),
        ((NIGHT, LEFT), None, InstructionError),
        ([3], None, InstructionError),
        (["ab"], None, InstructionError),
        ([(NIGHT, LEFT), (DAY,)], None, InstructionError),
        ([(NIGHT, LEFT), (" ", RIGHT)], None, InstructionError),
        ([(LEFT, NIGHT)], None, InstructionError),
        ([(NIGHT, LEFT)], RIGHT, MaskError),
    ],
)
def test_what_is_no_instruction(instruction, mask, error):
    with pytest.raises(error):
        regions.read(instruction, mask, allow_empty=False)


def test_an_empty_instruction_where_it_is_allowed(canvas):
    assert regions.read("", None, allow_empty=True) == ([""], [None], [{}])
    canvas.edit("", allow_empty=True, **FAST)
    assert canvas.state.instruction == ""


@pytest.mark.parametrize(
    ("each", "match"),
    [
        ([(NIGHT, LEFT), (DAY, None), (COMIC, None)], "only one"),
        ([(NIGHT, (0, 0, 64, 64)), (DAY, None)], "nothing is left"),
    ],
)
def test_masks_that_leave_an_instruction_nothing(canvas, each, match):
    with pytest.raises(MaskError, match=match):
        canvas.edit(each, **FAST)


def test_a_background_needs_an_outside(canvas):
    with pytest.raises(MaskError, match="every instruction"):
        canvas.edit([(NIGHT, LEFT), (DAY, None)], keep_background=True, **FAST)
