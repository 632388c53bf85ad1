"""DiffEdit (Couairon et al. 2023): where two texts disagree is where to edit; elsewhere DDIM's inversion leads back."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..canvas.settings import as_int
from ..errors import SamplingError
from . import ddim
from .text_to_image import TextToImage, Work

MASKS = ("own", "given")


def differing(difference: Tensor, clamp: float, threshold: float) -> Tensor:
    """A map of differences as a mask in {0, 1}: outliers clamped at `clamp` times its mean, scaled to [0, 1], cut.

    difference: (B, 1, h, w), not negative; each picture by its own mean. Nothing differs where all is 0.
    """
    top = clamp * difference.mean((1, 2, 3), keepdim=True)
    return (difference.minimum(top) > threshold * top).float()


@dataclass
class DiffEdit(TextToImage):
    """A mask from the texts, or the request's; the picture inverted part of the way and led back with the new text.

    mask: "own", as the paper has it, finds it, whatever the request has; "given" takes the request's, and where it has
    none edits everywhere. Which is in the notes as `mask`, with `mask_share`, the share of the latent inside. EMILIE
    does not say which it compared with. "given" is the fair one beside methods that get the same masks: a request
    without mask may be about the whole picture, Blended Latent Diffusion and EMILIE then edit all of it, and a mask of
    its own, clamped at 3 times its mean and cut at half of that, can never cover two thirds.
    steps: 50, as in the paper, whatever the model's own are: inversion errs more the longer its steps are.
    The own mask: with `maps` noises at `map_strength` of the way up, the mean |eps(text) - eps(before)| over noises
    and channels, clamped at `clamp` times the mean, then cut at `threshold`. `Request.before` is the other text, ""
    if unknown or if the prompt is an instruction, which it could not be compared with. Guidance would multiply all
    differences by one number, which the clamp takes out again, so none is used.
    encode: how far up the picture is inverted, as a share of the steps (of 50: 40), with the text "".

    Where this differs from diffusers' pipeline: the clamp is each picture's own, not the batch's; eps is evaluated at
    the level that an inverting step starts from, not where it leads; the blend is with the inverted latent of the
    level that a step has reached, and the last with the source itself, so that outside the mask the result is the
    source's latent, to the bit; the inversion has no guidance, with which it drifts.
    """

    steps: int | None = 50
    mask: str = "own"
    maps: int = 10
    map_strength: float = 0.5
    clamp: float = 3.0
    threshold: float = 0.5
    encode: float = 0.8

    def __post_init__(self):
        super().__post_init__()
        if self.mask not in MASKS:
            raise SamplingError(f"unknown mask {self.mask!r}: choose from {', '.join(MASKS)}")
        if as_int(self.maps, "maps") < 1:
            raise SamplingError(f"maps must be 1 or more, not {self.maps}")
        self.check_fraction("threshold")
        self.check_fraction("clamp", top=1000)
        for name in ("map_strength", "encode"):
            self.check_fraction(name)
            if not ddim.share(getattr(self, name), self.steps):
                raise SamplingError(f"{name}={getattr(self, name)} is less than one of {self.steps} steps: raise it")

    def run(self, work: Work) -> Tensor:
        levels = ddim.levels(self.steps, len(work.alphas))
        if self.mask == "given":
            mask, found = work.given_mask(), "given"
            if mask is None:
                mask, found = torch.ones_like(work.source[:, :1]), "everywhere"
        else:
            found = "own"
            mask = self.find_mask(work, levels[ddim.share(self.map_strength, self.steps)])
            cells = (255 * mask[0, 0]).byte().cpu().numpy()
            work.mask = Image.fromarray(np.kron(cells, np.ones((work.editor.vae.factor,) * 2, np.uint8)))
        work.notes = {"mask": found, "mask_share": mask.mean().item()}

        levels = levels[: ddim.share(self.encode, self.steps) + 1]
        inverted = dict(zip(levels, ddim.invert(work.eps(""), work.source, levels, work.alphas)))

        def blend(z: Tensor, t: int) -> Tensor:
            return mask * z + (1 - mask) * inverted[t]

        eps = work.eps(work.text, self.guidance)
        return ddim.sample(eps, inverted[levels[-1]], levels, work.alphas, after_step=blend)

    def find_mask(self, work: Work, t: int) -> Tensor:
        """Where the texts disagree about the picture noised to level t: (1, 1, h, w) in {0, 1}."""
        new, old = work.eps(work.text), work.eps(work.before)
        differences = []
        for _ in range(self.maps):
            z = ddim.noised(work.source, work.noise(), work.alphas[t])
            differences.append((new(z, t) - old(z, t)).abs().mean(1, keepdim=True))
        return differing(torch.stack(differences).mean(0), self.clamp, self.threshold)
