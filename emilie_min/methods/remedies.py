"""What others propose against drift, on iterated InstructPix2Pix: none of them needs another model or training."""

from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from ..canvas import images
from ..canvas.settings import as_int
from ..errors import SamplingError
from .base import Chain, Request
from .instruct import IterativeInstructPix2Pix, follow


@dataclass
class PasteBack(IterativeInstructPix2Pix):
    """After each edit, what hardly changed is put back from the picture before.

    A pixel counts as changed where a channel differs by `threshold` grey levels or more, or within `grow` px of such a
    one. Thresholds on the difference keep the background in the data of EraseDraw and Emu Edit; the numbers are ours.
    """

    threshold: int = 24
    grow: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.pixels == "float":
            raise SamplingError("pixels=float keeps no picture to paste into: use round or truncate")
        if not (0 <= as_int(self.threshold, "threshold") <= 255 and 0 <= as_int(self.grow, "grow") <= 100):
            raise SamplingError(f"threshold must be 0 to 255 and grow 0 to 100, not {self.threshold} and {self.grow}")

    def edit(self, chain: Chain, request: Request) -> Chain:
        done = super().edit(chain, request)
        red, green, blue = ImageChops.difference(done.image, chain.image).split()
        most = ImageChops.lighter(ImageChops.lighter(red, green), blue)
        changed = most.point(lambda v: 255 if v >= self.threshold else 0)
        if self.grow:  # Pillow dies of a filter of one pixel
            changed = changed.filter(ImageFilter.MaxFilter(2 * self.grow + 1))
        return replace(done, image=Image.composite(done.image, chain.image, changed))


@dataclass
class LowPass(IterativeInstructPix2Pix):
    """Low-pass alignment between turns, after VAE-LFA (arXiv 2605.08250), from its description.

    The low frequencies of each encoded picture, a mean over `width` cells of the latent, get the mean and the standard
    deviation of a running average over the turns before, channel by channel; the average keeps `keep` of itself a turn.
    What is aligned cannot tell an edit of the whole picture from drift, which is the price.
    """

    width: int = 5
    keep: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if self.pixels == "float" or as_int(self.width, "width") % 2 == 0 or not 0 <= self.keep <= 1:
            raise SamplingError("pixels must be round or truncate, width odd, and keep from 0 to 1")

    @torch.no_grad()
    def edit(self, chain: Chain, request: Request) -> Chain:
        z = images.to_latent(self.editor, chain.image)
        low = smooth(z, self.width)
        mean, std = low.mean((2, 3), keepdim=True), low.std((2, 3), keepdim=True).clamp(min=1e-6)
        now = torch.stack([mean, std])
        kept = torch.tensor(chain.notes["low"]).to(now).reshape(now.shape) if chain.requests else now
        z = z - low + (low - mean) / std * kept[1] + kept[0]
        done = follow(self, chain, request, z, request.instruction)
        kept = self.keep * kept + (1 - self.keep) * now
        return replace(done, notes=done.notes | {"low": kept.flatten(1).tolist()})


def smooth(z: Tensor, width: int) -> Tensor:
    """The mean of (B, C, h, w) over `width` x `width` cells, mirrored at the edges."""
    return F.avg_pool2d(F.pad(z, (width // 2,) * 4, "reflect"), width, 1)
