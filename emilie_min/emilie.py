"""EMILIE's Algorithm 1: one canvas, instruction after instruction, each starting from the latent of the one before.

`Editor` holds the networks; `Canvas` is one picture's session, a tree of `State`s. Two scales of latent meet here.
A *diffusion-scale* latent z (unit variance) is what sampling produces and what a state keeps. An *image latent* z_img
(the encoder's output, unscaled) is what the UNet wants stacked onto its input. The paper's factor f leads from one to
the other: z_img = f z. For the first edit z_img is simply E(I).
"""

import hashlib
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from PIL import Image, ImageChops
from torch import Tensor, nn

from . import sampling
from .canvas import images
from .canvas.settings import GATES, ITERATES, RESCALES, SAMPLERS
from .config import Config
from .errors import CanvasError, CheckpointError, InstructionError, MaskError, SamplingError, explain_oom
from .faster.deepcache import DeepCache

Mask = images.Picture | images.Box


def random_latent(shape: tuple[int, ...], *key: object) -> Callable[..., Tensor]:
    """A stream of unit normal latents that follows from `key` alone; drawn on the CPU, so the same on every device."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(shape, generator=generator)


class Editor:
    """InstructPix2Pix: three networks, and how they denoise together."""

    def __init__(
        self,
        config: Config,
        unet: nn.Module,
        vae: nn.Module,
        text: nn.Module,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        model: str = "",
        family: str = "",
    ):
        params = config.diffusion
        self.config, self.unet, self.vae, self.text = config, unet, vae, text
        self.device, self.dtype, self.model, self.family = torch.device(device), dtype, model, family
        self.scale_factor = params.scale_factor
        self.alphas_cumprod = sampling.alphas_cumprod(params.linear_start, params.linear_end, params.timesteps)
        self.log_sigmas = sampling.log_sigmas(self.alphas_cumprod)

    @torch.no_grad()
    def encode(self, image: Image.Image) -> Tensor:
        """A working picture to its image latent, the posterior's mode, unscaled: (1, 4, h, w) float32."""
        z_img = self.vae.encode(images.to_tensor(image).to(self.device, self.dtype)).float()
        if not z_img.isfinite().all():
            raise SamplingError(f"encoding the picture gave numbers that are not finite, in {self.dtype}")
        return z_img

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """A diffusion-scale latent (B, 4, h, w) to pixels (B, 3, H, W) float32, not clamped.

        Where half precision overflows, the decoder runs again in float32, with a warning.
        """
        if not z.isfinite().all():
            what = "use --dtype float32" if self.dtype != torch.float32 else "lower the guidance scales"
            raise SamplingError(f"the sampled latent is not finite, in {self.dtype}: {what}")
        z = z.to(self.device) / self.scale_factor
        image = self.vae.decode(z.to(self.dtype)).float()
        if not image.isfinite().all() and self.dtype != torch.float32:
            warnings.warn(f"decoding overflowed in {self.dtype}: decoded again in float32", stacklevel=2)
            try:
                image = self.vae.float().decode(z.float())
            finally:
                self.vae.to(self.dtype)
        if not image.isfinite().all():
            raise SamplingError("decoding gave numbers that are not finite: are these the right weights?")
        return image

    @torch.no_grad()
    def context(self, instructions: list[str]) -> Tensor:
        """Instructions to what the UNet attends to: (B, 77, D). Raises InstructionError, TokenizerError."""
        return self.text(self.text.tokenize(instructions).to(self.device))

    @torch.no_grad()
    def denoise(
        self,
        x: Tensor,
        sigma: Tensor | float,
        z_img: Tensor,
        cond: Tensor,
        uncond: Tensor,
        text_scale: float | Tensor,
        image_scale: float | Tensor,
        weights: Tensor | Sequence[float] = (1.0,),
        unet: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Guided denoised latent: the three branches of InstructPix2Pix (Brooks et al. 2023, Eq. 3) as one batch.

        x: (B, 4, h, w) at noise level sigma (scalar or (B,)); z_img: (B or 1, 4, h, w), unscaled; cond, uncond:
        (B or 1, 77, D), of the instruction and of "" -> (B, 4, h, w) float32. For n instructions in one pass: their
        conds one after another, (n or nB, 77, D), and n weights that sum to 1, numbers or maps; n + 2 branches, n
        without guidance, which is with both scales 1. unet: what to call in the place of `self.unet`.
        """
        b, n, unet = x.shape[0], len(weights), unet or self.unet
        k = n if sampling.branches(n, text_scale, image_scale) == n else n + 2
        x, z_img = x.float(), z_img.float().expand(b, -1, -1, -1)
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu").expand(b)
        t = sampling.sigma_to_t(sigma, self.log_sigmas).float().to(x.device)
        sigma = sigma.float().to(x.device)[:, None, None, None]

        z_t = x / (sigma**2 + 1).sqrt()
        pictures = [*[z_img] * (n + 1), torch.zeros_like(z_img)][:k]  # the last branch sees neither
        stacked = torch.cat([torch.cat([z_t, z], dim=1) for z in pictures])  # (kB, 8, h, w)
        context = torch.cat([c.expand(b, -1, -1) for c in (*cond.chunk(n), uncond, uncond)[:k]])
        eps = unet(stacked.to(self.dtype), t.repeat(k), context.to(self.dtype)).float()
        denoised = sampling.to_denoised(eps, x.repeat(k, 1, 1, 1), sigma.repeat(k, 1, 1, 1)).chunk(k)
        return sampling.combine(denoised, weights, text_scale, image_scale)

    def denoiser(
        self, sigmas: Tensor, z_img: Tensor, cond: Tensor, uncond: Tensor, weights: Tensor, reuse: int = 1
    ) -> Callable[..., Tensor]:
        """`denoise` for one edit, (x, sigma, text_scale, image_scale) -> denoised; `fast` prepares the edit here.

        sigmas: (n + 1,), the noise levels to come; reuse: see `less.DeepCache`; the others as for `denoise`.
        """
        unet = DeepCache(self.unet, reuse) if reuse > 1 else self.unet
        return lambda x, sigma, *scales: self.denoise(x, sigma, z_img, cond, uncond, *scales, weights, unet)

    @torch.no_grad()
    def sample(
        self,
        z_img: Tensor,
        cond: Tensor,
        uncond: Tensor,
        sigmas: Tensor,
        noise_init: Tensor,
        noise_sampler: Callable[[float, float], Tensor],
        mask: Tensor | None = None,
        gate: str = "anchor",
        source: Tensor | None = None,
        text_scale: float = 7.5,
        image_scale: float = 1.5,
        weights: Tensor | Sequence[float] = (1.0,),
        callback: Callable[[dict], None] | None = None,
        sampler: str = "euler_ancestral",
        guidance_interval: tuple[float, float] | None = None,
        reuse: int = 1,
    ) -> Tensor:
        """One edit: from unit noise to a diffusion-scale latent (B, 4, h, w) float32, gated by a mask (Eq. 8).

        z_img: (B or 1, 4, h, w), unscaled; noise_init: (B, 4, h, w); `noise_sampler(sigma, sigma_next)` -> the same;
        mask: (B or 1, 1, h, w) in [0, 1]; gate: "anchor" leads back to `source` outside the mask (diffusion scale,
        default scale_factor * z_img), "eq8" sets eps to zero there, "guidance" gates the instruction's term alone.
        Several instructions, each in a region: cond and weights as for `denoise`, and the mask is the regions' union;
        `sampling.partition` gives both. What trades quality for time, off by default: sampler, one of
        `sampling.SAMPLERS`; guidance_interval, (low, high) noise levels between which to guide, without guidance only
        the instruction's branch is left (Kynkäänniemi et al. 2024); reuse, see `less.DeepCache`.
        """
        if gate not in GATES:
            raise SamplingError(f"unknown gate {gate!r}: choose from {', '.join(GATES)}")
        if sampler not in SAMPLERS:
            raise SamplingError(f"unknown sampler {sampler!r}: choose from {', '.join(SAMPLERS)}")
        source = self.scale_factor * z_img if source is None else source
        weights = torch.as_tensor(weights)
        z_img, source, cond, uncond, weights = (y.to(self.device) for y in (z_img, source, cond, uncond, weights))
        gated, unguided = {}, 1.0
        if mask is not None:
            mask = mask.to(self.device, torch.float32)
            if gate == "guidance":
                text_scale, unguided = mask * text_scale, mask
            elif gate == "eq8":
                gated = {"mask": mask}
            else:
                gated = {"mask": mask, "source": source.float()}
        low, high = guidance_interval or (0.0, math.inf)
        denoise = self.denoiser(sigmas, z_img, cond, uncond, weights, reuse)
        return sampling.SAMPLERS[sampler](
            lambda x, s: denoise(x, s, *((text_scale, image_scale) if low <= s <= high else (unguided, 1.0))),
            noise_init.to(self.device, torch.float32) * sigmas[0].item(),
            sigmas,
            lambda sigma, sigma_next: noise_sampler(sigma, sigma_next).to(self.device, non_blocking=True),
            callback=callback,
            **gated,
        )

    def open(self, image: images.Picture, seed: int = 0, resolution: int | str | None = None) -> "Canvas":
        """A canvas for a picture: path, PIL image or array.

        resolution: of the longer side in px, "native", or None = what the model's config names; sides become
        multiples of the config's `multiple`, native ones of what the networks need. Raises ImageError.
        """
        self.check_can_edit()
        defaults, original = self.config.sampling, images.read_image(image)
        native = isinstance(resolution, str) and resolution == "native"
        resolution = defaults.resolution if resolution is None else resolution
        multiple = self.vae.factor * 2**self.unet.num_downsamples if native else defaults.multiple
        size = images.fit_size(original.size, resolution, multiple)
        picture = images.crop(original, size) if native else images.fit(original, size)
        with explain_oom(f"at {size[0]}x{size[1]} px: lower --resolution"):
            z_img = self.encode(picture).cpu()
        seed = whole(seed, "seed")
        root = State("", self.scale_factor * z_img, picture)
        z_init = random_latent(tuple(z_img.shape), seed, "init")()
        return Canvas(self, seed, original.size, native, z_init, z_img, [root])

    def check_can_edit(self) -> None:
        """Raises CheckpointError for a UNet without room for the picture's latent."""
        if self.unet.in_channels != 2 * self.config.diffusion.channels:
            raise CheckpointError(
                f"{self.model} takes {self.unet.in_channels} channels and editing needs 8, a noisy latent and the "
                "picture's: these are Stable Diffusion weights; get InstructPix2Pix's with `emilie download`"
            )


@dataclass
class State:
    """A node in the tree of edits: what an instruction led to, and how. State 0 is the picture as it was opened."""

    instruction: str  # of several: "make it red + make it blue"
    latent: Tensor  # diffusion scale, (1, 4, h, w) float32 on the CPU
    image: Image.Image
    parent: int | None = None
    mask: Image.Image | None = None  # at working size; of several, their union
    settings: dict = field(default_factory=dict)
    f: float | None = None  # the factor with which the parent's latent became z_img; None: z_img was encoded
    regions: list[tuple[str, Image.Image | None]] = field(default_factory=list)  # several instructions and their masks


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
    undone: list[int] = field(default_factory=list)

    @property
    def state(self) -> State:
        return self.states[self.at]

    @property
    def image(self) -> Image.Image:
        """A copy of the current picture, at working size."""
        return self.state.image.copy()

    @property
    def latent(self) -> Tensor:
        """A copy of the current latent in diffusion scale, (1, 4, h, w) float32."""
        return self.state.latent.clone()

    @property
    def history(self) -> list[State]:
        """The edits that led to the current picture, first to last."""
        path, i = [], self.at
        while self.states[i].parent is not None:
            path.append(self.states[i])
            i = self.states[i].parent
        return path[::-1]

    def edit(
        self,
        instruction: str | Sequence[tuple[str, Mask | None]],
        mask: Mask | None = None,
        *,
        steps: int | None = None,
        text_scale: float | None = None,
        image_scale: float | None = None,
        gate: str = "anchor",
        soft: bool = False,
        rescale: str = "paper",
        iterate: str = "latent",
        keep_background: bool = False,
        seed: int | None = None,
        allow_empty: bool = False,
        sampler: str = "euler_ancestral",
        guidance_interval: tuple[float, float] | None = None,
        reuse: int = 1,
        callback: Callable[[dict], None] | None = None,
    ) -> Image.Image:
        """Follow an instruction, inside a mask if there is one, and make the result the current state.

        instruction: a text, or several as [(text, mask), ...], followed in one pass (n + 2 network branches a step):
        each in its mask, sharing where masks overlap, see `sampling.partition`; one mask may be None, everywhere else.
        mask: picture, array or box, see `images.read_mask`; `soft` keeps its greys. steps and scales: None = the
        config's. gate: see `Editor.sample`. rescale: how f is found, see `image_latent`. iterate: "latent" is Alg. 1,
        "image" encodes the current picture instead (what Fig. 2 compares against). keep_background: outside the
        masks keep the current picture's pixels to the bit. seed: of the noise added between steps, default the
        canvas's; two edits at the same depth of a canvas draw the same noise. allow_empty: permit the instruction "",
        to study drift. sampler, guidance_interval, reuse: faster by doing less, see `Editor.sample`.
        callback: see `sampling.sample_euler_ancestral`. An edit that fails changes nothing.
        Raises EmilieError.
        """
        editor, parent, defaults = self.editor, self.state, self.editor.config.sampling
        settings = {
            "steps": defaults.steps if steps is None else steps,
            "text_scale": defaults.text_scale if text_scale is None else text_scale,
            "image_scale": defaults.image_scale if image_scale is None else image_scale,
            "gate": gate,
            "soft": bool(soft),
            "rescale": rescale,
            "iterate": iterate,
            "keep_background": bool(keep_background),
            "seed": self.seed if seed is None else seed,
            "sampler": sampler,
            "guidance_interval": guidance_interval,
            "reuse": reuse,
        }
        settings = checked(settings)
        texts, masks = as_regions(instruction, mask, allow_empty)
        masks, weights, cells = self.read_regions(masks, soft)
        pixel_mask = None if cells is None else reduce(ImageChops.lighter, masks)
        if cells is None and keep_background:
            raise MaskError("keep_background needs a mask for every instruction: without one there is no background")

        with explain_oom(f"at {parent.image.width}x{parent.image.height} px: lower --resolution"):
            cond, uncond = editor.context([*texts, ""]).split([len(texts), 1])
            z_img, f = self.image_latent(rescale, iterate)
            latent = editor.sample(
                z_img,
                cond,
                uncond,
                sampling.get_sigmas(settings["steps"], editor.alphas_cumprod),
                self.z_init,
                random_latent(tuple(self.z_init.shape), settings["seed"], "edit", len(self.history)),
                mask=cells,
                gate=gate,
                source=parent.latent if iterate == "latent" else None,
                text_scale=settings["text_scale"],
                image_scale=settings["image_scale"],
                weights=weights,
                callback=callback,
                sampler=sampler,
                guidance_interval=settings["guidance_interval"],
                reuse=settings["reuse"],
            ).cpu()
            if keep_background:  # whatever the gate: the next edit starts from what is seen
                latent = torch.where(cells == 0, parent.latent, latent)
            image = images.to_image(editor.decode(latent))
        if keep_background:
            image = images.paste(image, parent.image, pixel_mask, feather=editor.vae.factor // 2)
        regions = list(zip(texts, masks)) if len(texts) > 1 else []
        self.states.append(State(" + ".join(texts), latent, image, self.at, pixel_mask, settings, f, regions))
        self.at, self.undone = len(self.states) - 1, []
        return self.image

    def read_mask(self, mask: Mask, soft: bool = False) -> tuple[Image.Image, Tensor]:
        """A mask as PIL "L" at working size and as cells of the latent, (1, 1, h, w). Raises MaskError."""
        pixels = images.read_mask(mask, self.original_size, self.state.image.size, self.native, soft)
        return pixels, images.latent_mask(pixels, self.editor.vae.factor, soft)

    def read_regions(
        self, masks: Sequence[Mask | None], soft: bool = False
    ) -> tuple[list[Image.Image | None], Tensor, Tensor | None]:
        """The masks of an edit's instructions at working size, and `sampling.partition` of their cells.

        Raises MaskError where one selects nothing, also where one is None and the others leave it nothing.
        """
        pixels, cells = zip(*((None, None) if mask is None else self.read_mask(mask, soft) for mask in masks))
        if pixels.count(None) > 1:
            raise MaskError("two instructions have no mask: only one can be for everywhere else")
        shares, union = sampling.partition(cells)
        if not shares.flatten(1).any(1).all():
            raise MaskError("the masks cover the whole picture: nothing is left for the instruction without one")
        return list(pixels), shares, union

    def image_latent(self, rescale: str = "paper", iterate: str = "latent") -> tuple[Tensor, float | None]:
        """z_img for the next edit, unscaled (1, 4, h, w), and the f that made it: z_img = f z (Alg. 1).

        f has to undo the factor by which diffusion-scale latents are smaller than the encoder's output, and the paper
        estimates it from the decoded picture: "paper": avg|E(D(z))| / avg|z|, the ratio of mean magnitudes;
        "signed": avg E(D(z)) / avg z to the letter, whose means can cancel, so it is refused where it is not
        within a factor of 4 of "paper"; "exact": 1 / scale_factor, what is estimated; "none": 1, to show what f is for.
        """
        editor, z = self.editor, self.state.latent
        if self.state.parent is None:
            return self.z_img, None
        if iterate == "image":
            return editor.encode(self.image), None
        if rescale in ("exact", "none"):
            f = 1 / editor.scale_factor if rescale == "exact" else 1.0
            return f * z, f
        with torch.no_grad():
            again = editor.vae.encode(editor.decode(z).to(editor.dtype)).float().cpu()
        f = paper = (again.abs().mean() / z.abs().mean()).item()
        if rescale == "signed":
            f = (again.mean() / z.mean()).item()
            if not 0.25 < f / paper < 4:
                raise SamplingError(f"rescale='signed' gives f = {f:.3g} where 'paper' gives {paper:.3g}: use that")
        return f * z, f

    def touched(self) -> Image.Image | None:
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
        self.undone.append(self.at)
        self.at = self.state.parent
        return self.image

    def redo(self) -> Image.Image:
        """Take back the last undo. Raises CanvasError if there is none since the last edit."""
        if not self.undone:
            raise CanvasError("nothing to redo")
        self.at = self.undone.pop()
        return self.image

    def save(self, path) -> None:
        """The whole session as one .safetensors file; `open_canvas` reads it. Raises CanvasError."""
        from .canvas.session import save_canvas

        save_canvas(self, path)

    def branch(self, state: int) -> Image.Image:
        """Go to any state of the tree by its number in `states`, 0 the opened picture; the next edit starts there.

        Raises CanvasError for a number that is none.
        """
        if not isinstance(state, int) or not 0 <= state < len(self.states):
            raise CanvasError(f"no state {state}: this canvas has states 0 to {len(self.states) - 1}")
        self.at, self.undone = state, []
        return self.image


def as_regions(
    instruction: str | Sequence[tuple[str, Mask | None]], mask: Mask | None, allow_empty: bool
) -> tuple[list[str], list[Mask | None]]:
    """The instructions of an edit and their masks. Raises InstructionError, MaskError."""
    regions = [(instruction, mask)]
    if isinstance(instruction, (list, tuple)):
        regions = instruction
        if mask is not None:
            raise MaskError("of several instructions each brings its own mask: [(instruction, mask), ...]")
        if not regions or not all(isinstance(region, (list, tuple)) and len(region) == 2 for region in regions):
            raise InstructionError("several instructions are given as [(instruction, mask), ...], one or more")
    for text, _ in regions:
        if not isinstance(text, str):
            raise InstructionError(f"an instruction is a text, not {type(text).__name__}")
        if not text.strip() and not allow_empty:
            raise InstructionError("the instruction is empty: say what to change")
    texts, masks = zip(*regions)
    return list(texts), list(masks)


def whole(value, name: str) -> int:
    """A whole number of any integer type as an int. Raises SamplingError."""
    try:
        return operator.index(value)
    except TypeError:
        raise SamplingError(f"{name} must be a whole number, not {value!r}") from None


def checked(settings: dict) -> dict:
    """An edit's settings as plain Python values. Raises SamplingError for what no edit can use."""
    settings = {"sampler": "euler_ancestral", "guidance_interval": None, "reuse": 1} | settings
    for key, allowed in (("gate", GATES), ("rescale", RESCALES), ("iterate", ITERATES), ("sampler", SAMPLERS)):
        if settings[key] not in allowed:
            raise SamplingError(f"unknown {key} {settings[key]!r}: choose from {', '.join(allowed)}")
    settings |= {key: whole(settings[key], key) for key in ("steps", "seed", "reuse")}
    for key in ("steps", "reuse"):
        if not 1 <= settings[key] <= 1000:
            raise SamplingError(f"{key} must be a whole number from 1 to 1000, not {settings[key]}")
    if settings["guidance_interval"] is not None:
        try:
            low, high = settings["guidance_interval"] = tuple(float(level) for level in settings["guidance_interval"])
        except (TypeError, ValueError):
            low = high = math.nan
        if not 0 <= low < high:
            raise SamplingError("guidance_interval is two noise levels, (low, high) with 0 <= low < high, or None")
    for key in ("text_scale", "image_scale"):
        try:
            settings[key] = float(settings[key])
        except (TypeError, ValueError):
            settings[key] = float("nan")
        if not abs(settings[key]) < float("inf"):
            raise SamplingError(f"{key} must be a finite number")
    return settings
