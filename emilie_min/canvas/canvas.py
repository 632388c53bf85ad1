"""A canvas: one picture's session, a tree of edits, of which each is a pass of Algorithm 1."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageChops
from torch import Tensor

from .. import loading
from ..emilie import Editor, rescale_factor
from ..errors import CanvasError, CheckpointError, MaskError, SamplingError, explain_oom, quote
from ..faster.deepcache import reuse_deep_features
from ..faster.dpmpp import sample_dpmpp_2m
from ..faster.guidance_reuse import reuse_guidance
from ..faster.interval import guidance_interval
from ..sampling import Denoise, Noise, Sampler, Scale, Step, get_sigmas, noise_stream, sample_euler_ancestral
from . import images, regions, session, settings, stack
from .images import Mask
from .regions import Asked
from .settings import Settings, as_int, whole
from .state import State

SAMPLERS = dict(
    zip(settings.SAMPLERS, (sample_euler_ancestral, sample_dpmpp_2m, partial(sample_dpmpp_2m, eta=1.0)), strict=True)
)
KEPT = (0.25, 0.5, 0.75)  # of the steps, before which the sampler's x is kept


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
    native = images.is_native(resolution)
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


def resumed(sampler: Sampler, first: int, x: Tensor) -> Sampler:
    """A sampler that goes on from x, before step `first`."""
    return lambda denoise, noise, sigmas, *rest: sampler(denoise, x.to(noise), sigmas[first:], *rest)


def check_can_edit(editor: Editor) -> None:
    """Raises CheckpointError for what is no editor, and for a UNet without room for the picture's latent."""
    if not isinstance(editor, Editor):
        raise CheckpointError(f"an editor is what emilie.load gives, and this is {quote(editor)}")
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
    def stack(self) -> list[State]:
        """The edits that led to the current picture and those that are hidden, first to last: edit 1, 2, ..."""
        path, state = [], self.state
        while state.parent is not None:
            path.append(state)
            state = self.states[state.parent]
        return [state for state in path[::-1] if state.shown is not None]

    @property
    def history(self) -> list[State]:
        """The edits that led to the current picture, first to last."""
        return [state for state in self.stack if state.shown]

    @property
    def depth(self) -> int:
        """Which noise the next edit draws: one more than any edit that led here."""
        return 1 + max((i if state.depth is None else state.depth for i, state in enumerate(self.stack)), default=-1)

    def edit(self, instruction: str | Sequence[tuple], mask: Mask | None = None, **changes) -> Image.Image:
        """Follow an instruction, inside a mask if there is one, and make the result the current state.

        instruction: a text, or several as [(text, mask), ...], followed in one pass (n + 2 network branches a step):
        each in its mask, sharing where masks overlap, see `regions.partition`; one mask may be None, everywhere else.
        A third part, {"text_scale": 1.2}, is what that region sets for itself, of `settings.OWN`.
        mask: picture, array or box, see `images.read_mask`. changes: fields of `Settings`. An edit that fails changes
        nothing. Raises EmilieError.
        """
        for _ in self.steps(instruction, mask, **changes):
            pass
        return self.image

    def steps(self, instruction: str | Sequence[tuple], mask: Mask | None = None, **changes) -> Iterator[Step]:
        """`edit`, step by step: what is given is checked at once, the state is added after the last step.

        Whoever stops in between leaves the canvas as it was.
        """
        settings = Settings(**changes).resolve(self.editor.config.sampling, self.seed)
        asked = self.asked(*regions.read(instruction, mask, settings.allow_empty), settings)
        return self.run(asked, settings, self.depth)

    def asked(self, texts: list[str], given: Sequence[Mask | None], own: list[dict], settings: Settings) -> Asked:
        """An edit's instructions, masks and regions' own settings, checked. Raises MaskError, InstructionError."""
        read = self.read_each(given, settings.soft)
        masks, shares, union = self.partition(read, settings.soft)
        if union is None and settings.keep_background:
            raise MaskError("keep_background needs a mask for every instruction: without one there is no background")
        self.editor.text.tokenize(regions.terms(texts, own, shares, settings)[0])
        larger = self.original_size != self.state.image.size
        return Asked(
            texts, masks, own, shares, union, images.union(read, self.original_size, settings.soft) if larger else None
        )

    def run(
        self,
        asked: Asked,
        settings: Settings,
        depth: int,
        within: tuple[Tensor, Tensor] | None = None,
        start: tuple[int, Tensor] | None = None,
    ) -> Iterator[Step]:
        """An edit of the current state; depth: keys its noise.

        within: a mask and a scaled latent, (1, 1, h, w) and (1, 4, h, w): outside that mask the result is that latent,
        to the bit, whatever the gate. start: a step's number and its x, to go on from there.
        """
        editor, at, parent = self.editor, self.at, self.state
        texts, masks, own, shares, union, _ = asked
        with explain_oom(f"at {parent.image.width}x{parent.image.height} px: lower --resolution"):
            z_img, f = self.image_latent(settings.rescale, settings.iterate)
            source = parent.latent if settings.iterate == "latent" else editor.scale_factor * z_img
            gated, gate = union, settings.gate
            if within is not None:
                here, source = within
                gated, gate = here if union is None or gate == "guidance" else here * union, "anchor"
            sigmas, sampler = get_sigmas(settings.steps, editor.alphas_cumprod), SAMPLERS[settings.sampler]

            def noise() -> Noise:
                seeds = [each.get("seed", settings.seed) for each in own]
                streams = [noise_stream(tuple(self.z_init.shape), seed, "edit", depth) for seed in seeds]
                return streams[0] if len(set(seeds)) == 1 else regions.noise_of_each(streams, shares)

            first, kept = 0 if start is None else start[0], {}
            alone = None
            if len(texts) > 1:
                where = [y if y is None else y.to(editor.device) for y in (shares, union, source)]
                alone = regions.as_it_was(*where, sigmas, self.z_init, noise(), sampler)
            denoise = self.denoiser(z_img, asked, settings, alone)
            drawn = noise()
            if start is not None:
                sampler = resumed(sampler, *start)
                for _ in range(first):
                    drawn()
            for step in editor.steps(denoise, sigmas, self.z_init, drawn, source, gated, gate, sampler):
                if (i := first + step.i) in [round(part * settings.steps) for part in KEPT] and i > 0:
                    kept[i] = step.x.cpu()
                yield step._replace(i=i)
            latent = step.x.cpu()
            if union is not None and settings.keep_background:  # whatever the gate: the next starts from what is seen
                latent = torch.where(union == 0, parent.latent, latent)
        record = settings.record() | ({"own": own} if any(own) else {})
        state = State(" + ".join(texts), latent, parent.image, at, None, record, f, depth=depth, kept=kept)
        state.mask, state.given = regions.joined(asked), asked.given
        state.regions = list(zip(texts, masks)) if len(texts) > 1 else []
        state.image = self.picture(state)
        self.states.append(state)
        self.at, self.redo_stack = len(self.states) - 1, []

    def picture(self, state: State, like: State | None = None) -> Image.Image:
        """What a state's latent decodes to and, where it keeps its background, its parent's pixels around that.

        like: a state whose pixels stay where its latent does, see `stack.kept`.
        """
        parent = self.states[state.parent]
        with explain_oom(f"at {parent.image.width}x{parent.image.height} px: lower --resolution"):
            image = images.from_latent(self.editor, state.latent)
        if like is not None:
            image = stack.kept(image, state.latent, like)
        if not state.settings["keep_background"]:
            return image
        return images.paste_back(image, parent.image, state.mask, feather=self.editor.vae.factor // 2)

    def denoiser(self, z_img: Tensor, asked: Asked, settings: Settings, alone: regions.Own | None = None) -> Denoise:
        """The method's `Editor.denoise` for one edit, with what the settings attach to it from outside.

        alone: `regions.as_it_was`, of several instructions.
        """
        editor = self.editor if settings.reuse == 1 else reuse_deep_features(self.editor, settings.reuse)
        texts, _, own, shares, union, _ = asked
        z_img, shares = z_img.to(editor.device), shares.to(editor.device)
        said, weights, whose, *scales = regions.terms(texts, own, shares, settings)
        *conds, null = editor.context([*said, ""]).split(1)
        if settings.reuse_guidance is not None:
            editor = reuse_guidance(editor, null, round(settings.reuse_guidance * settings.steps))

        def guided(weights: Tensor, text_scale: Scale, image_scale: Scale) -> Denoise:
            if union is not None and settings.gate == "guidance":
                text_scale = union.to(editor.device) * text_scale
            if (k := len(weights)) > 1:
                each = None if alone is None else lambda x, sigma: regions.pick(x, alone(x, sigma), whose[:k])
                return regions.denoiser(editor, z_img, conds[:k], null, weights, text_scale, image_scale, each)
            return lambda x, sigma: editor.denoise(x, sigma, z_img, conds[0], null, text_scale, image_scale)

        denoise = guided(weights, *scales)
        if settings.guidance_interval is not None:
            gated = union is not None and settings.gate == "guidance"
            only = conds[: len(texts)]
            outside = guided(shares, 1.0, 1.0) if gated else regions.unguided(editor, z_img, only, shares, alone)
            denoise = guidance_interval(denoise, outside, *settings.guidance_interval)
        return denoise

    def image_latent(self, rescale: str = "paper", iterate: str = "latent") -> tuple[Tensor, float | None]:
        """z_img for the next edit, unscaled (1, 4, h, w), and the f that made it: z_img = f z.

        "paper" is Sec. 5.3's, see `rescale_factor`; the others show what it is for: "signed": avg E(D(z)) / avg z with
        the signs left in, whose means can cancel, so it is refused where it is not within a factor of 4 of "paper";
        "exact": 1 / scale_factor, which f estimates; "none": 1. iterate="image": E of the current picture, no f.
        """
        editor, z = self.editor, self.state.latent
        if not self.history:
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
        return self.at_working_size(self.read_given(mask, soft), soft)

    def read_given(self, mask: Mask, soft: bool = False) -> Image.Image:
        """A mask as PIL "L" at the size at which it is given. Raises MaskError."""
        return images.read_given(mask, self.original_size, self.state.image.size, soft, self.turned)

    def read_each(self, masks: Sequence[Mask | None], soft: bool = False) -> list[Image.Image | None]:
        """`read_given` of each; None stays None."""
        return [None if mask is None else self.read_given(mask, soft) for mask in masks]

    def at_working_size(self, given: Image.Image, soft: bool = False) -> tuple[Image.Image, Tensor]:
        """`read_mask` of what `read_given` gave."""
        size, factor = self.state.image.size, self.editor.vae.factor
        pixels = images.at_working_size(given, self.original_size, size, self.native, soft, factor, self.part)
        return pixels, images.latent_mask(pixels, factor, soft)

    def read_regions(
        self, masks: Sequence[Mask | None], soft: bool = False
    ) -> tuple[list[Image.Image | None], Tensor, Tensor | None]:
        """The masks of an edit's instructions at working size, and `regions.partition` of them at the latent's.

        Raises MaskError where one selects nothing, also where one is None and the others leave it nothing.
        """
        return self.partition(self.read_each(masks, soft), soft)

    def partition(
        self, given: Sequence[Image.Image | None], soft: bool = False
    ) -> tuple[list[Image.Image | None], Tensor, Tensor | None]:
        """`read_regions` of what `read_given` gave."""
        pixels, cells = zip(*((None, None) if mask is None else self.at_working_size(mask, soft) for mask in given))
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

    def before(self) -> int | None:
        """The number of the state that the current one was made from; None at the beginning."""
        if self.state.made:
            return next(i for i, state in enumerate(self.states) if state.id == self.state.made["from"])
        return self.state.parent

    def undo(self) -> Image.Image:
        """Back to the state that the current one was made from. Raises CanvasError at the beginning."""
        before = self.before()
        if before is None:
            raise CanvasError("nothing to undo: this is the picture as it was opened")
        self.redo_stack.append(self.at)
        self.at = before
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
        number = whole(state)
        if number is None or not 0 <= number < len(self.states):
            raise CanvasError(f"no state {quote(state)}: this canvas has states 0 to {len(self.states) - 1}")
        self.at, self.redo_stack = number, []
        return self.image

    def retract(self, k: int, way: str = "support") -> Image.Image:
        """Take edit k of `stack`, from 1, out and keep the others; the result is a new state, and undo leads back.

        Later edits are made anew only where edit k mattered to them, see `stack`, or with way="replay" in full. Raises
        CanvasError.
        """
        return self.change("retract", k, way=way)

    def hide(self, k: int, way: str = "support") -> Image.Image:
        """Take edit k out, but keep its place in the stack: `show` brings the same bits back. Raises CanvasError."""
        return self.change("hide", k, way=way)

    def show(self, k: int, way: str = "support") -> Image.Image:
        """Put a hidden edit back. Raises CanvasError."""
        return self.change("show", k, way=way)

    def move(self, k: int, to: int, way: str = "support") -> Image.Image:
        """Make edit k the `to`-th of the stack. It keeps the noise of its depth. Raises CanvasError."""
        return self.change("move", k, to, way=way)

    def strength(self, k: int, strength: float, way: str = "support") -> Image.Image:
        """How much of edit k to keep, from 0 to 1: 0.5 is half way between before and after. Raises CanvasError."""
        return self.change("strength", k, strength, way=way)

    def revise(self, k: int, instruction: str | Sequence[tuple] | None = None, mask=..., **changes) -> Image.Image:
        """Make edit k anew with another instruction, mask (None: everywhere) or other settings. Raises EmilieError."""
        return self.change("revise", k, instruction=instruction, mask=mask, **changes)

    def scrub(self, k: int, part: float, instruction: str | Sequence[tuple] | None = None, mask=..., **changes):
        """Edit k with something else, as for `revise`, in the last part of its steps alone, 0 to 1.

        The same bits as a whole edit in which it changes there; a quarter, a half and three quarters are kept and cost
        the last steps only. Of settings those of guidance, gate and mask can change. Raises EmilieError.
        """
        return self.change("scrub", k, part, instruction=instruction, mask=mask, **changes)

    def change(self, name: str, k: int, *more, **settings) -> Image.Image:
        """One of `stack.CHANGES`, by its name; `stack.change` does it step by step."""
        for _ in stack.change(self, name, k, *more, **settings):
            pass
        return self.image

    def save(self, path: str | Path) -> None:
        """The session as one file, to which later saves add what is new; `open` reads it. Raises CanvasError.

        What another process saved there of the same session is kept, see `session.write`.
        """
        session.write(self, path)
