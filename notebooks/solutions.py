"""The answers to exercises.ipynb, by the names that they have there; `from solutions import *` fills all holes."""

import torch
from torch import Tensor

from emilie_min.emilie import Editor
from emilie_min.sampling import Gate


def sigma_table(beta: Tensor) -> Tensor:
    """Eq. 2 divided by sqrt(abar_t): what then stands before epsilon."""
    abar = torch.cumprod(1 - beta, 0)
    return ((1 - abar) / abar).sqrt()


def stack(x: Tensor, sigma: float, z_img: Tensor) -> Tensor:
    """Line 7, and Fig. 4: z_t has unit variance, z_img is the encoder's output as it is."""
    return torch.cat([x / (1 + sigma**2) ** 0.5, z_img], dim=1)


def guide(cond: Tensor, img_cond: Tensor, uncond: Tensor, text_scale: float, image_scale: float) -> Tensor:
    return uncond + text_scale * (cond - img_cond) + image_scale * (img_cond - uncond)


def ancestral_split(sigma: float, sigma_next: float) -> tuple[float, float]:
    """The posterior's variance in the scale of x; and the squares of both sum to sigma_next's."""
    sigma_up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
    return (sigma_next**2 - sigma_up**2) ** 0.5, sigma_up


def step(x: Tensor, eps: Tensor, sigma: float, sigma_down: float, sigma_up: float, noise: Tensor) -> Tensor:
    """Eq. 5 with its coefficients: of the noise sigma * eps that is in x, sigma_down * eps is left."""
    return x + (sigma_down - sigma) * eps + sigma_up * noise


def langevin(z: Tensor, gradient: Tensor, lam: float, noise: Tensor) -> Tensor:
    """Eq. 7 with omega^2 = lambda."""
    return z - lam / 2 * gradient + lam**0.5 * noise


def eq8(eps: Tensor, mask: Tensor) -> Tensor:
    return mask * eps


def factor(again: Tensor, z: Tensor) -> float:
    """Sec. 5.3, of magnitudes: a latent has both signs, and its signed mean may be anything near 0."""
    return (again.abs().mean() / z.abs().mean()).item()


def iterate(editor: Editor, z: Tensor, way: str) -> Tensor:
    """Sec. 4.2. For the latent any good f does; 1 / scale_factor is what it estimates."""
    if way == "latent":
        return z / editor.scale_factor
    return editor.encode(editor.decode(z))


def own_gate(mask: Tensor, source: Tensor) -> Gate:
    """One of many: the outside is held by what leads back to the source; in the last steps eps has a tenth of a say."""

    def gate(eps: Tensor, x: Tensor, sigma: float) -> Tensor:
        held = (x - source) / sigma
        outside = held if sigma > 0.5 else 0.9 * held + 0.1 * eps
        return mask * eps + (1 - mask) * outside

    return gate
