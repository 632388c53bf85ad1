"""Where would an instruction act? What it changes in the prediction, as a map, a mask, and over the picture.

The absolute difference of the instruction's branch and the image-only one at a few noise levels, averaged, as Watch
Your Steps (Mirzaei et al. 2024) and Focus on Your Instruction (Guo and Lin 2024) take it from InstructPix2Pix itself.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..sampling import noise_stream
from . import regions
from .canvas import Canvas
from .settings import as_finite
from .strip import OUTLINE

LEVELS, NOISES = (4.0, 8.0, 14.0), 2  # of sigma; noises at each. On the small world levels below 2 find the place less
THRESHOLD = 0.2  # of the largest difference, where the mask begins: see weights/where.json
EVERYWHERE = 0.6  # the share of a picture from which on an instruction is for all of it


def differences(canvas: Canvas, instruction: str) -> Tensor:
    """How much an instruction would change each cell of the current latent, (1, 1, h, w) on the CPU, the largest 1.

    Raises InstructionError.
    """
    regions.read(instruction, None, False)
    editor, z = canvas.editor, canvas.latent
    z_img = canvas.image_latent()[0]
    total = torch.zeros(1, 1, *z.shape[2:])
    for sigma in LEVELS:
        level = torch.zeros_like(total)
        for k in range(NOISES):
            x = z + sigma * noise_stream(tuple(z.shape), canvas.seed, "where", k)()
            level += regions.differences(editor, z_img, x, sigma, [instruction])
        total += level / level.amax().clamp(min=1e-9)
    return total / total.amax().clamp(min=1e-9)


def mask(canvas: Canvas, instruction: str, threshold: float = THRESHOLD) -> Image.Image | None:
    """Where an instruction would act, as a mask at working size; None = everywhere.

    Raises InstructionError, SamplingError.
    """
    threshold = as_finite(threshold, "threshold")
    return marked(differences(canvas, instruction), canvas.state.image.size, threshold)


def marked(cells: Tensor, size: tuple[int, int], threshold: float = THRESHOLD) -> Image.Image | None:
    """Where `differences` reach a threshold, and a cell round that: a mask of this size; None = everywhere."""
    above = (cells >= threshold).float()
    return None if above.mean() >= EVERYWHERE else as_image(F.max_pool2d(above, 3, stride=1, padding=1), size)


def as_image(cells: Tensor, size: tuple[int, int]) -> Image.Image:
    """A map (1, 1, h, w) in [0, 1] as PIL "L", each cell a square."""
    return Image.fromarray((cells[0, 0].numpy() * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def drawn(image: Image.Image, cells: Tensor) -> Image.Image:
    """The picture in grey, and over it in colour how much each place would change."""
    alpha = as_image(cells, cells.shape[:-3:-1]).resize(image.size, Image.Resampling.BICUBIC)
    grey = image.convert("L").convert("RGB")
    return Image.composite(Image.new("RGB", image.size, OUTLINE), grey, alpha.point(lambda v: round(0.85 * v)))
