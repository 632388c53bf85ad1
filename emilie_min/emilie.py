"""EMILIE (Joseph et al., WACV 2024): Algorithm 1, and InstructPix2Pix as the editor that it runs on.

Two scales of latent meet here. A *scaled* latent z has unit variance: it is what sampling starts from and arrives at,
and what one edit hands to the next. An *image latent* z_img is what the autoencoder's encoder gives, unscaled: the
UNet was trained to see that one stacked onto its input. z = scale_factor * z_img, and f leads back: z_img = f * z.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import sampling
from .config import GATES, Config
from .errors import SamplingError
from .sampling import Denoise, Noise, Sampler, Scale, Step, get_sigmas, guide, noise_stream, sample_euler_ancestral
from .text import TextEncoder
from .unet import UNetModel
from .vae import AutoencoderKL


def emilie(
    editor: "Editor", image: Tensor, edits: Sequence[tuple[str, Tensor | None]], seed: int = 0, gate: str = "anchor"
) -> Iterator[Tensor]:
    """Algorithm 1: yields the scaled latent z_0 of every edit, (1, 4, h, w); `editor.decode` makes it a picture.

    image: (1, 3, H, W) in [-1, 1]; edits: instructions, each with a mask (1, 1, h, w) in [0, 1], 1 = edit here, or
    None; steps and scales are the config's. Noise follows from the seed and the number of the edit alone.
    """
    s, encoded = editor.config.sampling, editor.encode(image)
    sigmas, shape = get_sigmas(s.steps, editor.alphas_cumprod), tuple(encoded.shape)
    z_init = noise_stream(shape, seed, "init")()  # Line 1: once for all edits
    prev_latent = editor.scale_factor * encoded
    for e, (instruction, mask) in enumerate(edits):  # Line 2
        if e == 0:  # Line 3
            z_img = encoded  # Line 4: E(I_0)
        else:
            z_img = rescale_factor(editor, prev_latent) * prev_latent  # Line 6: latent iteration, never through pixels
        cond, null = editor.context([instruction, ""]).split(1)
        noise = noise_stream(shape, seed, "edit", e)
        z_0 = editor.sample(  # Lines 7 to 9
            z_img, cond, null, sigmas, z_init, noise, mask, gate, prev_latent, s.text_scale, s.image_scale
        )
        yield z_0  # Line 10: D(z_0) is the edited picture
        prev_latent = z_0  # Line 11


def rescale_factor(editor: "Editor", z: Tensor) -> float:
    """f = avg(E(I)) / avg(z_img) (Sec. 5.3), by which a scaled latent becomes an image latent again.

    I is the picture that z decodes to. Latents have both signs, and the paper speaks of "the magnitude of values", so
    both are means of magnitudes. What f estimates is 1 / scale_factor.
    """
    again = editor.encode(editor.decode(z)).to(z)
    return (again.abs().mean() / z.abs().mean()).item()


@dataclass(eq=False)
class Editor:
    """InstructPix2Pix (Brooks et al. 2023): three networks, and how they denoise together."""

    config: Config
    unet: UNetModel
    vae: AutoencoderKL
    text: TextEncoder
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    model: str = ""  # for people: which config and weight file this is,
    family: str = ""  # and whether the UNet's weights are the "EMA" or the "raw" ones

    def __post_init__(self) -> None:
        d = self.config.diffusion
        self.scale_factor = d.scale_factor
        self.alphas_cumprod = sampling.alphas_cumprod(d.linear_start, d.linear_end, d.timesteps)
        self.log_sigmas = sampling.log_sigmas(self.alphas_cumprod)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> its image latent: the posterior's mode, unscaled, (B, 4, h, w) float32."""
        return self.vae.encode(image.to(self.device, self.dtype)).float()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latent (B, 4, h, w) -> (B, 3, H, W) float32, about [-1, 1] but not clamped."""
        return self.vae.decode((z.to(self.device) / self.scale_factor).to(self.dtype)).float()

    @torch.no_grad()
    def context(self, texts: list[str]) -> Tensor:
        """Instructions to what the UNet attends to, (B, 77, D). Raises InstructionError, TokenizerError."""
        return self.text(self.text.tokenize(texts).to(self.device))

    def denoise(
        self,
        x: Tensor,
        sigma: Scale,
        z_img: Tensor,
        cond: Tensor,
        uncond: Tensor,
        text_scale: Scale,
        image_scale: Scale,
    ) -> Tensor:
        """One guided denoising: x (B, 4, h, w) at noise level sigma, a number or (B,) -> denoised, float32.

        z_img: (B or 1, 4, h, w), unscaled; cond, uncond: (B or 1, 77, D), of the instruction and of "", the null text.
        A scale may be a map that broadcasts over the latent.
        """
        no_picture, null = torch.zeros_like(z_img), uncond
        cond, img_cond, uncond = self.branches([x, x, x], sigma, [z_img, z_img, no_picture], [cond, null, null])
        return guide(cond, img_cond, uncond, text_scale, image_scale)

    @torch.no_grad()
    def branches(self, x: list[Tensor], sigma: Scale, seen: list[Tensor], told: list[Tensor]) -> list[Tensor]:
        """What the UNet predicts in k branches, which differ in what they see and are told, as one batch of kB rows.

        x: k times (B, 4, h, w); seen: k image latents (B or 1, 4, h, w); told: k contexts (B or 1, 77, D); sigma: a
        number or (B,). -> k times denoised, (B, 4, h, w) float32. A subclass may compute them in another way.
        """
        k, b = len(x), len(x[0])
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu").expand(b)
        unblocked = self.device.type == "cuda"  # the host need not wait for the device to have them
        t = sampling.sigma_to_t(sigma, self.log_sigmas).float().to(self.device, non_blocking=unblocked)
        sigma = sigma.float().to(self.device, non_blocking=unblocked)[:, None, None, None]
        z_t = [y / (sigma**2 + 1).sqrt() for y in x]
        stacked = torch.cat([torch.cat([z, z_img.expand_as(z)], dim=1) for z, z_img in zip(z_t, seen)])  # (kB, 8, h, w)
        context = torch.cat([c.expand(b, -1, -1) for c in told])
        eps = self.unet(stacked.to(self.dtype), t.repeat(k), context.to(self.dtype)).float()
        return [y - sigma * e for y, e in zip(x, eps.chunk(k))]

    def sample(
        self, z_img: Tensor, cond: Tensor, uncond: Tensor, sigmas: Tensor, noise_init: Tensor, noise_sampler: Noise,
        mask: Tensor | None = None, gate: str = "anchor", source: Tensor | None = None,
        text_scale: Scale = 7.5, image_scale: Scale = 1.5,
    ) -> Tensor:  # fmt: skip
        """One edit, from unit noise (B, 4, h, w) to a scaled latent of that shape, float32.

        z_img, cond, uncond: as for `denoise`; mask: (B or 1, 1, h, w) in [0, 1], 1 = edit here; gate: see `steps`, and
        "guidance" gates the instruction's term alone; source: default scale_factor * z_img. Raises SamplingError.
        """
        z_img, cond, uncond = (y.to(self.device) for y in (z_img, cond, uncond))
        if mask is not None and gate == "guidance":
            text_scale = mask.to(self.device) * text_scale

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return self.denoise(x, sigma, z_img, cond, uncond, text_scale, image_scale)

        source = self.scale_factor * z_img if source is None else source
        *_, last = self.steps(denoise, sigmas, noise_init, noise_sampler, source, mask, gate)
        return last.x

    def steps(
        self, denoise: Denoise, sigmas: Tensor, noise_init: Tensor, noise_sampler: Noise,
        source: Tensor, mask: Tensor | None = None, gate: str = "anchor", sampler: Sampler = sample_euler_ancestral,
    ) -> Iterator[Step]:  # fmt: skip
        """Lines 7 to 9 of Alg. 1 for any denoiser and sampler, step by step; the last step's x is the edited latent.

        gate: outside the mask "anchor" leads back to the `source`, a scaled latent (1, 4, h, w), and "eq8" sets eps to
        zero; "guidance" is a matter of the denoiser alone. Raises SamplingError for another.
        """
        if gate not in GATES:
            raise SamplingError(f"unknown gate {gate!r}: choose from {', '.join(GATES)}")
        held, source = None, source.to(self.device)
        if mask is not None and gate != "guidance":
            mask = mask.to(self.device)
            held = sampling.eq8(mask) if gate == "eq8" else sampling.anchor(mask, source)
        x = noise_init.to(self.device) * sigmas[0].item()
        for step in sampler(denoise, x, sigmas, noise_sampler, held):
            if mask is not None and gate == "anchor" and step.sigma == 0:  # outside a hard mask the source, to the bit
                step = step._replace(x=torch.where(mask == 0, source, step.x))
            yield step
