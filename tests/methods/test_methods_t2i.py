"""The methods on a text-to-image model against their definitions, written out once more; weights are random."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import emilie_min as emilie
from emilie_min.canvas import images
from emilie_min.config import load_config
from emilie_min.errors import CheckpointError, EmilieError, InstructionError, SamplingError
from emilie_min.methods import ddim, hooks
from emilie_min.methods.base import Chain, Request
from emilie_min.methods.bld import BlendedLatentDiffusion
from emilie_min.methods.diffedit import DiffEdit, differing
from emilie_min.methods.pnp import PlugAndPlay, modules
from emilie_min.methods.text_to_image import Work
from emilie_min.sampling import noise_stream
from emilie_min.toy import judge, world
from emilie_min.unet import UNetModel

WEIGHTS = Path(__file__).parents[2] / "weights" / "toy-t2i.safetensors"
FAST = {PlugAndPlay: {"inversion_steps": 2}, DiffEdit: {"maps": 1}, BlendedLatentDiffusion: {}}
BLOCK = "output_blocks.1.0"
Q = "output_blocks.1.1.transformer_blocks.0.attn1.to_q"
BEFORE, AFTER = "a red circle at the top left on sand by day", "a blue star at the top left on snow at night"
SIDE = 32  # px, of the pictures: small to be fast
SHAPE = (1, 4, 8, 8)


@pytest.fixture(scope="module")
def editor():
    return emilie.load("random", "toy-t2i", device="cpu")


@pytest.fixture(scope="module")
def alphas(editor):
    return editor.alphas_cumprod.double().tolist()


@pytest.fixture
def chain():
    picture = world.render(world.scene(3)).resize((SIDE, SIDE))
    return Chain(original=picture, seed=5, image=picture)


@pytest.fixture
def eps(editor):
    """eps(z, t) of a text at a guidance scale, by one pass for each branch."""

    def of(text, guidance=1.0):
        contexts = [editor.context([words]) for words in ("", text)]

        @torch.no_grad()
        def predict(z, t):
            uncond, cond = (editor.unet(z, torch.tensor([t]), context) for context in contexts)
            return uncond + guidance * (cond - uncond)

        return predict

    return of


def request(mask=None, **more):
    return Request("make it night", mask, AFTER, BEFORE, **more)


def left_half() -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return mask


def everywhere() -> Image.Image:
    return Image.new("L", (SIDE, SIDE), 255)


def outside(z):
    return z[..., 4:]


def encoded(editor, image):
    return editor.scale_factor * images.to_latent(editor, image)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3)


# ---- DDIM


def test_timesteps_are_compvis_uniform():
    assert ddim.timesteps(50) == list(range(1, 982, 20))
    assert ddim.timesteps(999) == list(range(1, 1000))
    assert ddim.levels(2) == [0, 1, 501]
    for n in range(1, 1000):
        steps = ddim.timesteps(n)
        assert len(set(steps)) == n and steps == sorted(steps) and steps[0] == 1 and steps[-1] <= 999
        assert steps[-1] >= 1000 - 1000 / n  # to within one stride of the end, whatever n
    for n in (0, -1, 1000):
        with pytest.raises(SamplingError, match="from 1 to 999"):
            ddim.timesteps(n)


def test_a_share_of_steps_is_rounded_down_but_not_by_binary_fractions():
    assert [ddim.share(f, n) for f, n in ((0.25, 50), (0.8, 50), (0.29, 100), (0.57, 100), (0, 9), (1, 9))] == [
        *(12, 40, 29, 57, 0, 9)
    ]


@pytest.mark.parametrize("a_from, a_to", [(0.9991, 0.2), (0.006, 0.9991), (0.5, 0.5), (0.3, 0.31)])
def test_a_step_is_a_line_in_the_noise_level(a_from, a_to):
    """In z / sqrt(alpha), DDIM is Euler's method in sigma (Song et al. 2021, Eq. 14)."""
    z, eps = torch.randn(2, 1, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = [((1 - a) / a) ** 0.5 for a in (a_from, a_to)]
    expected = a_to**0.5 * (z / a_from**0.5 + (sigma[1] - sigma[0]) * eps)
    stepped = ddim.step(z, eps, a_from, a_to)
    assert (stepped - expected).abs().max() < 1e-12
    assert (ddim.step(stepped, eps, a_to, a_from) - z).abs().max() < 1e-12  # and back again
    assert ddim.step(z.float(), eps.float(), a_from, a_to).dtype == torch.float32


def test_inversion_and_sampling_are_mirrors_at_every_level(alphas):
    z, noise = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen, reached, levels = [], {}, ddim.levels(4)

    def constant(z, t):
        seen.append(t)
        return noise

    def after_step(z, t):
        reached[t] = z
        return z

    latents = ddim.invert(constant, z, levels, alphas)
    assert seen == [0, 1, 251, 501] and len(latents) == 5 and latents[0] is z
    seen.clear()
    back = ddim.sample(constant, latents[-1], levels, alphas, after_step)
    assert seen == [751, 501, 251, 1] and list(reached) == [501, 251, 1, 0]
    for t, latent in zip(levels[:-1], latents):
        assert (reached[t] - latent).abs().max() < 1e-9
    assert (back - z).abs().max() < 1e-9


def test_what_comes_back_after_a_step_is_what_the_next_starts_from(alphas):
    starts = []
    back = ddim.sample(
        lambda z, t: starts.append(z) or 0 * z,
        torch.ones(SHAPE),
        ddim.levels(2),
        alphas,
        lambda z, t: torch.zeros(SHAPE) + t,
    )
    assert (starts[1] == 1).all() and (back == 0).all()


def test_more_steps_follow_the_known_path_of_a_gaussian_better(alphas):
    """Where latents are N(mu, s^2) eps is known, and so is the latent at each level that inversion aims at."""
    mu, s = 0.7, 0.4
    z = mu + s * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def eps(z, t):
        a = alphas[t]
        return (1 - a) ** 0.5 * (z - a**0.5 * mu) / (a * s**2 + 1 - a)

    inverted, reconstructed = [], []
    for n in (10, 20, 50, 200, 999):
        levels = ddim.levels(n)
        latents = ddim.invert(eps, z, levels, alphas)
        spread = [(alphas[t] * s**2 + 1 - alphas[t]) ** 0.5 for t in (0, levels[-1])]
        expected = alphas[levels[-1]] ** 0.5 * mu + spread[1] / spread[0] * (z - alphas[0] ** 0.5 * mu)
        inverted.append((latents[-1] - expected).abs().max().item())
        reconstructed.append((ddim.sample(eps, latents[-1], levels, alphas) - z).pow(2).mean().sqrt().item())
    assert inverted == sorted(inverted, reverse=True) and inverted[-1] < 0.02 < 0.5 < inverted[0]
    assert reconstructed == sorted(reconstructed, reverse=True) and reconstructed[-1] < 0.005 < 0.05 < reconstructed[0]


@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs weights/toy-t2i.safetensors")
def test_the_small_model_reconstructs_a_picture_better_with_more_steps():
    """Told what the picture shows; told nothing it does so on average, and can lose a thing."""
    editor, scene = emilie.load(WEIGHTS, device="cpu"), world.scene(3)
    alphas, psnr = editor.alphas_cumprod.double().tolist(), []
    source = encoded(editor, world.render(scene))
    with torch.no_grad():
        eps = Work(editor, None, None, "", "", source, None, alphas).eps(world.caption(scene))
        for n in (6, 12, 25):
            levels = ddim.levels(n)
            latent = ddim.sample(eps, ddim.invert(eps, source, levels, alphas)[-1], levels, alphas)
            psnr.append(judge.psnr(images.to_image(editor.decode(latent)), world.render(scene)))
    assert psnr == sorted(psnr) and psnr[-1] > psnr[0] + 3 and psnr[-1] > 29, psnr  # the autoencoder alone: 34


def test_guidance_is_one_batch_and_none_is_one_branch(editor, alphas, eps):
    z = noise_stream(SHAPE, 0)()
    work = Work(editor, None, None, "", "", z, None, alphas)
    with torch.no_grad(), hooks.capture(editor.unet, ["out"]) as seen:
        for guidance, text, branches in ((7.5, AFTER, 2), (0.0, AFTER, 2), (1.0, AFTER, 1), (7.5, "", 1)):
            got = work.eps(text, guidance)(z, 300)
            assert len(seen["out"]) == branches
            assert torch.allclose(got, eps(text, guidance)(z, 300), atol=1e-5)
    assert work.passes == 4


# ---- hooks


@pytest.fixture
def unet_pass(editor):
    z = noise_stream((2, *SHAPE[1:]), 1)()
    context = editor.context([BEFORE, AFTER])

    @torch.no_grad()
    def run(which=slice(None)):
        return editor.unet(z[which], torch.full((len(z[which]),), 300), context[which])

    return run


def hooks_left(unet) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


def test_capture_gives_what_the_modules_compute(editor, unet_pass):
    block, norm = editor.unet.output_blocks[1], Q.replace("attn1.to_q", "norm1")
    plain = unet_pass()
    names = [BLOCK, f"{BLOCK}.out_layers", f"{BLOCK}.skip_connection", Q, norm]
    with hooks.capture(editor.unet, names) as seen:
        assert torch.equal(unet_pass(), plain)  # looking changes nothing
    assert set(seen) == set(names)
    assert torch.equal(seen[BLOCK], seen[f"{BLOCK}.skip_connection"] + seen[f"{BLOCK}.out_layers"])
    with torch.no_grad():
        assert torch.equal(seen[Q], block[1].transformer_blocks[0].attn1.to_q(seen[norm]))
    assert seen[Q].shape == (2, 16, 128)


def test_override_puts_a_tensor_or_a_function_in_its_place(editor, unet_pass):
    branch, plain = f"{BLOCK}.out_layers", unet_pass()
    with hooks.capture(editor.unet, [branch, Q]) as own:
        unet_pass()
    with hooks.override(editor.unet, own):
        assert torch.equal(unet_pass(), plain)  # its own values change nothing
    for values in ({Q: own[Q].flip(0)}, {branch: own[branch].flip(0)}, {Q: lambda q: 2 * q}):
        with hooks.override(editor.unet, values):
            assert (unet_pass() - plain).abs().max() > 1e-4
    with hooks.capture(editor.unet, [BLOCK, f"{BLOCK}.skip_connection"]) as seen:
        with hooks.override(editor.unet, {branch: torch.zeros_like}):
            unet_pass()
    assert torch.equal(seen[BLOCK], seen[f"{BLOCK}.skip_connection"])  # only the branch, not what it is added to
    assert torch.equal(unet_pass(), plain)


def test_an_override_of_one_serves_the_whole_batch(editor, unet_pass):
    with hooks.capture(editor.unet, ["out"]) as one:
        unet_pass(slice(0, 1))
    with hooks.override(editor.unet, one):
        both = unet_pass()
    assert torch.equal(both, one["out"].expand(2, -1, -1, -1))
    with hooks.override(editor.unet, {Q: torch.zeros(3, 16, 128)}), pytest.raises(SamplingError, match="batch of 1"):
        unet_pass()
    with hooks.override(editor.unet, {Q: torch.zeros(1, 16, 1)}), pytest.raises(SamplingError, match=r"\(1, 16, 1\)"):
        unet_pass()


def test_nothing_is_left_of_a_hook_even_after_an_error(editor, unet_pass):
    with pytest.raises(ZeroDivisionError):
        with hooks.capture(editor.unet, [Q]), hooks.override(editor.unet, {BLOCK: lambda h: 1 / 0}):
            assert hooks_left(editor.unet) == 2
            unet_pass()
    assert hooks_left(editor.unet) == 0
    with pytest.raises(EmilieError):
        with hooks.capture(editor.unet, [Q, "nowhere"]):
            pass
    assert hooks_left(editor.unet) == 0


@pytest.mark.parametrize("context", [lambda u, n: hooks.capture(u, [n]), lambda u, n: hooks.override(u, {n: abs})])
def test_an_unknown_module_is_refused_with_its_likes(editor, context):
    with pytest.raises(SamplingError, match=r"no module 'output_blocks.1.0.out_layer': .*output_blocks.1.0.out_layers"):
        context(editor.unet, f"{BLOCK}.out_layer").__enter__()
    with pytest.raises(SamplingError, match=r"named_modules\(\)"):
        context(editor.unet, "").__enter__()


# ---- Plug-and-Play


def test_on_stable_diffusion_the_original_s_modules_are_injected():
    with torch.device("meta"):
        unet = UNetModel(load_config("sd15").unet)
    features, attention = modules(unet)
    assert features == ["output_blocks.4.0.out_layers"]
    expected = [f"output_blocks.{i}.1.transformer_blocks.0.attn1.to_{x}" for i in range(4, 12) for x in "qk"]
    assert attention == expected
    assert set(features + attention) < set(dict(unet.named_modules()))


def test_on_the_small_model_the_second_attending_block_is_injected(editor):
    features, attention = modules(editor.unet)
    assert (features, attention) == ([f"{BLOCK}.out_layers"], [Q, Q.replace("to_q", "to_k")])
    with pytest.raises(SamplingError, match="attends in none"):
        modules(SimpleNamespace(output_blocks=[[]]))
    features, attention = modules(editor.unet, feature_block=3, attention_block=0)
    assert features == ["output_blocks.3.0.out_layers"] and len(attention) == 4


@pytest.mark.parametrize("fractions, counts", [((0.8, 0.5), (41, 26)), ((0, 1), (0, 50)), ((0.02, 0), (2, 0))])
def test_the_first_41_and_26_of_50_steps_are_injected(editor, fractions, counts):
    method = PlugAndPlay(editor, steps=50, feature_steps=fractions[0], attention_steps=fractions[1])
    for group, count in zip(modules(editor.unet), counts):
        for name in group:
            assert [name in names for names in method.injected()] == [True] * count + [False] * (50 - count)


@torch.no_grad()
def test_plug_and_play_is_inversion_reconstruction_and_injection(editor, chain, eps, alphas):
    """The original's order: the whole reconstruction first, its features kept, then the edit."""
    method = PlugAndPlay(editor, steps=4, inversion_steps=8, guidance=6.0, feature_steps=0.5, attention_steps=0.25)
    done = method.edit(chain, request())

    features, attention = modules(editor.unet)
    fine = [0, 1, 126, 251, 376, 501, 626, 751]  # of 8 steps those up to where the edit of 4 begins
    start = ddim.invert(eps(""), encoded(editor, chain.image), fine, alphas)[-1]
    kept = {}

    def reconstruct(z, t):
        with hooks.capture(editor.unet, [*features, *attention]) as kept[t]:
            editor.unet(z, torch.tensor([t]), editor.context([""]))
        return eps("")(z, t)

    reconstruction = ddim.sample(reconstruct, start, fine, alphas)
    names = {751: features + attention, 501: features + attention, 251: features, 1: []}

    def inject(z, t):
        with hooks.override(editor.unet, {name: kept[t][name] for name in names[t]}):
            return eps(AFTER, 6.0)(z, t)

    edited = ddim.sample(inject, start, [0, 1, 251, 501, 751], alphas)
    assert close(done.latent, edited)
    plain = PlugAndPlay(editor, steps=4, inversion_steps=8, guidance=6.0, feature_steps=0, attention_steps=0)
    assert not close(plain.edit(chain, request()).latent, edited)  # injection matters
    assert not close(reconstruction, edited)
    assert done.notes["injected"] == {features[0]: 3, attention[0]: 2, attention[1]: 2}


def test_plug_and_play_with_all_injected_and_the_source_s_prompt_reconstructs(editor, chain, eps, alphas):
    for guidance in (1.0, 10.0):  # told what the source is told, guidance has nothing to do
        method = PlugAndPlay(
            editor, steps=5, inversion_steps=5, guidance=guidance, feature_steps=1.0, attention_steps=1.0
        )
        done, levels = method.edit(chain, Request("", caption="")), ddim.levels(5)
        latents = ddim.invert(eps(""), encoded(editor, chain.image), levels, alphas)
        assert close(done.latent, ddim.sample(eps(""), latents[-1], levels, alphas))


def test_plug_and_play_injects_so_much_that_another_prompt_stays_near_the_source(editor, chain):
    """With every block's features taken from the reconstruction the text cannot matter at all."""
    told = []
    for caption in ("", AFTER):
        method = PlugAndPlay(
            editor, steps=3, inversion_steps=3, guidance=1.0, feature_steps=1.0, feature_block=3, attention_block=0
        )
        told.append(method.edit(chain, Request("", caption=caption)).latent)
    free = PlugAndPlay(editor, steps=3, inversion_steps=3, guidance=1.0, feature_steps=0, attention_steps=0)
    moved = (free.edit(chain, request()).latent - told[0]).norm()
    assert (told[1] - told[0]).norm() < moved


def test_plug_and_play_inverts_through_all_timesteps_unless_told_otherwise(editor, chain, monkeypatch):
    def nothing(work, text, guidance=1.0):
        def eps(z, t):
            work.passes += 1
            return 0 * z

        return eps

    monkeypatch.setattr(Work, "eps", nothing)
    assert PlugAndPlay(editor, steps=50).edit(chain, request()).notes["unet_passes"] == 981 + 820 + 50
    assert PlugAndPlay(editor, steps=50, inversion_steps=50).edit(chain, request()).notes["unet_passes"] == 50 + 41 + 50


# ---- Blended Latent Diffusion


@torch.no_grad()
def test_blended_latent_diffusion_step_by_step(editor, chain, eps, alphas):
    method = BlendedLatentDiffusion(editor, steps=5, guidance=4.0)
    done = method.edit(chain, request(left_half()))
    noise, source = noise_stream(SHAPE, 5, "edit", 0), encoded(editor, chain.image)
    mask = images.latent_mask(left_half(), 4)

    def q(t):
        return alphas[t] ** 0.5 * source + (1 - alphas[t]) ** 0.5 * noise()

    z = q(601)  # 0, 1, 201, 401, 601, 801: of 5 steps int(1.25) is skipped
    for t, t_to in ((601, 401), (401, 201), (201, 1), (1, 0)):
        z = ddim.step(z, eps(AFTER, 4.0)(z, t), alphas[t], alphas[t_to])
        z = mask * z + (1 - mask) * (q(t_to) if t_to else source)
    assert close(done.latent, z)
    assert done.notes["unet_passes"] == 4 and done.mask.tobytes() == left_half().tobytes()


def test_blended_latent_diffusion_runs_38_of_50_steps(editor, chain, monkeypatch):
    levels = []
    monkeypatch.setattr(Work, "eps", lambda *_: lambda z, t: levels.append(t) or 0 * z)
    BlendedLatentDiffusion(editor, steps=50).edit(chain, request())
    assert levels == list(range(741, 0, -20)) and len(levels) == 38


# ---- DiffEdit


@torch.no_grad()
def test_diffedit_step_by_step(editor, chain, eps, alphas):
    method = DiffEdit(editor, steps=5, guidance=4.0, mask="given")
    done = method.edit(chain, request(left_half()))
    mask, levels = images.latent_mask(left_half(), 4), [0, 1, 201, 401, 601]  # 0.8 of 5 steps
    latents = ddim.invert(eps(""), encoded(editor, chain.image), levels, alphas)
    z = latents[4]
    for i in (3, 2, 1, 0):
        z = ddim.step(z, eps(AFTER, 4.0)(z, levels[i + 1]), alphas[levels[i + 1]], alphas[levels[i]])
        z = mask * z + (1 - mask) * latents[i]
    assert close(done.latent, z)
    assert done.notes["unet_passes"] == 8
    assert (done.notes["mask"], done.notes["mask_share"]) == ("given", 0.5)


@torch.no_grad()
def test_diffedit_finds_the_mask_where_guided_predictions_differ(editor, chain, eps, alphas):
    done = DiffEdit(editor, steps=4, maps=3).edit(chain, request(left_half()))
    noise, source = noise_stream(SHAPE, 5, "edit", 0), encoded(editor, chain.image)
    differences = []
    for _ in range(3):
        z = alphas[251] ** 0.5 * source + (1 - alphas[251]) ** 0.5 * noise()  # half of 4 steps up
        differences.append((eps(AFTER, 7.5)(z, 251) - eps(BEFORE, 7.5)(z, 251)).abs())
    mean = torch.cat(differences).mean((0, 1))
    expected = mean.clamp(max=3 * mean.mean()) / (3 * mean.mean()) > 0.5
    cells = images.latent_mask(done.mask, 4)[0, 0] > 0
    assert torch.equal(cells, expected) and 0 < expected.float().mean() < 1
    assert done.mask.size == (SIDE, SIDE) and done.notes["mask"] == "own"
    assert done.notes["mask_share"] == pytest.approx(expected.float().mean().item())


def test_diffedit_clamps_each_picture_by_its_own_mean():
    faint, strong = torch.rand(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    faint = 0.01 * faint**4
    both = differing(torch.cat([faint, strong**4]), 3.0, 0.5)
    assert torch.equal(both[:1], differing(faint, 3.0, 0.5)) and both[0].any()
    assert torch.equal(both[:1], differing(1000 * faint, 3.0, 0.5))
    outlier = torch.full((1, 1, 8, 8), 0.1)
    outlier[..., 0, 0], outlier[..., 1, :] = 1e6, 1.0
    assert differing(outlier, 3.0, 0.5).sum() == 1  # clamped, but its share of the mean counts, as in diffusers
    assert not differing(torch.zeros(1, 1, 8, 8), 3.0, 0.5).any()


def test_diffedit_changes_nothing_where_both_texts_are_the_same(editor, chain):
    done = DiffEdit(editor, steps=2, maps=1).edit(chain, Request("", caption=BEFORE, before=BEFORE))
    assert torch.equal(done.latent, encoded(editor, chain.image)) and done.notes["mask_share"] == 0


def test_diffedit_without_a_given_mask_edits_everywhere_and_by_the_paper_finds_its_own(editor, chain):
    given, all_of_it = (
        DiffEdit(editor, steps=2, mask="given").edit(chain, request(mask))
        for mask in (None, Image.new("L", chain.image.size, 255))
    )
    assert torch.equal(given.latent, all_of_it.latent) and given.mask is None
    assert (given.notes["mask"], given.notes["mask_share"]) == ("everywhere", 1.0)
    own, masked = (DiffEdit(editor, steps=2, maps=1).edit(chain, request(mask)) for mask in (None, left_half()))
    assert torch.equal(own.latent, masked.latent) and own.notes["mask"] == "own" and own.notes["mask_share"] < 2 / 3


def test_diffedit_is_told_what_the_picture_shows_before(editor, chain):
    """With the caption of the picture before, and not with the new one or none: its mask would be another."""
    asked = Request("", caption=AFTER, before=BEFORE)
    made, blind = (DiffEdit(editor, steps=2, maps=1).edit(chain, r) for r in (asked, Request("", caption=AFTER)))
    seen = []
    method = DiffEdit(editor, steps=2, maps=1)
    method.find_mask = lambda work, t: seen.append(work.before) or torch.ones_like(work.source[:, :1])
    second = method.edit(method.edit(chain, asked), Request("", caption=BEFORE, before=AFTER))
    assert seen == [BEFORE, AFTER] == [request.before for request in second.requests]
    assert not torch.equal(made.latent, blind.latent)


# ---- all of them


@pytest.mark.parametrize("method", [DiffEdit, BlendedLatentDiffusion])
def test_outside_a_hard_mask_the_latent_is_the_source_s_through_a_chain(editor, chain, method):
    method = method(editor, steps=4, **({"mask": "given"} if method is DiffEdit else {}))
    for _ in range(2):  # each from the 8-bit picture that the one before left, encoded again
        source, chain = encoded(editor, chain.image), method.edit(chain, request(left_half()))
        assert torch.equal(outside(chain.latent), outside(source))
        assert (chain.latent - source)[..., :4].abs().max() > 1e-2
        assert chain.image.tobytes() == images.to_image(editor.decode(chain.latent)).tobytes()


def test_a_mask_of_ones_is_no_mask(editor, chain, eps, alphas):
    for method in (BlendedLatentDiffusion(editor, steps=4), PlugAndPlay(editor, steps=2, inversion_steps=2)):
        with_mask, without = method.edit(chain, request(everywhere())), method.edit(chain, request())
        assert torch.equal(with_mask.latent, without.latent) and without.mask is None
    method, levels = DiffEdit(editor, steps=4, mask="given"), ddim.levels(4)[:4]
    top = ddim.invert(eps(""), encoded(editor, chain.image), levels, alphas)[-1]
    unmasked = ddim.sample(eps(AFTER, method.guidance), top, levels, alphas)
    assert close(method.edit(chain, request(everywhere())).latent, unmasked)  # batched here, branch by branch there


@pytest.mark.parametrize("method", FAST)
def test_the_seed_decides_whatever_ran_before(editor, chain, method):
    method = method(editor, steps=2, **FAST[method])
    first = method.edit(chain, request())
    torch.manual_seed(1)
    again = method.edit(chain, request())
    assert torch.equal(first.latent, again.latent) and first.image.tobytes() == again.image.tobytes()
    assert first.notes == again.notes
    other = method.edit(Chain(chain.original, 6, chain.image), request())
    later = method.edit(Chain(chain.original, 5, chain.image, requests=(request(),)), request())
    for one in (other, later):  # Plug-and-Play draws nothing
        assert torch.equal(one.latent, first.latent) == isinstance(method, PlugAndPlay)


@pytest.mark.parametrize("method", FAST)
def test_an_edit_leaves_its_chain_alone_and_notes_what_it_did(editor, chain, method):
    method = method(editor, steps=2, **FAST[method])
    picture = chain.image.tobytes()
    done = method.edit(chain, request())
    assert chain.requests == () and chain.latent is None and chain.image.tobytes() == picture and chain.notes == {}
    assert done.requests == (request(),) and done.seed == 5 and done.original is chain.original
    assert done.latent.shape == SHAPE and done.latent.dtype == torch.float32 and done.image.size == (SIDE, SIDE)
    assert json.loads(json.dumps(done.notes)) == done.notes
    assert done.notes["steps"] == 2 and done.notes["text"] == AFTER and done.notes["unet_passes"] > 0
    assert hooks_left(editor.unet) == 0


@pytest.mark.parametrize("method", FAST)
def test_the_model_is_told_the_caption_or_the_instruction(editor, chain, method):
    more = {"steps": 2, **FAST[method]}
    done = method(editor, prompt="instruction", **more).edit(chain, Request("make it night"))
    assert done.notes["text"] == "make it night"
    with pytest.raises(InstructionError, match="no caption.*instruction"):
        method(editor, **more).edit(chain, Request("make it night"))
    with pytest.raises(SamplingError, match="caption, instruction"):
        method(editor, prompt="title")


@pytest.mark.parametrize("method", FAST)
def test_the_instructions_model_is_refused(method):
    with pytest.raises(CheckpointError, match=f"takes 8 channels and {method.__name__} needs 4"):
        method(emilie.load("random", "toy", device="cpu"))


@pytest.mark.parametrize(
    "method, settings",
    [
        *((BlendedLatentDiffusion, s) for s in ({"start": 1.0}, {"start": -0.1}, {"steps": 0}, {"steps": 1000})),
        *((BlendedLatentDiffusion, s) for s in ({"steps": 2.5}, {"guidance": float("nan")}, {"guidance": "much"})),
        *((DiffEdit, s) for s in ({"mask": "any"}, {"maps": 0}, {"encode": 0.1, "steps": 5}, {"map_strength": 1.1})),
        *((DiffEdit, s) for s in ({"threshold": -1}, {"clamp": -1})),
        *((PlugAndPlay, s) for s in ({"feature_steps": 2}, {"attention_steps": None}, {"inversion_steps": 1000})),
        *((PlugAndPlay, s) for s in ({"feature_block": 4}, {"attention_block": -1}, {"attention_block": "1"})),
    ],
)
def test_settings_out_of_range_are_refused_before_any_edit(editor, method, settings):
    with pytest.raises(SamplingError):
        method(editor, **settings)


def test_defaults_are_the_config_s(editor):
    assert BlendedLatentDiffusion(editor).steps == 25 and BlendedLatentDiffusion(editor).guidance == 3.0
    assert PlugAndPlay(editor).guidance == 10.0 and PlugAndPlay(editor, guidance=None).guidance == 3.0
    assert PlugAndPlay(editor).inversion_steps == 999 and DiffEdit(editor).steps == 50


def test_a_picture_that_is_not_square(editor):
    picture = Image.fromarray(np.tile(world.pixels(world.scene(3)), (1, 2, 1)))
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 64, 64))
    for method in (DiffEdit(editor, steps=2, maps=1), BlendedLatentDiffusion(editor, steps=2)):
        done = method.edit(method.open(picture, 0), request(mask))
        assert done.image.size == done.mask.size and done.image.width == 2 * done.image.height
