"""DDIM (Song et al. 2021, eta 0): one step that serves both directions, inversion and sampling.

Pure functions that never see a network. A *level* is a training timestep t, and z at level t has alphas_cumprod[t] of
signal. Conventions, the same in both directions: eps is evaluated where the latent is, at the level that a step
starts from; the lowest level is t = 0, whose alpha (.99915 for Stable Diffusion) counts as clean, as in CompVis' code,
so that an encoded picture is put in at level 0 as it is and a sample comes out there.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ..errors import SamplingError

Eps = Callable[[Tensor, int], Tensor]  # a latent (B, 4, h, w) and its level -> the noise in it, (B, 4, h, w)


def timesteps(n: int, total: int = 1000) -> list[int]:
    """n timesteps, rising, spread evenly from 1: floor(i total / n) + 1; 50 of 1000 are 1, 21, ..., 981.

    CompVis' "uniform" where n divides `total`; elsewhere that gives more than n, and all of `total` is one too many
    for any. Raises SamplingError unless n is from 1 to total - 1.
    """
    if not 1 <= n < total:
        raise SamplingError(f"steps must be a whole number from 1 to {total - 1}, not {n}")
    return [i * total // n + 1 for i in range(n)]


def levels(n: int, total: int = 1000) -> list[int]:
    """The n + 1 levels that n steps lead through, rising: 0 and `timesteps`."""
    return [0, *timesteps(n, total)]


def share(fraction: float, n: int) -> int:
    """The whole steps in a fraction of n, rounded down as int(fraction * n) would but for its binary rounding."""
    return math.floor(fraction * n + 1e-9)


def step(z: Tensor, eps: Tensor, a_from: float, a_to: float) -> Tensor:
    """From one alphas_cumprod to another, up or down: to the clean latent that eps stands for, and out again."""
    x0 = (z - (1 - a_from) ** 0.5 * eps) / a_from**0.5
    return a_to**0.5 * x0 + (1 - a_to) ** 0.5 * eps


def noised(z: Tensor, noise: Tensor, a: float) -> Tensor:
    """q(z_t | z): a clean latent and unit noise, mixed for alphas_cumprod a."""
    return a**0.5 * z + (1 - a) ** 0.5 * noise


def invert(eps: Eps, z: Tensor, levels: Sequence[int], alphas: Sequence[float]) -> list[Tensor]:
    """Up through rising levels from a clean latent z: the latents at all of them, z itself first."""
    latents = [z]
    for t, t_to in zip(levels[:-1], levels[1:]):
        latents.append(step(latents[-1], eps(latents[-1], t), alphas[t], alphas[t_to]))
    return latents


def sample(
    eps: Eps,
    z: Tensor,
    levels: Sequence[int],
    alphas: Sequence[float],
    after_step: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Down through the same rising levels, from z at the last to the first.

    `after_step(z, t)` may replace the latent that has just reached level t.
    """
    down = levels[::-1]
    for t, t_to in zip(down[:-1], down[1:]):
        z = step(z, eps(z, t), alphas[t], alphas[t_to])
        if after_step:
            z = after_step(z, t_to)
    return z
