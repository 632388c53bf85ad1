"""Schedule, guidance, gates and sampler by themselves: the original's tables, and what each of them promises."""

import math

import pytest
import torch
from pseudo import error

from emilie_min import sampling

SINGLE = 1e-5  # relative error of a table, float32


@pytest.fixture(scope="module")
def alphas(small_config):
    d = small_config.diffusion
    return sampling.alphas_cumprod(d.linear_start, d.linear_end, d.timesteps)


@pytest.fixture(scope="module")
def log_sigmas(alphas):
    return sampling.log_sigmas(alphas)


def test_tables(alphas, log_sigmas, goldens):
    assert error(alphas, goldens["schedule.alphas_cumprod"]) <= SINGLE
    assert error(log_sigmas.exp(), goldens["schedule.sigmas_all"]) <= SINGLE
    for n in (5, 20, 100):
        table = sampling.get_sigmas(n, alphas)
        assert error(table, goldens[f"schedule.get_sigmas_{n}"]) <= SINGLE
        assert table[-1] == 0 and (table.diff() < 0).all()
    assert error(sampling.get_sigmas(8, alphas), goldens["traj.sigmas"]) <= SINGLE
    assert len(sampling.get_sigmas(1, alphas)) == 2


def test_timesteps_are_fractional(log_sigmas, goldens):
    t = sampling.sigma_to_t(goldens["schedule.sigma_in"], log_sigmas)
    assert error(t, goldens["schedule.sigma_to_t"]) <= SINGLE
    assert t[0] == 999 and t[-1] == 0  # clamped, above and below the table
    assert (t != t.round()).any()
    assert (t.round() - goldens["schedule.sigma_to_t_quantized"]).abs().max() <= 1
    assert error(sampling.t_to_sigma(goldens["schedule.t_in"], log_sigmas), goldens["schedule.t_to_sigma"]) <= SINGLE


def test_timesteps_there_and_back(log_sigmas):
    t = torch.tensor([0.0, 0.25, 1.0, 17.5, 998.999, 999.0], dtype=torch.float64)
    assert (sampling.sigma_to_t(sampling.t_to_sigma(t, log_sigmas), log_sigmas) - t).abs().max() < 1e-9


def test_guidance():
    cond, img_cond, uncond = torch.randn(3, 1, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sampling.guide(cond, img_cond, uncond, 1, 1), cond, atol=1e-6)
    assert torch.allclose(sampling.guide(cond, img_cond, uncond, 0, 1), img_cond, atol=1e-6)
    assert torch.equal(sampling.guide(cond, img_cond, uncond, 0, 0), uncond)
    scale = torch.tensor([[[[7.5, 0, 2], [1, 1, 0]]]])  # a map, (1, 1, h, w)
    mapped = sampling.guide(cond, img_cond, uncond, scale, 1.5)
    for y in range(2):
        for x in range(3):
            single = sampling.guide(cond, img_cond, uncond, scale[0, 0, y, x].item(), 1.5)
            assert torch.equal(mapped[..., y, x], single[..., y, x])


def shrink(x, sigma):
    """A denoiser that costs nothing."""
    return torch.tanh(x / (1 + sigma))


def noises(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(shape, generator=generator)


@pytest.fixture
def start(alphas):
    sigmas = sampling.get_sigmas(6, alphas)
    shape = (2, 4, 6, 5)
    source = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 6, 5)
    mask[..., 2:4, 1:3], mask[..., 4, :] = 1, 0.3
    return {"x": noises(shape, 1)() * sigmas[0], "sigmas": sigmas, "shape": shape, "source": source, "mask": mask}


def steps(start, denoise=shrink, gate=None):
    return sampling.sample_euler_ancestral(denoise, start["x"], start["sigmas"], noises(start["shape"]), gate)


def sample(start, denoise=shrink, gate=None):
    *_, last = steps(start, denoise, gate)
    return last.x


def test_every_step_is_yielded_and_at_the_end_the_latent(start):
    seen, levels = list(steps(start)), start["sigmas"].tolist()
    assert [step.i for step in seen] == list(range(7))
    assert [step.sigma for step in seen] == levels
    assert [step.sigma_next for step in seen] == [*levels[1:], 0]
    for step in seen[:-1]:
        assert torch.equal(step.denoised, shrink(step.x, step.sigma))
    assert torch.equal(seen[0].x, start["x"]) and torch.equal(seen[-1].denoised, seen[-1].x)


def test_a_loop_that_is_left_asks_for_no_more(start):
    calls = []
    for step in steps(start, lambda x, sigma: calls.append(sigma) or shrink(x, sigma)):
        if step.i == 2:
            break
    assert calls == start["sigmas"][:3].tolist()


def test_a_mask_of_ones_changes_nothing(start):
    ones = torch.ones_like(start["mask"])
    for gate in (sampling.eq8(ones), sampling.anchor(ones, start["source"])):
        assert torch.equal(sample(start, gate=gate), sample(start))


def test_an_anchored_mask_of_zeros_leads_to_the_source(start):
    gate = sampling.anchor(torch.zeros_like(start["mask"]), start["source"])
    assert torch.allclose(sample(start, gate=gate), start["source"], atol=1e-5)


def test_eq8_with_a_mask_of_zeros_keeps_the_noise(start):
    """Where eps is zero nothing is removed and every step's noise is added."""
    levels, noise, x = start["sigmas"].tolist(), noises(start["shape"]), start["x"]
    for sigma, sigma_next in zip(levels[:-2], levels[1:-1], strict=True):
        x = x + noise() * sigma_next * (1 - sigma_next**2 / sigma**2) ** 0.5
    assert torch.allclose(sample(start, gate=sampling.eq8(torch.zeros_like(start["mask"]))), x, rtol=1e-4)


def test_a_gate_is_given_eps_x_and_sigma(start):
    seen = []
    expected = [((step.x - step.denoised) / step.sigma, step.x, step.sigma) for step in steps(start)][:-1]
    sample(start, gate=lambda *given: seen.append(given) or given[0])
    for (eps, x, sigma), (eps_wanted, x_wanted, sigma_wanted) in zip(seen, expected, strict=True):
        assert torch.equal(eps, eps_wanted) and torch.equal(x, x_wanted) and sigma == sigma_wanted


@pytest.mark.parametrize("gate", [None, "eq8", "anchor"])
def test_deterministic_and_without_side_effects(start, gate):
    mask, source = start["mask"], start["source"]
    gate = {None: None, "eq8": sampling.eq8(mask), "anchor": sampling.anchor(mask, source)}[gate]
    before = {name: t.clone() for name, t in start.items() if isinstance(t, torch.Tensor)}
    state = torch.get_rng_state()
    early = [step.x.clone() for step in steps(start, gate=gate)]
    kept = [step.x for step in steps(start, gate=gate)]  # what is kept is not written over later
    assert all(torch.equal(a, b) for a, b in zip(early, kept, strict=True))
    assert all(torch.equal(t, start[name]) for name, t in before.items())
    assert torch.equal(torch.get_rng_state(), state)  # no noise but the caller's


def test_every_steps_noise_is_asked_for_once(start):
    asked, noise = [], noises(start["shape"])

    def sampler(sigma, sigma_next):
        asked.append((sigma, sigma_next))
        return noise()

    list(sampling.sample_euler_ancestral(shrink, start["x"], start["sigmas"], sampler))
    levels = start["sigmas"].tolist()
    assert asked == list(zip(levels[:-2], levels[1:-1], strict=True))  # the last step adds none


def test_a_perfect_denoiser_is_believed(start):
    assert torch.allclose(sample(start, lambda x, sigma: start["source"]), start["source"], atol=1e-4)


@pytest.mark.parametrize("sigma, sigma_next", [(14.6, 10.0), (1.0, 0.999), (0.03, 0.01), (5.0, 5.0)])
def test_a_step_goes_down_along_eps_and_up_by_noise_to_the_next_level(sigma, sigma_next):
    one, levels = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([sigma, sigma_next])

    def arrives(x, noise):
        *_, last = sampling.sample_euler_ancestral(lambda x, sigma: 0 * x, x * sigma, levels, lambda *_: noise)
        return last.x.item()

    down, up = arrives(one, 0 * one), arrives(0 * one, one)
    assert 0 <= down <= sigma_next * (1 + 1e-6) and 0 <= up <= sigma_next
    assert math.isclose(math.hypot(down, up), sigma_next, rel_tol=1e-5)
    assert math.isclose(up**2, sigma_next**2 * (1 - sigma_next**2 / sigma**2), rel_tol=1e-3, abs_tol=1e-6)


def test_noise_follows_from_its_key_alone():
    shape = (1, 4, 8, 8)
    keys = [(5, "init"), (5, "edit", 0), (5, "edit", 1), (6, "edit", 0), (6, "init")]
    first = [sampling.noise_stream(shape, *key)() for key in keys]
    torch.manual_seed(1)
    assert all(torch.equal(sampling.noise_stream(shape, *key)(), z) for key, z in zip(keys, first))
    assert len({z.sum().item() for z in first}) == len(keys)
    stream = sampling.noise_stream(shape, 5, "init")
    assert torch.equal(stream(), first[0]) and not torch.equal(stream(3.0, 1.0), first[0])
    assert abs(sampling.noise_stream((100, 100), 0)().std().item() - 1) < 0.02
