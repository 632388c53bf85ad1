"""A canvas: one picture's session, a tree of edits, of which each is a pass of Algorithm 1."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path

import torch
from PIL import Image, ImageChops
from torch import Tensor

from .. import loading
from ..emilie import Editor, rescale_factor
from ..errors import CanvasError, CheckpointError, MaskError, SamplingError, explain_oom
from ..faster.deepcache import reuse_deep_features
from ..faster.dpmpp import sample_dpmpp_2m
from ..faster.guidance_reuse import reuse_guidance
from ..faster.interval import guidance_interval
from ..sampling import Denoise, Scale, Step, get_sigmas, noise_stream, sample_euler_ancestral
from . import images, regions, session, settings
from .images import Mask
from .settings import Settings, as_int
from .state import State

SAMPLERS = dict(
    zip(settings.SAMPLERS, (sample_euler_ancestral, sample_dpmpp_2m, partial(sample_dpmpp_2m, eta=1.0)), strict=True)
)


def open(
    source: images.Picture,
    editor: Editor | None = None,
    seed: int = 0,
    resolution: int | str | None = None,
    part: images.Box | None = None,
) -> "Canvas":
    """A canvas on a picture (path, PIL image or array), or the one that `Canvas.save` wrote to a path.

    editor: None = the small model that ships. seed: of all noise; resolution: of the longer side in px, "native", or
    None = what the model's config names; sides become multiples of the config's `multiple`, native ones of what the
    networks need. part: a box of the picture, in its pixels, which alone is worked on, whole; None = the picture but
    for the edges that those multiples crop. A saved session has all of these already. Raises ImageError, CanvasError,
    CheckpointError.
    """
    editor = loading.load() if editor is None else editor
    check_can_edit(editor)
    if isinstance(source, (str, Path)) and session.is_session(source):
        if resolution is not None or seed != 0 or part is not None:
            raise CanvasError(f"{source} is a session, which has its seed, resolution and part already: leave them out")
        return Canvas(editor, **session.read(source, editor))
    seed, original, defaults = as_int(seed, "seed"), images.read_image(source), editor.config.sampling
    native = isinstance(resolution, str) and resolution == "native"
    resolution = defaults.resolution if resolution is None else resolution
    multiple = editor.vae.factor * 2**editor.unet.num_downsamples if native else defaults.multiple
    if part is None:
        size = images.fit_size(original.size, resolution, multiple)
    else:
        part = images.read_part(part, original.size)
        size = images.near_size((part[2] - part[0], part[3] - part[1]), resolution, multiple)
    picture = images.view(original, size, native, part)
    with explain_oom(f"at {size[0]}x{size[1]} px: lower --resolution"):
        z_img = images.to_latent(editor, picture).cpu()
    z_init = noise_stream(tuple(z_img.shape), seed, "init")()
    root = State("", editor.scale_factor * z_img, picture)
    turned = original.info.get("orientation")
    return Canvas(editor, seed, original.size, native, z_init, z_img, [root], turned=turned, part=part)


def check_can_edit(editor: Editor) -> None:
    """Raises CheckpointError for a UNet without room for the picture's latent."""
    if editor.unet.in_channels != 2 * editor.config.diffusion.channels:
        raise CheckpointError(
            f"{editor.model} takes {editor.unet.in_channels} channels and editing needs 8, a noisy latent and the "
            "picture's: these are Stable Diffusion weights; get InstructPix2Pix's with `emilie download`"
        )


@dataclass
class Canvas:
    """One picture's session (Alg. 1): z_init drawn once, every edit from the latent of the one before."""

    editor: Editor
    seed: int
    original_size: tuple[int, int]  # (width, height) of the picture that was opened
    native: bool  # whether it was cropped to working size instead of scaled
    z_init: Tensor
    z_img: Tensor  # E(I) of the opened picture
    states: list[State]
    at: int = 0  # the state that the next edit starts from
    redo_stack: list[int] = field(default_factory=list)
    turned: int | None = None  # the EXIF orientation that the opened picture was turned by
    part: images.Box | None = None  # the box of it that is worked on, if it is not what `images.fit` keeps

    @property
    def state(self) -> State:
        return self.states[self.at]

    @property
    def image(self) -> Image.Image:
        """A copy of the current picture, at working size."""
        return self.state.image.copy()

    @property
    def latent(self) -> Tensor:
        """A copy of the current scaled latent, (1, 4, h, w) float32."""
        return self.state.latent.clone()

    @property
    def history(self) -> list[State]:
        """The edits that led to the current picture, first to last."""
        path, state = [], self.state
        while state.parent is not None:
            path.append(state)
            state = self.states[state.parent]
        return path[::-1]

    def edit(
        self, instruction: str | Sequence[tuple[str, Mask | None]], mask: Mask | None = None, **changes
    ) -> Image.Image:
        """Follow an instruction, inside a mask if there is one, and make the result the current state.

        instruction: a text, or several as [(text, mask), ...], followed in one pass (n + 2 network branches a step):
        each in its mask, sharing where masks overlap, see `regions.partition`; one mask may be None, everywhere else.
        mask: picture, array or box, see `images.read_mask`. changes: fields of `Settings`. An edit that fails changes
        nothing. Raises EmilieError.
        """
        for _ in self.steps(instruction, mask, **changes):
            pass
        return self.image

    def steps(
        self, instruction: str | Sequence[tuple[str, Mask | None]], mask: Mask | None = None, **changes
    ) -> Iterator[Step]:
        """`edit`, step by step: what is given is checked at once, the state is added after the last step.

        Whoever stops in between leaves the canvas as it was.
        """
        settings = Settings(**changes).resolve(self.editor.config.sampling, self.seed)
        texts, given = regions.read(instruction, mask, settings.allow_empty)
        masks, shares, union = self.read_regions(given, settings.soft)
        if union is None and settings.keep_background:
            raise MaskError("keep_background needs a mask for every instruction: without one there is no background")
        self.editor.text.tokenize(texts)
        return self._steps(texts, masks, shares, union, settings)

    def _steps(
        self,
        texts: list[str],
        masks: list[Image.Image | None],
        shares: Tensor,
        union: Tensor | None,
        settings: Settings,
    ) -> Iterator[Step]:
        editor, at, parent, depth = self.editor, self.at, self.state, len(self.history)
        with explain_oom(f"at {parent.image.width}x{parent.image.height} px: lower --resolution"):
            z_img, f = self.image_latent(settings.rescale, settings.iterate)
            steps = editor.steps(
                self.denoiser(z_img, texts, shares, union, settings),
                get_sigmas(settings.steps, editor.alphas_cumprod),
                self.z_init,
                noise_stream(tuple(self.z_init.shape), settings.seed, "edit", depth),
                parent.latent if settings.iterate == "latent" else editor.scale_factor * z_img,
                union,
                settings.gate,
                SAMPLERS[settings.sampler],
            )
            for step in steps:
                yield step
            latent = step.x.cpu()
            if (
                union is not None and settings.keep_background
            ):  # whatever the gate: the next edit starts from what is seen
                latent = torch.where(union == 0, parent.latent, latent)
            image = images.from_latent(editor, latent)
        pixels = None if union is None else reduce(ImageChops.lighter, masks)
        if settings.keep_background:
            image = images.paste_back(image, parent.image, pixels, feather=editor.vae.factor // 2)
        several = list(zip(texts, masks)) if len(texts) > 1 else []
        self.states.append(State(" + ".join(texts), latent, image, at, pixels, settings.record(), f, several))
        self.at, self.redo_stack = len(self.states) - 1, []

    def denoiser(
        self, z_img: Tensor, texts: list[str], shares: Tensor, union: Tensor | None, settings: Settings
    ) -> Denoise:
        """The method's `Editor.denoise` for one edit, with what the settings attach to it from outside."""
        editor = self.editor if settings.reuse == 1 else reuse_deep_features(self.editor, settings.reuse)
        *conds, null = editor.context([*texts, ""]).split(1)
        if settings.reuse_guidance is not None:
            editor = reuse_guidance(editor, null, round(settings.reuse_guidance * settings.steps))
        z_img, shares = z_img.to(editor.device), shares.to(editor.device)

        def guided(text_scale: Scale, image_scale: float) -> Denoise:
            if union is not None and settings.gate == "guidance":
                text_scale = union.to(editor.device) * text_scale
            if len(conds) > 1:
                return regions.denoiser(editor, z_img, conds, null, shares, text_scale, image_scale)
            return lambda x, sigma: editor.denoise(x, sigma, z_img, conds[0], null, text_scale, image_scale)

        denoise = guided(settings.text_scale, settings.image_scale)
        if settings.guidance_interval is not None:
            gated = union is not None and settings.gate == "guidance"
            outside = guided(1.0, 1.0) if gated else regions.unguided(editor, z_img, conds, shares)
            denoise = guidance_interval(denoise, outside, *settings.guidance_interval)
        return denoise

    def image_latent(self, rescale: str = "paper", iterate: str = "latent") -> tuple[Tensor, float | None]:
        """z_img for the next edit, unscaled (1, 4, h, w), and the f that made it: z_img = f z.

        "paper" is Sec. 5.3's, see `rescale_factor`; the others show what it is for: "signed": avg E(D(z)) / avg z with
        the signs left in, whose means can cancel, so it is refused where it is not within a factor of 4 of "paper";
        "exact": 1 / scale_factor, which f estimates; "none": 1. iterate="image": E of the current picture, no f.
        """
        editor, z = self.editor, self.state.latent
        if self.state.parent is None:
            return self.z_img, None  # Line 4: E(I_0)
        if iterate == "image":
            return images.to_latent(editor, self.image).cpu(), None
        if rescale == "exact":
            f = 1 / editor.scale_factor
        elif rescale == "none":
            f = 1.0
        else:
            f = rescale_factor(editor, z)
        if rescale == "signed":
            paper, f = f, (editor.encode(editor.decode(z)).to(z).mean() / z.mean()).item()
            if not 0.25 < f / paper < 4:
                raise SamplingError(f"rescale='signed' gives f = {f:.3g} where 'paper' gives {paper:.3g}: use that")
        return f * z, f  # Line 6, times the f of Sec. 5.3

    def read_mask(self, mask: Mask, soft: bool = False) -> tuple[Image.Image, Tensor]:
        """A mask as PIL "L" at working size and at the latent's, (1, 1, h, w). Raises MaskError."""
        factor = self.editor.vae.factor
        pixels = images.read_mask(
            mask, self.original_size, self.state.image.size, self.native, soft, factor, self.turned, self.part
        )
        return pixels, images.latent_mask(pixels, factor, soft)

    def read_regions(
        self, masks: Sequence[Mask | None], soft: bool = False
    ) -> tuple[list[Image.Image | None], Tensor, Tensor | None]:
        """The masks of an edit's instructions at working size, and `regions.partition` of them at the latent's.

        Raises MaskError where one selects nothing, also where one is None and the others leave it nothing.
        """
        pixels, cells = zip(*((None, None) if mask is None else self.read_mask(mask, soft) for mask in masks))
        if pixels.count(None) > 1:
            raise MaskError("two instructions have no mask: only one can be for everywhere else")
        shares, union = regions.partition(cells)
        if not shares.flatten(1).any(1).all():
            raise MaskError("the masks cover the whole picture: nothing is left for the instruction without one")
        return list(pixels), shares, union

    def edited_mask(self) -> Image.Image | None:
        """Where any edit so far may have changed pixels, as a mask at working size; None: anywhere."""
        if not all(state.settings["keep_background"] for state in self.history):
            return None
        union = Image.new("L", self.state.image.size)
        for state in self.history:
            union = ImageChops.lighter(union, state.mask.point(lambda v: 255 if v else 0))
        return union

    def undo(self) -> Image.Image:
        """Back to the state that the current one was made from. Raises CanvasError at the beginning."""
        if self.state.parent is None:
            raise CanvasError("nothing to undo: this is the picture as it was opened")
        self.redo_stack.append(self.at)
        self.at = self.state.parent
        return self.image

    def redo(self) -> Image.Image:
        """Take back the last undo. Raises CanvasError if there is none since the last edit."""
        if not self.redo_stack:
            raise CanvasError("nothing to redo")
        self.at = self.redo_stack.pop()
        return self.image

    def branch(self, state: int) -> Image.Image:
        """Go to any state of the tree by its number in `states`, 0 the opened picture; the next edit starts there.

        Raises CanvasError for a number that is none.
        """
        if not isinstance(state, int) or not 0 <= state < len(self.states):
            raise CanvasError(f"no state {state}: this canvas has states 0 to {len(self.states) - 1}")
        self.at, self.redo_stack = state, []
        return self.image

    def save(self, path: str | Path) -> None:
        """The session as one file, to which later saves add what is new; `open` reads it. Raises CanvasError.

        What another process saved there of the same session is kept, see `session.write`.
        """
        session.write(self, path)
