"""Several instructions in one pass, each in its region: their noise predictions averaged in shares that sum to 1.

Ours: the paper edits one region after another. By Eq. 7 it averages energies; a product of experts would add them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..emilie import Editor
from ..errors import InstructionError, MaskError
from ..sampling import Denoise, Scale, guide
from .images import Mask


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


def denoiser(
    editor: Editor, z_img: Tensor, conds: list[Tensor], null: Tensor, shares: Tensor, *scales: Scale
) -> Denoise:
    """`Editor.denoise` for n instructions at once, n + 2 branches a step: cond is the sum of share * cond.

    conds: n times (1, 77, D); shares: (n, B or 1, 1, h, w), summing to 1; scales: text_scale, image_scale.
    """
    seen = [z_img] * (len(conds) + 1) + [torch.zeros_like(z_img)]
    told = [*conds, null, null]

    def denoise(x: Tensor, sigma: float) -> Tensor:
        *each, img_cond, uncond = editor.branches([x] * len(told), sigma, seen, told)
        return guide(shared(shares, each), img_cond, uncond, *scales)

    return denoise


def unguided(editor: Editor, z_img: Tensor, conds: list[Tensor], shares: Tensor) -> Denoise:
    """What the instructions alone lead to, without guidance: n branches."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return shared(shares, editor.branches([x] * len(conds), sigma, [z_img] * len(conds), conds))

    return denoise


def shared(shares: Tensor, denoised: Sequence[Tensor]) -> Tensor:
    return torch.stack([share * each for share, each in zip(shares, denoised)]).sum(0)


def read(instruction: str | Sequence[tuple[str, Mask | None]], mask: Mask | None, allow_empty: bool) -> tuple:
    """The instructions of an edit and their masks. Raises InstructionError, MaskError."""
    regions: Sequence[tuple[str, Mask | None]] = [(instruction, mask)]  # type: ignore[list-item]  # checked below
    if isinstance(instruction, (list, tuple)):
        regions = instruction
        if mask is not None:
            raise MaskError("give each region's mask in the list, [(instruction, mask), ...], not as mask=")
        if not regions or not all(isinstance(region, (list, tuple)) and len(region) == 2 for region in regions):
            raise InstructionError("several instructions are given as [(instruction, mask), ...], one or more")
    for text, _ in regions:
        if not isinstance(text, str):
            raise InstructionError(f"an instruction is a text, not {type(text).__name__}")
        if not text.strip() and not allow_empty:
            raise InstructionError("the instruction is empty: say what to change")
    texts, masks = zip(*regions)
    return list(texts), list(masks)
