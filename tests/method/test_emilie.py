"""The editor against the original's numbers, and Algorithm 1 against itself, written out once more."""

import copy
from dataclasses import replace

import pytest
import torch
from pseudo import error

import emilie_min
from emilie_min import sampling
from emilie_min.config import GATES
from emilie_min.emilie import emilie, rescale_factor
from emilie_min.errors import SamplingError

SINGLE, CHAINED = 1e-5, 1e-4  # relative error of a single pass; of what is guided, and of trajectories; float32
TEXT_SCALE, IMAGE_SCALE = 7.5, 1.5  # the goldens'


@pytest.fixture(scope="module")
def given(small, goldens):
    """What every golden trajectory is given: z_img, cond, uncond."""
    with torch.no_grad():
        rows = small.text(goldens["text.input_ids"])
    return goldens["vae.rect.mode"], rows[:1], rows[2:]


def noises(goldens):
    rows = iter(goldens["traj.noise_steps"])
    return lambda *_: next(rows)


@torch.no_grad()
@pytest.mark.parametrize("i", range(3))
def test_denoise(small, goldens, given, i):
    """One noisy latent, every branch by itself and guided."""
    names = ("x", "sigma", "denoised", "cfg", "cond", "img_cond", "uncond")
    g = {name: goldens[f"denoise.{i}.{name}"] for name in names}
    (z_img, cond, null), x, sigma = given, g["x"], g["sigma"]
    branches = small.branches([x, x, x], sigma, [z_img, z_img, torch.zeros_like(z_img)], [cond, null, null])
    for name, branch in zip(("cond", "img_cond", "uncond"), branches, strict=True):
        assert error(branch, g[name]) <= SINGLE
    assert error(small.branches([x], sigma, [z_img], [cond])[0], g["denoised"]) <= SINGLE
    for level in (sigma, sigma.item()):
        assert error(small.denoise(x, level, z_img, cond, null, TEXT_SCALE, IMAGE_SCALE), g["cfg"]) <= CHAINED


@torch.no_grad()
def test_every_row_of_a_batch_has_a_noise_level_and_branches_an_x_of_their_own(small, goldens, given):
    z_img, cond, null = given
    x, levels = torch.cat([goldens["denoise.0.x"], goldens["denoise.1.x"]]), torch.tensor([0.7, 9.0])
    alone = [small.branches([x[i : i + 1]], levels[i].item(), [z_img], [cond])[0] for i in range(2)]
    assert error(small.branches([x], levels, [z_img], [cond])[0], torch.cat(alone)) <= SINGLE
    a, b = small.branches([x[:1], x[1:]], 0.7, [z_img, 0 * z_img], [cond, null])
    assert error(a, alone[0]) <= SINGLE
    assert error(b, small.branches([x[1:]], 0.7, [0 * z_img], [null])[0]) <= SINGLE


def test_what_the_network_is_given(small):
    """Two branches of two rows at two noise levels, in a network that keeps what it sees and finds the noise 2."""
    editor, calls = copy.copy(small), []
    editor.unet = lambda x, t, context: calls.append((x, t, context)) or torch.full_like(x[:, :4], 2.0)
    x, y, z_img = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond, null = torch.randn(2, 1, 77, 64, generator=torch.Generator().manual_seed(1))
    levels = torch.tensor([0.7, 9.0])
    denoised = editor.branches([x, y], levels, [z_img, z_img[:1]], [cond, null])
    ((seen, t, context),) = calls
    over = (1 + levels**2).sqrt().view(2, 1, 1, 1)
    assert torch.allclose(seen[:, :4], torch.cat([x / over, y / over]), atol=1e-6)
    assert torch.equal(seen[:, 4:], torch.cat([z_img, z_img[:1].expand(2, -1, -1, -1)]))  # as it is, unscaled
    fractional = sampling.sigma_to_t(levels, small.log_sigmas)
    assert torch.allclose(t, fractional.float().repeat(2), atol=1e-4) and (fractional != fractional.round()).all()
    assert torch.equal(context, torch.cat([cond, cond, null, null]))
    for one, of in zip(denoised, (x, y), strict=True):
        assert torch.allclose(one, of - 2 * levels.view(2, 1, 1, 1))


@torch.no_grad()
def test_trajectory(small, goldens, given):
    """Eight steps, each of them, and the picture that they end in."""
    sigmas, source = goldens["traj.sigmas"], small.scale_factor * given[0]

    def denoise(x, sigma):
        return small.denoise(x, sigma, *given, TEXT_SCALE, IMAGE_SCALE)

    *steps, last = small.steps(denoise, sigmas, goldens["traj.noise_init"], noises(goldens), source)
    assert [step.i for step in steps] == list(range(8)) and (last.i, last.sigma) == (8, 0)
    for i, step in enumerate(steps):
        assert error(step.x, goldens["traj.x"][i]) <= CHAINED, i
        assert error(step.denoised, goldens["traj.denoised"][i]) <= CHAINED, i
        assert [step.sigma, step.sigma_next] == sigmas[i : i + 2].tolist()
    assert error(last.x, goldens["traj.final"]) <= CHAINED
    sampled = small.sample(*given, sigmas, goldens["traj.noise_init"], noises(goldens))  # 7.5 and 1.5 by default
    assert torch.equal(sampled, last.x)
    picture = small.decode(last.x)
    assert error(picture, goldens["traj.decoded"]) <= CHAINED
    levels = (((picture[0] + 1) / 2).clamp(0, 1) * 255).byte().permute(1, 2, 0)  # the original truncates
    off = (levels.int() - goldens["traj.uint8"].int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3  # a rounding error apart, at the edge of a level


@torch.no_grad()
@pytest.mark.parametrize("softness", ["hard", "soft"])
@pytest.mark.parametrize("gate", GATES)
def test_masked_trajectory(small, goldens, given, gate, softness):
    mask, source = goldens[f"mask.{softness}"], goldens["mask.src"]
    final = small.sample(
        *given, goldens["traj.sigmas"], goldens["traj.noise_init"], noises(goldens), mask, gate, source,
        TEXT_SCALE, IMAGE_SCALE,
    )  # fmt: skip
    golden = f"masked.{gate}.{softness}"
    assert error(final, goldens[f"{golden}.final"]) <= CHAINED
    if f"{golden}.decoded" in goldens:
        assert error(small.decode(final), goldens[f"{golden}.decoded"]) <= CHAINED
    outside = (mask == 0).expand_as(final)
    assert outside.any() and not torch.equal(final[~outside], source[~outside])
    assert torch.equal(final[outside], source[outside]) == (gate == "anchor")  # to the bit


def test_the_source_is_the_picture_where_none_is_given(small, goldens, given):
    mask, sigmas = goldens["mask.hard"], goldens["traj.sigmas"][[0, 4, 8]]
    one = goldens["traj.noise_init"], lambda *_: goldens["traj.noise_steps"][0], mask
    final = small.sample(*given, sigmas, *one)
    outside = (mask == 0).expand_as(final)
    assert torch.equal(final[outside], (small.scale_factor * given[0])[outside])
    assert torch.equal(final, small.sample(*given, sigmas, *one, "anchor", small.scale_factor * given[0]))


def test_an_unknown_gate(small, goldens, given):
    z = goldens["traj.noise_init"]
    with pytest.raises(SamplingError, match="unknown gate 'wall'"):
        small.sample(*given, goldens["traj.sigmas"], z, lambda *_: z, goldens["mask.hard"], "wall")


def test_what_encode_and_decode_scale(small, goldens):
    image = goldens["vae.rect.image"]
    assert error(small.encode(image), goldens["vae.rect.mode"]) <= SINGLE
    assert error(small.decode(goldens["vae.rect.z"]), goldens["vae.rect.decoded"]) <= SINGLE
    assert small.scale_factor == 0.18215


def test_context(small, goldens, monkeypatch):
    monkeypatch.setattr(small.text, "tokenize", lambda texts: goldens["text.input_ids"][: len(texts)])
    assert error(small.context(["three", "such", "texts"]), goldens["text.last_hidden_state"]) <= SINGLE


# ---- Algorithm 1


@pytest.fixture(scope="module")
def editor():
    """Random weights, a config of two steps and of scales with which no branch cancels out."""
    editor = copy.copy(emilie_min.load("random", "toy", device="cpu"))
    sampling = replace(editor.config.sampling, steps=2, text_scale=3.0, image_scale=1.5)
    editor.config = replace(editor.config, sampling=sampling)
    return editor


@pytest.fixture
def picture():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def half(soft=0.0):
    mask = torch.full((1, 1, 8, 8), soft)
    mask[..., :4] = 1
    return mask


def test_f_is_a_ratio_of_mean_magnitudes(editor):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.3
    again = editor.vae.encode(editor.vae.decode(z / editor.scale_factor))
    f = rescale_factor(editor, z)
    assert f == pytest.approx(again.abs().mean().item() / z.abs().mean().item(), rel=1e-5)
    signed, squared = again.mean() / z.mean(), again.std() / z.std()
    assert min(abs(f / other.item() - 1) for other in (1 / signed, signed, squared)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("gate", GATES)
def test_algorithm_1(editor, picture, gate):
    """Four edits, two of them masked, step for step from the paper's lines, with Eqs. 2, 5 and 8 and guidance."""
    night, day = "make it night", "make it day"
    edits = [(night, None), (day, half()), ("turn it into a comic", half(0.4)), (night, None)]
    ours = list(emilie(editor, picture, edits, seed=3, gate=gate))

    def denoised(x, sigma, z_img, text):
        t = sampling.sigma_to_t(torch.tensor([sigma]), editor.log_sigmas).float()
        eps = editor.unet(torch.cat([x / (1 + sigma**2) ** 0.5, z_img], 1), t, editor.context([text]))
        return x - sigma * eps

    scaled, shape = editor.scale_factor * editor.vae.encode(picture), (1, 4, 8, 8)
    z_init = sampling.noise_stream(shape, 3, "init")()
    sigma_0, sigma_1, _ = sampling.get_sigmas(2, editor.alphas_cumprod).tolist()
    z = scaled
    for e, (text, mask) in enumerate(edits):
        if e == 0:
            z_img = editor.vae.encode(picture)
        else:
            again = editor.vae.encode(editor.vae.decode(z / editor.scale_factor))
            z_img = again.abs().mean() / z.abs().mean() * z
        noise, x, source = sampling.noise_stream(shape, 3, "edit", e)(), sigma_0 * z_init, z
        m = torch.ones(1, 1, 8, 8) if mask is None else mask
        for sigma, sigma_next in ((sigma_0, sigma_1), (sigma_1, 0.0)):
            cond, img_cond = denoised(x, sigma, z_img, text), denoised(x, sigma, z_img, "")
            uncond = denoised(x, sigma, torch.zeros_like(z_img), "")
            text_scale = 3.0 * m if gate == "guidance" else 3.0
            eps = (x - (uncond + text_scale * (cond - img_cond) + 1.5 * (img_cond - uncond))) / sigma
            if gate == "eq8":
                eps = m * eps
            elif gate == "anchor":
                eps = m * eps + (1 - m) * (x - source) / sigma
            up = sigma_next * (1 - sigma_next**2 / sigma**2) ** 0.5
            x = x + eps * ((sigma_next**2 - up**2) ** 0.5 - sigma) + up * noise
        z = x
        assert error(ours[e], z) <= CHAINED, e
    assert len(ours) == 4


def test_the_first_edit_sees_the_encoded_picture_and_the_later_ones_the_latent(editor, picture, monkeypatch):
    """Lines 1, 4, 6 and 11, and what is drawn when: the very tensors that each edit is given."""
    given, texts, sample, context = [], [], editor.sample, editor.context
    monkeypatch.setattr(editor, "sample", lambda *args: given.append((*args, sample(*args))) or given[-1][-1])
    monkeypatch.setattr(editor, "context", lambda told: texts.append(told) or context(told))
    edits = [("make it night", None), ("make it day", half()), ("make it night", None)]
    latents = list(emilie(editor, picture, edits, seed=3))
    encoded, shape = editor.encode(picture), (1, 4, 8, 8)
    sources = [editor.scale_factor * encoded, *latents[:2]]
    for e, (z_img, _, _, sigmas, z_init, noise, mask, gate, source, text_scale, image_scale, z_0) in enumerate(given):
        assert torch.equal(z_img, rescale_factor(editor, sources[e]) * sources[e] if e else encoded)
        assert torch.equal(source, sources[e])
        assert torch.equal(sigmas, sampling.get_sigmas(2, editor.alphas_cumprod))
        assert torch.equal(z_init, sampling.noise_stream(shape, 3, "init")())
        own = sampling.noise_stream(shape, 3, "edit", e)
        own()  # the one step of two that adds noise drew it already
        assert torch.equal(noise(), own())
        assert mask is edits[e][1] and (gate, text_scale, image_scale) == ("anchor", 3.0, 1.5)
        assert torch.equal(z_0, latents[e])
    assert texts == [[text, ""] for text, _ in edits]


def test_edits_are_made_as_they_are_asked_for(editor, picture, monkeypatch):
    calls, sample = [], editor.sample
    monkeypatch.setattr(editor, "sample", lambda *args: calls.append(1) or sample(*args))
    session = emilie(editor, picture, [("make it night", None)] * 3)
    first = next(session)
    assert len(calls) == 1 and first.shape == (1, 4, 8, 8) and first.dtype == torch.float32
