"""Sampling: the noise schedule, epsilon to denoised, guidance, the mask gate of Eq. 8, and the loops over the steps.

Pure functions that never see a network. Notation is k-diffusion's (Karras et al. 2022): `x` is a latent with noise of
standard deviation `sigma`, in diffusion scale, and a model's opinion of it is `denoised`, the latent without the noise.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor


def alphas_cumprod(linear_start: float, linear_end: float, timesteps: int) -> Tensor:
    """Latent diffusion's schedule, betas linear in their square roots; (timesteps,) float32, computed in float64."""
    betas = torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()  # float32 is what the checkpoint stores, and sampling starts from that


def log_sigmas(alphas_cumprod: Tensor) -> Tensor:
    """log sigma of every training timestep, ascending; (timesteps,) float64."""
    a = alphas_cumprod.double()
    return ((1 - a) / a).log() / 2


def t_to_sigma(t: Tensor, log_sigmas: Tensor) -> Tensor:
    """Noise level of a timestep that may be fractional, linear in log sigma between whole ones; float64."""
    low = t.double().floor().long().clamp(0, len(log_sigmas) - 2)
    return torch.lerp(log_sigmas[low], log_sigmas[low + 1], t.double() - low).exp()


def sigma_to_t(sigma: Tensor, log_sigmas: Tensor) -> Tensor:
    """Inverse of `t_to_sigma`, clamped to [0, timesteps - 1]; fractional timesteps reach the network. float64."""
    log_sigma = sigma.double().log()
    low = (torch.searchsorted(log_sigmas, log_sigma, right=True) - 1).clamp(0, len(log_sigmas) - 2)
    return low + ((log_sigma - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])).clamp(0, 1)


def get_sigmas(n: int, alphas_cumprod: Tensor) -> Tensor:
    """The noise levels of n steps, uniform in the timestep, falling to a last 0; (n + 1,) float32."""
    t = torch.linspace(len(alphas_cumprod) - 1, 0, n, dtype=torch.float64)
    sigmas = t_to_sigma(t, log_sigmas(alphas_cumprod))
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def to_denoised(eps: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent that a noise prediction stands for; eps, x: (B, 4, h, w), sigma: scalar or (B, 1, 1, 1)."""
    return x - sigma * eps


def guide(
    cond: Tensor, img_cond: Tensor, uncond: Tensor, text_scale: float | Tensor, image_scale: float | Tensor
) -> Tensor:
    """Three-way classifier-free guidance (Brooks et al. 2023, Eq. 3).

    cond saw image and instruction, img_cond the image and an empty instruction, uncond neither. A scale may be a map
    that broadcasts over the latent.
    """
    return uncond + text_scale * (cond - img_cond) + image_scale * (img_cond - uncond)


def branches(n: int, text_scale: float | Tensor, image_scale: float | Tensor) -> int:
    """How many of n conds, img_cond and uncond guidance needs: at image scale 1 uncond cancels out, and at text scale
    1 too img_cond. A map of scales is not looked into."""
    text_one, image_one = (not isinstance(scale, Tensor) and scale == 1 for scale in (text_scale, image_scale))
    return n + 2 - image_one - (image_one and text_one)


def combine(
    denoised: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    text_scale: float | Tensor,
    image_scale: float | Tensor,
) -> Tensor:
    """`guide` for n conds whose `weights` sum to 1, then img_cond and uncond, which may be left out where they
    cancel, see `branches`."""
    n = len(weights)
    cond = sum(w * c for w, c in zip(weights, denoised))  # energies add: cond - img_cond is sum of w (c - img_cond)
    img_cond = denoised[n] if len(denoised) > n else cond
    uncond = denoised[n + 1] if len(denoised) > n + 1 else img_cond
    return guide(cond, img_cond, uncond, text_scale, image_scale)


def partition(masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Each region's share of every cell, (n, B or 1, 1, h, w), and the regions' union, (B or 1, 1, h, w).

    masks: (B or 1, 1, h, w) in [0, 1]; None means everywhere else, and with one there is no outside: the union is None.
    The shares are in proportion to the masks and sum to 1 everywhere, a partition of unity; outside the union, where
    every gate leaves the instructions out, they are equal. The union is the largest of the masks.
    """
    given = [mask for mask in masks if mask is not None]
    union = torch.stack(given).amax(0) if given else torch.zeros(1, 1, 1, 1)
    regions = torch.stack([1 - union if mask is None else mask for mask in masks])
    total = regions.sum(0)
    shares = torch.where(total > 0, regions / total, 1 / len(masks))
    return shares, union if len(given) == len(masks) else None


def get_ancestral_step(sigma: float, sigma_next: float) -> tuple[float, float]:
    """Split a step into the level to go down to and the noise to add: sigma_down^2 + sigma_up^2 = sigma_next^2."""
    sigma_up = min(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - sigma_up**2) ** 0.5, sigma_up


@torch.no_grad()
def sample_euler_ancestral(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Tensor,
    noise_sampler: Callable[[float, float], Tensor],
    mask: Tensor | None = None,
    source: Tensor | None = None,
    callback: Callable[[dict], None] | None = None,
) -> Tensor:
    """Euler ancestral sampling (Karras et al. 2022; EMILIE Eq. 5) with the noise prediction gated by a mask (Eq. 8).

    x: (B, 4, h, w), noise of level sigmas[0]; sigmas: (n + 1,), falling; `noise_sampler(sigma, sigma_next)` gives unit
    noise; mask: (B or 1, 1, h, w) in [0, 1], 1 = edit. Outside the mask the noise prediction is zero (Eq. 8 to the
    letter), or, with a `source` latent, the one that leads back to the source; at sigma 0 a hard mask's outside then
    equals the source exactly. `callback` gets {"i", "x", "sigma", "sigma_next", "denoised"} before each step is taken.
    """
    sigmas = sigmas.tolist()  # on the host once, so that the loop never waits for the device
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        denoised = denoise(x, sigma)
        if callback:
            callback({"i": i, "x": x, "sigma": sigma, "sigma_next": sigma_next, "denoised": denoised})
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next)
        eps = (x - denoised) / sigma
        if mask is not None:
            away = 0 if source is None else (x - source) / sigma  # the eps that leads back to the source
            eps = mask * eps + (1 - mask) * away  # Eq. 8: with away = 0 this is m * eps
        x = x + eps * (sigma_down - sigma)
        if sigma_next > 0:
            x = x + noise_sampler(sigma, sigma_next) * sigma_up
    if mask is not None and source is not None and sigmas[-1] == 0:
        x = torch.where(mask == 0, source, x)  # the same number but for rounding: now the same bits
    return x


@torch.no_grad()
def sample_dpmpp_2m(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Tensor,
    noise_sampler: Callable[[float, float], Tensor],
    mask: Tensor | None = None,
    source: Tensor | None = None,
    callback: Callable[[dict], None] | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2) in sigma space: second order at one network call a step.

    Arguments as for `sample_euler_ancestral`, for which it is a faster stand-in: a fifth of the steps. With lambda =
    -log sigma, x moves exactly for a `denoised` that is linear in lambda, extrapolated from the last two. eta: 0 adds
    no noise, 1 is the SDE version. The gate of Eq. 8 in this form: outside the mask `denoised` is `source`, or x.
    """
    sigmas, old = sigmas.tolist(), None
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        denoised = denoise(x, sigma)
        if callback:
            callback({"i": i, "x": x, "sigma": sigma, "sigma_next": sigma_next, "denoised": denoised})
        target, h = denoised, math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        if old is not None and sigma_next > 0:
            target = denoised + (denoised - old) * (h / math.log(sigmas[i - 1] / sigma) / 2)
        if mask is not None:
            target = torch.lerp(x if source is None else source, target, mask)
        x = target + (x - target) * math.exp(-(1 + eta) * h)  # all the way to `target` where the noise ends
        if sigma_next > 0 and eta > 0:
            x = x + noise_sampler(sigma, sigma_next) * (sigma_next * (-math.expm1(-2 * eta * h)) ** 0.5)
        old = denoised
    return x


SAMPLERS = {
    "euler_ancestral": sample_euler_ancestral,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": partial(sample_dpmpp_2m, eta=1.0),
}
