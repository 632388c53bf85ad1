"""The fast path against the plain one."""

import copy
import warnings

import pytest
import torch
from pseudo import error

from emilie_min import unet as layers
from emilie_min.emilie import Editor
from emilie_min.faster.fast import FastEditor
from emilie_min.sampling import get_sigmas

SINGLE, CHAINED = 1e-5, 1e-4  # relative errors: of a single pass, of what is guided or a trajectory; float32
TEXT_SCALE, IMAGE_SCALE = 7.5, 1.5
NIGHT, DAY = "make it night", "make it day"
LEFT, RIGHT = (0, 0, 30, 64), (34, 0, 64, 64)


@pytest.fixture(scope="module")
def pair(small_config, networks):
    """The goldens' model: plain, and fast over weights of its own."""
    return Editor(small_config, **networks), FastEditor(small_config, **copy.deepcopy(networks))


@torch.no_grad()
@pytest.mark.parametrize("i", range(3))
def test_fast_denoiser_agrees_with_the_original(pair, goldens, networks, i):
    x, sigma, z_img = goldens[f"denoise.{i}.x"], goldens[f"denoise.{i}.sigma"], goldens["vae.rect.mode"]
    cond, _, null = networks["text"](goldens["text.input_ids"]).split(1)
    denoised = pair[1].denoise(x, sigma, z_img, cond, null, TEXT_SCALE, IMAGE_SCALE)
    assert error(denoised, goldens[f"denoise.{i}.cfg"]) <= CHAINED
    branches = pair[1].branches([x, x, x], sigma, [z_img, z_img, 0 * z_img], [cond, null, null])
    for name, branch in zip(("cond", "img_cond", "uncond"), branches, strict=True):
        assert error(branch, goldens[f"denoise.{i}.{name}"]) <= SINGLE


@torch.no_grad()
@pytest.mark.parametrize("rows", [(0, 0, 1), (0, 0), (0,), (0, 0, 0, 1), (0, 1, 0)])
def test_fast_unet_equals_the_plain_one(pair, rows):
    plain, fast = pair
    draw = torch.Generator().manual_seed(0)
    seen = torch.randn(max(rows) + 1, 8, 16, 24, generator=draw)
    context = torch.randn(len(rows), 77, plain.config.unet.context_dim, generator=draw)
    t = torch.tensor([417.3])
    eps = plain.unet(seen[list(rows)], t.expand(len(rows)), context)
    bias, keys = fast.fast.biases(t, torch.float32)[0], fast.fast.keys(context)
    once, deep = fast.fast(seen, bias, keys, rows, None)
    assert error(once, eps) <= SINGLE
    assert error(fast.fast(seen, bias, keys, rows, deep)[0], eps) <= SINGLE  # the deep layers' own features again
    assert error(fast.unet(seen[list(rows)], t.expand(len(rows)), context), eps) <= SINGLE  # its layers are intact


def test_the_fast_networks_keep_their_keys_and_share_their_memory(shipped, fast):
    assert fast.unet.state_dict().keys() == shipped.unet.state_dict().keys()
    for name, weight in shipped.unet.state_dict().items():
        assert torch.equal(weight, fast.unet.state_dict()[name])
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in fast.unet.parameters()}
    ours = {p.untyped_storage().data_ptr() for p in fast.fast.parameters()}
    assert ours <= storages.keys()
    assert sum(storages.values()) == sum(p.nbytes for p in shipped.unet.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_scale": 1.5},
        {"text_scale": 1, "image_scale": 1},
        {"mask": LEFT, "gate": "guidance", "image_scale": 1.5},
        {"mask": LEFT, "keep_background": True},
        {"instruction": [(NIGHT, LEFT), (DAY, RIGHT)]},
        {"reuse": 3},
        {"sampler": "dpmpp_2m"},
        {"guidance_interval": (0.4, 4.0), "reuse": 2},
    ],
    ids=str,
)
def test_fast_edits_equal_plain_ones(shipped, fast, edited, settings):
    assert error(edited(fast, steps=7, **settings), edited(shipped, steps=7, **settings)) <= SINGLE


@torch.no_grad()
def test_fast_batches_and_noise_levels(shipped, fast):
    draw = torch.Generator().manual_seed(0)
    x, z_img = torch.randn(2, 3, 4, 16, 16, generator=draw)
    cond, _, null = shipped.context([NIGHT, DAY, ""]).split(1)
    for conds, scales in ((cond, (3, 1.5)), (cond.repeat(3, 1, 1), (1, 1)), (cond, (3, 1.0))):
        each = [e.denoise(x, 2.0, z_img, conds, null, *scales) for e in (shipped, fast)]
        assert error(each[1], each[0]) <= SINGLE
    levels = torch.tensor([0.5, 2.0, 8.0])  # one for each row
    assert error(*(e.denoise(x, levels, z_img, cond, null, 3, 1.5) for e in (fast, shipped))) <= SINGLE
    own = [x, x + 1, x]  # branches with an x of their own
    for a, b in zip(*(e.branches(own, 2.0, [z_img] * 3, [cond, null, null]) for e in (fast, shipped)), strict=True):
        assert error(a, b) <= SINGLE


@torch.no_grad()
def test_what_is_kept_of_one_edit_is_not_used_for_another(shipped, fast):
    """Texts, noise levels, sizes and batches change under one editor, and come back."""
    draw = torch.Generator().manual_seed(0)
    cond, other, null = shipped.context([NIGHT, DAY, ""]).split(1)
    for text, sigma, b, side in ((cond, 2.0, 1, 16), (other, 2.0, 1, 16), (other, 0.3, 2, 16), (cond, 2.0, 1, 8)) * 2:
        x, z_img = torch.randn(2, b, 4, side, 16, generator=draw)
        each = [e.denoise(x, sigma, z_img, text, null, 3, 1.5) for e in (fast, shipped)]
        assert error(*each) <= SINGLE


def passes(editor):
    """What `FastUNet` is given, as (pictures' rows, branches), from now on."""
    calls = []
    hook = editor.fast.register_forward_pre_hook(lambda _, given: calls.append((len(given[0]), len(given[3]))))
    return calls, hook


def test_fast_leaves_out_what_cancels_and_runs_once_what_is_the_same(fast, edited):
    calls, hook = passes(fast)
    try:
        edited(fast, steps=1, image_scale=1.5, text_scale=3)
        edited(fast, steps=1, image_scale=1, text_scale=3)  # the branch that sees nothing is not run
        edited(fast, steps=1, image_scale=1, text_scale=1)
        edited(fast, steps=1, mask=LEFT, gate="guidance", image_scale=1, text_scale=1)  # a map is not 1
        sigma = get_sigmas(1, fast.alphas_cumprod)[0].item()
        edited(fast, steps=1, image_scale=1.5, text_scale=3, guidance_interval=(0, sigma / 2))
        edited(fast, [(NIGHT, LEFT), (DAY, RIGHT)], steps=1, image_scale=1.5)
    finally:
        hook.remove()
    assert calls == [(2, 3), (1, 2), (1, 1), (1, 2), (1, 1), (4, 4)]  # each region sees an x of its own


@pytest.fixture
def changed(shipped, monkeypatch):
    """The fast path over a network whose ResBlocks add half of what they did."""
    forward = layers.ResBlock.forward

    def halved(self, x, emb):
        return (forward(self, x, emb) + self.skip_connection(x)) / 2

    monkeypatch.setattr(layers.ResBlock, "forward", halved)
    with pytest.warns(UserWarning, match="changed a layer") as seen:
        editor = FastEditor(shipped.config, *(copy.deepcopy(y) for y in (shipped.unet, shipped.vae, shipped.text)))
    assert len(seen) == 1
    return editor


def test_where_a_layer_is_changed_it_says_so_and_steps_aside(shipped, fast, changed, edited):
    calls, hook = passes(changed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert error(edited(changed, steps=2, reuse=2), edited(shipped, steps=2, reuse=2)) <= SINGLE
    hook.remove()
    assert not calls


def test_a_layer_changed_afterwards_is_seen_and_so_is_its_return(shipped, fast, edited, monkeypatch):
    before = edited(fast, steps=2)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="changed a layer"):
        patch.setattr(layers.GEGLU, "forward", lambda self, x: self.proj(x).chunk(2, dim=-1)[0])
        halved = edited(fast, steps=2)
        assert error(halved, edited(shipped, steps=2)) <= CHAINED and not torch.equal(halved, before)
    calls, hook = passes(fast)
    assert torch.equal(edited(fast, steps=2), before)
    hook.remove()
    assert len(calls) == 3  # compared again, and two steps


def test_hooks_are_called(fast, edited):
    seen = []
    with fast.unet.middle_block[0].register_forward_hook(lambda *_: seen.append(1)):
        edited(fast, steps=2)
    assert len(seen) == 2


def test_half_precision_agrees(shipped):
    networks = (copy.deepcopy(network).bfloat16() for network in (shipped.unet, shipped.vae, shipped.text))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FastEditor(shipped.config, *networks, dtype=torch.bfloat16).stands_in()
