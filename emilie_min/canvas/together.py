"""One instruction on several pictures of one size in the same pass, as one batch: for a GPU that one does not fill."""

from collections.abc import Iterator, Sequence

import torch

from ..errors import CanvasError
from ..sampling import Step, get_sigmas, noise_stream
from . import images
from .canvas import SAMPLERS, Canvas
from .settings import Settings
from .state import State

PLAIN = ("steps", "text_scale", "image_scale", "seed", "sampler", "rescale", "iterate")  # what a batch can be told


def can(**changes) -> bool:
    """Whether settings are such as a batch can be told."""
    usual, asked = Settings().record(), Settings(**changes).record()
    return all(value == usual[name] for name, value in asked.items() if name not in PLAIN)


def steps(canvases: Sequence[Canvas], instruction: str, **changes) -> Iterator[Step]:
    """`Canvas.steps` of each canvas, without masks, with the same numbers to rounding; all are changed at the end.

    Raises CanvasError for canvases that are of several sizes, editors, seeds or depths, or settings not in `PLAIN`.
    """
    first, sizes = canvases[0], {canvas.z_init.shape for canvas in canvases}
    alike = len(sizes) == 1 and all(c.editor is first.editor and c.seed == first.seed for c in canvases)
    if not alike or len({canvas.depth for canvas in canvases}) > 1 or not can(**changes):
        raise CanvasError("these cannot be edited together: they differ in size, model, seed or depth, or in settings")
    settings = Settings(**changes).resolve(first.editor.config.sampling, first.seed)
    editor, n, depth = first.editor, len(canvases), first.depth
    cond, null = editor.context([instruction, ""]).split(1)
    given = [canvas.image_latent(settings.rescale, settings.iterate) for canvas in canvases]
    z_img = torch.cat([z for z, _ in given]).to(editor.device)
    noise = noise_stream(tuple(first.z_init.shape), settings.seed, "edit", depth)
    scales = settings.text_scale, settings.image_scale
    source = torch.cat([canvas.latent for canvas in canvases])
    for step in editor.steps(
        lambda x, sigma: editor.denoise(x, sigma, z_img, cond, null, *scales),
        get_sigmas(settings.steps, editor.alphas_cumprod),
        first.z_init.expand(n, -1, -1, -1),
        lambda *sigmas: noise(*sigmas).expand(n, -1, -1, -1),
        source,
        sampler=SAMPLERS[settings.sampler],
    ):
        yield step
    for canvas, latent, (_, f) in zip(canvases, step.x.cpu().split(1), given):
        latent = latent.clone()
        image = images.from_latent(editor, latent)
        canvas.states.append(State(instruction, latent, image, canvas.at, None, settings.record(), f, depth=depth))
        canvas.at, canvas.redo_stack = len(canvas.states) - 1, []
