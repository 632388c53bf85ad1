"""Faster by doing less: the second-order samplers, deep features reused, guidance in an interval."""

import math

import pytest
import torch
from pseudo import error

from emilie_min import sampling
from emilie_min.canvas.canvas import SAMPLERS
from emilie_min.faster.deepcache import DeepCache
from emilie_min.faster.dpmpp import sample_dpmpp_2m
from emilie_min.faster.interval import guidance_interval


def latent(sampler, *args):
    *_, last = sampler(*args)
    return last.x


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
        there = latent(sample_dpmpp_2m, gaussian, x, sigmas, None)
        back = 0.5 + (there - 0.5) * 0.3 / (0.09 + 0.01**2) ** 0.5  # the rest of the way, exactly
        errors.append((back - exact(x, 10.0)).abs().item())
    assert errors[0] > 3.3 * errors[1] > 3.3**2 * errors[2] > 0


def test_dpmpp_2m_sde_draws_from_the_right_distribution():
    draw = torch.Generator().manual_seed(0)
    shape, sigmas = (4000, 1, 2, 2), torch.cat([torch.linspace(math.log(10), math.log(0.02), 60).exp(), torch.zeros(1)])
    x = 0.5 + torch.randn(shape, generator=draw) * (0.09 + 10.0**2) ** 0.5
    noise = lambda *_: torch.randn(shape, generator=draw)  # noqa: E731
    out = latent(SAMPLERS["dpmpp_2m_sde"], gaussian, x, sigmas, noise)
    assert abs(out.mean() - 0.5) < 0.01 and abs(out.std() - 0.3) < 0.01
    still = latent(sample_dpmpp_2m, gaussian, x, sigmas, None)
    assert (out - still).std() > 0.1  # the noise between the steps is not for nothing


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_keeps_the_seams_promises(sampler):
    """What is yielded, what a gate holds, and that noise is asked for between the steps alone."""
    draw = torch.Generator().manual_seed(0)
    x, source = torch.randn(2, 1, 4, 8, 8, generator=draw)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    sigmas, asked = torch.tensor([10.0, 3.0, 1.0, 0.3, 0.0]), []
    outside, inside = (mask == 0).expand_as(x), (mask == 1).expand_as(x)

    def run(noise, gate=None):
        return latent(SAMPLERS[sampler], gaussian, 10 * x, sigmas, lambda *at: asked.append(at) or noise, gate)

    noise = torch.randn(x.shape, generator=draw)
    free, asked_once = run(noise), list(asked)
    anchored = run(noise, sampling.anchor(mask, source))
    assert torch.allclose(anchored[outside], source[outside], atol=1e-5)
    assert torch.allclose(anchored[inside], free[inside], atol=1e-5)
    eq8 = run(torch.zeros_like(x), sampling.eq8(mask))  # without noise nothing moves outside
    still = run(torch.zeros_like(x))
    assert torch.allclose(eq8[outside], 10 * x[outside], rtol=1e-5)
    assert torch.allclose(eq8[inside], still[inside], atol=1e-5)
    levels = sigmas.tolist()
    assert asked_once == ([] if sampler == "dpmpp_2m" else list(zip(levels[:-2], levels[1:-1])))
    *steps, last = SAMPLERS[sampler](gaussian, 10 * x, sigmas, lambda *_: noise)
    assert [(step.i, step.sigma, step.sigma_next) for step in steps] == list(zip(range(4), levels, levels[1:]))
    assert all(torch.equal(step.denoised, gaussian(step.x, step.sigma)) for step in steps)
    assert (last.i, last.sigma, last.sigma_next) == (4, 0, 0) and torch.equal(last.x, free)


def test_dpmpp_is_near_the_same_picture_in_fewer_steps(shipped, edited):
    fine = edited(shipped, sampler="dpmpp_2m", steps=40)
    apart = [error(edited(shipped, sampler="dpmpp_2m", steps=n), fine) for n in (16, 5)]
    assert apart[0] < apart[1]
    for sampler in ("dpmpp_2m", "dpmpp_2m_sde"):
        each = [edited(shipped, sampler=sampler, steps=2, seed=seed) for seed in (1, 2)]
        assert torch.equal(*each) == (sampler == "dpmpp_2m")


def test_deep_layers_run_at_the_first_call_and_every_nth_after_it(shipped, edited):
    full = []
    middle = shipped.unet.middle_block[0].register_forward_pre_hook(lambda *_: full.append("deep"))
    last = shipped.unet.output_blocks[-1][0].register_forward_pre_hook(lambda *_: full.append("step"))
    try:
        edited(shipped, steps=8, reuse=3)
    finally:
        middle.remove(), last.remove()
    assert full == ["deep", *3 * ["step"], "deep", *3 * ["step"], "deep", *2 * ["step"]]


@torch.no_grad()
def test_deep_features_are_those_of_the_last_full_call(small):
    draw = torch.Generator().manual_seed(0)
    xs, t = torch.randn(4, 1, 8, 16, 16, generator=draw), torch.tensor([417.3])
    context = torch.randn(1, 77, small.config.unet.context_dim, generator=draw)
    plain = [small.unet(x, t, context) for x in xs]
    cached = DeepCache(small.unet, 3)
    assert torch.equal(cached(xs[0], t, context), plain[0])
    assert torch.equal(cached(xs[0], t, context), plain[0])  # the same again: what is kept is what was computed
    assert error(cached(xs[2], t, context), plain[2]) > 1e-3
    assert torch.equal(cached(xs[3], t, context), plain[3])  # the fourth call, of its own
    every = DeepCache(small.unet, 1)
    assert all(torch.equal(every(x, t, context), eps) for x, eps in zip(xs, plain))
    kept = DeepCache(small.unet, 100)
    kept(xs[0], t, context)
    both = torch.cat([xs[0], xs[1]]), t.repeat(2), context.repeat(2, 1, 1)
    assert error(kept(*both), small.unet(*both)) <= 1e-5  # another number of rows: nothing to reuse
    in_turn = DeepCache(small.unet, 2)
    for call in range(2):
        for in_turn.branch in range(2):  # each branch has features, and a count, of its own
            eps = in_turn(xs[in_turn.branch], t, context)
            assert torch.equal(eps, plain[in_turn.branch]), call


def test_an_interval_has_both_its_ends():
    denoise = guidance_interval(lambda x, sigma: "guided", lambda x, sigma: "alone", 0.5, 5.0)
    assert [denoise(None, sigma) for sigma in (0.49, 0.5, 2.0, 5.0, 5.1)] == ["alone", *3 * ["guided"], "alone"]


def test_an_interval_of_all_levels_changes_nothing(shipped, edited):
    everywhere = edited(shipped, steps=4, guidance_interval=(0, 1000))
    assert torch.equal(everywhere, edited(shipped, steps=4))
    assert not torch.equal(edited(shipped, steps=4, guidance_interval=(5.0, 9.0)), everywhere)
