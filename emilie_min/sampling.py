"""Sampling: the noise schedule, three-way guidance, the mask gate of Eq. 8, and the loop over the steps.

Pure functions that never see a network. Notation is k-diffusion's: `x` is a scaled latent under noise of standard
deviation `sigma`, `denoised` what the model takes the latent under the noise to be, and eps = (x - denoised) / sigma
the noise of unit variance between them. The paper's z_t, which the network is given, is x / sqrt(1 + sigma^2) (Eq. 2).
"""

import hashlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Scale = float | Tensor  # of guidance: a number, or a map that broadcasts over the latent
Denoise = Callable[[Tensor, float], Tensor]  # (x, sigma) -> denoised
Gate = Callable[[Tensor, Tensor, float], Tensor]  # (eps, x, sigma) -> eps
Noise = Callable[[float, float], Tensor]  # (sigma, sigma_next) -> unit normal noise of x's shape


class Step(NamedTuple):
    """What a sampler yields before it takes a step; and once more at the end, where `x` is the latent it arrived at."""

    i: int
    sigma: float
    sigma_next: float
    x: Tensor
    denoised: Tensor


Sampler = Callable[[Denoise, Tensor, Tensor, Noise, Gate | None], Iterator[Step]]


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


def guide(
    cond: Tensor, img_cond: Tensor, uncond: Tensor, text_scale: float | Tensor, image_scale: float | Tensor
) -> Tensor:
    """InstructPix2Pix's classifier-free guidance with two scales (Brooks et al. 2023, Eq. 3).

    Of the three predictions cond saw picture and instruction, img_cond the picture alone, uncond neither; all
    (B, 4, h, w). A scale may be a map that broadcasts over the latent.
    """
    return uncond + text_scale * (cond - img_cond) + image_scale * (img_cond - uncond)


def eq8(mask: Tensor) -> Gate:
    """Eq. 8 literally: m * eps. Outside the mask nothing is denoised, so what sampling started from stays: noise."""
    return lambda eps, x, sigma: mask * eps


def anchor(mask: Tensor, source: Tensor) -> Gate:
    """Eq. 8 with the outside held: there, instead of no eps, the one that leads from x back to the source latent."""
    return lambda eps, x, sigma: mask * eps + (1 - mask) * ((x - source) / sigma)


@torch.no_grad()
def sample_euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise_sampler: Noise, gate: Gate | None = None
) -> Iterator[Step]:
    """k-diffusion's Euler ancestral sampling: the paper's Eq. 5, with the noise prediction gated by a mask (Eq. 8).

    x: (B, 4, h, w), noise of level sigmas[0]; sigmas: (n + 1,), falling, the last 0. A step goes down to sigma_down
    along eps and back up by fresh noise: sigma_down^2 + sigma_up^2 = sigma_next^2.
    """
    levels = sigmas.tolist()  # on the host once, so that the loop never waits for the device
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        yield Step(i, sigma, sigma_next, x, denoised)
        eps = (x - denoised) / sigma
        if gate is not None:
            eps = gate(eps, x, sigma)  # Eq. 8: m * eps
        sigma_up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
        sigma_down = (sigma_next**2 - sigma_up**2) ** 0.5
        x = x + eps * (sigma_down - sigma)  # Eq. 5
        if sigma_next > 0:
            x = x + noise_sampler(sigma, sigma_next).to(x.device) * sigma_up
    yield Step(len(levels) - 1, levels[-1], levels[-1], x, x)


def noise_stream(shape: tuple[int, ...], *key: object) -> Callable[..., Tensor]:
    """Unit normal latents, one a call, that follow from `key` alone; drawn on the CPU, so the same on every device."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(shape, generator=generator)
