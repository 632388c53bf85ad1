"""The fast and the lean path against the plain one, and what doing less gives and guarantees."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pseudo import error

import emilie_min as emilie
from emilie_min import sampling
from emilie_min.app.cli import main
from emilie_min.emilie import Editor
from emilie_min.errors import EmilieError, SamplingError
from emilie_min.faster.deepcache import DeepCache
from emilie_min.faster.fast import FastEditor
from emilie_min.faster.low_memory import LeanEditor, hold_in_half
from emilie_min.toy import world

SINGLE, CHAINED = 1e-5, 1e-4  # relative errors: of a single pass, of what is guided or a trajectory; float32
TEXT_SCALE, IMAGE_SCALE = 7.5, 1.5
NIGHT, DAY = "make it night", "make it day"
LEFT, RIGHT = (0, 0, 30, 64), (34, 0, 64, 64)


@pytest.fixture(scope="module")
def small(small_config, networks):
    """The goldens' model: plain, and fast over weights of its own."""
    return Editor(small_config, **networks), FastEditor(small_config, **copy.deepcopy(networks))


@pytest.fixture(scope="module")
def plain():
    return emilie.load(device="cpu")


@pytest.fixture(scope="module")
def fast():
    return emilie.load(device="cpu", compile=True)


def edited(editor, instruction=NIGHT, **settings):
    canvas = editor.open(world.render(world.scene(3)), seed=5)
    canvas.edit(instruction, **settings)
    return canvas.latent


@pytest.mark.parametrize("i", range(3))
def test_fast_denoiser_agrees_with_the_original(small, goldens, networks, i):
    x, sigma = goldens[f"denoise.{i}.x"], goldens[f"denoise.{i}.sigma"]
    cond, _, uncond = networks["text"](goldens["text.input_ids"]).split(1)
    for editor in small:
        denoised = editor.denoise(x, sigma, goldens["vae.rect.mode"], cond, uncond, TEXT_SCALE, IMAGE_SCALE)
        assert error(denoised, goldens[f"denoise.{i}.cfg"]) <= CHAINED


@torch.no_grad()
@pytest.mark.parametrize("rows", [(0, 0, 1), (0, 0), (0,), (0, 0, 0, 1)])
def test_fast_unet_equals_the_plain_one(small, rows):
    plain, fast = small
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


def test_the_fast_networks_keep_their_keys_and_share_their_memory(plain, fast):
    assert fast.unet.state_dict().keys() == plain.unet.state_dict().keys()
    for name, weight in plain.unet.state_dict().items():
        assert torch.equal(weight, fast.unet.state_dict()[name])
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in fast.unet.parameters()}
    ours = {p.untyped_storage().data_ptr() for p in fast.fast.parameters()}
    assert ours <= storages.keys()
    assert sum(storages.values()) == sum(p.nbytes for p in plain.unet.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_scale": 1.5},
        {"mask": LEFT, "gate": "guidance", "image_scale": 1.5},
        {"mask": LEFT, "keep_background": True},
        {"instruction": [(NIGHT, LEFT), (DAY, RIGHT)]},
        {"reuse": 3},
        {"sampler": "dpmpp_2m", "steps": 6},
        {"guidance_interval": (0.4, 4.0), "reuse": 2},
    ],
    ids=str,
)
def test_fast_edits_equal_plain_ones(plain, fast, settings):
    assert error(edited(fast, **settings), edited(plain, **settings)) <= SINGLE


def test_fast_batches_and_noise_levels(plain, fast):
    draw = torch.Generator().manual_seed(0)
    x, z_img = torch.randn(2, 3, 4, 16, 16, generator=draw)
    cond, other, uncond = plain.context([NIGHT, DAY, ""]).split(1)
    for conds, scales in ((cond, (3, 1.5)), (torch.cat([cond, other]), (3, 1.0)), (cond.repeat(3, 1, 1), (1, 1))):
        weights = [1 / 2] * 2 if len(conds) == 2 else [1.0]
        each = [e.denoise(x, 2.0, z_img, conds, uncond, *scales, weights) for e in (plain, fast)]
        assert error(each[1], each[0]) <= SINGLE
    levels = torch.tensor([0.5, 2.0, 8.0])  # one for each row
    assert error(*(e.denoise(x, levels, z_img, cond, uncond, 3, 1.5) for e in (fast, plain))) <= SINGLE


def test_fast_leaves_out_what_cancels(fast, plain):
    calls = []
    fast.step, step = lambda *inputs: calls.append((inputs[0].shape[0], inputs[2].shape[0])) or step(*inputs), fast.step
    try:
        edited(fast, steps=2, image_scale=1.5)
        edited(fast, steps=2)  # image scale 1: the branch that sees nothing is not run
        edited(fast, steps=2, image_scale=1.5, guidance_interval=(1.0, 100.0))
    finally:
        fast.step = step
    assert calls == [(2, 3)] * 2 + [(1, 2)] * 2 + [(2, 3), (1, 1)]


def test_the_step_can_be_compiled_whole(plain, fast, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    editor = copy.copy(fast)
    with pytest.warns(UserWarning, match=f"once: kept in {tmp_path}"):
        editor.compile(backend="aot_eager")  # traced as for a GPU, in one graph, and not made into machine code
    for settings in ({"steps": 3, "image_scale": 1.5}, {"steps": 4, "reuse": 2}):
        assert error(edited(editor, **settings), edited(plain, **settings)) <= SINGLE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_a_gpu_the_graph_gives_what_the_plain_path_gives(dtype):
    plain, fast = (emilie.load(device="cuda", dtype=dtype, compile=compile) for compile in (False, True))
    for settings in ({}, {"image_scale": 1.5}, {"reuse": 2}, {}):
        apart = error(edited(fast, **settings), edited(plain, **settings))
        assert apart <= (1e-4 if dtype == "float32" else 2e-2)


def test_where_it_cannot_be_compiled(fast, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    editor = copy.copy(fast)
    with pytest.warns(UserWarning):
        editor.compile(backend=backend)
    with pytest.raises(EmilieError, match="cannot be compiled here: .*Load it without compile"):
        edited(editor, steps=1)


@pytest.fixture(scope="module")
def lean():
    return emilie.load(device="cpu", low_memory=True)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("settings", [{}, {"reuse": 2}, {"image_scale": 1.5, "mask": LEFT}], ids=str)
def test_lean_edits_equal_plain_ones(plain, lean, settings, one_by_one):
    lean = copy.copy(lean)
    lean.one_by_one = one_by_one
    assert error(edited(lean, **settings), edited(plain, **settings)) <= SINGLE  # the shipped file is float16


@pytest.mark.parametrize(("one_by_one", "rows"), [(False, [3] * 2), (True, [1] * 6)])
def test_lean_holds_half_and_on_a_gpu_runs_one_branch_at_a_time(plain, lean, one_by_one, rows):
    lean, seen = copy.copy(lean), []
    lean.one_by_one = one_by_one
    hook = lean.unet.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape[0], inputs[0].dtype)))
    try:
        edited(lean, steps=2)
    finally:
        hook.remove()
    assert seen == [(row, torch.float32) for row in rows]
    held = sum(p.nbytes for network in lean.networks.values() for p in network.parameters())
    assert held * 2 == sum(p.nbytes for n in (plain.unet, plain.vae, plain.text) for p in n.parameters())


def test_lean_networks_take_turns_on_a_device():
    editor = emilie.load("random", "toy", device="cpu", low_memory=True)
    editor.device = torch.device("meta")  # any device that is not the CPU

    def where():
        return {name: next(network.parameters()).device.type for name, network in editor.networks.items()}

    for name in ("vae", "text", "unet"):
        for network in editor.networks.values():  # what comes back from meta has no numbers
            network.to_empty(device="cpu")
        getattr(editor, name)
        assert where() == {other: "meta" if other == name else "cpu" for other in where()}
    assert not hasattr(editor, "nothing")


def test_a_layer_that_fails_is_held_in_half_again():
    layer = torch.nn.Linear(4, 4)
    hold_in_half(layer)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 3))
    assert layer.weight.dtype == torch.float16
    assert layer(torch.zeros(1, 4)).dtype == torch.float32


def test_fast_and_lean_are_two_things():
    with pytest.raises(EmilieError, match="choose one"):
        emilie.load(device="cpu", compile=True, low_memory=True)
    assert isinstance(emilie.load("random", "toy", device="cpu", low_memory=True), LeanEditor)


def gaussian(x, sigma):
    """The exact denoiser of latents that are normal with mean 0.5 and standard deviation 0.3."""
    return (0.09 * x + sigma**2 * 0.5) / (0.09 + sigma**2)


def exact(x, sigma):
    """Where the probability flow of `gaussian` leads from noise level sigma."""
    return 0.5 + (x - 0.5) * 0.3 / (0.09 + sigma**2) ** 0.5


def test_dpmpp_2m_is_of_second_order():
    x, errors = torch.full((1, 1, 1, 1), 7.0, dtype=torch.float64), []
    for n in (40, 80, 160):
        sigmas = torch.linspace(math.log(10), math.log(0.01), n + 1, dtype=torch.float64).exp()
        there = sampling.sample_dpmpp_2m(gaussian, x, sigmas, None)
        back = 0.5 + (there - 0.5) * 0.3 / (0.09 + 0.01**2) ** 0.5  # the rest of the way, exactly
        errors.append((back - exact(x, 10.0)).abs().item())
    assert errors[0] > 3.3 * errors[1] > 3.3**2 * errors[2] > 0


def test_dpmpp_2m_sde_draws_from_the_right_distribution():
    draw = torch.Generator().manual_seed(0)
    shape, sigmas = (4000, 1, 2, 2), torch.cat([torch.linspace(math.log(10), math.log(0.02), 60).exp(), torch.zeros(1)])
    x = 0.5 + torch.randn(shape, generator=draw) * (0.09 + 10.0**2) ** 0.5
    out = sampling.SAMPLERS["dpmpp_2m_sde"](gaussian, x, sigmas, lambda *_: torch.randn(shape, generator=draw))
    assert abs(out.mean() - 0.5) < 0.01 and abs(out.std() - 0.3) < 0.01
    still = sampling.sample_dpmpp_2m(gaussian, x, sigmas, None)
    assert (out - still).std() > 0.1  # the noise between the steps is not for nothing


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_dpmpp_keeps_the_gates_promises(sampler):
    draw = torch.Generator().manual_seed(0)
    x, source = torch.randn(2, 1, 4, 8, 8, generator=draw)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.3, 0.0])
    outside, inside = (mask == 0).expand_as(x), (mask == 1).expand_as(x)

    def run(noise, **gate):
        return sampling.SAMPLERS[sampler](gaussian, 10 * x, sigmas, lambda *_: noise, **gate)

    noise = torch.randn(x.shape, generator=draw)
    free, anchored = run(noise), run(noise, mask=mask, source=source)
    assert torch.equal(anchored[outside], source[outside])
    assert torch.equal(anchored[inside], free[inside])
    letter = run(torch.zeros_like(x), mask=mask)  # Eq. 8: without noise nothing moves outside
    assert torch.allclose(letter[outside], 10 * x[outside], rtol=1e-5) and torch.equal(
        letter[inside], run(torch.zeros_like(x))[inside]
    )


def test_dpmpp_is_near_the_same_picture_in_fewer_steps(plain):
    fine = edited(plain, sampler="dpmpp_2m", steps=100)
    assert error(edited(plain, sampler="dpmpp_2m", steps=25), fine) < error(
        edited(plain, sampler="dpmpp_2m", steps=6), fine
    )
    assert torch.equal(edited(plain, sampler="dpmpp_2m", seed=1), edited(plain, sampler="dpmpp_2m", seed=2))
    assert not torch.equal(edited(plain, sampler="dpmpp_2m_sde", seed=1), edited(plain, sampler="dpmpp_2m_sde", seed=2))


def test_deep_features_are_reused_where_asked(plain):
    counts = {"middle": 0, "last": 0}

    def count(name):
        return lambda *_: counts.update({name: counts[name] + 1})

    hooks = [
        plain.unet.middle_block[0].register_forward_pre_hook(count("middle")),
        plain.unet.output_blocks[-1][0].register_forward_pre_hook(count("last")),
    ]
    try:
        edited(plain, steps=7, reuse=3)
    finally:
        for hook in hooks:
            hook.remove()
    assert counts == {"middle": 3, "last": 7}
    assert torch.equal(
        edited(plain, steps=3), edited(copy_with(plain, lambda unet: DeepCache(unet, 1)), steps=3)
    )  # with every step fresh it is the network


def copy_with(editor, wrap):
    editor = copy.copy(editor)
    unet = wrap(editor.unet)
    editor.denoiser = lambda sigmas, *args, **_: (
        lambda x, sigma, *scales: editor.denoise(x, sigma, *args[:3], *scales, args[3], unet)
    )
    return editor


def test_guidance_interval_leaves_two_branches_out(plain):
    rows = []
    hook = plain.unet.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    try:
        edited(plain, steps=6, guidance_interval=(0.5, 5.0))
        sigmas = sampling.get_sigmas(6, plain.alphas_cumprod)[:-1].tolist()
        assert rows == [3 if 0.5 <= sigma <= 5 else 1 for sigma in sigmas] and 1 < rows.count(1) < 6
    finally:
        hook.remove()
    everywhere = edited(plain, guidance_interval=(0, 1000))
    assert torch.equal(everywhere, edited(plain))
    assert not torch.equal(edited(plain, guidance_interval=(0.5, 5.0)), everywhere)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"sampler": "euler"}, "unknown sampler 'euler': choose from euler_ancestral, dpmpp_2m, dpmpp_2m_sde"),
        ({"reuse": 0}, "reuse must be a whole number from 1 to 1000, not 0"),
        ({"reuse": 1.5}, "reuse must be a whole number, not 1.5"),
        ({"guidance_interval": (5, 1)}, "two noise levels"),
        ({"guidance_interval": 3}, "two noise levels"),
        ({"guidance_interval": (1, 2, 3)}, "two noise levels"),
        ({"guidance_interval": (float("nan"), 2)}, "two noise levels"),
    ],
)
def test_what_no_edit_can_use(plain, settings, said):
    canvas = plain.open(world.render(world.scene(3)))
    with pytest.raises(SamplingError, match=said):
        canvas.edit(NIGHT, **settings)
    assert len(canvas.states) == 1


def test_a_sampler_that_is_none_where_an_editor_samples(plain):
    z = torch.zeros(1, 4, 16, 16)
    cond, uncond = plain.context([NIGHT, ""]).split(1)
    with pytest.raises(SamplingError, match="unknown sampler 'euler'"):
        plain.sample(z, cond, uncond, torch.tensor([1.0, 0.0]), z, lambda *_: z, sampler="euler")


def test_the_config_names_the_samplers_there_are():
    from emilie_min.canvas.settings import SAMPLERS

    assert SAMPLERS == tuple(sampling.SAMPLERS)


def test_the_command_line_takes_them(tmp_path, capsys):
    picture = tmp_path / "scene.png"
    world.render(world.scene(3)).save(picture)

    def edit(name, *options):
        out = tmp_path / name
        assert main(["edit", str(picture), NIGHT, "--device", "cpu", "--out", str(out), *options]) == 0
        return np.array(Image.open(out / "scene_1.png"), dtype=float)

    plain = edit("plain")
    for name in ("compile", "low-memory"):
        assert np.abs(edit(name, f"--{name}") - plain).max() <= 1  # grey levels
    quick = edit("quick", "--sampler", "dpmpp_2m", "--steps", "6", "--guidance-interval", "0.3,6", "--reuse", "2")
    assert 0 < np.abs(quick - plain).mean() < 30
    for wrong in ("5,1", "1", "a,b", "-1,2"):
        with pytest.raises(SystemExit):
            main(["edit", str(picture), NIGHT, f"--guidance-interval={wrong}"])
        assert "two noise levels LOW,HIGH" in capsys.readouterr().err
    assert main(["edit", str(picture), NIGHT, "--compile", "--low-memory", "--out", str(tmp_path)]) == 2
    assert "choose one" in capsys.readouterr().err
