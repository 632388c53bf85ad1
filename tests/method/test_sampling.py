"""Schedule, guidance and sampler against the original's numbers, and what each of them promises besides."""

import math

import pytest
import torch
from pseudo import error

from emilie_min import sampling

SINGLE, CHAINED = 1e-5, 1e-4  # relative error of tables and single passes; of guided ones and trajectories, float32
TEXT_SCALE, IMAGE_SCALE = 7.5, 1.5


@pytest.fixture(scope="module")
def schedule(small_config):
    params = small_config.diffusion
    alphas_cumprod = sampling.alphas_cumprod(params.linear_start, params.linear_end, params.timesteps)
    return alphas_cumprod, sampling.log_sigmas(alphas_cumprod)


@pytest.fixture(scope="module")
def branch(networks, goldens, schedule):
    """One network pass as a denoiser: (x, sigma, z_img, context) -> the denoised latent."""

    def denoised(x, sigma, z_img, context):
        sigma = torch.as_tensor(sigma, dtype=torch.float64).view(1)
        t = sampling.sigma_to_t(sigma, schedule[1]).float()
        eps = networks["unet"](torch.cat([x / (sigma**2 + 1).sqrt().float(), z_img], dim=1), t, context)
        return sampling.to_denoised(eps, x, sigma.float())

    return denoised


@pytest.fixture(scope="module")
def contexts(networks, goldens):
    """Of the instruction and of the empty one, (1, 77, D) each."""
    with torch.no_grad():
        rows = networks["text"](goldens["text.input_ids"])
    return rows[:1], rows[2:]


@pytest.fixture(scope="module")
def guided(branch, goldens, contexts):
    """The three branches, guided: (x, sigma, text_scale) -> the denoised latent."""
    z_img = goldens["vae.rect.mode"]
    cond, uncond = contexts

    def denoise(x, sigma, text_scale=TEXT_SCALE):
        branches = [branch(x, sigma, z, c) for z, c in ((z_img, cond), (z_img, uncond), (0 * z_img, uncond))]
        return sampling.guide(*branches, text_scale, IMAGE_SCALE)

    return denoise


def run(denoise, goldens, **more):
    """The goldens' 8 steps with their noises."""
    noises = iter(goldens["traj.noise_steps"])
    start = goldens["traj.noise_init"] * goldens["traj.sigmas"][0]
    return sampling.sample_euler_ancestral(denoise, start, goldens["traj.sigmas"], lambda *_: next(noises), **more)


def decoded(networks, small_config, z):
    with torch.no_grad():
        return networks["vae"].decode(z / small_config.diffusion.scale_factor)


def test_tables(schedule, goldens):
    alphas_cumprod, log_sigmas = schedule
    assert error(alphas_cumprod, goldens["schedule.alphas_cumprod"]) <= SINGLE
    assert error(log_sigmas.exp(), goldens["schedule.sigmas_all"]) <= SINGLE
    for n in (5, 20, 100):
        table = sampling.get_sigmas(n, alphas_cumprod)
        assert error(table, goldens[f"schedule.get_sigmas_{n}"]) <= SINGLE
        assert table[-1] == 0 and (table.diff() < 0).all()
    assert error(sampling.get_sigmas(8, alphas_cumprod), goldens["traj.sigmas"]) <= SINGLE
    assert len(sampling.get_sigmas(1, alphas_cumprod)) == 2


def test_timesteps(schedule, goldens):
    _, log_sigmas = schedule
    t = sampling.sigma_to_t(goldens["schedule.sigma_in"], log_sigmas)
    assert error(t, goldens["schedule.sigma_to_t"]) <= SINGLE
    assert t[0] == 999 and t[-1] == 0  # clamped, above and below the table
    assert (t != t.round()).any()  # fractional timesteps reach the network
    assert (t.round() - goldens["schedule.sigma_to_t_quantized"]).abs().max() <= 1
    assert error(sampling.t_to_sigma(goldens["schedule.t_in"], log_sigmas), goldens["schedule.t_to_sigma"]) <= SINGLE


def test_timesteps_there_and_back(schedule):
    t = torch.tensor([0.0, 0.25, 1.0, 17.5, 998.999, 999.0], dtype=torch.float64)
    assert (sampling.sigma_to_t(sampling.t_to_sigma(t, schedule[1]), schedule[1]) - t).abs().max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("i", range(3))
def test_denoiser(branch, guided, goldens, contexts, i):
    g = {
        name: goldens[f"denoise.{i}.{name}"]
        for name in ("x", "sigma", "denoised", "cfg", *("cond", "img_cond", "uncond"))
    }
    z_img = goldens["vae.rect.mode"]
    cond, uncond = contexts
    assert error(branch(g["x"], g["sigma"], z_img, cond), g["denoised"]) <= SINGLE
    assert error(branch(g["x"], g["sigma"], z_img, cond), g["cond"]) <= SINGLE
    assert error(branch(g["x"], g["sigma"], z_img, uncond), g["img_cond"]) <= SINGLE
    assert error(branch(g["x"], g["sigma"], 0 * z_img, uncond), g["uncond"]) <= SINGLE
    assert error(sampling.guide(g["cond"], g["img_cond"], g["uncond"], TEXT_SCALE, IMAGE_SCALE), g["cfg"]) <= SINGLE
    assert error(guided(g["x"], g["sigma"]), g["cfg"]) <= CHAINED


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


def test_trajectory(guided, networks, goldens, small_config):
    steps = []
    final = run(guided, goldens, callback=steps.append)
    assert [step["i"] for step in steps] == list(range(8))
    for i, step in enumerate(steps):
        assert error(step["x"], goldens["traj.x"][i]) <= CHAINED, i
        assert error(step["denoised"], goldens["traj.denoised"][i]) <= CHAINED, i
        assert [step["sigma"], step["sigma_next"]] == goldens["traj.sigmas"][i : i + 2].tolist()
    assert error(final, goldens["traj.final"]) <= CHAINED
    image = decoded(networks, small_config, final)
    assert error(image, goldens["traj.decoded"]) <= CHAINED
    levels = (((image[0] + 1) / 2).clamp(0, 1) * 255).byte().permute(1, 2, 0)  # the original truncates
    off = (levels.int() - goldens["traj.uint8"].int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3  # a rounding error apart, at the edge of a level


@pytest.mark.parametrize("softness", ["hard", "soft"])
@pytest.mark.parametrize("gate", ["eq8", "anchor", "guidance"])
def test_masked_trajectory(guided, networks, goldens, small_config, gate, softness):
    mask, source = goldens[f"mask.{softness}"], goldens["mask.src"]
    if gate == "guidance":
        final = run(lambda x, sigma: guided(x, sigma, mask * TEXT_SCALE), goldens)
    else:
        final = run(guided, goldens, mask=mask, source=source if gate == "anchor" else None)
    golden = f"masked.{gate}.{softness}"
    assert error(final, goldens[f"{golden}.final"]) <= CHAINED
    if f"{golden}.decoded" in goldens:
        assert error(decoded(networks, small_config, final), goldens[f"{golden}.decoded"]) <= CHAINED
    if gate == "anchor":
        outside = (mask == 0).expand_as(final)
        assert outside.any() and torch.equal(final[outside], source[outside])  # to the bit
        assert not torch.equal(final[~outside], source[~outside])


def toy(x, sigma):
    """A denoiser that costs nothing."""
    return torch.tanh(x / (1 + sigma))


def noises(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(shape, generator=generator)


@pytest.fixture
def start(schedule):
    sigmas = sampling.get_sigmas(6, schedule[0])
    shape = (2, 4, 6, 5)
    source = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 6, 5)
    mask[..., 2:4, 1:3], mask[..., 4, :] = 1, 0.3
    return {"x": noises(shape, 1)() * sigmas[0], "sigmas": sigmas, "shape": shape, "source": source, "mask": mask}


def sample(start, denoise=toy, **more):
    return sampling.sample_euler_ancestral(denoise, start["x"], start["sigmas"], noises(start["shape"]), **more)


def test_a_mask_of_ones_changes_nothing(start):
    plain, ones = sample(start), torch.ones_like(start["mask"])
    assert torch.equal(sample(start, mask=ones), plain)
    assert torch.equal(sample(start, mask=ones, source=start["source"]), plain)


def test_a_mask_of_zeros_keeps_the_source(start):
    assert torch.equal(sample(start, mask=torch.zeros_like(start["mask"]), source=start["source"]), start["source"])


def test_a_mask_of_zeros_without_a_source_keeps_the_noise(start):
    """Eq. 8 to the letter: where eps is zero nothing is removed and every step's noise is added."""
    sigmas, noise, x = start["sigmas"].tolist(), noises(start["shape"]), start["x"]
    for sigma, sigma_next in zip(sigmas[:-2], sigmas[1:-1], strict=True):
        x = x + noise() * sampling.get_ancestral_step(sigma, sigma_next)[1]
    assert torch.allclose(sample(start, mask=torch.zeros_like(start["mask"])), x)


@pytest.mark.parametrize("gate", ["none", "eq8", "anchor"])
def test_deterministic_and_without_side_effects(start, gate):
    more = {"none": {}, "eq8": {"mask": start["mask"]}, "anchor": {"mask": start["mask"], "source": start["source"]}}[
        gate
    ]
    before = {name: t.clone() for name, t in start.items() if isinstance(t, torch.Tensor)}
    state = torch.get_rng_state()
    steps = []
    first = sample(start, callback=lambda step: steps.append({**step, "x": step["x"].clone()}), **more)
    kept = []
    assert torch.equal(sample(start, callback=kept.append, **more), first)
    assert all(torch.equal(t, start[name]) for name, t in before.items())
    assert torch.equal(torch.get_rng_state(), state)  # no noise but the caller's
    for early, late in zip(steps, kept, strict=True):  # what a callback keeps is not written over later
        assert torch.equal(early["x"], late["x"])


def test_every_steps_noise_is_asked_for_once(start):
    asked, noise = [], noises(start["shape"])

    def sampler(sigma, sigma_next):
        asked.append((sigma, sigma_next))
        return noise()

    sampling.sample_euler_ancestral(toy, start["x"], start["sigmas"], sampler)
    sigmas = start["sigmas"].tolist()
    assert asked == list(zip(sigmas[:-2], sigmas[1:-1], strict=True))  # the last step adds none


def test_a_perfect_denoiser_is_believed(start):
    assert torch.allclose(sample(start, lambda x, sigma: start["source"]), start["source"], atol=1e-4)


@pytest.mark.parametrize("sigma, sigma_next", [(14.6, 10.0), (1.0, 0.999), (0.03, 0.0), (5.0, 5.0)])
def test_ancestral_step(sigma, sigma_next):
    down, up = sampling.get_ancestral_step(sigma, sigma_next)
    assert math.isclose(math.hypot(down, up), sigma_next, rel_tol=1e-6)
    assert 0 <= down <= sigma_next and 0 <= up <= sigma_next
