"""Several instructions in one pass, each in its region: their noise predictions averaged in shares, or weighted.

Ours: the paper edits one region after another. By Eq. 7 shares that sum to 1 average energies; a product of experts
would add them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from PIL import Image, ImageChops
from torch import Tensor

from ..emilie import Editor
from ..errors import InstructionError, MaskError
from ..sampling import Denoise, Noise, Sampler, Scale, guide
from .images import Mask
from .settings import OWN, Settings

Own = Callable[[Tensor, float], list[Tensor]]


class Asked(NamedTuple):
    """What an edit is asked: instructions, their masks and own settings, and `partition` of the masks."""

    texts: list[str]
    masks: list[Image.Image | None]
    own: list[dict]
    shares: Tensor
    union: Tensor | None
    given: Image.Image | None = None  # the masks' union at the photo's size, see `images.union`


def joined(asked: Asked) -> Image.Image | None:
    """The union of an edit's masks at working size; None: everywhere."""
    return None if asked.union is None else reduce(ImageChops.lighter, asked.masks)


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
    editor: Editor,
    z_img: Tensor,
    conds: list[Tensor],
    null: Tensor,
    shares: Tensor,
    text_scale: Scale,
    image_scale: Scale,
    own: Own | None = None,
) -> Denoise:
    """`Editor.denoise` for n instructions at once, n + 2 branches a step: cond is the sum of theirs, weighted.

    conds: n times (1, 77, D); shares: (n, B or 1, 1, h, w), what each weighs in every cell. Where they sum to 1 cond is
    their mean; a negative one is an energy subtracted (composable diffusion, Liu et al. 2022). own: (x, sigma) -> each
    instruction's own x, see `as_it_was`; None = the common one. The branches without an instruction see that.
    """
    seen = [z_img] * (len(conds) + 1) + [torch.zeros_like(z_img)]
    told = [*conds, null, null]
    rest = 1 - shares.sum(0)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        xs = [x] * len(conds) if own is None else own(x, sigma)
        *each, img_cond, uncond = editor.branches([*xs, x, x], sigma, seen, told)
        return guide(shared(shares, each) + rest * img_cond, img_cond, uncond, text_scale, image_scale)

    return denoise


def unguided(editor: Editor, z_img: Tensor, conds: list[Tensor], shares: Tensor, own: Own | None = None) -> Denoise:
    """What the instructions alone lead to, without guidance: n branches."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        xs = [x] * len(conds) if own is None else own(x, sigma)
        return shared(shares, editor.branches(xs, sigma, [z_img] * len(conds), conds))

    return denoise


@torch.no_grad()
def differences(editor: Editor, z_img: Tensor, x: Tensor, sigma: float, texts: Sequence[str]) -> Tensor:
    """How far instructions lead from where the picture alone does, the most of them, (1, 1, h, w) on the CPU: one call.

    z_img: (1, 4, h, w), unscaled; x: (1, 4, h, w) at noise level sigma.
    """
    z_img, x, n = z_img.to(editor.device), x.to(editor.device), len(texts) + 1
    *told, seen = editor.branches([x] * n, sigma, [z_img] * n, list(editor.context([*texts, ""]).split(1)))
    return torch.stack([(each - seen).abs().mean(1, keepdim=True) for each in told]).amax(0).cpu()


def terms(
    texts: list[str], own: list[dict], shares: Tensor, settings: Settings
) -> tuple[list[str], Tensor, list[int | None], Scale, Scale]:
    """What guidance adds up: texts, each one's weight in every cell, whose x it sees (None: the common one); scales.

    First the n instructions, then what they avoid themselves, then what the settings add.
    """
    scales = [[each.get(name, getattr(settings, name)) for each in own] for name in ("text_scale", "image_scale")]
    added = [(each["negative"], k, -scales[0][k]) for k, each in enumerate(own) if each.get("negative")]
    added += [(text, None, weight * settings.text_scale) for text, weight in settings.weighted()]
    text_scale, image_scale = (each[0] if len(set(each)) == 1 else 1.0 for each in scales)
    if len(set(scales[1])) > 1:
        image_scale = shared(shares, scales[1])
    if added or len(set(scales[0])) > 1:
        every = torch.ones_like(shares[0])
        mine = [share * scale for share, scale in zip(shares, scales[0])]
        shares, text_scale = torch.stack(mine + [(every if k is None else shares[k]) * w for _, k, w in added]), 1.0
    said = texts + [text for text, *_ in added]
    return said, shares, [*range(len(texts)), *(k for _, k, _ in added)], text_scale, image_scale


def pick(x: Tensor, each: list[Tensor], whose: list[int | None]) -> list[Tensor]:
    return [x if k is None else each[k] for k in whose]


def shared(shares: Tensor, denoised: Sequence[Tensor | float]) -> Tensor:
    return torch.stack([share * each for share, each in zip(shares, denoised)]).sum(0)


def as_it_was(
    shares: Tensor,
    union: Tensor | None,
    source: Tensor,
    sigmas: Tensor,
    noise_init: Tensor,
    noise_sampler: Noise,
    sampler: Sampler,
) -> Own:
    """An x for each instruction: where it has a share the common x, elsewhere the source under the same noise.

    So it sees the other regions as they were, which is what training showed, and not half changed. Where masks do not
    overlap each region comes out as it does alone. shares, union: of `partition`; the rest as for `Editor.steps`,
    noise_sampler a stream of its own that gives what the edit's gives.
    """
    inside = shares > 0 if union is None else (shares > 0) & (union > 0)
    steps = sampler(lambda x, sigma: source, noise_init.to(source) * sigmas[0].item(), sigmas, noise_sampler)
    held = {step.sigma: step.x for step in steps}
    return lambda x, sigma: [torch.where(here, x, held[sigma]) for here in inside]


def noise_of_each(noises: Sequence[Noise], shares: Tensor) -> Noise:
    """In every cell the noise of the instruction with the largest share: of unit variance, as a mean would not be."""
    strongest = shares.argmax(0)

    def noise(*levels: float) -> Tensor:
        drawn = [noise(*levels) for noise in noises]
        return sum(torch.where(strongest == k, each, 0.0) for k, each in enumerate(drawn))  # type: ignore[return-value]

    return noise


def read(instruction: str | Sequence[tuple], mask: Mask | None, allow_empty: bool) -> tuple[list, list, list]:
    """The instructions of an edit, their masks, and their own settings. Raises InstructionError, MaskError."""
    regions: Sequence[tuple] = [(instruction, mask)]
    if isinstance(instruction, (list, tuple)):
        regions = instruction
        if mask is not None:
            raise MaskError("give each region's mask in the list, [(instruction, mask), ...], not as mask=")
        if not regions or not all(isinstance(region, (list, tuple)) and len(region) in (2, 3) for region in regions):
            raise InstructionError("several instructions are given as [(instruction, mask), ...], one or more")
    for text, *_ in regions:
        if not isinstance(text, str):
            raise InstructionError(f"an instruction is a text, not {type(text).__name__}")
        if not text.strip() and not allow_empty:
            raise InstructionError("the instruction is empty: say what to change")
    texts, masks = zip(*(region[:2] for region in regions))
    return list(texts), list(masks), [own_settings(*region[2:]) for region in regions]


def own_settings(own: Mapping[str, object] | None = None) -> dict:
    """What a region sets for itself, of `OWN`, checked. Raises InstructionError, SamplingError."""
    own = {} if own is None else own
    if not isinstance(own, Mapping) or not own.keys() <= set(OWN):
        raise InstructionError(f"a region's own settings are a dictionary of {', '.join(OWN)}")
    checked = Settings(**own)  # type: ignore[arg-type]  # checked there
    return {name: getattr(checked, name) for name in own}
